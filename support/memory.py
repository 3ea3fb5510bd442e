"""The dry run: what a run would be, its settings, prompt, numbers and memory. No weight is loaded.

The memory is what PyTorch's allocator would hold at its peak on each rank, from shapes alone. Weights, gradients and
Adam's two moments are fp32; products run in bf16 under autocast, which keeps a bf16 copy of every weight while a
forward pass lasts. The factors below were fitted to the live tensors of real updates and rollouts (a test does so).
"""

import torch

GB = 1e9


def estimate(
    shape, parameters: int, config, *, ranks: int, prompt: int, reference: bool, all_selected: bool
) -> dict[str, float]:
    """Bytes on each rank by purpose; the peak is `total`. `shape` is the model's config, `prompt` the longest prompt.

    `reference`: the initial model is kept; `all_selected`: every token is compared with it.
    """
    hidden, layers, vocabulary = shape.hidden_size, shape.num_hidden_layers, shape.vocab_size
    head_size = getattr(shape, "head_dim", None) or hidden // shape.num_attention_heads
    query, key = shape.num_attention_heads * head_size, shape.num_key_value_heads * head_size
    length = prompt + config.max_new_tokens
    completions = config.prompts_per_step * config.group_size // ranks
    parts = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters / (ranks if config.optimizer.zero else 1),
        "reference": 4 * parameters * reference,
    }
    looked_up = 0 if shape.tie_word_embeddings else vocabulary * hidden  # an embedding is no product
    copies = 2 * (parameters - looked_up)

    # The update: `tokens` go through the model at once. A layer keeps `inside` bytes of each for its backward.
    rows = min(config.micro_batch_size, completions)
    tokens = rows * length
    inside = 20 * hidden + 10 * query + 12 * key + 8 * shape.intermediate_size
    layer, between = tokens * inside, 4 * tokens * hidden  # `between`: the residual stream, fp32
    logits = 16 * min(config.logits_chunk, rows * config.max_new_tokens) * vocabulary
    logits *= 1.7 if all_selected else 1  # two distributions at once
    projection = 4 * vocabulary * hidden  # the gradient of the vocabulary projection
    if config.gradient_checkpointing:  # only what is between layers is kept; in backward one layer is made again
        kept, again = layers * between, 1.4 * layer + projection
    else:
        kept, again = layers * layer, 0
    parts["activations"] = kept + again
    parts["logits"] = max(logits, 1.25 * projection)
    update = max(copies + kept + parts["logits"], kept + again, 3 * projection + between * layers)

    # Sampling: keys (fp32) and values (bf16) of all layers, copies of one layer's, and the sampler's 44 bytes a logit.
    evaluated = config.evaluation.problems * config.evaluation.samples // ranks
    rows = min(config.rollout.batch_size, max(completions, evaluated))
    parts["KV cache"] = rows * length * layers * key * (6 + 20 / layers)
    parts["sampler"] = 44 * rows * vocabulary
    sampling = copies + parts["KV cache"] + parts["sampler"]

    fixed = sum(parts[name] for name in ("weights", "gradients", "optimizer", "reference"))
    return parts | {"bf16 copies": copies, "update": fixed + update, "sampling": fixed + sampling,
                    "total": fixed + max(update, sampling)}


def report(
    model, tokenizer, *, changed: dict, prompts: list[list[int]], problems: int, heldout: int, stop_ids: str,
    needed: dict[str, float], config, ranks: int,
) -> str:
    """Everything that can be said without weights, on a few lines.

    changed: the keys that are not config.yaml's; prompts: token ids, of `problems` to train on and `heldout` others;
    needed: from `estimate`.
    """
    parameters = sum(p.numel() for p in model.parameters())
    completions = config.prompts_per_step * config.group_size
    epoch = problems // config.prompts_per_step
    lines = [
        "settings other than in config.yaml:",
        *(f"  {key}: {value}" for key, value in changed.items()),
        f"model: {type(model).__name__}, {parameters:,} parameters, vocabulary {model.config.vocab_size:,}, "
        f"context {model.config.max_position_embeddings:,}",
        f"first prompt: {tokenizer.decode(prompts[0])!r}",
        f"stop ids: {stop_ids}",
        f"a step: {config.prompts_per_step} prompts x {config.group_size} = {completions} completions of up to "
        f"{config.max_new_tokens} tokens, {completions * config.max_new_tokens:,} tokens in all; on each of {ranks} "
        f"rank(s) {completions // ranks} completions, {-(-completions // ranks // config.micro_batch_size)} "
        f"micro-batches of {config.micro_batch_size}; {config.grpo.updates_per_rollout} update(s)",
        f"prompts: up to {max(map(len, prompts))} tokens, {sum(map(len, prompts)) / len(prompts):.0f} on average",
        f"an epoch: {problems:,} problems = {epoch} steps and {problems % config.prompts_per_step} problems "
        f"left over; {config.steps} steps = {config.steps / epoch:.2f} epochs",
        f"an evaluation: {heldout} problems x {config.evaluation.samples} = "
        f"{heldout * config.evaluation.samples:,} completions, before and after training",
        "memory on each rank, computed for CUDA, GB:",
        *(f"  {name:>12} {value / GB:8.2f}" for name, value in needed.items()),
    ]
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        verdict = "enough" if needed["total"] < free else "NOT enough: see docs/real-models.md on memory"
        return "\n".join([*lines, f"this device has {whole / GB:.1f} GB, {free / GB:.1f} GB of them free: {verdict}"])
    return "\n".join([*lines, "no CUDA device here to compare with"])
