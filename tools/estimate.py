"""What a recipe costs, before anything is downloaded: FLOPs, memory, batches and hours on a named card.

    python -m tools.bench PRESET --estimate [--card H100] [--gpus N] [--field value ...]
    python -m tools.bench all --estimate         a markdown table with a row for each preset

`tools/counts.py` counts what the calls of the network and of the autoencoder take. Text and rewards are left
out, because prompts are few and rewards run beside the sampling.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace

from config import PRESETS, Config, parse_config, validate
from harness.batches import batch_plan, sizes_to_try
from policy import DECODE_PIXELS
from prompts import load_prompts
from tools.counts import count

GIB = 2**30


# ---- cards -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Card:
    """What its maker publishes: GiB that CUDA reports, TFLOP/s without sparsity, TB/s."""
    memory: float
    half: float          # float16 and bfloat16 products that are summed in float32
    full: float          # float32 without TF32
    bandwidth: float


CARDS = {"H100": Card(memory=79.1, half=989, full=66.9, bandwidth=3.35),
         "H200": Card(memory=139.8, half=989, full=66.9, bandwidth=4.8),
         "A100": Card(memory=79.1, half=312, full=19.5, bandwidth=2.04),
         "RTX4090": Card(memory=23.5, half=165, full=82.6, bandwidth=1.01)}
# Products of 8192 x 8192 bf16 matrices ran at 665 of the published 989 TFLOP/s on an H200. Others were not
# measured and are taken to keep the same share.
SUSTAINED = 665 / 989
# A call takes so many times as long as its products at that rate and its bytes at the published bandwidth:
# SD3.5-M's epoch took 7.41 s for 8 images on an H200, at 28.9 % of the 665 TFLOP/s. But it takes at least so
# many seconds a kernel, in which the host starts it: 172 ms there for one image and 9,454 kernels.
SLOWER, LAUNCH = 1.57, 18e-6
# The point's speed may be off by these factors, which are 18 % and 45 % in place of the 28.9 %. The published
# 0.83 images a second and GPU of sd35m_ocr are 22 % of the 665 TFLOP/s.
RANGE = (18 / 28.9, 45 / 28.9)
# A compiled network's calls take this share of the time, by SD3.5-M's on an H200.
COMPILED = 0.52
CONTEXT = 0.5            # GiB that CUDA takes for itself


# ---- prices ------------------------------------------------------------------------------------------------

class Estimate:
    """What a recipe takes on so many cards of a kind.

    Raises ValueError in one line if the card is unknown, or holds not one image or not the batches given.
    """

    def __init__(self, config: Config, card: str = "H100", gpus: int = 1):
        if card not in CARDS:
            raise ValueError(f"--card {card!r} is unknown: {', '.join(CARDS)} are known")
        self.config, self.name, self.card, self.gpus = config, card, CARDS[card], gpus
        self.room = (self.card.memory - CONTEXT) * GIB
        self.counts = counts = count(config)
        self.plan = batch_plan(config, gpus, counts.branches)
        latents = self.plan.trained_steps * (2 if config.guard else 1) + 2
        self.trajectory = latents * counts.latent                          # bytes of an image
        self.trajectories = self.plan.samples_per_rank * self.trajectory
        # AdamW's moments, the average and the summed gradient, besides the weights themselves.
        self.staying = 4 * counts.trained + counts.text_encoders
        # Text encoders that are offloaded stand beside the network while an epoch's prompts are encoded, when
        # there is no gradient.
        self.encoding = counts.network + counts.autoencoder + 3 * counts.trained + counts.encoders
        if config.offload_text_encoders:
            self.check(self.encoding, f"{config.model} with its text encoders", "a card with more memory")
        self.images_per_decode = max(1, DECODE_PIXELS // math.prod(config.resolution))
        self.train_batch, self.rollout_batch = self.batches()
        self.memory = max(self.encoding, *itertools.starmap(self.needed, [
            ("training", self.train_batch), ("rollout", self.rollout_batch),
            ("decode", min(self.images_per_decode, self.rollout_batch))]))
        # Phase -> how often an image passes through it in an epoch, and in an evaluation.
        calls = {"rollout": self.plan.rollout_calls, "training": self.plan.replay_calls,
                 "reference": self.plan.reference_calls}
        self.times = {phase: n / counts.branches / self.plan.samples for phase, n in calls.items() if n}
        self.times["decode"] = 1.0
        # Drift calls the policy and its reference once, unless full fine-tuning keeps no reference.
        drift = int(config.beta > 0 or not config.full_finetune)
        self.eval_times = {"rollout": config.eval_num_steps + drift, "reference": drift, "decode": 1}
        # FLOPs of an image in an epoch, and an epoch's seconds.
        self.image_flops = sum(times * self.flops(phase) for phase, times in self.times.items())
        self.epoch = self.plan.samples_per_rank * self.image_seconds(self.times)

    def needed(self, phase: str, batch: int) -> float:
        """Bytes of a batch and of all that stays."""
        return self.counts.call(phase).on(batch)[3] + self.staying + self.trajectories

    def batches(self) -> tuple[int, int]:
        """Rows of a training batch and images of a rollout batch: as given, or as the trainer chooses."""
        config = self.config
        one_image = f"one image of {config.model} at {config.resolution}"
        self.check(self.needed("training", 1), one_image, ", ".join([
            *["--gradient-checkpointing"] * (not config.gradient_checkpointing),
            *["--offload-text-encoders"] * (self.counts.text_encoders > 0), "a lower --resolution"]))

        def largest(phase: str) -> int:
            sizes = sizes_to_try(self.plan, config, training=phase == "training")
            # As `harness.batches.available_memory`: a fifth stays free for trajectories and all else.
            return max(size for size in sizes if size == sizes[0] or self.staying + self.counts.call(
                phase).on(size)[3] <= 0.8 * self.room)

        train_batch, rollout_batch = config.train_batch, config.rollout_batch
        if config.half_precision:
            train_batch, rollout_batch = train_batch or rollout_batch, rollout_batch or train_batch
        train_batch = train_batch or largest("training")
        rollout_batch = rollout_batch or (train_batch if config.half_precision else largest("rollout"))
        for phase, flag, batch in (("training", "--train-batch", train_batch),
                                   ("rollout", "--rollout-batch", rollout_batch)):
            self.check(self.needed(phase, batch), f"{flag} {batch}", "lower it, or let 0 choose")
        return train_batch, rollout_batch

    def check(self, needs: float, what: str, way_out: str) -> None:
        """Raise ValueError in one line if so many bytes do not fit into the card."""
        if needs > self.room:
            raise ValueError(f"--card {self.name} has {self.card.memory} GiB, and {what} needs "
                             f"{needs / GIB:.1f} GiB: {way_out}")

    def flops(self, phase: str) -> float:
        """FLOPs of an image in one call of a phase."""
        return self.counts.call(phase).on(1)[0]

    def seconds(self, phase: str) -> float:
        """Seconds of an image in one call of a phase."""
        batch = {"rollout": self.rollout_batch, "decode": self.images_per_decode}.get(phase, self.train_batch)
        flops, moved, kernels, _ = self.counts.call(phase).on(batch)
        rate = self.card.half if self.config.half_precision else self.card.full
        bare = flops / (SUSTAINED * rate * 1e12) + moved / (self.card.bandwidth * 1e12)
        compiled = COMPILED if self.config.compile and phase != "decode" else 1
        return compiled * max(SLOWER * bare, LAUNCH * kernels) / batch

    def image_seconds(self, times: dict[str, float]) -> float:
        """Seconds of an image that passes through each phase so often."""
        return sum(n * self.seconds(phase) for phase, n in times.items() if n)

    @functools.cached_property
    def evaluations(self) -> tuple[int, int]:
        """Their number in the recipe, and prompts of each: 0 if the prompts are not here."""
        config = self.config
        due = {0, *range(config.eval_every, config.epochs + 1, config.eval_every), config.epochs}
        try:
            return len(due), len(load_prompts(config.prompts, "test")[:config.eval_prompts or None])
        except (OSError, ValueError):
            return len(due), 0

    @functools.cached_property
    def hours(self) -> float:
        """Hours of the whole recipe on its cards, evaluations included."""
        number, prompts = self.evaluations
        evaluation = -(-prompts // self.gpus) * self.image_seconds(self.eval_times)
        return (self.config.epochs * self.epoch + number * evaluation) / 3600


# ---- what is printed ---------------------------------------------------------------------------------------

NAMES = {"rollout": "forward", "training": "forward + backward", "reference": "reference", "decode": "decode"}


def span(value: float) -> str:
    """A time at the point's speed, and in brackets from the fastest to the slowest."""
    values = value, value / RANGE[1], value / RANGE[0]
    point, least, most = (f"{v:,.0f}" if v >= 10 else f"{v:.2g}" for v in values)
    return f"{point} ({least} to {most})"


