"""How many samples one call takes: the batch plan, and the batch sizes that were not given.

The plan is arithmetic on the settings and the number of ranks. Sizes that were not given are found out by
trials.
"""

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import distributed
from config import Config
from harness.faults import is_out_of_memory
from policy import Policy
from prompts import Prompt


# ----------------------------------------------------------------------------- the plan

def steps_at_once(steps: int, images: int, size: int) -> int:
    """How many trained steps of so many images are replayed in one call, in even parts of `size` rows at
    most.
    """
    return math.ceil(steps / max(1, math.ceil(steps / max(1, size // images))))


@dataclass(frozen=True)
class BatchPlan:
    """What the settings come to on a number of ranks. Counts are per epoch."""

    samples: int            # global
    trained_steps: int      # of each sample
    samples_per_rank: int   # of the busiest rank
    rollout_batches: int    # likewise
    train_batches: int      # likewise, over all updates
    rollout_images: int     # in the largest rollout batch
    train_images: int       # in the largest training batch
    steps_at_once: int      # of these images, in one call
    rollout_calls: int      # transformer forwards of one image, global
    replay_calls: int       # forward and backward, global
    reference_calls: int    # forward, global


def batch_plan(config: Config, world_size: int, branches: int = 1) -> BatchPlan:
    """Everything about batches that follows from the settings and the number of ranks.

    branches: the transformer's calls for one velocity, 2 with classifier-free guidance.
    """
    samples = config.groups_per_epoch * config.group_size
    trained, per_rank = config.trained_steps, -(-samples // world_size)
    in_update, more = divmod(per_rank, config.updates_per_epoch)         # samples, and updates with one more

    def by_update(size: int) -> int:
        return more * -(-(in_update + 1) // size) + (config.updates_per_epoch - more) * -(-in_update // size)

    # A size of 0 is not chosen yet.
    rollout_batch, train_batch = config.rollout_batch or samples, config.train_batch or samples
    largest_update, half = in_update + bool(more), config.half_precision
    train_images = min(train_batch, largest_update)
    steps = samples * config.num_steps
    if config.shared_start_noise and config.window_size:  # on average over where windows lie
        before_window = (sum(config.window_range) - config.window_size) / 2
        steps -= round((samples - config.groups_per_epoch) * before_window)
    return BatchPlan(
        samples=samples, trained_steps=trained, samples_per_rank=per_rank,
        rollout_batches=by_update(rollout_batch) if half else -(-per_rank // rollout_batch),
        train_batches=by_update(train_batch),
        rollout_images=min(rollout_batch, largest_update if half else per_rank), train_images=train_images,
        steps_at_once=1 if half else steps_at_once(trained, train_images, train_batch),
        rollout_calls=steps * branches,
        replay_calls=samples * trained * branches,
        reference_calls=samples * trained * branches if config.beta else 0)


def describe(config: Config, world_size: int, branches: int = 1) -> str:
    """The batch plan in words, for the start of a run."""
    p = batch_plan(config, world_size, branches)
    # The count depends on where windows lie and how ranks share groups.
    about = "about " if config.shared_start_noise else ""
    return (f"epoch: {config.groups_per_epoch} groups x {config.group_size} = {p.samples} images, "
            f"{config.num_steps} steps ({p.trained_steps} trained), {config.updates_per_epoch} updates\n"
            f"per rank ({world_size}): up to {p.samples_per_rank} images; "
            f"rollout batches: {p.rollout_batches} of up to "
            f"{p.rollout_images if config.rollout_batch else 'any number'}; "
            f"training batches: {p.train_batches} of up to "
            f"{p.train_images if config.train_batch else 'any number'}, steps at once: {p.steps_at_once}\n"
            f"transformer calls per epoch: {about}{p.rollout_calls:,} forward, "
            f"{p.replay_calls:,} forward + backward, {p.reference_calls:,} reference")


# ----------------------------------------------------------------------------- sizes that were not given

def choose_batches(policy: Policy, prompts: list[Prompt], config: Config) -> Config:
    """Choose the batch sizes that were not given: on a GPU the largest that fits, on a CPU the fastest.

    In half precision the rollout takes the training's size, because both must run the same kernels for ratios
    to start at 1.
    """  # all ranks
    plan, half = batch_plan(config, distributed.world_size()), config.half_precision
    in_update = -(-plan.samples_per_rank // config.updates_per_epoch)                   # images
    # What comes later: AdamW's two moments, the average, the summed gradient.
    later = 4 * sum(p.numel() * p.element_size() for p in policy.parameters)

    def trial(size: int, training: bool) -> float:
        """Seconds of an image. Raises OutOfMemoryError, also if less than a fifth of a GPU is left for all
        else.
        """
        text = policy.encode([prompts[i % len(prompts)].text for i in range(size)])
        velocity = policy.velocity(text, config.guidance_scale)
        latents = torch.zeros(size, *policy.latent_shape, dtype=policy.compute_dtype, device=policy.device)
        sigma = latents.new_full((size,), 0.5)
        if policy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(policy.device)
        started = time.perf_counter()
        try:
            with torch.set_grad_enabled(training):
                v = velocity(latents, sigma)
                if training:
                    v.sum().backward()
            v.cpu()                              # waits until a GPU is done
        finally:
            for p in policy.parameters:
                p.grad = None
        if policy.device.type == "cuda":
            total = torch.cuda.get_device_properties(policy.device).total_memory
            if torch.cuda.max_memory_allocated(policy.device) + later > 0.8 * total:
                raise torch.OutOfMemoryError(f"out of memory: {size} images leave under a fifth of the GPU")
        return (time.perf_counter() - started) / size

    def choose(training: bool) -> int:
        # In full precision steps share batches. At least two rollouts, so that one is scored beside the
        # other.
        most = in_update
        if not half:
            most = in_update * plan.trained_steps if training else -(-plan.samples_per_rank // 2)
        sizes = sorted({most, *(2**n for n in range(most.bit_length()) if 2**n < most)})
        if policy.device.type == "cuda":
            return largest_that_fits(sizes, lambda size: trial(size, training))

        def over_ranks(size: int) -> float:
            return distributed.sum_over_ranks(torch.tensor(trial(size, training))).item()

        return fastest(sizes, over_ranks)

    rollout_batch, train_batch = config.rollout_batch, config.train_batch
    if half:
        rollout_batch, train_batch = rollout_batch or train_batch, train_batch or rollout_batch
    train_batch = train_batch or choose(training=True)
    rollout_batch = rollout_batch or (train_batch if half else choose(training=False))
    rollout_sizes, train_sizes = zip(*distributed.gather_objects((rollout_batch, train_batch)))
    return replace(config, rollout_batch=min(rollout_sizes), train_batch=min(train_sizes))


def largest_that_fits(sizes: list[int], trial: Callable[[int], float]) -> int:
    """The last of the rising `sizes` before one for which `trial` runs out of memory. The first one must
    fit.
    """
    fitting = sizes[0]
    trial(fitting)
    try:
        for size in sizes[1:]:
            trial(size)
            fitting = size
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
    torch.cuda.empty_cache()
    return fitting


def fastest(sizes: list[int], trial: Callable[[int], float], most: int = 64) -> int:
    """The size up to `most` with the fewest seconds of an image, by the better of two trials."""
    sizes = [size for size in sizes if size <= most] or sizes[:1]
    trial(sizes[0])                              # warm
    return min(sizes[-4:], key=lambda size: min(trial(size), trial(size)))
