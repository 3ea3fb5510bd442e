"""Lets the same code run as one process (`python train.py`) or on many ranks under torchrun.

`World` says which of the ranks this process is. Its methods are the only collectives of the
program; without a process group they return at once. Besides `one_line_errors`, only this file
reads the variables that torchrun sets.
"""

import gc
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # before init_process_group: default arguments here capture the group
import torch.distributed.optim  # likewise; a group still referenced at exit aborts the process
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support.config import RunError, UserError, out_of_memory, require


@dataclass(frozen=True)
class World:
    """Says which rank this process is, on which device, and the dtype of weights and gradients."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def hide_bar(self) -> bool | None:
        """Return tqdm's `disable`: only rank 0 shows a bar, and only on a terminal (None)."""
        if self.is_main:
            return None
        return True

    def slice(self, count: int) -> range:
        """Return this rank's contiguous share of range(count)."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def autocast(self):
        """Return the context of a forward pass: bf16 matrix products for fp32 weights on CUDA."""
        if self.device.type == "cuda" and self.dtype == torch.float32:
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def ddp(self, module: torch.nn.Module) -> torch.nn.Module:
        """Wrap a module whose forward is the loss in DDP, if there is a process group.

        Ranks exchange nothing but gradients. Buffers never change, so DDP need not broadcast them.
        """
        if not dist.is_initialized():
            return module
        ids = None
        if self.device.type == "cuda":
            ids = [self.device.index]
        return DistributedDataParallel(
            module, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False
        )

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over ranks."""
        if dist.is_initialized():
            x = x.clone()
            dist.all_reduce(x)
        return x

    def max(self, number: int) -> int:
        """Return the largest of all ranks' numbers."""
        if not dist.is_initialized():
            return number
        largest = torch.tensor([number], device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate the rows of all ranks in rank order.  [n, ..] -> [sum n, ..]

        Ranks may have different numbers of rows.
        """
        if not dist.is_initialized():
            return x
        counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
        longest = max(int(count) for count in counts)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])

    def broadcast(self, x: Tensor, source: int) -> None:
        """Overwrite x with the values of rank `source`."""
        if dist.is_initialized():
            dist.broadcast(x.detach(), source)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            dist.barrier()

    def peak_memory(self) -> float:
        """Return the peak memory so far in GB: of the GPU, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def num_ranks() -> int:
    """Return how many processes torchrun started, before there is a World."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def note(text: str) -> None:
    """Print a note on stderr, on rank 0 only and without breaking a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"note: {text}", file=sys.stderr)


# ---------------------------------------------------------------- joining and leaving


@contextmanager
def start(precision: str = "auto", timeout: float = 30.0) -> Iterator[World]:
    """Join the process group if torchrun started this process, and leave it at the end.

    precision: auto, fp32 or bf16. timeout: minutes that ranks wait for each other. A rank that
    fails ends at once, because leaving the group would wait for ranks that wait for this one;
    torchrun then ends the others.
    """
    world = join(precision, timeout)
    try:
        yield world
    except Exception as error:
        if dist.is_initialized():
            end_rank(world, error)
        raise
    finally:
        if dist.is_initialized():
            gc.collect()  # DDP holds the group in reference cycles
            dist.destroy_process_group()


def join(precision: str, timeout: float) -> World:
    """Join the process group if torchrun started this process; return its World.

    The backend is nccl on CUDA and gloo on a CPU.
    """
    cuda = torch.cuda.is_available()
    dtype = torch.float32
    if precision == "bf16" or (precision == "auto" and cuda):
        dtype = torch.bfloat16
    if cuda:
        set_cuda_options(dtype)
    if "RANK" not in os.environ:
        return World(0, 1, torch.device("cuda" if cuda else "cpu"), dtype)
    required = {"LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"}
    require(
        required <= os.environ.keys(),
        "RANK is set, but not by torchrun: start with torchrun, or unset RANK",
    )
    patience = timedelta(minutes=timeout)
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=patience, **find_ranks(patience))
    else:
        device = torch.device("cpu")
        # torchrun gives each process one thread; share the cores instead
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        dist.init_process_group("gloo", timeout=patience, **find_ranks(patience))
    return World(dist.get_rank(), dist.get_world_size(), device, dtype)


def find_ranks(timeout: timedelta) -> dict:
    """Return the arguments of init_process_group by which ranks find each other.

    `torchrun --max-restarts` keeps one store, which then holds the addresses of the ranks of the
    attempt before. So each attempt has its own prefix. This is not done on several machines,
    because each machine's torchrun counts its attempts by itself.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
    return {"store": store, "rank": rank, "world_size": size}


def set_cuda_options(dtype: torch.dtype) -> None:
    """Set the CUDA options that sampling and scoring need."""
    # The KV cache grows token by token; without expandable segments that fragments GPU memory.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # cuDNN attention builds a new plan for every shape, that is for every decoded token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # The logits are fp32 products of bf16 numbers, which TF32 computes exactly.
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")


def end_rank(world: World, error: Exception) -> None:
    """Print why this rank failed and end the process, without waiting for other ranks."""
    status = 1
    line = out_of_memory(error)
    if isinstance(error, UserError):
        line = str(error)
        status = error.exit_code
    if line:
        if world.is_main:
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            # usually all ranks have the same error: rank 0 reports it, and torchrun ends the others
            time.sleep(2)
            print(f"error on rank {world.rank}: {line}", file=sys.stderr, flush=True)
    else:
        print(f"rank {world.rank} of {world.size} failed:", file=sys.stderr)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopSignal:
    """Remembers that Ctrl-C or SIGTERM asked the run to stop after the current step.

    A second signal ends the process at once. Under torchrun a second signal is ignored, because
    torchrun passes a signal on to its ranks, which may receive it twice. torchrun itself kills
    ranks that take too long.
    """

    def __init__(self):
        self.number = 0
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            # a shell script's background job ignores SIGINT, and goes on doing so
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.receive)

    def restore(self) -> None:
        """Restore the signal handlers from before the first step, which end the process at once."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        self.number = number
        second = signal.SIG_DFL
        if dist.is_initialized():
            second = signal.SIG_IGN
        signal.signal(signal.SIGINT, second)
        signal.signal(signal.SIGTERM, second)
        note("stopping after this step, which is then saved; a second signal stops at once")


def pinned_copy(x: Tensor) -> Tensor:
    """Copy a tensor to page-locked host memory, from which copies to the GPU need not wait.

    The memory is registered and not allocated with pin_memory, which rounds up to a power of two.
    """
    host = x.detach().to("cpu", copy=True)
    if torch.cuda.is_available():
        failed = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0))
        if failed:
            raise RunError(
                f"offload=true: CUDA cannot register {host.nbytes} bytes of host memory "
                f"(error {failed}): free some, or leave offload out"
            )
    return host
