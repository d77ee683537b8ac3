"""Claims about sampler.py: the schedule, the transition rules, log-probs, rollout and replay."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import fuzz
from hypothesis import strategies as st
from scipy.stats import ks_2samp, kstest

import sampler
from sampler import RULES, Trajectory, log_prob, replay, rollout, sde_transition, timestep_schedule

F64 = torch.float64
SHAPE = (3, 4, 4)                                  # C H W of the test latents


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def largest_difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def network(dtype=F64, seed=0):
    """A small non-linear velocity that mixes every latent dimension and sees sigma."""
    torch.manual_seed(seed)
    dims = math.prod(SHAPE)
    layers = torch.nn.Sequential(torch.nn.Linear(dims + 1, 64), torch.nn.SiLU(), torch.nn.Linear(64, dims)).to(dtype)

    def velocity(latents, sigma):
        return layers(torch.cat([latents.flatten(1), sigma[:, None]], 1)).reshape(latents.shape)
    return velocity


def windowed_levels(first_step, num_trained, T, noise_level):
    """(T, B): noise_level inside each sample's window, 0 outside."""
    step, first = torch.arange(T)[:, None], torch.as_tensor(first_step)
    return noise_level * ((first <= step) & (step < first + num_trained)).to(F64)


# ---- law 1: the schedule and the ODE are diffusers' -------------------------------------------------------------

def sd3(T):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(T)
    return scheduler, timestep_schedule(T, shift=3.0)


def flux(T, resolution):
    tokens = (resolution // 16) ** 2
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / T, T), mu=mu)
    return scheduler, timestep_schedule(T, shift=math.exp(mu), sigma_min=1 / T)


def qwen_image(T):
    """At 512 x 512: 1,024 tokens. Its schedule ends at 0.02, so it has at least two steps."""
    mu = 0.5 + (1024 - 256) * (0.9 - 0.5) / (8192 - 256)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / T, T), mu=mu)
    return scheduler, timestep_schedule(T, shift=math.exp(mu), sigma_min=1 / T, shift_terminal=0.02)


MODELS = {"sd3": sd3, "qwen_image": qwen_image, **{f"flux_{r}px": lambda T, r=r: flux(T, r) for r in (256, 512, 768, 1024)}}


@pytest.mark.parametrize("model, T", [(model, T) for model in MODELS for T in (1, 6, 10, 28, 40)
                                      if T > 1 or model != "qwen_image"])
def test_the_schedule_is_that_of_the_diffusers_scheduler(model, T):
    scheduler, sigmas = MODELS[model](T)
    assert sigmas.dtype == torch.float32 and sigmas[0] == 1 and sigmas[-1] == 0
    assert largest_difference(sigmas, scheduler.sigmas) <= 1e-6


@pytest.mark.parametrize("T", [6, 10, 28, 40])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rule", RULES)
def test_noise_level_0_is_the_diffusers_scheduler_step_for_step(rule, model, T):
    scheduler, sigmas = MODELS[model](T)
    velocity = network(torch.float32)
    start = normal(2, *SHAPE, dtype=torch.float32)
    x = start
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            v = velocity(x, (timestep / 1000).expand(2))
            mean, std = sde_transition(v, x, sigmas[step], sigmas[step + 1], 0, rule, sigmas[1])
            x = scheduler.step(v, timestep, x).prev_sample
            assert std == 0
            assert largest_difference(mean, x) <= 2e-6            # a few roundings of float32 values near 1
    final = rollout(velocity, start, sigmas, 0, None, rule=rule).final
    assert largest_difference(final, x) <= 2e-6 * T


def test_the_last_sigma_before_0_at_10_steps_and_shift_3_is_0089():
    assert timestep_schedule(10)[-2].item() == pytest.approx(0.0089, abs=5e-5)


def test_the_schedule_keeps_the_asked_precision():
    for T, shift, sigma_min in [(1, 3.0, 0.003), (10, 3.0, 0.1), (10, 1.0, 0.1), (40, 0.5, 0.01)]:
        grid = np.linspace(1, sigma_min, T)
        expected = torch.from_numpy(np.append(shift * grid / (1 + (shift - 1) * grid), 0.0))
        sigmas = timestep_schedule(T, shift, sigma_min, dtype=F64)
        assert sigmas.dtype == F64 and largest_difference(sigmas, expected) <= 1e-12
        assert torch.equal(timestep_schedule(T, shift, sigma_min), sigmas.float())


