"""What the tests of paper/ share: settings of a step that takes no time, and an empty folder."""

import pytest


@pytest.fixture
def small():
    """Return arguments for a step of 24 completions of a toy model."""
    return (
        "toy.layers=1 toy.hidden=16 toy.updates=3 toy.batch=8 prompts_per_step=6 group_size=4 "
        "max_new_tokens=10 countdown_problems=50 selection.fraction=0.2 optimizer.lr=0.01"
    ).split()


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Work in an empty folder, with a grader whose reward a random model earns now and then."""
    monkeypatch.chdir(tmp_path)

    def ends_with_an_odd_digit(problem, text, grader):
        return text[-1:] in tuple("13579")

    monkeypatch.setattr("rewards.is_correct", ends_with_an_odd_digit)
    monkeypatch.setattr("support.models.stop_ids", lambda model, tokenizer: list(range(40)))
    return tmp_path
