"""The embedded default: a tiny base model that knows Countdown's form and some arithmetic, but no planning.

It is warm-started on random valid chains whose target is whatever they happen to reach (data.random_chain),
so it samples many different valid chains and few that hit a given target: room for RL to sharpen, and
diversity for it to lose. Saved as an ordinary HF folder and reused until its recipe changes.
"""

import json
import math
import random
import time
import zlib
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, SeedOssConfig, SeedOssForCausalLM

from data import fill, is_heldout, random_chain
from support import distributed, models, processes
from support.config import UserError, print_notes
from support.files import replace_folder

SYMBOLS = ["<pad>", "<eos>", "+", "-", "*", "/", "=", ",", "->", ":"]


def make_tokenizer(limit: int) -> PreTrainedTokenizerFast:
    """One token a word: the symbols and every number from 0 to `limit`.

    The words are added tokens too, which are matched before anything else is split: `3*5=15` needs no spaces.
    """
    words = SYMBOLS + [str(number) for number in range(limit + 1)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words[2:]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def chains(count: int, rng: random.Random, *, prompt: str, countdown: dict, also: str = "") -> list[tuple[str, str]]:
    """`count` random problems as (prompt, chain), none of them held out for evaluation.

    Of the kind that `countdown` says and, in equal parts, of those in `also`: "3x20,5x20" is 3 or 5 numbers up to 20.
    """
    kinds = [countdown]
    for numbers, largest in (kind.split("x") for kind in also.split(",") if kind):
        kinds.append(countdown | {"numbers": int(numbers), "largest": int(largest)})
    pairs = []
    while len(pairs) < count:
        problem, chain = random_chain(rng, **rng.choice(kinds))
        if not is_heldout(**problem):
            pairs.append((fill(prompt, problem), chain))
    return pairs


def model_folder(model: str, config) -> str:
    """The folder or hub name to load: `model` itself, or for `toy` the base model, made by rank 0 if need be."""
    if model != "toy":
        return model
    settings = {"prompt": config.prompt.countdown, "countdown": vars(config.countdown), "toy": vars(config.toy)}
    folder = Path("runs") / f"toy-base-{zlib.crc32(make_recipe(**settings).encode()):08x}"
    if distributed.rank() == 0:
        base_model(folder, **settings)
    distributed.barrier()
    return str(folder)


def make_recipe(*, prompt: str, countdown: dict, toy: dict) -> str:
    """Everything that makes the base model what it is, as text; with samples of its data, so that a change
    to the problem generator is a change of the recipe too."""
    examples = chains(5, random.Random(toy["seed"]), prompt=prompt, countdown=countdown, also=toy["also"])
    return json.dumps({"prompt": prompt, "countdown": countdown, "toy": toy, "examples": examples}, indent=1)


def base_model(folder: Path, *, prompt: str, countdown: dict, toy: dict) -> Path:
    """The base model made by these settings in `folder`: as it stands if it is there and whole, else trained now.

    By one process at a time: others wait for it, and then find it there.
    """
    recipe = make_recipe(prompt=prompt, countdown=countdown, toy=toy)
    if is_there(folder, recipe):
        return folder
    with processes.only_one(folder.with_name(f"{folder.name}.lock"), wait=True):
        if not is_there(folder, recipe):
            model, tokenizer = warm_start(prompt=prompt, countdown=countdown, **toy)
            with replace_folder(folder) as unfinished:
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
                (unfinished / "recipe.json").write_text(recipe)
    return folder


def is_there(folder: Path, recipe: str) -> bool:
    stored = folder / "recipe.json"
    if not stored.is_file() or stored.read_bytes() != recipe.encode():
        return False
    try:
        return bool(models.load(str(folder)))
    except UserError as error:
        print_notes([f"{error}: made again"])
        return False


def blank_model(config):
    """The model that `model=` names, without weights or memory (meta tensors), and its tokenizer."""
    if config.model != "toy":
        return models.load_blank(config.model)
    tokenizer = make_tokenizer(config.countdown.limit)
    return models.blank(model_shape(tokenizer, vars(config.toy))), tokenizer


def model_shape(tokenizer, toy: dict) -> SeedOssConfig:
    """Qwen2's architecture, weight for weight, under the name of Seed-OSS: with a folder that says qwen2 transformers 5
    loads Qwen2's own byte-level tokenizer, whatever tokenizer.json says, and that loses our spaces."""
    return SeedOssConfig(
        vocab_size=len(tokenizer), hidden_size=toy["hidden"], num_hidden_layers=toy["layers"],
        num_attention_heads=toy["heads"], num_key_value_heads=max(1, toy["heads"] // 2),
        head_dim=toy["hidden"] // toy["heads"], intermediate_size=toy["intermediate"], max_position_embeddings=256,
        tie_word_embeddings=True, attention_bias=True, attention_out_bias=False, attention_dropout=0.0,
        residual_dropout=0.0, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)


def warm_start(*, prompt: str, countdown: dict, layers: int, hidden: int, heads: int, intermediate: int,
               updates: int, batch: int, lr: float, seed: int, also: str = ""):
    """Trains the tiny model on random chains by next-token prediction, loss on the chain and its end only."""
    started = time.time()
    tokenizer = make_tokenizer(countdown["limit"])
    torch.manual_seed(seed)
    shape = {"hidden": hidden, "layers": layers, "heads": heads, "intermediate": intermediate}
    model = SeedOssForCausalLM(model_shape(tokenizer, shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    rng = random.Random(seed)
    bar = tqdm(range(updates), desc="warm start of the toy base model", unit="update", mininterval=0.5, disable=None)
    for update in bar:
        pairs = chains(batch, rng, prompt=prompt, countdown=countdown, also=also)
        prompts = tokenizer([p for p, _ in pairs]).input_ids
        answers = tokenizer([f"{chain} {tokenizer.eos_token}" for _, chain in pairs]).input_ids
        width = max(len(p) + len(a) for p, a in zip(prompts, answers))
        tokens = torch.zeros(batch, width, dtype=torch.long)
        labels = torch.full((batch, width), -100)
        for row, (p, a) in enumerate(zip(prompts, answers)):
            tokens[row, : len(p) + len(a)] = torch.tensor(p + a)
            labels[row, len(p) : len(p) + len(a)] = torch.tensor(a)
        predicts = labels[:, 1:] != -100  # the state before a token predicts it; causal, so right padding is inert
        hidden = models.hidden_states(model, tokens[:, :-1])[predicts]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[:, 1:][predicts])
        for group in optimizer.param_groups:  # 50 updates of warm-up, then cosine to 0
            group["lr"] = lr * min(1, (update + 1) / 50) * 0.5 * (1 + math.cos(math.pi * update / updates))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    tqdm.write(f"toy base model: {updates} updates in {time.time() - started:.0f} s")
    return model.eval(), tokenizer
