"""The process group's life: what it leaves behind."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL

from support import distributed
from support.config import UserError

# As `torchrun --nproc_per_node=1`: a set-up, one update, the end of the group.
SCRIPT = f"""
from pathlib import Path
import torch
import step as steps
from helpers import config_of
from support import distributed

def work(world):
    config = config_of(*{SMALL!r}, "prompts_per_step=1")
    run = steps.set_up(config, [{{"numbers": [2, 3], "target": 5}}], world)
    for parameter in run.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    distributed.gather(torch.ones(2))

world = distributed.setup()
work(world)
distributed.shutdown()
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
print([name for name in threads if "gloo" in name])
"""


FAILING = """
import torch
from support import distributed
from support.config import UserError
import sys

def update(world):
    if world.rank == 1:
        raise {"broken": RuntimeError, "mistake": UserError}[sys.argv[1]]("no memory left")
    distributed.barrier()

if __name__ == "__main__":
    with distributed.joined() as world:
        update(world)
    print("left the group")
"""


@pytest.mark.parametrize("word, told", [("broken", "rank 1 of 2 failed in update (failing.py, line 9): RuntimeError: "
                                                   "no memory left"), ("mistake", "error: no memory left (rank 1)")])
def test_a_rank_that_fails_says_so_and_keeps_nobody_waiting(tmp_path, word, told):
    """Leaving the group would wait for the other, which waits in a barrier; torchrun ends it."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, word]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=100)
    assert done.returncode == 1 and told in done.stderr and "left the group" not in done.stdout, done.stderr
    assert f"exitcode  : {1 if word == 'broken' else 2} " in done.stderr, done.stderr


def test_half_of_torchruns_variables(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="RANK is set, but not by torchrun"):
        distributed.setup()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_no_thread_outlives_the_group(tmp_path):
    """A thread of gloo that asks for the interpreter's lock while Python ends aborts the process, now and then."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=os.environ | ranks, capture_output=True,
                          text=True, timeout=170)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
