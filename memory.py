"""How much one call takes: batch sizes that were not given are found out, and running out of memory ends in one line."""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

import distributed
from config import Config, batch_plan
from harness.faults import DoesNotFit, within_memory, is_out_of_memory, LESS_MEMORY
from policy import Policy
from prompts import Prompt
from rewards import RewardError


def choose_batches(policy: Policy, prompts: list[Prompt], config: Config) -> Config:
    """Batch sizes that were not given: on a GPU the largest that fits, on a CPU the fastest, as measured now.

    In half precision the rollout's is the training's, so that both run the same kernels and ratios start at 1.
    """  # all ranks
    plan, half = batch_plan(config, distributed.world_size()), config.half_precision
    in_update = -(-plan.samples_per_rank // config.updates_per_epoch)                   # images
    later = 4 * sum(p.numel() * p.element_size() for p in policy.parameters)   # AdamW's moments, the average, the summed gradient

    def trial(size: int, training: bool) -> float:
        """Seconds of an image. Raises OutOfMemoryError, also where less than a fifth of a GPU is left for all else."""
        velocity = policy.velocity(policy.encode([prompts[i % len(prompts)].text for i in range(size)]), config.guidance_scale)
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
            v.cpu()                              # when it is done
        finally:
            for p in policy.parameters:
                p.grad = None
        if policy.device.type == "cuda":
            total = torch.cuda.get_device_properties(policy.device).total_memory
            if torch.cuda.max_memory_allocated(policy.device) + later > 0.8 * total:
                raise torch.OutOfMemoryError(f"out of memory: {size} images leave less than a fifth of the GPU")
        return (time.perf_counter() - started) / size

    def choose(training: bool) -> int:
        # In full precision steps and updates share batches; two rollouts at least, so that one is scored beside the other.
        most = in_update if half else in_update * plan.trained_steps if training else -(-plan.samples_per_rank // 2)
        sizes = sorted({most, *(2**n for n in range(most.bit_length()) if 2**n < most)})
        if policy.device.type == "cuda":
            return largest_that_fits(sizes, lambda size: trial(size, training))
        return fastest(sizes, lambda size: distributed.sum_over_ranks(torch.tensor(trial(size, training))).item())

    rollout_batch, train_batch = config.rollout_batch, config.train_batch
    if half:
        rollout_batch, train_batch = rollout_batch or train_batch, train_batch or rollout_batch
    train_batch = train_batch or choose(training=True)
    rollout_batch = rollout_batch or (train_batch if half else choose(training=False))
    chosen = distributed.gather_objects((rollout_batch, train_batch))
    return replace(config, rollout_batch=min(size for size, _ in chosen), train_batch=min(size for _, size in chosen))


def largest_that_fits(sizes: list[int], trial: Callable[[int], float]) -> int:
    """The last of the rising `sizes` before one for which `trial` runs out of memory; the first one must fit."""
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
    """Of the `sizes` up to `most`, that with the fewest seconds of an image, by the better of two trials."""
    sizes = [size for size in sizes if size <= most] or sizes[:1]
    trial(sizes[0])                              # warm
    return min(sizes[-4:], key=lambda size: min(trial(size), trial(size)))
