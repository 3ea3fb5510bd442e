"""AdamW on masters: torch's own AdamW as the reference, and shards that make the same whole."""

import pytest
import torch

from support import distributed
from support.optimizer import MasterAdamW, owners

SHAPES = {"a": (7, 5), "b": (40,), "c": (3, 3), "d": (1,)}


def weights(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for name, shape in SHAPES.items()}


def gradients(step, dtype):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def train(optimizer, parameters, steps, lr=None):
    dtype = parameters["a"].dtype
    for step in steps:
        for name, gradient in gradients(step, torch.bfloat16).items():
            parameters[name].grad = gradient.to(dtype)
        for group in optimizer.param_groups:
            group["lr"] = lr or 1e-2 / (1 + step)  # as train.set_rate does
        optimizer.step()
    return parameters


@pytest.mark.parametrize("offload", [False, True])
def test_fp32_is_torch_adamw_bit_for_bit(offload, monkeypatch):
    """Offloaded: what visits the device is a copy, as it is with a GPU, so that the state has to come back."""
    monkeypatch.setattr(distributed, "visit", lambda x, device: x.clone() if offload else x)
    own, expected = weights(torch.float32), weights(torch.float32)
    optimizer = MasterAdamW(own.items(), lr=1.0, weight_decay=0.1, offload=offload)
    train(optimizer, own, range(30))
    train(torch.optim.AdamW(expected.values(), lr=1.0, weight_decay=0.1), expected, range(30))
    assert all(torch.equal(own[name], expected[name]) for name in SHAPES)


def test_bf16_weights_are_the_rounding_of_fp32_masters():
    own = weights(torch.bfloat16)
    masters = {name: torch.nn.Parameter(p.detach().float()) for name, p in own.items()}
    before = {name: p.detach().clone() for name, p in masters.items()}
    straight = weights(torch.bfloat16)
    train(MasterAdamW(own.items(), lr=1.0, weight_decay=0.0), own, range(300), lr=1e-5)
    train(torch.optim.AdamW(masters.values(), weight_decay=0.0), masters, range(300), lr=1e-5)
    train(torch.optim.AdamW(straight.values(), weight_decay=0.0), straight, range(300), lr=1e-5)
    assert all(torch.equal(own[name], masters[name].bfloat16()) for name in SHAPES)

    def moved(parameters):
        return sum((parameters[name].float() - before[name]).abs().sum().item() for name in SHAPES)

    assert moved(straight) < 0.3 * moved(masters)  # why there are masters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("later", [1, 3])
def test_shards_are_saved_and_shared_out_anew(monkeypatch, tmp_path, dtype, later):
    """Two ranks for 5 steps, saved; then 1 or 3 ranks for 5 more: bit for bit one rank's 10 steps."""
    whole = weights(dtype)
    train(MasterAdamW(whole.items(), lr=1.0, weight_decay=0.1), whole, range(10))

    def as_rank(rank, ranks):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "size", lambda: ranks)

    def team(ranks, start, shards=None):
        """What each rank would hold: its own parameters stepped, the others' not."""
        made, result = [], {}
        for rank in range(ranks):
            as_rank(rank, ranks)
            mine = {name: torch.nn.Parameter(p.detach().clone()) for name, p in start.items()}
            optimizer = MasterAdamW(mine.items(), lr=1.0, weight_decay=0.1)
            if shards:
                optimizer.load_shards(shards)
            train(optimizer, mine, range(5, 10) if shards else range(5))
            torch.save(optimizer.shard(), tmp_path / f"{rank}.pt")
            made.append(torch.load(tmp_path / f"{rank}.pt", weights_only=True))
            result |= {name: mine[name] for name in optimizer.own()}
        assert sum(len(shard["state"]) for shard in made) == len(SHAPES)  # each parameter once
        return {name: result[name] for name in start}, made

    half, shards = team(2, weights(dtype))
    end, _ = team(later, half, shards)
    assert all(torch.equal(end[name], whole[name]) for name in SHAPES)
    as_rank(0, 1)
    with pytest.raises(KeyError):
        MasterAdamW(half.items(), lr=1.0, weight_decay=0.0).load_shards(shards[:1])
    other = weights({torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype])
    with pytest.raises(KeyError):  # with masters, or without, where there are none, or some
        MasterAdamW(other.items(), lr=1.0, weight_decay=0.0).load_shards(shards)


def test_owners_have_equal_loads():
    sizes = [100, 1, 1, 50, 50, 3]
    loads = [sum(size for size, owner in zip(sizes, owners(sizes, 2)) if owner == rank) for rank in range(2)]
    assert sorted(loads) == [102, 103] and owners(sizes, 1) == [0] * 6
