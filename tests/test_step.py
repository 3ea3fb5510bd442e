"""One training step: gradients against a naive objective, whatever the micro-batches and ranks."""

import dataclasses
import math

import pytest
import torch
from helpers import (
    ALONE,
    SMALL,
    Bf16World,
    assert_same_gradient,
    config_of,
    on_two_ranks,
    run_of,
    tiny_model,
)
from scenarios import all_scenarios, all_wrong, by_length, made_up_rollout, step_gradient

import train
from data import prompt_ids
from evaluate import evaluate
from grpo import group_advantages
from objectives import OBJECTIVES, Objective
from rollout import sample
from support import distributed
from support.distributed import World
from toy import make_tokenizer
from train import draw_problems, select, set_up, update

PROBLEMS = [{"numbers": [i, 3], "target": 5} for i in range(1, 9)]


def eight_completions(policy, advantages, prompts=None):
    """Sample 8 completions, of which the first is correct, and select nothing."""
    prompts = prompts or [[2, 3]] * 8
    rollout = sample(policy, prompts, list(range(8)), stop=[1], max_new_tokens=6, seed=0, step=0)
    rollout.advantages = torch.tensor(advantages)
    rollout.correct = torch.arange(8) == 0
    rollout.selected = torch.zeros_like(rollout.mask)
    rollout.token_mask = torch.zeros_like(rollout.mask)
    return rollout


# ---------------------------------------------------------------- 1 problems


