"""What things cost, as ratios of times or memory from one run, so that a slow or busy machine slows both sides.

    python benchmark.py step                    # a step with SCOPE's penalty, with none, and on all tokens
    python benchmark.py memory                  # an update at a vocabulary of 151,936, against one with full logits
    python benchmark.py rollout                 # tokens a second, against one bare `generate`: equal and skewed lengths
    python benchmark.py peer                    # a step of TRL's GRPOTrainer (pip install trl), same model and problems

Any key of config.yaml can follow. What is compared alternates, but for memory; medians are divided.
"""

import sys

from support import config as configs
from support import help

if __name__ == "__main__":
    with configs.one_line_errors():
        help.answer(sys.argv[1:], __doc__, configs.read_defaults())
        KEYS = configs.training_keys(sys.argv[2:])

import copy
import itertools
import multiprocessing
import tempfile
import time
from functools import partial

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import data
import grpo
import rollout
import step as steps
from support import distributed, processes

# ---------------------------------------------------------------- measuring


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternating(functions: dict, rounds: int) -> dict[str, float]:
    """The median seconds of each function over `rounds`, taken in turn and every other time backwards; one warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in tqdm(range(rounds + 1), desc="benchmark", unit="round", leave=False, disable=None):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            started = clock()
            functions[name]()
            seconds[name].append(clock() - started)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def random_model(*, vocabulary: int, stop: float = 0.0, dtype=torch.float32, device="cpu"):
    """A small Qwen2 of random weights that draws its stop token, id 0, with about this probability each time."""
    torch.manual_seed(0)
    shape = Qwen2Config(vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, eos_token_id=0,
                        bos_token_id=None, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(shape).to(device, dtype)
    logit = float(np.log(stop * vocabulary / (1 - stop))) if stop else -100.0
    model.get_output_embeddings().bias = torch.nn.Parameter(
        torch.tensor([logit] + [0.0] * (vocabulary - 1), dtype=dtype, device=device), requires_grad=False)
    return model


def hazard(mean: float, longest: int) -> float:
    """The chance to stop at each token that gives completions of this mean length, cut at `longest`."""
    chances = np.geomspace(1e-6, 0.9, 100_000)
    return float(chances[np.abs((1 - (1 - chances) ** longest) / chances - mean).argmin()])


# ---------------------------------------------------------------- step

STRATEGIES = ("none", "scope", "all")


def step(config, world) -> None:
    """Every strategy in turn updates from the same rollouts."""
    configs.require(config.grpo.updates_per_rollout == 1, "grpo.updates_per_rollout: the benchmark times one update")
    run, numbers, drawn = a_run(config, world), itertools.count(), []

    def draw():
        drawn[:] = roll_out(run, next(numbers))

    def update(strategy):
        run.config.selection.strategy = strategy
        learn(run, *drawn)

    draw()
    median = alternating({"rollout": draw} | {name: partial(update, name) for name in STRATEGIES}, config.steps)
    print(f"medians over {config.steps} steps: rollout and rewards {median['rollout']:.3f} s")
    for strategy in STRATEGIES:
        whole = median["rollout"] + median[strategy]
        print(f"  {strategy:>6}: selection and update {median[strategy]:.3f} s, whole step {whole:.3f} s, "
              f"{whole / (median['rollout'] + median['none']):.3f} x none")


def a_run(config, world) -> steps.Run:
    """A run whose updates change nothing, with a reference model."""
    config.optimizer.lr = config.optimizer.weight_decay = 0.0
    config.selection.strategy = "scope"
    steps.check_methods(config)
    return steps.set_up(config, data.problem_sets(config)[0], world)


def roll_out(run, number: int):
    """Steps 1-3."""
    asked, rows = steps.draw_problems(run, number)
    sampled = steps.sample(run, asked, rows, number)
    rewards, correct, _ = steps.reward(run, asked, sampled)
    return sampled, rewards, correct


def learn(run, sampled, rewards, correct) -> None:
    """Steps 4-6."""
    config = run.config
    advantages = grpo.group_advantages(rewards, config.group_size, eps=config.grpo.advantage_eps)
    selection = steps.select(sampled, sampled.logprobs, advantages, config, seed=0)
    batches = steps.MicroBatches(sampled, advantages, correct, selection, run.reference, config, run.world)
    steps.update(run.loss, run.optimizer, batches, selection, on_policy=True, world=run.world,
                 max_grad_norm=config.optimizer.max_grad_norm)


# ---------------------------------------------------------------- memory


def memory(config, world) -> None:
    """4 completions of 512 tokens, 5 % selected; each way in a process of its own, whose peak is read."""
    results, chunk = [], min(config.logits_chunk, 256)
    for name in ("chunks", "full logits"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(measured_update, (name, chunk)))
        print("  {}: {:,.0f} MiB above weights, gradients and reference, {:.2f} s".format(name, *results[-1]))
    memory, seconds, norm = (a / b for a, b in zip(*results))
    print(f"chunks of {chunk} tokens / full logits of policy and reference: memory {memory:.3f}, time {seconds:.2f}; "
          f"the norms of their gradients differ by {abs(norm - 1):.1e}")


def measured_update(name: str, chunk: int, vocabulary: int = 151_936) -> tuple[float, float, float]:
    """MiB, seconds, and the norm of the gradient."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, reference = (random_model(vocabulary=vocabulary, device=device) for _ in range(2))
    reference.requires_grad_(False)
    reference.base_model.norm.weight.mul_(1.1)  # so that there is a KL
    learning = [p for p in policy.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.grad = torch.ones_like(parameter)  # its pages are there then
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(1, vocabulary, (4, 500), generator=generator).tolist()
    sampled = rollout.from_completions([[5] * 12] * 4, completions, device)
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5], device=device)
    selected = torch.zeros_like(sampled.mask)
    selected[0, ::5] = True  # 5 % of all
    flat = {"selected": selected[sampled.mask], "marked": torch.zeros(2000, dtype=torch.bool, device=device)}
    selection = steps.Selection(selected, torch.zeros_like(selected), flat)
    config = configs.namespace(configs.nest(configs.read_defaults() | {"logits_chunk": chunk}))
    world = distributed.World(0, 1, torch.device(device))
    optimizer, loss = torch.optim.SGD(learning, lr=0.0), steps.MicroBatchLoss(policy, config, 1)

    def in_chunks():
        batches = steps.MicroBatches(sampled, advantages, advantages > 0, selection, reference, config, world)
        steps.update(loss, optimizer, batches, selection, on_policy=True, world=world, max_grad_norm=1e9)

    def full_logits():
        tokens, predicts = sampled.pack(list(range(4)))
        optimizer.zero_grad(set_to_none=False)
        with world.autocast():
            logits = policy(tokens).logits.float()
            with torch.no_grad():
                log_ref = torch.log_softmax(reference(tokens).logits.float(), dim=-1)
        logprobs = torch.log_softmax(logits, dim=-1)
        own = logprobs[predicts].gather(1, sampled.tokens[sampled.mask][:, None]).squeeze(1)
        divergence = (logprobs.exp() * (logprobs - log_ref)).sum(dim=-1)[predicts]
        policy_loss = -(advantages[:, None].expand_as(selected)[sampled.mask] * own).mean()
        (policy_loss + config.selection.kl_coef * divergence[flat["selected"]].mean()).backward()

    before = peak(device)
    seconds = alternating({name: {"chunks": in_chunks, "full logits": full_logits}[name]}, rounds=2)[name]
    norm = torch.cat([p.grad.double().flatten() for p in learning]).norm().item()
    return (peak(device) - before) / 2**20, seconds, norm


