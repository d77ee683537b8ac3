"""Processes: who am I, what do all of us know, when do gradients meet, and when do we stop. torchrun's environment, nothing else.

One process is world size 1, not a special case: every function here works there as it does on many nodes.
Functions marked `# all ranks` are collectives: every rank must call them, in the same order; they raise LostRank where another
rank is gone, or has not come within the timeout.

Gradients are summed explicitly, once per optimizer step, rather than by `DistributedDataParallel`: its hooks assume that every rank
runs backward equally often, while here a rank trains whatever samples it holds, perhaps none (any number of ranks works,
dividing or not), and the gradient is that of the mean over all samples, not the mean of the ranks' means.
"""

import contextlib
import ctypes
import functools
import os
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


LAUNCHER = os.getppid()      # as early as can be: a launcher that dies later is one whom its workers must not outlive
LAUNCHER_SECONDS = 60.0      # for the launcher's store to answer: it was there before its workers
GRACE = 20.0                 # seconds from a signal to a safe point; torchrun kills after 30
DRIVER = "/proc/driver/nvidia/version"       # is there where a driver of NVIDIA's is
REPEATED = 1.0               # seconds in which a signal counts once: a scheduler and the launcher may both send it
URGENT = (signal.SIGTERM, signal.SIGINT)
# The terminal is gone, and what schedulers send before a job's time is up.
NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
END = b"\0"                  # ends the watcher: no signal has this number


class LostRank(RuntimeError):
    """Another rank is gone, or did not come to a collective within the timeout."""


_store: dist.Store           # the launcher's, which outlives its workers


def own_device() -> torch.device:
    """This rank's device: the GPU of its local rank, made the current one of this thread, or the CPU where there is no GPU.

    Call it before any code of others runs, because what says only "cuda" means the current GPU, which is number 0 until then.
    Raises ValueError where there are GPUs, but fewer than processes, or one that this PyTorch cannot use.
    """
    if not torch.cuda.is_available():
        if os.path.exists(DRIVER) and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise ValueError(f"this machine has an NVIDIA driver, but torch {torch.__version__} can use no GPU with it (a CPU build, "
                             "or a driver older than the build's CUDA): install the build of PyTorch for your driver, or set "
                             "CUDA_VISIBLE_DEVICES= (to nothing) to train on the CPU")
        return torch.device("cpu")
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > devices:
        raise ValueError(f"{processes} processes but {devices} GPUs here: lower --nproc_per_node, or set "
                         "CUDA_VISIBLE_DEVICES= (to nothing) to train on the CPU")
    # A launcher may give each process one visible GPU, which is then number 0 whatever the local rank.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % devices)
    torch.cuda.set_device(device)
    # From cuDNN 9.15 on, Hopper's default attention is cuDNN's. It plans the forward with and without gradients differently, so
    # that a replayed step could differ from the sampled one in its last bits; and there are reports of NaN from its backward.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def setup(timeout: float = 3600.0) -> torch.device:
    """Join the process group that torchrun announced, or make one of a single process; this rank's device.

    timeout: seconds that a rank waits for the others in a collective.
    Raises ValueError as `own_device` does, and LostRank where the launcher does not answer.
    """
    global _store
    device = own_device()
    end_with_launcher()
    if "RANK" in os.environ:
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"            # else rank 0 makes the store, perhaps later
        patience = timedelta(seconds=LAUNCHER_SECONDS if agent else timeout)
        try:
            _store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        except dist.DistNetworkError as error:
            raise LostRank(f"no launcher at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}") from error
        _store.set_timeout(timedelta(seconds=timeout))
    else:
        _store, rank, size = dist.HashStore(), 0, 1
    # torchrun keeps its store when it restarts its workers: without a prefix they would find what those before them left. On
    # several nodes each launcher counts its own restarts, and a prefix would part them.
    store = dist.PrefixStore(f"attempt_{attempt()}", _store) if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else _store
    where = dict(store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **where)
    return device


def shutdown() -> None:
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------ the launcher

def end_with_launcher() -> None:
    """When torchrun is killed, its workers must not go on training, and writing, alone; nor what a worker forks without it."""
    global _worker
    _worker = os.getpid()
    if "RANK" not in os.environ:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                                               # 1: PR_SET_PDEATHSIG
    if os.getppid() != LAUNCHER:                                                                 # it died before that
        os._exit(1)


