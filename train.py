"""Flow-GRPO training (arXiv 2505.05470): sample, reward, advantage, update, evaluate.

    torchrun --nproc_per_node=8 train.py [PRESET] [--field value ...]

Read `train` first; the file goes on in the order in which an epoch runs. harness/ keeps a run alive: `Run`
resumes, saves, and undoes an epoch that did not end; `@on_all_ranks` turns a failed reward, a stop signal or
a NaN on one rank into the same error on all. docs/departures.md lists the departures from the paper.
"""

from harness.program import run_as_program      # first, because it ends a Python that is too old in one line
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import distributed
from config import Config
from draws import (EVAL_NOISE, GROUP_NOISE, TRAIN_NOISE, EpochDraw, batches, draw_epoch, draw_noise,
                   draw_sigmas, noise_levels, rank_slice, training_batches)
from grpo import clipped_loss, gaussian_kl, guard_log_ratio, ratio_statistics, weighted_advantages
from harness.faults import LESS_MEMORY, on_all_ranks, skippable, tensors_of, within_memory
from harness.report import Statistics, mean_scores, progress, reward_metrics, spreads
from harness.run import Run, launch
from harness.scoring import Scorer, fill_unanswered
from learner import Learner
from matching import NoisedImages, NoisedRows, noise_again
from policy import Policy, Text, to_device
from prompts import Prompt
from sampler import Rows, Trajectory, replay, rollout, timestep_schedule


def main() -> int:
    """Start a run, train, and end: in one line and with an exit code, whatever happens."""
    return launch(sys.argv[1:], train, evaluate)


def train(run: Run) -> None:
    """Flow-GRPO, from the epoch after the last whole one to the last."""
    config, policy = run.config, run.policy
    group_ids = torch.arange(config.groups_per_epoch).repeat_interleave(config.group_size)       # (N,)
    for epoch in run.epochs_left():
        # An epoch counts whole or not at all. If it does not end, it is undone, or skipped where allowed.
        with run.all_or_nothing(epoch) as metrics:
            # 1. Draw this rank's part of the epoch's N samples, and 2. score their images beside that.
            samples = sample(policy, run.scorer, run.prompts, config, epoch)
            scores = distributed.gather_scores(samples.scores, samples.draw.indices, len(group_ids))   # (N,)
            fill_unanswered(scores, dict(config.rewards), group_ids)        # where a judge gave no score

            # 3. Compute by how much each sample beat the others of its prompt.
            advantages = weighted_advantages(scores, dict(config.rewards), group_ids,
                                             of=config.advantage_of, std=config.advantage_std)   # (N,)
            metrics |= reward_metrics(scores, group_ids)

            # 4. Update the policy: make steps that led to better images more likely.
            metrics |= update(run.learner, samples, advantages, config, epoch)
            del samples                        # because the next epoch's trajectories need their memory
        # Log, evaluate and save, as far as they are due.
        run.conclude(metrics)


# --------------------------------------------------------------------------------------------------- sampling

@dataclass
class Samples:
    """This rank's samples of an epoch, in the order in which they were sampled."""
    draw: EpochDraw
    prompts: list[Prompt]              # of each sample
    trajectory: Trajectory | NoisedImages | None      # of all samples; None if this rank has none
    scores: dict[str, np.ndarray]      # reward or metric -> (n,) float32; "thumbnail" -> (n, 3, 8, 8)


