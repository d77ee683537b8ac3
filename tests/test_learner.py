"""What an update changes is one state: saved, restored, undone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import equal

from config import parse_config
from learner import FIRST_SCALE, Learner, WeightAverage, learning_rate


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
    kept = copy.deepcopy(learner.state(7))
    step(learner, -0.3)
    expected = copy.deepcopy(learner.state(8))
    assert not equal(kept["trained"], expected["trained"]) and not equal(kept["average"], expected["average"])
    assert learner.restore(kept) == 7 and equal(learner.state(7), kept)
    step(learner, -0.3)
    assert equal(learner.state(8), expected)


def test_undone_updates_leave_nothing_and_ended_ones_stay(learner):
    step(learner, 0.5)
    before = copy.deepcopy(learner.state(1))
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
    before = copy.deepcopy(learner.state(1))
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


# ----------------------------------------------------------------------------------------------------- weight average

def test_the_average_follows_its_formula_every_so_many_steps():
    p = torch.nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    average = WeightAverage([p], decay=0.5, every=3)
    expected = 0.0
    for n in range(1, 31):
        with torch.no_grad():
            p += n
        average.step()
        if n % 3 == 0:
            d = min((1 + n) / (10 + n), 0.5)
            expected = d * expected + (1 - d) * p.item()
        assert abs(average.average[0].item() - expected) < 1e-9
    assert (1 + 3) / (10 + 3) < 0.5 < (1 + 30) / (10 + 30)                               # both sides of the min were met


def test_the_average_is_applied_within_and_the_weights_are_themselves_again_after_an_exception_too():
    p = torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    average = WeightAverage([p], decay=0.9, every=1)
    start = p.detach().clone()
    with torch.no_grad():
        p += 1 / 3
    trained = p.detach().clone()
    with average.applied():
        assert torch.equal(p, start)
    assert torch.equal(p, trained) and torch.equal(average.average[0], start)
    with pytest.raises(KeyError), average.applied():
        assert torch.equal(p, start)
        raise KeyError
    assert torch.equal(p, trained) and torch.equal(average.average[0], start)


def test_a_loss_scale_that_an_update_has_halved_in_vain_starts_anew_and_another_stays(learner):
    learner.scaler = torch.amp.GradScaler("cpu")
    learner.scaler.scale(torch.zeros(()))
    for scale, after in ((2.0**20, 2.0**20), (0.5, FIRST_SCALE)):
        learner.scaler.update(scale)
        learner.skip(ValueError("what"), 1)
        assert learner.scaler.get_scale() == after


def test_the_scale_is_to_blame_only_if_an_update_has_halved_it(learner):
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    learner.scaler.scale(torch.zeros(()))

    def blamed(gradient):
        for p in learner.policy.parameters:
            p.grad = torch.full_like(p, gradient)
        return learner.step(max_grad_norm=1.0)[1]

    assert [blamed(g) for g in (1.0, float("inf"), float("inf"), 1e30)] == [False, True, False, False]
