"""Signals and the launcher: when a run stops, and what ends with what.

A run stops at a safe point, where its last whole epoch can be saved. A signal to one rank reaches all of
them. Workers end with their launcher, and the processes that user code forks end with their worker.
"""

import contextlib
import ctypes
import os
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import distributed

# Read at import, because the launcher has died if our parent is another process later.
LAUNCHER = os.getppid()
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ       # whether it is torchrun, and no shell or scheduler
GRACE = 20.0                 # seconds from a signal to a safe point; torchrun kills after 30
REPEATED = 1.0               # seconds in which a signal counts once, as two senders may be at work
UNANSWERED = 5.0             # seconds for the store to answer, which may be on a node whose network is gone
URGENT = (signal.SIGTERM, signal.SIGINT)
# The terminal was closed, or a scheduler says that a job's time is nearly up.
NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
PR_SET_PDEATHSIG = 1         # from linux/prctl.h
END = b"\0"                  # ends the watcher, because no signal has this number


def end_with_launcher() -> None:
    """End this worker and its children when torchrun is killed, because the worker would write on alone."""
    global _worker
    _worker = os.getpid()
    if TORCHRUN:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != LAUNCHER:                             # it died before that
            os._exit(1)


def remembered(key: str, value: str) -> str:
    """The first `value` that any process, also one replaced since, gave for `key` to this launcher."""
    return distributed.launcher_store.compare_set(key, "", value).decode()


def command_line() -> str:
    """The command that started this run, torchrun's words included, as a shell takes it; "" if unknown."""
    if not TORCHRUN:
        return shlex.join(sys.orig_argv)
    path = Path(f"/proc/{LAUNCHER}/cmdline")
    return shlex.join(os.fsdecode(path.read_bytes()).rstrip("\0").split("\0")) if path.exists() else ""


_asked = threading.Event()
# Set where all ranks have agreed to stop, or while something is written: saving may then take its time.
safe_point = threading.Event()


def stop_asked() -> bool:
    """Whether a rank was told to stop. Ranks learn it at different times, and agree in a collective."""
    return _asked.is_set()


@contextlib.contextmanager
def taking_its_time() -> Iterator[None]:
    """Let no signal cut short what happens within, because a checkpoint is being written."""
    safe_point.set()
    try:
        yield
    finally:
        safe_point.clear()


@contextlib.contextmanager
def stopping_on_signals(to_go_on: str = "") -> Iterator[None]:  # all ranks
    """Make `stop_asked` true on every rank within a second of a signal to any rank, even on one that waits.

    SIGTERM, Ctrl-C and NOTICES count. A second SIGTERM or Ctrl-C ends its process at once. So do GRACE
    seconds without a safe point, on every rank, because a rank may wait for one that is dead. A notice that
    was ignored before, as nohup ignores SIGHUP, stays ignored. to_go_on: the command to name then.
    """
    global _pipe
    _asked.clear()
    safe_point.clear()
    key = distributed.broadcast_object(f"stop {time.time()}")    # new at each start: the store outlives it
    _pipe = reading, writing = os.pipe()
    os.set_blocking(writing, False)
    taken = [*URGENT, *(n for n in NOTICES if signal.getsignal(n) == signal.SIG_DFL)]
    _handlers.update((number, signal.signal(number, lambda *_: None)) for number in taken)
    # Python writes a signal's number into the pipe at once. It runs handlers only between two of its own
    # instructions, so not while a collective waits.
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
        watcher.join(UNANSWERED)
        _pipe = ()
        if not watcher.is_alive():
            os.close(writing)
            os.close(reading)


def _watch(reading: int, key: str, to_go_on: str) -> None:
    """Set `_asked` on a signal to this process or by another rank's word in the store, until END comes."""
    store, first, asked = distributed.launcher_store, None, None
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
        except RuntimeError:                     # the store is gone, and soon the collectives will tell
            store = None
        if _asked.is_set():
            asked = now if safe_point.is_set() else asked or now
            if now - asked > GRACE and not safe_point.is_set():
                print(f"rank {distributed.rank()}: no safe point within {GRACE:g} s of the signal; the last "
                      f"checkpoint stands{to_go_on and '; to go on: ' + to_go_on}", file=sys.stderr)
                os._exit(1)


# ----------------------------------------------------------------------------- processes of user code

_handlers: dict[int, object] = {}          # within `stopping_on_signals`: signal -> its handler before
_pipe: tuple[int, ...] = ()                # within: both ends of the pipe that tells the watcher of a signal
_before_fork = threading.local()           # the signal mask that a forking thread had
_worker: int | None = None                 # the process whose children end with it


def _block_signals() -> None:
    """Before a fork, hold signals back, because they would count as the run's until `_be_a_child`."""
    if _handlers:
        _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _handlers)


def _unblock_signals() -> None:
    """After a fork, put back the mask that the forking thread had."""
    if (mask := vars(_before_fork).pop("mask", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _be_a_child() -> None:
    """Let signals end a forked child as they end any process, because a pool ends its workers with SIGTERM.

    The child ends with its parent too. A child that lived on would hold the connections to the other ranks
    open, and they would wait for a rank that is gone.
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
        # The kernel sends this signal when the thread that forked ends, so the handler looks whether the
        # process has ended. A program that this child becomes ignores SIGURG.
        signal.signal(signal.SIGURG, lambda *_: os.getppid() == parent or os._exit(1))
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGURG)


os.register_at_fork(before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_be_a_child)
