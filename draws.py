"""Everything that an epoch draws or deals out: prompts, noise, windows, and who holds which sample.

All of it is a function of (seed, epoch, sample) alone. So a run does not depend on the number of ranks or on
batch sizes, ranks agree without a collective, and a resumed run needs no state of any random stream. Rank and
world size are arguments.

    N samples of an epoch = G groups x K samples
    Sample i is the one of number i % K in group i // K. It belongs to update i % U of an epoch's U updates.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import Config

# What a random stream is for. No two purposes share numbers.
TRAIN_NOISE, EVAL_NOISE, WINDOW, GROUP_NOISE, ROW_SIGMAS = range(5)


# ----------------------------------------------------------------------------------------------------- random

def generator(*key: int) -> torch.Generator:
    """An independent random stream for every key, the same on every machine."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def draw_noise(seed: int, purpose: int, epoch: int, samples: list[int], count: int, shape: tuple) -> Tensor:
    """Standard normal (count, B, *shape) float32, a function of (seed, purpose, epoch, sample) alone."""
    streams = [generator(seed, purpose, epoch, i) for i in samples]
    # A reward that loads a network beside this may change the default dtype for a while.
    return torch.stack([torch.randn(count, *shape, generator=stream, dtype=torch.float32)
                        for stream in streams], 1)


def draw_sigmas(config: Config, epoch: int, samples: list[int], sigmas: Tensor) -> Tensor:
    """The times to which AWM noises images again, (S, B) float64.

    They are a function of (seed, epoch, sample), and stratified: one in each S-th part of the schedule
    `sigmas` (T + 1,), evenly between its values.
    """
    T, S = len(sigmas) - 1, config.trained_steps
    streams = [generator(config.seed, ROW_SIGMAS, epoch, i) for i in samples]
    place = torch.stack([torch.rand(S, generator=stream, dtype=torch.float64) for stream in streams], 1)
    place = (torch.arange(S)[:, None] + place) * T / S                                # (S, B) from 0 to T
    step = place.long().clamp(max=T - 1)
    return torch.lerp(sigmas[step].double(), sigmas[step + 1].double(), place - step)


def draw_first_steps(config: Config, epoch: int) -> Tensor:
    """Each group's first trained step (G,) int64: 0 without a window, and drawn for each epoch with one."""
    if not config.window_size:
        return torch.zeros(config.groups_per_epoch, dtype=torch.long)
    first, last = config.window_range
    return torch.randint(first, last - config.window_size + 1, (config.groups_per_epoch,),
                         generator=generator(config.seed, WINDOW, epoch))


def noise_levels(first_step: Tensor, config: Config) -> Tensor:
    """How stochastic each step of each sample is, (T, B) float64. It is 0 outside a window, and under AWM."""
    level = config.noise_level if config.objective == "grpo" else 0.0
    step = torch.arange(config.num_steps)[:, None]                                               # (T, 1)
    last = first_step + (config.window_size or config.num_steps)
    return level * ((step >= first_step) & (step < last)).double()


