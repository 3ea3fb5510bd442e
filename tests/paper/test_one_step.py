"""The page of one step: every number on it again, in float64 from the models' logits."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import train
from paper import one_step
from support.config import load_config
from support.distributed import World


def after_two_steps(arguments):
    """Return a run after two updates."""
    config = load_config(arguments, one_step.SETTINGS)
    run = train.set_up(config, World(), Path("runs"))
    for step in range(2):
        _, rollout = one_step.draw_step(run, step)
        one_step.train_step(run, step, rollout)
    return run


def logprobs(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return log p of every token at each position of a completion, in float64.  [T, V]"""
    ids = torch.tensor([prompt + completion])
    hidden = model.base_model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
    return torch.log_softmax(hidden @ model.get_output_embeddings().weight.T, dim=-1)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_number_of_the_page(in_tmp, small):
    run = after_two_steps([*small, "step=2", "optimizer.lr=0.03", "optimizer.warmup=0"])
    config = run.config
    group = config.group_size
    policy = copy.deepcopy(run.policy).double()
    policy.zero_grad()
    reference = copy.deepcopy(run.reference).double()
    _, rollout = one_step.draw_step(run, 2)
    page = one_step.write_page(run, 2)

    # the step from the logits: rewards, advantages, p, entropy, score and KL of every token
    N = int(rollout.mask.sum())
    advantages = []
    numbers = []  # for each completion [T, 4]: p, entropy, score, KL
    policy_loss = 0.0
    paid = []
    for row, prompt in enumerate(rollout.prompts):
        first = row - row % group
        rewards = [float(correct) for correct in rollout.correct[first : first + group]]
        mean = sum(rewards) / group
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (group - 1))
        advantages.append((rewards[row - first] - mean) / (deviation + 1e-4))
        completion = rollout.tokens[row][rollout.mask[row]]
        logp = logprobs(policy, prompt, completion.tolist())
        log_ref = logprobs(reference, prompt, completion.tolist()).detach()
        of_sampled = logp.gather(1, completion[:, None])[:, 0]
        p = of_sampled.exp()
        kl = (logp.exp() * (logp - log_ref)).sum(dim=1)
        policy_loss -= advantages[row] * (p / p.detach()).sum() / N
        paid.append(kl[rollout.selected[row][rollout.mask[row]]])
        score = p * (1 - p) * max(advantages[row], 0.0)
        entropy = -(logp.exp() * logp).sum(dim=1)
        numbers.append(torch.stack([p, entropy, score, kl], dim=1).detach())
    penalty = torch.cat(paid).mean()
    loss = policy_loss + config.selection.kl_coef * penalty
    loss.backward()
    norm = torch.cat([w.grad.flatten() for w in policy.parameters() if w.grad is not None]).norm()

    # the selected tokens are those with the highest scores
    scores = torch.cat(numbers)[:, 2]
    selected = rollout.selected[rollout.mask]
    budget = round(config.selection.fraction * N)
    assert int(selected.sum()) == min(budget, int((scores > 0).sum())) > 0
    threshold = scores[selected].min().item()
    assert threshold >= scores[~selected].max() - 1e-6

    example = int(rollout.selected.sum(dim=1).argmax())
    lines = [cells(line) for line in page.splitlines() if line.startswith("|")]
    completions, tokens = lines[2 : 2 + group], lines[4 + group :]
    for i, (number, _, reward, advantage) in enumerate(completions):
        row = example - example % group + i
        assert (int(number), float(reward)) == (i + 1, float(rollout.correct[row]))
        assert float(advantage) == pytest.approx(advantages[row], abs=1e-4)
    assert len(tokens) == len(numbers[example])
    for (_, *shown, kl), exact, is_paid in zip(tokens, numbers[example], rollout.selected[example]):
        assert [float(x) for x in shown] == pytest.approx(exact[:3].tolist(), abs=1e-4)
        assert (kl != "") == is_paid
        if kl:
            assert float(kl) == pytest.approx(exact[3].item(), abs=2e-5)
    page = " ".join(page.split())
    found = re.search(r"loss = (\S+) \+ (\S+) x (\S+) = (\S+)", page).groups()
    expected = [policy_loss.item(), config.selection.kl_coef, penalty.item(), loss.item()]
    assert [float(number) for number in found] == pytest.approx(expected, abs=2e-5)
    assert penalty > 1e-3
    shown = float(re.search(r"lowest score among them is (\d\.\d+)", page)[1])
    assert shown == pytest.approx(threshold, abs=1e-4)
    shown = float(re.search(r"has the norm (\d+\.\d+)", page)[1])
    assert shown == pytest.approx(norm.item(), rel=1e-3)
    assert f"have {N} tokens" in page
    assert f"which is {budget}. It takes" in page and f": {int(selected.sum())} are" in page


