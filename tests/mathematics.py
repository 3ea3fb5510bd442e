"""Problems written for these tests, in the forms of GSM8K and MATH; tokenizers and models."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

NAMES = ["Ada", "Ben", "Chi", "Dov", "Eve", "Fay"]
GSM8K = [
    {
        "question": f"{name} has {a} shelves of {b} books and gives {c} away. How many are left?",
        "answer": f"There are {a} * {b} = <<{a}*{b}={a * b}>>{a * b} books.\n#### {a * b - c:,}",
    }
    for name, a, b, c in zip(NAMES * 4, range(3, 27), range(40, 64), range(1, 25))
]
MATH = [
    {
        "problem": f"Find the root of ${a}x - {b} = 0$ as a fraction.",
        "level": f"Level {1 + i % 5}",
        "type": "Algebra" if i % 2 else "Number Theory",
        "solution": f"We have $x = \\frac{{{b}}}{{{a}}}$, so \\boxed{{x}} is "
        f"\\[\\boxed{{\\frac{{{b}}}{{{a}}}}}.\\]",
    }
    for i, (a, b) in enumerate(zip(range(7, 37), range(2, 62, 2)))
]

QWEN_CHAT = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL_TOKENS = {  # the first ends a text; Llama's second begins one
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": [
        "<|end_of_text|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
}
ARCHITECTURES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}

# A run on these problems, which takes a few seconds.
SMALL = (
    "prompts_per_step=4 group_size=4 max_new_tokens=12 steps=2 optimizer.lr=0.001 "
    "evaluation.problems=3 evaluation.samples=4 evaluation.every=0 selection.fraction=0.3 "
    "log_every=1"
).split()


@cache
def trained_bpe(family: str) -> str:
    """Train a byte-level BPE on the problems above, with the special tokens of a Qwen base model or
    of Llama 3; return its JSON.
    """
    special = SPECIAL_TOKENS[family]
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    texts = [text for row in GSM8K + MATH for text in row.values()]
    bpe.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if family == "llama":  # as its tokenizer.json does: a text begins with its special token
        begin = special[1]
        bpe.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, bpe.token_to_id(begin))]
        )
    return bpe.to_str()


def tokenizer(family: str, *, chat: bool) -> PreTrainedTokenizerFast:
    """Make a tokenizer like that of a Qwen base model or of Llama 3."""
    special = SPECIAL_TOKENS[family]
    begin = special[1] if family == "llama" else None
    bpe = Tokenizer.from_str(trained_bpe(family))
    result = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=special[0], pad_token=special[0], bos_token=begin
    )
    if chat:
        result.chat_template = {"qwen": QWEN_CHAT, "llama": LLAMA_CHAT}[family]
    return result


def folder(path: Path, architecture: str, *, chat: bool, weights: bool = True) -> str:
    """Save a tiny random model with its tokenizer as a Hugging Face folder.

    As in Qwen's base models the model's eos is the end of the text only.
    """
    family = "llama" if architecture == "llama" else "qwen"
    tokens = tokenizer(family, chat=chat)
    config_class, model_class = ARCHITECTURES[architecture]
    shape = config_class(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        tie_word_embeddings=architecture != "llama",
    )
    tokens.save_pretrained(path)
    if weights:
        torch.manual_seed(0)
        model_class(shape).save_pretrained(path)
    else:
        shape.save_pretrained(path)
    return str(path)
