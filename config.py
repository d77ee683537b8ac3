"""The settings of a run: one flat dataclass, presets by name, the command line, validation, the batch plan.

    python train.py [PRESET] [--field value ...]          no preset means tiny_ocr
"""

import contextlib
import dataclasses
import difflib
import io
import math
import re
from dataclasses import dataclass
from typing import Literal

import tyro


class ConfigError(ValueError):
    """A setting that cannot be: one line with the field, the value and the way out."""


# The attention projections of both streams, as published for SD3.5-M.
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
             "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
# What a small network needs besides, to change its mind in a few minutes.
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
MODULATION = ("norm1.linear", "norm1_context.linear")


@dataclass(frozen=True)
class Config:
    """Flow-GRPO. Everything about the algorithm is global, over all ranks; what the machine can hold is per rank."""

    # ------------------------------------------------------------------------------------------------- the task
    model: str = "assets/tiny-sd3"
    """A StableDiffusion3Pipeline: a directory or a hub id."""
    prompts: str = "words"
    """A built-in set (words, ocr, geneval), a directory with train and test files, or a file."""
    rewards: tuple[tuple[str, float], ...] = (("rapidocr_line", 1.0),)
    """Rewards and their weights: --rewards rapidocr 1.0 my_file:my_function 0.5"""
    reward_urls: tuple[tuple[str, str], ...] = ()
    """Where rewards are served: --reward-urls geneval http://host:18085"""
    resolution: tuple[int, int] = (24, 64)
    """Height and width of the images, in pixels."""
    max_sequence_length: int = 12
    """T5 tokens of a prompt."""

    # -------------------------------------------------------------------------------------------------- sampling
    num_steps: int = 8
    """Denoising steps of a training sample."""
    guidance_scale: float = 1.0
    """Classifier-free guidance, in training and evaluation alike; 1 is none, and halves the transformer calls."""
    rule: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    """How a step becomes stochastic; see sampler.py."""
    noise_level: float = 0.9
    """How stochastic a step is (a in the papers)."""
    timestep_fraction: float = 0.9
    """Without a window, the first floor(timestep_fraction * num_steps) steps are trained."""
    window_size: int = 3
    """Steps in a row that are stochastic and trained, the others being the ODE's; 0 is no window (Flow-GRPO-Fast, MixGRPO)."""
    window_range: tuple[int, int] = (0, 5)
    """The window lies in steps first, ..., last - 1; where, is drawn anew for each group and epoch."""

    # -------------------------------------------------------------------------------------------------- algorithm
    groups_per_epoch: int = 24
    """Prompts in an epoch, global."""
    group_size: int = 8
    """Images of each prompt."""
    updates_per_epoch: int = 4
    """Optimizer steps on an epoch's samples, each on its own part of them."""
    epochs: int = 50
    """Rounds of sampling and training."""
    advantage_std: Literal["global", "group"] = "global"
    """What advantages are divided by: the standard deviation over the epoch's rewards, or over the group's."""
    clip_range: float = 2e-3
    """How far the probability ratio may move from 1. Log-probs are averaged over the latent, hence the small numbers."""
    beta: float = 0.0
    """Weight of the KL to the reference, the network with its adapter off; 0 leaves out the reference's forward passes."""
    kl: Literal["per_time", "exact"] = "per_time"
    """per_time divides by 2 s^2, as the published settings were tuned; exact divides by 2 std^2, std = s sqrt(D)."""
    learning_rate: float = 7e-4
    """AdamW's; constant."""
    weight_decay: float = 1e-4
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, taken over all trained weights."""
    ema_decay: float = 0.95
    """Of the averaged weights that are evaluated and saved; warmed up as min((1 + n) / (10 + n), ema_decay)."""
    ema_every: int = 1
    """Optimizer steps between two updates of the average."""

    # ------------------------------------------------------------------------------------------------------ policy
    lora_rank: int = 32
    """Rank of the adapter."""
    lora_alpha: int = 64
    """The adapter's product is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ATTENTION + FEED_FORWARD + MODULATION
    """Linear layers that get an adapter, by the end of their names."""
    full_finetune: bool = False
    """Train every weight of the transformer instead of an adapter."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the network's frozen weights and arithmetic; trained weights, latents and losses are at least float32."""
    seed: int = 1
    """A run is a function of it: prompts, noise, windows and the adapter's start."""

    # ----------------------------------------------------------------------------------------------------- machine
    rollout_batch: int = 32
    """Images sampled at once, per rank."""
    train_batch: int = 32
    """Images replayed at once, per rank."""
    reward_threads: int = 1
    """CPU threads of each local reward, per rank."""

    # -------------------------------------------------------------------------------------------- evaluation, saving
    eval_every: int = 10
    """Epochs between evaluations; there is one before training and one at the end besides."""
    eval_prompts: int = 128
    """Held-out prompts of an evaluation, global; 0 means all."""
    eval_num_steps: int = 16
    """Steps of the ODE at evaluation."""
    eval_images: int = 32
    """Images kept of each evaluation, global."""
    eval_only: bool = False
    """Evaluate the run's last checkpoint (or the model as it is, in a new run), and stop."""
    save_every: int = 10
    """Epochs between checkpoints; there is one at the end besides."""
    output_dir: str = "runs"
    """Where runs are kept."""
    run_name: str = ""
    """Directory of the run under output_dir; naming one that exists continues it. Empty: preset and time of day."""


