"""Several servers behind one reward: --reward-urls geneval http://a:18085 geneval http://b:18085

A request goes to the server that has the fewest. A server that gives no answer is left out, its requests go
to the others, and a thread looks at it until it answers again. A server that is much slower than the others
gets nothing new until it answers, and the others compute what it holds up. One line on stderr tells of
each of these. What fails at a server goes to the others. Scores keep the order of the pictures, whoever
computed them.
"""
import collections
import contextlib
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewards import IN_FLIGHT, Columns, RewardError, Unanswered, http_client, post_once, without_user

SLOW = 10.0  # seconds, beyond four times the others' longest answer, after which a server counts as slow
LOOK_AGAIN = 1.0, 30.0  # seconds until a server that is left out is looked at: at first, and at most

Part = tuple[np.ndarray, list[str], list[dict]]  # images, prompts and metadata of a request
Answer = tuple[np.ndarray, Columns]


@dataclass(eq=False)
class Server:
    """A server, and what is known of it."""

    url: str                # its address, without pickle+
    ask: Callable           # (send, images, prompts, metadata) -> Answer
    requests: int = 0       # that it has now
    seconds: float = 0.0    # that its last answer took
    away: str = ""          # "busy" or "gone": left out until it answers a look
    slow: bool = False      # left out until it answers a request