@pytest.mark.parametrize("arguments, message", [
    ((0,), "num_steps is 0"), ((10, 0.0), "^shift is 0.0"), ((10, -1.0), "^shift is -1.0"),
    ((10, math.nan), "^shift is nan"),
    ((10, 3.0, 0.0), "sigma_min is 0.0"), ((10, 3.0, 1.5), "sigma_min is 1.5")])
def test_an_impossible_schedule_is_refused_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        timestep_schedule(*arguments)


def test_one_step_cannot_begin_at_1_and_at_the_terminal_sigma():
    with pytest.raises(ValueError, match="num_steps is 1: at least 2"):
        timestep_schedule(1, shift_terminal=0.02)


# ---- law 2: the SDE keeps the marginals of the ODE ---------------------------------------------------------------

WEIGHT, LEFT, RIGHT, WIDTH = 0.3, -1.5, 1.0, 0.4           # of the left mode; both modes have one width
MEAN = WEIGHT * LEFT + (1 - WEIGHT) * RIGHT
VARIANCE = WIDTH**2 + WEIGHT * (1 - WEIGHT) * (RIGHT - LEFT) ** 2
BETWEEN = (LEFT + RIGHT) / 2                               # 3 widths from either mode
SAMPLES = 2**15


def mixture_velocity(x, sigma, centres=(LEFT, RIGHT)):
    """E[eps - x_0 | x] where x_0 is one of two Gaussians: x (B, dimensions), sigma (B,)."""
    sigma = sigma[:, None]
    variance = (1 - sigma) ** 2 * WIDTH**2 + sigma**2                        # of x, given the mode
    left, right = (x - (1 - sigma) * centre for centre in centres)
    p_left = torch.sigmoid(math.log(WEIGHT / (1 - WEIGHT)) + (right**2 - left**2).sum(1, keepdim=True) / (2 * variance))

    def v(centre, offset):                                                   # E[eps] - E[x_0], given the mode
        return (sigma - (1 - sigma) * WIDTH**2) / variance * offset - centre
    return p_left * v(centres[0], left) + (1 - p_left) * v(centres[1], right)


def mixture_errors(rule, noise_level, T):
    """How far samples of T steps are from the data: (mean, variance, weight of the left mode)."""
    quantiles = (torch.arange(SAMPLES, dtype=F64) + 0.5) / SAMPLES
    start = torch.special.ndtri(quantiles)[:, None]                          # N(0, 1) with next to no sampling error
    noise = torch.Generator().manual_seed(0) if noise_level else None
    x = rollout(mixture_velocity, start, timestep_schedule(T, dtype=F64), noise_level, noise, rule=rule).final
    return torch.stack([x.mean() - MEAN, x.var() - VARIANCE, (x < BETWEEN).to(F64).mean() - WEIGHT]).abs()


# Of mean, variance and weight. The fourth moment of a mixture with modes this apart is below 3 VARIANCE^2.
STANDARD_ERRORS = torch.tensor([VARIANCE, 2 * VARIANCE**2, WEIGHT * (1 - WEIGHT)], dtype=F64).sqrt() / SAMPLES**0.5


def test_the_ode_reaches_the_mixture_with_an_error_of_order_1_over_T():
    errors = [mixture_errors("flow_sde", 0, T) for T in (8, 32, 128)]
    assert (errors[1] < errors[0] / 3).all() and (errors[2] < errors[1] / 3).all()
    assert (errors[2] < torch.tensor([0.004, 0.03, 0.002])).all()


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("rule", ["flow_sde", "dance_sde"])
def test_the_sde_reaches_mean_variance_and_mode_weights_as_the_ode_does(rule, noise_level):
    coarse, middle, fine = (mixture_errors(rule, noise_level, T) for T in (8, 24, 96))
    assert (fine < 1.25 * mixture_errors(rule, 0, 96) + 5 * STANDARD_ERRORS).all()
    assert (middle < coarse / 1.5 + 5 * STANDARD_ERRORS).all() and (fine < coarse / 3 + 5 * STANDARD_ERRORS).all()
    assert fine[1] < coarse[1] / 2                         # the variance error stands clear of the sampling error


CENTRES = torch.tensor([[-1.5, 0.5], [1.0, -0.5]], dtype=F64)
FALSE_ALARM = 1e-4                                         # of one p-value; there are 155: together, a chance below 2 %


