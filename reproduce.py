"""The paper's tables and figures, from as many runs of train.py as they take; a finished run is never repeated.

    python reproduce.py figure2                    # GRPO against SCOPE on 10 seeds, with and without a verifier
    python reproduce.py table1 seeds=5 jobs=2      # every selection at four strengths, two runs at a time
    python reproduce.py all                        # everything, in the order of `EXPERIMENTS`
    python reproduce.py tables                     # only the tables and pictures anew, of the runs that there are
    python reproduce.py figure2 recipe=recipes/qwen2.5-7b.yaml data=math/train.jsonl \\
        evaluation.data=[gsm8k.jsonl,math500.jsonl,amc.jsonl] ranks=4      # the same of real models, on GPUs

Further words go to every run. Results: results/WHAT/runs.jsonl (a line a run), table.md, figure.png. Without recipe
the columns are held-out Countdown: 4 numbers, which training has, and 3, 5 and larger ones, which it has not.
"""

import sys

from support import config as configs
from support import help

OWN = {"seeds": 0, "first_seed": 0,  # 0 seeds: as many as the experiment has
       "jobs": 0, "ranks": 1,  # runs at a time (0: as many as there are cores or GPUs for), processes of each
       "rlvr_lambda": 0.03, "rlif_lambda": 0.3,  # where an experiment does not vary it; chosen on seed 1000, unreported
       "out": "results"}

if __name__ == "__main__":  # before torch is imported: a typo is reported at once
    with configs.one_line_errors():
        help.answer(sys.argv[1:], __doc__, OWN | configs.read_defaults())
        SETTINGS, WORDS = configs.own_words(sys.argv[2:], OWN)

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import toy
from support import figures, plots, processes, report
from support.files import replace_text
from support.runs import MAY_DIFFER

# ---------------------------------------------------------------- what the paper's names stand for

PARADIGMS = {"RLVR": ("reward=accuracy",), "RLIF": ("reward=self_certainty",)}
BASELINE = {"RLVR": "GRPO", "RLIF": "INTUITOR"}
SELECTIONS = {"Uniform": "uniform", "Positive-Adv.": "positive", "Forking": "forking",
              "Fork + Adv.": "forking_positive", "Non-Forking": "non_forking", "KL-Cov": "covariance",
              "SCOPE": "scope", "all tokens": "all", "SCOPE + residual": "residual",
              "entropy change": "entropy_change"}  # the last three are not the paper's
LAMBDAS = (0.01, 0.03, 0.1, 0.3)
COMMON = {"RLVR": 0.03, "RLIF": 0.3}  # the one lambda of Table 1's second half
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Row(NamedTuple):
    """One kind of run: its words for train.py; `strength` tells apart those that differ only in lambda or q.

    `name` is what is trained; rows of several experiments that train the same share it.
    """

    label: str
    words: tuple[str, ...]
    strength: float | None = None
    name: str = ""


def run_name(section: str, row: Row, seed: int) -> str:
    """Name a run so that a reader knows what it is: RLVR-SCOPE-0.03-seed3."""
    name = row.name or report.name_of((row.label, row.strength)).replace(", ", "-")
    return f"{section}-{name}-seed{seed}".replace(" + ", "+").replace(" ", "-")


def strength_of(word: str) -> str:
    return f"{float(word.partition('=')[2]):g}"


class Experiment(NamedTuple):
    """`rows` makes {section: rows}; the rest says how its runs are shown."""

    rows: object
    seeds: int
    references: tuple[str, ...] = ("baseline",)  # the rows that others are compared with
    draw: object = None
    runs_of: str = ""  # another experiment, whose runs these are too


def baseline(section: str, lambdas: dict) -> Row:
    return Row(BASELINE[section], (*PARADIGMS[section], "selection.strategy=none", lambdas[section]))