def peak(device: str) -> float:
    """The largest number of bytes so far: of the device's allocator, or of the process."""
    return distributed.peak_memory(distributed.World(0, 1, torch.device(device))) * 1e9


# ---------------------------------------------------------------- rollout


def ours(model, prompts, *, longest: int, batch: int) -> None:
    rollout.sample(model, prompts, list(range(len(prompts))), stop=[0], max_new_tokens=longest, seed=0, step=0,
                   batch_size=batch, segment=32)


def bare(model, prompts, *, longest: int, batch: int) -> None:
    """One `generate` a batch, as one would write it at first."""
    how = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=longest, eos_token_id=[0], pad_token_id=0)
    for first in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[first : first + batch], device=model.device)
        model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)


def rollouts(config, world) -> None:
    """128 completions at once of up to 512 tokens; then an evaluation's, 3 problems x 128 in batches of 64."""
    longest = 512
    for title, share, count, batch in (("equal lengths", 1.0, 128, 128), ("mean 0.6 of the maximum", 0.6, 128, 128),
                                       ("mean 0.36", 0.36, 128, 128), ("mean 0.36, in batches", 0.36, 384, 64)):
        stop = 0.0 if share == 1 else hazard(share * longest, longest)
        model = random_model(vocabulary=2048, stop=stop, dtype=world.dtype, device=world.device)
        words = {"prompts": [[7] * 64 + [8 + i // 128] for i in range(count)], "longest": longest, "batch": batch}
        median = alternating({way.__name__: partial(way, model, **words) for way in (ours, bare)}, rounds=3)
        print(f"  {title}: ours {median['ours']:.2f} s, bare generate {median['bare']:.2f} s; "
              f"{median['bare'] / median['ours']:.2f} x its tokens a second", flush=True)


# ---------------------------------------------------------------- peer


def peer(config, world) -> None:
    """A step of ours follows each step of TRL's, on the same model, problems, group size and limit of length."""
    run = a_run(config, world)
    for strategy, beta in (("none", 0.0), ("scope", 0.04)):
        run.config.selection.strategy = strategy
        times = beside_trl(run, beta)
        ours, theirs = (float(np.median(times[name][1:])) for name in ("ours", "TRL"))
        print(f"  {strategy} / TRL at beta={beta}: {ours:.3f} s / {theirs:.3f} s = {ours / theirs:.2f}")


def beside_trl(run, beta: float) -> dict[str, list[float]]:
    """Seconds of each step of both."""
    try:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise configs.UserError(f"benchmark.py peer needs TRL ({error}): pip install trl") from None
    config, times = run.config, {"ours": [], "TRL": []}
    prompts = data.prompt_ids(run.tokenizer, run.problems, config.prompt)
    rows = [{"prompt": run.tokenizer.decode(ids), "at": i} for i, ids in enumerate(prompts)]

    def reward(completions, at, **others):
        return [float(data.is_correct(run.problems[i], text, config.reward.grader)) for text, i in zip(completions, at)]

    class Alternate(TrainerCallback):
        def on_step_begin(self, *arguments, **others):
            self.started = clock()

        def on_step_end(self, arguments, state, control, **others):
            times["TRL"].append(clock() - self.started)
            started = clock()
            learn(run, *roll_out(run, state.global_step))
            times["ours"].append(clock() - started)

    model, completions = copy.deepcopy(run.policy), config.prompts_per_step * config.group_size
    model.warnings_issued, run.tokenizer.pad_token = {}, run.tokenizer.pad_token or run.tokenizer.eos_token
    at_once = min(completions, config.micro_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, max_steps=config.steps + 1, learning_rate=0.0, beta=beta, report_to="none",
            num_generations=config.group_size, per_device_train_batch_size=at_once, save_strategy="no",
            gradient_accumulation_steps=completions // at_once, max_completion_length=config.max_new_tokens,
            temperature=config.temperature, gradient_checkpointing=config.gradient_checkpointing, disable_tqdm=True,
            bf16=run.world.precision == "bf16", use_cpu=run.world.device.type == "cpu", logging_strategy="no")
        GRPOTrainer(model, reward, settings, train_dataset=Dataset.from_list(rows), processing_class=run.tokenizer,
                    callbacks=[Alternate()]).train()
    return times


# ---------------------------------------------------------------- the command

BENCHMARKS = {"step": step, "memory": memory, "rollout": rollouts, "peer": peer}


def main(what: str, keys: dict) -> None:
    configs.require(what in BENCHMARKS, f"benchmark.py {what or '(nothing)'}: give one of {', '.join(BENCHMARKS)}, and "
                                        "then key=value words")
    config = configs.namespace(configs.nest(keys))
    world = distributed.setup(config.precision)  # before CUDA is asked for its name
    print(f"{what}, on " + ", ".join(f"{name} {value}" for name, value in processes.versions().items()))
    BENCHMARKS[what](config, world)


if __name__ == "__main__":
    with configs.one_line_errors():
        main(sys.argv[1] if len(sys.argv) > 1 else "", KEYS)
