"""Trains the default base model: a tiny model that knows Countdown's form but does not plan.

    python toy.py                        # train the base model of the default settings anew

It is trained by next-token prediction on random valid chains whose target is whatever they reach
(data.random_chain). So it writes many different valid chains, of which few reach a given target.
Reinforcement learning can improve it, and can reduce the diversity of its chains. The model of the
default settings lies in recipes/toy-base/, an ordinary Hugging Face folder. That of other settings
is trained on first use, kept in runs/, and used again as long as `make_recipe` returns the same.
"""

import json
import math
import random
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, SeedOssConfig, SeedOssForCausalLM

from data import format_prompt, is_heldout, random_chain
from support import models
from support.config import load_config, one_line_errors, require, show_help
from support.files import fingerprint, lock, replace_folder

SHIPPED = Path(__file__).parent / "recipes" / "toy-base"  # the base model of the default settings
SYMBOLS = ["<pad>", "<eos>", "+", "-", "*", "/", "=", ",", "->", ":"]
# Further kinds of problems in its training data: (how many numbers, the largest number).
OTHER_KINDS = ((3, 20), (5, 20), (4, 50))
HEADS = 4
INTERMEDIATE = 256
LEARNING_RATE = 3e-3


def resolve_model(config, world, name: str | None = None) -> str:
    """Return the folder or hub name of `model=`; for `toy` train the base model if needed."""
    name = name or config.model
    if name != "toy":
        return name
    # The toy gains nothing from more threads, and beside another busy process it loses much.
    torch.set_num_threads(1)
    recipe = make_recipe(config)
    if recipe == json.loads((SHIPPED / "recipe.json").read_text()):
        return str(SHIPPED)
    folder = Path("runs") / f"toy-base-{fingerprint(recipe)}"
    if world.is_main and not folder.exists():
        # another run may be training the same model
        with lock(folder.with_name("toy-base.lock"), wait=True):
            if not folder.exists():
                save_base_model(folder, recipe)
    world.barrier()
    return str(folder)


def make_recipe(config) -> dict:
    """Return everything that the base model depends on.

    It includes examples of the training data, so that a change of the generator changes it too.
    """
    recipe = {
        "prompt": config.prompt.countdown,
        "countdown": vars(config.countdown),
        "toy": vars(config.toy),
    }
    examples = random_pairs(5, random.Random(config.toy.seed), recipe)
    recipe["examples"] = examples
    recipe["constants"] = [OTHER_KINDS, HEADS, INTERMEDIATE, LEARNING_RATE]
    return json.loads(json.dumps(recipe))  # as it is read from recipe.json


def save_base_model(folder: Path, recipe: dict) -> None:
    """Train the base model and save it with its recipe."""
    model, tokenizer = warm_start(recipe)
    with replace_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")


def make_tokenizer(limit: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word: the symbols and every number from 0 to `limit`.

    The words are added tokens too, which are matched before the text is split: `3*5=15` needs no
    spaces.
    """
    vocabulary = SYMBOLS + [str(number) for number in range(limit + 1)]
    tokenizer = Tokenizer(
        WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in vocabulary[2:]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def random_pairs(count: int, rng: random.Random, recipe: dict) -> list[tuple[str, str]]:
    """Return `count` random problems as (prompt, chain), none of them held out for evaluation."""
    kinds = [recipe["countdown"]]
    for numbers, largest in OTHER_KINDS:
        if largest <= recipe["countdown"]["limit"]:
            kinds.append(recipe["countdown"] | {"numbers": numbers, "largest": largest})
    pairs = []
    while len(pairs) < count:
        problem, chain = random_chain(rng, **rng.choice(kinds))
        if not is_heldout(**problem):
            pairs.append((format_prompt(recipe["prompt"], problem), chain))
    return pairs


def blank_model(config):
    """Return the model of `model=` without weights (meta tensors), and its tokenizer."""
    if config.model != "toy":
        return models.load_blank(config.model)
    tokenizer = make_tokenizer(config.countdown.limit)
    return models.blank(model_shape(tokenizer, config.toy.hidden, config.toy.layers)), tokenizer


def model_shape(tokenizer, hidden: int, layers: int) -> SeedOssConfig:
    """Return the config of the toy model: the architecture of Qwen2, under the name of Seed-OSS.

    For a folder that says qwen2, transformers 5 loads Qwen2's byte-level tokenizer whatever
    tokenizer.json says, and that tokenizer would split the words of this vocabulary.
    """
    require(hidden % (2 * HEADS) == 0, f"toy.hidden={hidden}: give a multiple of {2 * HEADS}")
    return SeedOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        head_dim=hidden // HEADS,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_bias=True,
        attention_out_bias=False,
        attention_dropout=0.0,
        residual_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def warm_start(recipe: dict):
    """Train the toy model on random chains by next-token prediction.

    The loss is on the chain and the end token only.
    """
    settings = recipe["toy"]
    tokenizer = make_tokenizer(recipe["countdown"]["limit"])
    torch.manual_seed(settings["seed"])
    model = SeedOssForCausalLM(model_shape(tokenizer, settings["hidden"], settings["layers"]))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1
    )
    rng = random.Random(settings["seed"])
    updates = settings["updates"]
    bar = tqdm(
        range(updates),
        desc="warm start of the toy base model",
        unit="update",
        mininterval=0.5,
        disable=None,
    )
    for update in bar:
        tokens, labels = collate(random_pairs(settings["batch"], rng, recipe), tokenizer)
        predicts_answer = labels[:, 1:] != -100  # the hidden state before a token predicts it
        hidden = models.hidden_states(model, tokens[:, :-1])[predicts_answer]
        loss = torch.nn.functional.cross_entropy(
            model.lm_head(hidden), labels[:, 1:][predicts_answer]
        )
        for group in optimizer.param_groups:  # 50 updates of warm-up, then cosine to 0
            group["lr"] = (
                LEARNING_RATE
                * min(1, (update + 1) / 50)
                * 0.5
                * (1 + math.cos(math.pi * update / updates))
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval(), tokenizer


def collate(pairs: list[tuple[str, str]], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize pairs and pad them on the right; return tokens and labels.  Both [b, T]

    A label is -100 outside the answer, which is the chain and the end token.
    """
    prompts = tokenizer([prompt for prompt, _ in pairs]).input_ids
    answers = tokenizer([f"{chain} {tokenizer.eos_token}" for _, chain in pairs]).input_ids
    tokens = []
    labels = []
    for prompt, answer in zip(prompts, answers):
        tokens.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    return pad_sequence(tokens, True), pad_sequence(labels, True, padding_value=-100)


if __name__ == "__main__":
    with one_line_errors():
        show_help(sys.argv[1:], __doc__)
        require(not sys.argv[1:], "python toy.py takes no arguments: it makes recipes/toy-base")
        torch.set_num_threads(1)
        save_base_model(SHIPPED, make_recipe(load_config([])))
