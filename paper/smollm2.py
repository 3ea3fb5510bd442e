"""Prepare recipes/smollm2-135m.yaml: problems, and the model where the hub cannot be reached.

    python -m paper.smollm2                                    # problems; the model is on the hub
    python -m paper.smollm2 SmolLM2-135M-Instruct.Q4_1.gguf    # both: see docs/real-models.md

They are written to runs/smollm2/: model/ (an ordinary Hugging Face folder of 538 MB),
train.jsonl, validation.jsonl and test.jsonl.
"""

import json
import random
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from support.config import UserError, one_line_errors, require, show_help
from support.files import replace_folder, replace_text

FOLDER = Path("runs/smollm2")
SIZES = {"train": 500, "validation": 100, "test": 100}


def arithmetic(count: int) -> list[dict]:
    """Return different problems of adding, subtracting and multiplying, always the same ones."""
    rng = random.Random("arithmetic")
    problems = {}
    while len(problems) < count:
        # the ranges do not overlap, so that no problem is another one with its numbers swapped
        a = rng.randint(31, 60)
        b = rng.randint(10, 30)
        c = rng.randint(2, 9)
        text, answer = rng.choice(
            [
                (f"{a} + {b}", a + b),
                (f"{a} - {b}", a - b),
                (f"{a} + {b} - {c}", a + b - c),
                (f"{c} * {b}", c * b),
            ]
        )
        problems[text] = {"problem": f"What is {text}?", "answer": str(answer)}
    return list(problems.values())


def write_problems() -> None:
    """Write three files of problems without any in common."""
    problems = arithmetic(sum(SIZES.values()))
    for name, size in SIZES.items():
        lines = [json.dumps(problem) + "\n" for problem in problems[:size]]
        replace_text(FOLDER / f"{name}.jsonl", "".join(lines))
        problems = problems[size:]


def write_model(file: Path) -> None:
    """Write a GGUF file as an ordinary folder with fp32 weights."""
    require(file.is_file(), f"{file}: there is no such file; docs/real-models.md says where it is")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    except (ImportError, ValueError) as error:
        hint = "it needs pip install gguf accelerate, and the file from docs/real-models.md"
        raise UserError(f"{file} cannot be read ({error}): {hint}") from None
    shape = quantised.config
    del shape.quantization_config
    model = LlamaForCausalLM(shape)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    with replace_folder(FOLDER / "model") as unfinished:
        model.float().save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    require(len(arguments) < 2, f"{' '.join(arguments)}: give at most one file")
    write_problems()
    if arguments:
        write_model(Path(arguments[0]))
    print(f"written: {FOLDER}/")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
