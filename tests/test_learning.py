"""The trainer's own epochs on a policy whose optimum is known: they reach it, and their gradient is that of the loss.

The policy is the velocity field of data N(m, WIDTH^2), with an m of its own for each prompt and latent dimension, and m is all
that is trained. Where x is (1 - sigma) m, v is -m, and a step of any rule and length leads to (1 - sigma') m on average: the
mean of what is sampled is m itself. So the reward, minus the squared distance to a target, is greatest where m is the target.
"""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch

import distributed
import train
from config import Config, validate
from grpo import group_advantages
from harness.scoring import Scorer
from learner import Learner
from prompts import Prompt
from sampler import RULES, replay

F64 = torch.float64
WIDTH = 0.5
PROMPTS = [Prompt("left"), Prompt("right")]
TARGETS = torch.tensor([[-1.0, 0.5], [1.5, 0.25]], dtype=F64)          # (prompt, dimension)
START = torch.tensor([[0.4, -0.3], [0.2, 0.1]], dtype=F64)


class GaussianPolicy:
    """What train.py asks of a policy, for latents (B, 2, 1, 1) that are their own images."""

    device, dtype, compute_dtype, latent_shape = torch.device("cpu"), F64, F64, (2, 1, 1)

    def __init__(self, reference=START):
        self.m, self.reference = torch.nn.Parameter(START.clone()), reference
        self.parameters = [self.m]

    def branches(self, guidance_scale):
        return 1

    def schedule_arguments(self, num_steps):
        return {}

    def cache_text(self, prompts, guidance_scale):
        pass

    def encode(self, prompts):
        return torch.tensor([prompt == "right" for prompt in prompts]).long(),              # rows of m

    def velocity(self, text, guidance_scale):
        return lambda x, sigma: gaussian_velocity(self.m[text[0]], x, sigma)

    def reference_velocity(self, text, guidance_scale):
        return lambda x, sigma: gaussian_velocity(self.reference[text[0]], x, sigma)

    def drift(self, text, noise, guidance_scale):
        return ((self.m - self.reference)[text[0]] ** 2).mean(1).detach()

    def decode(self, latents):
        return latents


def gaussian_velocity(m, x, sigma):
    """E[eps - x_0 | x] where x_0 is N(m, WIDTH^2); m: (B, 2)."""
    m, sigma = m[:, :, None, None], sigma.view(-1, 1, 1, 1)
    variance = (1 - sigma) ** 2 * WIDTH**2 + sigma**2                                      # of x
    return (sigma - (1 - sigma) * WIDTH**2) / variance * (x - (1 - sigma) * m) - m


def rewards(images, prompts, metadata):
    target = np.stack([TARGETS[int(prompt == "right")].numpy() for prompt in prompts])     # (B, 2)
    score = -((images[:, :, 0, 0] - target) ** 2).sum(1).astype(np.float32)
    return {"near": score, "total": score}


BASE = replace(Config(), rewards=(("near", 1.0),), num_steps=4, window_size=0, timestep_fraction=0.75, noise_level=0.7, groups_per_epoch=6, group_size=10,
               updates_per_epoch=2, epochs=40, clip_range=0.05, learning_rate=0.12, learning_rate_half_life=8.0,
               weight_decay=0.0, rollout_batch=40, train_batch=25)


@pytest.fixture(autouse=True)
def one_process():
    distributed.setup()
    yield
    distributed.shutdown()


class ShortRun:
    """What train.py asks of a run, which keeps nothing."""

    prompts = PROMPTS

    def __init__(self, config, rewards=rewards, reference=START):
        validate(config)
        self.config, self.policy = config, GaussianPolicy(reference)
        self.learner, self.scorer = Learner(self.policy, config), Scorer(rewards, self.policy, config)

    def epochs_left(self):
        return range(1, self.config.epochs + 1)

    @contextlib.contextmanager
    def all_or_nothing(self, epoch):
        yield {"epoch": epoch}

    def conclude(self, metrics):
        pass


AWM = dict(objective="awm", clip_range=1.0)


def trained(config, rewards=rewards):
    """m after training."""
    run = ShortRun(config, rewards)
    train.train(run)
    return run.policy.m.detach()


@pytest.mark.parametrize("changes", [
    dict(rule=RULES[0]), *(pytest.param(changes, marks=pytest.mark.slow) for changes in (
        *(dict(rule=rule) for rule in RULES[1:]), dict(guard=True), AWM,
        dict(window_size=2, window_range=(0, 3), advantage_std="group")))], ids=str)
