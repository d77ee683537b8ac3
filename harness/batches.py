"""How many samples one call takes: the batch plan, and the batch sizes that were not given.

The plan is arithmetic on the settings and the number of ranks. Sizes that were not given are found out by
trials.
"""

import contextlib
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import distributed
from config import Config
from draws import batches
from harness.faults import is_out_of_memory, within_memory
from policy import Policy
from prompts import Prompt


@dataclass(frozen=True)
class BatchPlan:
    """What the settings come to on a number of ranks. Counts are per epoch."""

    samples: int            # global
    trained_steps: int      # of each sample; under AWM, how often it is noised again
    samples_per_rank: int   # of the busiest rank
    rollout_batches: int    # likewise
    train_batches: int      # likewise, over all updates
    rollout_images: int     # in the largest rollout batch
    train_rows: int         # in the largest training batch: a row is one trained step of one image
    rollout_calls: int      # transformer forwards of one image, global
    replay_calls: int       # forward and backward, global
    reference_calls: int    # forward, global


def batch_plan(config: Config, world_size: int, branches: int = 1) -> BatchPlan:
    """Everything about batches that follows from the settings and the number of ranks.

    branches: the transformer's calls for one velocity, 2 with classifier-free guidance.
    """
    samples = config.groups_per_epoch * config.group_size
    trained, per_rank = config.trained_steps, -(-samples // world_size)
    # A size of 0 is not chosen yet.
    rollout_batch, train_batch = config.rollout_batch or samples, config.train_batch or samples * trained

    def batches_of(held: int) -> tuple[list[int], list[int]]:
        """The sizes of a rank's rollout and training batches, if it holds so many samples."""
        updates = [len(range(u, held, config.updates_per_epoch)) for u in range(config.updates_per_epoch)]
        # In half precision a training batch is a rollout batch, or a part of it, at one step. In full
        # precision it holds any rows.
        if config.half_precision:
            rollouts = [images for n in updates for images in even_parts(n, rollout_batch)]
            return rollouts, [m for images in rollouts for m in even_parts(images, train_batch) * trained]
        trainings = [rows for n in updates for rows in even_parts(n * trained, train_batch)]
        return even_parts(held, rollout_batch), trainings

    # Other ranks hold one sample less. Where that leaves them one batch less, theirs are the larger ones.
    rollouts, trainings = batches_of(per_rank)
    other_rollouts, other_trainings = batches_of(samples // world_size)
    steps = samples * config.num_steps
    if config.shared_start_noise and config.window_size:  # on average over where windows lie
        before_window = (sum(config.window_range) - config.window_size) / 2
        steps -= round((samples - config.groups_per_epoch) * before_window)
    return BatchPlan(
        samples=samples, trained_steps=trained, samples_per_rank=per_rank,
        rollout_batches=len(rollouts), rollout_images=max(rollouts + other_rollouts),
        train_batches=len(trainings), train_rows=max(trainings + other_trainings),
        rollout_calls=(steps + samples * trained * (config.objective == "awm")) * branches,
        replay_calls=samples * trained * branches,
        reference_calls=samples * trained * branches if config.beta else 0)


def even_parts(total: int, size: int) -> list[int]:
    """The sizes into which `draws.batches` divides so many items."""
    return [len(part) for part in batches(range(total), size)]


def describe(config: Config, world_size: int, branches: int = 1) -> str:
    """The batch plan in words, for the start of a run."""
    p = batch_plan(config, world_size, branches)
    # The count depends on where windows lie and how ranks share groups.
    about = "about " if config.shared_start_noise else ""
    trained = f"{p.trained_steps} trained"
    if config.objective == "awm":
        trained = f"none trained, each image noised again {p.trained_steps} times"
    return (f"epoch: {config.groups_per_epoch} groups x {config.group_size} = {p.samples} images, "
            f"{config.num_steps} steps ({trained}), {config.updates_per_epoch} updates\n"
            f"per rank ({world_size}): up to {p.samples_per_rank} images; "
            f"rollout batches: {about}{p.rollout_batches} of up to "
            f"{p.rollout_images if config.rollout_batch else 'any number'}; "
            f"training batches: {about}{p.train_batches} of up to "
            f"{p.train_rows if config.train_batch else 'any number of'} rows\n"
            f"transformer calls per epoch: {about}{p.rollout_calls:,} forward, "
            f"{p.replay_calls:,} forward + backward, {p.reference_calls:,} reference")


def choose_batches(policy: Policy, prompts: list[Prompt], config: Config) -> Config:
    """Choose the batch sizes that were not given: on a GPU the largest that fits, on a CPU the fastest.

    In half precision the rollout takes the training's size, because both must run the same kernels. An
    evaluation needs no training batch. Raises DoesNotFit if not one image fits.
    """  # all ranks
    plan, half = batch_plan(config, distributed.world_size()), config.half_precision
    memory = available_memory(policy)

    def trial(size: int, training: bool) -> float:
        texts = [prompts[i % len(prompts)].text for i in range(size)]
        return try_batch(policy, texts, config.guidance_scale, training, memory)

    @within_memory("not one image fits: --gradient-checkpointing, --offload-text-encoders, or a lower "
                   "--resolution", describe(config, 1))
    def choose(training: bool) -> int:
        sizes = sizes_to_try(plan, config, training)
        if policy.device.type == "cuda":
            return largest_that_fits(sizes, lambda size: trial(size, training))
        seconds = lambda size: distributed.gather_vectors(torch.tensor([trial(size, training)]))
        return fastest(sizes, lambda size: seconds(size).max().item())       # of the slowest rank

    rollout_batch, train_batch = config.rollout_batch, config.train_batch
    if not config.eval_only:
        if half:
            rollout_batch, train_batch = rollout_batch or train_batch, train_batch or rollout_batch
        train_batch = train_batch or choose(training=True)
    rollout_batch = rollout_batch or (half and train_batch) or choose(training=False)
    rollout_sizes, train_sizes = zip(*distributed.gather_objects((rollout_batch, train_batch)))
    return replace(config, rollout_batch=min(rollout_sizes), train_batch=min(train_sizes))


def sizes_to_try(plan: BatchPlan, config: Config, training: bool) -> list[int]:
    """Batch sizes that divide the work of the busiest rank evenly, each at least a quarter above the last."""
    most = -(-plan.samples_per_rank // config.updates_per_epoch)         # images of an update
    # In full precision steps share batches. At least two rollouts, so that one is scored beside the other.
    if not config.half_precision:
        most = most * plan.trained_steps if training else -(-plan.samples_per_rank // 2)
    sizes = [most]
    for parts in range(2, most + 1):
        if (size := -(-most // parts)) <= 0.8 * sizes[0]:
            sizes.insert(0, size)
    return sizes


def available_memory(policy: Policy) -> float:
    """Bytes of the GPU for a call of the network and its trained weights' later needs; infinite on a CPU.

    Others on the same GPU, such as a reward server, keep what they hold. A fifth stays free for all else.
    """
    if policy.device.type != "cuda":
        return math.inf
    free = torch.cuda.mem_get_info(policy.device)[0] + torch.cuda.memory_reserved(policy.device)
    # AdamW's two moments, the average and the summed gradient come later.
    return 0.8 * free - 4 * sum(p.numel() * p.element_size() for p in policy.parameters)


def try_batch(policy: Policy, texts: list[str], guidance_scale: float, training: bool,
              memory: float) -> float:
    """Seconds of an image in one call of the network. Raises OutOfMemoryError, also beyond `memory`."""
    size, velocity = len(texts), policy.velocity(policy.encode(texts), guidance_scale)
    latents = torch.zeros(size, *policy.latent_shape, dtype=policy.compute_dtype, device=policy.device)
    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(policy.device)
    # A compiled network runs as it is written here, because compiling it for each size would take minutes.
    # Compiled, it needs less memory.
    eager = torch.compiler.set_stance("force_eager") if policy.compiled else contextlib.nullcontext()
    started = time.perf_counter()
    try:
        with eager, torch.set_grad_enabled(training):
            v = velocity(latents, latents.new_full((size,), 0.5))
            if training:
                v.sum().backward()
        v.cpu()                                  # waits until a GPU is done
    finally:
        for p in policy.parameters:
            p.grad = None
    # A single image passes if it ran at all, because there is nothing smaller to fall back on.
    if on_gpu and size > 1 and torch.cuda.max_memory_allocated(policy.device) > memory:
        raise torch.OutOfMemoryError(f"out of memory: {size} images leave less than a fifth of the GPU")
    return (time.perf_counter() - started) / size


def largest_that_fits(sizes: list[int], trial: Callable[[int], float]) -> int:
    """The last of the rising `sizes` before `trial` runs out of memory. The first one must fit."""
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
