"""Reproduce the paper's comparisons: every method is tuned alike, then run on other seeds.

    python -m paper.reproduce toy jobs=2         # the toy model; a seed draws everything
    python -m paper.reproduce smollm2 jobs=2     # a real language model; see docs/real-models.md
    python -m paper.reproduce tables             # only write the tables and pictures anew

A study is an entry of STUDIES. Each method is trained at every rate and lambda on the tuning seeds,
and evaluated on validation problems at some steps. The rate, lambda and step with the highest mean
Pass@1 there are its choice, and those with the highest Pass@16 another. Then the choices are
trained on other seeds and evaluated on the test problems. A study without tuning seeds has one
setting, and its methods may change it.

Each run is a line of OUT/STUDY/runs.jsonl, where OUT is out= and by default results/; table.md and
the pictures lie beside it. The same command again continues: a finished run is not repeated, and an
unfinished one is resumed. Other key=value arguments go to every run.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from data import countdown
from paper import figures
from paper.tables import CHOSEN_BY, choose, page
from support.config import (
    RunError,
    load_config,
    lookup,
    one_line_errors,
    read_run_config,
    require,
    show_help,
)
from support.files import lock, read_jsonl, replace_text
from support.log import FREE_ON_RESUME, versions

SETTINGS = {
    "jobs": 1,  # runs at the same time; with GPUs, each uses `ranks` of them
    "ranks": 1,  # processes of each run
    "out": "results",
}


class Study(NamedTuple):
    """Describes what is compared, and how it is tuned."""

    overrides: str  # of every run; {seed} is filled in
    test: str  # of the runs that are reported
    methods: dict[str, str]  # label -> overrides
    rates: tuple
    stops: tuple  # training steps after which the model is evaluated
    seeds: tuple
    # what chooses the settings
    tuning: str = ""  # of these runs
    tuning_seeds: tuple = ()
    coefs: tuple = ()  # lambda, for methods with a penalty


METHODS = {
    "GRPO": "selection.strategy=none",
    "SCOPE": "selection.strategy=scope",
    "Uniform": "selection.strategy=uniform",
    "Forking": "selection.strategy=forking",
    "KL-Cov": "selection.strategy=covariance",
    "entropy change": "selection.strategy=entropy_change",
    "all tokens": "selection.strategy=all",
    "Non-Forking": "selection.strategy=non_forking",
}
SCOPE = "selection.strategy=scope selection.kl_coef=0.1"  # as it was tuned in the study `toy`
OBJECTIVES = {
    "GRPO": "objective=grpo",
    "GRPO, two updates": "updates_per_rollout=2",
    "Forking RL": "objective=forking_rl",
    "Div": "objective=div",
    "KL-Cov, two updates": "objective=kl_cov updates_per_rollout=2",
    "Clip-Cov": "objective=clip_cov",
}


def some(*names: str) -> dict[str, str]:
    return {name: METHODS[name] for name in names}


TOY = Study(
    # a seed draws the problems, the base model, the order, the samples and the evaluation
    overrides="data=runs/toy/train-{seed}.jsonl toy.seed={seed} evaluation.seed={seed} "
    "seed={seed} optimizer.schedule=constant save_every=50 keep=1",
    test="evaluation.data=[runs/toy/4-numbers.jsonl,runs/toy/3-numbers.jsonl,"
    "runs/toy/5-numbers.jsonl,runs/toy/larger.jsonl] evaluation.problems=300 "
    "evaluation.samples=128 evaluation.every=0",
    methods=METHODS,
    rates=(5e-5, 1e-4, 2e-4),
    stops=(50, 100, 200),
    seeds=(0, 1, 2, 3, 4),
    tuning="evaluation.data=runs/toy/validation.jsonl evaluation.samples=64 "
    "evaluation.samples_between=64 evaluation.every=50",
    tuning_seeds=(1000, 1001),
    coefs=(0.03, 0.1, 0.3, 1.0),
)
# one setting, that of SCOPE in `toy`; problems like those of training, and harder ones
TOY_ONCE = TOY._replace(
    test="evaluation.data=[runs/toy/4-numbers.jsonl,runs/toy/5-numbers.jsonl] "
    "evaluation.problems=300 evaluation.samples=128 evaluation.every=0",
    rates=(5e-5,),
    stops=(200,),
    seeds=(0, 1, 2),
    tuning_seeds=(),
)
TOY_PAIR = TOY_ONCE._replace(
    methods={
        "GRPO": METHODS["GRPO"],
        "GRPO, 100 steps": "selection.strategy=none steps=100 optimizer.warmup=0.2",  # its choice
        "SCOPE": SCOPE,
    }
)
SMOLLM2 = Study(
    overrides="recipe=recipes/smollm2-135m.yaml seed={seed} evaluation.seed={seed} "
    "save_every=5 keep=1",
    test="evaluation.data=runs/smollm2/test.jsonl evaluation.problems=100 "
    "evaluation.samples=64 evaluation.every=0",
    methods=some("GRPO", "SCOPE", "Uniform", "KL-Cov", "entropy change"),
    rates=(5e-6, 1e-5),
    stops=(10, 20, 40),
    seeds=(0, 1, 2),
    tuning="evaluation.data=runs/smollm2/validation.jsonl evaluation.problems=100 "
    "evaluation.samples=16 evaluation.samples_between=16 evaluation.every=10",
    tuning_seeds=(1000,),
    coefs=(0.1, 0.3, 1.0),
)


def with_scope() -> dict[str, str]:
    """Return every objective alone, and with SCOPE's penalty (Table 2)."""
    methods = {}
    for name, overrides in OBJECTIVES.items():
        methods[name] = f"{overrides} selection.strategy=none"
        methods[f"{name} + SCOPE"] = f"{overrides} {SCOPE}"
    return methods


