"""Rollouts: prompts to token ids, batched HF `generate`, and the record that the sampler keeps of every draw.

Two habits keep this file exact:

* Sampling is *stateless*. The noise of a draw is a hash of (seed, step, row, position), so a row gets the
  same completion however rows are batched, ordered or spread over ranks, and resuming needs no RNG state.
* Masks come from *positions*: the first stop token ends a completion and belongs to it. No mask compares
  with a pad id, which may well be the stop id.

Shapes: B completions, P padded prompt length, C padded completion length, V vocabulary.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import huggingface_hub
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
)

from config import UserError

transformers.utils.logging.disable_progress_bar()  # our own bars only

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's odd constant near 2^64/phi, as a signed 64-bit integer
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: 64 well-stirred bits from 64 (Steele, Lea & Flood 2014). int64, any shape.

    `>>` is arithmetic on signed integers; the masks make it the logical shift that the hash is built on.
    """
    x = (x ^ (x >> 30 & 2**34 - 1)) * MIX_1
    x = (x ^ (x >> 27 & 2**37 - 1)) * MIX_2
    return x ^ (x >> 31 & 2**33 - 1)


def gumbel_noise(seed: int, step: int, rows: Tensor, position: int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise [B, V], a pure function of (seed, step, row, position). rows [B] int64."""
    key = torch.zeros_like(rows)
    for word in (seed, step, rows, position):
        key = mix(key + word + GOLDEN)
    counter = torch.arange(1, vocabulary + 1, device=rows.device)
    bits = mix(key[:, None] + counter * GOLDEN) >> 32 & 2**32 - 1
    uniform = (bits.float() + 0.5) * 2.0**-32
    # An exponential made as -log(1 - u) keeps fp32's fine steps near 0, which is where winners come from.
    return -torch.log(-torch.log1p(-uniform))


RECORDED = ("logprobs", "entropy", "self_certainty", "collision")


class StatelessSampler(LogitsProcessor):
    """Draws the next token by the Gumbel-max trick and records the draw; `generate` only takes its argmax.

    argmax(z + Gumbel noise) is an exact sample of softmax(z). Per call it appends for its b rows: the
    token, its log-probability, the entropy of the distribution (nats), its self-certainty,
    KL(uniform || policy) = -log V - mean_v log p_v (Zhao et al. 2025), and sum_v p_v^2 (log p_v + entropy),
    which scope.entropy_change_score is made of (if asked for, else 0); all of softmax(logits / temperature).
    """

    def __init__(
        self, rows: Tensor, position: int, *, seed: int, step: int, temperature: float, collision: bool = False
    ):
        self.rows, self.position, self.seed, self.step, self.temperature = rows, position, seed, step, temperature
        self.with_collision = collision
        self.tokens: list[Tensor] = []
        self.record: dict[str, list[Tensor]] = {name: [] for name in RECORDED}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        noise = gumbel_noise(self.seed, self.step, self.rows, self.position, logprobs.shape[-1])
        perturbed = logprobs + noise
        token = perturbed.argmax(dim=-1)
        probs = logprobs.exp()
        entropy = -(probs * logprobs).sum(dim=-1)
        self.tokens.append(token)
        self.record["logprobs"].append(logprobs.gather(1, token[:, None]).squeeze(1))
        self.record["entropy"].append(entropy)
        self.record["self_certainty"].append(-logprobs.mean(dim=-1) - math.log(logprobs.shape[-1]))
        collision = (probs**2 * (logprobs + entropy[:, None])).sum(dim=-1) if self.with_collision else entropy * 0
        self.record["collision"].append(collision)
        self.position += 1
        return perturbed


@dataclass
class Rollout:
    """B completions and what the sampler recorded of each token; positions past `mask` hold zeros.

    mask [B, C] is True up to and including the first stop token, or everywhere if none was drawn within
    the limit (`stopped` False: the completion is truncated). Values at `x[mask]` are the flat valid
    tokens, in row order: every statistic and every loss is taken over such 1-D vectors.
    """

    prompts: list[list[int]]  # B prompts, token ids
    tokens: Tensor  # [B, C] int64
    mask: Tensor  # [B, C] bool
    stopped: Tensor  # [B] bool
    logprobs: Tensor  # [B, C] float32, as are the next three; see StatelessSampler
    entropy: Tensor
    self_certainty: Tensor
    collision: Tensor

    def __getitem__(self, rows: slice) -> "Rollout":
        return Rollout(**{name: values[rows] for name, values in vars(self).items()})

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, the stop token included. [B]"""
        return self.mask.sum(dim=1)

    def pack(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Prompt and completion of some rows side by side, padded on the right only.

        A causal model needs no attention mask then: nothing attends to what comes after it, and
        positions are simply 0, 1, 2 ... Returns tokens [b, T] and predicts [b, T], True where the hidden state
        predicts a completion token: hidden[predicts] lines up with tokens[rows][mask[rows]].
        """
        lengths = self.lengths.tolist()
        starts = [len(self.prompts[row]) for row in rows]
        width = max(start + lengths[row] for start, row in zip(starts, rows))
        tokens = self.tokens.new_zeros(len(rows), width)
        predicts = torch.zeros_like(tokens, dtype=torch.bool)
        for i, (start, row) in enumerate(zip(starts, rows)):
            end = start + lengths[row]
            tokens[i, :start] = torch.tensor(self.prompts[row])
            tokens[i, start:end] = self.tokens[row, : lengths[row]]
            predicts[i, start - 1 : end - 1] = True  # the state before a token predicts it
        return tokens, predicts


def from_completions(prompts: list[list[int]], completions: list[list[int]], device) -> Rollout:
    """Given completions as a Rollout without a record: to be scored, not sampled."""
    width = max(map(len, completions))
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in completions], device=device)
    mask = torch.tensor([[True] * len(ids) + [False] * (width - len(ids)) for ids in completions], device=device)
    blank = torch.zeros(mask.shape, device=device)
    return Rollout(prompts, tokens, mask, mask.any(dim=1), blank, blank, blank, blank)


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
             *(special.get(token) for token in END_TOKENS)} - {None}  # fmt: skip
    if not found:
        raise UserError("the model has no stop token: set eos_token_id in its generation_config.json")
    return sorted(found)


def turn_end(tokenizer) -> int | None:
    """The special token that the chat template puts behind an answer, None if there is none."""
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    rest = from_template(tokenizer, chat).rpartition("ANSWER")[2].strip()
    first = tokenizer(rest, add_special_tokens=False).input_ids[:1]
    return first[0] if first and first[0] in tokenizer.get_added_vocab().values() else None


def from_template(tokenizer, chat: list, **arguments):
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **arguments)
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


@contextmanager
def sampling_mode(model):
    """`eval()`, no gradients, and a blank generation_config; all restored afterwards.

    Left in place, the model's own generation_config fills every field that ours leaves unset (a
    repetition penalty, suppressed tokens ...), and the sampled distribution is no longer the scored one.
    """
    own, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()  # also: in train mode gradient checkpointing switches the KV cache off
    try:
        with torch.no_grad():
            yield
    finally:
        model.generation_config = own
        model.train(training)


def sample(
    model,
    prompts: list[list[int]],
    rows: list[int],
    *,
    stop: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int,
    step: int,
    batch_size: int = 256,
    segment: int = 128,
    collision: bool = False,
    progress=None,
) -> Rollout:
    """Sample one completion per prompt from softmax(logits / temperature), nothing cut off.

    `rows` numbers the prompts within the step, over all ranks: with (seed, step) it decides the draws.
    `batch_size` and `segment` (tokens between two sweeps of finished rows) change memory and speed only.
    `progress` is called with the number of completions done.
    """
    device = next(model.parameters()).device
    shape = (len(prompts), max_new_tokens)
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    record = {name: torch.zeros(shape, device=device) for name in RECORDED}
    stop_tensor = torch.tensor(stop, device=device)
    row_keys = torch.tensor(rows, dtype=torch.long, device=device)

    with sampling_mode(model):
        for first in range(0, len(prompts), batch_size):
            alive = torch.arange(first, min(first + batch_size, len(prompts)), device=device)
            ids, attention = pad_left([prompts[i] for i in alive.tolist()], device)
            cache, drawn = None, 0
            while drawn < max_new_tokens and len(alive):
                sampler = StatelessSampler(row_keys[alive], drawn, seed=seed, step=step, temperature=temperature,
                                           collision=collision)  # fmt: skip
                output = model.generate(
                    input_ids=ids,
                    attention_mask=attention,
                    past_key_values=cache,
                    logits_processor=[sampler],
                    generation_config=generation_config(min(segment, max_new_tokens - drawn), stop),
                )
                count = output.sequences.shape[1] - ids.shape[1]
                new = torch.stack(sampler.tokens[:count], dim=1)
                columns = slice(drawn, drawn + count)
                tokens[alive, columns] = new
                for name, values in record.items():
                    values[alive, columns] = torch.stack(sampler.record[name][:count], dim=1)
                drawn += count
                # Finished rows leave: the rest goes on with its part of the cache.
                going = (~torch.isin(new, stop_tensor).any(dim=1)).nonzero().squeeze(1)
                if progress is not None:
                    progress(len(alive) - (len(going) if drawn < max_new_tokens else 0))
                alive, ids = alive[going], output.sequences[going]
                attention = torch.cat([attention[going], attention.new_ones(len(going), count)], dim=1)
                cache = output.past_key_values
                cache.batch_select_indices(going)

    is_stop = torch.isin(tokens, stop_tensor)
    mask = is_stop.cumsum(dim=1) - is_stop.long() == 0  # no stop token *before* this position
    stopped = (is_stop & mask).any(dim=1)
    width = int(mask.sum(dim=1).max()) if len(prompts) else 0
    record = {name: values.masked_fill(~mask, 0.0)[:, :width] for name, values in record.items()}
    return Rollout(list(prompts), tokens.masked_fill(~mask, 0)[:, :width], mask[:, :width], stopped, **record)


def generation_config(max_new_tokens: int, stop: list[int]) -> GenerationConfig:
    """Greedy, for StatelessSampler has drawn the token already: temperature, top-p and top-k never act.

    What `generate` would still do to the logits before that is switched off by name.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=stop[0],  # only what `generate` writes after a finished row; never read
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        use_cache=True,
        return_dict_in_generate=True,
    )


