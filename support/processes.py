"""Other processes: started so that they end with this one; and what software a result came from."""

import platform
import signal
import subprocess
import sys
from pathlib import Path

import torch
import transformers


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """The command in the background, what it prints in `log`."""
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, preexec_fn=end_with_parent)


def end_with_parent() -> None:
    """In the child: a killed parent takes it along, or the next parent would start the same work a second time."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def versions() -> dict[str, str]:
    """The commit of this repository, and what it ran on."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                         text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return {"commit": git.stdout.strip(), "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "device": device}
