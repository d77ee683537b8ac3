"""What a run says of its pictures' diversity, and of its waiting for rewards."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import CHEAP, metrics_of

import distributed
from grpo import weighted_advantages
from harness.report import Statistics, spread_shares, spreads
from harness.run import Run
from harness.scoring import fill_unanswered, thumbnails


def pictures(*colours, size=(24, 64)):
    return torch.stack([torch.tensor(colour, dtype=torch.uint8).expand(*size, 3) for colour in colours])


def test_the_spread_is_the_deviation_of_mean_colours_averaged_over_channels():
    found = spreads("eval", thumbnails(pictures((0, 0, 0), (255, 255, 255))))
    assert found == {"spread/eval": pytest.approx(127.5), "spread/eval_fine": pytest.approx(127.5)}
    found = spreads("eval", thumbnails(pictures((0, 10, 0), (60, 10, 0), (0, 10, 0), (60, 10, 0))))
    assert found["spread/eval"] == pytest.approx(10)                       # 30, 0 and 0


def test_pictures_that_differ_in_layout_alone_differ_in_the_finer_figure_alone():
    left, right = torch.zeros(24, 64, 3, dtype=torch.uint8), torch.zeros(24, 64, 3, dtype=torch.uint8)
    left[:, :32], right[:, 32:] = 200, 200
    found = spreads("eval", thumbnails(torch.stack([left, right])))
    assert found["spread/eval"] == 0 and found["spread/eval_fine"] == pytest.approx(100)


def test_the_spread_of_groups_sees_no_difference_between_groups():
    within = thumbnails(pictures((0, 0, 0), (0, 0, 0), (200, 0, 0), (200, 0, 0))).unflatten(0, (2, 2))
    assert spreads("group", within)["spread/group"] == 0


@pytest.mark.parametrize("size", [(24, 64), (16, 16), (512, 512), (48, 1000)])
def test_a_thumbnail_keeps_the_mean_colour(size):
    images = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = images.float().mean((1, 2))
    assert torch.allclose(thumbnails(images).mean((2, 3)), expected, atol=0.5 if size[1] % 8 == 0 else 2)


def test_a_share_is_of_the_first_value_that_was_recorded():
    history = [{"epoch": 0, "spread/eval": 80.0}, {"epoch": 1, "spread/group": 50.0, "spread/eval": 60.0}]
    assert spread_shares({"epoch": 2, "spread/group": 25.0}, history) == {"spread/group_share": 0.5}
    assert spread_shares({"epoch": 2, "spread/eval": 20.0}, history) == {"spread/eval_share": 0.25}
    assert spread_shares({"epoch": 0, "spread/eval": 80.0}, []) == {"spread/eval_share": 1.0}
    assert spread_shares({"epoch": 3}, history) == {}


def test_collapse_is_told_once(capsys):
    run = SimpleNamespace(record=SimpleNamespace(history=[]))
    for share in (1.0, 0.4, 0.3, 0.2):
        metrics = {"spread/eval_share": share}
        Run.warn_of_collapse(run, metrics)
        run.record.history.append(metrics)
    assert capsys.readouterr().err.count("differ by 30%") == 1 and "differ by 20%" not in capsys.readouterr().err


@pytest.fixture
def alone(monkeypatch):
    """One rank, without a process group."""
    monkeypatch.setattr(distributed, "gather_vectors", lambda vector: vector[None])


def test_what_is_watched_is_a_mean_over_the_rows_that_were_replayed_and_the_loss_over_all(alone):
    """Four of ten rows, then none of ten, and then two of ten have an advantage."""
    statistics = Statistics()
    for replayed in (4, 0, 2):
        ones = torch.ones(replayed)
        if replayed:
            statistics.add(ones * 0, policy_loss=ones, approx_kl=ones * 1e-6, clip_fraction_high=ones, ratio=ones * 1.5)
        statistics.end_backward(10)
        statistics.end_update(0.5, may_overflow=False)
    metrics = statistics.metrics()
    assert metrics["policy_loss"] == pytest.approx(0.2) and metrics["approx_kl"] == pytest.approx(1e-6)
    assert metrics["clip_fraction_high"] == 1 and metrics["ratio"] == 1.5 and metrics["grad_norm"] == 0.5


def test_updates_without_a_row_have_a_ratio_of_1_and_those_that_were_left_out_have_no_gradient(alone):
    statistics = Statistics()
    statistics.end_backward(10)
    statistics.end_update(0.0, may_overflow=False)
    metrics = statistics.metrics()
    assert metrics["ratio"] == 1 and metrics["policy_loss"] == metrics["approx_kl"] == 0
    statistics = Statistics()
    statistics.leave_out_update()
    assert statistics.metrics() == {"overflows": 0, "skipped_updates": 1}


@pytest.mark.slow
@pytest.mark.parametrize("seconds, least, most", [(0.0, 0.0, 0.3), (0.7, 0.7, 1.4 + 0.3)])
def test_reward_wait_is_what_a_reward_adds_beyond_the_sampling(train_here, tmp_path, monkeypatch, seconds, least, most):
    """Two batches of an epoch: the first may be scored beside the sampling of the second, the last one cannot."""
    module = f"sleeps_{int(10 * seconds)}"
    (tmp_path / f"{module}.py").write_text(
        f"import time\ndef score(images, prompts, metadata):\n    time.sleep({seconds})\n"
        "    return images.mean((1, 2, 3))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    directory = train_here(module, rewards=(f"{module}:score", 1), **CHEAP, epochs=2, rollout_batch=2)
    for metrics in metrics_of(directory)[1:]:
        assert least <= metrics["reward_wait"] < most and metrics["reward_wait"] < metrics["seconds"]


def test_a_picture_that_a_judge_left_unanswered_gets_its_groups_mean_and_no_advantage():
    """Groups are split over calls and ranks, so the judge's own guess knows only some of a group."""
    group_ids, nan = torch.arange(3).repeat_interleave(4), math.nan
    judged = torch.tensor([0.2, 0.2, 1.0, 0.9, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    scores = {"judge": judged.clone(), "judge/unanswered": torch.tensor([0, 1.0, 0, 0, 1, 1, 1, 1, 0, 0, 0, nan]),
              "jpeg": torch.ones(12), "total": 2 * judged + 1}
    fill_unanswered(scores, {"judge": 2.0, "jpeg": 1.0}, group_ids)
    expected = judged.clone()
    expected[1], expected[4:8] = 2.1 / 3, 0.45
    torch.testing.assert_close(scores["judge"], expected)
    torch.testing.assert_close(scores["total"], 2 * expected + 1)
    advantages = weighted_advantages(scores, {"judge": 2.0, "jpeg": 1.0}, group_ids)
    assert advantages[[1, 4, 5, 6, 7]].abs().max() < 1e-6 and advantages[0] < -0.1

    scores = {"judge": torch.tensor([0.6] * 7 + [0.2]), "judge/unanswered": torch.tensor([0.0] * 7 + [1]), "total": torch.ones(8)}
    fill_unanswered(scores, {"judge": 1.0}, torch.zeros(8, dtype=torch.int64))
    assert (scores["judge"] == scores["judge"][0]).all() and torch.equal(scores["total"], scores["judge"])