def epoch_prompt_indices(num_prompts: int, groups_per_epoch: int, seed: int, epoch: int) -> list[int]:
    """Draw one prompt for each group of `epoch` (from 0): `groups_per_epoch` indices below `num_prompts`.

    Training goes through the set in passes. Each pass is a permutation seeded by (seed, pass), and an epoch
    takes the next `groups_per_epoch` places of that endless sequence. So every prompt is drawn once before
    any is drawn twice.
    """
    places = range(epoch * groups_per_epoch, (epoch + 1) * groups_per_epoch)
    orders = {k: np.random.default_rng([seed, k]).permutation(num_prompts)
              for k in range(places[0] // num_prompts, places[-1] // num_prompts + 1)}
    return [int(orders[place // num_prompts][place % num_prompts]) for place in places]


# ------------------------------------------------------------------------------------------------------ dealt

def rank_slice(total: int, rank: int, world_size: int) -> range:
    """The contiguous part of `total` items that `rank` holds. Parts differ by one item at most."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)


def batches(items: Sequence, size: int) -> list[Sequence]:
    """Even parts of at most `size` items in a row, because a small last one takes as long as a full one."""
    count = -(-len(items) // size)
    return [items[part.start:part.stop] for k in range(count) for part in [rank_slice(len(items), k, count)]]


def deal_samples(first_steps: Tensor, config: Config, rank: int, world_size: int) -> list[int]:
    """A rank's samples: a contiguous part of all, in the order of groups, so that few groups are split.

    With shared start noise, a group with a later window costs less. There, sort groups by window and deal
    them to ranks in snake order (0 1 2 2 1 0) to balance the work. Do so only if every update uses the same
    part of each group, because ranks would otherwise balance over the epoch but not within an update.
    """
    groups = list(range(config.groups_per_epoch))
    if config.shared_start_noise and config.group_size % config.updates_per_epoch == 0:
        by_window = sorted(groups, key=lambda g: int(first_steps[g]))
        snake = [*range(world_size), *reversed(range(world_size))]                               # 0 1 2 2 1 0
        groups = [g for r in range(world_size) for k, g in enumerate(by_window) if snake[k % len(snake)] == r]
    samples = [g * config.group_size + k for g in groups for k in range(config.group_size)]
    return [samples[j] for j in rank_slice(len(samples), rank, world_size)]


@dataclass(frozen=True)
class EpochDraw:
    """What is drawn for an epoch, and this rank's part of it."""

    prompts: list[int]                   # (G,) each group's prompt, an index into the prompt set
    first_steps: Tensor                  # (G,) each group's first trained step, where its window begins
    rollout_batches: list[list[int]]     # this rank's samples as they are sampled together

    @functools.cached_property
    def indices(self) -> list[int]:
        """This rank's samples among the epoch's N, in the order in which they are sampled."""
        return [i for batch in self.rollout_batches for i in batch]


def draw_epoch(config: Config, num_prompts: int, epoch: int, rank: int, world_size: int) -> EpochDraw:
    """Draw `epoch` (from 1), and deal its samples to the ranks and to rollout batches.

    In half precision, another batch size is another kernel, which rounds differently. So a rollout batch
    holds samples of one update, and training replays the rollout's batches. The ratio then starts at
    exactly 1. With shared start noise a batch also needs one common window, because its samples enter the
    loop at one step.
    """
    first_steps = draw_first_steps(config, epoch)

    def batch_key(i: int) -> tuple[int, int]:
        update = i % config.updates_per_epoch if config.half_precision else 0
        return update, int(first_steps[i // config.group_size]) if config.shared_start_noise else 0

    samples = sorted(deal_samples(first_steps, config, rank, world_size), key=batch_key)
    parts = [list(part) for _, part in itertools.groupby(samples, batch_key)]
    return EpochDraw(
        prompts=epoch_prompt_indices(num_prompts, config.groups_per_epoch, config.seed, epoch - 1),
        first_steps=first_steps,
        rollout_batches=[batch for part in parts for batch in batches(part, config.rollout_batch)])


def training_batches(draw: EpochDraw, update: int, advantages: Tensor,
                     config: Config) -> list[tuple[list[int], list[int]]]:
    """This rank's batches of rows in an update, each as (positions, steps). advantages: (N,) of all samples.

    Row m is the trained step steps[m] of the sample at positions[m] of draw.indices. A row whose advantage is
    0 has no gradient unless there is a KL, so it is left out. In full precision a batch holds any rows, and
    all are about even. In half precision it is a rollout batch at its samples' k-th trained step, in its
    order, or even parts of it if config.train_batch is smaller. It is left out only if all of it has no
    advantage.
    """
    trains = (advantages != 0).tolist() if not config.beta else [True] * len(advantages)
    position = {i: j for j, i in enumerate(draw.indices)}
    mine = [[i for i in batch if i % config.updates_per_epoch == update] for batch in draw.rollout_batches]
    steps = range(config.trained_steps)
    if config.half_precision:
        parts = [part for batch in mine for part in batches(batch, config.train_batch)]
        alive = [part for part in parts if any(trains[i] for i in part)]
        return [([position[i] for i in part], [k] * len(part)) for part in alive for k in steps]
    rows = [(position[i], k) for batch in mine for i in batch if trains[i] for k in steps]
    return [tuple(map(list, zip(*batch))) for batch in batches(rows, config.train_batch)]