def figure2(lambdas: dict) -> dict[str, list[Row]]:
    """Section 4.4: the baseline and SCOPE."""
    return {name: [baseline(name, lambdas), Row("SCOPE", (*words, "selection.strategy=scope", lambdas[name]),
                                             name=f"SCOPE-{strength_of(lambdas[name])}")]
            for name, words in PARADIGMS.items()}


def table1(lambdas: dict) -> dict[str, list[Row]]:
    """Section 4.2: which tokens pay, each at several lambda."""
    return {name: [baseline(name, lambdas)]
            + [Row(label, (*words, f"selection.strategy={strategy}", f"selection.kl_coef={value}"), value)
               for value in LAMBDAS for label, strategy in SELECTIONS.items()] for name, words in PARADIGMS.items()}


def figure1(lambdas: dict) -> dict[str, list[Row]]:
    """Section 4.1: how many tokens pay; lambda over the selected ones, Eq. 15, or the same lambda for each token.

    At 100 % all pay. Below, only tokens of a score above 0 can, about a third of them: more is not taken.
    """
    sections = {}
    for name, words in PARADIGMS.items():
        rows = [baseline(name, lambdas)]
        equal = float(lambdas[name].partition("=")[2]) / 0.05  # at q = 5 % the two forms are one
        for share in SHARES:
            selected = (*words, f"selection.strategy={'scope' if share < 1 else 'all'}", f"selection.fraction={share}")
            value = strength_of(lambdas[name])
            rows.append(Row("mean over the selected", (*selected, lambdas[name]), share,
                            f"SCOPE-{value}" if share == 0.05 else f"mean-{value}-q{share:g}"))
            rows.append(Row("constant for a token", (*selected, f"selection.kl_coef={equal:g}",
                                                     "selection.normaliser=tokens"), share,
                            f"constant-{equal:g}-q{share:g}"))
        sections[name] = rows
    return sections


def table2(lambdas: dict) -> dict[str, list[Row]]:
    """Section 4.3: other objectives and rewards, alone and with SCOPE."""
    methods = {"RLVR": {"Forking RL": "objective=forking_rl", "Div": "objective=div",
                        "KL-Cov": "objective=kl_cov", "Clip-Cov": "objective=clip_cov"},
               "RLIF": {"Self-Certainty": "reward=self_certainty", "Tok-Entropy": "reward=token_entropy",
                        "Traj-Entropy": "reward=trajectory_likelihood", "EM-RL token": "reward=trajectory_entropy"}}
    off_policy = {"KL-Cov": ("grpo.updates_per_rollout=2",)}  # its penalty is to the policy that sampled
    same = {"Self-Certainty": "INTUITOR", "Self-Certainty + SCOPE": f"SCOPE-{strength_of(lambdas['RLIF'])}"}
    sections = {}
    for section, found in methods.items():
        sections[section] = []
        for label, word in found.items():
            words, both = (*PARADIGMS[section], word, lambdas[section], *off_policy.get(label, ())), f"{label} + SCOPE"
            name = same.get(both, f"{both}-{strength_of(lambdas[section])}")
            sections[section] += [Row(label, (*words, "selection.strategy=none"), name=same.get(label, label)),
                                  Row(both, (*words, "selection.strategy=scope"), name=name)]
    return sections


EXPERIMENTS = {
    "figure1": Experiment(figure1, seeds=5, references=("baseline", "q = 5 %"), draw=figures.over_strength),
    "figure2": Experiment(figure2, seeds=10, draw=figures.bars),
    "table1": Experiment(table1, seeds=5, references=("baseline", "SCOPE"), draw=figures.frontier),
    "table2": Experiment(table2, seeds=5, references=("alone",), draw=figures.bars),
    "figure3": Experiment(figure2, seeds=10, draw=figures.pass_at_k_over_seeds, runs_of="figure2"),
    "table4": Experiment(figure2, seeds=10, runs_of="figure2"),
}

# ---------------------------------------------------------------- runs