def describe(e: Estimate) -> str:
    """Everything about one setting, in lines."""
    counts, plan, config = e.counts, e.plan, e.config

    def an_image_more(phase: str, **changes) -> str:
        return f"{count(replace(config, **changes)).call(phase).more[3] / GIB:.2f} GiB"

    number, prompts = e.evaluations
    of_prompts = f"of {prompts:,} prompts" if prompts else f"(left out: {config.prompts!r} is not here)"
    rate = plan.samples_per_rank * e.image_flops / e.epoch / 1e12
    calls = [f"{NAMES[phase]} {times:.3g} x ({e.flops(phase) / 1e12:.3g}, {1e3 * e.seconds(phase):.3g}, "
             f"{counts.call(phase).two[2]:,.0f})" for phase, times in e.times.items()]
    return "\n".join([
        f"{config.model} in {config.dtype} at {config.resolution}, on {e.gpus} x {e.name} of "
        f"{e.card.memory} GiB; rewards and the encoding of text are left out",
        f"an image, x (TFLOP, ms, kernels of a call): {', '.join(calls)}; in all "
        f"{e.image_flops / 1e12:.4g} TFLOP",
        f"weights: network {counts.network / GIB:.2f} GiB, autoencoder {counts.autoencoder / GIB:.2f}, "
        f"text encoders {counts.text_encoders / GIB:.2f}",
        f"trained weights: {counts.trained_weights:,}; gradient, moments and average "
        f"{4 * counts.trained / GIB:.2f} GiB",
        f"an image more: {an_image_more('training', gradient_checkpointing=False)} in training, "
        f"{an_image_more('training', gradient_checkpointing=True)} with --gradient-checkpointing, "
        f"{an_image_more('rollout')} in sampling",
        f"trajectories: {e.trajectory / 1e6:.2f} MB an image, {e.trajectories / GIB:.2f} GiB of a GPU; "
        f"text: {counts.embeddings / 1e6:.2f} MB a prompt, in host memory",
        f"batches: {e.rollout_batch} images sampled and {e.train_batch} rows trained at once; "
        f"{e.memory / GIB:.1f} GiB at the peak",
        f"epoch: {plan.samples:,} images in {span(e.epoch)} s, {plan.samples / e.epoch:.3g} images/s, "
        f"{rate:.3g} TFLOP/s of a GPU",
        f"recipe: {config.epochs:,} epochs and {number} evaluations {of_prompts} in {span(e.hours)} h, "
        f"{span(e.hours * e.gpus)} GPU hours"])


