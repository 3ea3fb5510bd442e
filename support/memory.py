"""Estimates the GPU memory of a run for dry_run=true, without loading any weights.

The memory is the peak of PyTorch's allocator on each rank, computed from shapes alone. The factors
below are fitted to the live tensors of real updates and rollouts, in both precisions, and a test
compares the two.
"""

import math

import torch

GB = 1e9


def estimate(
    shape,
    parameters: int,
    config,
    *,
    precision: str,
    ranks: int,
    prompt: int,
    reference: bool,
    all_selected: bool,
) -> dict[str, float]:
    """Estimate the bytes on each rank by purpose; the peak is `total`.

    shape: the model's config; parameters: their number; prompt: tokens of the longest prompt;
    reference: a reference model is kept; all_selected: it is compared at every token.
    """
    hidden = shape.hidden_size
    layers = shape.num_hidden_layers
    vocabulary = shape.vocab_size
    head_size = getattr(shape, "head_dim", None) or hidden // shape.num_attention_heads
    query = shape.num_attention_heads * head_size
    key = (getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads) * head_size
    inner = getattr(shape, "intermediate_size", None) or 4 * hidden  # GPT-2 has no name for it
    projection = vocabulary * hidden  # parameters of the vocabulary projection, computed in fp32
    fp32 = precision == "fp32"
    size = 4 if fp32 else 2  # bytes of a weight or activation
    length = prompt + config.max_new_tokens
    completions = config.prompts_per_step * config.group_size // ranks

    parts = {
        "weights": size * parameters,
        "gradients": size * parameters,
        "optimizer": 0.0,
        "reference": 0.0,
    }
    if not config.offload:  # two moments, and fp32 master weights with bf16
        parts["optimizer"] = (8 if fp32 else 12) * parameters / ranks
    if reference:
        parts["reference"] = size * (projection if config.offload else parameters)
    # Autocast keeps bf16 copies of fp32 weights during a forward pass, without checkpointing until
    # the backward pass.
    copies = 0
    if fp32:
        # embeddings are looked up and not multiplied, so they have no bf16 copy
        embeddings = projection * (1 if shape.tie_word_embeddings else 2)
        copies = 2 * (parameters - embeddings)

    # The update. `tokens` go through the model at once; a layer keeps `inside` bytes of each for
    # its backward pass.
    rows = min(config.micro_batch_size, completions)
    if config.micro_batch_tokens:
        rows = max(1, min(rows, config.micro_batch_tokens // length))
    tokens = rows * length
    if fp32:
        inside = 8 * inner + 20 * hidden + 10 * query + 12 * key
    else:
        inside = 8 * inner + 14 * hidden + 6 * query + 4 * key
    layer = tokens * inside
    between = size * tokens * hidden  # the residual stream between two layers
    chunk = min(config.logits_chunk, rows * config.max_new_tokens)
    logits = (27 if all_selected else 16) * chunk * vocabulary
    # The peak is a chunk of logits beside the gradient of the projection, or the fp32 copies of the
    # projection and its gradient.
    logits = max(logits + (4 if fp32 else 6) * projection, 12 * projection) + 12 * tokens * hidden
    if config.gradient_checkpointing:
        # only what is between layers is kept; in backward one layer at a time is computed again
        activations = layers * between
        recomputed = 1.33 * layer
        forward = copies + activations + 0.4 * layer
    else:
        activations = copies + layers * layer
        recomputed = 0
        forward = 0
    parts["activations"] = activations + recomputed
    parts["logits"] = logits
    peaks = [forward, activations + max(logits, recomputed)]
    reference_peak = 0.5 * layer
    if reference and config.offload:
        reference_peak += size * (parameters - projection)
    largest = max(projection, inner * hidden)
    optimizer_peak = (20 if config.offload else 8) * largest
    peaks += [reference_peak, optimizer_peak]
    if ranks > 1:
        peaks.append(size * parameters)  # DDP rebuilds its buckets once, before the second update
    update = max(peaks)
    if reference:  # the reference's hidden states at the selected tokens
        fraction = 1 if all_selected else config.selection.fraction
        update += size * completions * config.max_new_tokens * fraction * hidden

    # Sampling needs keys and values of all layers, in memory that grows by 128 columns, 35 bytes
    # for each logit in the sampler, and with bf16 weights a fp32 copy of the projection.
    evaluated = config.evaluation.problems * config.evaluation.samples // ranks
    rows = min(config.rollout.batch_size, max(completions, evaluated))
    columns = prompt + 129 * math.ceil(config.max_new_tokens / 129)
    parts["KV cache"] = rows * columns * key * (6 * layers + 6 if fp32 else 4 * layers)
    parts["sampler"] = 35 * rows * vocabulary
    if not fp32:
        parts["sampler"] += 4 * projection
    # distinct prompts that are read at once
    distinct = math.ceil(rows / min(config.group_size, config.evaluation.samples))
    prefill = distinct * prompt * (6 * inner + 12 * hidden)
    sampling = copies + parts["KV cache"] + max(parts["sampler"], prefill)

    fixed = parts["weights"] + parts["gradients"] + parts["optimizer"] + parts["reference"]
    return parts | {
        "bf16 copies": copies,
        "update": fixed + update,
        "sampling": fixed + sampling,
        "total": fixed + max(update, sampling),
    }


def table(parts: dict[str, float]) -> str:
    """Write an estimate in GB, and whether it fits the GPU of this machine."""
    lines = ["memory on each rank, computed for CUDA, GB:"]
    for name, size in parts.items():
        lines.append(f"  {name:>12} {size / GB:8.2f}")
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        verdict = (
            "enough" if parts["total"] < free else "NOT enough: see docs/real-models.md on memory"
        )
        lines.append(f"this GPU has {free / GB:.1f} GB free: {verdict}")
    return "\n".join(lines)
