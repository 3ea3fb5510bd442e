"""What the tests of analyses of a step share: a folder and a model of their own, so small that it takes no time."""

import pytest

import data
from support import models


@pytest.fixture
def small():
    """Arguments for a step of 24 completions of a toy model."""
    return ["toy.layers=1", "toy.hidden=16", "toy.heads=2", "toy.intermediate=16", "toy.updates=3", "toy.batch=8",
            "prompts_per_step=6", "group_size=4", "max_new_tokens=10", "countdown_problems=50",
            "selection.fraction=0.2"]


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """A working folder of its own, and a reward that a random model earns now and then."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "is_correct", lambda problem, text, grader: text[-1:] in tuple("13579"))
    monkeypatch.setattr(models, "stop_ids", lambda model, tokenizer: list(range(40)))
