"""Compare methods when each is tuned alike: on validation problems first, then on new seeds.

    python -m paper.study toy jobs=2         # the toy model; a seed draws everything
    python -m paper.study smollm2 jobs=2     # a real language model; see recipes/smollm2-135m.yaml
    python -m paper.study tables             # only write the tables and pictures anew

Every method is trained at every rate and lambda on the tuning seeds, and evaluated on validation
problems at some steps. The rate, lambda and step with the highest mean Pass@1 there are the choice
of the method. Then the choices are trained on other seeds and evaluated on the test problems. The
methods are done one after the other. Each run is a line of results/STUDY/runs.jsonl. The same
command again continues: finished runs are not repeated, and an unfinished one is resumed. Other
key=value arguments go to every run.
"""

import json
import platform
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import countdown
from evaluate import markdown_table, pass_at_k
from paper import figures
from paper.reproduce import device_slots, launch, write_jsonl
from support.config import load_config, lookup, one_line_errors, require, show_help
from support.files import lock, read_jsonl, replace_text

SETTINGS = {"jobs": 1, "ranks": 1, "out": "results"}


class Study(NamedTuple):
    """Describes what is compared, and how it is tuned."""

    overrides: str  # of every run; {seed} is filled in
    tuning: str  # of the runs that choose settings
    test: str  # of the runs that are reported
    methods: dict[str, str]  # label -> overrides
    rates: tuple  # of methods without a penalty
    penalised_rates: tuple
    coefs: tuple  # lambda, for methods with a penalty
    stops: tuple  # training steps after which the model is evaluated
    tuning_seeds: tuple
    seeds: tuple


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
STUDIES = {
    "smollm2": Study(
        overrides="recipe=recipes/smollm2-135m.yaml seed={seed} save_every=5 keep=1",
        tuning="evaluation.data=runs/smollm2/validation.jsonl evaluation.problems=50 "
        "evaluation.samples=16 evaluation.samples_between=16 evaluation.every=20",
        test="evaluation.data=runs/smollm2/test.jsonl evaluation.problems=100 "
        "evaluation.samples=64 evaluation.every=0",
        methods={
            name: METHODS[name] for name in ("GRPO", "SCOPE", "Uniform", "KL-Cov", "entropy change")
        },
        rates=(5e-6, 1e-5),
        penalised_rates=(1e-5,),  # GRPO's choice; a run takes 20 minutes or more
        coefs=(0.1, 0.3, 1.0),
        stops=(20, 40),
        tuning_seeds=(1000,),
        seeds=(0, 1, 2),
    ),
    "toy": Study(
        # a seed draws the problems, the base model, the order, the samples and the evaluation
        overrides="data=runs/toy/train-{seed}.jsonl toy.seed={seed} evaluation.seed={seed} "
        "seed={seed} optimizer.schedule=constant save_every=50 keep=1",
        tuning="evaluation.data=runs/toy/validation.jsonl evaluation.samples=64 "
        "evaluation.samples_between=64 evaluation.every=50",
        test="evaluation.data=[runs/toy/4-numbers.jsonl,runs/toy/3-numbers.jsonl,"
        "runs/toy/5-numbers.jsonl,runs/toy/larger.jsonl] evaluation.problems=300 "
        "evaluation.samples=128 evaluation.every=0",
        methods=METHODS,
        rates=(5e-5, 1e-4, 2e-4),
        penalised_rates=(5e-5, 1e-4, 2e-4),
        coefs=(0.03, 0.1, 0.3, 1.0),
        stops=(50, 100, 200),
        tuning_seeds=(1000, 1001),
        seeds=(0, 1, 2, 3, 4),
    ),
}


def write_toy_problems(folder: Path) -> None:
    """Write the toy's problems: 64 to train on for each seed, to choose settings, and to test.

    The test problems are of the kind that is trained on and of three other kinds. No file has a
    problem of another one.
    """
    kind = vars(load_config([]).countdown)
    toy = STUDIES["toy"]
    pool = countdown(64 * (len(toy.seeds) + len(toy.tuning_seeds)), heldout=False, **kind)
    files = {}
    for i, seed in enumerate(toy.seeds + toy.tuning_seeds):
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
    own = f"optimizer.lr={line['rate']} optimizer.warmup={warmup:g} steps={line['steps']}"
    if line["coef"]:
        own += f" selection.kl_coef={line['coef']}"
    common = study.overrides.format(seed=line["seed"])
    return f"{common} {stage} {study.methods[line['method']]} {own}".split()


def tuning_lines(study: Study, method: str) -> list[dict]:
    """List the runs that choose a method's settings: every rate and lambda."""
    penalised = "strategy=none" not in study.methods[method]
    rates = study.penalised_rates if penalised else study.rates
    coefs = study.coefs if penalised else (0.0,)
    lines = []
    for seed in study.tuning_seeds:
        for rate in rates:
            for coef in coefs:
                lines.append(line_of(method, rate, coef, seed, max(study.stops), "tuning"))
    return lines


