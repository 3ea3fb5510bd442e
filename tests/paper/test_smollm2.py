"""The problems of the SmolLM2 recipe, and what the command says without its file."""

import json
import re
from pathlib import Path

import pytest
from helpers import ROOT

from data import load_problems
from paper import smollm2
from rewards import is_correct
from support.config import UserError, load_config

SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def test_the_problems_are_right_and_in_one_file_each(in_tmp):
    smollm2.main([])
    texts = []
    for name, size in smollm2.SIZES.items():
        rows = [json.loads(line) for line in Path(f"runs/smollm2/{name}.jsonl").open()]
        assert len(rows) == size
        for row in rows:
            first, *rest = re.findall(r"[-+*] \d+|\d+", row["problem"])
            value = int(first)
            for term in rest:
                value = SIGNS[term[0]](value, int(term[2:]))
            assert row["answer"] == str(value), row
        texts += [row["problem"] for row in rows]
    assert len(set(texts)) == len(texts)
    kinds = {re.sub(r"\d+", "n", text) for text in texts}
    assert kinds == {f"What is {kind}?" for kind in ("n + n", "n - n", "n + n - n", "n * n")}


def test_the_recipe_trains_on_them(in_tmp):
    smollm2.main([])
    config = load_config([f"recipe={ROOT}/recipes/smollm2-135m.yaml"])
    problems, heldout = load_problems(config)
    assert (len(problems), [len(file) for file in heldout.values()]) == (500, [100])
    answer = problems[0]["answer"]
    assert is_correct(problems[0], rf"The answer is \boxed{{{answer}}}.", config.grader)
    assert config.prompt.plain.endswith("{problem}<|im_end|>\n<|im_start|>assistant\n")


def test_a_missing_or_wrong_file_is_one_line(in_tmp):
    with pytest.raises(UserError, match="no.gguf: there is no such file"):
        smollm2.main(["no.gguf"])
    Path("wrong.gguf").write_text("x")
    with pytest.raises(UserError, match="wrong.gguf cannot be read .*docs/real-models.md"):
        smollm2.main(["wrong.gguf"])
    assert not Path("runs/smollm2/model").exists()
