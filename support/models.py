"""Models from HF folders or the hub: loading, hidden states, stop tokens, chat templates.

A model is taken as two parts, hidden states and their vocabulary projection, so that logits never exist whole;
`load` refuses those whose logits are anything else than lm_head(hidden states).
"""

import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from support import distributed
from support.config import UserError

transformers.utils.logging.disable_progress_bar()  # our own bars only

# ---------------------------------------------------------------- loading


# Config fields of models whose logits are not lm_head(hidden states): Gemma 2, Cohere, Granite, Falcon-H1.
POST_PROCESSING = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
REFUSED = ("model={} post-processes its logits (soft-capping or scaling), which this trainer does not: use an "
           "architecture without it (Qwen2, Qwen3, Llama)")


@contextmanager
def loading(name: str):
    """Turns what transformers raises of a folder or hub name into one line."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, safetensors and tokenizers raise what they like
        reason, mend = " ".join(str(error).split())[:300] or type(error).__name__, ""
        if not Path(name).exists():
            mend = ": check the name and the network, or download the model and give its local folder"
        raise UserError(f"model={name} cannot be loaded: {reason}{mend}") from None


def load_tokenizer(name: str):
    """Tokenizer and config (dropout off) from an HF folder or hub name; no weights."""
    with loading(name):
        # Not AutoTokenizer: that overrides the tokenizer of any Qwen2 folder, this one does as tokenizer.json says.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False)
        shape = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if getattr(shape, "auto_map", None):
        raise UserError(f"model={name} brings code of its own (auto_map in its config.json), which is never run: take "
                        "auto_map out if transformers knows the architecture, or give another model")
    if not hasattr(shape, "vocab_size"):
        raise UserError(f"model={name} is of several parts ({shape.model_type}), as models are that also see or hear: "
                        "give one of text alone")
    for field, value in vars(shape).items():
        if "dropout" in field and value:
            setattr(shape, field, 0.0)  # a dropped unit at scoring time is a ratio other than 1
    if any(getattr(shape, field, None) not in (None, 1.0) for field in POST_PROCESSING):
        raise UserError(REFUSED.format(name))
    if (tokens := max(tokenizer.get_vocab().values(), default=0) + 1) > shape.vocab_size:
        raise UserError(f"model={name}: its tokenizer has {tokens} tokens, the model only {shape.vocab_size}: "
                        "give a folder whose two belong together")
    return tokenizer, shape


def load_blank(name: str):
    """Model without memory (meta tensors), with its own generation_config, and tokenizer."""
    tokenizer, shape = load_tokenizer(name)
    model = blank(shape)
    try:
        model.generation_config = GenerationConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):  # a model without one; made from its config then, as on loading
        pass
    return model, tokenizer


def blank(shape):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


def load(name: str, dtype: torch.dtype = torch.float32):
    """Model (dropout off; logits in fp32, whatever its weights) and tokenizer from an HF folder or hub name.

    Raises UserError if it cannot be read whole, or if its logits are not lm_head(hidden states),
    which the chunked log-probabilities in grpo.py and the sampler both rely on.
    """
    tokenizer, shape = load_tokenizer(name)
    with loading(name):
        model, found = AutoModelForCausalLM.from_pretrained(
            name, config=shape, dtype=dtype, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=False)
    check_tensors(name, found)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # configs that call it otherwise
    tokens = torch.arange(8)[None] % model.config.vocab_size
    fp32_logits(model.eval())
    with torch.no_grad():
        own = model(tokens).logits
        head = model.get_output_embeddings()(hidden_states(model, tokens))
    if not own.isfinite().all():
        raise UserError(f"model={name}: its logits are not finite: the weights are damaged")
    if not torch.allclose(own, head, rtol=1e-3, atol=1e-3):
        raise UserError(REFUSED.format(name))
    return model, tokenizer


def check_tensors(name: str, found: dict) -> None:
    """Refuses what transformers would make up or leave out: every tensor is there, of its shape, and none is left over.
    What it knows to be idle, and a head that is the embeddings, it has not listed."""
    wrong = [(sorted(found["missing_keys"]), "not there"), (sorted(found["unexpected_keys"]), "not this model's"),
             (sorted(f"{key} {list(own)} for {list(shape)}" for key, own, shape in found["mismatched_keys"]),
              "of another shape")]
    told = [f"{len(keys)} {words} ({', '.join(keys[:3])}{', ..' * (len(keys) > 3)})" for keys, words in wrong if keys]
    if told:
        raise UserError(f"model={name}: of its tensors {'; '.join(told)}: the weights are damaged, or do not belong to "
                        "the config.json")


class Projection(torch.nn.Linear):
    """A vocabulary projection in fp32: bf16 logits carry 8 bits, which is more noise than a small KL."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(hidden.float(), self.weight.float(), bias)


