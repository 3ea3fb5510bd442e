"""Ranks: the same code for `python train.py` and for any number of processes under torchrun."""

import gc
import importlib
import os
import resource
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's contiguous part of `range(count)`; the parts of all ranks in order are the whole."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def autocast(self):
        """bf16 matrix products on CUDA over fp32 weights; plain fp32 on CPU."""
        return torch.autocast("cuda", dtype=torch.bfloat16) if self.device.type == "cuda" else nullcontext()


def setup() -> World:
    """Joins the process group if torchrun started us: nccl on CUDA, gloo on CPU."""
    if "RANK" not in os.environ:
        return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    # Some defaults in these modules keep the group that exists when they are imported; so before there is one.
    importlib.import_module("torch.distributed.nn")
    importlib.import_module("torch.distributed.optim")
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # Rank 0 alone saves, and evaluations end unevenly: more than the 10 minutes of the default.
        dist.init_process_group("nccl", device_id=device, timeout=timedelta(hours=12))
    else:
        device = torch.device("cpu")
        # torchrun gives each of several processes one thread; share the cores out instead.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        dist.init_process_group("gloo")
    return World(dist.get_rank(), dist.get_world_size(), device)


def shutdown() -> None:
    """Leaves the process group. DDP and ZeroRedundancyOptimizer hold it in reference cycles, so they are collected
    first: a group that is still held keeps its threads, and a thread of gloo that meets the end of Python aborts it."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def from_main(fact: bool) -> bool:
    """What rank 0 says; the others say False."""
    device = "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
    return bool(total(torch.tensor(int(fact), device=device)))


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