def shares() -> dict[str, str]:
    """Return SCOPE with several shares q of tokens that pay, at two λ, and GRPO (Figure 1)."""
    methods = {"GRPO": METHODS["GRPO"]}
    for coef in (0.1, 0.3):
        for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
            strategy = "scope" if share < 1 else "all"
            methods[f"λ = {coef:g}, q = {100 * share:g} %"] = (
                f"selection.strategy={strategy} selection.fraction={share} selection.kl_coef={coef}"
            )
    return methods


STUDIES = {
    "smollm2": SMOLLM2,
    # a weaker penalty, because every selection chose the lowest λ; GRPO's runs are those of smollm2
    "smollm2-weak": SMOLLM2._replace(rates=(1e-5,), coefs=(0.03,)),
    # without a verifier, once
    "smollm2-rlif": SMOLLM2._replace(
        overrides=f"{SMOLLM2.overrides} reward=self_certainty",
        methods={"GRPO": METHODS["GRPO"], "SCOPE": SCOPE},
        rates=(5e-6,),
        stops=(40,),
        seeds=(0,),
        tuning_seeds=(),
    ),
    "toy": TOY,
    "rlif": TOY._replace(  # without a verifier
        overrides=f"{TOY.overrides} reward=self_certainty",
        methods=some("GRPO", "SCOPE", "Uniform"),
        rates=(2e-5, 5e-5),
        stops=(25, 50, 100),
        tuning=TOY.tuning.replace("every=50", "every=25"),
        coefs=(0.1, 0.3, 1.0),
    ),
    # the selections of the paper with the λ of SCOPE, which is the default
    "table1": TOY_ONCE._replace(
        methods=some("GRPO", "Uniform", "Forking", "Non-Forking", "KL-Cov", "SCOPE")
        | {
            "Positive-Adv.": "selection.strategy=positive",
            "Fork + Adv.": "selection.strategy=forking_positive",
        }
    ),
    "table2": TOY_ONCE._replace(methods=with_scope()),
    "figure1": TOY_ONCE._replace(methods=shares(), seeds=(0, 1)),
    # Appendix C.2: the size of the model
    "small": TOY_PAIR._replace(overrides=f"{TOY.overrides} toy.hidden=64"),
    "large": TOY_PAIR._replace(overrides=f"{TOY.overrides} toy.hidden=192 toy.layers=4"),
    # Appendix D.1: how long the base model was trained
    "short": TOY_PAIR._replace(
        overrides=f"{TOY.overrides} toy.updates=600", test=TOY.test, seeds=TOY.seeds
    ),
    "long": TOY_PAIR._replace(overrides=f"{TOY.overrides} toy.updates=3000"),
    # Appendix D.2: what the base model does not solve in many samples
    "boundary": TOY_PAIR._replace(
        test="evaluation.data=runs/toy/4-numbers.jsonl evaluation.problems=300 "
        "evaluation.samples=1024 evaluation.every=0"
    ),
    # A study for GPUs, which was never run: docs/real-models.md
    "qwen2.5-1.5b": Study(
        # a constant rate, so that a run of 60 steps is the start of one of 117
        overrides="recipe=recipes/qwen2.5-1.5b.yaml optimizer.schedule=constant seed={seed} keep=1",
        test="evaluation.data=[math500,gsm8k,aime24] evaluation.samples=16",
        methods=METHODS,
        rates=(1e-6, 3e-6),
        stops=(60, 117),
        seeds=(0, 1, 2),
        tuning="evaluation.data=auto evaluation.problems=200 evaluation.samples=16 "
        "evaluation.samples_between=16 evaluation.every=30",
        tuning_seeds=(1000,),
        coefs=(0.03, 0.1, 0.3),
    ),
}