def table(card: str, gpus: int) -> str:
    """A markdown table with a row for each preset."""
    lines = [f"| preset on {gpus} x {card} | TFLOP an image | batch: rollout, training | GiB at the peak | "
             "images/s of a GPU | epoch, s | GPU hours of the recipe |", "|---|---|---|---|---|---|---|"]
    for preset, config in PRESETS.items():
        try:
            e = Estimate(config, card, gpus)
        except ValueError as error:
            lines.append(f"| `{preset}` | {error} | | | | | |")
            continue
        lines.append(
            f"| `{preset}` | {e.image_flops / 1e12:.3g} | {e.rollout_batch}, {e.train_batch} "
            f"| {e.memory / GIB:.1f} | {e.plan.samples / e.epoch / gpus:.3g} | {span(e.epoch)} "
            f"| {span(e.hours * gpus)} |")
    return "\n".join(lines)


def main(settings: list[list[str]], card: str, gpus: int) -> None:
    """Print the estimate of each command line of the trainer, or of all presets for the one word "all".

    Raises ValueError in one line.
    """
    for words in settings:
        if words == ["all"]:
            print(table(card, gpus))
            continue
        preset, config = parse_config(words)
        validate(config)
        print(f"{' '.join(words) or preset}:", describe(Estimate(config, card, gpus)), sep="\n")