def fp32_logits(model) -> None:
    """The model's logits, in sampling and in scoring, are fp32 from now on, whatever its weights are."""
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise UserError(REFUSED.format(model.config.name_or_path))
    model.get_output_embeddings().__class__ = Projection


def park(reference) -> None:
    """Moves its weights to host memory, all but the vocabulary projection."""
    head = set(reference.get_output_embeddings().parameters())
    for parameter in set(reference.parameters()) - head:
        parameter.data = distributed.to_host(parameter.data)


@contextmanager
def visiting(reference, device: torch.device):
    """Parked weights on the device for a while; they never change, so that nothing has to be copied back."""
    waiting = {parameter: parameter.data for parameter in reference.parameters()}
    try:  # the device may have no room for all
        for parameter, host in waiting.items():
            parameter.data = distributed.visit(host, device)
        yield
    finally:
        for parameter, host in waiting.items():
            parameter.data = host


def recompute_layers(model) -> None:
    """Gradient checkpointing, under the name it has in this version of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def digest(model) -> str:
    """A checksum of the weights, whatever file they came from."""
    value = 0
    for parameter in model.parameters():  # one at a time: a copy in host memory
        value = zlib.crc32(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def hidden_states(model, tokens: Tensor) -> Tensor:
    """Last hidden states of right-padded tokens [b, T] -> [b, T, hidden size], before the vocabulary projection."""
    return model.base_model(tokens, use_cache=False).last_hidden_state


# ---------------------------------------------------------------- prompts and stop tokens


def check_lengths(shape, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Refuses prompts that leave no room for a completion in the context of a model; `shape` is its config."""
    longest, context = max(map(len, prompts)), shape.max_position_embeddings
    if longest + max_new_tokens > context:
        raise UserError(f"max_new_tokens={max_new_tokens}: with the longest prompt of {longest} tokens it does not fit "
                        f"the model's context of {context}; lower it or shorten the prompt")


# Special tokens by which well-known families end a turn or a text. A Qwen base model's eos is the second alone, though
# its chat template ends turns with the first: without both it runs on into turns of its own making.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>")


def stop_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion: the model's eos (one or a list), the tokenizer's eos, what ends a turn of its
    chat template, and those of END_TOKENS that it has."""
    eos = model.generation_config.eos_token_id
    special = tokenizer.get_added_vocab()
    found = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, turn_end(tokenizer),
             *(special.get(token) for token in END_TOKENS)} - {None}
    if not found:
        raise UserError("the model has no stop token: set eos_token_id in its generation_config.json")
    return sorted(found)


def set_stop(model, stop: list[int]) -> None:
    """What the model is saved with. One that samples by its config but does not say so (temperature without do_sample)
    could be saved as it was, but not once changed: it keeps its special tokens only."""
    own = model.generation_config
    own.eos_token_id = stop
    try:
        own.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig(eos_token_id=stop, bos_token_id=own.bos_token_id,
                                                   pad_token_id=own.pad_token_id)


def turn_end(tokenizer) -> int | None:
    """The special token that the chat template puts behind an answer, None if there is none."""
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    rest = from_template(tokenizer, chat).rpartition("ANSWER")[2].strip()
    first = tokenizer(rest, add_special_tokens=False).input_ids[:1]
    return first[0] if first and first[0] in tokenizer.get_added_vocab().values() else None


def from_template(tokenizer, chat: list, **arguments):
    try:  # Llama 3.1 falls back on this date, Llama 3.2 on today's: a run that goes on tomorrow must ask the same
        return tokenizer.apply_chat_template(chat, tokenize=False, date_string="26 Jul 2024", **arguments)
    except Exception as error:  # templates raise what they like; Gemma's refuses a system message
        raise UserError(f"the model's chat template refuses the prompt ({' '.join(str(error).split())[:200]}): "
                        "leave prompt.system empty, and say it in prompt.math") from None


def encode_prompts(tokenizer, texts: list[str], *, system: str = "") -> list[list[int]]:
    """Token ids of prompts, as the user's turn of the tokenizer's chat template where it has one."""
    if tokenizer.chat_template is None:
        return tokenizer(texts).input_ids
    before = [{"role": "system", "content": system}] if system else []
    chats = [[*before, {"role": "user", "content": text}] for text in texts]
    rendered = from_template(tokenizer, chats, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False).input_ids  # the template holds the special tokens


def describe(ids: list[int], tokenizer) -> str:
    """Ids with their tokens, to be read by people."""
    return ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in ids)
