"""Process group, collectives and the gradient sum. Reads only the environment that torchrun sets.

One process is world size 1, not a special case: every function here works there as it does on many nodes.
Functions marked `# all ranks` are collectives. Every rank must call them, in the same order. They raise
LostRank if another rank is gone or has not come within the timeout.

Gradients are summed explicitly, once per optimizer step, because the hooks of `DistributedDataParallel`
assume that every rank runs backward equally often. Here a rank trains whatever samples it holds, perhaps
none. The gradient is that of the mean over all samples, not the mean of the ranks' means.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

LAUNCHER_SECONDS = 60.0      # for the launcher's store to answer, which was there before its workers
DRIVER = "/proc/driver/nvidia/version"       # exists if a driver of NVIDIA's is installed
launcher_store: dist.Store   # the launcher's key-value store, which outlives its workers
around_collective = contextlib.nullcontext   # every collective runs within one of these: a place to measure


class LostRank(RuntimeError):
    """Another rank is gone, or did not come to a collective within the timeout."""


def own_device() -> torch.device:
    """This rank's device: the GPU of its local rank, or the CPU. Makes that GPU the thread's current one.

    Call it before any code of others runs, because "cuda" without a number means the current GPU, at first 0.
    Raises ValueError if there are fewer GPUs than processes, or a GPU that this PyTorch cannot use.
    """
    if not torch.cuda.is_available():
        if os.path.exists(DRIVER) and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise ValueError(
                f"this machine has an NVIDIA driver, but torch {torch.__version__} can use no GPU with it (a "
                "CPU build, or a driver older than the build's CUDA): install the build of PyTorch for your "
                "driver, or set CUDA_VISIBLE_DEVICES= (to nothing) to train on the CPU")
        return torch.device("cpu")
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > devices:
        raise ValueError(f"{processes} processes but {devices} GPUs here: lower --nproc_per_node, or set "
                         "CUDA_VISIBLE_DEVICES= (to nothing) to train on the CPU")
    # The remainder, because a launcher may show each process one GPU alone, which then is number 0.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % devices)
    torch.cuda.set_device(device)
    # No attention by cuDNN, which is Hopper's default from cuDNN 9.15 on. It plans the forward pass with and
    # without gradients differently, so a replayed step could differ from the sampled one in its last bits.
    # NaNs from its backward are reported.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def setup(timeout: float = 3600.0) -> torch.device:
    """Join the process group that torchrun announced, or make one of one process. Returns this rank's device.

    timeout: seconds that a rank waits for the others in a collective.
    Raises ValueError as `own_device` does and if no network interface is up, and LostRank if the launcher
    does not answer.
    """
    global launcher_store
    device = own_device()
    if "RANK" in os.environ:
        # Without an agent, rank 0 makes the store, perhaps later than this rank asks for it.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        patience = timedelta(seconds=LAUNCHER_SECONDS if agent else timeout)
        try:
            launcher_store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        except dist.DistNetworkError as error:
            raise LostRank("no launcher at {MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)) from error
        launcher_store.set_timeout(timedelta(seconds=timeout))
    else:
        launcher_store, rank, size = dist.HashStore(), 0, 1
    # torchrun's store survives --max-restarts, so each attempt gets its own key prefix. Not on several nodes,
    # because their launchers can count different attempts, and their ranks would then never find each other.
    store = launcher_store
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store,
                                rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        if "Unable to find" not in str(error):
            raise
        name = os.environ.get("GLOO_SOCKET_IFNAME")
        raise ValueError("gloo finds no network interface for processes to talk through: bring one up, such "
                         "as the loopback by `ip link set lo up`; GLOO_SOCKET_IFNAME, which names one, is "
                         f"{name!r}") from error
    return device


def shutdown() -> None:
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size()


def cores() -> int:
    """CPU cores for each rank of this machine, out of those granted to this process; 0 if ranks share a core.

    If the launcher pins each rank to its own cores, this undercounts.
    """
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return granted // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def collective(function: Callable) -> Callable:
    """Turn the errors of many kinds in which the backends tell of a lost rank into LostRank."""
    @functools.wraps(function)
    def told(*arguments):
        try:
            with around_collective():
                return function(*arguments)
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            if not lost or "out of memory" in str(error):        # NCCL's own error, with a setting to lower
                raise
            raise LostRank(" ".join(str(error).rpartition("] ")[2].split())[:1000]) from error
    return told


@collective
def broadcast_object(value):  # all ranks
    """Rank 0's `value` (picklable, from this program's own processes), on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@collective
def gather_objects(value) -> list:  # all ranks
    """Every rank's `value` (picklable, from this program's own processes), in the order of the ranks."""
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:  # all ranks
    gather_objects(None)


@collective
def gather_rows(values: Tensor, rows: list[int], total: int) -> Tensor:  # all ranks
    """The whole (total, ...) CPU tensor, of which this rank has `rows`. The ranks hold each row once."""
    whole = torch.zeros(total, *values.shape[1:], dtype=values.dtype)
    whole[rows] = values
    dist.all_reduce(whole)                                       # every other rank adds 0
    return whole


@collective
def gather_vectors(values: Tensor) -> Tensor:  # all ranks
    """Every rank's CPU vector (n,), as (ranks, n). All ranks compute the same of them, so all act alike."""
    vectors = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(vectors, values)
    return torch.stack(vectors)


def gather_scores(scores: dict[str, np.ndarray], rows: list[int],
                  total: int) -> dict[str, Tensor]:  # all ranks
    """Every sample's scores and metrics, name -> (total, ...) float32, of which this rank has `rows`.

    A metric that a rank says nothing about is NaN there.
    """
    own = [(name, values.shape[1:]) for name, values in scores.items()]
    whole = {}
    for name, shape in dict(item for rank in gather_objects(own) for item in rank).items():
        values = scores.get(name, np.full((len(rows), *shape), np.nan, np.float32))
        whole[name] = gather_rows(torch.from_numpy(values), rows, total)
    return whole


@collective
@torch.no_grad()
def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:  # all ranks
    """Sum each parameter's gradient over ranks, in one all-reduce. A rank that trained nothing adds zeros."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)


@collective
@torch.no_grad()
def broadcast_parameters(parameters: list[torch.nn.Parameter]) -> None:  # all ranks
    """Give every rank rank 0's values."""
    for p in parameters:
        dist.broadcast(p, src=0)