def write_toy_problems(folder: Path) -> None:
    """Write the toy's problems: 64 to train on for each seed, to choose settings, and to test.

    The test problems are of the kind that is trained on and of three other kinds. No file has a
    problem of another one.
    """
    kind = vars(load_config([]).countdown)
    seeds = TOY.seeds + TOY.tuning_seeds
    pool = countdown(64 * len(seeds), heldout=False, **kind)
    files = {}
    for i, seed in enumerate(seeds):
        files[f"train-{seed}"] = pool[64 * i : 64 * (i + 1)]
    heldout = countdown(500, heldout=True, **kind)
    files["4-numbers"] = heldout[:300]
    files["validation"] = heldout[300:]
    files["3-numbers"] = countdown(150, heldout=True, **kind | {"numbers": 3})
    files["5-numbers"] = countdown(150, heldout=True, **kind | {"numbers": 5})
    large = countdown(200, heldout=True, **kind | {"largest": 50})
    files["larger"] = [row for row in large if max(row["numbers"]) > kind["largest"]][:150]
    for name, problems in files.items():
        write_jsonl(folder / f"{name}.jsonl", problems)


# ---------------------------------------------------------------- runs


def write_jsonl(file: Path, rows: list[dict]) -> None:
    replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def line_of(method: str, rate: float, coef: float, seed: int, steps: int, stage: str) -> dict:
    """Return the beginning of a run's line in runs.jsonl, which says what is trained."""
    return dict(method=method, rate=rate, coef=coef, seed=seed, steps=steps, stage=stage)


def run_name(study: str, line: dict) -> str:
    name = "-".join(f"{key}{line[key]}" for key in ("method", "rate", "coef", "steps", "seed"))
    return re.sub("[^a-zA-Z0-9.-]", "", f"{study}-{line['stage']}-{name}".replace("method", ""))


def overrides_of(study: Study, line: dict) -> list[str]:
    """Return the arguments of train.py for a run.

    The warm-up is as long as in a run of the most steps, so that a run of fewer steps is its start.
    """
    stage = study.tuning if line["stage"] == "tuning" else study.test
    warmup = 0.1 * max(study.stops) / line["steps"]
    setting = f"optimizer.lr={line['rate']} optimizer.warmup={warmup:g} steps={line['steps']}"
    if line["coef"]:
        setting += f" selection.kl_coef={line['coef']}"
    common = study.overrides.format(seed=line["seed"])
    # the last one counts, so that a method can change what all have
    return f"{common} {stage} {setting} {study.methods[line['method']]}".split()


def tuning_lines(study: Study) -> list[dict]:
    """List the runs that choose each method's settings: every rate and lambda."""
    lines = []
    for method, overrides in study.methods.items():
        penalised = "strategy=none" not in overrides
        for seed, rate in product(study.tuning_seeds, study.rates):
            for coef in study.coefs if penalised else (0.0,):
                lines.append(line_of(method, rate, coef, seed, max(study.stops), "tuning"))
    return lines


def test_lines(study: Study, runs: list[dict]) -> list[dict]:
    """List the runs that are reported: each method's choices, on the seeds."""
    choices = [choose(runs, metric) for metric in CHOSEN_BY]
    lines = []
    for method in study.methods:
        settings = [(method, study.rates[0], 0.0, study.stops[0])]
        if study.tuning_seeds:
            settings = dict.fromkeys(choice[method] for choice in choices)
        for (_, rate, coef, step), seed in product(settings, study.seeds):
            lines.append(line_of(method, rate, coef, seed, step, "test"))
    return lines


