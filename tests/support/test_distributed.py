"""The process group's life: what it leaves behind."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL

# As `torchrun --nproc_per_node=1`: a set-up with sharded moments, one update, the end of the group.
SCRIPT = f"""
import sys
from pathlib import Path
import torch
import step as steps
from helpers import config_of
from support import distributed

def work(world):
    config = config_of(*{SMALL!r}, "prompts_per_step=1", sys.argv[1])
    run = steps.set_up(config, [{{"numbers": [2, 3], "target": 5}}], world)
    print(type(run.optimizer).__name__)
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_no_thread_outlives_the_group(tmp_path):
    """A thread of gloo that asks for the interpreter's lock while Python ends aborts the process, now and then."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", SCRIPT, "optimizer.zero=true"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | ranks, capture_output=True, text=True, timeout=170)
    assert done.stdout.splitlines()[-2:] == ["ZeroRedundancyOptimizer", "[]"], done.stderr