def attempt() -> int:
    """How often torchrun has started these processes anew (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def remembered(key: str, value: str) -> str:
    """`value`, or what was said first under `key` since the launcher started, also by processes that it had to replace."""
    return _store.compare_set(key, "", value).decode()


def command_line() -> str:
    """The command that started this run, torchrun's own words included, as a shell takes it; "" where it cannot be known."""
    if "RANK" not in os.environ:
        return shlex.join(sys.orig_argv)
    path = Path(f"/proc/{LAUNCHER}/cmdline")
    return shlex.join(os.fsdecode(path.read_bytes()).rstrip("\0").split("\0")) if path.exists() else ""


# ------------------------------------------------------------------------------------------------------------ stopping

_asked, _safe = threading.Event(), threading.Event()
_handlers: dict[int, object] = {}          # within `stopping_on_signals`: signal -> the handler that it had before
_pipe: tuple[int, ...] = ()                # within: both ends of the pipe that tells the watcher of a signal
_before_fork = threading.local()           # the signal mask that a forking thread had
_worker: int | None = None                 # the process whose children end with it


def stop_asked() -> bool:
    """Whether a rank was told to stop. Costs nothing; not all ranks learn it at the same moment: see `any_rank`."""
    return _asked.is_set()


def at_safe_point() -> None:
    """All ranks have agreed to stop: what is to be saved may take its time."""
    _safe.set()


@contextlib.contextmanager
def taking_its_time() -> Iterator[None]:
    """Within, a checkpoint is being written, which no signal cuts short."""
    _safe.set()
    try:
        yield
    finally:
        _safe.clear()


@contextlib.contextmanager
def stopping_on_signals(to_go_on: str = "") -> Iterator[None]:  # all ranks
    """Within, SIGTERM, Ctrl-C or a notice on any rank makes `stop_asked` true on every rank within a second, even if it waits.

    A second SIGTERM or Ctrl-C ends its process at once. So does, on every rank, GRACE seconds without a safe point: a rank may
    wait for one that is dead, and whoever sent the signal will not wait forever. `to_go_on`: what to type then.
    A notice that was ignored before, as nohup ignores SIGHUP, stays ignored.
    """
    _asked.clear()
    _safe.clear()
    key = broadcast_object(f"stop {time.time()}")                # of this start alone: the store may outlive it
    global _pipe
    _pipe = reading, writing = os.pipe()
    os.set_blocking(writing, False)
    taken = [number for number in (*URGENT, *NOTICES) if number in URGENT or signal.getsignal(number) == signal.SIG_DFL]
    _handlers.update((number, signal.signal(number, lambda *_: None)) for number in taken)
    # Python runs its handlers between two of its own instructions, so not while a collective waits; this is told at once.
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading, key, to_go_on), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in _handlers.items():
            signal.signal(number, handler)
        _handlers.clear()
        os.write(writing, END)
        watcher.join()
        _pipe = ()
        os.close(writing)
        os.close(reading)


def _watch(reading: int, key: str, to_go_on: str) -> None:
    """Turn signals of this process, and what other ranks say of theirs, into `_asked`, until the pipe is closed."""
    store, first, asked = _store, None, None
    while True:
        told = os.read(reading, 1) if select.select([reading], [], [], 0.5)[0] else None
        now = time.monotonic()
        if told == END:
            return
        if told and told[0] in URGENT:
            if first is not None and now - first > REPEATED:
                os._exit(128 + told[0])
            first = first or now
        if told and told[0] in (*URGENT, *NOTICES):
            _asked.set()
        try:
            if store and _asked.is_set():
                store.set(key, "")
            elif store and store.check([key]):
                _asked.set()
        except RuntimeError:                                         # the store is gone, and soon the collectives will tell
            store = None
        if _asked.is_set():
            asked = now if _safe.is_set() else asked or now
            if now - asked > GRACE and not _safe.is_set():
                print(f"rank {rank()}: no safe point within {GRACE:g} s of the signal; the last checkpoint stands"
                      f"{to_go_on and f'; to go on: {to_go_on}'}", file=sys.stderr, flush=True)
                os._exit(1)