def least_p_value(rule, noise_level, T, wrong_std=1.0, samples=2**14):
    """Of two-sample Kolmogorov-Smirnov tests: a rollout against noised draws of the mixture in the plane, half-way and at its end,
    in four directions. `wrong_std` multiplies that of every step."""
    generator, sigmas, p_values = torch.Generator().manual_seed(0), timestep_schedule(T, dtype=F64), []
    x, transition = torch.randn(samples, 2, generator=generator, dtype=F64), sampler.sde_transition
    for first, last in ((0, T // 2), (T // 2, T)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler, "sde_transition", lambda *args, **options: (
                lambda mean, std: (mean, wrong_std * std))(*transition(*args, **options)))
            x = rollout(lambda x, sigma: mixture_velocity(x, sigma, CENTRES), x, sigmas[:last + 1], noise_level, generator,
                        rule=rule, start_step=first).final
        modes = (torch.rand(samples, generator=generator) > WEIGHT).long()
        data, eps = (torch.randn(samples, 2, generator=generator, dtype=F64) for _ in range(2))
        y = (1 - sigmas[last]) * (CENTRES[modes] + WIDTH * data) + sigmas[last] * eps
        p_values += [ks_2samp(x @ d, y @ d, method="asymp").pvalue for d in torch.tensor(
            [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.6, -0.8]], dtype=F64)]
    return min(p_values)


@pytest.mark.parametrize("rule, noise_level, T", [
    ("flow_sde", 0.3, 64), ("flow_sde", 0.7, 64), ("flow_sde", 1.0, 64), ("flow_sde", 0.7, 128),
    ("dance_sde", 0.3, 64), ("dance_sde", 0.7, 64), ("dance_sde", 1.4, 64), ("dance_sde", 0.7, 128)])
def test_sde_samples_and_noised_data_cannot_be_told_apart(rule, noise_level, T):
    assert least_p_value(rule, noise_level, T) > FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("rule, noise_level", [("flow_sde", 0.7), ("dance_sde", 1.4)])
def test_the_two_sample_test_has_the_power_to_see_a_std_that_is_10_percent_off(rule, noise_level):
    for wrong_std in (0.9, 1.1):
        assert least_p_value(rule, noise_level, 64, wrong_std) < FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("T", [8, 64])
def test_on_the_mixture_cps_loses_variance_at_any_number_of_steps(T):
    mean, variance, weight = mixture_errors("cps", 0.8, T) / STANDARD_ERRORS
    assert variance > 20 and least_p_value("cps", 0.8, T) < 1e-20


def one_point_p_value(noise_level, T, wrong_std=1.0):
    """Least p-value of Kolmogorov-Smirnov tests of all the marginals of a cps rollout, whose velocity knows its one data point."""
    x0, sigmas, p_values = torch.tensor([0.7, -1.2], dtype=F64), timestep_schedule(T, dtype=F64), []
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2**13, 2, generator=generator, dtype=F64)
    for step in range(T - 1):                                                # the last step ends in x0 itself
        mean, std = sde_transition((x - x0) / sigmas[step], x, sigmas[step], sigmas[step + 1], noise_level, "cps")
        x = mean + wrong_std * std * torch.randn(x.shape, generator=generator, dtype=F64)
        p_values.append(kstest(((x - (1 - sigmas[step + 1]) * x0) / sigmas[step + 1]).flatten(), "norm").pvalue)
    return min(p_values)


# The claim above is not made for cps. These are exact instead, at any number of steps.
@pytest.mark.parametrize("T", [3, 10])
def test_a_cps_rollout_to_one_known_data_point_has_its_marginals_at_every_step(T):
    for noise_level in (0.2, 0.8, 1.0):
        assert one_point_p_value(noise_level, T) > FALSE_ALARM
    assert one_point_p_value(0.8, T, 1.1) < FALSE_ALARM > one_point_p_value(0.8, T, 0.9)


