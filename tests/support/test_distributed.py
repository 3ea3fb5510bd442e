"""Ranks under torchrun: collectives, ranks that fail, attempts, and how the group ends."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

from support import distributed
from support.config import UserError
from support.distributed import World, join

# Two ranks in two attempts: rank 1 fails, then all goes well.
SCRIPT = """
import os
import signal
from pathlib import Path

import torch
from support.distributed import StopSignal, start
from support.optimizer import MasterAdamW


def work(world, attempt):
    rank = world.rank
    assert world.sum(torch.ones(3)).tolist() == [2, 2, 2]
    if attempt < 1 and rank == 1:
        raise ZeroDivisionError("no memory left")
    world.barrier()

    x = torch.full((2,), float(rank))
    assert world.sum(x).tolist() == [1, 1] and x.tolist() == [rank, rank]  # not in place
    assert world.max(7 - rank) == 7
    rows = torch.full((3 * rank, 2), float(rank))  # none on rank 0
    assert world.gather(rows).tolist() == [[1, 1]] * 3
    assert world.gather(torch.tensor([rank], dtype=torch.bool)).tolist() == [False, True]
    world.broadcast(x, 1)
    assert x.tolist() == [1, 1]
    assert [*world.slice(5)] == [[0, 1], [2, 3, 4]][rank]
    assert world.is_main == (rank == 0) and world.hide_bar == [None, True][rank]

    layer = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1)
    module = world.ddp(layer)
    module(torch.full((1, 2), 2.0 * rank)).sum().backward()
    assert layer.weight.grad.tolist() == [[1, 1]]  # the mean
    MasterAdamW(layer.named_parameters(), world, lr=0.5, weight_decay=0).step()
    assert world.gather(layer.weight.detach()).unique().numel() == 1

    stop_signal = StopSignal()
    if rank == 1:
        for _ in range(2):  # torchrun passes a signal on, so that it may arrive twice
            os.kill(os.getpid(), signal.SIGTERM)
    assert world.max(stop_signal.number) == signal.SIGTERM
    stop_signal.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with start(timeout=1.0) as world:
    work(world, attempt)
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
print(f"rank {world.rank} left; threads of gloo: {sum('gloo' in name for name in threads)}")
"""


def test_two_ranks(tmp_path):
    """A rank that fails says so, keeps nobody waiting, and torchrun can start all again.

    In the end no thread outlives the group: one of gloo that asks for the interpreter's lock while
    Python ends aborts the process now and then.
    """
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1",
        "--monitor-interval=0.1",
        "script.py",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "rank 1 of 2 failed:" in result.stderr
    assert "ZeroDivisionError: no memory left" in result.stderr
    lines = sorted(result.stdout.splitlines())
    assert lines == [f"rank {rank} left; threads of gloo: 0" for rank in range(2)], result.stderr


def test_only_some_of_torchruns_variables(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="RANK is set, but not by torchrun"):
        join("auto", 1.0)


def test_a_rank_that_fails_ends_with_one_line(monkeypatch, capsys):
    """Other ranks wait until rank 0 had the time to report the same error."""
    waits = []
    monkeypatch.setattr(distributed.time, "sleep", waits.append)
    monkeypatch.setattr(distributed.os, "_exit", lambda code: waits.append(f"code {code}"))
    for rank, start in ((0, "error:"), (1, "error on rank 1:")):
        distributed.end_rank(World(rank, 2), UserError("no such file"))
        assert capsys.readouterr().err == f"{start} no such file\n"
    assert waits == ["code 2", 2, "code 2"]
