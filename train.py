"""Flow-GRPO training (arXiv 2505.05470): sample, reward, advantage, update, log, evaluate, save.

    torchrun --nproc_per_node=8 train.py [PRESET] [--field value ...]

What departs from the paper or from its authors' implementation:
- Samples are split among an epoch's updates by their index, not by a random permutation; the images of a group are exchangeable.
- Where beta is 0, samples with zero advantage add nothing and are not replayed (in half precision only to fill the last batch),
  but they stay in the denominator. The authors' code drops such samples and averages over the rest.
- Latents are kept in float32 between steps. Rounded to half precision, a stored log-prob belongs to another sample.
- Noise is drawn per (seed, epoch, sample), so that a run does not depend on the number of ranks or on the micro-batches.
"""

import functools
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import distributed
from config import Config, parse_config, validate
from distributed import LostRank, is_main
from grpo import clipped_loss, gaussian_kl, group_advantages, guard_log_ratio, ratio_statistics, zero_variance_groups
from harness import signals
from harness.batches import batch_plan, choose_batches, describe, steps_at_once
from harness.faults import LESS_MEMORY, DoesNotFit, within_memory
from harness.checkpoint import (
    Record, checkpoint_path, cut_metrics, load_state, newest_whole, open_run, try_write, write_metrics, write_settings)
from harness.gallery import Display
from harness.program import leave, run_as_program
from learner import Learner, learning_rate
from policy import Policy, Text, check_model, find_adapter, to_device, to_host
from prompts import Prompt, epoch_prompt_indices, load_prompts
from rewards import NonFiniteScore, RewardError, Rewards, build_rewards, check_reward_prompts, check_reward_weights
from sampler import Trajectory, Velocity, replay, rollout, timestep_schedule

TRAIN_NOISE, EVAL_NOISE, WINDOW, GROUP_NOISE = range(4)      # what a random stream is for: no two share numbers


class TrainingError(RuntimeError):
    """A run that cannot go on; one line."""


class NonFinite(TrainingError):
    """A latent, loss or gradient that is no number, or infinite; on all ranks alike, before the weights changed."""


class Interrupted(Exception):
    """A signal asked the run to stop; on all ranks alike."""

    def __init__(self, what: str = "stopped by a signal"):
        super().__init__(what)


# ------------------------------------------------------------------------------------------------------- randomness

def generator(*key: int) -> torch.Generator:
    """An independent random stream for every key, on every machine the same."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def draw_noise(seed: int, purpose: int, epoch: int, samples: list[int], count: int, shape: tuple) -> Tensor:
    """Standard normal (count, B, *shape) float32; a sample's noise depends on nothing but (seed, purpose, epoch, sample)."""
    return torch.stack([torch.randn(count, *shape, generator=generator(seed, purpose, epoch, i)) for i in samples], 1)


def draw_windows(config: Config, epoch: int) -> Tensor:
    """First trained step of each group (groups_per_epoch,): 0 without a window, else anew for each group and epoch."""
    if not config.window_size:
        return torch.zeros(config.groups_per_epoch, dtype=torch.long)
    first, last = config.window_range
    return torch.randint(first, last - config.window_size + 1, (config.groups_per_epoch,),
                         generator=generator(config.seed, WINDOW, epoch))


# ---------------------------------------------------------------------------------------------------------- sampling

@dataclass
class Samples:
    """This rank's samples of an epoch. `indices` tells where each stands among all; sample i belongs to update i % U."""

    indices: list[int]
    prompts: list[Prompt]
    trajectory: Trajectory
    scores: dict[str, np.ndarray]      # reward or metric -> (samples of this rank,) float32


