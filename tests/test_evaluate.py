"""Pass@k against enumeration of subsets, d_collapse at its fixed points, and the table."""

import json
import math
from itertools import combinations

import numpy as np
import pytest

import evaluate


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < c for i in range(n)], k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(10_000, 3, 128), (10_000, 9_990, 9_999), (128, 1, 128), (256, 200, 64)])
def test_pass_at_k_for_many_samples(n, c, k):
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)  # whole numbers of any length
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-9)


def test_pass_at_k_of_arrays():
    values = evaluate.pass_at_k(4, np.array([[0, 1], [2, 4]]), 2)
    np.testing.assert_allclose(values, [[0, 0.5], [5 / 6, 1]])
    assert isinstance(evaluate.pass_at_k(4, 1, 2), float)


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 5, 2), (4, -1, 2), (4, 1, 0)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError):
        evaluate.pass_at_k(n, c, k)


def test_d_collapse():
    base = np.random.default_rng(0).exponential(size=10_007)
    assert evaluate.d_collapse(base, base) == 0
    assert evaluate.d_collapse(base, np.zeros(50)) == 1
    assert evaluate.d_collapse(base, base + 100) == pytest.approx(-4, abs=0.01)  # every token forks: 5 times as many
    threshold = np.sort(base)[-math.floor(0.2 * len(base)) - 1]  # by hand: a fifth of the tokens lies above
    half = np.where(np.arange(len(base)) % 2, base, 0)
    by_hand = 1 - (half > threshold).mean() / (base > threshold).mean()
    assert evaluate.d_collapse(base, half) == pytest.approx(by_hand)


def test_d_collapse_with_ties():
    """Half of the base's tokens share the largest entropy: they are the threshold, none lies above."""
    base = np.array([0.0, 1.0] * 50)
    assert evaluate.d_collapse(base, base) == 0
    quarter = np.array([0.0, 0.0, 1.0, 2.0] * 25)
    assert evaluate.d_collapse(quarter, quarter) == 0


def made_up():
    correct = np.zeros((3, 20), dtype=bool)
    correct[0, :5] = True
    correct[1, 16:] = True
    lengths = np.arange(60).reshape(3, 20)
    return evaluate.Evaluation(correct, lengths, lengths < 50, np.linspace(0, 1, 100, dtype=np.float32))


def test_summary_by_hand():
    figures = made_up().summary(base=made_up())
    assert figures["acc@16"][0] == pytest.approx((5 / 16 + 0 + 0) / 3)
    rates = np.array([5 / 20, 4 / 20, 0])
    assert figures["pass@1"] == (pytest.approx(rates.mean()), pytest.approx(rates.std(ddof=1) / 3**0.5))
    assert figures["pass@16"][0] == pytest.approx(evaluate.pass_at_k(20, np.array([5, 4, 0]), 16).mean())
    assert "pass@64" not in figures  # k <= n only
    assert figures["entropy"] == (pytest.approx(0.5), None)
    assert figures["d_collapse"] == (0.0, None)
    assert figures["length"][0] == 29.5
    assert figures["truncated"][0] == pytest.approx(10 / 60)
    json.dumps(figures)


def test_table_and_file_round_trip(tmp_path):
    table = evaluate.format_table({"base": made_up().summary(), "trained": made_up().summary(made_up())})
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 3
    assert "d_collapse" in lines[0] and lines[1].split()[0] == "base" and lines[1].split()[-1] == "-"
    made_up().save(tmp_path / "e.npz")
    loaded = evaluate.Evaluation.load(tmp_path / "e.npz")
    for name, value in vars(made_up()).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
