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
import itertools
import os
import pickle
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

LAUNCHER_SECONDS = 60.0      # for the launcher's store to answer, which was there before its workers
MEETING_SECONDS = 50.0       # until a rank that has not started or connected is told of
DRIVER = "/proc/driver/nvidia/version"       # exists if a driver of NVIDIA's is installed
launcher_store: dist.Store   # the launcher's key-value store, which outlives its workers
patience = timedelta(seconds=MEETING_SECONDS)  # of a gather: gloo does not give it the group's timeout
around_collective = contextlib.nullcontext   # every collective runs within one of these: a place to measure


class LostRank(RuntimeError):
    """Another rank is gone, or did not come to a collective within the timeout."""


def own_device() -> torch.device:
    """This rank's device: the GPU of its local rank, or the CPU. Makes that GPU the thread's current one.

    Call it before any code of others runs, because "cuda" without a number means the current GPU. Raises
    ValueError if there are fewer GPUs than processes, or a GPU that this PyTorch cannot use.
    """
    if not torch.cuda.is_available():
        if os.path.exists(DRIVER) and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise ValueError(f"torch {torch.__version__} can use no GPU with this machine's NVIDIA driver: "
                             "install the build of PyTorch for your driver, or set CUDA_VISIBLE_DEVICES= (to "
                             "nothing) to train on the CPU")
        return torch.device("cpu")
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > devices:
        raise ValueError(f"{processes} processes but {devices} GPUs here: lower --nproc_per_node, or set "
                         "CUDA_VISIBLE_DEVICES= (to nothing) to train on the CPU")
    # The remainder, because a launcher may show each process one GPU alone, which then is number 0.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % devices)
    torch.cuda.set_device(device)
    # No attention by cuDNN, because it plans the forward pass with and without gradients differently. So a
    # replayed step could differ from the sampled one in its last bits. NaNs from its backward are reported.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def setup(timeout: float = 3600.0) -> torch.device:
    """Join the process group that torchrun announced, or make one of one process. Returns this rank's device.

    timeout: seconds that a rank waits for the others, to start and in a collective. What keeps them from
    starting or connecting is told after MEETING_SECONDS.
    Raises ValueError as `own_device` and `connect` do, and if torchrun's variables are not whole. Raises
    LostRank if the launcher does not answer or a rank does not start.
    """
    global launcher_store, patience
    device = own_device()
    launcher_store, rank, size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        if missing := {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
            raise ValueError(f"RANK is set, and {', '.join(sorted(missing))} not: start with torchrun, or "
                             "unset RANK")
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        launcher_store = find_store(rank, timeout)
        launcher_store.set_timeout(timedelta(seconds=timeout))       # NCCL's ranks meet there after loading
    store = dist.PrefixStore(meet(launcher_store, rank, size, timeout), launcher_store)
    patience = timedelta(seconds=MEETING_SECONDS)
    connect(device, store, rank, size)
    patience = timedelta(seconds=timeout)
    dist.distributed_c10d._set_pg_timeout(patience)
    return device


def connect(device: torch.device, store: dist.Store, rank: int, size: int) -> None:  # all ranks
    """Make the process group and its connections. Raises ValueError if the ranks cannot connect."""
    interface = repr(os.environ.get("GLOO_SOCKET_IFNAME"))
    problem = (
        f"all {size} processes have started, but rank {rank} cannot connect to the others: set "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface through which nodes reach each other "
        f"(`ip -brief address` lists a node's; GLOO_SOCKET_IFNAME is {interface}), and let no firewall close "
        "ports between nodes; or one of the processes has ended since")
    # Gloo connects a pair of ranks when they first talk, because all pairs at once take ranks sockets of each
    # rank and the cube of their number in bytes of the store. `wait_for_all` connects those that ever talk.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # A timer tells of the problem, because gloo tries an address that does not answer for several timeouts.
    late = threading.Timer(MEETING_SECONDS, print, [f"warning: {problem}"], dict(file=sys.stderr, flush=True))
    late.daemon = True
    late.start()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store,
                                rank=rank, world_size=size, timeout=patience)
        wait_for_all()
    except RuntimeError as error:
        if "Unable to find" in str(error):
            raise ValueError(
                "gloo finds no network interface for processes to talk through: bring one up, such as the "
                f"loopback by `ip link set lo up`; GLOO_SOCKET_IFNAME, which names one, is {interface}"
            ) from error
        if not isinstance(error, (LostRank, dist.DistError)) and "gloo" not in str(error):
            raise
        raise ValueError(problem) from error
    finally:
        late.cancel()


