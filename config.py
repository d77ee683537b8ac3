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

    def __init__(self, message: str):
        line = " ".join(message.split())                   # a value may be of any length and hold line ends
        super().__init__(line if len(line) <= 1000 else f"{line[:600]} ... {line[-395:]}")


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
    """A StableDiffusion3Pipeline or FluxPipeline: a directory, a hub id, or random:sd35m, random:sd35l, random:flux."""
    prompts: str = "words"
    """A built-in set (words, ocr, geneval), a directory with train and test files, or a file."""
    rewards: tuple[tuple[str, float], ...] = (("rapidocr_line", 1.0),)
    """Rewards and their weights: --rewards rapidocr 1.0 my_file:my_function 0.5"""
    eval_rewards: tuple[str, ...] = ()
    """Rewards that are logged at evaluation and never trained on, to see whether the others are gamed."""
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
    shared_start_noise: bool = False
    """The images of a group start from one noise, and the ODE's steps before their window are computed once for the group."""

    # -------------------------------------------------------------------------------------------------- algorithm
    groups_per_epoch: int = 24
    """Prompts in an epoch, global."""
    group_size: int = 8
    """Images of each prompt."""
    updates_per_epoch: int = 4
    """Optimizer steps on an epoch's samples, each on its own part of them."""
    epochs: int = 60
    """Rounds of sampling and training."""
    advantage_std: Literal["global", "group"] = "global"
    """What advantages are divided by: the standard deviation over the epoch's rewards, or over the group's."""
    clip_range: float = 2e-3
    """How far the probability ratio may move from 1. Log-probs are averaged over the latent, hence the small numbers."""
    guard: bool = False
    """GRPO-Guard (arXiv 2510.22319): a ratio that is centred at every step, and each step's loss divided by its length D."""
    beta: float = 0.0
    """Weight of the KL to the reference, the network with its adapter off; 0 leaves out the reference's forward passes."""
    kl: Literal["per_time", "exact"] = "per_time"
    """per_time divides by 2 s^2, as the published settings were tuned; exact divides by 2 std^2, std = s sqrt(D)."""
    learning_rate: float = 8e-4
    """AdamW's, in the first epoch."""
    learning_rate_half_life: float = 20.0
    """Epochs in which the learning rate halves; 0 keeps it constant."""
    weight_decay: float = 1e-4
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, taken over all trained weights."""
    ema_decay: float = 0.97
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
    lora_path: str = ""
    """An adapter to go on from: a peft or checkpoint directory, or a hub id; it brings its own rank, alpha and targets."""
    full_finetune: bool = False
    """Train every weight of the transformer instead of an adapter."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the network's frozen weights and arithmetic; trained weights, latents and losses are at least float32."""
    seed: int = 1
    """A run is a function of it: prompts, noise, windows and the adapter's start."""

    # ----------------------------------------------------------------------------------------------------- machine
    rollout_batch: int = 48
    """Images sampled at once, per rank; 0 finds it out: on a GPU the largest that fits, on a CPU the fastest."""
    train_batch: int = 48
    """Images replayed at once, per rank, in full precision at several of their steps if they are fewer; 0 finds it out likewise."""
    gradient_checkpointing: bool = False
    """Compute a block's activations again in the backward pass instead of keeping them: less memory, more time."""
    compile: bool = False
    """torch.compile the transformer's blocks: minutes at the start, then fewer and larger kernels."""
    offload_text_encoders: bool = False
    """Text encoders wait in host memory and visit the device while an epoch's new prompts are encoded."""
    reward_threads: int = 1
    """CPU cores of each local text reward, per rank."""
    reward_batch: int = 16
    """Images that a local reward's network sees at once, per rank."""
    reward_models: tuple[tuple[str, str], ...] = ()
    """Where rewards load from, if not from the hub: --reward-models pickscore /models/PickScore_v1"""
    reward_urls: tuple[tuple[str, str], ...] = ()
    """Rewards that are served elsewhere: --reward-urls geneval http://host:18085"""
    reward_deadline: float = 600.0
    """Seconds for which a server that does not answer is asked again before the run stops."""
    max_unanswered: float = 0.1
    """Share of pictures for which a judge may give no score before the run stops."""
    trust_remote_code: bool = False
    """Allow the reward deqa to run the code that its checkpoint brings."""
    collective_timeout: float = 3600.0
    """Seconds that a rank waits for the others, however slow their rewards are, before it takes them for dead."""
    skip_nonfinite: int = 0
    """Updates that may be left out, in all of the run, because a loss, gradient, reward or latent is not finite; then it stops."""

    # -------------------------------------------------------------------------------------------- evaluation, saving
    eval_every: int = 10
    """Epochs between evaluations; there is one before training and one at the end besides."""
    eval_prompts: int = 128
    """Held-out prompts of an evaluation, global; 0 means all."""
    eval_num_steps: int = 8
    """Steps of the ODE at evaluation."""
    eval_images: int = 32
    """Images kept of each evaluation, global."""
    eval_only: bool = False
    """Evaluate the run's last checkpoint (or the model as it is, in a new run), and stop."""
    save_every: int = 10
    """Epochs between checkpoints; there is one at the end besides."""
    keep_checkpoints: int = 2
    """Newest checkpoints from which a run can go on, beside the best by eval/total; of older ones only the adapter is kept."""
    output_dir: str = "runs"
    """Where runs are kept."""
    wandb: bool = False
    """Send the metrics to Weights & Biases too; TensorBoard has them in the run's directory anyway."""
    run_name: str = ""
    """Directory of the run under output_dir; naming one that exists continues it. Empty: preset and time of day."""

    @property
    def half_precision(self) -> bool:
        """Whether ratios start at 1 only where replay meets the rollout's batches; in full precision they are within 1e-5 anyway."""
        return self.dtype in ("bfloat16", "float16")


