"""Kill runs before file operations, and resume them: the result must be that of an unbroken run.

    python tests/faults.py 40        # 40 kills, before as many file operations of a run

Every metric, sample, evaluation and weight must be the same, bit for bit.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train  # noqa: E402
from tests.helpers import SMALL, metrics_of  # noqa: E402

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def run(folder: Path, kill_before: int) -> int:
    """Start or resume a run in a process of its own, which kills itself before an operation.

    Returns the exit code, or minus the number of the signal.
    """
    folder.mkdir(exist_ok=True)
    child = os.fork()  # torch is imported already, so that a start takes no seconds
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    operations = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal operations
        writes = (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        if writes and str(arguments[0]).startswith("/dev"):
            return
        if writes or event in CHANGES:
            operations += 1
            if operations > kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    status = 1
    try:
        train.main([*SMALL, "reward=trajectory_likelihood", "name=run", "resume=auto"])
        status = 0
        os.write(log, f"operations: {operations}\n".encode())
    except Exception as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def result(folder: Path) -> list:
    """Return everything that must not differ."""
    os.chdir(folder)
    files = ("samples.jsonl", "evaluation.json", "model/model.safetensors", "model/tokenizer.json")
    return [metrics_of("run"), *(Path("runs/run", file).read_bytes() for file in files)]


def main(kills: int, folder: Path) -> None:
    torch.set_num_threads(1)
    unbroken = folder / "unbroken"
    assert run(unbroken, 10**9) == 0, (unbroken / "log.txt").read_text()
    operations = int((unbroken / "log.txt").read_text().rpartition("operations: ")[2])
    for number in sorted({operations * i // kills for i in range(kills)}):
        killed = folder / f"killed-before-{number}"
        status = run(killed, number)
        assert status == -signal.SIGKILL, f"{killed} ended with {status}"
        status = run(killed, 10**9)
        assert status == 0, f"{killed} does not resume: {(killed / 'log.txt').read_text()[-2000:]}"
        for one, other in zip(result(unbroken), result(killed)):
            assert one == other, f"{killed} has another result"
    print(f"{kills} kills, before file operations of {operations}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(int(sys.argv[1]), Path(folder))
