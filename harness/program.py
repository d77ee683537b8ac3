"""How a program of this project runs: printing never raises, and its end waits for nobody.

A run matters more than what it says, so a closed pipe, a terminal that is gone, a full disk or an ASCII
console loses text and nothing else. User code may leave processes and threads behind, and Python would wait
for them.
"""

import errno
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

EXIT_SECONDS = 5.0           # for what user code left running, at the end of a run
GONE = (errno.EPIPE, errno.EIO)              # no reader of the pipe, or no terminal: neither comes back


class Unfailing:
    """A text stream whose writes never raise. What its encoding lacks is written as an escape."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, task: Callable, *arguments) -> None:
        try:
            task(*arguments)
        except OSError as error:
            if error.errno in GONE:
                self.let_go()
        except ValueError:                       # closed by user code
            pass

    def let_go(self) -> None:
        """Send what is still in a buffer, and what anybody writes from now on, to nowhere."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def keep_printing_from_failing() -> None:
    """From now on, writing to standard output and standard error raises nothing."""
    with suppress(OSError):
        # Take the numbers of streams that are closed, because a file of ours would get them.
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(fd, True)
        os.close(fd)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Unfailing):
            # Python leaves None where the stream was closed at the start.
            setattr(sys, name, Unfailing(open(os.devnull, "w") if stream is None else stream))


def run_as_program(main: Callable[[], int | None]) -> None:
    """Run `main` and end the process with what it returns, or with a traceback and 1 after a fault."""
    keep_printing_from_failing()
    try:
        code = main() or 0
    except SystemExit:
        raise
    except KeyboardInterrupt:
        leave(130)
    except BaseException:
        traceback.print_exc()
        leave(1)
    exit_within(EXIT_SECONDS, code)
    sys.exit(code)


def leave(code: int) -> None:
    """End now, without waiting for other ranks, or for a reward that still runs."""
    end_children()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_within(seconds: float, code: int = 0) -> None:
    """Let the process end in its own way, but so long from now at the latest."""
    def end() -> None:                           # flushes nothing, because a reader may be stuck
        end_children()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    for stream in (sys.stdout, sys.stderr):
        try:
            getattr(stream, "_stream", stream).flush()
        except (OSError, ValueError):            # Python would complain about it at the very end
            if isinstance(stream, Unfailing):
                stream.let_go()


def end_children(seconds: float = 1.0) -> None:
    """End what user code left running through multiprocessing, because Python would wait for it."""
    with suppress(Exception):
        for child in (children := multiprocessing.active_children()):
            child.terminate()
        end = time.monotonic() + seconds
        for child in children:
            child.join(max(0.0, end - time.monotonic()))
            child.kill()