@pytest.mark.parametrize("noise_level", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_a_cps_step_of_any_size_is_exact_for_one_known_data_point(noise_level):
    x0 = normal(1, *SHAPE)
    for sigma, sigma_next in [(1.0, 0.97), (1.0, 0.0), (0.9, 0.2), (0.5, 0.499), (0.0089, 0.0)]:
        def step(x):
            return sde_transition((x - x0) / sigma, x, sigma, sigma_next, noise_level, "cps")   # v = eps - x0

        # The mean is affine in x: slope x + offset. So N(m, sigma^2) maps to N(slope m + offset, slope^2 sigma^2 + std^2).
        offset, std = step(torch.zeros_like(x0))
        slope = step(torch.ones_like(x0))[0] - offset
        x = normal(1, *SHAPE, seed=1)
        assert largest_difference(step(x)[0], slope * x + offset) <= 1e-12 / sigma
        assert largest_difference(slope * (1 - sigma) * x0 + offset, (1 - sigma_next) * x0) <= 1e-12 / sigma
        assert largest_difference(slope**2 * sigma**2 + std**2, torch.full_like(x0, sigma_next**2)) <= 1e-12 / sigma
        assert std.item() == pytest.approx(sigma_next * math.sin(noise_level * math.pi / 2), abs=1e-15)


# ---- the transition ----------------------------------------------------------------------------------------------

def test_away_from_sigma_1_the_rules_are_their_formulas():
    v, x = normal(2, *SHAPE), normal(2, *SHAPE, seed=1)
    sigma, sigma_next, a = 0.8, 0.65, 0.7
    D, x0, x1 = sigma - sigma_next, x - sigma * v, x + (1 - sigma) * v
    s2 = a**2 * sigma / (1 - sigma)
    std_cps = sigma_next * math.sin(a * math.pi / 2)
    expected = {
        "flow_sde": (x * (1 - s2 * D / (2 * sigma)) - v * (1 + s2 * (1 - sigma) / (2 * sigma)) * D, math.sqrt(s2 * D)),
        "dance_sde": (x - D * (v + a**2 * (x - (1 - sigma) * x0) / (2 * sigma**2)), a * math.sqrt(D)),
        "cps": ((1 - sigma_next) * x0 + math.sqrt(sigma_next**2 - std_cps**2) * x1, std_cps),
    }
    for rule in RULES:
        mean, std = sde_transition(v, x, sigma, sigma_next, a, rule, second_sigma=0.96)
        assert largest_difference(mean, expected[rule][0]) <= 1e-12
        assert std.item() == pytest.approx(expected[rule][1], abs=1e-12)


def test_at_sigma_1_flow_sde_uses_second_sigma_in_s_alone():
    v, x = normal(2, *SHAPE), normal(2, *SHAPE, seed=1)
    a, second_sigma, D = 0.7, 0.96, 0.04
    s = a * math.sqrt(1 / (1 - second_sigma))
    mean, std = sde_transition(v, x, 1.0, 1 - D, a, "flow_sde", second_sigma)
    # The factor of v is 1 + s^2 (1 - sigma) / (2 sigma) = 1 at sigma = 1; with second_sigma in it, it would be 1.245.
    assert largest_difference(mean, x * (1 - s**2 * D / 2) - v * D) <= 1e-12
    assert std.item() == pytest.approx(s * math.sqrt(D), abs=1e-12)


def test_flow_sde_alone_is_refused_from_sigma_1_without_second_sigma():
    v, x = normal(2, *SHAPE), normal(2, *SHAPE, seed=1)
    for sigma in (1.0, torch.tensor([0.5, 1.0])):
        with pytest.raises(ValueError, match="second_sigma"):
            sde_transition(v, x, sigma, 0.4, 0.7, "flow_sde")
        for rule in ("dance_sde", "cps"):
            assert sde_transition(v, x, sigma, 0.4, 0.7, rule)[0].isfinite().all()
    with_, without = (sde_transition(v, x, 0.5, 0.4, 0.7, "flow_sde", value) for value in (0.96, None))
    assert torch.equal(with_[0], without[0]) and torch.equal(with_[1], without[1])


@pytest.mark.parametrize("rule", RULES)
def test_per_sample_sigma_and_noise_level_equal_scalar_calls(rule):
    v, x = normal(4, *SHAPE), normal(4, *SHAPE, seed=1)
    sigma = torch.tensor([1.0, 0.8, 0.4, 0.1], dtype=F64)
    sigma_next = torch.tensor([0.96, 0.7, 0.3, 0.0], dtype=F64)
    a = torch.tensor([0.7, 0.0, 1.0, 0.3], dtype=F64)
    mean, std = sde_transition(v, x, sigma, sigma_next, a, rule, 0.96)
    assert mean.shape == x.shape and std.shape == (4, 1, 1, 1)
    for b in range(4):
        m, s = sde_transition(v[b:b + 1], x[b:b + 1], sigma[b].item(), sigma_next[b].item(), a[b].item(), rule, 0.96)
        assert s.shape == ()
        assert largest_difference(m, mean[b:b + 1]) <= 1e-12 and largest_difference(s, std[b, 0, 0, 0]) <= 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_a_half_precision_velocity_is_used_at_the_precision_of_the_latents(rule):
    v, x = normal(2, *SHAPE).bfloat16(), normal(2, *SHAPE, seed=1)
    mean, _ = sde_transition(v, x, 0.8, 0.7, 0.7, rule)
    assert mean.dtype == F64 and torch.equal(mean, sde_transition(v.to(F64), x, 0.8, 0.7, 0.7, rule)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_refused(dtype):
    v = x = normal(2, *SHAPE).to(dtype)
    with pytest.raises(ValueError, match=str(dtype)):
        sde_transition(v, x, 0.8, 0.7, 0.7)
    with pytest.raises(ValueError, match=str(dtype)):
        rollout(lambda x, sigma: x, x, timestep_schedule(4), 0.7, torch.Generator())


def test_an_unknown_rule_is_refused_by_name():
    v = x = normal(2, *SHAPE)
    with pytest.raises(ValueError, match="'ddim'.*flow_sde, dance_sde, cps"):
        sde_transition(v, x, 0.8, 0.7, 0.7, "ddim")


# ---- law 3: log-probs --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule", ["flow_sde", "dance_sde"])
def test_log_prob_is_that_of_torch_distributions_averaged_over_dimensions(rule):
    sample, mean = normal(4, *SHAPE), normal(4, *SHAPE, seed=1)
    for std in (torch.tensor(0.3, dtype=F64), 0.1 + uniform(4, 1, 1, 1)):
        expected = torch.distributions.Normal(mean, std).log_prob(sample).mean((1, 2, 3))
        assert largest_difference(log_prob(sample, mean, std, rule), expected) <= 1e-12


def test_log_prob_of_cps_is_minus_the_mean_square():
    sample, mean, std = normal(4, *SHAPE), normal(4, *SHAPE, seed=1), 0.1 + uniform(4, 1, 1, 1)
    expected = -((sample - mean) ** 2).mean((1, 2, 3))
    assert largest_difference(log_prob(sample, mean, std, "cps"), expected) <= 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_a_deterministic_step_has_no_log_prob(rule):
    x = normal(2, *SHAPE)
    for std in (torch.tensor(0.0), torch.tensor([0.3, 0.0]).reshape(2, 1, 1, 1)):
        with pytest.raises(ValueError, match="std is 0"):
            log_prob(x, x, std, rule)


# ---- rollout -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule", RULES)
def test_a_rollout_with_a_window_per_sample_stores_what_a_step_by_step_loop_visits(rule):
    T, S, first = 6, 2, [0, 3, 1, 0, 2]
    B, sigmas, velocity = len(first), timestep_schedule(T, dtype=F64), network()
    levels, noise = windowed_levels(first, S, T, 0.7), normal(T, B, *SHAPE, seed=2)
    t = rollout(velocity, normal(B, *SHAPE), sigmas, levels, noise, rule=rule, first_step=torch.tensor(first),
                num_trained=S)

    visited, log_probs = [normal(B, *SHAPE)], {}
    with torch.no_grad():
        for step in range(T):
            x = visited[-1]
            v = velocity(x, sigmas[step].expand(B))
            mean, std = sde_transition(v, x, sigmas[step], sigmas[step + 1], levels[step], rule, sigmas[1])
            visited.append(mean + std * noise[step])
            for b in range(B):
                if levels[step, b]:
                    log_probs[step, b] = log_prob(visited[-1][b:b + 1], mean[b:b + 1], std[b], rule)[0]

    assert t.latents.shape == (S + 1, B, *SHAPE) and t.log_probs.shape == (S, B) and t.noise_levels.shape == (T, B)
    assert t.first_step.tolist() == first and t.rule == rule and torch.equal(t.sigmas, sigmas)
    assert largest_difference(t.final, visited[T]) <= 1e-12
    for b, f in enumerate(first):
        for k in range(S + 1):
            assert largest_difference(t.latents[k, b], visited[f + k][b]) <= 1e-12
        for k in range(S):
            assert largest_difference(t.log_probs[k, b], log_probs[f + k, b]) <= 1e-12


@pytest.mark.parametrize("noise_levels", [0.7, [0.7] * 4, [[0.7] * 2] * 4])
def test_noise_levels_may_be_one_for_all_per_step_or_per_step_and_sample(noise_levels):
    arguments = network(), normal(2, *SHAPE), timestep_schedule(4, dtype=F64)
    t = rollout(*arguments, noise_levels, normal(4, 2, *SHAPE, seed=2), num_trained=4)
    assert torch.equal(t.noise_levels, torch.full((4, 2), 0.7, dtype=F64))
    assert torch.equal(t.final, rollout(*arguments, 0.7, normal(4, 2, *SHAPE, seed=2)).final)


def test_a_generator_gives_the_rollout_of_the_tensor_it_would_draw():
    arguments = network(), normal(2, *SHAPE), timestep_schedule(4, dtype=F64), 0.7
    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(2, *SHAPE, generator=generator, dtype=F64) for _ in range(4)])
    by_tensor = rollout(*arguments, noise, num_trained=4)
    by_generator = rollout(*arguments, torch.Generator().manual_seed(5), num_trained=4)
    other = rollout(*arguments, torch.Generator().manual_seed(6), num_trained=4)
    assert torch.equal(by_tensor.final, by_generator.final)
    assert torch.equal(by_tensor.log_probs, by_generator.log_probs)
    assert not torch.equal(other.final, by_generator.final)