def own_problems(words: list[str]) -> bool:
    return any(word.startswith(("recipe=", "data=", "data.file=", "model=", "evaluation.data=")) for word in words)


def common_words(words: list[str]) -> list[str]:
    """What every run is given. Without a recipe or data: the benchmarks of Countdown."""
    if own_problems(words):
        return words
    words = ["evaluation.every=0", "evaluation.samples=64", "save_every=50", *words]
    keys = configs.nest(configs.training_keys(words))
    files = data.benchmarks(Path("runs") / "reproduce-problems", keys["countdown"])
    return [*words, f"evaluation.data=[{','.join(files)}]"]


def check(names: list[str], words: list[str], settings: dict) -> None:
    """Refuses, before any run, what would be overridden or could not be shown."""
    taken = {"seed", "name", "resume", "dry_run", "selection.kl_coef"}
    for name in names:
        taken |= {configs.SHORT.get(key, key) for rows in EXPERIMENTS[name].rows(lambdas_of(settings)).values()
                  for row in rows for key in (word.partition("=")[0] for word in row.words)}
    for word in words:
        key = configs.SHORT.get(word.partition("=")[0], word.partition("=")[0])
        configs.require(key not in taken, f"{word}: the rows of {', '.join(names)} set it themselves"
                                          + "; give rlvr_lambda= or rlif_lambda=" * (key == "selection.kl_coef"))
    files = [Path(file).stem for file in configs.listed(configs.training_keys(words)["evaluation.data"])]
    configs.require(len(set(files)) == len(files) and files != ["validation"],
                    f"evaluation.data: {files}: give files of different names, and not validation.jsonl alone")
    configs.require("table1" not in names or "validation" in files or not own_problems(words),
                    "table1 chooses lambda on problems of their own: add a validation.jsonl to evaluation.data")
    gpus = torch.cuda.device_count()
    configs.require(not gpus or settings["ranks"] <= gpus, f"ranks={settings['ranks']}: there are {gpus} GPUs")


def lambdas_of(settings: dict) -> dict[str, str]:
    return {name: f"selection.kl_coef={settings[f'{name.lower()}_lambda']:g}" for name in PARADIGMS}


def refuse_other_settings(out: Path, known: dict, runs: list[dict], keys: dict) -> None:
    """A name says what varies within an experiment; all else has to be as in the runs that are there."""
    for run in [run for run in runs if run["run"] in known]:
        config = known[run["run"]]["config"]
        varied = {configs.SHORT.get(key, key) for key in (word.partition("=")[0] for word in run["row_words"])}
        for key in sorted(keys.keys() & config.keys() - varied - MAY_DIFFER - {"seed"}):
            configs.require(config[key] == keys[key],
                            f"{out} holds runs of {key}={config[key]}, not {keys[key]}: give another out=")


def start(run: dict, slot: int, slots: int, settings: dict) -> subprocess.Popen:
    """One run of train.py, from its last save if it has one; its output goes to runs/NAME.log."""
    words = [*run["words"], f"name={run['name']}", "resume=auto"]
    ranks, gpus = settings["ranks"], torch.cuda.device_count()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] * (ranks > 1)
    program = [sys.executable, *launcher, str(Path(__file__).with_name("train.py"))]
    environment = dict(os.environ)
    if gpus:
        ours = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        first = slot % (gpus // ranks) * ranks
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(ours[first : first + ranks])
    else:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (slots * ranks)))
    return processes.start([*program, *words], Path("runs") / f"{run['name']}.log", environment)


