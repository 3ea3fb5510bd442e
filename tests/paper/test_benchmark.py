"""The benchmarks: what is timed, the random model's lengths, and what the commands print."""

import re

import pytest
import torch
from transformers import LlamaConfig

from paper import benchmark
from support.config import UserError

TINY = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def test_the_median_is_of_calls_in_turn_without_the_first(monkeypatch):
    times = iter([9, 90, 1, 10, 5, 50, 2, 20])
    calls = []

    def seconds_of(function):
        calls.append(function)
        return next(times)

    monkeypatch.setattr(benchmark, "seconds_of", seconds_of)
    assert benchmark.alternate({"a": "A", "b": "B"}, rounds=3) == {"a": 2, "b": 20}
    assert calls == ["A", "B"] * 4


def test_the_random_model_stops_as_often_as_it_is_told():
    """The mean length in each title of WORKLOADS is that of a geometric distribution, cut off."""
    ids = torch.arange(2, 66).view(4, 16)
    for title, stop in benchmark.WORKLOADS.items():
        with torch.no_grad():
            logits = benchmark.random_model(LlamaConfig(**TINY), stop)(ids).logits
        assert logits.softmax(dim=-1)[..., 0].mean().item() == pytest.approx(stop, rel=0.15)
        if named := re.search(r"0\.\d+", title):
            mean = sum((1 - stop) ** length for length in range(benchmark.LONGEST))
            assert mean / benchmark.LONGEST == pytest.approx(float(named[0]), abs=0.005)


def test_step_prints_a_ratio_for_each_selection(in_tmp, small, capsys):
    benchmark.main(["step", *small, "steps=2"])
    printed = re.findall(r"(\w+): [\d.]+ s a step, ([\d.]+) x none", capsys.readouterr().out)
    assert [name for name, _ in printed] == ["none", "scope", "all"] and printed[0][1] == "1.000"


def test_rollout_compares_both_ways(in_tmp, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "LONGEST", 3)
    monkeypatch.setattr(benchmark, "SMOLLM2_135M", LlamaConfig(**TINY))
    monkeypatch.setattr(benchmark, "WORKLOADS", {"short": 0.1})
    benchmark.main(["rollout"])
    assert re.search(r"short: ours \S+ s, bare generate \S+ s; \S+ x", capsys.readouterr().out)


def test_an_update_is_measured():
    """Here the peak is older than the update: only that it runs is tested."""
    assert benchmark.measure_update(16, vocabulary=300) >= 0


def test_without_trl_one_line_says_how(in_tmp, small, monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install trl"):
        benchmark.main(["peer", *small])