def pad_left(prompts: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Prompts side by side, padded on the left so that all end together: ids and attention mask [B, P]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, attention


def decode(tokenizer, rollout: Rollout) -> list[str]:
    """The text of each completion, special tokens left out."""
    return tokenizer.batch_decode(
        [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.mask)], skip_special_tokens=True
    )


def recompute_layers(model) -> None:
    """Gradient checkpointing, under the name it has in this version of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def hidden_states(model, tokens: Tensor) -> Tensor:
    """Last hidden states of right-padded tokens [b, T] -> [b, T, hidden size], before the vocabulary projection."""
    return model.base_model(tokens, use_cache=False).last_hidden_state


# Config fields of models whose logits are not lm_head(hidden states): Gemma 2, Cohere, Granite, Falcon-H1.
POST_PROCESSING = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
REFUSED = ("model={} post-processes its logits (soft-capping or scaling), which this trainer does not: use an "
           "architecture without it (Qwen2, Qwen3, Llama)")  # fmt: skip


@contextmanager
def loading(name: str):
    """Turns what transformers raises of a folder or hub name into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason, mend = " ".join(str(error).split())[:300], ""
        if not Path(name).exists():
            mend = ": check the name and the network, or download the model and give its local folder"
            if "local_files_only" in source(name):
                reason = f"{huggingface_hub.constants.ENDPOINT} is out of reach, and its cache here does not hold it"
        raise UserError(f"model={name} cannot be loaded: {reason}{mend}") from None


