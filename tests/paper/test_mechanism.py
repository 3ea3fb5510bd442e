"""paper.mechanism: falls of the entropy by finite differences, its sums by loops, and its runs."""

import pytest
import torch
from helpers import ROOT

from paper import mechanism
from rollout import Rollout
from support.files import read_jsonl

B, C, V = 12, 9, 7


def random_rollout(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> Rollout:
    """Return the record of tokens that were sampled from logits.  [B, C, V] float64"""
    logprobs = torch.log_softmax(logits, dim=-1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs).sum(dim=-1)
    return Rollout(
        [[0]] * B,
        tokens,
        mask,
        mask[:, -1],
        logprobs.gather(2, tokens[..., None]).squeeze(2),
        entropy,
        entropy,
        (probs**2 * (logprobs + entropy[..., None])).sum(dim=-1),
        advantages=torch.randn(B, dtype=torch.float64),
    )


@pytest.fixture
def drawn():
    torch.manual_seed(0)
    logits = 3 * torch.randn(B, C, V, dtype=torch.float64)
    tokens = torch.distributions.Categorical(logits=logits).sample()
    mask = torch.arange(C) < torch.randint(1, C + 1, (B, 1))
    return logits, random_rollout(logits, tokens, mask)


def test_the_fall_is_the_change_of_the_entropy(drawn):
    """A gradient step on A log p(token), by finite differences in the logits of each token."""
    logits, rollout = drawn
    expected = []
    for row in range(B):
        for column in range(int(rollout.mask[row].sum())):
            z = logits[row, column].clone().requires_grad_()
            logprob = torch.log_softmax(z, dim=0)[rollout.tokens[row, column]]
            (gradient,) = torch.autograd.grad(rollout.advantages[row] * logprob, z)
            entropies = []
            for size in (1e-6, -1e-6):
                moved = torch.distributions.Categorical(logits=z.detach() + size * gradient)
                entropies.append(moved.entropy())
            expected.append(-(entropies[0] - entropies[1]) / 2e-6)
    expected = torch.stack(expected).tolist()
    assert mechanism.entropy_fall(rollout).tolist() == pytest.approx(expected, abs=1e-8)


def test_the_sums_by_loops(drawn):
    _, rollout = drawn
    falls = mechanism.entropy_fall(rollout).tolist()
    tokens = []
    for row in range(B):
        for column in range(int(rollout.mask[row].sum())):
            p = rollout.logprobs[row, column].exp().item()
            a = rollout.advantages[row].item()
            tokens.append((p * (1 - p) * max(a, 0), falls[len(tokens)], p, a))
    total = sum(fall for _, fall, _, _ in tokens if fall > 0)
    by_score = sorted(tokens, reverse=True)
    by_fall = sorted(tokens, key=lambda token: -token[1])
    count = round(0.05 * len(tokens))
    scored = [token for token in by_score if token[0] > 0]
    expected = {
        "all": tokens,
        "5 % with the largest fall": by_fall[:count],
        "5 % with the highest score": by_score[:count],
        "those of them that rise": [token for token in by_score[:count] if token[1] < 0],
        "score above 0, decile 1": scored[: len(scored) // 10],
        "score above 0, decile 10": scored[len(scored) * 9 // 10 :],
        "A > 0, 0.1 < p ≤ 0.5": [t for t in tokens if t[3] > 0 and 0.1 < t[2] <= 0.5],
        "A < 0, 0.5 < p ≤ 0.9": [t for t in tokens if t[3] < 0 and 0.5 < t[2] <= 0.9],
        "A < 0": [t for t in tokens if t[3] < 0],
    }
    shares = mechanism.measure(rollout)
    for name, group in expected.items():
        falls = sum(fall for _, fall, _, _ in group if fall > 0) / total
        rises = -sum(fall for _, fall, _, _ in group if fall < 0) / total
        assert shares[name] == pytest.approx([len(group) / len(tokens), falls, rises], rel=1e-6)
    for part in ("score above 0", "A > 0,", "A < 0,"):
        whole = {"score above 0": "A > 0"}.get(part, part.strip(","))
        parts = [values for name, values in shares.items() if name.startswith(part)]
        assert [sum(column) for column in zip(*parts)] == pytest.approx(shares[whole])
    no_advantage = rollout[:]
    no_advantage.advantages = torch.zeros(B, dtype=torch.float64)
    assert mechanism.measure(no_advantage) == {}


def test_an_ablation_learns_from_one_sign(drawn):
    _, rollout = drawn
    for method, sign in (("GRPO, A > 0 only", 1), ("GRPO, A < 0 only", -1)):
        one_sign = rollout[:]
        mechanism.keep_sign(one_sign, method)
        expected = torch.where(rollout.advantages * sign > 0, rollout.advantages, 0.0)
        assert one_sign.advantages.equal(expected)
    mechanism.keep_sign(rollout, "SCOPE")
    assert (rollout.advantages < 0).any() and (rollout.advantages > 0).any()


def test_the_command(in_tmp, small, monkeypatch, capsys):
    monkeypatch.setattr(mechanism, "SEEDS", (0,))
    monkeypatch.setattr(mechanism, "EVERY", 2)
    mechanism.main([*small, "steps=3"])
    lines = read_jsonl(in_tmp / "results/mechanism/steps.jsonl")
    expected = [(method, step) for method in mechanism.METHODS for step in (0, 2)]
    assert [(line["method"], line["step"]) for line in lines] == expected
    # all start alike, and the ablations end apart
    assert len({str(list(line.values())[2:]) for line in lines[::2]}) == 1
    assert len({str(list(line.values())[3:]) for line in lines[1::2]}) == 4
    text = (in_tmp / "results/mechanism/table.md").read_text()
    assert "## GRPO, A < 0 only, 1 seeds" in text and "| those of them that rise" in text
    monkeypatch.setattr(mechanism, "measure_run", None)  # no run is repeated
    mechanism.main([*small, "steps=3"])
    assert (in_tmp / "results/mechanism/table.md").read_text() == text


def test_the_committed_table_follows_from_its_steps():
    folder = ROOT / "results/mechanism"
    if folder.exists():
        lines = read_jsonl(folder / "steps.jsonl")
        assert (folder / "table.md").read_text() == mechanism.page(lines)