@pytest.mark.parametrize("name, value", [
    ("noise", normal(4, *SHAPE)), ("noise", normal(4, 1, *SHAPE)), ("noise", normal(3, 2, *SHAPE)),
    ("noise_levels", [0.7] * 3), ("noise_levels", [[0.7] * 3] * 4), ("first_step", torch.tensor([0, 1, 0]))])
def test_shapes_that_disagree_are_refused(name, value):
    arguments = dict(velocity=network(), latents=normal(2, *SHAPE), sigmas=timestep_schedule(4, dtype=F64), noise_levels=0.7,
                     noise=torch.Generator(), num_trained=2)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        rollout(**{**arguments, name: value})


def test_a_rollout_computes_no_gradients():
    start = normal(2, *SHAPE).requires_grad_()
    t = rollout(network(), start, timestep_schedule(4, dtype=F64), 0.7, torch.Generator(), num_trained=2)
    assert not t.final.requires_grad and not t.latents.requires_grad and not t.log_probs.requires_grad


def test_noise_levels_without_noise_are_refused():
    arguments = network(), normal(2, *SHAPE), timestep_schedule(4, dtype=F64)
    with pytest.raises(ValueError, match="no noise"):
        rollout(*arguments, [0, 0, 0.7, 0], None)
    assert torch.equal(rollout(*arguments, 0, None).final, rollout(*arguments, 0, torch.Generator()).final)