def test_the_steps_are_those_of_training(in_tmp, small):
    """The metrics of draw_step and train_step are those that train.py logs."""
    few = ["evaluation.problems=3", "evaluation.samples=4", "steps=3"]
    few += ["seed=3", "selection.strategy=uniform"]  # its choice depends on the seed of the step
    train.main([*small, *few, "name=x"])
    rows = [json.loads(line) for line in Path("runs/x/metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss" in row]
    run = train.set_up(load_config([*small, *few]), World(), Path("runs"))
    for step in range(3):
        problems, rollout = one_step.draw_step(run, step)
        assert len(problems) == len(rollout.prompts) == 24
        metrics = one_step.train_step(run, step, rollout)
        for key in ("loss", "grad_norm", "kl/selected"):
            assert metrics[key] == pytest.approx(logged[step][key], rel=1e-6)
    assert metrics["kl/selected"] > 0


def test_command_writes_the_text_of_the_page_in_docs(in_tmp, small, capsys):
    """The KL is 0 before the first update; but for its numbers the page is that in docs/."""
    one_step.main([*small, "step=0", "out=docs/page.md"])
    assert "written: docs/page.md" in capsys.readouterr().out
    page = Path("docs/page.md").read_text()
    assert re.search(r"x 0\.000000 = ", page)

    def words(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if not line.startswith(("|", "    "))]
        return re.sub(r"[-+]?\d+(\.\d+)?", "N", " ".join(lines)).split()

    assert words(page) == words((ROOT / "docs" / "one-step.md").read_text())


def test_the_steps_before_that_of_the_page_are_done_first(in_tmp, small, monkeypatch):
    calls = []
    functions = {name: getattr(one_step, name) for name in ("draw_step", "train_step")}
    for name, function in functions.items():

        def spy(run, step, *rest, name=name, function=function):
            calls.append((name, step))
            return function(run, step, *rest)

        monkeypatch.setattr(one_step, name, spy)
    one_step.main([*small, "step=1", "out=page.md"])
    assert calls == [(name, step) for step in (0, 1) for name in functions]
    assert "shows step 1 of" in Path("page.md").read_text()


def test_the_page_in_docs_follows_the_definitions_it_gives():
    """Advantages from rewards, scores from p and A, the loss from its parts."""
    page = (ROOT / "docs" / "one-step.md").read_text()
    lines = [cells(line) for line in page.splitlines() if line.startswith("|")]
    rewards = [float(line[2]) for line in lines[2:10]]
    mean = sum(rewards) / 8
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 7)
    for line, reward in zip(lines[2:10], rewards):
        assert float(line[3]) == pytest.approx((reward - mean) / (deviation + 1e-4), abs=1e-4)
    A = float(re.search(r"A = ([-+]\d\.\d+)", page)[1])
    threshold = float(re.search(r"among them is (\d\.\d+)", page)[1])
    for _, p, _, score, kl in lines[12:]:
        assert float(score) == pytest.approx(float(p) * (1 - float(p)) * A, abs=3e-4)
        assert (kl != "") == (float(score) >= threshold)
    policy, coef, kl, loss = map(
        float, re.search(r"loss = (\S+) \+ (\S+) x (\S+) = (\S+)", page).groups()
    )
    assert loss == pytest.approx(policy + coef * kl, abs=2e-6)