def settings_of(runs: list[dict]) -> dict:
    """Return {(method, rate, coef, step): [validation metrics of each tuning seed]}."""
    settings: dict[tuple, list] = {}
    for run in runs:
        if run["stage"] == "tuning":
            for step, metrics in run["validation"].items():
                key = (run["method"], run["rate"], run["coef"], int(step))
                settings.setdefault(key, []).append(metrics)
    return settings


def choose(runs: list[dict], metric: str = "pass@1") -> dict[str, tuple]:
    """Return for each method the (method, rate, coef, step) of the highest mean on validation."""
    settings = settings_of(runs)
    choices = {}
    for key in sorted(settings, key=lambda key: np.mean([row[metric] for row in settings[key]])):
        choices[key[0]] = key  # the last one of a method is its highest
    return choices


def test_lines(study: Study, method: str, runs: list[dict]) -> list[dict]:
    """List the runs that are reported: a method's choice, on the seeds."""
    _, rate, coef, step = choose(runs)[method]
    return [line_of(method, rate, coef, seed, step, "test") for seed in study.seeds]


def summarise(folder: Path, stage: str, stops: tuple) -> dict:
    """Return what a finished run adds to its line.

    A tuning run has {step: validation metrics}. A test run has for each file the number of samples,
    the number of correct ones of each problem, of the base model and of the trained one, and the
    other metrics; and the accuracy and entropy of each step's completions.
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
    curves = {}
    for name in ("reward/accuracy", "entropy"):
        curves[name] = [round(row[name], 4) for row in rows if name in row]
    return {"seconds": seconds, "test": test, "curves": curves}


def cpu_model() -> str:
    """Return the name of this machine's processor."""
    try:
        names = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor()


def finish(name: str, lines: list[dict], others: list[str], config) -> list[dict]:
    """Do those runs that have no line in runs.jsonl yet; return all lines."""
    study = STUDIES[name]
    results = Path(config.out) / name / "runs.jsonl"
    runs = read_jsonl(results)
    finished = {run["run"] for run in runs}
    missing = [line for line in lines if run_name(name, line) not in finished]
    devices = device_slots(config.jobs, config.ranks)

    def run_line(line: dict) -> dict:
        folder = Path("runs") / run_name(name, line)
        arguments = overrides_of(study, line) + others
        about = launch(folder, arguments, config.ranks, devices)
        line = line | {"run": folder.name, "host": platform.node(), "cpu": cpu_model()}
        return line | summarise(folder, line["stage"], study.stops) | about

    with ThreadPoolExecutor(config.jobs) as pool:
        new = pool.map(run_line, missing)  # after an error no further run starts
        title = f"{name}, {lines[0]['method']}, {lines[0]['stage']}"
        for line in tqdm(new, desc=title, total=len(missing)):
            runs.append(line)
            write_jsonl(results, runs)
            folder = Path("runs") / line["run"]
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # it is not needed any more
            if line["stage"] == "tuning":
                shutil.rmtree(folder / "model", ignore_errors=True)
    return runs


# ---------------------------------------------------------------- the table

HEAD = """# {0}

Written by `python -m paper.study {0}`. Intervals are 95 %, from a bootstrap over seeds and problems
together, and for entropy and d_collapse over seeds. * the interval of a difference excludes 0.

"""