@cache
def source(name: str) -> dict:
    """Where to load from: with no hub in reach its cache on disk at once, not after minutes of retries per file."""
    arguments = {"trust_remote_code": False}
    if not Path(name).exists():
        try:
            urlopen(Request(huggingface_hub.constants.ENDPOINT, method="HEAD"), timeout=10)
        except HTTPError:
            pass  # it answered
        except OSError:
            arguments["local_files_only"] = True
    return arguments


def load_tokenizer(name: str):
    """Tokenizer and config (dropout off) from an HF folder or hub name; no weights."""
    with loading(name):
        # Not AutoTokenizer: that overrides the tokenizer of any Qwen2 folder, this one does as tokenizer.json says.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, **source(name))
        shape = AutoConfig.from_pretrained(name, **source(name))
    for field, value in vars(shape).items():
        if "dropout" in field and value:
            setattr(shape, field, 0.0)  # a dropped unit at scoring time is a ratio other than 1
    if any(getattr(shape, field, None) not in (None, 1.0) for field in POST_PROCESSING):
        raise UserError(REFUSED.format(name))
    if len(tokenizer) > shape.vocab_size:
        raise UserError(f"model={name}: its tokenizer has {len(tokenizer)} tokens, the model only {shape.vocab_size}: "
                        "give a folder whose two belong together")
    return tokenizer, shape


def load(name: str):
    """Model (fp32, dropout off) and tokenizer from an HF folder or hub name.

    Raises UserError if it cannot be read or if its logits are not lm_head(hidden states),
    which the chunked log-probabilities in grpo.py and the sampler both rely on.
    """
    tokenizer, shape = load_tokenizer(name)
    with loading(name):
        model = AutoModelForCausalLM.from_pretrained(name, config=shape, dtype=torch.float32, **source(name))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # configs that call it otherwise
    tokens = torch.arange(8)[None] % model.config.vocab_size
    with torch.no_grad():
        own = model.eval()(tokens).logits
        head = model.get_output_embeddings()(hidden_states(model, tokens))
    if not torch.allclose(own, head, rtol=1e-3, atol=1e-3):
        raise UserError(REFUSED.format(name))
    return model, tokenizer
