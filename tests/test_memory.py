"""How much one call takes: what is chosen, and what is said where it was too much."""

import pytest
import torch

from memory import DoesNotFit, fastest, largest_that_fits, within_memory
from rewards import RewardError


def trial(size: int) -> float:
    """Seconds of an image, on a device that holds twelve."""
    if size > 12:
        raise torch.OutOfMemoryError("out of memory")
    return {1: 9.0, 2: 5.0, 4: 3.0, 8: 4.0, 12: 4.5}[size]


def test_the_largest_batch_that_fits_is_chosen_and_one_image_must():
    assert largest_that_fits([1, 2, 4, 8, 12, 16, 32], trial) == 12
    assert largest_that_fits([1, 2], trial) == 2
    with pytest.raises(torch.OutOfMemoryError):
        largest_that_fits([16, 32], trial)


def test_the_fastest_batch_is_chosen_and_none_beyond_the_most():
    assert fastest([1, 2, 4, 8, 12], trial) == 4
    assert fastest([1, 2, 4, 8, 12, 16], trial, most=12) == 4
    assert fastest([8, 12], trial, most=4) == 8


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"),
                                   MemoryError("bad_alloc"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_says_where_and_what_to_lower(error):
    with pytest.raises(DoesNotFit, match="rank 0 .*; lower --train-batch; the plan was: 3 batches"), within_memory(
            "lower --train-batch", "3 batches"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), RewardError("the server says: CUDA out of memory"),
                                   ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, within_memory("lower --train-batch", "3 batches"):
        raise error
    assert caught.value is error
