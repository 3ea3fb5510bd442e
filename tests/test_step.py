"""The step: gradients that do not depend on how a step is cut up, nor on ranks, against a naive objective."""

import math
import os
import subprocess
import sys

import pytest
import torch
from gradient_worker import SCENARIOS, by_length, step_gradient, wrong
from helpers import ALONE, ROOT, SMALL, assert_same_gradient, config_of, roll_out, tiny_model

import grpo
import rollout
import step as steps
import toy
import train
from support import distributed
from support.checks import Halted
from support.distributed import World

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

# ---------------------------------------------------------------- the gradient of a step


@pytest.fixture(scope="module")
def whole():
    return step_gradient(ALONE, rewards_of=by_length, micro_batch_size=100, logits_chunk=10_000)


@pytest.mark.parametrize("size, chunk", [(1, 1000), (3, 1000), (7, 3), (32, 1)])
def test_gradient_does_not_depend_on_the_cut(whole, size, chunk):
    chosen, gradient, metrics = step_gradient(ALONE, rewards_of=by_length, micro_batch_size=size, logits_chunk=chunk)
    assert (chosen == whole[0]).all() and 0 < chosen.sum() < len(chosen)
    assert_same_gradient(whole[1], gradient)
    assert metrics == pytest.approx(whole[2], rel=1e-4, abs=1e-7)


def test_gradient_against_a_naive_objective(whole):
    """Full logits, one row at a time, float64, straight from METHODS: -1/N sum A log p + lambda/K sum D."""
    policy, reference = tiny_model(seed=0).double(), tiny_model(seed=1).double()
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 40, (3 + i % 4,), generator=generator).tolist() for i in range(8)]
    prompts = [prompt for prompt in prompts for _ in range(4)]
    sampled = rollout.sample(tiny_model(seed=0), prompts, list(range(32)), stop=[1, 5], max_new_tokens=16,
                             temperature=0.9, seed=0, step=0)
    advantages = grpo.group_advantages(by_length(sampled, range(32)), 4)
    rows = []
    for b, prompt in enumerate(prompts):
        length = int(sampled.lengths[b])
        ids = torch.tensor([prompt + sampled.tokens[b, :length].tolist()])
        logits = policy(ids).logits[0, len(prompt) - 1 : -1] / 0.9
        with torch.no_grad():
            reference_logits = reference(ids).logits[0, len(prompt) - 1 : -1] / 0.9
        logp, log_ref = torch.log_softmax(logits, -1), torch.log_softmax(reference_logits, -1)
        rows.append((logp[range(length), ids[0, len(prompt) :]], (logp.exp() * (logp - log_ref)).sum(-1)))
    N = sum(len(token) for token, _ in rows)
    scores = [(math.exp(x) * (1 - math.exp(x)) * max(advantages[b].item(), 0), b, t)
              for b, (token, _) in enumerate(rows) for t, x in enumerate(token.tolist())]
    best = [(b, t) for s, b, t in sorted(scores, reverse=True) if s > 0][: round(0.2 * N)]
    policy_term = -sum(advantages[b].item() * token.sum() for b, (token, _) in enumerate(rows)) / N
    penalty = sum(rows[b][1][t] for b, t in best) / len(best)
    (policy_term + 0.7 * penalty).backward()
    assert whole[0].nonzero().flatten().tolist() == sorted(sum(len(rows[i][0]) for i in range(b)) + t for b, t in best)
    assert_same_gradient({n: p.grad for n, p in policy.named_parameters()}, whole[1], 1e-5)
    assert whole[2]["kl/selected"] == pytest.approx(penalty.item(), rel=1e-4)


