"""Compare the time or memory of several ways in one run, so that a busy machine slows down all.

    python -m paper.benchmark step       # a step of GRPO, of SCOPE, and with the KL on all tokens
    python -m paper.benchmark memory     # an update with a large vocabulary, in chunks and at once
    python -m paper.benchmark rollout    # tokens per second against a bare `generate`
    python -m paper.benchmark peer       # against a step of TRL's GRPOTrainer (pip install trl)

Settings of config.yaml can follow: with steps=40, `step` and `peer` time 40 steps.
"""

import copy
import dataclasses
import math
import multiprocessing
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config

import data
from paper.one_step import draw_step
from rewards import is_correct
from rollout import Rollout, sample
from support.config import flatten, load_config, lookup, nest, one_line_errors, require, show_help
from support.distributed import World, start
from support.log import versions
from train import MicroBatchLoss, Run, set_up, update

# ---------------------------------------------------------------- measuring


def seconds_of(function) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate(functions: dict, rounds: int) -> dict[str, float]:
    """Return the median seconds of each function.

    They are called in turn, after one round to warm up.
    """
    times = {name: [] for name in functions}
    for _ in tqdm(range(rounds + 1), "benchmark"):
        for name, function in functions.items():
            times[name].append(seconds_of(function))
    return {name: np.median(seconds[1:]) for name, seconds in times.items()}


def random_model(shape, stop: float):
    """Make a random model whose stop token, id 0, has about this probability."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    bias = torch.zeros(shape.vocab_size)
    bias[0] = math.log(stop * shape.vocab_size)
    model.get_output_embeddings().bias = torch.nn.Parameter(bias)
    return model


# ---------------------------------------------------------------- step and peer


def with_strategy(run: Run, strategy: str) -> Run:
    """Return the same run with another selection."""
    config = nest(flatten(run.config) | {"selection.strategy": strategy})
    return dataclasses.replace(run, config=config)


def whole_step(run: Run, number: int = 0) -> None:
    """Do parts 1 to 6 of a training step."""
    _, rollout = draw_step(run, number)
    update(run, rollout, on_policy=True)


def step(config, world: World) -> None:
    """Time the same step with each strategy in turn."""
    run = set_up(config, world, Path("runs"))
    steps = {}
    for strategy in ("none", "scope", "all"):
        steps[strategy] = partial(whole_step, with_strategy(run, strategy))
    seconds = alternate(steps, config.steps)
    for strategy, median in seconds.items():
        print(f"  {strategy:>5}: {median:.3f} s a step, {median / seconds['none']:.3f} x none")


def peer(config, world: World) -> None:
    """Time steps here and in TRL in turn: same model, problems, group size and length."""
    require(find_spec("trl") is not None, "the benchmark peer needs TRL: pip install trl")
    run = set_up(config, world, Path("runs"))
    for strategy, beta in (("none", 0.0), ("scope", 0.04)):
        ours, theirs = time_trl(with_strategy(run, strategy), beta)
        print(
            f"  {strategy}: {ours:.3f} s a step, TRL with beta={beta} {theirs:.3f} s; "
            f"{ours / theirs:.2f} x TRL"
        )


def time_trl(run: Run, beta: float) -> tuple[float, float]:
    """Return the median seconds of a step here, and of one of TRL with a KL penalty of `beta`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    config = run.config
    times = []
    prompts = data.prompt_ids(run.tokenizer, run.problems, config.prompt)
    rows = [{"prompt": run.tokenizer.decode(ids), "index": i} for i, ids in enumerate(prompts)]

    def reward(completions, index, **others):
        pairs = zip(index, completions)
        return [float(is_correct(run.problems[i], text, config.grader)) for i, text in pairs]

    class Alternate(TrainerCallback):
        def on_step_begin(self, *arguments, **others):
            self.began = time.perf_counter()

        def on_step_end(self, arguments, state, control, **others):
            theirs = time.perf_counter() - self.began
            times.append([seconds_of(partial(whole_step, run, state.global_step)), theirs])

    completions = config.prompts_per_step * config.group_size
    batch = min(config.micro_batch_size, completions)
    model = copy.deepcopy(run.policy)
    model.warnings_issued = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=config.steps + 1,
            learning_rate=0.0,
            beta=beta,
            num_generations=config.group_size,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=completions // batch,
            max_completion_length=config.max_new_tokens,
            gradient_checkpointing=False,
            bf16=run.world.dtype == torch.bfloat16,
            report_to="none",
        )
        trainer = GRPOTrainer(
            model,
            reward,
            settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=run.tokenizer,
            callbacks=[Alternate()],
        )
        trainer.train()
    ours, theirs = np.median(times[1:], axis=0)
    return ours, theirs


