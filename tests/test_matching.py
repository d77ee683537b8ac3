"""Advantage Weighted Matching, --objective awm: its rows, their log-probs and gradients, and whole runs.

That it reaches a known optimum, and its updates against finite differences: tests/test_learning.py. The calls of its
epoch: tests/test_leaderboard.py.
"""

from dataclasses import replace

import pytest
import torch
from helpers import assert_same_run, completed, equal, metrics_of

from config import PRESETS, ConfigError, validate
from draws import draw_sigmas, noise_levels
from grpo import clipped_loss
from matching import NoisedImages, noise_again
from sampler import replay, timestep_schedule

F64 = torch.float64
AWM = PRESETS["tiny_ocr_awm"]


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


FINAL, NOISE = normal(5, 2, 3, 4, seed=0), normal(3, 5, 2, 3, 4, seed=1)
SIGMA = torch.linspace(0.05, 1, 15, dtype=F64).view(3, 5)


def old_velocity(x, sigma):
    return torch.sin(3 * x) + sigma.view(-1, 1, 1, 1)


IMAGES = noise_again(old_velocity, FINAL, SIGMA, NOISE)
K, SAMPLES = [2, 0, 1, 1], [4, 4, 0, 3]
SHARE, TARGET = SIGMA[K, SAMPLES], NOISE[K, SAMPLES] - FINAL[SAMPLES]


# ---- rows --------------------------------------------------------------------------------------------------------

def test_a_row_is_an_image_on_the_straight_way_to_its_noise():
    rows, wide = IMAGES.rows(K, SAMPLES), SHARE.view(-1, 1, 1, 1)
    assert torch.allclose(rows.latents - wide * TARGET, FINAL[SAMPLES], rtol=0, atol=1e-14)
    assert torch.allclose(rows.latents + (1 - wide) * TARGET, NOISE[K, SAMPLES], rtol=0, atol=1e-14)
    assert equal([rows.sigma, rows.sigma_next, rows.next_latents], [SHARE, 0 * SHARE, FINAL[SAMPLES]])


def test_a_log_ratio_is_the_papers():
    def log_p(velocity):
        return -SHARE * ((velocity(rows.latents, rows.sigma) - TARGET) ** 2).mean((1, 2, 3))

    def velocity(x, sigma):
        return old_velocity(x, sigma) + 0.3 * x

    rows = IMAGES.rows(K, SAMPLES)
    found = replay(velocity, rows)[0] - rows.log_prob
    assert torch.allclose(found, log_p(velocity) - log_p(old_velocity), rtol=1e-12, atol=0) and (found.abs() > 1e-3).all()
    assert torch.equal(replay(old_velocity, rows)[0], rows.log_prob)


@pytest.mark.parametrize("clip_range", [1e-3, 1.0])
def test_the_first_gradient_is_the_advantage_times_that_of_pretrainings_loss(clip_range):
    rows, A = IMAGES.rows(K, SAMPLES), torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=F64)
    v = old_velocity(rows.latents, rows.sigma).requires_grad_()
    clipped_loss(replay(lambda x, sigma: v, rows)[0], rows.log_prob, A, clip_range).sum().backward()
    expected = (A * SHARE).view(-1, 1, 1, 1) * 2 * (v.detach() - TARGET) / FINAL[0].numel()
    assert torch.allclose(v.grad, expected, rtol=1e-9, atol=1e-15)


def test_micro_batches_come_together_in_their_order():
    parts = [noise_again(old_velocity, FINAL[part], SIGMA[:, part], NOISE[:, part]) for part in (slice(0, 2), slice(2, 5))]
    whole = NoisedImages.concatenate(parts)
    assert equal(list(vars(whole).values()), list(vars(IMAGES).values()))
    assert equal(list(vars(IMAGES.rows(1)).values()), list(vars(IMAGES.rows([1] * 5, range(5))).values()))


# ---- draws -------------------------------------------------------------------------------------------------------

SCHEDULE = timestep_schedule(AWM.num_steps)


def test_sigmas_are_a_function_of_seed_epoch_and_sample_alone():
    drawn, alone = (draw_sigmas(AWM, 5, samples, SCHEDULE) for samples in ([0, 7], [7]))
    assert torch.equal(drawn[:, 1:], alone)
    others = [draw_sigmas(*key, [7], SCHEDULE) for key in ((replace(AWM, seed=2), 5), (AWM, 6))]
    assert len(torch.cat([drawn.flatten(), *map(torch.flatten, others)]).unique()) == 4 * 3


def test_each_part_of_the_schedule_has_a_noising_of_each_image():
    drawn = draw_sigmas(replace(AWM, window_size=4), 1, list(range(200)), SCHEDULE)
    borders = SCHEDULE[::2].double()                                        # of 4 parts of its 8 steps
    assert ((drawn <= borders[:-1, None]) & (drawn > borders[1:, None])).all()
    assert (drawn.std(1) > 0.2 * (borders[:-1] - borders[1:])).all()       # evenly between a step's ends: .29 of them


# ---- whole runs --------------------------------------------------------------------------------------------------

RUN = dict(objective="awm", clip_range=1, epochs=3)


@pytest.fixture(scope="module")
def one_rank(train_here):
    return train_here("awm", **RUN)


@pytest.mark.slow
def test_three_ranks_do_what_one_does(one_rank, command):
    assert_same_run(one_rank, completed(command("awm-3", 3, **RUN, train_batch=3)), epochs=3, before=2)


@pytest.mark.slow
def test_a_run_that_was_stopped_does_what_one_does_that_was_not(one_rank, train_here):
    train_here("awm-resumed", **RUN | dict(epochs=1))
    assert_same_run(one_rank, train_here("awm-resumed", **RUN), epochs=3, before=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_ratio_before_the_first_update_is_exactly_1(train_here, dtype):
    metrics = metrics_of(train_here(f"awm-{dtype}", **RUN | dict(epochs=1), dtype=dtype))
    assert metrics[1]["ratio_deviation_before"] == 0 < metrics[1]["ratio_deviation"]


# ---- settings ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("field", ["guard", "shared_start_noise"])
def test_what_needs_steps_that_were_taken_is_refused(field):
    with pytest.raises(ConfigError, match=f"^--{field.replace('_', '-')} is True: --objective awm trains no step"):
        validate(replace(AWM, **{field: True}))


def test_the_ode_samples():
    assert not noise_levels(torch.tensor([1, 3]), AWM).any()