class Servers:
    """Asks several servers of one reward for the parts of a batch. Any thread may call it."""

    def __init__(self, name: str, asks: dict[str, Callable], deadline: float) -> None:
        """asks: address -> what asks its server. deadline: seconds for which no server may answer."""
        self.name, self.deadline = name, deadline
        self.servers = [Server(url, ask) for url, ask in asks.items()]
        self.lock, self.checked, self.answered = threading.Lock(), False, 0.0
        self.last_words = self.how_to_start = ""

    def ask_all(self, parts: list[Part]) -> list[Answer]:
        """Return the answer to each part, in order. Raises RewardError as `rewards.post` does."""
        self.answered = time.monotonic()
        if not self.checked:
            self.check(tuple(column[:1] for column in parts[0]))
        waiting, failed = list(range(len(parts))), collections.defaultdict(list)  # number -> servers
        answers, running = {}, {}  # part's number -> answer; future -> number, server, when it started
        twice = set()  # numbers of parts that a slow server holds up, so that others compute them too
        while len(answers) < len(parts):
            for number in waiting[:]:
                if server := self.take_free(failed[number]):
                    waiting.remove(number)
                    job = in_thread(self.request, server, parts[number], failed[number].count(server))
                    running[job] = number, server, time.monotonic()
            if not running:
                self.wait_for_any()
            for job in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                number, server, _ = running.pop(job)
                try:
                    answers.setdefault(number, job.result())
                except Exception as error:
                    if number in answers:  # by another server
                        continue
                    if not isinstance(error, Unanswered):
                        raise
                    if error.status == 500:
                        failed[number].append(server)
                        self.stop_if_all_failed(failed[number], error)
                    waiting.append(number)
            for number, server, started in running.values():
                if number not in twice and self.is_slow(server, started):
                    twice.add(number)
                    waiting.append(number)
            waiting = [number for number in waiting if number not in answers]
        return [answers[number] for number in range(len(parts))]

    def check(self, part: Part) -> None:
        """Ask each server for one picture, so that one of another reward is found now and not after hours."""
        with self.lock:
            for server in self.servers:
                server.requests += 1
        jobs = {in_thread(self.request, server, part): server for server in self.servers}
        for job in as_completed(jobs):
            if not job.exception():
                break
        # Once one has answered, a server that stays silent does not hold up the others.
        done, silent = wait(jobs, timeout=SLOW)
        for job in silent:
            with self.lock:
                jobs[job].slow = jobs[job].requests > 0  # unless it answered since
            self.say(jobs[job], f"has not answered {SLOW:g} s after another did; they go on")
        for job in done:
            if not isinstance(error := job.exception(), Unanswered | None):
                raise error
        # One picture takes less time than a part, by which every server would soon count as slow.
        for server in self.servers:
            server.seconds = 0.0
        self.checked = True

    def stop_if_all_failed(self, failed: list[Server], error: Unanswered) -> None:
        """Raise RewardError if a part failed at every server that is not gone, and at least 3 times."""
        if len(failed) >= 3 and all(s in failed or s.away == "gone" for s in self.servers):
            urls = " and ".join(without_user(url) for url in sorted({server.url for server in failed}))
            raise RewardError(f"{urls} failed {len(failed)} times; the last answer was {error}") from error

    def take_free(self, failed: list[Server]) -> Server | None:
        """Take the server with the fewest requests, and among equals the one that answered fastest.

        failed: servers at which the part failed. It goes there again only if no other is free.
        """
        with self.lock:
            # A server may answer while it is found to be slow. With nothing left to answer it is not slow.
            free = [s for s in self.servers if failed.count(s) < 3
                    and not s.away and not (s.slow and s.requests) and s.requests < IN_FLIGHT]
            free = [s for s in free if s not in failed] or free
            server = min(free, key=lambda server: (server.requests, server.seconds), default=None)
            if server:
                server.requests += 1
        return server

    def wait_for_any(self) -> None:
        """Wait a moment for a server that is left out. Raises RewardError after the deadline."""
        if time.monotonic() - self.answered > self.deadline:
            none = f"none of the {len(self.servers)} servers of reward {self.name!r} answered"
            raise RewardError(f"{none} in {self.deadline:g} s; the last answer was {self.last_words}; "
                              f"start one with: {self.how_to_start}")
        time.sleep(0.1)

    def is_slow(self, server: Server, started: float) -> bool:
        """Tell whether the server has become slow, measured by the others, and say so."""
        others = [other.seconds for other in self.servers if other is not server and other.seconds]
        seconds = time.monotonic() - started
        if not server.slow and others and seconds > SLOW + 4 * max(others):
            server.slow = True
            self.say(server, f"is slow, {seconds:.0f} s where others took {max(others):.1f} s; they go on")
        return server.slow

    def request(self, server: Server, part: Part, failures: int = 0) -> Answer:
        """Ask one server once. Raises Unanswered, or RewardError where it refuses.

        failures: how often the part failed there, after which the server gets a moment.
        """
        time.sleep(0.5 * failures)
        started = time.monotonic()
        try:
            answer = server.ask(self.send, *part)
        except Unanswered as error:
            self.last_words = str(error)
            if error.status != 500:  # which is a failure of the reward, not of the server
                self.leave_out(server, error)
            raise
        finally:
            with self.lock:
                server.requests, server.slow = server.requests - 1, False
        self.answered, server.seconds = time.monotonic(), time.monotonic() - started
        return answer

    def send(self, url: str, *, how_to_start: str, **request: Any) -> Any:
        """POST once. Works as `rewards.post` otherwise."""
        self.how_to_start = how_to_start
        return post_once(url, self.deadline / 2, **request)

    def leave_out(self, server: Server, error: Unanswered) -> None:
        """Leave a server out until it answers a look. One that is only busy is not told of."""
        with self.lock:
            if server.away:
                return
            busy = error.status in (408, 429, 503)
            server.away = "busy" if busy else "gone"
        if not busy:
            self.say(server, f"is gone ({error}); the others go on, and it is asked again")
        in_thread(self.wait_until_back, server, max(LOOK_AGAIN[0], error.after), busy)

    def wait_until_back(self, server: Server, seconds: float, quiet: bool) -> None:
        """Look at a server less and less often, until it answers at all, whatever it says."""
        address = server.url.rstrip("/").removesuffix("/score")
        answers = False
        while not answers:
            time.sleep(seconds)
            with contextlib.suppress(Exception):  # of any type, because this thread is nobody's
                answers = http_client().get(f"{address}/health", timeout=10).status_code < 500
            with self.lock:
                server.away = "" if answers else "gone"  # also if it was busy, because it would have answered
            seconds = min(2 * seconds, LOOK_AGAIN[1])
        if not quiet:
            self.say(server, "is back")

    def say(self, server: Server, what: str) -> None:
        named = f"the server {without_user(server.url)} of reward {self.name!r}"
        print(f"warning: {named} {what}", file=sys.stderr, flush=True)


def in_thread(call: Callable, *arguments: Any) -> Future:
    """Call in a thread of its own, a daemon, because a silent server must not hold up a program's end."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