def test_order_of_problems():
    """Every epoch holds each problem at most once, the remainder dropped, in another order."""

    def problems_of(step, seed=0):
        config = config_of("prompts_per_step=3", "group_size=2", f"seed={seed}")
        return draw_problems(list(range(10)), step, config, ALONE)[0][::2]

    epochs = [sum([problems_of(3 * epoch + step) for step in range(3)], []) for epoch in range(3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert problems_of(4) == epochs[1][3:6]  # there is no state: any step at any time
    assert problems_of(4, seed=1) != epochs[1][3:6]
    assert problems_of(0, seed=1) != epochs[1][:3]  # nor is an epoch that of the next seed


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_group_is_of_one_problem_on_one_rank(ranks, updates):
    """Ranks share every update's part of the step; each row number occurs once over all ranks."""
    config = config_of("prompts_per_step=8", "group_size=3", f"updates_per_rollout={updates}")
    whole, all_rows = draw_problems(list(range(20)), 1, config, ALONE)
    assert all_rows == list(range(24))
    seen = []
    for rank in range(ranks):
        problems, rows = draw_problems(list(range(20)), 1, config, World(rank, ranks))
        assert problems == [whole[row] for row in rows]
        for i in range(0, len(rows), 3):
            assert rows[i : i + 3] == list(range(rows[i], rows[i] + 3))
            assert len(set(problems[i : i + 3])) == 1
        size = len(rows) // updates
        for i, row in enumerate(rows):
            assert row // (24 // updates) == i // size
        seen += rows
    assert sorted(seen) == all_rows
    assert len(set(whole)) == 8


# ---------------------------------------------------------------- 2 and 3 rollouts and rewards


def test_each_sample_of_an_evaluation_is_graded_by_its_problem(monkeypatch):
    calls = []

    def spy(model, prompts, rows, **named):
        calls.append((prompts, rows))
        return sample(model, prompts, rows, **named)

    monkeypatch.setattr("evaluate.sample", spy)
    monkeypatch.setattr("rewards.is_correct", lambda problem, text, _: problem["numbers"][0] > 4)
    config = config_of("max_new_tokens=6")
    tokenizer = make_tokenizer(29)
    result = evaluate(tiny_model(), tokenizer, PROBLEMS, config, ALONE, samples=4, seed=0, title="")
    prompts = prompt_ids(tokenizer, PROBLEMS, config.prompt)
    assert calls == [([prompt for prompt in prompts for _ in range(4)], list(range(32)))]
    assert not result.correct[:4].any()
    assert (result.correct[4:] == result.stopped[4:]).all()
    assert result.stopped[4:].any()


def test_the_config_reaches_the_sampler(in_tmp, monkeypatch):
    calls = []

    def spy(*arguments, **named):
        calls.append(named)
        return sample(*arguments, **named)

    monkeypatch.setattr(train, "sample", spy)
    settings = [
        "temperature=0.7",
        "seed=3",
        "max_new_tokens=9",
        "rollout.batch_size=5",
        "rollout.segment=4",
    ]
    train.main([*SMALL, *settings, "selection.strategy=entropy_change", "steps=2"])
    named = {
        "temperature": 0.7,
        "seed": 3,
        "max_new_tokens": 9,
        "batch_size": 5,
        "segment": 4,
        "stop": [1],
    }
    assert calls == [named | {"step": 0}, named | {"step": 1}]


# ---------------------------------------------------------------- 5 selection


def flat_columns(rollout):
    advantages = rollout.advantages[:, None].expand_as(rollout.mask)
    return rollout.logprobs[rollout.mask], rollout.entropy[rollout.mask], advantages[rollout.mask]


def test_random_choices_follow_the_seed(monkeypatch):
    """Another seed, another draw: of the selection, and of the tokens of the objective."""
    monkeypatch.setattr("objectives.CLIP_COV_FRACTION", 0.2)
    monkeypatch.setattr("objectives.CLIP_COV_RANGE", (-9.0, 9.0))
    rollout = made_up_rollout(tiny_model(), list(range(32)), by_length)
    config = config_of(
        "selection.strategy=uniform", "selection.fraction=0.2", "objective=clip_cov", "group_size=4"
    )
    first, again, other = (
        select(rollout, rollout, config, ALONE, seed=seed)[:2] for seed in (5, 5, 6)
    )
    for i in range(2):
        assert (first[i] == again[i]).all()
        assert (first[i] & other[i]).sum() / first[i].sum() < 0.5  # 0.2 expected


def test_the_current_policy_selects_and_the_old_one_clips(monkeypatch):
    """Where rho = e, tokens with A > 0 are clipped. A lower baseline selects just these."""
    monkeypatch.setattr("objectives.CLIP_COV_RANGE", (-9.0, 9.0))
    monkeypatch.setattr("objectives.CLIP_COV_FRACTION", 1.0)
    rollout = made_up_rollout(tiny_model(), list(range(32)), by_length)
    current = dataclasses.replace(
        rollout, logprobs=rollout.logprobs + 1, entropy_baseline=rollout.entropy_baseline - 10
    )
    settings = ["selection.strategy=entropy_change", "selection.fraction=1", "objective=clip_cov"]
    selected, marked, _ = select(current, rollout, config_of(*settings), ALONE, seed=0)
    advantages = rollout.advantages[:, None].expand_as(rollout.mask)
    assert (selected == (rollout.mask & (advantages > 0))).all()
    assert (marked == (rollout.mask & (advantages < 0))).all()


@pytest.mark.parametrize("fraction", [0.1, 0.35])
def test_forking_tokens_are_the_share_of_the_config(fraction):
    rollout = made_up_rollout(tiny_model(), list(range(32)), by_length)
    config = config_of(
        "selection.strategy=forking",
        "selection.fraction=1",
        f"forking_fraction={fraction}",
        "objective=forking_rl",
    )
    selected, token_mask, _ = select(rollout, rollout, config, ALONE, seed=0)
    _, entropy, _ = flat_columns(rollout)
    count = round(fraction * len(entropy))
    assert selected.sum() == count
    assert entropy[selected[rollout.mask]].min() == entropy.sort().values[-count]
    assert (selected == token_mask).all()


# ---------------------------------------------------------------- 6 the gradient


@pytest.fixture(scope="module")
def whole():
    return step_gradient(ALONE, "micro_batch_size=100", "logits_chunk=10000", rewards_of=by_length)


@pytest.mark.parametrize(
    "settings",
    [["micro_batch_size=3", "logits_chunk=1000"], ["micro_batch_tokens=50", "logits_chunk=3"]],
)
def test_gradient_does_not_depend_on_the_micro_batches(whole, settings):
    selected, gradient, metrics = step_gradient(ALONE, *settings, rewards_of=by_length)
    assert (selected == whole[0]).all()
    assert 0 < selected.sum() < len(selected)
    assert_same_gradient(whole[1], gradient)
    assert metrics == pytest.approx(whole[2], rel=1e-4, abs=1e-7)


def test_all_wrong_selects_nothing_and_moves_nothing():
    selected, gradient, metrics = step_gradient(ALONE, rewards_of=all_wrong)
    assert not selected.any()
    assert all((g == 0).all() for g in gradient.values())
    assert metrics["loss"] == 0
    assert metrics["grad_norm"] == 0


# ---------------------------------------------------------------- 6 over ranks


@pytest.fixture
def one_rank():
    """Make a process group of this process alone, so that losses are under DDP."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield ALONE
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_gradient_of_one_process(tmp_path):
    """With unequal numbers of micro-batches, one rank idle, or nothing to learn."""

    def run_all():
        with distributed.start() as world:
            results = all_scenarios(world)
            if world.is_main:
                torch.save(results, tmp_path / "results.pt")

    on_two_ranks(run_all, tmp_path)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, (selected, gradient, metrics) in all_scenarios(ALONE).items():
        assert (results[name][0] == selected).all(), name
        if name == "all wrong":
            assert all((g == 0).all() for g in results[name][1].values())
        else:
            assert_same_gradient(gradient, results[name][1])
        assert results[name][2] == pytest.approx(metrics, rel=1e-4, abs=1e-6), name


def test_gradients_stay_in_the_buckets_of_ddp(one_rank):
    """Also before the one synchronised backward: other gradients would be as large as the model."""
    config = config_of("micro_batch_size=3", "group_size=4", "selection.fraction=0.2")
    policy = tiny_model(seed=0).train()
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run = run_of(policy, config, world=one_rank, reference=tiny_model(seed=1))
    addresses = []

    def watch(*arguments):
        addresses.append({p.grad.untyped_storage().data_ptr() for p in policy.parameters()})

    run.loss.register_forward_pre_hook(watch)
    for _ in range(3):  # DDP makes its buckets anew before the second step
        rollout = made_up_rollout(policy, list(range(32)), by_length, temperature=1.0)
        rollout.selected, rollout.token_mask, _ = select(rollout, rollout, config, one_rank, seed=0)
        addresses.clear()
        update(run, rollout, on_policy=True)
        watch()
        assert len(addresses) >= 5
        assert all(at == addresses[-1] for at in addresses[2:])
    assert len(addresses[-1]) < len(list(policy.parameters()))


# ---------------------------------------------------------------- 6 the update


def rows_of_forwards(policy, rollout, *arguments):
    """Return how many rows each forward of an update has, and the reference's hidden states."""
    run = run_of(policy, config_of("micro_batch_size=2", *arguments), reference=policy)
    sizes = []
    references = []

    def watch(module, inputs):
        batch, reference, *_ = inputs
        sizes.append(len(batch.tokens))
        references.append(reference)

    run.loss.register_forward_pre_hook(watch)
    update(run, rollout, on_policy=True)
    return sizes, references[0]


def test_rows_without_effect_are_left_out():
    """Rows of groups of equal rewards without a selected token have no gradient."""
    policy = tiny_model()
    rollout = eight_completions(policy, [0, 0, 0, 0, 1.0, -1.0, 0, 0])
    rollout.selected[2, 0] = True
    sizes, reference = rows_of_forwards(policy, rollout)
    assert sum(sizes) == 3
    assert {row: len(states) for row, states in reference.hidden.items()} == {2: 1}
    sizes, _ = rows_of_forwards(policy, rollout, "objective=div")
    assert sum(sizes) == 4  # the correct row too
    rollout.token_mask[7, 0] = True
    sizes, _ = rows_of_forwards(policy, rollout, "objective=kl_cov")
    assert sum(sizes) == 4  # the marked row too


def test_the_gradient_is_clipped_to_its_norm():
    """SGD at rate 1 moves the weights by exactly max_grad_norm; the metric is the norm before."""
    policy = tiny_model()
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    run = run_of(policy, config_of("optimizer.max_grad_norm=0.01"), optimizer=optimizer)
    metrics = update(run, eight_completions(policy, [1.0, -1.0] * 4), on_policy=True)
    moves = [(p - old).norm() for p, old in zip(policy.parameters(), before)]
    assert metrics["grad_norm"] > 0.1
    assert torch.stack(moves).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_bandit_learns_the_rewarded_token():
    """The weights move, and the right way: the token that pays becomes likelier at every step."""
    policy = tiny_model(spread=0.5)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    run = run_of(policy, config_of(), optimizer=optimizer)
    shares = []
    for step in range(8):
        rollout = sample(
            policy, [[2, 3]] * 64, list(range(64)), stop=[1], max_new_tokens=1, seed=0, step=step
        )
        rollout.correct = rollout.tokens[:, 0] % 4 == 3
        rollout.advantages = group_advantages(rollout.correct.float(), 64)
        rollout.selected = torch.zeros_like(rollout.mask)
        rollout.token_mask = torch.zeros_like(rollout.mask)
        update(run, rollout, on_policy=True)
        with torch.no_grad():
            probs = torch.softmax(policy(torch.tensor([[2, 3]])).logits[0, -1], dim=0)
        shares.append(probs[3::4].sum().item())
    assert shares == sorted(shares)
    assert shares[-1] > shares[0] + 0.2


def of_infinite_loss(logprobs, *others, **clip):
    return logprobs + math.inf


def of_infinite_gradient(logprobs, *others, **clip):
    return (logprobs - logprobs.detach()).sqrt()


@pytest.mark.parametrize("loss", [of_infinite_loss, of_infinite_gradient])
def test_an_update_that_is_not_finite_is_skipped(monkeypatch, loss):
    """Whether the loss is not finite, or only its gradient."""
    monkeypatch.setitem(OBJECTIVES, "broken", Objective(loss))
    policy = tiny_model()
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0)
    run = run_of(policy, config_of("objective=broken"), optimizer=optimizer)
    metrics = update(run, eight_completions(policy, [1.0, -1.0] * 4), on_policy=True)
    assert metrics["update/skipped"] == 1
    assert math.isfinite(metrics["loss"]) == (loss is of_infinite_gradient)
    assert math.isfinite(metrics["grad_norm"]) == (loss is of_infinite_loss)
    assert all(torch.equal(p, old) for p, old in zip(policy.parameters(), before))


def test_under_autocast_the_reference_rounds_like_the_policy():
    """With equal weights D is 0 in bf16 too, so that the first SCOPE step is GRPO's on a GPU as
    well.
    """
    policy = tiny_model()
    config = config_of("selection.fraction=0.5", "micro_batch_size=3", "group_size=4")
    prompts = [[2, 3 + i] for i in range(8)]
    rollout = eight_completions(policy, group_advantages(torch.arange(8.0), 4).tolist(), prompts)
    run = run_of(policy, config, world=Bf16World(), reference=policy)
    rollout.selected, _, _ = select(rollout, rollout, config, run.world, seed=0)
    metrics = update(run, rollout, on_policy=True)
    assert rollout.selected.any()
    assert metrics["kl/selected"] == 0
    assert 1e-4 < metrics["logprob_drift"] < 0.1  # it was bf16 indeed


def test_drift_is_a_mean_over_the_scored_tokens():
    """Two rows of eight are scored; each of their tokens is off by 0.5. So is kl_old, by k3."""
    policy = tiny_model()
    rollout = eight_completions(policy, [0, 0, 0, 0, 1.0, -1.0, 0, 0])
    rollout.logprobs += 0.5
    run = run_of(policy, config_of())
    metrics = update(run, rollout, on_policy=True)
    assert metrics["logprob_drift"] == pytest.approx(0.5, abs=1e-4)
    metrics = update(run, rollout, on_policy=False)
    assert metrics["kl_old"] == pytest.approx(math.exp(-0.5) - 0.5, abs=1e-4)  # d = 0.5


# ---------------------------------------------------------------- set_up


def test_set_up(in_tmp):
    """The settings reach the parts of a run."""

    def run_with(*arguments):
        return set_up(config_of(*SMALL, *arguments), ALONE, in_tmp)

    def recomputes(policy):
        return any(getattr(module, "gradient_checkpointing", False) for module in policy.modules())

    run = run_with("optimizer.weight_decay=0.25", "optimizer.lr=0.5", "gradient_checkpointing=true")
    (group,) = run.optimizer.param_groups
    assert group["lr"] == 0.5
    assert group["weight_decay"] == 0.25
    assert len(group["params"]) == len(list(run.policy.parameters()))
    assert run.policy.training
    assert recomputes(run.policy)
    assert run.loss.policy is run.policy
    assert len(run.problems) == 50
    assert run.stop == [run.tokenizer.eos_token_id]
    for parameter, frozen in zip(run.policy.parameters(), run.reference.parameters(), strict=True):
        assert torch.equal(parameter, frozen)
        assert parameter.requires_grad
        assert not frozen.requires_grad
        assert parameter.data_ptr() != frozen.data_ptr()
    assert not run.reference.training
    plain = run_with("selection.strategy=none")
    assert plain.reference is None
    assert not recomputes(plain.policy)
