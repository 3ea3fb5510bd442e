"""Loads Hugging Face models, and computes hidden states, prompts and stop tokens.

A model is used in two parts, its hidden states and the vocabulary projection (`lm_head`), so that
the logits of a whole batch never exist. `load` refuses models whose logits are anything else than
lm_head(hidden states).
"""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from support.config import UserError, require
from support.distributed import pinned_copy

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # check_tensors reports missing tensors

# ---------------------------------------------------------------- loading

# Config fields of models whose logits are not lm_head(hidden states): Gemma 2, Cohere, Granite,
# Falcon-H1.
POST_PROCESSING = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def load(name: str, dtype: torch.dtype = torch.float32):
    """Load a model and its tokenizer from a Hugging Face folder or hub name.

    The model has no dropout, and its logits are fp32. Raises UserError if anything is missing, or
    if the logits are not lm_head(hidden states), on which grpo.py's log-probabilities and the
    sampler both rely.
    """
    tokenizer, shape = load_tokenizer(name)
    with loading(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=shape,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    check_tensors(name, report)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # some configs name their dropout otherwise
    use_fp32_logits(model.eval())
    tokens = torch.arange(8)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = model(tokens).logits
        from_hidden = model.get_output_embeddings()(hidden_states(model, tokens))
    require(bool(logits.isfinite().all()), f"model={name}: the weights are damaged: not finite")
    require(torch.allclose(logits, from_hidden, rtol=1e-3, atol=1e-3), refused(name))
    return model, tokenizer


def load_tokenizer(name: str):
    """Load the tokenizer and the config, with every dropout set to 0."""
    with loading(name):
        # AutoTokenizer would replace the tokenizer of any Qwen2 folder; this class does what
        # tokenizer.json says.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
        shape = AutoConfig.from_pretrained(name, trust_remote_code=False)
    require(
        not getattr(shape, "auto_map", None),
        f"model={name} brings its own code (auto_map in config.json), which is never run: remove "
        "auto_map if transformers knows the architecture, or give another model",
    )
    require(
        hasattr(shape, "vocab_size"),
        f"model={name} is a multimodal model ({shape.model_type}): give a model for text only",
    )
    for field, value in vars(shape).items():
        if ("dropout" in field or field == "router_jitter_noise") and value:
            # with dropout the scored distribution is not the sampled one
            setattr(shape, field, 0.0)
    require(
        all(getattr(shape, field, None) in (None, 1.0) for field in POST_PROCESSING), refused(name)
    )
    tokens = max(tokenizer.get_vocab().values(), default=0) + 1
    require(
        tokens <= shape.vocab_size,
        f"model={name}: its tokenizer has {tokens} tokens and the model only {shape.vocab_size}: "
        "give a folder whose tokenizer and weights belong together",
    )
    return tokenizer, shape


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn whatever transformers, safetensors and tokenizers raise about a model into one line."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        hint = "it needs config.json, tokenizer.json and model.safetensors"
        if not Path(name).exists():
            hint = "there is no such folder; for a name on the hub check the name and the network"
        raise UserError(f"model={name} cannot be loaded ({hint}): {reason}") from None


def refused(name: str) -> str:
    return (
        f"model={name} changes its logits after the vocabulary projection (soft-capping or "
        "scaling), which this trainer does not support: use an architecture "
        "without it, such as Qwen2, Qwen3 or Llama"
    )


def check_tensors(name: str, report: dict) -> None:
    """Raise UserError if tensors are missing, left over or of another shape.

    transformers only warns of these.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        require(
            not report[kind],
            f"model={name}: {kind} {sorted(map(str, report[kind]))[:3]}: the weights are "
            "incomplete, or do not belong to this config.json",
        )


def load_blank(name: str):
    """Load a model without weights or memory (meta tensors), and its tokenizer."""
    tokenizer, shape = load_tokenizer(name)
    model = blank(shape)
    try:
        model.generation_config = GenerationConfig.from_pretrained(name)
    except (OSError, ValueError):  # the model has none: transformers makes one from the config
        pass
    return model, tokenizer


def blank(shape):
    """Make a model of this config from meta tensors, which take no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


class FP32Head(torch.nn.Linear):
    """Computes the vocabulary projection in fp32.

    bf16 logits have 8 significant bits, and their rounding error is larger than a small KL.
    """

    fp32_weight: Tensor | None = None  # a copy that rollout.sampling_mode keeps while it samples

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.fp32_weight
        if weight is None:
            weight = self.weight.float()
        bias = self.bias
        if bias is not None:
            bias = bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), weight, bias)


def use_fp32_logits(model) -> None:
    """Replace the vocabulary projection by one that computes in fp32 with the same parameters."""
    head = model.get_output_embeddings()
    require(isinstance(head, torch.nn.Linear), refused(model.config.name_or_path))
    fp32_head = FP32Head(
        head.in_features, head.out_features, bias=head.bias is not None, device="meta"
    )
    fp32_head.weight = head.weight
    fp32_head.bias = head.bias
    model.set_output_embeddings(fp32_head)


LONG_PREFIX = 16  # with fewer tokens in common another forward pass is not worth it


