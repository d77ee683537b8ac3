"""What can go wrong in a run: its exceptions, and what follows from them.

An error on one rank becomes the same error on all. What is not finite is saved, or left out where allowed.
"""

import contextlib
import functools
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import distributed
from config import Config
from harness import signals
from harness.checkpoint import try_write
from pipelines import is_out_of_memory
from prompts import Prompt
from rewards import NonFiniteScore, RewardError
from sampler import replay


class TrainingError(RuntimeError):
    """A run that cannot go on; one line."""


class NonFinite(TrainingError):
    """A latent, loss or gradient is not finite. It comes on all ranks alike, before the weights change."""


class NonFiniteUpdate(Exception):
    """An update's "loss" or "gradient" is not finite. `skippable` turns it into a NonFinite."""


class Interrupted(Exception):
    """A signal asked the run to stop. It comes on all ranks alike."""


class DoesNotFit(RuntimeError):
    """Out of memory: the rank, the reason and the way out, in one line. Perhaps on one rank alone."""


LESS_MEMORY = "lower --{}; --gradient-checkpointing and --offload-text-encoders save memory too"


@contextlib.contextmanager
def within_memory(way_out: str, plan: str = "") -> Iterator[None]:
    """Within it, or in a function that it decorates, running out of memory raises DoesNotFit with both."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # These have been told already, and their text may quote a prompt.
        told = (RewardError, TrainingError, DoesNotFit, distributed.LostRank)
        if isinstance(error, told) or not is_out_of_memory(error):
            raise
        reason = str(error).partition(". GPU")[0].partition(" If reserved")[0]
        # Clear the frames of what failed, because they hold tensors, and there is still a state to save.
        traceback.clear_frames(error.__traceback__)
        raise DoesNotFit(f"out of memory on rank {distributed.rank()} ({reason}); {way_out}"
                         f"{plan and '; the plan was: ' + plan}") from error


_interruptible = False         # whether this rank is in a task that may end between two calls of the network


def raise_if_stopping() -> None:
    """A policy's `before_call`: raise Interrupted if a signal asked for a stop and the task may end here."""
    if _interruptible and signals.stop_asked():
        raise Interrupted


def on_all_ranks(task: Callable) -> Callable:
    """Decorate `task`, so that an error or a stop signal on one rank is raised as the same error on all."""
    @functools.wraps(task)
    def run(*arguments, **keywords):  # all ranks
        global _interruptible
        result = failure = None
        _interruptible = True
        try:
            result = task(*arguments, **keywords)
        except (RewardError, NonFinite, Interrupted) as error:
            failure = error
        finally:
            _interruptible = False
        # A launcher's signal also kills a reward's processes, so a failure after it is probably only that.
        if signals.stop_asked() and not isinstance(failure, NonFinite):
            failure = Interrupted()
        failures = distributed.gather_objects(failure)           # None for a rank that went through
        # Numbers that are not finite come first. A reward that failed comes last, because the signal that
        # interrupts one rank may have killed the processes of another's reward.
        for kind in (NonFinite, NonFiniteScore), Interrupted, Exception:
            for rank, error in enumerate(failures):
                if isinstance(error, kind):
                    raise error if kind is Interrupted else type(error)(f"rank {rank}: {error}")
        return result
    return run


@contextlib.contextmanager
def skippable(learner, samples, batches: list, backward: Callable, advantages: Tensor, where: str,
              statistics, config: Config) -> Iterator[None]:  # all ranks
    """Within, an update whose loss or gradient is not finite is left out if --skip-nonfinite allows it.

    The weights are then as they were. Otherwise it raises NonFinite.
    batches, backward: this rank's batches of rows, and the function that adds a batch's gradients and returns
    tensors to watch. statistics: counts the update that was left out.
    """
    try:
        yield
    except NonFiniteUpdate as error:
        quantity = str(error)
        found = find_non_finite(learner, samples, batches, backward, advantages, where, quantity, config)
        found, stops = zip(*distributed.gather_objects((found, signals.stop_asked())))
        if any(stops) and not any(found):        # not all was computed again
            raise Interrupted from None
        now_finite = ", but every batch of it was when computed again: suspect memory or the machine"
        said = next(filter(None, found), now_finite)
        line = f"the {quantity} of {where} is not finite{said}; the weights stay as they were"
        learner.skip(NonFinite(line), 1)
        statistics.leave_out_update()


def find_non_finite(learner, samples, batches: list, backward: Callable, advantages: Tensor, where: str,
                    quantity: str, config: Config) -> str:
    """Say which prompt's row is the first that is not finite, and which file has its batch. "" if none is.

    Training keeps nothing for this. So compute this rank's part of the update again, batch by batch, and the
    first batch that is not finite row by row.
    """
    def finite(positions: list[int], steps: list[int]) -> bool:
        watched = torch.stack([value.double().sum() for value in backward((positions, steps)).values()])
        gradients = [p.grad for p in learner.policy.parameters if p.grad is not None]
        learner.optimizer.zero_grad(set_to_none=True)
        return bool(watched.isfinite().all()) and (
            quantity == "loss" or all(g.isfinite().all() for g in gradients))

    learner.optimizer.zero_grad(set_to_none=True)                # of the update that failed
    for positions, steps in batches:
        if signals.stop_asked():         # `skippable` raises Interrupted on all ranks
            break
        if finite(positions, steps):
            continue
        rows_left = ((j, k) for j, k in zip(positions, steps) if not signals.stop_asked())
        worst = next((j for j, k in rows_left if not finite([j], [k])), positions[0])
        prompts, rows = [samples.prompts[j] for j in positions], samples.trajectory.rows(steps, positions)
        text = learner.policy.encode([p.text for p in prompts])
        with torch.no_grad():
            log_prob, mean, _ = replay(learner.policy.velocity(text, config.guidance_scale), rows)
        indices = [samples.draw.indices[j] for j in positions]
        path = save_debug_tensors(
            config, where.partition(",")[0], prompts, samples=torch.tensor(indices), log_prob_again=log_prob,
            steps=torch.tensor(steps), advantages=advantages[indices], mean_again=mean, **tensors_of(rows))
        knobs = "--learning-rate" if config.objective == "awm" else "--learning-rate or --noise-level"
        return (f" on rank {distributed.rank()} for prompt {samples.prompts[worst].text!r}: tensors are in "
                f"{path}; lower {knobs}, or in float16 use --dtype bfloat16")
    return ""


def tensors_of(record) -> dict[str, Tensor]:
    """The tensors among the fields of a Trajectory or of Rows."""
    return {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}


def save_debug_tensors(config: Config, where: str, prompts: list[Prompt], **tensors: Tensor) -> Path:
    """Write a batch that is not finite as safetensors, with its prompts as json; of an epoch, the latest."""
    name = f"{where.replace(' ', '_')}_rank_{distributed.rank()}.safetensors"
    path = Path(config.output_dir, config.run_name, "nonfinite", name)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path,
                  {"prompts": json.dumps([p.text for p in prompts])})

    try_write(str(path), write)
    return path