# What a continued run may change: the machine, how long, what is looked at and kept.
MAY_CHANGE = {"epochs", "rollout_batch", "train_batch", "gradient_checkpointing", "compile", "offload_text_encoders",
              "reward_threads", "reward_batch", "reward_models", "reward_urls", "reward_deadline", "max_unanswered",
              "trust_remote_code", "collective_timeout", "skip_nonfinite", "eval_rewards", "eval_every", "eval_prompts",
              "eval_num_steps", "eval_images", "eval_only", "save_every", "keep_checkpoints", "output_dir", "wandb", "run_name"}

# What the published runs have in common (the paper and its authors' configurations).
PUBLISHED = Config(
    model="stabilityai/stable-diffusion-3.5-medium", prompts="ocr", rewards=(("ocr", 1.0),), resolution=(512, 512),
    max_sequence_length=128, num_steps=10, guidance_scale=4.5, rule="flow_sde", noise_level=0.7, window_size=0,
    groups_per_epoch=48, group_size=24, updates_per_epoch=2, epochs=1000, clip_range=1e-4, beta=0.04, kl="per_time",
    learning_rate=3e-4, learning_rate_half_life=0, ema_decay=0.9, ema_every=8, lora_rank=32, lora_alpha=64,
    lora_targets=ATTENTION, dtype="float16", rollout_batch=0, train_batch=0, reward_threads=4, eval_every=30, eval_prompts=0,
    eval_num_steps=40, save_every=30)
GENEVAL = dict(prompts="geneval", rewards=(("geneval", 1.0),))
PICKSCORE = dict(prompts="data/pickscore", rewards=(("pickscore", 1.0),))             # the README says where these come from
FAST = dict(guidance_scale=1.0, rule="cps", noise_level=0.8, window_size=3, window_range=(0, 5), clip_range=1e-5, beta=0.0)
FLUX = dict(
    model="black-forest-labs/FLUX.1-dev", num_steps=6, guidance_scale=3.5, noise_level=0.9, beta=0.0, dtype="bfloat16",
    lora_rank=64, lora_alpha=128, lora_targets=ATTENTION + FEED_FORWARD, eval_num_steps=28, gradient_checkpointing=True)
FLUX_FAST = FLUX | dict(rule="cps", noise_level=0.8, window_size=3, window_range=(0, 3), clip_range=1e-5)
replace = dataclasses.replace

PRESETS = {
    "tiny_ocr": Config(),
    "sd35m_ocr": PUBLISHED,
    "sd35m_geneval": replace(PUBLISHED, **GENEVAL),
    "sd35m_pickscore": replace(PUBLISHED, **PICKSCORE, beta=0.01),
    "sd35m_ocr_4gpu": replace(PUBLISHED, groups_per_epoch=16, group_size=16),
    "sd35m_geneval_4gpu": replace(PUBLISHED, **GENEVAL, groups_per_epoch=16, group_size=16),
    "sd35m_pickscore_4gpu": replace(PUBLISHED, **PICKSCORE, beta=0.01, groups_per_epoch=16, group_size=16),
    "sd35m_ocr_1gpu": replace(PUBLISHED, groups_per_epoch=8, group_size=8),
    "sd35m_geneval_fast": replace(PUBLISHED, **GENEVAL, **FAST),
    "sd35m_pickscore_fast": replace(PUBLISHED, **PICKSCORE, **FAST, groups_per_epoch=64, group_size=18),
    "sd35m_ocr_guard": replace(PUBLISHED, guard=True, learning_rate=1e-4, clip_range=2e-6, beta=0.0, advantage_std="group"),
    "flux_pickscore": replace(PUBLISHED, **PICKSCORE, **FLUX),
    "flux_fast": replace(PUBLISHED, **PICKSCORE, **FLUX_FAST, advantage_std="group"),
    "flux_geneval_fast": replace(PUBLISHED, **GENEVAL, **FLUX_FAST),
}


