"""The sampler against the authors' step function and pipeline."""

import inspect
import random
from collections import defaultdict
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from config import find_place
from policy import Policy
from proofs.authors_code import Checkout, ReplayedNoise, quiet
from proofs.comparison import Line
from sampler import log_prob, rollout, sde_transition, timestep_schedule

SDE_STEP = "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"
MU = 0.63                                    # FLUX's shift is exp(MU) for pictures of 512 x 512
LATENT = (8, 16, 8, 8)


def schedules(flux: bool, steps: int) -> tuple[FlowMatchEulerDiscreteScheduler, Tensor]:
    """The scheduler that the authors' pipelines set up, and this project's sigmas."""
    if flux:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=MU)
        return scheduler, timestep_schedule(steps, shift=float(np.exp(MU)), sigma_min=1 / steps)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler, timestep_schedule(steps)


def official_rules(checkout: Checkout) -> dict[str, dict[str, str]]:
    """This project's name of each rule that the checkout has -> the argument that chooses it there."""
    parameters = inspect.signature(checkout.module(SDE_STEP).sde_step_with_logprob).parameters
    cps = {"cps": {"sde_type": "cps"}} if "sde_type" in parameters else {}
    return {"flow_sde": {}} | cps


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


# ---------------------------------------------------------------------------------------------- transitions

def transitions(checkout: Checkout, trials: int) -> list[Line]:
    """Random steps of every rule and schedule, and the same steps under a policy that has moved."""
    tolerances = {"sigmas": 1e-6, "mean, relative": 2e-5, "std, relative": 2e-5, "log-prob": 2e-6,
                  "log-ratio of a moved policy": 2e-6}
    lines = []
    for rule, argument in official_rules(checkout).items():
        worst, count = defaultdict(float), 0
        for trial in range(2 * trials):
            flux, steps = [(False, 10), (False, 40), (True, 6), (True, 28)][trial % 4]
            differences = one_transition(checkout, rule, argument, *schedules(flux, steps))
            for name, difference in differences.items():
                worst[name] = max(worst[name], difference)
            count += LATENT[0]
        lines += [Line("Transitions and log-probs", f"{rule}: {name}", count, worst[name], tolerance,
                       "schedules SD3 10, 40; FLUX 6, 28" if name == "sigmas" else "")
                  for name, tolerance in tolerances.items()]
    return lines


def one_transition(checkout: Checkout, rule: str, argument: dict, scheduler: FlowMatchEulerDiscreteScheduler,
                   sigmas: Tensor) -> dict[str, float]:
    """The differences in one batch of steps, each sample at a step of its own."""
    official = checkout.module(SDE_STEP).sde_step_with_logprob
    # The last step of cps ends in data without noise, so it has no log-prob.
    k = torch.randint(len(sigmas) - 1 - (rule == "cps"), LATENT[:1])
    latents, velocity = torch.randn(2, *LATENT)
    noise_level = random.choice([0.7, 0.8, 0.9, 1.0])
    arguments = dict(timestep=scheduler.timesteps[k], sample=latents, noise_level=noise_level, **argument)
    sample, old, mean, std = official(scheduler, velocity, **arguments)
    if rule != "cps":                        # the authors return s, of which the step's std is s sqrt(D)
        D = scheduler.sigmas[k] - scheduler.sigmas[k + 1]
        std = std * D.sqrt().view_as(std)
    moved = velocity + 0.01 * torch.randn(LATENT)
    new = official(scheduler, moved, prev_sample=sample, **arguments)[1]

    def ours(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m, s = sde_transition(v, latents, sigmas[k], sigmas[k + 1], noise_level, rule, second_sigma=sigmas[1])
        return m, s, log_prob(sample, m, s, rule)

    our_mean, our_std, our_old = ours(velocity)
    return {"sigmas": float((sigmas - scheduler.sigmas).abs().max()),
            "mean, relative": relative(our_mean, mean), "std, relative": relative(our_std, std),
            "log-prob": float((our_old - old).abs().max()),
            "log-ratio of a moved policy": float((ours(moved)[2] - our_old - (new - old)).abs().max())}


# --------------------------------------------------------------------------------------- whole trajectories

def trajectories(checkout: Checkout, trials: int) -> list[Line]:
    """The authors' pipeline and this project's policy draw from the bundled model, from the same noise."""
    policy = Policy(find_place("assets/tiny-sd3"), torch.device("cpu"), resolution=(32, 64), lora_rank=0)
    path = "flow_grpo/diffusers_patch/sd3_pipeline_with_logprob{}.py"
    fast = checkout.has(path.format("_fast"))
    pipeline = checkout.module(path.format("_fast" if fast else "")).pipeline_with_logprob
    lines, times = [], max(1, trials // 100)
    for rule, argument in official_rules(checkout).items():
        for window in (0, 3) if fast else (0,):
            windows = dict(sde_window_size=window, sde_window_range=(0, 5)) if fast else {}
            worst = np.zeros(3)
            for _ in range(times):
                found = one_trajectory(checkout, policy, pipeline, rule, argument | windows)
                worst = np.maximum(worst, found)
            case = f"{rule}, " + (f"windows of {window}" if window else "all steps but the last")
            for name, difference, tolerance, note in zip(
                    ("latents", "log-probs", "pictures"), worst, (1e-3, 1e-4, 1),
                    ("each side encodes the prompts", "", "of 255")):
                lines.append(Line("Whole trajectories on the bundled model", f"{case}: {name}", 2 * times,
                                  difference, tolerance, note))
    return lines


def one_trajectory(checkout: Checkout, policy: Policy, pipeline: Callable, rule: str,
                   arguments: dict) -> tuple[float, float, float]:
    """The largest differences in the latents and log-probs that are trained on, and in the pictures."""
    prompts, steps = ['the word "lamp"', 'the word "oak"'], 10
    # Strong guidance would let a picture of this small model multiply rounding by 3 in each step.
    scale = random.choice([1.0, 2.0])
    noise = torch.randn(steps + 1, len(prompts), *policy.latent_shape)
    height, width = (size * policy.pipe.vae_scale_factor for size in policy.latent_shape[1:])
    policy.pipe.set_progress_bar_config(disable=True)
    with quiet(), patch.object(checkout.module(SDE_STEP), "randn_tensor", ReplayedNoise(noise[1:])):
        images, kept, log_probs, *timesteps = pipeline(
            policy.pipe, prompts, negative_prompt=[""] * len(prompts), guidance_scale=scale, height=height,
            width=width, num_inference_steps=steps, latents=noise[0], noise_level=0.7, output_type="pt",
            max_sequence_length=policy.max_sequence_length, **arguments)
    # The pipeline with windows returns the timesteps of its window. The one without adds noise in every step,
    # also in the last, which is not trained.
    first = policy.pipe.scheduler.timesteps.tolist().index(timesteps[0][0]) if timesteps else 0
    levels = torch.zeros(steps)
    levels[first:first + len(log_probs)] = 0.7
    S = min(len(log_probs), steps - 1)
    sigmas = timestep_schedule(steps, **policy.schedule_arguments(steps))
    ours = rollout(policy.velocity(policy.encode(prompts), scale), noise[0], sigmas, levels, noise[1:],
                   rule=rule, first_step=first, num_trained=S)
    pictures = (images * 255).round().permute(0, 2, 3, 1) - policy.decode(ours.final)
    return (float((torch.stack(kept[:S + 1]) - ours.latents).abs().max()),
            float((torch.stack(log_probs[:S]) - ours.log_probs).abs().max()), float(pictures.abs().max()))