def hidden_states(model, tokens: Tensor) -> Tensor:
    """Return the last hidden states of right-padded tokens.  [b, T] -> [b, T, hidden size]

    They are what the vocabulary projection takes. On a CPU the tokens with which all rows begin,
    such as worked examples or the prompt of a group, are read once, through a KV cache with
    gradient. A GPU would lose its fast attention, which takes no mask, and checkpointing has no
    cache.
    """
    prefix = 0
    checkpointing = model.training and model.is_activation_checkpointing
    if tokens.device.type == "cpu" and len(tokens) > 1 and not checkpointing:
        same = (tokens == tokens[0]).all(dim=0)
        prefix = min(int(same.cumprod(dim=0).sum()), tokens.shape[1] - 1)
    if prefix < LONG_PREFIX:
        return model.base_model(tokens, use_cache=False).last_hidden_state
    cache = DynamicCache(config=model.config)
    settings = {"past_key_values": cache, "use_cache": True}
    first = model.base_model(tokens[:1, :prefix], **settings).last_hidden_state
    cache.batch_select_indices(torch.zeros_like(tokens[:, 0]))
    rest = model.base_model(tokens[:, prefix:], **settings).last_hidden_state
    return torch.cat([first.expand(len(tokens), -1, -1), rest], dim=1)


def fingerprint(model) -> str:
    """Return a checksum of the weights and the config, whatever folder they came from."""
    shape = model.config.to_diff_dict()  # what differs from the defaults of its class
    for key in ("_name_or_path", "transformers_version"):
        shape.pop(key, None)
    value = zlib.crc32(json.dumps(shape, sort_keys=True, default=str).encode())
    for parameter in model.parameters():
        data = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(data, value)
    return f"{value:08x}"


# ---------------------------------------------------------------- a reference model in host memory


def offload_weights(reference) -> None:
    """Move the weights to host memory, except those of the vocabulary projection."""
    head = set(reference.get_output_embeddings().parameters())
    for parameter in set(reference.parameters()) - head:
        parameter.data = pinned_copy(parameter.data)


@contextmanager
def on_device(reference, device: torch.device) -> Iterator[None]:
    """Keep offloaded weights on the device while the context lasts.

    The weights never change, so nothing is copied back.
    """
    offloaded = {parameter: parameter.data for parameter in reference.parameters()}
    try:
        for parameter, host in offloaded.items():
            parameter.data = host.to(device, non_blocking=True)
        yield
    finally:
        for parameter, host in offloaded.items():
            parameter.data = host


# ---------------------------------------------------------------- prompts and stop tokens


def encode_prompts(tokenizer, texts: list[str], *, chat: bool, system: str = "") -> list[list[int]]:
    """Return the token ids of prompts, each as the user's turn of the chat template if `chat`."""
    if not chat:
        return [without_end(ids, tokenizer.eos_token_id) for ids in tokenizer(texts).input_ids]
    before = []
    if system:
        before.append({"role": "system", "content": system})
    chats = [[*before, {"role": "user", "content": text}] for text in texts]
    rendered = render_chat(tokenizer, chats, add_generation_prompt=True)
    for text, prompt in zip(texts, rendered):
        require(
            text.strip() in prompt,
            "the model's chat template does not write the user's message into the prompt: repair "
            "its chat_template, or give prompt.chat=never to use prompt.plain",
        )
        require(
            system.strip() in prompt,
            "the model's chat template ignores prompt.system: leave it empty and say it in "
            "prompt.math, or give prompt.chat=never",
        )
    # the template writes the special tokens itself
    return tokenizer(rendered, add_special_tokens=False).input_ids


def without_end(ids: list[int], eos: int | None) -> list[int]:
    """Drop the end-of-text token that some tokenizers append: a prompt has not ended."""
    if ids and ids[-1] == eos:
        return ids[:-1]
    return ids


def render_chat(tokenizer, chat: list, **arguments):
    """Apply the chat template; raise UserError with what the template complains about."""
    try:
        # Llama 3's template prints today's date unless it is given one; but a resumed run must have
        # the same prompts.
        return tokenizer.apply_chat_template(
            chat, tokenize=False, date_string="26 Jul 2024", **arguments
        )
    except Exception as error:  # of any kind: Gemma's template refuses a system message
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the model's chat template refuses the prompt ({reason}): leave prompt.system "
            "empty, and say it in prompt.math"
        ) from None


def check_lengths(shape, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raise UserError if the longest prompt and a completion do not fit the context.

    `shape` is the model's config.
    """
    longest = max(map(len, prompts))
    context = shape.max_position_embeddings
    require(
        longest + max_new_tokens <= context,
        f"max_new_tokens={max_new_tokens}: with the longest prompt of {longest} tokens it does not "
        f"fit the model's context of {context}: lower it or shorten the prompt",
    )


# Special tokens that end a turn or a text in well-known families. A Qwen base model's eos is
# <|endoftext|>, but its chat template ends turns with <|im_end|>: if only one of them
# stopped it, the model could go on and write the next turns itself.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>")


def stop_ids(model, tokenizer) -> list[int]:
    """Return every token id that ends a completion.

    These are the eos of the model (one or a list) and of the tokenizer, and those of END_TOKENS
    that the tokenizer has.
    """
    eos = model.generation_config.eos_token_id
    if not isinstance(eos, list):
        eos = [eos]
    special = tokenizer.get_added_vocab()
    end_tokens = [special.get(token) for token in END_TOKENS]
    ids = {*eos, *end_tokens, tokenizer.eos_token_id} - {None}
    require(
        bool(ids), "the model has no stop token: set eos_token_id in its generation_config.json"
    )
    return sorted(ids)


def set_stop(model, stop: list[int]) -> None:
    """Save the stop ids with the model, so that whoever loads it stops where training stopped."""
    generation = model.generation_config
    generation.eos_token_id = stop
    try:
        generation.validate(strict=True)
    except ValueError:
        # For example a temperature without do_sample, which transformers loads but refuses to save.
        # Keep only the special tokens.
        model.generation_config = GenerationConfig(
            eos_token_id=stop,
            bos_token_id=generation.bos_token_id,
            pad_token_id=generation.pad_token_id,
        )


def describe_ids(ids: list[int], tokenizer) -> str:
    """Return a readable list of token ids and their tokens."""
    return ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in ids)