# What a continued run may change: the machine, how long, what is looked at and kept.
MAY_CHANGE = {"epochs", "rollout_batch", "train_batch", "reward_threads", "reward_urls", "eval_every", "eval_prompts",
              "eval_num_steps", "eval_images", "eval_only", "save_every", "output_dir", "run_name"}

SD35_MEDIUM = Config(
    model="stabilityai/stable-diffusion-3.5-medium", prompts="ocr", rewards=(("ocr", 1.0),), resolution=(512, 512),
    max_sequence_length=128, num_steps=10, guidance_scale=4.5, noise_level=0.7, groups_per_epoch=48, group_size=24,
    updates_per_epoch=2, epochs=1000, clip_range=1e-4, beta=0.04, learning_rate=3e-4, ema_every=8, dtype="float16",
    ema_decay=0.9, lora_targets=ATTENTION, window_size=0, reward_threads=4,
    rollout_batch=8, train_batch=8, eval_every=30, eval_prompts=0, eval_num_steps=40, save_every=30)

PRESETS = {
    "tiny_ocr": Config(),
    "sd35m_ocr": SD35_MEDIUM,
    "sd35m_ocr_1gpu": dataclasses.replace(SD35_MEDIUM, groups_per_epoch=8, group_size=8),
}


def parse_config(arguments: list[str], quiet: bool = False) -> tuple[str, Config]:
    """(preset, config) of a command line without its program name. `quiet` prints no --help.

    Raises ConfigError for an unknown preset or option, or a value that does not parse.
    """
    preset, arguments = ("tiny_ocr", arguments) if not arguments or arguments[0].startswith("-") else (arguments[0], arguments[1:])
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}{_closest(preset, PRESETS)}: one of {', '.join(PRESETS)}")
    boxes, help_text = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes), contextlib.redirect_stdout(help_text):
            config, unknown = tyro.cli(Config, default=PRESETS[preset], args=arguments, prog="train.py [PRESET]",
                                       return_unknown_args=True)
    except SystemExit as stop:
        if stop.code in (0, None):
            if not quiet:
                print(help_text.getvalue() + boxes.getvalue(), end="")
            raise
        # The library draws a box around its message; one line says the same.
        text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]+|-{3,}", " ", boxes.getvalue() + help_text.getvalue())
        message = " ".join(text.partition("Argument helptext:")[0].partition("For full helptext")[0].split())
        raise ConfigError(f"{message} (given: {' '.join(arguments)}; --help lists all options)") from None
    if unknown and unknown[0] in PRESETS:
        raise ConfigError(f"the preset {unknown[0]!r} must come first: train.py {unknown[0]} [--field value ...]")
    if unknown:
        fields = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(Config)]
        raise ConfigError(f"unknown option {unknown[0]!r}{_closest(unknown[0], fields)}: --help lists them all")
    return preset, config