def test_training_reaches_the_known_optimum(changes):
    assert (START - TARGETS).abs().max() > 1
    assert (trained(replace(BASE, **changes)) - TARGETS).abs().max() < 0.1


@pytest.mark.parametrize("changes", [{}, pytest.param(AWM, marks=pytest.mark.slow)], ids=str)
def test_reversed_rewards_lead_away_from_the_optimum(changes):
    def reversed_rewards(*batch):
        return {name: -score for name, score in rewards(*batch).items()}

    away = (trained(replace(BASE, epochs=15, **changes), reversed_rewards) - START) * (START - TARGETS).sign()
    assert (away > 0.5).all()


def test_with_a_large_beta_the_policy_stays_at_the_reference():
    short = replace(BASE, epochs=12, learning_rate=0.02, learning_rate_half_life=0.0)
    moved = [(trained(replace(short, **changes)) - START).abs().max() for changes in (dict(beta=0.0), dict(beta=1000.0))]
    assert moved[0] > 0.3 and moved[1] < 0.03


@pytest.mark.parametrize("changes", [
    dict(rule="flow_sde", beta=0.3, kl="exact"), dict(rule="dance_sde", beta=0.3, kl="per_time"), dict(rule="cps", clip_range=2e-4),
    dict(guard=True), dict(window_size=2, window_range=(0, 4), beta=0.3), dict(objective="awm", clip_range=2e-3, beta=0.5)], ids=str)
def test_the_gradient_of_an_update_agrees_with_finite_differences_of_the_loss(changes):
    """On policy in the first of two updates, and off policy in the second."""
    config = replace(BASE, **dict(max_grad_norm=1e9, clip_range=0.005, learning_rate=0.3, learning_rate_half_life=0.0,
                                  train_batch=7) | changes)
    run = ShortRun(config, reference=TARGETS / 2)
    learner, visited = run.learner, [START]
    learner.optimizer = torch.optim.SGD(run.policy.parameters)                    # whose step is the gradient
    learner.average.step = lambda: visited.append(run.policy.m.detach().clone())
    samples = train.sample(run.policy, run.scorer, PROMPTS, config, 1)
    group_ids = torch.arange(config.groups_per_epoch).repeat_interleave(config.group_size)
    scores = distributed.gather_scores(samples.scores, samples.draw.indices, len(group_ids))
    advantages = group_advantages(scores["total"], group_ids, config.advantage_std)
    metrics = train.update(learner, samples, advantages, config, 1)
    assert 0.1 < metrics["clip_fraction_high"] + metrics["clip_fraction_low"] < 0.9 and len(visited) == 3
    for update in range(2):
        def loss(m):
            return mean_loss(m, samples, advantages, update, config)

        expected = torch.zeros_like(START)
        for index in np.ndindex(*START.shape):
            step = torch.zeros_like(START)
            step[index] = 1e-5
            expected[index] = (loss(visited[update] + step) - loss(visited[update] - step)) / 2e-5
        gradient = (visited[update] - visited[update + 1]) / config.learning_rate
        assert expected.abs().min() > 0.01 * expected.abs().max()
        assert (gradient - expected).abs().max() < 1e-6 * expected.abs().max()


def square(a):
    return (a**2).mean((1, 2, 3))


@torch.no_grad()
def mean_loss(m, samples, advantages, update, config):
    """The loss of an update's samples, written down once more from the papers."""
    chosen = [j for j, i in enumerate(samples.draw.indices) if i % config.updates_per_epoch == update]
    A = advantages[[samples.draw.indices[j] for j in chosen]]
    row = torch.tensor([int(samples.prompts[j].text == "right") for j in chosen])          # of m
    losses = []
    for k in range(config.trained_steps):
        part = samples.trajectory.rows(k, chosen)
        log_prob, mean, std = replay(lambda x, sigma: gaussian_velocity(m[row], x, sigma), part)
        _, ref_mean, _ = replay(lambda x, sigma: gaussian_velocity(TARGETS[row] / 2, x, sigma), part)
        std, D = std.flatten(), part.sigma - part.sigma_next
        log_rho = log_prob - part.log_prob
        if config.guard:
            log_rho = std * (log_rho + square(mean - part.mean) / (2 * std**2))
        rho = log_rho.exp()
        loss = torch.maximum(-A * rho, -A * rho.clamp(1 - config.clip_range, 1 + config.clip_range)) / (D if config.guard else 1)
        losses.append(loss + config.beta * square(mean - ref_mean) / (2 * std**2 / (D if config.kl == "per_time" else 1)))
    return torch.stack(losses).mean().item()
