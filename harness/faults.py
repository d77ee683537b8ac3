"""What can go wrong in a run, and the one line in which it ends."""

import contextlib
import traceback
from collections.abc import Iterator

import distributed
from rewards import RewardError

LESS_MEMORY = "lower --{}; --gradient-checkpointing and --offload-text-encoders save memory too"


class DoesNotFit(RuntimeError):
    """Out of memory: where, the way out and the batch plan, in one line. Perhaps only this rank raises it."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of PyTorch, of a GPU's libraries or of Python says that memory ran out."""
    signs = ("out of memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def within_memory(way_out: str, plan: str) -> Iterator[None]:
    """Raise DoesNotFit, with the way out and the batch plan, if what is done within runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RewardError) or not is_out_of_memory(error):
            raise
        reason = str(error).partition(". GPU")[0].partition(" If reserved")[0]
        # The frames of what failed hold tensors, and saving the state needs their memory.
        traceback.clear_frames(error.__traceback__)
        message = f"out of memory on rank {distributed.rank()} ({reason}); {way_out}; the plan was: {plan}"
        raise DoesNotFit(message) from error