def summarise(folder: Path, stage: str, stops: tuple) -> dict:
    """Return what a finished run adds to its line.

    A tuning run has {step: validation metrics}. A test run has for each file the number of samples,
    the number of correct ones of each problem, of the base model and of the trained one, and the
    other metrics.
    """
    rows = read_jsonl(folder / "metrics.jsonl")
    seconds = sum(sum(v for key, v in row.items() if key.startswith("time/")) for row in rows)
    if stage == "tuning":
        validation = {}
        for row in rows:
            if row["step"] in stops and "eval/pass@1" in row:
                metrics = {key: value for key, value in row.items() if key.startswith("eval/")}
                validation[row["step"]] = {key[5:]: value for key, value in metrics.items()}
        return {"seconds": seconds, "validation": validation}
    test = {}
    for file, result in json.loads((folder / "evaluation.json").read_text()).items():
        test[Path(file).stem] = result
    return {"seconds": seconds, "test": test}


def cpu_model() -> str:
    """Return the name of this machine's processor."""
    try:
        names = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor()


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
    if run.returncode:
        raise RunError(f"a run failed: see {folder}.log; then give the same command again")
    devices.append(visible)  # not after an error, so that no further run starts there
    config = read_run_config(folder)
    settings = {key: config[key] for key in config.keys() - FREE_ON_RESUME}
    return {"config": settings} | versions()


def device_slots(jobs: int, ranks: int) -> list:
    """Return the GPUs that each run may see, for as many runs as run at the same time."""
    every = ",".join(str(gpu) for gpu in range(torch.cuda.device_count()))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    starts = [slot * ranks % len(gpus) for slot in range(jobs)]
    return [",".join(gpus[start : start + ranks]) for start in starts]


def finish(name: str, lines: list[dict], others: list[str], config) -> list[dict]:
    """Do those runs that have no line in runs.jsonl yet; return all lines."""
    study = STUDIES[name]
    results = Path(config.out) / name / "runs.jsonl"
    runs = read_jsonl(results)
    finished = {run["run"] for run in runs}
    missing = [line for line in lines if run_name(name, line) not in finished]
    if not missing:
        return runs
    devices = device_slots(config.jobs, config.ranks)

    def run_line(line: dict) -> dict:
        folder = Path("runs") / run_name(name, line)
        arguments = overrides_of(study, line) + others
        about = launch(folder, arguments, config.ranks, devices)
        line = line | {"run": folder.name, "host": platform.node(), "cpu": cpu_model()}
        return line | summarise(folder, line["stage"], study.stops) | about

    with ThreadPoolExecutor(config.jobs) as pool:
        new = pool.map(run_line, missing)
        for line in tqdm(new, desc=f"{name}, {missing[0]['stage']}", total=len(missing)):
            runs.append(line)
            write_jsonl(results, runs)
            folder = Path("runs") / line["run"]
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # it is not needed any more
            if line["stage"] == "tuning":
                shutil.rmtree(folder / "model", ignore_errors=True)
    return runs


# ---------------------------------------------------------------- the command


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__, SETTINGS)
    what, *arguments = arguments or [""]
    if what != "tables":
        study = lookup("study", what, STUDIES)
        config = load_config(arguments, SETTINGS)
        require(min(config.jobs, config.ranks) > 0, "jobs= and ranks=: give at least 1")
        others = [a for a in arguments if a.partition("=")[0] not in SETTINGS]
        with lock(Path("runs/reproduce.lock")):
            if "runs/toy/" in study.overrides:
                write_toy_problems(Path("runs/toy"))
            runs = finish(what, tuning_lines(study), others, config)
            finish(what, test_lines(study, runs), others, config)
    out = Path(load_config(arguments, SETTINGS).out)
    for name in STUDIES:
        runs = read_jsonl(out / name / "runs.jsonl")
        if runs:
            replace_text(out / name / "table.md", page(name, runs))
            print(f"written: {out / name}/table.md")
            for file, draw in figures.pictures_of(runs).items():
                print(figures.picture(out / name / file, draw, runs))
    sizes = {label: read_jsonl(out / name / "runs.jsonl") for label, name in figures.SIZES.items()}
    if all(map(figures.has_pair, sizes.values())):
        print(figures.picture(out / "sizes.png", figures.sizes_picture, sizes))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
