"""MasterAdamW against torch's AdamW, and shards that make the same whole on any number of ranks."""

import pytest
import torch
from helpers import ALONE
from torch.optim import AdamW

from support import optimizer
from support.config import UserError
from support.distributed import World
from support.optimizer import MasterAdamW, assign_owners

SHAPES = {"a": (7, 5), "b": (40,), "c": (3, 3), "d": (1,)}


def make_parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for name, shape in SHAPES.items():
        weights = torch.randn(shape, generator=generator).to(dtype)
        parameters[name] = torch.nn.Parameter(weights)
    return parameters


def copy_of(parameters, dtype=None):
    return {
        name: torch.nn.Parameter(p.detach().to(dtype, copy=True)) for name, p in parameters.items()
    }


def take_steps(optimizer, parameters, steps, lr=None, dtype=torch.bfloat16):
    """Take steps with gradients that are a function of the step, rounded to `dtype`."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters.values():
            gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.grad = gradient.to(parameter.dtype)
        for group in optimizer.param_groups:
            group["lr"] = lr or 1e-2 / (1 + step)  # as train.set_learning_rate does
        optimizer.step()


def make_optimizer(parameters, world=ALONE, **changes):
    return MasterAdamW(parameters.items(), world, **{"lr": 1.0, "weight_decay": 0.1} | changes)


def assert_equal(parameters, expected):
    for name in SHAPES:
        assert torch.equal(parameters[name], expected[name]), name


def test_fp32_is_torch_adamw_bit_for_bit():
    parameters = make_parameters(torch.float32)
    expected = copy_of(parameters)
    exact = dict(dtype=torch.float32)
    take_steps(make_optimizer(parameters), parameters, range(30), **exact)
    take_steps(AdamW(expected.values(), weight_decay=0.1), expected, range(30), **exact)
    assert_equal(parameters, expected)


def test_bf16_weights_are_the_rounding_of_fp32_masters():
    parameters = make_parameters(torch.bfloat16)
    before = copy_of(parameters, torch.float32)
    masters = copy_of(before)
    without_masters = copy_of(parameters)
    take_steps(make_optimizer(parameters, weight_decay=0.0), parameters, range(300), lr=1e-5)
    for others in (masters, without_masters):
        take_steps(AdamW(others.values(), weight_decay=0.0), others, range(300), lr=1e-5)
    assert_equal(parameters, {name: p.bfloat16() for name, p in masters.items()})

    def change(parameters):
        return sum((p.float() - before[name]).abs().sum().item() for name, p in parameters.items())

    assert change(without_masters) < 0.3 * change(masters)  # why there are masters


class Elsewhere(torch.Tensor):
    """State in host memory: what comes to the device is a copy, as it is with a GPU."""

    def to(self, *arguments, **named):
        return self.clone().as_subclass(torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_state_comes_back_from_the_device(monkeypatch, dtype):
    monkeypatch.setattr(optimizer, "pinned_copy", lambda x: x.clone().as_subclass(Elsewhere))
    parameters = make_parameters(dtype)
    expected = copy_of(parameters)
    offloading = make_optimizer(parameters, offload=True)
    assert all(
        isinstance(x, Elsewhere) for state in offloading.state.values() for x in state.values()
    )
    take_steps(offloading, parameters, range(10))
    take_steps(make_optimizer(expected), expected, range(10))
    assert_equal(parameters, expected)


def train_as_ranks(count, start, steps, shards=None):
    """Return the parameters, each from the rank that owns it, and the shards after some steps."""
    result = {}
    new_shards = []
    for rank in range(count):
        parameters = copy_of(start)
        of_rank = make_optimizer(parameters, World(rank, count))
        if shards:
            of_rank.load_shards(shards)
        take_steps(of_rank, parameters, steps)
        new_shards.append(of_rank.shard())
        for name in SHAPES.keys() - of_rank.share().keys():
            assert torch.equal(parameters[name], start[name])
        result |= of_rank.share()
    assert sum(len(shard["state"]) for shard in new_shards) == len(SHAPES)  # each parameter once
    return {name: result[name] for name in SHAPES}, new_shards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("later", [1, 3])
def test_shards_are_saved_and_shared_out_anew(tmp_path, dtype, later):
    """Two ranks take 5 steps and save; then 1 or 3 ranks take 5 more: one rank's 10 steps."""
    expected = make_parameters(dtype)
    take_steps(make_optimizer(expected), expected, range(10))
    middle, shards = train_as_ranks(2, make_parameters(dtype), range(5))
    torch.save(shards, tmp_path / "shards.pt")
    shards = torch.load(tmp_path / "shards.pt", weights_only=True)
    parameters, _ = train_as_ranks(later, middle, range(5, 10), shards)
    assert_equal(parameters, expected)
    with pytest.raises(UserError, match="the checkpoint has no exp_avg for"):
        make_optimizer(middle).load_shards(shards[:1])


def test_a_shard_that_does_not_fit_is_an_error():
    half = make_optimizer(make_parameters(torch.bfloat16))
    full = make_optimizer(make_parameters(torch.float32))
    with pytest.raises(UserError, match="no master for a: it was saved with another precision="):
        half.load_shards([full.shard()])
    wider = make_parameters(torch.float32)
    wider["c"] = torch.nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(UserError, match="no exp_avg for c"):
        make_optimizer(wider).load_shards([full.shard()])


def test_ranks_have_equal_loads():
    sizes = [100, 1, 1, 50, 50, 3]
    owners = assign_owners(sizes, 2)
    loads = [sum(size for size, owner in zip(sizes, owners) if owner == rank) for rank in range(2)]
    assert sorted(loads) == [102, 103]
    assert assign_owners(sizes, 1) == [0] * 6