# ---------------------------------------------------------------- memory


def memory(config, world: World) -> None:
    """Update on 4 completions of 500 tokens, 5 % of them selected, in chunks and all at once."""
    for chunk in (128, 2048):  # 2,000 tokens: the second takes all logits at once
        # a process of its own, because its peak memory is read
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            size = pool.apply(measure_update, (chunk,))
        print(f"  logits_chunk={chunk}: {size:,.0f} MiB besides weights and gradients")


def measure_update(logits_chunk: int, vocabulary: int = 151_936) -> float:
    """Return the MiB that one update needs besides weights and gradients."""
    with start("fp32") as world:
        shape = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        policy = random_model(shape, NEVER).to(world.device)
        reference = copy.deepcopy(policy).requires_grad_(False)
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)  # in memory before the measurement
        tokens = torch.randint(1, vocabulary, (4, 500), device=world.device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        record = [torch.zeros(tokens.shape, device=world.device)] * 4
        rollout = Rollout([[5] * 12] * 4, tokens, mask, mask.any(dim=1), *record)
        rollout.advantages = torch.tensor([1.5, -0.5, -0.5, -0.5], device=world.device)
        rollout.correct = rollout.advantages > 0
        rollout.selected = torch.zeros_like(rollout.mask)
        rollout.selected[0, ::5] = True
        rollout.token_mask = rollout.selected
        config = load_config([f"logits_chunk={logits_chunk}"])
        loss = MicroBatchLoss(policy, config)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        run = Run(config, world, Path(), policy, None, [0], [], {}, reference, loss, optimizer, {})
        before = world.peak_memory()
        update(run, rollout, on_policy=True)
        return (world.peak_memory() - before) * 1e9 / 2**20


# ---------------------------------------------------------------- rollout

SMOLLM2_135M = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LONGEST = 128  # tokens of a completion, at most
NEVER = 1e-40  # as the probability to stop: every completion is of the longest length
WORKLOADS = {  # the probability to stop at each token
    "equal lengths": NEVER,
    "mean length 0.36 of the maximum": 0.02,
}


def ours(model, prompts) -> None:
    rows = list(range(len(prompts)))
    sample(model, prompts, rows, stop=[0], max_new_tokens=LONGEST, seed=0, step=0, segment=16)


def bare(model, prompts) -> None:
    """Sample all completions with one plain call of `generate`."""
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=LONGEST, eos_token_id=[0], pad_token_id=0
    )
    ids = torch.tensor(prompts, device=model.device)
    model.eval().generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)


def rollouts(config, world: World) -> None:
    """Sample 64 completions of a random model, by our sampler and by a bare `generate`."""
    for title, stop in WORKLOADS.items():
        model = random_model(SMOLLM2_135M, stop).to(world.device, world.dtype)
        prompts = [[7] * 64] * 64
        ways = {"ours": partial(ours, model, prompts), "bare": partial(bare, model, prompts)}
        seconds = alternate(ways, rounds=2)
        print(
            f"  {title}: ours {seconds['ours']:.2f} s, bare generate {seconds['bare']:.2f} s; "
            f"{seconds['bare'] / seconds['ours']:.2f} x its tokens a second"
        )


# ---------------------------------------------------------------- the command

BENCHMARKS = {"step": step, "memory": memory, "rollout": rollouts, "peer": peer}


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    what, *settings = arguments or ["step"]
    benchmark = lookup("benchmark", what, BENCHMARKS)
    # Updates change nothing, so that every step costs the same.
    frozen = ["optimizer.lr=0", "optimizer.weight_decay=0", "selection.strategy=scope"]
    config = load_config(settings + frozen)
    with start(config.precision) as world:
        print(what, versions())
        benchmark(config, world)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