def bootstrap(values: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Return the mean of values [S, P] and its 95 % interval over seeds and problems."""
    rng = np.random.default_rng(0)
    seeds, problems = values.shape
    means = []
    for _ in range(resamples):
        rows = rng.integers(seeds, size=seeds)
        columns = rng.integers(problems, size=problems)
        means.append(values[rows][:, columns].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return values.mean(), low, high


def by_method(runs: list[dict]) -> dict[str, list[dict]]:
    """Return the reported runs of each method, in the order of their seeds."""
    methods: dict[str, list] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["stage"] == "test":
            methods.setdefault(run["method"], []).append(run)
    return methods


def pass_values(runs: list[dict], file: str, model: str, k: int) -> np.ndarray:
    """Return Pass@k of every problem and seed.  [S, P]"""
    results = [run["test"][file] for run in runs]
    counts = np.array([result["correct"][model] for result in results])
    return pass_at_k(results[0]["samples"], counts, k)


def metric_values(runs: list[dict], file: str, model: str, metric: str) -> np.ndarray:
    """Return another metric of every seed.  [S, 1]"""
    return np.array([[run["test"][file][model][metric][0]] for run in runs])


def interval(values: np.ndarray) -> str:
    value, low, high = bootstrap(values)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def difference_cell(values: np.ndarray) -> str:
    value, low, high = bootstrap(values)
    star = " *" if low > 0 or high < 0 else ""
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]{star}"


def validation_metrics(settings: dict) -> list[str]:
    """Return the names of the metrics to show: Pass@1, Pass@k for the largest k, and diversity."""
    names = next(iter(settings.values()))[0]
    *_, largest = [name for name in names if re.fullmatch(r"pass@\d+", name)]
    return ["pass@1", largest, "entropy", "d_collapse"]


def choices_table(runs: list[dict]) -> str:
    """Write which setting each method got, and its metrics on the validation problems."""
    settings = settings_of(runs)
    metrics = validation_metrics(settings)
    lines = []
    for method, key in sorted(choose(runs).items()):
        _, rate, coef, step = key
        means = [np.mean([row[metric] for row in settings[key]]) for metric in metrics]
        lines.append(
            [method, f"{rate:g}", f"{coef:g}", str(step), *(f"{mean:.3f}" for mean in means)]
        )
    return markdown_table(["method", "rate", "λ", "steps", *metrics], lines)


def results_table(methods: dict[str, list[dict]], file: str, ks: list[int]) -> str:
    """Write every method's metrics on a test file, the base model's first."""
    lines = []
    base = {"base model": next(iter(methods.values()))}
    for method, runs in (base | methods).items():
        model = "base" if method == "base model" else "trained"
        cells = [interval(pass_values(runs, file, model, k)) for k in ks]
        for metric in ("entropy", "d_collapse"):
            cells.append(interval(metric_values(runs, file, model, metric)))
        lines.append([method, str(len(runs)), *cells])
    titles = [f"Pass@{k}" for k in ks]
    return markdown_table(["", "seeds", *titles, "entropy", "d_collapse"], lines)


def differences_table(
    methods: dict[str, list[dict]], reference: str, file: str, ks: list[int]
) -> str:
    """Write each method minus the reference, on the same seeds and problems."""
    lines = []
    for method, runs in methods.items():
        if method != reference and len(runs) == len(methods[reference]):
            cells = []
            for k in ks:
                other = pass_values(methods[reference], file, "trained", k)
                cells.append(difference_cell(pass_values(runs, file, "trained", k) - other))
            lines.append([f"{method} − {reference}", *cells])
    return markdown_table(["difference", *(f"Pass@{k}" for k in ks)], lines)


def page(name: str, runs: list[dict]) -> str:
    """Write table.md."""
    parts = [HEAD.format(name), "## Chosen on validation problems\n\n", choices_table(runs)]
    methods = by_method(runs)
    for file, result in next(iter(methods.values()), [{"test": {}}])[0]["test"].items():
        ks = [k for k in (1, 4, 16, 64) if k <= result["samples"]]
        parts.append(f"\n## {file}\n\n{results_table(methods, file, ks)}")
        for reference in ("GRPO", "SCOPE"):
            if reference in methods:
                parts.append("\n" + differences_table(methods, reference, file, ks))
    return "".join(parts)


# ---------------------------------------------------------------- the pictures


def settings_picture(plot, runs: list[dict]):
    """Draw every setting on the validation problems: Pass@1 against Pass@k, and d_collapse.

    The choice of each method is a large point.
    """
    settings = settings_of(runs)
    one, largest, _, collapse = validation_metrics(settings)
    panels = ((one, largest), (collapse, one), (collapse, largest))
    figure, axes = plot.subplots(1, len(panels), figsize=(12, 4.4), layout="constrained")
    choices = choose(runs).values()
    for key, rows in settings.items():
        style = figures.method_style(key[0], METHODS)
        if key in choices:
            style |= {"s": 90, "label": key[0], "edgecolors": "black", "zorder": 2}
        else:
            style |= {"s": 18, "alpha": 0.35}
        for axis, (x, y) in zip(axes, panels):
            point = [np.mean([row[metric] for row in rows]) for metric in (x, y)]
            axis.scatter(*point, **style)
            axis.set(xlabel=x, ylabel=y)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return figure


# ---------------------------------------------------------------- the command


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__, SETTINGS)
    what, *arguments = arguments or [""]
    if what != "tables":
        study = lookup("study", what, STUDIES)
        config = load_config(arguments, SETTINGS)
        require(min(config.jobs, config.ranks) > 0, "jobs= and ranks=: give at least 1")
        others = [a for a in arguments if a.partition("=")[0] not in SETTINGS]
        with lock(Path("runs/study.lock")):
            if what == "toy":
                write_toy_problems(Path("runs/toy"))
            for method in study.methods:
                runs = finish(what, tuning_lines(study, method), others, config)
                finish(what, test_lines(study, method, runs), others, config)
    out = Path(load_config(arguments, SETTINGS).out)
    for name in STUDIES:
        runs = read_jsonl(out / name / "runs.jsonl")
        if runs:
            replace_text(out / name / "table.md", page(name, runs))
            print(f"written: {out / name}/table.md")
            print(figures.picture(out / name / "settings.png", settings_picture, runs))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
