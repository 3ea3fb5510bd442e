"""Problems written for these tests, in the forms of GSM8K and MATH; tokenizers and models for them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

NAMES = ["Ada", "Ben", "Chi", "Dov", "Eve", "Fay"]
GSM8K = [
    {"question": f"{name} has {a} shelves of {b} books and gives {c} away. How many books are left?",
     "answer": f"There are {a} * {b} = <<{a}*{b}={a * b}>>{a * b} books.\n#### {a * b - c:,}"}
    for name, a, b, c in zip(NAMES * 4, range(3, 27), range(40, 64), range(1, 25))
]
MATH = [
    {"problem": f"Find the root of ${a}x - {b} = 0$ as a fraction.", "level": f"Level {1 + i % 5}",
     "type": "Algebra" if i % 2 else "Number Theory",
     "solution": f"We have $x = \\frac{{{b}}}{{{a}}}$, so \\boxed{{x}} is \\[\\boxed{{\\frac{{{b}}}{{{a}}}}}.\\]"}
    for i, (a, b) in enumerate(zip(range(7, 37), range(2, 62, 2)))
]

QWEN_CHAT = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# A run on them of a few seconds.
SMALL = ["prompts_per_step=4", "group_size=4", "max_new_tokens=12", "steps=2", "evaluation.problems=3",
         "optimizer.lr=0.001",
         "evaluation.samples=4", "evaluation.every=0", "selection.fraction=0.3", "log_every=1"]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokenizer(family: str, *, chat: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the problems above, with the special tokens of a Qwen base model or of Llama 3."""
    ends = {"qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            "llama": ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                      "<|eot_id|>"]}[family]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [text for row in GSM8K + MATH for text in row.values()]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=ends, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if family == "llama":  # as its tokenizer.json does: a text begins with its special token
        bpe.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bpe.token_to_id("<|begin_of_text|>"))])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=ends[0], pad_token=ends[0],
                                   bos_token=ends[1] if family == "llama" else None)
    if chat:
        made.chat_template = QWEN_CHAT if family == "qwen" else LLAMA_CHAT
    return made


def folder(path: Path, architecture: str, *, chat: bool, weights: bool = True) -> str:
    """A tiny random model with its tokenizer, as an HF folder; as in Qwen's base models eos is the text's end alone."""
    words = tokenizer("llama" if architecture == "llama" else "qwen", chat=chat)
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM),
                                 "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[architecture]
    shape = config_class(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None,
                         eos_token_id=words.eos_token_id, tie_word_embeddings=architecture != "llama")
    words.save_pretrained(path)
    if weights:
        torch.manual_seed(0)
        model_class(shape).save_pretrained(path)
    else:
        shape.save_pretrained(path)
    return str(path)