def test_first_scope_step_is_the_grpo_step():
    """Policy == reference: D = 0 with zero gradient, whatever lambda."""
    gradients = []
    for strategy in ("none", "scope"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gradient_worker.tiny_model", lambda seed: tiny_model(seed=0))
            chosen, gradient, metrics = step_gradient(ALONE, rewards_of=by_length, strategy=strategy,
                                                      more=["selection.kl_coef=100.0"])
        gradients.append(gradient)
    assert chosen.any() and abs(metrics["kl/selected"]) < 1e-6
    assert_same_gradient(*gradients, tolerance=1e-4)  # 100 x the rounding of the KL's own gradient


def test_all_wrong_selects_nothing_and_moves_nothing():
    chosen, gradient, metrics = step_gradient(ALONE, rewards_of=wrong)
    assert not chosen.any()
    assert all((g == 0).all() for g in gradient.values())
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_give_the_gradient_of_one_process(tmp_path, ranks):
    """Real gloo ranks under DDP, with unequal numbers of micro-batches, one rank idle, or nothing to learn at all."""
    if ranks == 1:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            together = {name: step_gradient(ALONE, **settings) for name, settings in SCENARIOS.items()}
        finally:
            distributed.shutdown()
    else:
        subprocess.run([*TORCHRUN, "--nproc_per_node=2", ROOT / "tests" / "gradient_worker.py", tmp_path],
                       check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=170)
        together = torch.load(tmp_path / "2.pt", weights_only=True)
    for name, settings in SCENARIOS.items():
        chosen, gradient, metrics = step_gradient(ALONE, **settings)
        assert (together[name][0] == chosen).all(), name
        if name == "all wrong":
            assert all((g == 0).all() for g in together[name][1].values())
        else:
            assert_same_gradient(gradient, together[name][1])
        assert together[name][2] == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_gradients_stay_in_the_buckets_of_ddp(tmp_path, monkeypatch):
    """Before the one synchronised backward too: a second set of gradients would be as large as the model."""
    monkeypatch.chdir(tmp_path)
    config = config_of(*SMALL, "micro_batch_size=3", "prompts_per_step=4")
    problems = [{"numbers": [i, 3], "target": 5} for i in range(1, 9)]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        run = steps.set_up(config, problems, ALONE)

        def places():
            return {p.grad.untyped_storage().data_ptr() for p in run.policy.parameters()}

        def watched(batches):
            for batch, is_last in batches:
                yield batch, is_last
                seen.append(places())

        for step in range(3):  # DDP makes its buckets anew before the second
            seen = []
            asked, rows = steps.draw_problems(run, step)
            sampled = steps.sample(run, asked, rows, step)
            advantages = grpo.group_advantages(by_length(sampled, rows), 4)
            selection = steps.select(sampled, sampled.logprobs, advantages, config, 0)
            batches = steps.MicroBatches(sampled, advantages, advantages > 0, selection, run.reference, config, ALONE)
            steps.update(run.loss, run.optimizer, watched(batches), selection, on_policy=True, world=ALONE,
                         max_grad_norm=1.0)
            assert len(seen) >= 4 and all(now == places() for now in seen[1:])
        assert len(places()) < len(list(run.policy.parameters()))
        run = None
    finally:
        distributed.shutdown()


def test_no_memory_for_one_completion_is_told():
    sampled = rollout.from_completions([[2, 3]] * 3, [[4], [5, 6], [7, 8, 9]], "cpu")
    selection = made_up_selection(sampled)
    batches = steps.MicroBatches(sampled, torch.ones(3), None, selection, None, config_of(), ALONE)
    batches.halve()
    assert batches.config.micro_batch_tokens == 3 * 5 // 2
    with pytest.raises(Halted, match="with one completion at a time: give gradient_checkpointing=true"):
        batches.halve()


def test_one_long_completion_among_short_ones_is_halved_to_an_end():
    """The long one is over any limit, alone; the limit falls all the same until the short ones are alone too."""
    sampled = rollout.from_completions([[2, 3]] * 6, [list(range(4, 39)) * 3, *[[4, 5]] * 5], "cpu")
    batches = steps.MicroBatches(sampled, torch.ones(6), None, made_up_selection(sampled), None, config_of(), ALONE)
    with pytest.raises(Halted, match="with one completion at a time"):
        for _ in range(20):
            batches.halve()


def made_up_selection(sampled, selected=None):
    """A Selection of one rank with nothing marked."""
    selected = torch.zeros_like(sampled.mask) if selected is None else selected
    flat = {"selected": selected[sampled.mask], "marked": torch.zeros_like(sampled.mask)[sampled.mask]}
    return steps.Selection(selected, torch.zeros_like(sampled.mask), flat)


def test_rows_without_effect_are_left_out():
    """Rows of equal groups and without a selected token: exactly zero gradient, so no forward either."""
    policy = tiny_model()
    sampled = rollout.sample(policy, [[2, 3]] * 8, list(range(8)), stop=[1], max_new_tokens=6, seed=0, step=0)
    advantages = torch.tensor([0, 0, 0, 0, 1.0, -1.0, 0, 0])
    correct = torch.tensor([True] + [False] * 7)
    selected = torch.zeros_like(sampled.mask)
    selected[2, 0] = True

    def rows(*arguments):
        config = config_of("micro_batch_size=2", *arguments)
        selection = made_up_selection(sampled, selected)
        return list(steps.MicroBatches(sampled, advantages, correct, selection, policy, config, ALONE))

    batches = rows()
    assert [(len(batch.tokens), synchronised) for batch, synchronised in batches] == [(1, False), (2, False)]
    assert sum(len(batch.reference_hidden) for batch, _ in batches if batch.reference_hidden is not None) == 1
    assert sum(len(batch.tokens) for batch, _ in rows("objective=div")) == 4  # and the correct row
    marked = torch.zeros_like(sampled.mask)
    marked[7, 0] = True
    kl_cov = config_of("micro_batch_size=2", "objective=kl_cov")
    selection = steps.Selection(selected, marked, made_up_selection(sampled, selected).flat)
    batches = steps.MicroBatches(sampled, advantages, correct, selection, policy, kl_cov, ALONE)
    assert sum(len(batch.tokens) for batch, _ in batches) == 4  # and the marked row


def test_a_bandit_learns_the_rewarded_token():
    """Weights move, and the right way: the token that pays becomes likelier, at every step."""
    policy, config = tiny_model(spread=0.5), config_of("micro_batch_size=64")
    objective = steps.MicroBatchLoss(policy, config, 1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    shares = []
    for step in range(8):
        sampled = rollout.sample(policy, [[2, 3]] * 64, list(range(64)), stop=[1], max_new_tokens=1, seed=0, step=step)
        rewards = (sampled.tokens[:, 0] % 4 == 3).float()
        advantages = grpo.group_advantages(rewards, 64)
        selection = made_up_selection(sampled)
        batches = steps.MicroBatches(sampled, advantages, rewards > 0, selection, None, config, ALONE)
        steps.update(objective, optimizer, batches, selection, on_policy=True, world=ALONE, max_grad_norm=1.0)
        with torch.no_grad():
            probs = torch.softmax(policy(torch.tensor([[2, 3]])).logits[0, -1], dim=0)
        shares.append(probs[3::4].sum().item())
    assert shares == sorted(shares) and shares[-1] > shares[0] + 0.2


def test_a_gradient_that_is_not_finite_is_skipped():
    policy = tiny_model()
    before = {name: p.clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0)

    class Broken(torch.nn.Module):
        def forward(self, *arguments):
            return sum(p.sum() for p in policy.parameters()) * float("nan"), torch.zeros(6)

    selection = steps.Selection(None, None, {"selected": torch.zeros(1, dtype=torch.bool)})
    steps.update(Broken(), optimizer, [(None, False)], selection, on_policy=True, world=ALONE, max_grad_norm=1.0)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


class Bf16World(World):
    """CUDA's autocast, tried on a CPU."""

    def autocast(self):
        return torch.autocast("cpu", dtype=torch.bfloat16)


def test_under_autocast_the_reference_rounds_like_the_policy():
    """Equal weights: D is 0 in bf16 too, so that the first SCOPE step is GRPO's on a GPU as well."""
    policy, world = tiny_model(), Bf16World(0, 1, torch.device("cpu"))
    config = config_of("selection.fraction=0.5", "micro_batch_size=3")
    sampled = rollout.sample(policy, [[2, 3 + i] for i in range(8)], list(range(8)), stop=[1], max_new_tokens=6, seed=0,
                             step=0)
    advantages = grpo.group_advantages(torch.arange(8.0), 4)
    selection = steps.select(sampled, sampled.logprobs, advantages, config, seed=0)
    batches = steps.MicroBatches(sampled, advantages, advantages > 0, selection, policy, config, world)
    objective, optimizer = steps.MicroBatchLoss(policy, config, 1), torch.optim.SGD(policy.parameters(), lr=0.0)
    metrics = steps.update(objective, optimizer, batches, selection, on_policy=True, world=world, max_grad_norm=1.0)
    assert selection.selected.any() and metrics["kl/selected"] == 0
    assert 1e-4 < metrics["logprob_drift"] < 0.1  # it was bf16 indeed


def test_drift_is_a_mean_over_the_tokens_scored():
    """Two rows of eight are scored; each of their tokens is off by 0.5."""
    policy, config = tiny_model(), config_of()
    sampled = rollout.sample(policy, [[2, 3]] * 8, list(range(8)), stop=[1], max_new_tokens=6, seed=0, step=0)
    sampled.logprobs += 0.5
    advantages = torch.tensor([0, 0, 0, 0, 1.0, -1.0, 0, 0])
    selection = made_up_selection(sampled)
    batches = steps.MicroBatches(sampled, advantages, advantages > 0, selection, None, config, ALONE)
    objective, optimizer = steps.MicroBatchLoss(policy, config, 1), torch.optim.SGD(policy.parameters(), lr=0.0)
    metrics = steps.update(objective, optimizer, batches, selection, on_policy=True, world=ALONE, max_grad_norm=1.0)
    assert metrics["logprob_drift"] == pytest.approx(0.5, abs=1e-4)


def test_a_truncated_completion_earns_nothing(monkeypatch):
    """Also where the text up to the cut would count: in training and in evaluation."""
    monkeypatch.setattr("data.is_correct", lambda problem, text, grader: True)
    config = config_of("prompts_per_step=4", "max_new_tokens=6")
    policy, tokenizer = tiny_model(), toy.make_tokenizer(29)
    problems = [{"numbers": [i, 3], "target": 5} for i in range(4)]
    sampled, _, rewards, correct = roll_out(policy, tokenizer, [1, 5], problems, 0, config, ALONE)
    assert 0 < sampled.stopped.sum() < 32
    assert (rewards == sampled.stopped.float()).all() and (correct == sampled.stopped).all()
    result = train.evaluate.evaluate(policy, tokenizer, problems, ALONE, config, samples=8, title="")
    assert 0 < result.stopped.sum() < 32 and (result.correct == result.stopped).all()


def test_set_up(tmp_path, monkeypatch):
    """The words of the config reach the parts of a run."""
    monkeypatch.chdir(tmp_path)
    problems = [{"numbers": [i, 3], "target": 5} for i in range(1, 9)]

    def run(*words, **arguments):
        return steps.set_up(config_of(*SMALL, *words), problems, ALONE, **arguments)

    def recomputes(policy):
        return any(getattr(module, "gradient_checkpointing", False) for module in policy.modules())

    made = run("optimizer.weight_decay=0.25", "optimizer.lr=0.5", "gradient_checkpointing=true")
    (group,) = made.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert len(group["params"]) == len(list(made.policy.parameters()))
    assert made.policy.training and recomputes(made.policy) and made.loss.policy is made.policy
    assert made.problems == problems and made.stop == [made.tokenizer.eos_token_id]
    for own, frozen in zip(made.policy.parameters(), made.reference.parameters(), strict=True):
        assert torch.equal(own, frozen) and own.requires_grad and not frozen.requires_grad
        assert own.data_ptr() != frozen.data_ptr()
    assert not recomputes(run().policy) and not made.reference.training
    assert run("selection.strategy=none").reference is None
    assert run(training=False).optimizer is None
    assert {p.device.type for p in run(weights=False).policy.parameters()} == {"meta"}


def test_the_config_reaches_the_sampler(monkeypatch):
    config = config_of("temperature=0.7", "seed=3", "max_new_tokens=9", "rollout.batch_size=5", "rollout.segment=4",
                       "selection.strategy=entropy_change")
    given = {}
    monkeypatch.setattr(rollout, "sample", lambda *arguments, **named: given.update(named))
    problems = [{"numbers": [1, 3], "target": 5}]
    run = steps.Run(config, ALONE, tiny_model(), toy.make_tokenizer(29), [1], problems)
    steps.sample(run, problems, [0], 6)
    assert given == {"stop": [1], "temperature": 0.7, "seed": 3, "step": 6, "max_new_tokens": 9, "batch_size": 5,
                     "segment": 4, "collision": True}


def test_order_of_problems():
    """Every epoch holds each problem at most once, the remainder dropped; another epoch, another order."""
    epochs = [[p for s in range(3) for p in steps.step_problems(list(range(10)), 3 * e + s, count=3, seed=0)]
              for e in range(3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert steps.step_problems(list(range(10)), 4, count=3, seed=0) == epochs[1][3:6]  # no state: any step, any time
    assert steps.step_problems(list(range(10)), 4, count=3, seed=1) != epochs[1][3:6]