def parse_config(arguments: list[str], quiet: bool = False) -> tuple[str, Config]:
    """(preset, config) of a command line without its program name. `quiet` prints no --help.

    Raises ConfigError for an unknown preset or option, or a value that does not parse.
    """
    preset, arguments = ("tiny_ocr", arguments) if not arguments or arguments[0].startswith("-") else (arguments[0], arguments[1:])
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}{_closest(preset, PRESETS)}: one of {', '.join(PRESETS)}")
    about = f"{Config.__doc__} These are the values of {preset}; the presets are {', '.join(PRESETS)}."
    config, unknown = parse_options(PRESETS[preset], arguments, "train.py [PRESET]", about, quiet)
    if unknown and unknown[0] in PRESETS:
        raise ConfigError(f"the preset {unknown[0]!r} must come first: train.py {unknown[0]} [--field value ...]")
    refuse_unknown(unknown, Config)
    return preset, config


# The library's words for a mistake, and plainer ones.
PLAINER = {r"^(Value error|Invalid choice|Missing argument) ": "", r"^Error parsing ": "", r"^invalid choice": "not a choice:",
           r"invalid literal for int\(\) with base 10:": "not a whole number:", r"could not convert string to float:": "not a number:",
           r"Could not find valid parse for arguments:": "expected name value [name value ...], not"}


def parse_options(default, arguments: list[str], prog: str, about: str, quiet: bool = False) -> tuple:
    """A dataclass like `default` with what the command line changes, and the arguments that it does not know.

    prog, about: what --help calls the program, and says of it.
    Raises ConfigError for a value that does not parse.
    """
    boxes, help_text = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes), contextlib.redirect_stdout(help_text):
            return tyro.cli(type(default), default=default, args=arguments, prog=prog, description=about,
                            return_unknown_args=True)
    except SystemExit as stop:
        if stop.code in (0, None):
            if not quiet:
                print(help_text.getvalue() + boxes.getvalue(), end="")
            raise
        # The library draws a box around its message; one line says the same.
        text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]+|-{3,}", " ", boxes.getvalue() + help_text.getvalue())
        message = " ".join(text.partition("Argument helptext:")[0].partition("For full helptext")[0].split())
        for theirs, ours in PLAINER.items():
            message = re.sub(theirs, ours, message)
        raise ConfigError(f"{message} (given: {' '.join(arguments)}; --help lists all options)") from None


