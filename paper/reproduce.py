"""Reproduce the paper's tables and figures by running train.py as often as they need.

    python -m paper.reproduce figure2                  # GRPO against SCOPE on 10 seeds
    python -m paper.reproduce table1 seeds=5 jobs=2    # all selections, two runs at a time
    python -m paper.reproduce all                      # everything, in the order of EXPERIMENTS
    python -m paper.reproduce tables                   # only write tables and pictures anew
    python -m paper.reproduce figure2 recipe=recipes/qwen2.5-7b.yaml data=math/train.jsonl \\
        evaluation.data=[gsm8k,math500,amc] ranks=4 out=results/7b    # a real model, on GPUs

Other key=value arguments go to every run. The results are OUT/WHAT/runs.jsonl (one line per run),
table.md and figure.png, where OUT is out= and by default results/. The same command again
continues: a finished run is never repeated, and an unfinished one is resumed. So runs whose lines
are in results/ are done again, or with other settings, only under another out=. Without a recipe
the columns are held-out Countdown problems: with 4 numbers, as in training, with 3, with 5, and
with larger ones.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from data import countdown
from paper import figures
from paper.tables import BASELINE, experiment_page, summarise_run
from support.config import (
    RunError,
    flatten,
    load_config,
    one_line_errors,
    read_run_config,
    require,
    show_help,
    split_list,
)
from support.files import lock, read_jsonl, replace_text
from support.log import FREE_ON_RESUME, versions

SETTINGS = {
    "seeds": 0,  # 0: as many as the experiment has
    "jobs": 1,  # runs at the same time; with GPUs, each uses `ranks` of them
    "ranks": 1,  # processes of each run
    # lambda if the experiment does not vary it; chosen on seeds that are not reported
    "rlvr_lambda": 0.03,
    "rlif_lambda": 0.3,
    "out": "results",
}

# ---------------------------------------------------------------- what the paper's names stand for

PARADIGMS = {"RLVR": "accuracy", "RLIF": "self_certainty"}  # the reward
SELECTIONS = {
    "Uniform": "uniform",
    "Positive-Adv.": "positive",
    "Forking": "forking",
    "Fork + Adv.": "forking_positive",
    "Non-Forking": "non_forking",
    "KL-Cov": "covariance",
    "SCOPE": "scope",
    "all tokens": "all",  # this and the next two are not the paper's
    "SCOPE + residual": "residual",
    "entropy change": "entropy_change",
}
LAMBDAS = (0.01, 0.03, 0.1, 0.3)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
METHODS = {
    "RLVR": {
        "Forking RL": "objective=forking_rl",
        "Div": "objective=div",
        # its penalty is to the policy that sampled
        "KL-Cov": "objective=kl_cov updates_per_rollout=2",
        "Clip-Cov": "objective=clip_cov",
    },
    "RLIF": {
        "Self-Certainty": "reward=self_certainty",
        "Tok-Entropy": "reward=token_entropy",
        "Traj-Entropy": "reward=trajectory_likelihood",
        "EM-RL token": "reward=trajectory_entropy",
    },
}


class Row(NamedTuple):
    """Describes a line of a table: its label, the name of its runs, and their settings.

    Rows of different experiments that train the same have the same name, and share runs.
    """

    label: str
    name: str
    overrides: str
    strength: float | None = None  # lambda, or the share of selected tokens


def figure2(section: str, coef: float) -> list:
    """List the rows of Figure 2: the baseline and SCOPE (Section 4.4)."""
    baseline = BASELINE[section]
    return [
        Row(baseline, baseline, "selection.strategy=none"),
        Row("SCOPE", f"SCOPE-{coef:g}", "selection.strategy=scope"),
    ]


def table1(section: str, coef: float) -> list:
    """List the rows of Table 1: each selection of tokens at several lambda (Section 4.2)."""
    rows = figure2(section, coef)[:1]
    for value in LAMBDAS:
        for label, strategy in SELECTIONS.items():
            overrides = f"selection.strategy={strategy} selection.kl_coef={value}"
            rows.append(Row(label, f"{label}-{value}", overrides, value))
    return rows


def figure1(section: str, coef: float) -> list:
    """List the rows of Figure 1: several shares of tokens that pay the penalty (Section 4.1).

    lambda weights the mean over the selected tokens (Eq. 15), or every token alike. At 100 % all
    tokens pay. Below, only tokens with a score above 0 can, which are about a third of all.
    """
    rows = figure2(section, coef)[:1]
    constant = coef / 0.05  # at q = 5 % the two forms are the same
    for share in SHARES:
        strategy = "scope" if share < 1 else "all"
        mean = f"selection.strategy={strategy} selection.fraction={share}"
        name = f"SCOPE-{coef:g}" if share == 0.05 else f"mean-{coef:g}-q{share:g}"
        rows.append(Row("mean over the selected", name, mean, share))
        each = f"{mean} selection.kl_coef={constant:g} selection.normaliser=tokens"
        name = f"constant-{constant:g}-q{share:g}"
        rows.append(Row("constant for a token", name, each, share))
    return rows


def table2(section: str, coef: float) -> list:
    """List the rows of Table 2: other objectives and rewards, with and without SCOPE (4.3)."""
    rows = []
    for label, overrides in METHODS[section].items():
        names = [label, f"{label} + SCOPE-{coef:g}"]
        if label == "Self-Certainty":
            names = ["INTUITOR", f"SCOPE-{coef:g}"]
        rows.append(Row(label, names[0], f"{overrides} selection.strategy=none"))
        rows.append(Row(f"{label} + SCOPE", names[1], f"{overrides} selection.strategy=scope"))
    return rows


class Experiment(NamedTuple):
    """Describes one table or figure."""

    rows: object  # the function that lists its rows
    draw: object
    seeds: int = 5
    references: tuple = ("baseline",)  # what rows are compared with, see tables.comparisons
    runs_of: str = ""  # the experiment whose runs it shows


EXPERIMENTS = {
    "figure1": Experiment(figure1, figures.over_shares, references=("baseline", "q = 5 %")),
    "figure2": Experiment(figure2, figures.bars, seeds=10),
    "table1": Experiment(table1, figures.frontier, references=("baseline", "SCOPE")),
    "table2": Experiment(table2, figures.bars, references=("alone",)),
    "figure3": Experiment(figure2, figures.pass_at_k, runs_of="figure2"),
    "table4": Experiment(figure2, None, runs_of="figure2"),
}


# ---------------------------------------------------------------- runs


def list_runs(name: str, config) -> dict:
    """Return {name of a run: (start of its line in runs.jsonl, its overrides)}, seed by seed."""
    experiment = EXPERIMENTS[name]
    runs = {}
    for seed in range(config.seeds or experiment.seeds):
        for section, reward in PARADIGMS.items():
            coef = getattr(config, f"{section.lower()}_lambda")
            common = f"seed={seed} reward={reward} selection.kl_coef={coef:g}"
            for row in experiment.rows(section, coef):
                run = f"{section}-{row.name}-seed{seed}".replace(" + ", "+").replace(" ", "-")
                line = dict(
                    section=section, row=row.label, strength=row.strength, seed=seed, run=run
                )
                runs[run] = (line, f"{common} {row.overrides}".split())
    return runs


def write_jsonl(file: Path, rows: list[dict]) -> None:
    replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def countdown_files(folder: Path, kind: dict) -> list:
    """Write files of held-out problems of the kind that is trained on and of three others."""

    def problems(count: int, **changes) -> list:
        return countdown(count, heldout=True, **kind | changes)

    sets = {
        "4-numbers": problems(100),
        "3-numbers": problems(64, numbers=3),
        "5-numbers": problems(64, numbers=5),
        "larger": problems(64, largest=50),
        "validation": problems(164)[100:],  # the first 100 are those of 4-numbers
    }
    for name, rows in sets.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return [f"{folder}/{name}.jsonl" for name in sets]


def keys_of(overrides: list) -> set:
    return {override.partition("=")[0] for override in overrides}


def common_overrides(names: list, arguments: list, config) -> list:
    """Return the arguments that every run gets; raise UserError for those that the rows set.

    Unless a recipe, data or a model is given, they evaluate on files of Countdown problems.
    """
    common = [argument for argument in arguments if not keys_of([argument]) & SETTINGS.keys()]
    given = keys_of(common)
    for name in names:
        for _, overrides in list_runs(name, config).values():
            taken = given & {"name", "resume", "dry_run", *keys_of(overrides)}
            require(
                not taken,
                f"{taken}: the runs of {name} set it themselves; for lambda give rlvr_lambda= or "
                "rlif_lambda=",
            )
    if given & {"recipe", "data", "model", "evaluation.data"}:
        files = [Path(file).stem for file in split_list(config.evaluation.data)]
        require(
            "validation" in files or "table1" not in names,
            "table1 chooses lambda on other problems: add a validation.jsonl to evaluation.data",
        )
        return common
    files = countdown_files(Path("runs/reproduce-problems"), vars(config.countdown))
    usual = f"evaluation.every=0 evaluation.samples=64 evaluation.data=[{','.join(files)}]"
    return [*usual.split(), "save_every=50", *common]


def launch(folder: Path, overrides: list, ranks: int, devices: list) -> dict:
    """Run train.py, or resume it from its last checkpoint; its output goes to runs/NAME.log.

    Returns its settings and the versions, for the run's line in runs.jsonl.
    """
    command = [sys.executable]
    if ranks > 1:
        command += f"-m torch.distributed.run --standalone --nproc_per_node={ranks}".split()
    command += [
        f"{Path(__file__).parents[1]}/train.py",
        *overrides,
        f"name={folder.name}",
        "resume=auto",
    ]
    visible = devices.pop()
    # runs share the cores, and with more threads they would wait for each other
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": visible}
    with open(f"{folder}.log", "a") as log:
        run = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    devices.append(visible)
    if run.returncode:
        raise RunError(f"a run failed: see {folder}.log; then give the same command again")
    config = read_run_config(folder)
    settings = {key: config[key] for key in config.keys() - FREE_ON_RESUME}
    return {"config": settings} | versions()


def device_slots(jobs: int, ranks: int) -> list:
    """Return the GPUs that each run may see, for as many runs as run at the same time."""
    every = ",".join(str(gpu) for gpu in range(torch.cuda.device_count()))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    starts = [slot * ranks % len(gpus) for slot in range(jobs)]
    return [",".join(gpus[start : start + ranks]) for start in starts]


def run_experiment(name: str, common: list, config) -> None:
    """Do all runs of an experiment; each becomes a line of runs.jsonl, in order.

    A run that any experiment has finished under the same name is not repeated.
    """
    out = Path(config.out)
    results = out / name / "runs.jsonl"
    runs = list_runs(name, config)
    finished = {}
    for file in out.glob("*/runs.jsonl"):
        finished |= {line["run"]: line for line in read_jsonl(file)}
    other_seeds = [line for line in read_jsonl(results) if line["run"] not in runs]
    for run in finished.keys() & runs.keys():
        settings = flatten(load_config(common + runs[run][1]))
        other = dict(finished[run]["config"].items() - settings.items())
        require(not other, f"{out} holds {run} with {other}: give another out=")

    def write_lines() -> None:
        lines = [finished[run] | line for run, (line, _) in runs.items() if run in finished]
        write_jsonl(results, lines + other_seeds)

    devices = device_slots(config.jobs, config.ranks)
    folders = {run: Path("runs") / f"{out.name}-{run}" for run in runs if run not in finished}

    def launch_run(run: str) -> dict:
        about = launch(folders[run], common + runs[run][1], config.ranks, devices)
        return {"figures": summarise_run(folders[run])} | about

    with ThreadPoolExecutor(config.jobs) as pool:
        new_lines = pool.map(launch_run, folders)  # after an error no further run starts
        for run, line in zip(folders, tqdm(new_lines, desc=name, total=len(folders))):
            finished[run] = line
            write_lines()
            for weights in ("checkpoints", "model"):  # they are not needed any more
                shutil.rmtree(folders[run] / weights, ignore_errors=True)
    write_lines()


# ---------------------------------------------------------------- the command


def main(arguments: list) -> None:
    show_help(arguments, __doc__, SETTINGS)
    what, *arguments = arguments or [""]
    require(
        what in {"all", "tables", *EXPERIMENTS},
        f"{what!r}: give all, tables, or one of {', '.join(EXPERIMENTS)}",
    )
    names = [what] if what in EXPERIMENTS else list(EXPERIMENTS)
    config = load_config(arguments, SETTINGS)
    require(min(config.jobs, config.ranks) > 0, "jobs= and ranks=: give at least 1")
    if what != "tables":
        common = common_overrides(names, arguments, config)
        with lock(Path("runs/reproduce.lock")):
            for source in dict.fromkeys(EXPERIMENTS[name].runs_of or name for name in names):
                run_experiment(source, common, config)
    for name, experiment in EXPERIMENTS.items():
        runs = read_jsonl(Path(config.out) / (experiment.runs_of or name) / "runs.jsonl")
        if runs:
            folder = Path(config.out) / name
            replace_text(folder / "table.md", experiment_page(name, runs, experiment.references))
            print(f"written: {folder}/table.md")
            if experiment.draw:
                print(figures.picture(folder / "figure.png", experiment.draw, runs))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