# ----------------------------------------------------------------------------------------------- processes of user code

def _block_signals() -> None:
    """Before a fork: a signal that meets the child before `_be_a_child` must wait, or it would count as one of this process."""
    if _handlers:
        _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _handlers)


def _unblock_signals() -> None:
    if (mask := vars(_before_fork).pop("mask", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _be_a_child() -> None:
    """In a forked child: signals end it as they end any process, because a reward's pool ends its workers with SIGTERM.

    It ends with its parent too. A child that lived on would hold the connections to the other ranks open, and they would wait for
    a rank that is gone.
    """
    global _pipe
    if _handlers:
        signal.set_wakeup_fd(-1)
        for number, handler in _handlers.items():
            signal.signal(number, handler)
        _handlers.clear()
    for end in _pipe:
        os.close(end)
    _pipe = ()
    _unblock_signals()
    parent = os.getppid()
    if parent == _worker and sys.platform == "linux":            # a grandchild may outlive the child
        # The kernel sends this signal when the thread that forked ends, so look whether the process has ended. A program that
        # this child becomes ignores SIGURG.
        signal.signal(signal.SIGURG, lambda *_: os.getppid() == parent or os._exit(1))
        ctypes.CDLL(None).prctl(1, signal.SIGURG)


os.register_at_fork(before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_be_a_child)


# ------------------------------------------------------------------------------------------------------------ the ranks

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size()


def cores() -> int:
    """CPU cores for each rank of this machine, out of those granted to this process; 0 where ranks share a core.

    Ranks that their launcher pinned to cores of their own seem to share them.
    """
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return granted // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def share(total: int, rank: int, world_size: int) -> range:
    """The contiguous part of `total` items that `rank` holds; parts differ by one item at most."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)


def collective(function: Callable) -> Callable:
    """The backends tell of a lost rank in errors of many kinds; this makes them LostRank."""
    @functools.wraps(function)
    def told(*arguments):
        try:
            return function(*arguments)
        except RuntimeError as error:
            if "out of memory" in str(error):        # NCCL's own: no rank is lost, and there is a setting to lower
                raise
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise LostRank(" ".join(str(error).rpartition("] ")[2].split())[:1000]) from error
            raise
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
    """The whole (total, ...) CPU tensor, of which this rank has `rows`; together the ranks hold each row once."""
    whole = torch.zeros(total, *values.shape[1:], dtype=values.dtype)
    whole[rows] = values
    dist.all_reduce(whole)                                                                       # every other rank adds 0
    return whole


@collective
def gather_vectors(values: Tensor) -> Tensor:  # all ranks
    """Every rank's CPU vector (n,), as (ranks, n)."""
    vectors = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(vectors, values)
    return torch.stack(vectors)


def gather_scores(scores: dict[str, np.ndarray], rows: list[int], total: int) -> dict[str, Tensor]:  # all ranks
    """Every sample's scores and metrics on every rank, name -> (total,) float32, of which this rank has `rows`.

    A metric that a rank says nothing about is NaN there.
    """
    names = dict.fromkeys(name for rank in gather_objects(list(scores)) for name in rank)
    absent = np.full(len(rows), np.nan, np.float32)
    return {name: gather_rows(torch.from_numpy(scores.get(name, absent)), rows, total) for name in names}


@collective
def sum_over_ranks(values: Tensor) -> Tensor:  # all ranks
    values = values.clone()
    dist.all_reduce(values)
    return values


@collective
def max_over_ranks(values: Tensor) -> Tensor:  # all ranks
    values = values.clone()
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def any_rank(flag: bool) -> bool:  # all ranks
    """Whether it is true on one of them: what all do next, they decide by this."""
    return bool(max_over_ranks(torch.tensor(float(flag))))


@collective
@torch.no_grad()
def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:  # all ranks
    """Each parameter's gradient becomes the sum over ranks. One call, one all-reduce, per optimizer step.

    A rank that trained nothing takes part with zeros.
    """
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)


@collective
@torch.no_grad()
def broadcast_parameters(parameters: list[torch.nn.Parameter]) -> None:  # all ranks
    """Every rank starts from rank 0's values."""
    for p in parameters:
        dist.broadcast(p, src=0)