def perform(name: str, words: list[str], settings: dict) -> list[dict]:
    """All runs of an experiment, seed by seed; each a line of runs.jsonl as soon as it is done. Returns the lines."""
    experiment, out = EXPERIMENTS[name], Path(settings["out"]) / name
    known = {}
    for file in sorted(Path(settings["out"]).glob("*/runs.jsonl")):
        known |= {line["run"]: line for line in report.read_lines(file)}
    common = common_words(words)
    keys = configs.training_keys(common)
    toy.model_folder(keys["model"], configs.namespace(configs.nest(keys)))  # once, not by each of the first runs
    runs, prefix = [], "" if settings["out"] == OWN["out"] else f"{Path(settings['out']).name}-"
    for seed in range(settings["first_seed"], settings["first_seed"] + (settings["seeds"] or experiment.seeds)):
        for section, rows in experiment.rows(lambdas_of(settings)).items():
            for row in rows:
                name_of_run = run_name(section, row, seed)
                runs.append({"section": section, "row": row.label, "strength": row.strength, "seed": seed,
                             "run": name_of_run, "name": prefix + name_of_run, "row_words": row.words,
                             "words": [*common, *row.words, f"seed={seed}"]})
    refuse_other_settings(out, known, runs, keys)
    slots = settings["jobs"] or max(1, (torch.cuda.device_count() or os.cpu_count() or 1) // settings["ranks"])
    names = {run["run"] for run in runs}
    others = [line for line in report.read_lines(out / "runs.jsonl") if line["run"] not in names]  # of further seeds
    missing = list({run["run"]: run for run in runs if run["run"] not in known}.values())
    with tqdm(total=len(missing), desc=name, unit="run", disable=None) as bar:
        ended = processes.in_parallel(missing, slots, lambda run, slot: start(run, slot, slots, settings))
        for count, (run, status) in enumerate(ended, start=1):
            configs.require(status == 0, f"a run failed: see runs/{run['name']}.log; then give the same command again")
            folder = Path("runs") / run["name"]
            config = {key: value for key, value in configs.read_stored(folder / "config.yaml").items()
                      if key not in MAY_DIFFER}
            known[run["run"]] = {"figures": report.figures_of(folder), "config": config, **processes.versions()}
            for large in ("checkpoints", "model"):  # nobody asks for the weights again
                shutil.rmtree(folder / large, ignore_errors=True)
            write_lines(out, runs, known, others)
            bar.update()
            if bar.disable:  # into a file: a line a run
                print(f"{name}: {count} of {len(missing)} runs, {run['section']} {run['row']} seed {run['seed']}",
                      flush=True)
    return write_lines(out, runs, known, others)


def write_lines(out: Path, runs: list[dict], known: dict, others: list[dict]) -> list[dict]:
    """runs.jsonl: the finished runs as this experiment calls them."""
    shared = ("figures", "config", "commit", "python", "torch", "transformers", "device")
    lines = [{key: run[key] for key in ("section", "row", "strength", "seed", "run")}
             | {key: known[run["run"]][key] for key in shared} for run in runs if run["run"] in known] + others
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "runs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return lines


# ---------------------------------------------------------------- tables

HEAD = """# {0}

Written by `python reproduce.py {0}`. ± is half the 95 % interval over seeds (Student). Differences are seed by seed:
* is p < 0.05, corrected for the lines of a table (Holm) but not for its columns; in brackets, on how many seeds it is
above 0. Where all seeds have the same difference there is no spread to test with, and no *.
"""


def columns_of(name: str, lines: list[dict]) -> list[list[tuple]]:
    """The columns of each table: mostly Pass@1, the mean of all samples, and d_collapse; then Pass@k, k = n."""
    if name == "table4":
        return [[(key, ("training", key)) for key in ("seconds", "tokens/s", "length", "mem_gb")]]
    files, largest = figures.benchmarks(lines)
    first, every_k = files[0], [key for key in lines[0]["figures"]["trained"][files[0]] if key.startswith("pass@")]
    if name == "figure3":
        return [[(f"{key.capitalize()} {first}", ("trained", first, key)) for key in every_k]]
    accuracy = [(f"Pass@1 {file}", ("trained", file, "pass@1")) for file in files]
    return [[*accuracy, (f"d_collapse {first}", ("trained", first, "d_collapse"))],
            [(f"{largest.capitalize()} {file}", ("trained", file, largest)) for file in files]]


def pairs_of(rows: list[tuple], reference: str, section: str) -> list[tuple]:
    """(row, what it is compared with): the baseline; SCOPE with all others; + SCOPE with none; any share with 5 %."""
    if reference == "baseline":
        pairs = [(row, (BASELINE[section], None)) for row in rows if row[0] != BASELINE[section]]
    elif reference == "alone":
        pairs = [(row, (row[0].removesuffix(" + SCOPE"), None)) for row in rows if row[0].endswith(" + SCOPE")]
    elif reference == "q = 5 %":
        pairs = [(row, (row[0], 0.05)) for row in rows if row[1] not in (None, 0.05)]
    else:
        pairs = [(own, row) for own in rows if own[0] == reference for row in rows
                 if row[0] not in (reference, BASELINE[section])]
    return [pair for pair in pairs if set(pair) <= set(rows)]  # some are not there yet


def table(name: str, lines: list[dict]) -> str:
    """table.md: for each section the means, then the paired differences, accuracy first, then breadth."""
    experiment, text = EXPERIMENTS[name], [HEAD.format(name)]
    for section in dict.fromkeys(line["section"] for line in lines):
        rows = report.by_row(lines, section)
        for title, kept in choices(name, rows, section):
            text.append(f"## {section}{title}\n")
            base = {("base model", None): {0: {"figures": {"trained": lines[0]["figures"]["base"]}}}}
            for columns in columns_of(name, lines):
                shown = (base if name != "table4" else {}) | {row: rows[row] for row in kept}
                text.append(report.means(shown, columns))
                for reference in experiment.references:
                    pairs = pairs_of(kept, reference, section)
                    text += [report.differences(rows, pairs, columns)] if pairs else []
    return "\n".join(text)


def choices(name: str, rows: dict, section: str) -> list[tuple[str, list[tuple]]]:
    """Which rows a table shows: all; for table1 each at its own best lambda, then all at one lambda."""
    if name != "table1":
        return [("", list(rows))]
    several = len({strength for _, strength in rows} - {None}) > 1  # else there is nothing to choose from yet
    best = report.best_strength(rows, ("trained", "validation", "pass@1"))
    return [(", each at its λ of highest validation accuracy", best)] * several + [
        (f", all at λ = {COMMON[section]:g}", [row for row in rows if row[1] in (None, COMMON[section])])]


# ---------------------------------------------------------------- the command


def show(name: str, lines: list[dict], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "table.md", table(name, lines))
    print(f"written: {out}/table.md, of {len(lines)} runs")
    if draw := EXPERIMENTS[name].draw:
        print(plots.picture(out / "figure.png", lambda plot: draw(plot, lines)))


def main(what: str, words: list[str], settings: dict) -> None:
    names = [what] if what in EXPERIMENTS else list(EXPERIMENTS)
    configs.require(what in {"all", "tables", *EXPERIMENTS}, f"{what!r}: give all, tables, or one of "
                                                             f"{', '.join(EXPERIMENTS)}")
    if what != "tables":
        check(names, words, settings)
        with processes.only_one(Path("runs") / "reproduce.lock"):
            for name in names:
                perform(EXPERIMENTS[name].runs_of or name, words, settings)
    out, source = Path(settings["out"]), {name: record.runs_of or name for name, record in EXPERIMENTS.items()}
    for name in EXPERIMENTS:  # those that share runs too
        lines = report.read_lines(out / source[name] / "runs.jsonl")
        if lines and source[name] in {source[asked] for asked in names}:
            show(name, lines, out / name)


if __name__ == "__main__":
    with configs.one_line_errors():
        main(sys.argv[1] if len(sys.argv) > 1 else "", WORDS, SETTINGS)
