"""What an update changes is one state: saved, restored, undone."""

from types import SimpleNamespace

import pytest
import torch
from helpers import equal

from config import parse_config
from learner import Learner, learning_rate, on_host


@pytest.fixture
def learner() -> Learner:
    _, config = parse_config(["--skip-nonfinite", "2"])
    policy = SimpleNamespace(parameters=[torch.nn.Parameter(torch.arange(3.0)), torch.nn.Parameter(torch.ones(2, 2))],
                             device=torch.device("cpu"))
    return Learner(policy, config)


def step(learner: Learner, gradient: float) -> float:
    for p in learner.policy.parameters:
        p.grad = torch.full_like(p, gradient)
    return learner.step(max_grad_norm=1.0)[0]


def test_the_same_steps_from_a_restored_state_end_at_the_same_bits(learner):
    step(learner, 0.5)
    kept = on_host(learner.state(7))
    step(learner, -0.3)
    expected = on_host(learner.state(8))
    assert not equal(kept["trained"], expected["trained"]) and not equal(kept["average"], expected["average"])
    assert learner.restore(kept) == 7 and equal(learner.state(7), kept)
    step(learner, -0.3)
    assert equal(learner.state(8), expected)


def test_undone_updates_leave_nothing_and_ended_ones_stay(learner):
    step(learner, 0.5)
    before = on_host(learner.state(1))
    learner.begin_updates(1)
    step(learner, 0.5)
    assert learner.undo_updates() and equal(learner.state(1), before)
    learner.begin_updates(1)
    step(learner, 0.5)
    learner.end_updates()
    assert learner.undo_updates()
    assert not equal(learner.state(1)["trained"], before["trained"])


def test_changed_weights_whose_state_was_not_kept_are_not_called_whole(learner):
    step(learner, float("nan"))
    assert learner.undo_updates()
    step(learner, 0.5)
    assert not learner.undo_updates()
    learner.end_updates()
    assert learner.undo_updates()


def test_a_gradient_that_is_not_finite_changes_nothing(learner):
    step(learner, 0.5)
    before = on_host(learner.state(1))
    assert not torch.tensor(step(learner, float("nan"))).isfinite() and equal(learner.state(1), before)
    assert all(p.grad is None for p in learner.policy.parameters)


def test_updates_are_skipped_up_to_the_limit_and_then_raise(learner, capsys):
    learner.skip(ValueError("what"), 1)
    learner.skip(ValueError("what"), 1)
    assert "warning: what; skipped, 2 of 2 updates" in capsys.readouterr().err
    with pytest.raises(ValueError, match="what"):
        learner.skip(ValueError("what"), 1)


def test_without_a_half_life_the_learning_rate_stays():
    _, config = parse_config(["sd35m_ocr"])
    assert {learning_rate(config, epoch) for epoch in (1, 1000)} == {3e-4}
