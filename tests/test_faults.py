"""Errors become the right error, on the right ranks."""

from types import SimpleNamespace

import pytest

import distributed
from harness import faults, signals
from harness.faults import DoesNotFit, Interrupted, NonFinite, NonFiniteUpdate, on_all_ranks, skippable, within_memory
from rewards import NonFiniteScore, RewardError


@pytest.mark.parametrize("error", [NonFinite('prompt "out of memory"'), RewardError("out of memory"),
                                   distributed.LostRank("out of memory")])
def test_an_error_that_quotes_a_prompt_is_not_taken_for_a_lack_of_memory(error):
    with pytest.raises(type(error)), within_memory("lower --rollout-batch"):
        raise error


def test_a_lack_of_memory_names_the_way_out_and_the_plan():
    with pytest.raises(DoesNotFit, match="out of memory on rank 0 .*; lower --rollout-batch; the plan was: 2 batches"):
        with within_memory("lower --rollout-batch", "2 batches"):
            raise MemoryError("std::bad_alloc")


@pytest.mark.parametrize("failures, expected", [
    ([None, RewardError("a"), None], RewardError), ([Interrupted(), RewardError("a")], Interrupted),
    ([Interrupted(), NonFinite("a"), RewardError("b")], NonFinite), ([RewardError("b"), NonFiniteScore("a")], NonFiniteScore)])
def test_what_is_raised_on_all_ranks_is_what_tells_most(monkeypatch, failures, expected):
    # A signal that interrupts one rank may kill the processes of another's reward, which then fails for no reason of its own.
    monkeypatch.setattr(distributed, "gather_objects", lambda own: failures)
    with pytest.raises(expected) as error:
        on_all_ranks(lambda: "done")()
    assert type(error.value) is expected


def test_a_stop_while_an_update_is_searched_for_a_fault_is_a_stop_and_no_diagnosis(monkeypatch):
    """Nothing was computed again then, so nothing can be said of it."""
    def update():
        with skippable(learner, None, [([0], [0])], None, None, "epoch 1, update 0", None, None):
            raise NonFiniteUpdate("loss")

    learner = SimpleNamespace(optimizer=SimpleNamespace(zero_grad=lambda set_to_none: None))
    monkeypatch.setattr(signals, "stop_asked", lambda: True)
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own])
    with pytest.raises(Interrupted):
        update()
    # What another rank has found is told all the same.
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, (" on rank 1 for prompt 'a'", False)])
    learner.skip = lambda error, updates: (_ for _ in ()).throw(error)
    with pytest.raises(NonFinite, match="the loss of epoch 1, update 0 is not finite on rank 1 for prompt 'a'"):
        update()


def test_a_policy_is_interrupted_only_where_a_task_may_end(monkeypatch):
    monkeypatch.setattr(signals, "stop_asked", lambda: True)
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own])
    faults.raise_if_stopping()                               # an update goes on to its collective
    with pytest.raises(Interrupted):
        on_all_ranks(faults.raise_if_stopping)()
