"""The benchmarks: what is timed, the random model's lengths, and what the commands print."""

import re

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

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


def test_decode_counts_the_weights_and_the_cache_once(in_tmp, capsys, monkeypatch):
    """At this shape the embeddings, which are not read, and the sampler count for little."""
    shape = Qwen2Config(**TINY | dict(vocab_size=1000, intermediate_size=20_000))
    monkeypatch.setattr(benchmark, "QWEN2_7B", shape)
    benchmark.main(["decode"])
    printed = re.search(r"token: (\S+) kernels, (\S+) GB, (\d) wait", capsys.readouterr().out)
    kernels, size, waits = (float(number.replace(",", "")) for number in printed.groups())
    weights = 2 * 2 * 3 * 32 * 20_000  # bf16, two layers, three matrices
    cache = 2 * 2 * 128 * 1001 * 2 * 2 * 8  # bf16, two layers, rows, columns, keys and values
    activations = 2 * 2 * 128 * 20_000 * 8  # gate, up, activation and product are written and read
    sampler = 128 * 1000 * 60
    total = (weights + cache + activations + sampler) / 1e9
    assert size == pytest.approx(total, rel=0.3)
    assert 100 < kernels < 300
    assert waits == 2  # both are in transformers' generate: is there padding, have all finished


def test_the_counter_counts():
    x = torch.zeros(10, 10, device="meta")
    with benchmark.KernelCount() as mode:
        y = x[2:].t().expand(10, 8)  # views
        y + 1
        x.add_(1)
        x.sum().item()
    assert mode.total.tolist() == [3, (2 * 80 + 2 * 100 + 100 + 1) * 4, 1]


def test_an_update_is_measured():
    """Here the peak is older than the update: only that it runs is tested."""
    assert benchmark.measure_update(16, vocabulary=300) >= 0


def test_without_trl_one_line_says_how(in_tmp, small, monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install trl"):
        benchmark.main(["peer", *small])
