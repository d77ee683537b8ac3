"""The loss of rows, against the formulas, with a policy that is two lines."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from config import Config
from grpo import clipped_loss, gaussian_kl
from sampler import replay, rollout, timestep_schedule
from train import step_loss

SHAPE = (5, 2, 3, 4)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    trajectory = rollout(lambda x, sigma: 0.3 * x, latents, timestep_schedule(6, dtype=torch.float64), 0.7, generator,
                         num_trained=4, keep_means=True)
    return {rule: trajectory.rows([0, 3, 1, 2, 2], [0, 1, 2, 3, 0]) for rule in ("flow_sde",)} | {
        "cps": rollout(lambda x, sigma: 0.3 * x, latents, timestep_schedule(6, dtype=torch.float64), 0.7, generator, rule="cps",
                       num_trained=4).rows([0, 3, 1, 2, 2], [0, 1, 2, 3, 0])}


POLICY = SimpleNamespace(velocity=lambda text, scale: lambda x, sigma: 0.31 * x,
                         reference_velocity=lambda text, scale: lambda x, sigma: 0.25 * x)
A = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("rule, kl, per_time", [("flow_sde", "per_time", True), ("flow_sde", "exact", False),
                                                ("cps", "exact", False), ("cps", "per_time", False)])
def test_the_kl_is_the_form_that_the_rule_means(rows, rule, kl, per_time):
    taken = rows[rule]
    config = dataclasses.replace(Config(), rule=rule, kl=kl, beta=0.5, noise_level=0.7)
    loss, watched = step_loss(POLICY, taken, None, A, config)
    log_prob, mean, std = replay(POLICY.velocity(None, 1.0), taken)
    _, reference_mean, _ = replay(POLICY.reference_velocity(None, 1.0), taken)
    # Flow-GRPO's per-time form divides by s = std / sqrt(D). Flow-CPS has no s, and its authors divide by std.
    D = (taken.sigma - taken.sigma_next).view_as(std)
    expected = gaussian_kl(mean, reference_mean, std / D.sqrt() if per_time else std)
    assert torch.allclose(watched["kl"], expected, rtol=1e-12)
    assert torch.allclose(loss, clipped_loss(log_prob, taken.log_prob, A, config.clip_range) + 0.5 * expected, rtol=1e-12)


def test_without_beta_the_reference_is_not_called(rows):
    policy = SimpleNamespace(velocity=POLICY.velocity, reference_velocity=None)
    loss, watched = step_loss(policy, rows["flow_sde"], None, A, dataclasses.replace(Config(), noise_level=0.7))
    assert torch.equal(loss, watched["policy_loss"]) and "kl" not in watched


def test_guard_divides_each_steps_loss_by_its_length(rows):
    taken = rows["flow_sde"]
    loss, _ = step_loss(POLICY, taken, None, A, dataclasses.replace(Config(), guard=True, clip_range=1e3))
    _, mean, std = replay(POLICY.velocity(None, 1.0), taken)
    log_ratio = ((taken.next_latents - taken.mean) * (mean - taken.mean) / std).flatten(1).mean(1)
    assert torch.allclose(loss, -A * log_ratio.exp() / (taken.sigma - taken.sigma_next), rtol=1e-12)