def refuse_unknown(arguments: list[str], kind: type) -> None:
    """Raises ConfigError if there are any, with the field of the dataclass `kind` that is closest to the first."""
    if arguments:
        fields = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(kind)]
        raise ConfigError(f"unknown option {arguments[0]!r}{_closest(arguments[0], fields)}: --help lists them all")


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
        if isinstance(value, int):
            require(value < 2**63, field.name, "it must be less than 2^63")
    for field in ("num_steps", "groups_per_epoch", "updates_per_epoch", "reward_threads", "reward_batch", "eval_every",
                  "eval_num_steps", "save_every", "keep_checkpoints", "ema_every", "lora_rank", "lora_alpha",
                  "max_sequence_length"):
        require(getattr(config, field) >= 1, field, "it must be at least 1")
    for field in ("epochs", "rollout_batch", "train_batch", "eval_prompts", "eval_images", "window_size", "beta", "weight_decay",
                  "learning_rate_half_life", "skip_nonfinite", "seed"):
        require(getattr(config, field) >= 0, field, "it must be at least 0")
    for field in ("clip_range", "learning_rate", "max_grad_norm", "reward_deadline", "collective_timeout"):
        require(getattr(config, field) > 0, field, "it must be positive")
    require(config.noise_level >= 1e-6, "noise_level", "it must be at least 1e-6, or a step's variance vanishes in float32")
    require(config.group_size >= 2, "group_size", "advantages compare the images of a prompt, so it takes at least 2")
    require(config.updates_per_epoch <= config.groups_per_epoch * config.group_size, "updates_per_epoch",
            f"an epoch has only {config.groups_per_epoch * config.group_size} images to share among its updates")
    require(config.guidance_scale >= 1, "guidance_scale", "it must be at least 1, which is no guidance")
    require(0 <= config.ema_decay < 1, "ema_decay", "it must lie in [0, 1)")
    require(config.reward_deadline <= config.collective_timeout / 2, "reward_deadline",
            f"other ranks wait --collective-timeout {config.collective_timeout:g} seconds at most; give up to half of that")
    require(0 <= config.max_unanswered <= 1, "max_unanswered", "it is a share and must lie in [0, 1]")
    require(0 < config.timestep_fraction <= 1, "timestep_fraction", "it must lie in (0, 1]")
    require(all(0 < size <= 8192 for size in config.resolution), "resolution", "height and width must lie in 1 to 8192")
    require(config.rule != "cps" or config.noise_level <= 1, "noise_level", "under cps, it must lie in (0, 1]")
    names = [name for name, _ in config.rewards]
    require(len(set(names)) == len(names), "rewards", "a reward is named twice; give each once, with one weight")
    require(len({*names, *config.eval_rewards}) == len(names) + len(config.eval_rewards), "eval_rewards",
            "a reward is named twice, or trained on as well; those of --rewards are logged at evaluation anyway")
    for field in ("reward_urls", "reward_models"):
        given = [name for name, _ in getattr(config, field)]
        require(len(set(given)) == len(given), field, "a name stands there twice")
    require(not (config.lora_path and config.full_finetune), "lora_path", "an adapter and --full-finetune exclude each other")
    if config.window_size:
        first, last = config.window_range
        require(0 <= first and last <= config.num_steps, "window_range",
                f"with --num-steps {config.num_steps} it must lie in 0 to {config.num_steps}")
        require(config.window_size <= last - first, "window_size", f"it does not fit --window-range {first} {last}")
    trained = batch_plan(config, 1).trained_steps
    require(trained >= 1, "timestep_fraction", f"of {config.num_steps} steps it trains none; raise it")
    last_trained = config.window_range[1] if config.window_size else trained
    require(config.rule != "cps" or last_trained < config.num_steps, "rule",
            "the last step of cps is deterministic and cannot be trained; lower timestep_fraction or window_range")
    require(config.rule != "cps" or not config.guard, "guard", "its ratio needs the log-prob of a Gaussian, which cps has not; "
            "choose --rule flow_sde or dance_sde")
    require(not re.search(r"[/\\]|^\.{1,2}$", config.run_name), "run_name", "it names one directory under --output-dir")


def steps_at_once(steps: int, images: int, size: int) -> int:
    """How many trained steps of so many images are replayed in one call: in even parts, none larger than a batch of `size`."""
    return math.ceil(steps / max(1, math.ceil(steps / max(1, size // images))))


@dataclass(frozen=True)
class BatchPlan:
    """What the settings come to on `world_size` ranks; counts are per epoch."""

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
    trained = config.window_size or math.floor(config.timestep_fraction * config.num_steps + 1e-9)
    per_rank = -(-samples // world_size)
    in_update, more = divmod(per_rank, config.updates_per_epoch)          # samples, and updates that have one more

    def by_update(size: int) -> int:
        return more * -(-(in_update + 1) // size) + (config.updates_per_epoch - more) * -(-in_update // size)

    rollout_batch, train_batch = config.rollout_batch or samples, config.train_batch or samples        # 0: not chosen yet
    largest_update, half = in_update + bool(more), config.half_precision
    train_images = min(train_batch, largest_update)
    steps = samples * config.num_steps
    if config.shared_start_noise and config.window_size:                  # on average over where the windows lie
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
    about = "about " if config.shared_start_noise else ""                 # by where windows lie, and how ranks share groups
    return (f"epoch: {config.groups_per_epoch} groups x {config.group_size} = {p.samples} images, {config.num_steps} steps "
            f"({p.trained_steps} trained), {config.updates_per_epoch} updates\n"
            f"per rank ({world_size}): up to {p.samples_per_rank} images; rollout batches: {p.rollout_batches} of up to "
            f"{p.rollout_images if config.rollout_batch else 'any number'}; training batches: {p.train_batches} of up to "
            f"{p.train_images if config.train_batch else 'any number'}, steps at once: {p.steps_at_once}\n"
            f"transformer calls per epoch: {about}{p.rollout_calls:,} forward, {p.replay_calls:,} forward + backward, "
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