def _closest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def validate(config: Config) -> None:
    """Raises ConfigError for the first setting that cannot be. Looks at no file and loads nothing."""
    def require(ok: bool, field: str, way_out: str) -> None:
        if not ok:
            raise ConfigError(f"--{field.replace('_', '-')} is {getattr(config, field)!r}: {way_out}")

    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float):
            require(math.isfinite(value), field.name, "it must be a finite number")
    for field in ("num_steps", "groups_per_epoch", "updates_per_epoch", "rollout_batch", "train_batch", "reward_threads",
                  "eval_every", "eval_num_steps", "save_every", "ema_every", "lora_rank", "lora_alpha", "max_sequence_length"):
        require(getattr(config, field) >= 1, field, "it must be at least 1")
    for field in ("epochs", "eval_prompts", "eval_images", "window_size", "beta", "weight_decay", "seed"):
        require(getattr(config, field) >= 0, field, "it must be at least 0")
    for field in ("clip_range", "learning_rate", "max_grad_norm", "noise_level"):
        require(getattr(config, field) > 0, field, "it must be positive")
    require(config.group_size >= 2, "group_size", "advantages compare the images of a prompt, so it takes at least 2")
    require(config.updates_per_epoch <= config.groups_per_epoch * config.group_size, "updates_per_epoch",
            f"an epoch has only {config.groups_per_epoch * config.group_size} images to share among its updates")
    require(config.guidance_scale >= 1, "guidance_scale", "it must be at least 1, which is no guidance")
    require(0 <= config.ema_decay < 1, "ema_decay", "it must lie in [0, 1)")
    require(0 < config.timestep_fraction <= 1, "timestep_fraction", "it must lie in (0, 1]")
    require(all(size > 0 for size in config.resolution), "resolution", "height and width must be positive")
    require(config.rule != "cps" or config.noise_level <= 1, "noise_level", "under cps, it must lie in (0, 1]")
    names = [name for name, _ in config.rewards]
    require(len(set(names)) == len(names), "rewards", "a reward is named twice; give each once, with one weight")
    if config.window_size:
        first, last = config.window_range
        require(0 <= first and last <= config.num_steps, "window_range", f"it must lie in 0 to num_steps = {config.num_steps}")
        require(config.window_size <= last - first, "window_size", f"it does not fit the window_range {first} to {last}")
    trained = batch_plan(config, 1).trained_steps
    require(trained >= 1, "timestep_fraction", f"of {config.num_steps} steps it trains none; raise it")
    last_trained = config.window_range[1] if config.window_size else trained
    require(config.rule != "cps" or last_trained < config.num_steps, "rule",
            "the last step of cps is deterministic and cannot be trained; lower timestep_fraction or window_range")
    require(not re.search(r"[/\\]|^\.{1,2}$", config.run_name), "run_name", "it names one directory under --output-dir")


@dataclass(frozen=True)
class BatchPlan:
    """What the settings come to on `world_size` ranks; counts are per epoch."""

    samples: int            # global
    trained_steps: int      # of each sample
    samples_per_rank: int   # of the busiest rank
    rollout_batches: int    # likewise
    train_batches: int      # likewise, over all updates
    rollout_calls: int      # transformer forwards of one image, global
    replay_calls: int       # forward and backward, global
    reference_calls: int    # forward, global


def batch_plan(config: Config, world_size: int) -> BatchPlan:
    """Everything about batches that follows from the settings and the number of ranks."""
    samples = config.groups_per_epoch * config.group_size
    trained = config.window_size or math.floor(config.timestep_fraction * config.num_steps + 1e-9)
    per_rank = -(-samples // world_size)
    per_update = [len(range(u, per_rank, config.updates_per_epoch)) for u in range(config.updates_per_epoch)]
    branches = 1 if config.guidance_scale == 1 else 2                     # conditional, unconditional
    return BatchPlan(
        samples=samples, trained_steps=trained, samples_per_rank=per_rank,
        rollout_batches=sum(-(-n // config.rollout_batch) for n in per_update),
        train_batches=sum(-(-n // config.train_batch) for n in per_update),
        rollout_calls=samples * config.num_steps * branches,
        replay_calls=samples * trained * branches,
        reference_calls=samples * trained * branches if config.beta else 0)


def describe(config: Config, world_size: int) -> str:
    """The batch plan in words, for the start of a run."""
    p = batch_plan(config, world_size)
    return (f"epoch: {config.groups_per_epoch} groups x {config.group_size} = {p.samples} images, {config.num_steps} steps "
            f"({p.trained_steps} trained), {config.updates_per_epoch} updates\n"
            f"per rank ({world_size}): up to {p.samples_per_rank} images, {p.rollout_batches} rollout batches of "
            f"{config.rollout_batch}, {p.train_batches} training batches of up to {config.train_batch}\n"
            f"transformer calls per epoch: {p.rollout_calls:,} forward, {p.replay_calls:,} forward + backward, "
            f"{p.reference_calls:,} reference")


def changed_fields(saved: dict, config: Config) -> list[str]:
    """Fields that differ between a saved config and this one and that a continued run may not change."""
    present = to_dict(config)
    return [name for name in present if name not in MAY_CHANGE and saved.get(name) != present[name]]


def to_dict(config: Config) -> dict:
    """As json has it: tuples are lists."""
    def plain(value):
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value
    return {name: plain(value) for name, value in dataclasses.asdict(config).items()}