@pytest.mark.parametrize("first_step, num_trained, numbers", [(0, 5, "0 to 4 "), (3, 2, "3 to 4 "), (-1, 2, "-1 to 0 "),
                                                             (torch.tensor([0, 3]), 2, "0 to 4 ")])
def test_a_window_outside_the_steps_is_refused_with_its_numbers(first_step, num_trained, numbers):
    with pytest.raises(ValueError, match=f"trained steps {numbers}do not lie in 0 to 3"):
        rollout(network(), normal(2, *SHAPE), timestep_schedule(4, dtype=F64), 0.7, torch.Generator(),
                first_step=first_step, num_trained=num_trained)


def test_a_trained_deterministic_step_is_refused():
    arguments = network(), normal(2, *SHAPE), timestep_schedule(4, dtype=F64)
    noise = normal(4, 2, *SHAPE)
    one_sample = torch.tensor([[0.7, 0.7], [0.7, 0.0], [0.0, 0.0], [0.0, 0.0]])
    for rule in RULES:
        for levels in (0, [0.7, 0, 0, 0], one_sample):
            with pytest.raises(ValueError, match=r"trained step .*\[.*\] is deterministic"):
                rollout(*arguments, levels, noise, rule=rule, num_trained=2)
    with pytest.raises(ValueError, match=r"\[3\] is deterministic"):
        rollout(*arguments, 0.7, noise, rule="cps", num_trained=4)          # its last step has std 0 at any noise_level
    assert rollout(*arguments, 0.7, noise, rule="flow_sde", num_trained=4).log_probs.isfinite().all()
    assert rollout(*arguments, 0.7, noise, rule="cps", num_trained=3).log_probs.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_images_that_share_start_noise_may_share_the_ode_before_their_window(rule):
    T, S, first, B = 7, 2, 3, 4
    sigmas, velocity, start = timestep_schedule(T, dtype=F64), network(), normal(1, *SHAPE)
    levels, noise = windowed_levels([first] * B, S, T, 0.7), normal(T, B, *SHAPE, seed=2)
    apart = rollout(velocity, start.expand(B, *SHAPE), sigmas, levels, noise, rule=rule, first_step=first, num_trained=S)
    prefix = rollout(velocity, start, sigmas[:first + 1], 0, None, rule=rule).final                      # one image
    shared = rollout(velocity, prefix.expand(B, *SHAPE), sigmas, levels, noise, rule=rule, first_step=first, num_trained=S,
                     start_step=first)
    for name in ("final", "latents", "log_probs"):
        assert largest_difference(getattr(shared, name), getattr(apart, name)) <= 1e-12