@on_all_ranks
@within_memory(LESS_MEMORY.format("rollout-batch"))
def sample(policy: Policy, scorer: Scorer, prompts: list[Prompt], config: Config, epoch: int) -> Samples:
    """Draw this rank's samples. Rewards score a batch's images while the next one is drawn."""
    draw = draw_epoch(config, len(prompts), epoch, distributed.rank(), distributed.world_size())
    prompt_of = {i: prompts[draw.prompts[i // config.group_size]] for i in draw.indices}
    sigmas = timestep_schedule(config.num_steps, **policy.schedule_arguments(config.num_steps),
                               dtype=policy.compute_dtype)                                       # (T + 1,)
    policy.cache_text([p.text for p in prompt_of.values()], config.guidance_scale)
    starts = shared_starts(policy, draw, prompts, sigmas, config, epoch) if config.shared_start_noise else {}
    trajectories = []
    for batch in progress(draw.rollout_batches, "sample"):                  # B samples
        # Draw start noise, and the noise of each step. Outside a sample's window the noise level is 0.
        noise = draw_noise(config.seed, TRAIN_NOISE, epoch, batch, config.num_steps + 1, policy.latent_shape)
        noise = to_device(noise.to(policy.compute_dtype), policy.device)    # (T + 1, B, C, H, W)
        first_step = draw.first_steps[[i // config.group_size for i in batch]]  # (B,)
        start, start_step = noise[0], 0

        # A group that shares its start has taken the ODE's steps before its window, once for all its samples.
        if config.shared_start_noise:
            start = torch.stack([starts[i // config.group_size] for i in batch])                # (B, C, H, W)
            start_step = int(first_step[0])                                 # the batch has one common window

        # Draw samples, and keep the latents and log-probs of the trained steps.
        velocity = policy.velocity(policy.encode([prompt_of[i].text for i in batch]), config.guidance_scale)
        trajectory = rollout(
            velocity, start, sigmas, noise_levels(first_step, config), noise[1:], rule=config.rule,
            first_step=first_step, num_trained=config.trained_steps if config.objective == "grpo" else 0,
            start_step=start_step, keep_means=config.guard)

        # Decode them, and let the rewards score them in their own thread.
        scorer.submit(policy.decode(trajectory.final), trajectory.final, [prompt_of[i] for i in batch],
                      f"epoch {epoch}", {"samples": torch.tensor(batch), **tensors_of(trajectory)})
        # AWM trains no steps, but the image: noise it again, by noise that the ODE had no use for.
        if config.objective == "awm":
            row_sigmas = to_device(draw_sigmas(config, epoch, batch, sigmas), policy.device)     # (S, B)
            trajectory = noise_again(velocity, trajectory.final, row_sigmas, noise[1:])
        trajectories.append(trajectory)
    return Samples(draw, prompts=list(prompt_of.values()), scores=scorer.collect(),
                   trajectory=trajectories[0].concatenate(trajectories) if trajectories else None)


def shared_starts(policy: Policy, draw: EpochDraw, prompts: list[Prompt], sigmas: Tensor, config: Config,
                  epoch: int) -> dict[int, Tensor]:
    """Group -> latents (C, H, W) that all its samples share: its start noise after the ODE's first steps.

    Samples of a group then differ only in what the window changes. So their advantage cannot push what first
    steps decide, such as the background, and the policy keeps its diversity.
    """
    groups = list(dict.fromkeys(i // config.group_size for i in draw.indices))                  # of this rank
    if not groups:
        return {}
    latents = draw_noise(config.seed, GROUP_NOISE, epoch, groups, 1, policy.latent_shape)[0]
    latents = latents.to(policy.device, policy.compute_dtype)               # (groups, C, H, W)
    for step in range(int(draw.first_steps[groups].max())):
        before_window = [k for k, g in enumerate(groups) if draw.first_steps[g] > step]
        for batch in batches(before_window, config.rollout_batch):
            text = policy.encode([prompts[draw.prompts[groups[k]]].text for k in batch])
            velocity = policy.velocity(text, config.guidance_scale)
            latents[batch] = rollout(velocity, latents[batch], sigmas[step:step + 2], 0.0, None).final
    return dict(zip(groups, latents))


# --------------------------------------------------------------------------------------------------- training

@within_memory(LESS_MEMORY.format("train-batch"))
def update(learner: Learner, samples: Samples, advantages: Tensor, config: Config,
           epoch: int) -> dict[str, float]:  # all ranks
    """Take U optimizer steps, each on its part of the samples. Returns statistics. advantages: (N,)."""
    statistics = Statistics()
    learner.begin_updates(epoch)
    for u in statistics.updates_left(config.updates_per_epoch):
        # The loss is the mean over the update's rows on all ranks.
        num_rows = len(range(u, len(advantages), config.updates_per_epoch)) * config.trained_steps
        mine = training_batches(samples.draw, u, advantages, config)
        backward = lambda batch: add_gradients(learner, samples, advantages, num_rows, config, batch)

        # An update that is not finite is left out if that is allowed. Otherwise it ends the run.
        with skippable(learner, samples, mine, backward, advantages, f"epoch {epoch}, update {u}", statistics,
                       config):
            for batch in progress(mine, "train"):
                statistics.add(**backward(batch))
            # All ranks meet: first their statistics and stop flags, then their gradients, parts of one mean.
            statistics.end_backward(num_rows)
            distributed.sum_gradients(learner.policy.parameters)
            statistics.check_ratio(not learner.started, config, epoch)
            statistics.end_update(*learner.step(config.max_grad_norm))
    return statistics.metrics()


def add_gradients(learner: Learner, samples: Samples, advantages: Tensor, num_rows: int, config: Config,
                  batch: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    """Add a batch's part to the gradient of an update's mean loss. Returns what is watched, (M,) each."""
    policy, (positions, steps) = learner.policy, batch
    text = policy.encode([samples.prompts[j].text for j in positions])
    A = advantages[[samples.draw.indices[j] for j in positions]].to(policy.compute_dtype)        # (M,)
    rows = samples.trajectory.rows(steps, positions)
    loss, watched = step_loss(policy, rows, text, to_device(A, policy.device), config)
    learner.scaler.scale(loss.sum() / num_rows).backward()
    return watched


def step_loss(policy: Policy, rows: Rows | NoisedRows, text: Text, A: Tensor,
              config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of M rows, and what is watched: each (M,). 2505.05470, eq. 5 and 10."""
    # Replay the steps: how likely would the present policy have taken them? (M,), (M, C, H, W), (M, 1, 1, 1)
    log_prob, mean, std = replay(policy.velocity(text, config.guidance_scale), rows)
    old_log_prob = rows.log_prob                                            # (M,)
    D = rows.sigma - rows.sigma_next                                        # (M,)

    # GRPO-Guard (2510.22319) uses a centred log-ratio, not a difference of log-probs, and divides by D.
    if config.guard:
        log_prob = guard_log_ratio(rows.next_latents, mean, rows.mean, std)
        old_log_prob = torch.zeros_like(log_prob)
    loss = clipped_loss(log_prob, old_log_prob, A, config.clip_range)       # (M,)
    if config.guard:
        loss = loss / D
    watched = {"policy_loss": loss, **ratio_statistics(log_prob, old_log_prob, config.clip_range)}

    # Add the KL to the reference, the policy without its adapter, which replays the same steps.
    if config.beta:
        _, reference_mean, _ = replay(policy.reference_velocity(text, config.guidance_scale), rows)
        if config.kl == "per_time" and rows.rule != "cps":                  # because cps is no SDE
            std = std / D.sqrt().view_as(std)                               # s = std / sqrt(D)
        kl = gaussian_kl(mean, reference_mean, std)                         # (M,)
        loss, watched["kl"] = loss + config.beta * kl, kl
    return loss, watched


# ------------------------------------------------------------------------------------------------- evaluation

def evaluate(learner: Learner, scorer: Scorer, prompts: list[Prompt],
             config: Config) -> tuple[dict[str, float], np.ndarray, dict[str, list[float]]]:  # all ranks
    """Return metrics of the held-out prompts, each counted once, and the first images and their scores."""
    mine = list(rank_slice(len(prompts), distributed.rank(), distributed.world_size()))
    scores, kept = evaluate_slice(learner, scorer, prompts, mine, config)
    images = np.concatenate(distributed.gather_objects(kept.numpy()))       # by rank, and so by prompt
    scores = distributed.gather_scores(scores, mine, len(prompts))          # name -> (prompts,)
    metrics = mean_scores("eval", scores) | spreads("eval", scores.pop("thumbnail"))
    return metrics, images, {name: v[:len(images)].tolist() for name, v in scores.items() if name != "drift"}


@on_all_ranks
@within_memory(LESS_MEMORY.format("rollout-batch"))
def evaluate_slice(learner: Learner, scorer: Scorer, prompts: list[Prompt], mine: list[int],
                   config: Config) -> tuple[dict[str, np.ndarray], Tensor]:
    """Scores and first images of this rank's held-out prompts `mine`, by the averaged weights and the ODE."""
    policy, steps = learner.policy, config.eval_num_steps
    policy.cache_text([prompts[i].text for i in mine], config.guidance_scale)
    sigmas = timestep_schedule(steps, **policy.schedule_arguments(steps), dtype=policy.compute_dtype)
    kept = [torch.zeros(0, *config.resolution, 3, dtype=torch.uint8, device=policy.device)]
    with learner.average.applied():
        for batch in progress(batches(mine, config.rollout_batch), "evaluate"):
            # Each prompt has its own noise, whatever the run's seed is, so that runs can be compared.
            noise = draw_noise(0, EVAL_NOISE, 0, batch, 1, policy.latent_shape)
            noise = noise[0].to(policy.device, policy.compute_dtype)        # (B, C, H, W)
            text = policy.encode([prompts[i].text for i in batch])
            latents = rollout(policy.velocity(text, config.guidance_scale), noise, sigmas, 0.0, None).final
            images = policy.decode(latents)                                 # (B, H, W, 3) uint8
            scorer.submit(images, latents, [prompts[i] for i in batch], "evaluation", {"latents": latents},
                          drift=policy.drift(text, noise, config.guidance_scale))
            kept.append(images[:max(0, config.eval_images - batch[0])])
    return scorer.collect(), torch.cat(kept).cpu()


if __name__ == "__main__":
    run_as_program(main)
