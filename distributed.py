"""Processes: who am I, what do all of us know, and when do gradients meet. torchrun's environment, nothing else.

One process is world size 1, not a special case: every function here works there as it does on many nodes.
Functions marked `# all ranks` are collectives: every rank must call them, in the same order.

Gradients are summed explicitly, once per optimizer step, rather than by `DistributedDataParallel`: its hooks assume that every rank
runs backward equally often, while here a rank trains whatever samples it holds, perhaps none (any number of ranks works,
dividing or not), and the gradient is that of the mean over all samples, not the mean of the ranks' means.
"""

import ctypes
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def setup() -> torch.device:
    """Join the process group that torchrun announced, or make one of a single process; this rank's device.

    Raises ValueError where there are GPUs, but fewer than processes.
    """
    if "RANK" in os.environ:
        if sys.platform == "linux":      # when torchrun is killed, its workers must not go on training, and writing, alone
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)                                           # 1: PR_SET_PDEATHSIG
        where = {}
    else:
        where = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if torch.cuda.is_available():
        processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > devices:
            raise ValueError(f"{processes} processes but {devices} GPUs here: lower --nproc_per_node, or set "
                             "CUDA_VISIBLE_DEVICES= (to nothing) to train on the CPU")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(hours=1), **where)
        return device
    dist.init_process_group("gloo", timeout=timedelta(hours=1), **where)
    return torch.device("cpu")


def shutdown() -> None:
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size()


def is_main() -> bool:
    return rank() == 0


def share(total: int, rank: int, world_size: int) -> range:
    """The contiguous part of `total` items that `rank` holds; parts differ by one item at most."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)


def broadcast_object(value):  # all ranks
    """Rank 0's `value` (picklable, from this program's own processes), on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value) -> list:  # all ranks
    """Every rank's `value` (picklable, from this program's own processes), in the order of the ranks."""
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:  # all ranks
    gather_objects(None)


def gather_rows(values: Tensor, rows: list[int], total: int) -> Tensor:  # all ranks
    """The whole (total, ...) CPU tensor, of which this rank has `rows`; together the ranks hold each row once."""
    whole = torch.zeros(total, *values.shape[1:], dtype=values.dtype)
    whole[rows] = values
    dist.all_reduce(whole)                                                                       # every other rank adds 0
    return whole


def sum_over_ranks(values: Tensor) -> Tensor:  # all ranks
    values = values.clone()
    dist.all_reduce(values)
    return values


def max_over_ranks(values: Tensor) -> Tensor:  # all ranks
    values = values.clone()
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


@torch.no_grad()
def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:  # all ranks
    """Each parameter's gradient becomes the sum over ranks. One call, one all-reduce, per optimizer step.

    A rank that trained nothing takes part with zeros.
    """
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)


@torch.no_grad()
def broadcast_parameters(parameters: list[torch.nn.Parameter]) -> None:  # all ranks
    """Every rank starts from rank 0's values."""
    for p in parameters:
        dist.broadcast(p, src=0)