def test_a_start_step_outside_the_schedule_or_after_a_trained_step_is_refused():
    arguments = network(), normal(2, *SHAPE), timestep_schedule(4, dtype=F64), 0.7, torch.Generator()
    for start_step in (-1, 4):
        with pytest.raises(ValueError, match=f"start_step is {start_step}: it must lie in 0 to 3"):
            rollout(*arguments, start_step=start_step)
    with pytest.raises(ValueError, match="trained steps 1 to 2 do not lie in 2 to 3"):
        rollout(*arguments, first_step=1, num_trained=2, start_step=2)


def test_means_are_kept_only_where_they_are_asked_for():
    arguments = network(), normal(2, *SHAPE), timestep_schedule(4, dtype=F64), 0.7, torch.Generator()
    assert rollout(*arguments, num_trained=3).means.shape == (0, 2, *SHAPE)
    assert rollout(*arguments, num_trained=3, keep_means=True).means.shape == (3, 2, *SHAPE)


# ---- law 4: replay -----------------------------------------------------------------------------------------------

def stored(rule, dtype, first, S=3, T=7, noise_level=0.7, seed=0):
    """A network and a trajectory that it sampled."""
    B, velocity = len(first), network(dtype)
    t = rollout(velocity, normal(B, *SHAPE, seed=seed, dtype=dtype), timestep_schedule(T, dtype=dtype),
                windowed_levels(first, S, T, noise_level), normal(T, B, *SHAPE, seed=seed + 1, dtype=dtype),
                rule=rule, first_step=torch.tensor(first), num_trained=S, keep_means=True)
    return velocity, t


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rule", RULES)
def test_replay_by_the_network_that_sampled_gives_the_stored_log_probs(rule, dtype):
    for first_step in (0, 2):
        velocity, t = stored(rule, dtype, [first_step] * 5)
        for k in range(3):
            new, mean, std = replay(velocity, t.rows(k))
            assert torch.equal(mean, t.means[k])
            assert torch.equal(new, t.log_probs[k]) and new.dtype == mean.dtype == std.dtype == dtype
            assert mean.shape == (5, *SHAPE) and std.shape == (5, 1, 1, 1)


ROWS = [(1, None), (0, [4]), ([2, 0, 0], [6, 0, 3]), ([0, 1, 2, 0], [5, 5, 5, 5]), (2, [3, 1, 3])]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k, samples", ROWS)
def test_replay_of_any_rows_keeps_log_rho_below_1e_5_in_float32(rule, k, samples):
    velocity, t = stored(rule, torch.float32, [0, 3, 1, 0, 2, 3, 1])
    rows = t.rows(k, samples)
    assert (replay(velocity, rows)[0] - rows.log_prob).abs().max() < 1e-5


def test_replay_of_concatenated_trajectories_keeps_log_rho_below_1e_5_in_float32():
    velocity, t = stored("flow_sde", torch.float32, [0, 3, 1, 0, 2, 3, 1])
    _, u = stored("flow_sde", torch.float32, [2, 0], seed=7)
    for whole in (Trajectory.concatenate([t, u]), Trajectory.concatenate([u, t, u])):
        for k in range(3):
            assert (replay(velocity, whole.rows(k))[0] - whole.log_probs[k]).abs().max() < 1e-5


@fuzz(50, data=st.data())
def test_row_m_is_trained_step_k_m_of_sample_m(data):
    """For any pairs, with windows that differ between samples."""
    T, S = 7, 3
    first = data.draw(st.lists(st.integers(0, T - S), min_size=1, max_size=5))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, S - 1), st.integers(0, len(first) - 1)), min_size=1, max_size=9))
    _, t = stored("flow_sde", F64, first, S, T)
    rows = t.rows(*map(list, zip(*pairs)))
    assert torch.equal(rows.second_sigma, t.sigmas[1]) and rows.rule == t.rule
    for m, (k, b) in enumerate(pairs):
        step = first[b] + k
        expected = dict(latents=t.latents[k, b], next_latents=t.latents[k + 1, b], sigma=t.sigmas[step],
                        sigma_next=t.sigmas[step + 1], noise_level=t.noise_levels[step, b], log_prob=t.log_probs[k, b],
                        mean=t.means[k, b])
        for name, value in expected.items():
            assert torch.equal(getattr(rows, name)[m], value), name
        assert rows.noise_level[m] == 0.7                              # a trained step is a stochastic one


