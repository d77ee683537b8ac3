"""Rewards in a run: what is checked before it, and the thread in which they score beside the sampling."""

import contextlib
import copy
import functools
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor

from config import Config
from harness import signals
from harness.faults import Interrupted, NonFinite, save_debug_tensors
from policy import Policy, to_host
from prompts import Prompt
from rewards import REGISTRY, NonFiniteScore, Rewards, import_reward, one_line

# torch.from_numpy warns of the rewards' read-only pictures. Ignore it, because each reward has a copy.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")

# States of the global random streams: the rewards' while the trainer draws, the trainer's while rewards do.
states_aside: list = []


@contextlib.contextmanager
def own_random_streams() -> Iterator[None]:
    """Within, the global random streams of `random`, numpy and torch are the rewards' own.

    They go on the next time. One thread at a time may be within. Sampling may go on beside it, because the
    trainer draws from generators of its own.
    """
    exchange_random_states()
    try:
        yield
    finally:
        exchange_random_states()


def exchange_random_states() -> None:
    streams = [(random.getstate, random.setstate), (np.random.get_state, np.random.set_state),
               (torch.get_rng_state, torch.set_rng_state)]
    if torch.cuda.is_initialized():
        streams.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    states = [read() for read, _ in streams]
    for (_, write), state in zip(streams, states_aside):
        write(state)
    states_aside[:] = states


def check_reward_prompts(names: Iterable[str], prompts: list[str], metadata: list[dict],
                         urls: dict = {}) -> None:
    """Raise ValueError, one line with reward and prompt, for the first prompt that a reward cannot score.

    What cannot be imported here is not checked, nor a file of your own that has a URL, because it may be for
    another environment.
    """
    for name in names:
        check = None
        if name in REGISTRY or ":" in name and name not in urls:
            with contextlib.suppress(ValueError):
                check = getattr(import_reward(name), "check_prompt", None)
        try:
            with own_random_streams():
                for prompt, entry in zip(prompts, metadata, strict=True) if check else ():
                    check(prompt, copy.deepcopy(entry))
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from error
        except (Exception, SystemExit) as error:
            where = f"for prompt {one_line(repr(prompt), 80)}"
            raise ValueError(f"reward {name!r}: {one_line(error, 200)}, {where}") from error


def probe(rewards: Rewards, prompt: Prompt, resolution: tuple[int, int]) -> None:
    """Score a grey picture, so that a reward that cannot work raises RewardError now and not after hours."""
    with own_random_streams():
        rewards(np.full((1, *resolution, 3), 128, np.uint8), [prompt.text], [prompt.metadata])
    torch.set_default_dtype(torch.float32)       # which a reward may change for all threads


def thumbnails(images: Tensor) -> Tensor:
    """Shrink pictures (B, H, W, 3) uint8 to (B, 3, 8, 8) float32. A value is the mean of a part."""
    return torch.nn.functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), 8)


def fill_unanswered(scores: dict[str, Tensor], weights: dict[str, float], group_ids: Tensor) -> None:
    """Give a picture that a reward could not score the mean of its group's others, in place.

    Then it has no advantage over them. The reward marks it by a 1 in its metric "unanswered", and its own
    guess is left, which comes from a part of the group. scores: name -> (N,), with "total". group_ids: (N,).
    """
    for name in weights:
        silent = scores.get(f"{name}/unanswered", torch.zeros(len(group_ids))) == 1      # (N,)
        for group in group_ids[silent].unique():
            mine, others = group_ids == group, (group_ids == group) & ~silent
            # In float64, because the mean of equal scores has to be that score.
            known = scores[name][others if others.any() else mine]
            scores[name][mine & silent] = known.double().mean().float()
    if any(f"{name}/unanswered" in scores for name in weights):
        scores["total"] = sum(weight * scores[name] for name, weight in weights.items())


class Scorer:
    """Scores micro-batches of pictures in their order while the next one is sampled."""

    def __init__(self, rewards: Rewards, policy: Policy, config: Config,
                 thread: ThreadPoolExecutor | None = None):
        """thread: that of another scorer, because a reward must not be called twice at a time."""
        self.rewards, self.config = rewards, config
        # One thread for the rewards. The current CUDA device is per thread, so set it there.
        on_gpu = policy.device.type == "cuda"
        start = functools.partial(torch.cuda.set_device, policy.device) if on_gpu else None
        self.thread = thread or ThreadPoolExecutor(1, initializer=start)
        self.pending: list[Future] = []
        self.waited = 0.0        # seconds in which this rank did nothing else

    def submit(self, images: Tensor, latents: Tensor, prompts: list[Prompt], where: str,
               debug_tensors: dict[str, Tensor], **columns: Tensor) -> None:
        """Hand over pictures (B, H, W, 3) uint8 and the latents (B, C, H, W) that they were decoded from.

        where: the epoch or "evaluation", for messages. debug_tensors: saved where the latents are not finite.
        columns: (B,) each, which are collected beside the scores.
        Raises what scoring an earlier batch raised, so that a reward that fails ends the sampling now.
        """
        wait_for_copy = to_host(latents.isfinite().flatten(1).all(1), images, *columns.values())
        self.pending.append(self.thread.submit(self._score, wait_for_copy, prompts, where, debug_tensors,
                                               list(columns)))
        try:
            self._raise_failed()
        except BaseException:
            self._forget()
            raise

    def collect(self) -> dict[str, np.ndarray]:
        """The scores of everything submitted since the last call: name -> (samples,) float32, in that order.

        "thumbnail" is no score but (samples, 3, 8, 8). A metric that a batch says nothing about is NaN there.
        Raises what scoring raised, or Interrupted at a stop signal.
        """
        started = time.perf_counter()
        try:
            # A failed reward is raised at once, and a signal waits for no slow reward.
            while wait(self.pending, timeout=0.2).not_done:
                self._raise_failed()
                if signals.stop_asked():
                    raise Interrupted
            self.waited += time.perf_counter() - started
            parts = [future.result() for future in self.pending]
        finally:
            self._forget()
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: np.concatenate([part.get(name, np.full_like(part["total"], np.nan)) for part in parts])
                for name in names}

    def _forget(self) -> None:
        """Leave out what waits to be scored, so that the next epoch's batches do not wait for it."""
        for future in self.pending:
            future.cancel()
        self.pending = []

    def _score(self, wait_for_copy: Callable, prompts: list[Prompt], where: str,
               debug_tensors: dict[str, Tensor], names: list[str]) -> dict[str, np.ndarray]:
        """Score a micro-batch. The thread waits for the device's copies while the next one is sampled."""
        finite, images, *columns = wait_for_copy()                          # (B,) bool, (B, H, W, 3) uint8
        if not finite.all():
            path = save_debug_tensors(self.config, where, prompts, **debug_tensors)
            prompt = prompts[int(finite.int().argmin())].text
            raise NonFinite(f"{where}: latents are not finite for prompt {prompt!r}; tensors are in {path}; "
                            "lower --learning-rate, or in float16 use --dtype bfloat16")
        try:
            with own_random_streams():
                scores = self.rewards(images.numpy(), [p.text for p in prompts],
                                      [p.metadata for p in prompts])
            return {**scores, "thumbnail": thumbnails(images).numpy(),
                    **{name: values.float().numpy() for name, values in zip(names, columns)}}
        except NonFiniteScore as error:
            path = save_debug_tensors(self.config, where, prompts, images=images)
            raise NonFiniteScore(f"{where}: {error}; the pictures are in {path}") from error

    def _raise_failed(self) -> None:
        for future in self.pending:
            if future.done():
                future.result()
