"""Ranks: the same code for `python train.py` and for any number of processes under torchrun."""

import gc
import importlib
import importlib.metadata
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from support.config import UserError, report, require


@dataclass
class World:
    rank: int
    size: int
    device: torch.device
    precision: str = "fp32"  # or bf16: of weights and gradients

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def no_bar(self) -> bool | None:
        """tqdm's `disable`: rank 0 shows a bar, and only on a terminal; what goes to a file has plain lines."""
        return None if self.is_main else True

    def share(self, count: int) -> range:
        """This rank's contiguous part of `range(count)`; the parts of all ranks in order are the whole."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def autocast(self):
        """bf16 matrix products on CUDA over fp32 weights; elsewhere, and over bf16 weights, nothing."""
        needed = self.device.type == "cuda" and self.precision == "fp32"
        return torch.autocast("cuda", dtype=torch.bfloat16) if needed else nullcontext()


@contextmanager
def joined(precision: str = "auto", timeout: float = 30) -> Iterator[World]:
    """The process group, from `setup` to `shutdown`. A rank that fails says where, and ends at once: leaving the group
    would wait for ranks that wait for this one. torchrun ends those of this node; on others a timeout may have to, in
    minutes as in distributed_timeout."""
    world = setup(precision, timeout)
    try:
        yield world
    except Exception as error:
        if not dist.is_initialized():
            raise
        if isinstance(error, UserError):  # usually on all ranks alike: rank 0 speaks, for torchrun ends all with one
            if not world.is_main:
                time.sleep(2)
            report(f"error: {error}" + f" (rank {world.rank})" * (not world.is_main))
            os._exit(error.status)
        traceback.print_exc()
        ours = [frame for frame in traceback.extract_tb(error.__traceback__)
                if Path(frame.filename).parent == Path(sys.argv[0]).resolve().parent]
        place = f"in {ours[-1].name} ({Path(ours[-1].filename).name}, line {ours[-1].lineno})" if ours else ""
        report(f"rank {world.rank} of {world.size} failed {place}: {type(error).__name__}: {error}")
        os._exit(1)
    except SystemExit:  # a signal, which all ranks know of
        shutdown()
        raise
    shutdown()


def setup(precision: str = "auto", timeout: float = 30) -> World:
    """Joins the process group if torchrun started us: nccl on CUDA, gloo on CPU. precision: auto, fp32 or bf16."""
    patience = timedelta(minutes=timeout)
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    if torch.cuda.is_available():
        # A cache that grows token by token leaves holes of every size in memory that is not made of pages.
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape: for every token decoded
        # TF32 is exact for products of bf16 numbers, such as our logits. But older models rotate positions by an fp32
        # product, and that it ruins.
        known = tuple(map(int, importlib.metadata.version("transformers").split(".")[:2]))
        if precision == "bf16" and known >= (5, 23):
            torch.set_float32_matmul_precision("high")
    if "RANK" not in os.environ:  # not by torchrun
        return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"), precision)
    require({"LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"} <= os.environ.keys(),
            "RANK is set, but not by torchrun: start with torchrun, or unset it")
    # Some defaults in these modules keep the group that exists when they are imported; so before there is one.
    importlib.import_module("torch.distributed.nn")
    importlib.import_module("torch.distributed.optim")
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=patience, **meeting(patience))
    else:
        device = torch.device("cpu")
        # torchrun gives each of several processes one thread; share the cores out instead.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        dist.init_process_group("gloo", timeout=patience, **meeting(patience))
    return World(dist.get_rank(), dist.get_world_size(), device, precision)


def meeting(patience: timedelta) -> dict:
    """Where ranks find each other: a place of its own for each start, for torchrun --max-restarts keeps one store, and
    addresses of ranks that were killed stand in it. (Several torchruns count their restarts apart.)"""
    store, number, ranks = next(dist.rendezvous("env://", timeout=patience))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return {"store": store, "rank": number, "world_size": ranks}


def shutdown() -> None:
    """Leaves the process group. DDP holds it in reference cycles, so it is collected first: a group that is still held
    keeps its threads, and a thread of gloo that meets the end of Python aborts it."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(x: Tensor, source: int) -> None:
    """Rank `source`'s values, in place on the others."""
    if dist.is_initialized():
        dist.broadcast(x.detach(), source)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def highest(number: int) -> int:
    """The largest of all ranks' numbers."""
    if not dist.is_initialized():
        return number
    numbers = torch.tensor([number], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    return int(gather(numbers).max())


def from_main(fact: bool) -> bool:
    """What rank 0 says; the others say False."""
    return bool(highest(int(fact)))


def to_host(x: Tensor) -> Tensor:
    """A copy in host memory from which a copy to the device need not wait. Registered, for `pin_memory` may take twice
    the size: it rounds up to a power of two."""
    host = x.detach().to("cpu", copy=True)
    if torch.cuda.is_available():
        fault = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0))
        require(not fault, f"offload=true: CUDA cannot register {host.nbytes} bytes of host memory (error {fault}): "
                           "free some, or leave offload out")
    return host


def visit(x: Tensor, device: torch.device) -> Tensor:
    """What waits in host memory, on the device."""
    return x.to(device, non_blocking=True)


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks, in rank order; ranks may hold different numbers of rows.  [n, ..] -> [sum of n, ..]"""
    if not dist.is_initialized():
        return x
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    longest = max(int(count) for count in counts)
    padded = x.new_zeros(longest, *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])


def gather_objects(x) -> list:
    """Something of every rank, in rank order."""
    if not dist.is_initialized():
        return [x]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def total(x: Tensor) -> Tensor:
    """The sum over ranks."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def peak_memory(world: World) -> float:
    """Peak memory so far in GB: of the device, or of the process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
