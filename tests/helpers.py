"""What several tests share: tiny random models in place of real ones, settings, and one rank."""

import json
import math
import os
import signal
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import data
import train
from rewards import REWARDS, grade
from rollout import Rollout, sample
from support import distributed
from support.config import load_config
from support.distributed import World
from train import MicroBatchLoss, Run, draw_problems

ROOT = Path(__file__).parents[1]
ALONE = World()
VOCABULARY = 40
# A run of the toy model with a few weights, which takes a second.
SMALL = (
    "toy.layers=1 toy.hidden=16 toy.updates=3 toy.batch=8 prompts_per_step=4 group_size=4 "
    "max_new_tokens=12 evaluation.problems=3 evaluation.samples=4 evaluation.samples_between=2 "
    "evaluation.every=2 log_every=1 save_every=2 steps=4 countdown_problems=50 "
    "selection.fraction=0.3 optimizer.lr=0.01"
).split()
ARCHITECTURES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


class Bf16World(World):
    """A World whose autocast is that of CUDA, on a CPU."""

    def autocast(self):
        return torch.autocast("cpu", dtype=torch.bfloat16)


def tiny_model(architecture: str = "qwen2", *, seed: int = 0, spread: float = 1.5, **changes):
    """Make a random 2-layer model; `spread` scales its matrices, so that its distributions are not
    flat.
    """
    config_class, model_class = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=architecture == "qwen2",
    )
    model = model_class(config_class(**shape | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(spread * 3)
    return model.eval()


def write_jsonl(path: Path, rows: list) -> str:
    """Write rows as a .jsonl file and return its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(*arguments):
    """Return the default settings with key=value arguments laid over them."""
    return load_config(list(arguments))


def run_of(policy, config, *, world=ALONE, reference=None, optimizer=None, **fields) -> Run:
    """Make a Run of a model without a folder; its optimizer does nothing unless one is given."""
    if optimizer is None:
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    loss = world.ddp(MicroBatchLoss(policy, config))
    empty = dict(folder=None, tokenizer=None, stop=[], problems=[], heldout={}, fingerprints={})
    return Run(
        config=config,
        world=world,
        policy=policy,
        reference=reference,
        loss=loss,
        optimizer=optimizer,
        **empty | fields,
    )


def roll_out(policy, tokenizer, stop, problems, step, config, world=ALONE) -> Rollout:
    """Take steps 1-3 of train.py: a rollout with its verdicts and rewards."""
    problems, rows = draw_problems(problems, step, config, world)
    prompts = data.prompt_ids(tokenizer, problems, config.prompt)
    rollout = sample(
        policy,
        prompts,
        rows,
        stop=stop,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        step=step,
    )
    rollout.correct, _ = grade(tokenizer, problems, rollout, config.grader)
    rollout.rewards = REWARDS[config.reward].function(rollout)
    return rollout


def metrics_of(name: str) -> list[dict]:
    """Read a run's metrics.jsonl without what differs between two equal runs."""
    rows = [
        json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()
    ]
    for row in rows:
        for key in list(row):
            if key.startswith("time/") or key == "mem_gb":
                del row[key]
    return rows


def weights_of(name: str) -> dict:
    """Read the weights of a finished run."""
    return AutoModelForCausalLM.from_pretrained(Path("runs") / name / "model").state_dict()


def assert_same_gradient(a, b, tolerance=1e-6):
    """Compare two gradients by name; the tolerance is relative to the length of the first."""
    size = math.sqrt(sum(g.double().pow(2).sum().item() for g in a.values()))
    squares = [(a[name].double() - b[name].double()).pow(2).sum().item() for name in a]
    error = math.sqrt(sum(squares)) / size
    assert size > 1e-3
    assert error <= tolerance, error


def fork(function) -> int:
    """Call a function in a copy of this process, which has imported all; return its number."""
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(150)  # ends a copy that hangs, as a rank that waits for another one
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_copy(command, *, stdout, stderr, env):
    """Do what `python train.py ...` does in a copy of this process."""
    assert command[:2] == [sys.executable, f"{ROOT}/train.py"]

    def run():
        with open(stdout.name, "a", buffering=1) as log, redirect_stdout(log):
            train.main(command[2:])

    return subprocess.CompletedProcess(command, exit_code(fork(run)))


def on_two_ranks(function, folder):
    """Call a function in two copies of this process, which are the ranks of a group."""
    variables = "RANK={0} LOCAL_RANK={0} WORLD_SIZE=2 LOCAL_WORLD_SIZE=2"

    def be_rank(rank):
        os.environ |= dict(pair.split("=") for pair in variables.format(rank).split())
        store = torch.distributed.FileStore(f"{folder}/store", 2)
        ranks = {"store": store, "rank": rank, "world_size": 2}
        distributed.find_ranks = lambda timeout: ranks
        function()

    children = [fork(lambda: be_rank(0)), fork(lambda: be_rank(1))]
    assert [exit_code(child) for child in children] == [0, 0]


def tuning_run(method, rate, coef, seed, **steps):
    """Return a tuning run with the Pass@1 of some steps."""
    validation = {}
    for step, value in steps.items():
        metrics = {"pass@1": value, "pass@16": 1 - value, "entropy": 0.25, "d_collapse": 0.5}
        validation[step[4:]] = metrics | {"pass@16_stderr": 9.0}  # as older lines have
    return dict(
        method=method, rate=rate, coef=coef, seed=seed, stage="tuning", validation=validation
    )


def reported_run(method, seed, counts, *, coef=0.0, steps=20):
    """Return a test run with the number of correct samples, of 4, of two problems."""
    metrics = {"entropy": [0.1 * (seed + 1), None], "d_collapse": [0.5, None]}
    result = {"base": metrics, "trained": metrics, "samples": 4}
    result["correct"] = {"base": [0, 0], "trained": counts}
    line = dict(method=method, rate=1e-5, coef=coef, seed=seed, steps=steps, stage="test")
    return line | {"test": {"file": result}}