def sample_epoch(policy: Policy, rewards: Rewards, prompts: list[Prompt], sigmas: Tensor, config: Config, epoch: int,
                 scorer: ThreadPoolExecutor) -> Samples | None:
    """Sample and score this rank's share; rewards of one micro-batch are computed beside the sampling of the next, where that is faster."""
    plan = batch_plan(config, distributed.world_size())
    chosen = [prompts[i] for i in epoch_prompt_indices(len(prompts), config.groups_per_epoch, config.seed, epoch - 1)]
    windows, steps = draw_windows(config, epoch), torch.arange(config.num_steps)
    mine = share_of_samples(windows, config, distributed.rank(), distributed.world_size())
    groups = sorted({i // config.group_size for i in mine})
    policy.cache_text([chosen[g].text for g in groups], config.guidance_scale)
    starts = shared_starts(policy, chosen, groups, windows, sigmas, config, epoch) if config.shared_start_noise and mine else None

    # In half precision a batch holds samples of one update, so that replay meets the batches of the rollout where their sizes agree;
    # where samples go on from their window's first step, it holds those of one window.
    def kind(i: int) -> tuple[int, int]:
        return i % config.updates_per_epoch if config.half_precision else 0, int(windows[i // config.group_size]) if starts else 0

    mine = sorted(mine, key=kind)
    parts = [list(part) for _, part in itertools.groupby(mine, kind)]
    trajectories, pending, before_next = [], [], wait_for_scores if takes_turns(policy, config) else raise_failed
    for batch in progress([batch for part in parts for batch in batches(part, config.rollout_batch)], "sample"):
        if signals.stop_asked():
            raise Interrupted
        drawn = [chosen[i // config.group_size] for i in batch]
        first_step = windows[[i // config.group_size for i in batch]]                                    # (B,)
        noise_levels = torch.full((config.num_steps, len(batch)), config.noise_level, dtype=policy.compute_dtype)
        if config.window_size:                                                                           # elsewhere the ODE
            inside = (steps[:, None] >= first_step) & (steps[:, None] < first_step + config.window_size)  # (T, B)
            noise_levels = noise_levels * inside
        noise = draw_noise(config.seed, TRAIN_NOISE, epoch, batch, config.num_steps + 1, policy.latent_shape)
        noise = to_device(noise.to(policy.compute_dtype), policy.device)
        start, start_step = noise[0], 0
        if starts:
            start, start_step = torch.stack([starts[i // config.group_size] for i in batch]), int(first_step[0])
        velocity = stoppable(policy.velocity(policy.encode([p.text for p in drawn]), config.guidance_scale))
        trajectory = rollout(velocity, start, sigmas, noise_levels, noise[1:], config.rule, first_step, plan.trained_steps,
                             start_step, keep_means=config.guard)
        arrived = to_host(trajectory.final.isfinite().flatten(1).all(1), policy.decode(trajectory.final))
        evidence = {"samples": torch.tensor(batch), **tensors_of(trajectory)}
        trajectories.append(trajectory)
        pending.append(scorer.submit(score, rewards, arrived, drawn, config, f"epoch {epoch}", evidence))
        before_next(pending)
    if not mine:
        return None
    return Samples(mine, [chosen[i // config.group_size] for i in mine], Trajectory.concatenate(trajectories),
                   collect(pending))


def share_of_samples(windows: Tensor, config: Config, rank: int, world_size: int) -> list[int]:
    """The samples of a rank: a contiguous part of all in the groups' order, so that whole groups stay together as far as they can.

    From a shared start a group is the less work, the later its window begins: there groups are dealt out in that order, to and fro.
    Not so where an update takes unequal parts of the groups: ranks of equal work would then wait for each other in each update.
    """
    groups = list(range(config.groups_per_epoch))
    if config.shared_start_noise and config.group_size % config.updates_per_epoch == 0:
        in_order = sorted(groups, key=lambda g: int(windows[g]))
        groups = [g for r in range(world_size) for k, g in enumerate(in_order)
                  if r in (k % (2 * world_size), -(k + 1) % (2 * world_size))]                           # 0 1 2 2 1 0 0 1 2 ...
    samples = [g * config.group_size + k for g in groups for k in range(config.group_size)]
    return [samples[j] for j in distributed.share(len(samples), rank, world_size)]


def shared_starts(policy: Policy, chosen: list[Prompt], groups: list[int], windows: Tensor, sigmas: Tensor, config: Config,
                  epoch: int) -> dict[int, Tensor]:
    """Group -> the latents (C, H, W) that all its images share: the group's start noise, taken by the ODE to its window."""
    latents = draw_noise(config.seed, GROUP_NOISE, epoch, groups, 1, policy.latent_shape)[0]
    latents = latents.to(policy.device, policy.compute_dtype)                                            # (G, C, H, W)
    for step in range(int(windows[groups].max())):
        under_way = [k for k, g in enumerate(groups) if windows[g] > step]
        for batch in batches(under_way, config.rollout_batch):
            velocity = stoppable(policy.velocity(policy.encode([chosen[groups[k]].text for k in batch]), config.guidance_scale))
            latents[batch] = rollout(velocity, latents[batch], sigmas[step:step + 2], 0.0, None).final
    return dict(zip(groups, latents))


def stoppable(velocity: Velocity) -> Velocity:
    """The same, but a signal waits for one call of a large network at most, not for a whole rollout."""
    def checked(latents: Tensor, sigma: Tensor) -> Tensor:
        if signals.stop_asked():
            raise Interrupted
        return velocity(latents, sigma)
    return checked


def join_scores(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One dict of several micro-batches'; a metric that a batch says nothing about is NaN there."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: np.concatenate([part.get(name, np.full_like(part["total"], np.nan)) for part in parts]) for name in names}


def score(rewards: Rewards, arrived: Callable[[], list[Tensor]], prompts: list[Prompt], config: Config, where: str,
          evidence: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """In a thread of its own, which waits for the device while the next micro-batch is on its way to it.

    arrived: which latents are finite (B,), and the images (B, H, W, 3). What is not finite is saved: for latents `evidence`, for
    scores the pictures. `where` is the epoch, or an evaluation.
    """
    finite, images = arrived()
    if not finite.all():
        path = save_evidence(config, where, prompts, **evidence)
        raise NonFinite(f"{where}: latents are not finite for prompt {prompts[int(finite.int().argmin())].text!r}; tensors are in "
                        f"{path}; lower --learning-rate, or in float16 use --dtype bfloat16")
    try:
        return rewards(images.numpy(), [p.text for p in prompts], [p.metadata for p in prompts])
    except NonFiniteScore as error:
        path = save_evidence(config, where, prompts, images=images)
        raise NonFiniteScore(f"{where}: {error}; the pictures are in {path}") from error


def takes_turns(policy: Policy, config: Config) -> bool:
    """Whether sampling waits for scoring: on a rank of one core that computes its rewards itself, the two at once would only share
    the core, and slow each other down."""
    return policy.device.type == "cpu" and distributed.cores() <= 1 and not config.reward_urls


def wait_for_scores(pending: list[Future]) -> None:
    """Until all scores are there, or one has failed, which is raised; a signal waits for no slow reward."""
    while wait(pending, timeout=0.2).not_done:
        raise_failed(pending)
        if signals.stop_asked():
            raise Interrupted
    raise_failed(pending)


def raise_failed(pending: list[Future]) -> None:
    """A reward that failed stops the run now, not after all sampling is done."""
    for future in pending:
        if future.done():
            future.result()


def collect(pending: list[Future]) -> dict[str, np.ndarray]:
    """The scores of all micro-batches, as one."""
    wait_for_scores(pending)
    return join_scores([future.result() for future in pending])


def scoring_thread(device: torch.device) -> ThreadPoolExecutor:
    """In which rewards run beside the sampling, on this rank's GPU: what is current is each thread's own."""
    return ThreadPoolExecutor(1, initializer=torch.cuda.set_device if device.type == "cuda" else None, initargs=(device,))


# ---------------------------------------------------------------------------------------------------------- training

def train_epoch(learner: Learner, samples: Samples | None, advantages: Tensor, config: Config, epoch: int) -> dict[str, float]:
    """All updates of an epoch on its samples; `advantages` (N,) is global. Metrics are over all ranks."""  # all ranks
    policy, plan = learner.policy, batch_plan(config, distributed.world_size())
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    metrics, grad_norms, overflows, skipped, trained = {}, [], 0, 0, 0
    bar = progress(None, "train", plan.train_batches)
    for update in range(config.updates_per_epoch):
        in_update = len(range(update, plan.samples, config.updates_per_epoch))                           # over all ranks
        terms = in_update * plan.trained_steps
        mine = [] if samples is None else [j for j, i in enumerate(samples.indices) if i % config.updates_per_epoch == update]
        if not config.beta:      # what has no advantage adds nothing, but in half precision a batch of another size changes bits
            live, idle = ([j for j in mine if (advantages[samples.indices[j]] != 0) == wanted] for wanted in (True, False))
            mine = live + (idle[:-len(live) % config.train_batch] if config.half_precision else [])
        statistics = Statistics(policy.compute_dtype)
        for batch in batches(mine, config.train_batch):
            if signals.stop_asked():
                break
            accumulate_gradients(learner, samples, batch, advantages, terms, statistics, config)
            bar.update()
        if distributed.any_rank(signals.stop_asked()):                    # before the gradients, on which a GPU waits for all
            bar.close()
            raise Interrupted
        distributed.sum_gradients(policy.parameters)
        averages, ratio_deviation = statistics.over_all_ranks(terms)
        quantity = "" if np.isfinite(list(averages.values())).all() else "loss"
        if not quantity:
            if update == 0:                                                   # the policy that sampled: the ratio must be 1
                metrics["ratio_deviation_before"] = ratio_deviation
                check_ratio(learner, ratio_deviation, config, epoch)
            grad_norm = learner.update(config.max_grad_norm)
            overflow = learner.scaler.is_enabled() and learner.scaler.get_scale() >= 1        # below, scaling is not to blame
            if not np.isfinite(grad_norm) and not overflow:
                quantity = "gradient"
        if quantity:
            bar.clear()
            learner.skip(find_non_finite(learner, samples, mine, advantages, terms, config, epoch, update, quantity), 1)
            skipped += 1
            continue
        learner.started = True
        if np.isfinite(grad_norm):
            grad_norms.append(grad_norm)
        else:
            overflows += 1                                                    # float16: the scaler skipped this step
        for name, value in averages.items():
            metrics[name] = metrics.get(name, 0.0) + value * in_update
        trained += in_update
        metrics["ratio_deviation"] = max(metrics.get("ratio_deviation", 0.0), ratio_deviation)
    bar.close()
    metrics |= {name: metrics[name] / trained for name in Statistics.NAMES if trained}                   # means over the samples
    return {**metrics, "grad_norm": float(np.mean(grad_norms)) if grad_norms else 0.0, "overflows": overflows,
            "skipped_updates": skipped}


def check_ratio(learner: Learner, deviation: float, config: Config, epoch: int) -> None:
    """Say how far from 1 the ratio is before a run's first update, and warn in any epoch where it is too far."""
    if not learner.started:
        say(f"before the first update, max |ratio - 1| is {deviation:.1e}; clip_range is {config.clip_range:g}")
    if deviation > config.clip_range and is_main():
        tqdm.write(f"warning: before the first update of epoch {epoch} a ratio is {deviation:.1e} from 1, more than clip_range "
                   f"{config.clip_range:g}; usual causes: batches of other sizes in training than in the rollout, above all in "
                   "half precision; another dtype here than there; dropout", file=sys.stderr)


def accumulate_gradients(learner: Learner, samples: Samples, batch: list[int], advantages: Tensor, terms: int,
                         statistics: "Statistics", config: Config) -> None:
    """Add one micro-batch's part to the gradient of the mean over `terms` (sample, step) pairs, all ranks."""
    policy, trajectory = learner.policy, samples.trajectory.select(batch)
    text = policy.encode([samples.prompts[j].text for j in batch])
    velocity = of_several_steps(policy.velocity, text, config)
    reference_means = replay_reference(policy, trajectory, text, config) if config.beta else None
    A = advantages[[samples.indices[j] for j in batch]].to(policy.device, policy.compute_dtype)          # (B,)
    # Half precision takes one step at a time, as the rollout did: a batch of another size would change the ratio.
    for steps in divide_steps(trajectory, 1 if config.half_precision else config.train_batch):
        if signals.stop_asked():             # what is missing is of no use then: see train_epoch
            return
        taken = trajectory.single_steps(steps)                                                           # M = len(steps) B samples
        log_prob, mean, std = replay(velocity(len(steps)), taken, 0)                                     # (M,), (M, C, H, W)
        old_log_prob = taken.log_probs[0]
        delta = taken.sigmas[taken.first_step] - taken.sigmas[taken.first_step + 1]                      # (M,)
        if config.guard:
            log_prob = guard_log_ratio(taken.latents[1], mean, taken.means[0], std)
            old_log_prob = torch.zeros_like(log_prob)
        policy_loss = clipped_loss(log_prob, old_log_prob, A.repeat(len(steps)), config.clip_range)      # (M,)
        if config.guard:
            policy_loss = policy_loss / delta
        loss, kl = policy_loss, torch.zeros_like(policy_loss)
        if reference_means is not None:
            if config.kl == "per_time":                                                                  # s = std / sqrt(D)
                std = std / delta.sqrt().view_as(std)
            kl = gaussian_kl(mean, reference_means[steps.start:steps.stop].flatten(0, 1), std)           # (M,)
            loss = policy_loss + config.beta * kl
        learner.scaler.scale(loss.sum() / terms).backward()
        statistics.add(policy_loss=policy_loss, kl=kl, **ratio_statistics(log_prob, old_log_prob, config.clip_range))


@torch.no_grad()
def replay_reference(policy: Policy, trajectory: Trajectory, text: Text, config: Config) -> Tensor:
    """Means (S, B, C, H, W) of the trained steps under the reference; as many steps in one call as make up a rollout's batch."""
    velocity = of_several_steps(policy.reference_velocity, text, config)
    means = [replay(velocity(len(steps)), trajectory.single_steps(steps), 0)[1]
             for steps in divide_steps(trajectory, config.rollout_batch)]
    return torch.cat(means).view(-1, *trajectory.final.shape)


def divide_steps(trajectory: Trajectory, size: int) -> list[range]:
    """The trained steps, as they go together into calls of up to `size` samples, or of one step."""
    S, B = trajectory.log_probs.shape
    return batches(range(S), steps_at_once(S, B, size))


def of_several_steps(velocity: Callable[[Text, float], Velocity], text: Text, config: Config) -> Callable[[int], Velocity]:
    """Number of steps -> the velocity of all the text's samples at so many of them in one call."""
    return functools.cache(lambda count: velocity(tuple(torch.cat([part] * count) for part in text), config.guidance_scale))


# ------------------------------------------------------------------------------------------------- what is not finite

def find_non_finite(learner: Learner, samples: Samples | None, mine: list[int], advantages: Tensor, terms: int, config: Config,
                    epoch: int, update: int, quantity: str) -> NonFinite:  # all ranks
    """The error for an update whose loss or gradient is not finite: where, and what to look at.

    Nothing is kept for this while training: this rank's part `mine` of the update is computed again, batch by batch, and the first
    batch that is not finite again sample by sample.
    """
    policy = learner.policy

    def finite(batch: list[int]) -> bool:
        statistics = Statistics(policy.compute_dtype)
        learner.optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(learner, samples, batch, advantages, terms, statistics, config)
        sound = bool(torch.stack([value.cpu() for value in statistics.sums.values()]).isfinite().all())
        return sound and (quantity == "loss" or all(p.grad.isfinite().all() for p in policy.parameters if p.grad is not None))

    found = None
    for batch in batches(mine, config.train_batch):
        if not finite(batch):
            worst = next((j for j in batch if not finite([j])), batch[0])
            prompts, trajectory = [samples.prompts[j] for j in batch], samples.trajectory.select(batch)
            velocity = policy.velocity(policy.encode([p.text for p in prompts]), config.guidance_scale)
            with torch.no_grad():
                again = [replay(velocity, trajectory, k) for k in range(len(trajectory.log_probs))]
            found = samples.prompts[worst].text, save_evidence(
                config, f"epoch {epoch}", prompts, samples=torch.tensor([samples.indices[j] for j in batch]),
                advantages=advantages[[samples.indices[j] for j in batch]], **tensors_of(trajectory),
                log_probs_again=torch.stack([log_prob for log_prob, _, _ in again]),
                means_again=torch.stack([mean for _, mean, _ in again]))
            break
    learner.optimizer.zero_grad(set_to_none=True)
    where = f"the {quantity} of epoch {epoch}, update {update} is not finite"
    for rank, said in enumerate(distributed.gather_objects(found)):
        if said:
            return NonFinite(f"{where} on rank {rank} for prompt {said[0]!r}: the weights were left as they are; tensors are in "
                             f"{said[1]}; lower --learning-rate or --noise-level, or in float16 use --dtype bfloat16")
    return NonFinite(f"{where}, but every batch of it was when computed again: the weights were left as they are; suspect memory "
                     "or another part of the machine")


def tensors_of(trajectory: Trajectory) -> dict[str, Tensor]:
    return {name: value for name, value in vars(trajectory).items() if isinstance(value, Tensor)}


def save_evidence(config: Config, where: str, prompts: list[Prompt], **tensors: Tensor) -> Path:
    """A safetensors file of a batch that is not finite, its prompts as json in the metadata; the latest of a rank and epoch."""
    name = f"{where.replace(' ', '_')}_rank_{distributed.rank()}.safetensors"
    path = Path(config.output_dir) / config.run_name / "nonfinite" / name

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path,
                  {"prompts": json.dumps([p.text for p in prompts])})

    try_write(str(path), write)
    return path


class Statistics:
    """Sums over (sample, step) pairs, and the largest ratio deviation, kept on the device until asked for."""

    NAMES = ("policy_loss", "kl", "approx_kl", "clip_fraction_high", "clip_fraction_low", "ratio")

    def __init__(self, dtype: torch.dtype):
        self.sums: dict[str, Tensor] = {name: torch.zeros((), dtype=torch.float64) for name in self.NAMES}
        self.terms = 0
        self.largest = torch.zeros((), dtype=dtype)

    def add(self, ratio_deviation: Tensor, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name].to(value.device) + value.detach().double().sum()
        self.terms += len(ratio_deviation)
        self.largest = torch.maximum(self.largest.to(ratio_deviation), ratio_deviation.max())

    def over_all_ranks(self, terms: int) -> tuple[dict[str, float], float]:  # all ranks
        """Averages over `terms`, to which the pairs left out for their zero advantage add a ratio of 1; largest deviation."""
        sums = torch.stack([*(self.sums[name].cpu() for name in self.NAMES), torch.tensor(float(self.terms)).double()])
        *sums, counted = distributed.sum_over_ranks(sums).tolist()
        averages = {name: value / terms for name, value in zip(self.NAMES, sums)}
        averages["ratio"] += (terms - counted) / terms
        return averages, distributed.max_over_ranks(self.largest.double().cpu()).item()


# -------------------------------------------------------------------------------------------------------- evaluation

def evaluate_share(learner: Learner, rewards: Rewards, prompts: list[Prompt], config: Config,
                   scorer: ThreadPoolExecutor) -> tuple[dict[str, np.ndarray], Tensor]:
    """Scores and first images of this rank's share of the held-out prompts, by averaged weights and the ODE.

    Every prompt has noise of its own, which does not depend on the run's seed, so that runs can be compared.
    """
    policy = learner.policy
    mine = distributed.share(len(prompts), distributed.rank(), distributed.world_size())
    policy.cache_text([prompts[i].text for i in mine], config.guidance_scale)
    sigmas = timestep_schedule(config.eval_num_steps, **policy.schedule_arguments(config.eval_num_steps),
                               dtype=policy.compute_dtype)
    kept, pending = [torch.zeros(0, *config.resolution, 3, dtype=torch.uint8, device=policy.device)], []
    before_next = wait_for_scores if takes_turns(policy, config) else raise_failed
    with learner.average.applied():
        for batch in progress(batches(list(mine), config.rollout_batch), "evaluate"):
            if signals.stop_asked():
                raise Interrupted
            drawn = [prompts[i] for i in batch]
            noise = draw_noise(0, EVAL_NOISE, 0, batch, 1, policy.latent_shape).to(policy.device, policy.compute_dtype)
            velocity = stoppable(policy.velocity(policy.encode([p.text for p in drawn]), config.guidance_scale))
            latents = rollout(velocity, noise[0], sigmas, 0.0, None).final
            images = policy.decode(latents)
            arrived = to_host(latents.isfinite().flatten(1).all(1), images)
            pending.append(scorer.submit(score, rewards, arrived, drawn, config, "evaluation", {"latents": latents}))
            before_next(pending)
            kept.append(images[:max(0, config.eval_images - batch[0])])
    return collect(pending), torch.cat(kept).cpu()


def evaluate(learner: Learner, rewards: Rewards, prompts: list[Prompt], config: Config,
             scorer: ThreadPoolExecutor) -> tuple[dict[str, float], np.ndarray, dict[str, list[float]]]:  # all ranks
    """Mean scores of the held-out prompts, each of which counts once; the first `eval_images` images, and their scores."""
    scores, kept = together(evaluate_share, learner, rewards, prompts, config, scorer)
    rows = distributed.share(len(prompts), distributed.rank(), distributed.world_size())
    images = distributed.gather_rows(kept, list(rows)[:len(kept)], min(config.eval_images, len(prompts)))
    scores = gather_scores(scores, rows, len(prompts))
    return means("eval", scores), images.numpy(), {name: values[:len(images)].tolist() for name, values in scores.items()}


# ------------------------------------------------------------------------------------------------------ across the ranks

def gather_scores(scores: dict[str, np.ndarray], rows, total: int) -> dict[str, Tensor]:  # all ranks
    """Every sample's scores and metrics on every rank, name -> (total,) float32, of which this rank has `rows`."""
    names = dict.fromkeys(name for rank in distributed.gather_objects(list(scores)) for name in rank)
    nothing = np.full(len(rows), np.nan, np.float32)
    return {name: distributed.gather_rows(torch.from_numpy(scores.get(name, nothing)), list(rows), total) for name in names}


def means(prefix: str, scores: dict[str, Tensor]) -> dict[str, float]:
    """Mean of each score and metric, over the samples that it says something about."""
    return {f"{prefix}/{name}": values.double().nanmean().item() for name, values in scores.items()
            if not values.isnan().all()}


def together(task: Callable, *arguments):  # all ranks
    """What `task` returns; or, where it failed or was interrupted on any rank, the same error on all of them."""
    result = failure = None
    try:
        result = task(*arguments)
    except (RewardError, NonFinite, Interrupted) as error:
        failure = error
    # A launcher signals all processes of a worker, so a reward's own ones end too, and it fails for no reason of its own.
    if signals.stop_asked() and not isinstance(failure, NonFinite):
        failure = Interrupted()
    failures = [(rank, error) for rank, error in enumerate(distributed.gather_objects(failure)) if error is not None]
    for rank, error in sorted(failures, key=lambda failed: isinstance(failed[1], Interrupted)):          # errors first
        raise error if isinstance(error, Interrupted) else type(error)(f"rank {rank}: {error}")
    return result


# --------------------------------------------------------------------------------------------------------- the loop

def batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[i:i + size] for i in range(0, len(items), size)]


def in_words(config: Config, policy: Policy) -> str:
    """The batch plan."""
    return describe(config, distributed.world_size(), policy.branches(config.guidance_scale))


def progress(items: list | None, what: str, total: int | None = None) -> tqdm:
    return tqdm(items, desc=what, total=total, leave=False, disable=None if is_main() else True)     # None: only on a terminal


def prepare(arguments: list[str]) -> tuple[str, Config, list[Prompt], list[Prompt]]:
    """Everything that can be found wrong before a model loads. Raises ConfigError, ValueError, OSError or ImportError."""
    preset, config = parse_config(arguments, quiet=not is_main())
    validate(config)
    distributed.own_device()                     # before a file with rewards is imported, which may put a model on it
    weights = dict(config.rewards) | dict.fromkeys(config.eval_rewards, 0.0)
    check_reward_weights(weights, dict(config.reward_urls))
    train_prompts, test_prompts = (load_prompts(config.prompts, split) for split in ("train", "test"))
    for prompts in (train_prompts, test_prompts):
        check_reward_prompts(weights, [p.text for p in prompts], [p.metadata for p in prompts])
    check_model(config.model)
    if config.lora_path:
        find_adapter(config.lora_path)
    if config.wandb and not importlib.util.find_spec("wandb"):
        raise ImportError("--wandb needs the package wandb: pip install wandb")
    return preset, config, train_prompts, test_prompts[:config.eval_prompts or None]


def make_rewards(config: Config, device: torch.device) -> Rewards:
    """Those of training and of evaluation."""
    return build_rewards(
        dict(config.rewards) | dict.fromkeys(config.eval_rewards, 0.0),
        start_thread=functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None, threads=config.reward_threads, device=str(device),
        batch=config.reward_batch, models=dict(config.reward_models), urls=dict(config.reward_urls),
        deadline=config.reward_deadline, max_unanswered=config.max_unanswered, trust_remote_code=config.trust_remote_code)


def make_policy(config: Config, device: torch.device) -> Policy:
    """On every rank with the same weights, an adapter's random start among them."""  # all ranks
    torch.manual_seed(config.seed)
    with within_memory("the model itself is too large: start fewer processes, or --offload-text-encoders",
                       describe(config, distributed.world_size())):
        policy = Policy(config.model, device, config.dtype, config.resolution, config.max_sequence_length, config.lora_rank,
                        config.lora_alpha, config.lora_targets, config.full_finetune, config.beta > 0, config.lora_path,
                        config.offload_text_encoders, config.gradient_checkpointing, config.compile)
        distributed.broadcast_parameters(policy.parameters)
        # NCCL takes its buffers at an operation's first call, outside PyTorch's reserve: before batches are chosen by what is left.
        distributed.sum_gradients(policy.parameters)
    for p in policy.parameters:
        p.grad = None
    return policy


def main() -> None:
    try:
        preset, config, train_prompts, test_prompts = prepare(sys.argv[1:])
        signals.end_with_launcher()
        device = distributed.setup(config.collective_timeout)
        # torchrun --max-restarts starts us again without a name: the run is then the one that its first start named.
        name = config.run_name or signals.remembered("run_name", f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        command = f"{signals.command_line() or 'the same command'}{'' if config.run_name else f' --run-name {name}'}"
        config = replace(config, run_name=name)
        directory, lock, config = open_run(config) if is_main() else (None, None, None)        # held until this function ends
        directory, config = distributed.broadcast_object((directory, config))
        checkpoint = distributed.broadcast_object(newest_whole(directory, not config.eval_only) if is_main() else None)
        rewards = make_rewards(config, device)
        rewards.probe(train_prompts[0].text, train_prompts[0].metadata, *config.resolution)
        policy = make_policy(config, device)
        with within_memory("not one image fits: --gradient-checkpointing, or a lower --resolution", describe(config, 1)):
            config = choose_batches(policy, train_prompts, config)
        if is_main():
            write_settings(directory, config, preset)
    except (ValueError, OSError, ImportError, RewardError) as error:
        stop(error, everywhere=False)
    except DoesNotFit as error:
        stop(error, everywhere=True)
    except LostRank as error:
        stop_without(error)
    scorer = scoring_thread(device)
    try:
        with signals.stopping_on_signals(command):
            run(config, directory, checkpoint, policy, rewards, train_prompts, test_prompts, scorer)
    except BaseException as error:
        said = [str(error)] if isinstance(error, Interrupted) else []        # other errors have a line of their own
        say("; ".join([*said, *getattr(error, "__notes__", ()), f"to go on: {command}"]))
        if isinstance(error, Interrupted):
            leave(0)
        if isinstance(error, (RewardError, NonFinite)):
            stop(error, everywhere=False)
        if isinstance(error, (TrainingError, DoesNotFit)):
            stop(error, everywhere=True)
        if isinstance(error, LostRank):
            stop_without(error)
        if isinstance(error, SystemExit):        # of user code: this run has not come to its end
            raise RuntimeError(f"the run was ended by {error!r}") from error
        raise                                    # a fault of this program
    scorer.shutdown()
    distributed.shutdown()


def stop(error: Exception, everywhere: bool) -> None:
    """End with one line. `everywhere`: any rank may be the only one that met the error; else the main rank speaks for all."""
    if not everywhere and not is_main():
        time.sleep(30)                           # torchrun ends all ranks with the first that ends: let the main one be it
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    leave(2)


def stop_without(error: LostRank) -> None:
    """End because another rank did, whose own error is the one to read."""
    print(f"rank {distributed.rank()}: stopped, another rank is gone or did not answer ({error})", file=sys.stderr)
    leave(1)


def run_epoch(learner: Learner, rewards: Rewards, prompts: list[Prompt], config: Config, epoch: int,
              scorer: ThreadPoolExecutor) -> dict[str, float]:
    """Sample, reward, advantage, update; the epoch's metrics."""  # all ranks
    started, policy = time.perf_counter(), learner.policy
    plan = in_words(config, policy)
    sigmas = timestep_schedule(config.num_steps, **policy.schedule_arguments(config.num_steps), dtype=policy.compute_dtype)
    group_ids = torch.arange(config.groups_per_epoch).repeat_interleave(config.group_size)               # (N,)
    try:
        with within_memory(LESS_MEMORY.format("rollout-batch"), plan):
            samples = together(sample_epoch, policy, rewards, prompts, sigmas, config, epoch, scorer)
    except (NonFinite, NonFiniteScore) as error:
        learner.skip(error, config.updates_per_epoch)            # advantages are global: without these samples there are none
        return {"epoch": epoch, "skipped_updates": config.updates_per_epoch, "seconds": time.perf_counter() - started}
    scores = gather_scores(samples.scores if samples else {}, samples.indices if samples else [], len(group_ids))
    advantages = group_advantages(scores["total"], group_ids, config.advantage_std)                      # (N,)
    if config.updates_per_epoch > 1:                             # else the first update is the epoch's last
        learner.begin_updates(epoch - 1)
    with within_memory(LESS_MEMORY.format("train-batch"), plan):
        metrics = train_epoch(learner, samples, advantages, config, epoch)
    learner.end_updates()
    seconds = time.perf_counter() - started
    return {"epoch": epoch, **means("reward", scores), "reward_std": scores["total"].std(correction=0).item(),
            "zero_variance_groups": zero_variance_groups(scores["total"], group_ids), **metrics,
            "learning_rate": learning_rate(config, epoch), "seconds": seconds, "images_per_second": len(group_ids) / seconds}


class AfterEpoch:
    """What follows an epoch: evaluate, record and save, as far as they are due. Only the main rank writes anything."""

    def __init__(self, config: Config, directory: Path, learner: Learner, rewards: Rewards, test_prompts: list[Prompt],
                 scorer: ThreadPoolExecutor, done: int, continued: bool):
        self.config, self.directory, self.learner, self.scorer = config, directory, learner, scorer
        self.rewards, self.test_prompts = rewards, test_prompts
        history = cut_metrics(directory, done if continued else -1) if is_main() and not config.eval_only else []
        self.record = Record(directory, done, history, config.keep_checkpoints)                          # other ranks' stays empty
        known = done + bool(history and history[-1]["epoch"] == done)        # the first epoch that is not in the metrics yet
        self.display = Display(directory, None if config.eval_only else known, config.wandb) if is_main() else None

    def conclude(self, metrics: dict) -> None:  # all ranks
        """An epoch of which these are the metrics."""
        epoch, config = metrics["epoch"], self.config
        if epoch == 0 or epoch % config.eval_every == 0 or epoch == config.epochs:
            metrics = {**metrics, **self.evaluate(epoch)}
        if is_main():
            self.record.add(metrics)
            self.display.curves(metrics)
            if "eval/total" in metrics:
                self.display.page()
        if epoch % config.save_every == 0 or epoch == config.epochs:
            with signals.taking_its_time():
                self.keep(metrics)
                distributed.wait_for_all()       # nobody goes on, or ends the run, while it is written

    def evaluate(self, epoch: int) -> dict[str, float]:  # all ranks
        """Metrics; the images go to the page."""
        with within_memory(LESS_MEMORY.format("rollout-batch"), in_words(self.config, self.learner.policy)):
            metrics, images, scores = evaluate(self.learner, self.rewards, self.test_prompts, self.config, self.scorer)
        if is_main():
            self.display.pictures(epoch, images, [p.text for p in self.test_prompts[:len(images)]], scores)
        say(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return metrics

    def evaluate_only(self, epoch: int) -> None:  # all ranks
        """The scores and the page; nothing that was recorded changes."""
        metrics = {"epoch": epoch, **self.evaluate(epoch)}
        if is_main():
            if not (self.directory / "metrics.jsonl").exists():
                write_metrics(self.directory, metrics)
            self.display.page()
            say(f"images: {self.directory / 'index.html'}")

    def keep(self, metrics: dict) -> None:
        """A checkpoint of the weights as they are, after the epoch of `metrics`, unless there is one."""
        if is_main() and (epoch := metrics["epoch"]) != self.record.saved:
            self.record.save(epoch, self.learner.save_weights, {**self.learner.state(epoch), "metrics": metrics})


def run(config: Config, directory: Path, checkpoint: Path | None, policy: Policy, rewards: Rewards, train_prompts: list[Prompt],
        test_prompts: list[Prompt], scorer: ThreadPoolExecutor) -> None:
    """Flow-GRPO, from `checkpoint` or the start to the last epoch.

    Whatever ends it on the way, the last whole epoch is saved, and a note of the error says so.
    """  # all ranks
    learner = Learner(policy, config)
    state = load_state(checkpoint) if checkpoint else {"metrics": {"epoch": 0}}
    done, metrics = learner.restore(state) if checkpoint else 0, state["metrics"]        # of the last whole epoch
    after = AfterEpoch(config, directory, learner, rewards, test_prompts, scorer, done, bool(checkpoint))
    record = after.record
    say(f"{directory}: {config.model} on {distributed.world_size()} x {policy.device}, "
        f"{sum(p.numel() for p in policy.parameters):,} trained weights, {len(train_prompts)} prompts, "
        f"{len(test_prompts)} for evaluation, rewards: {', '.join(f'{name} x {weight:g}' for name, weight in config.rewards)}")
    if not config.eval_only:
        say(in_words(config, policy))
    if checkpoint:
        say(f"{'evaluating' if config.eval_only else 'continuing after'} epoch {done}, from {checkpoint}")
    if config.eval_only:
        return after.evaluate_only(done)
    if checkpoint and done >= config.epochs:
        say(f"nothing is left to train: epoch {done} of --epochs {config.epochs} is done; a higher --epochs goes on")
    if is_main() and checkpoint:
        record.reduce_older()
    training_rewards = rewards.subset(weights=dict(config.rewards))
    try:
        # An epoch may have been saved before it was evaluated.
        if distributed.broadcast_object(not record.history or record.history[-1]["epoch"] != done):
            after.conclude(metrics)
        for epoch in range(done + 1, config.epochs + 1):
            metrics = run_epoch(learner, training_rewards, train_prompts, config, epoch, scorer)
            say(summary(metrics, record.history, config))
            after.conclude(metrics)
    except BaseException as error:
        signals.at_safe_point()
        try:
            if learner.undo_updates():
                after.keep(metrics)
        except Exception as failure:             # after a fault of the device or of this program, which is the error to read
            print(f"warning: epoch {metrics['epoch']} could not be saved ({failure})", file=sys.stderr)
        error.add_note(f"epoch {record.saved} is saved" if record.saved else "that was before the first epoch was whole")
        # These come on all ranks alike. With any other error this rank alone may be here: no collective.
        if isinstance(error, (RewardError, NonFinite, Interrupted)):
            distributed.wait_for_all()
        raise
    if is_main():
        after.display.close()
        report(directory, record, after.display)
        if record.saved != config.epochs > done:
            raise TrainingError(f"epoch {config.epochs} is not saved: make room, and the same command goes on from epoch "
                                f"{record.saved}")


def summary(metrics: dict, history: list[dict], config: Config) -> str:
    """An epoch in a line; `history` holds the ones before."""
    line, recent = f"epoch {metrics['epoch']}/{config.epochs}: ", [*history[-4:], metrics]
    if "approx_kl" not in metrics:
        return f"{line}skipped, {metrics['seconds']:.1f} s"
    first = next((m["reward/total"] for m in history if "reward/total" in m), metrics["reward/total"])
    left = (config.epochs - metrics["epoch"]) * np.median([m["seconds"] for m in recent if "seconds" in m])
    return line + (
        f"reward {metrics['reward/total']:.4f} ({metrics['reward/total'] - first:+.4f}), approx_kl {metrics['approx_kl']:.1e}, "
        f"clipped {metrics['clip_fraction_high'] + metrics['clip_fraction_low']:.2f}, gradient {metrics['grad_norm']:.3f}, "
        f"{metrics['images_per_second']:.1f} images/s, {timedelta(seconds=round(left))} left")


def report(directory: Path, record: Record, display: Display) -> None:
    """The score before and after, and where things are."""
    evaluated = [m for m in record.history if "eval/total" in m]
    if not evaluated:
        return say(f"no evaluation in {directory / 'metrics.jsonl'}")
    first, last = evaluated[0], evaluated[-1]
    after = f", {last['eval/total']:.4f} after {last['epoch']} epochs" if last is not first else "; no later evaluation"
    say(f"eval/total {first['eval/total']:.4f} before training{after}")
    if (directory / "index.html").exists():
        say(f"images and curves: {directory / 'index.html'}")
    if picture := display.comparison(first["epoch"], last["epoch"]):
        say(f"before above after: {picture}")
    best, newest = record.best(), record.saved
    for which, epoch in [("best and last", best)] if best == newest else [("best", best), ("last", newest)]:
        for weights in filter(Path.is_dir, checkpoint_path(directory, epoch or 0).glob("*")):            # adapter or transformer
            say(f"the {which} weights, of epoch {epoch}: {weights}")
    say(f"metrics: {directory / 'metrics.jsonl'}")


def say(text: str) -> None:
    """A line on the main rank, that does not disturb a progress bar."""
    if is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


if __name__ == "__main__":
    run_as_program(main)