def test_rows_of_one_k_are_that_step_of_every_sample_in_order():
    _, t = stored("cps", F64, [0, 3, 1, 0])
    some, spelt_out = t.rows(2), t.rows([2] * 4, [0, 1, 2, 3])
    assert all(torch.equal(getattr(some, name), value) for name, value in vars(spelt_out).items() if name != "rule")


def test_rows_have_means_only_if_the_rollout_kept_them():
    arguments = network(), normal(2, *SHAPE), timestep_schedule(4, dtype=F64), 0.7, torch.Generator()
    assert rollout(*arguments, num_trained=3).rows(0).mean is None


def test_concatenate_keeps_every_field_of_every_part():
    _, t = stored("flow_sde", F64, [0, 3, 1, 0])
    _, u = stored("flow_sde", F64, [2, 0], seed=7)
    whole = Trajectory.concatenate([t, u])
    fields = {"final": 0, "latents": 1, "log_probs": 1, "means": 1, "first_step": 0, "noise_levels": 1}       # name: batch axis
    for name, axis in fields.items():
        assert torch.equal(getattr(whole, name), torch.cat([getattr(t, name), getattr(u, name)], axis)), name
    assert torch.equal(whole.sigmas, t.sigmas) and whole.rule == t.rule


@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_of_replay_through_the_velocity_agrees_with_finite_differences(rule):
    dims = math.prod(SHAPE)

    def velocity_of(weight):
        def velocity(latents, sigma):
            features = torch.stack([latents.flatten(1).sin(), sigma[:, None] * latents.flatten(1)], -1)   # (B, CHW, 2)
            return (features @ weight).sum(-1).tanh().reshape(latents.shape)
        return velocity

    first = [0, 2, 1]
    t = rollout(velocity_of(normal(2, 2)), normal(3, *SHAPE), timestep_schedule(6, dtype=F64),
                windowed_levels(first, 2, 6, 0.7), normal(6, 3, *SHAPE, seed=1), rule=rule,
                first_step=torch.tensor(first), num_trained=2)
    for k in range(2):
        weight = (normal(2, 2) + 0.1 * normal(2, 2, seed=4)).requires_grad_()            # off-policy: rho is not 1

        def log_probs_and_means(weight):
            new, mean, _ = replay(velocity_of(weight), t.rows(k))
            return new, mean.reshape(3, dims)
        assert torch.autograd.gradcheck(log_probs_and_means, weight, eps=1e-6, atol=1e-6, rtol=1e-5)
        gradient, = torch.autograd.grad(log_probs_and_means(weight)[0].sum(), weight)
        assert gradient.abs().min() > 1e-4                                               # nothing agrees by being 0


# ---------------------------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize("rule", RULES)
def test_neither_sampling_nor_replay_looks_at_a_value_on_the_device(rule):
    """On the meta device there are no values, and looking at one raises."""
    def empty(*shape):
        return torch.empty(*shape, device="meta")

    def velocity(latents, sigma):
        return latents * sigma.view(-1, 1, 1, 1)

    t = rollout(velocity, empty(4, *SHAPE), timestep_schedule(6), 0.7, empty(6, 4, *SHAPE), rule=rule,
                first_step=torch.tensor([0, 1, 2, 1]), num_trained=2, keep_means=True)
    log_probs, means, std = replay(velocity, t.rows(torch.tensor([0, 1, 1]), torch.tensor([3, 0, 2])))
    assert all(value.device.type == "meta" for value in (t.final, t.sigmas, t.first_step, log_probs, means, std))


@pytest.mark.parametrize("rule", RULES)
def test_several_steps_replayed_in_one_call_are_those_replayed_one_by_one(rule):
    def velocity(latents, sigma):
        return latents.sin() * sigma.view(-1, 1, 1, 1)

    first = [0, 2, 1]
    t = rollout(velocity, normal(3, *SHAPE), timestep_schedule(6, dtype=F64), windowed_levels(first, 3, 6, 0.7),
                normal(6, 3, *SHAPE, seed=1), rule=rule, first_step=torch.tensor(first), num_trained=3)
    rows = t.rows([1] * 3 + [2] * 3, [0, 1, 2] * 2)
    for one, two, both in zip(replay(velocity, t.rows(1)), replay(velocity, t.rows(2)), replay(velocity, rows)):
        assert torch.equal(torch.cat([one, two]), both)
