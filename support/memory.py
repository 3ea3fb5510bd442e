"""The dry run: what a run would be, its settings, prompt, numbers and memory. No weight is loaded.

The memory is what PyTorch's allocator would hold at its peak on each rank, from shapes alone. The factors below were
fitted to the live tensors of real updates and rollouts (a test does so), in both precisions.
"""

import torch

GB = 1e9


def estimate(
    shape, parameters: int, config, *, precision: str, ranks: int, prompt: int, reference: bool, all_selected: bool
) -> dict[str, float]:
    """Bytes on each rank by purpose; the peak is `total`. `shape` is the model's config, `prompt` the longest prompt.

    `reference`: the initial model is kept; `all_selected`: every token is compared with it.
    """
    hidden, layers, vocabulary = shape.hidden_size, shape.num_hidden_layers, shape.vocab_size
    head_size = getattr(shape, "head_dim", None) or hidden // shape.num_attention_heads
    query = shape.num_attention_heads * head_size
    key = (getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads) * head_size
    inner = getattr(shape, "intermediate_size", None) or 4 * hidden  # GPT-2 has no name for it
    projection = vocabulary * hidden  # parameters of the vocabulary projection; its products are fp32
    wide, size = precision == "fp32", 4 if precision == "fp32" else 2
    length, offload = prompt + config.max_new_tokens, config.offload
    completions = config.prompts_per_step * config.group_size // ranks
    parts = {
        "weights": size * parameters,
        "gradients": size * parameters,
        "optimizer": 0 if offload else (8 if wide else 12) * parameters / ranks,  # two moments, and fp32 masters
        "reference": size * (projection if offload else parameters) * reference,
    }
    # Autocast keeps bf16 copies of fp32 weights while a forward lasts, without checkpointing until the backward.
    looked_up = projection * (1 if shape.tie_word_embeddings else 2)  # an embedding is no product
    copies = 2 * (parameters - looked_up) * wide

    # The update: `tokens` go through the model at once. A layer keeps `inside` bytes of each for its backward.
    rows = min(config.micro_batch_size, completions)
    if config.micro_batch_tokens:
        rows = max(1, min(rows, config.micro_batch_tokens // length))
    tokens = rows * length
    inside = 8 * inner + (
        20 * hidden + 10 * query + 12 * key if wide else 14 * hidden + 6 * query + 4 * key)
    layer, between = tokens * inside, size * tokens * hidden  # `between`: the residual stream
    logits = (27 if all_selected else 16) * min(config.logits_chunk, rows * config.max_new_tokens) * vocabulary
    # A chunk of logits beside the sum of the projection's gradients, or its fp32 gradient beside it and the weights.
    logits = max(logits + (4 if wide else 6) * projection, 12 * projection) + 12 * tokens * hidden
    if config.gradient_checkpointing:  # only what is between layers is kept; in backward one layer is made again
        kept, again = layers * between, 1.33 * layer
        forward = copies + kept + 0.4 * layer
    else:
        kept, again, forward = copies + layers * layer, 0, 0
    parts["activations"] = kept + again
    parts["logits"] = logits
    compared = completions * config.max_new_tokens * (1 if all_selected else config.selection.fraction) * reference
    largest = max(projection, inner * hidden)
    moments = {
        "forward": forward, "backward": kept + max(logits, again),
        "reference": size * (parameters - projection) * offload * reference + 0.5 * layer,
        "step": (20 if offload else 8) * largest,
        "buckets": size * parameters * (ranks > 1),  # DDP makes them anew once, before the second update
    }
    update = max(moments.values()) + size * compared * hidden

    # Sampling: keys and values of all layers, those of one layer twice, and the sampler's 44 bytes a logit. Of
    # transformers from 5.23 on; older ones repeat keys and values for each head.
    evaluated = config.evaluation.problems * config.evaluation.samples // ranks
    rows = min(config.rollout.batch_size, max(completions, evaluated))
    parts["KV cache"] = rows * length * key * (6 * layers + 20 if wide else 4 * layers)
    parts["sampler"] = 44 * rows * vocabulary
    drawing = parts["sampler"] if wide else max(
        parts["sampler"], 4 * projection + 12 * rows * vocabulary, 4 * rows * length * key)
    distinct = -(-rows // min(config.group_size, config.evaluation.samples))  # prompts read at once
    reading = distinct * prompt * (6 * inner + 12 * hidden)
    sampling = copies + parts["KV cache"] + max(drawing, reading)

    fixed = sum(parts[name] for name in ("weights", "gradients", "optimizer", "reference"))
    return parts | {"bf16 copies": copies, "update": fixed + update, "sampling": fixed + sampling,
                    "total": fixed + max(update, sampling)}


def report(
    model, tokenizer, *, changed: dict, prompts: list[list[int]], problems: int, heldout: int, stop_ids: str,
    needed: dict[str, float], config, ranks: int,
) -> str:
    """Everything that can be said without weights, on a few lines.

    changed: the keys that are not config.yaml's; prompts: token ids, of `problems` to train on and `heldout` others;
    needed: `estimate` of this config.
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
        f"rank(s) {completions // ranks} completions; {config.grpo.updates_per_rollout} update(s)",
        f"at once: up to {config.rollout.batch_size} completions sampled, and {config.micro_batch_size} updated from"
        + f" of up to {config.micro_batch_tokens:,} tokens" * (config.micro_batch_tokens > 0),
        f"prompts: up to {max(map(len, prompts))} tokens, {sum(map(len, prompts)) / len(prompts):.0f} on average",
        f"an epoch: {problems:,} problems = {epoch} steps and {problems % config.prompts_per_step} problems "
        f"left over; {config.steps} steps = {config.steps / epoch:.2f} epochs",
        f"an evaluation: {heldout} problems x {config.evaluation.samples} = "
        f"{heldout * config.evaluation.samples:,} completions, before and after training",
        "memory on each rank, computed for CUDA, GB:",
        *(f"  {name:>12} {value / GB:8.2f}" for name, value in needed.items()),
    ]
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        verdict = "enough" if needed["total"] < free else "NOT enough: see docs/real-models.md on memory"
        lines.append(f"this device has {free / GB:.1f} GB free: {verdict}")
    return "\n".join(lines)