def find_store(rank: int, timeout: float) -> dist.Store:
    """The key-value store of the launcher, or rank 0's if the launcher has none.

    Raises LostRank if it does not answer, and ValueError if rank 0 cannot make it.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    what, told = "launcher" if agent else "rank 0 yet", ""
    # Without an agent, rank 0 makes the store, perhaps later than this rank asks for it.
    for seconds in (LAUNCHER_SECONDS,) if agent else (MEETING_SECONDS, timeout):
        if told:
            print(f"warning: rank {rank}: {told}", file=sys.stderr, flush=True)
        try:
            return dist.TCPStore(address, port, is_master=not agent and rank == 0, wait_for_workers=False,
                                 timeout=timedelta(seconds=seconds), multi_tenant=True)
        except dist.DistNetworkError as error:
            if not agent and rank == 0:
                taken = f"rank 0 cannot listen at {address}:{port}: choose another MASTER_PORT"
                raise ValueError(taken) from error
            told = f"no {what} at {address}:{port}: MASTER_ADDR has to be an address that all nodes reach"
            failure = error
    raise LostRank(told) from failure


def shutdown() -> None:
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size()


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
def meet(store: dist.Store, rank: int, size: int, timeout: float) -> str:  # all ranks
    """Wait until all ranks have started. Returns the name that rank 0 gave to this start.

    The store may hold what an earlier start wrote, because torchrun's outlives its workers. An earlier start
    has another name, and no rank joins one that is complete.
    Tells of ranks that have not started after MEETING_SECONDS. Raises LostRank if they have not after
    `timeout`, which counts as MEETING_SECONDS at least, because imports take ranks unequal times.
    """
    began, told, pause, name = time.monotonic(), False, 0.01, uuid.uuid4().hex if rank == 0 else ""
    others = [f"{name}/{r}" for r in range(1, size)] if rank == 0 else []

    def late() -> str:
        if rank and name:                        # rank 0 is here, and names the others
            return f"not all {size} ranks have started"
        absent = [key.rpartition("/")[2] for key in others if not store.check([key])][:9] or ["0"]
        return (f"of {size} ranks, {', '.join(absent)} {'has' if len(absent) == 1 else 'have'} not started "
                f"{time.monotonic() - began:.0f} s after rank {rank} did: see what the other nodes say, and "
                "whether they run the same command")

    if rank == 0:
        store.set("start", name)
    while True:
        if rank == 0 and (not others or store.check(others)):
            store.set(f"{name}/complete", "")
        elif rank and store.check(["start"]):
            latest = store.get("start").decode()
            if latest != name and not store.check([f"{latest}/complete"]):
                name = latest
                store.set(f"{name}/{rank}", "")
        if name and store.check([f"{name}/complete"]):
            return name
        waited = time.monotonic() - began
        if waited > max(timeout, MEETING_SECONDS):
            raise LostRank(late())
        if waited > MEETING_SECONDS and not told and not (rank and name):
            told = True
            print(f"warning: {late()}; waiting up to {timeout:g} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


@collective
def broadcast_object(value):  # all ranks
    """Rank 0's `value` (picklable, from this program's own processes), on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@collective
def all_gather(own: Tensor, sizes: list[int]) -> Tensor:  # all ranks
    """Every rank's flat CPU tensor one after the other, of which rank r's has sizes[r] > 0 numbers.

    Bruck's algorithm (doi 10.1109/71.642949). Each round doubles what a rank holds, so all of it is there
    after ceil(log2(ranks)) rounds. Gloo's own all-gather and all-reduce are rings of at least ranks - 1.
    """
    rank, ranks, held, whole = dist.get_rank(), world_size(), 1, own
    # A rank's whole begins with its own numbers, and those of the next ranks follow. ends[k]: of k ranks.
    ends = [0, *itertools.accumulate(sizes[(rank + k) % ranks] for k in range(ranks))]
    while held < ranks:
        more = min(held, ranks - held)
        received = own.new_empty(ends[held + more] - ends[held])
        sending = dist.isend(whole[:ends[more]], (rank - held) % ranks)
        dist.irecv(received, (rank + held) % ranks).wait(patience)
        sending.wait(patience)
        whole, held = torch.cat([whole, received]), held + more
    return whole.roll(sum(sizes[:rank]))                         # so that rank 0's are the first


def gather_vectors(values: Tensor) -> Tensor:  # all ranks
    """Every rank's CPU vector (n,), as (ranks, n). All ranks compute the same of them, so all act alike."""
    return all_gather(values, [len(values)] * world_size()).view(-1, len(values))


def gather_objects(value) -> list:  # all ranks
    """Every rank's `value` (picklable, from this program's own processes), in the order of the ranks."""
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = gather_vectors(torch.tensor([len(own)])).flatten().tolist()
    return [pickle.loads(part.numpy()) for part in all_gather(own, sizes).split(sizes)]


def wait_for_all() -> None:  # all ranks
    gather_vectors(torch.zeros(1))


def gather_scores(scores: dict[str, np.ndarray], rows: list[int],
                  total: int) -> dict[str, Tensor]:  # all ranks
    """Every sample's scores, name -> (total, ...) float32; this rank has `rows`. What no rank says is NaN."""
    whole = {}
    for part, at in gather_objects((scores, rows)):
        for name, values in part.items():
            if name not in whole:
                whole[name] = torch.full((total, *values.shape[1:]), torch.nan, dtype=torch.float32)
            whole[name][at] = torch.from_numpy(values)
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
