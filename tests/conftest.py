"""Fixtures that several tests share. Everything runs on the CPU and offline."""

import os
import signal

import pytest
import torch
from helpers import VOCABULARY, tiny_model

# The tensors are tiny, so that more threads only wait for each other. This holds here and in the
# processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def usual_signals():
    """Undo what a failed run did to signals, and a shell's `pytest &`, which ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def prompts():
    """Return twelve prompts of unequal lengths, with token ids from 2 up."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(2, VOCABULARY, (3 + i % 5,), generator=generator).tolist() for i in range(12)
    ]


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Work in an empty folder, with a grader whose reward a random model earns now and then."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rewards.is_correct", lambda problem, text, grader: "1" in text)
    return tmp_path


def pytest_collection_modifyitems(items):
    """Begin with the tests that start processes, so that none of them is left for the end."""
    slow = ("real_runs", "two_ranks", "killed", "terminated")
    items.sort(key=lambda item: not any(word in item.name for word in slow))
