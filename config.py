"""The settings of a run: one flat dataclass, presets by name, the command line, validation.

    python train.py [PRESET] [--field value ...]          no preset means tiny_ocr
"""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
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
# The projections of FLUX.2's single blocks are one layer with their feed-forward layer.
FLUX2_FEED_FORWARD = ("attn.to_qkv_mlp_proj", "ff.linear_in", "ff.linear_out", "ff_context.linear_in",
                      "ff_context.linear_out")
Z_IMAGE_LAYERS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
                  "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
QWEN_FEED_FORWARD = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")


@dataclass(frozen=True)
class Config:
    """Flow-GRPO. Settings of the algorithm are global, over all ranks; those of the machine are per rank."""

    # Presets start from these values. A command without a preset runs PRESETS["tiny_ocr"].

    # ------------------------------ the task
    model: str = "assets/tiny-sd3"
    """A pipeline: a directory, a hub id, or random:NAME, as random:sd35m; an unknown NAME lists them."""
    prompts: str = "words"
    """A built-in set (words, ocr, geneval), a directory with train and test files, or a file."""
    rewards: tuple[tuple[str, float], ...] = (("rapidocr_line", 1.0),)
    """Rewards and their weights: --rewards rapidocr 1.0 my_file:my_function 0.5"""
    eval_rewards: tuple[str, ...] = ()
    """Rewards that are logged at evaluation and never trained on, to see whether the others are gamed."""
    resolution: tuple[int, int] = (24, 64)
    """Height and width of the images, in pixels."""
    max_sequence_length: int = 12
    """Tokens of a prompt, as T5 or the language model counts them."""

    # ------------------------------ sampling
    num_steps: int = 8
    """Denoising steps of a training sample."""
    guidance_scale: float = 1.0
    """Classifier-free guidance, in training and evaluation; 1 is none, and halves the transformer calls."""
    rule: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    """How a step becomes stochastic; see sampler.py."""
    noise_level: float = 0.9
    """How stochastic a step is (a in the papers)."""
    timestep_fraction: float = 0.99
    """Without a window, the first floor(timestep_fraction * num_steps) steps are trained."""
    window_size: int = 3
    """Stochastic, trained steps in a row, between the ODE's (Flow-GRPO-Fast, MixGRPO); 0: no window."""
    window_range: tuple[int, int] = (0, 5)
    """The window lies in steps first, ..., last - 1, at a place that each group draws anew in each epoch."""
    shared_start_noise: bool = False
    """A group's images start from one noise and share the ODE's steps before their window."""

    # ------------------------------ algorithm
    objective: Literal["grpo", "awm"] = "grpo"
    """awm noises each image again, as often as grpo would train its steps, and trains that: tiny_ocr_awm."""
    groups_per_epoch: int = 24
    """Prompts in an epoch, global."""
    group_size: int = 8
    """Images of each prompt."""
    updates_per_epoch: int = 4
    """Optimizer steps on an epoch's samples, each on its own part of them."""
    epochs: int = 60
    """Rounds of sampling and training."""
    advantage_std: Literal["global", "group"] = "global"
    """Standard deviation that divides advantages: over the epoch's rewards, or over the group's."""
    advantage_of: Literal["sum", "each"] = "sum"
    """Several rewards: the advantage of their weighted sum, or of each, then weighted and added (GDPO)."""
    clip_range: float = 2e-3
    """How far the ratio may move from 1. Small where log-probs are averaged over latents; awm: about 1."""
    guard: bool = False
    """GRPO-Guard (arXiv 2510.22319): a centred ratio, and a loss over sigma - sigma'; see sd35m_ocr_guard."""
    beta: float = 0.0
    """Weight of the KL to the network without its adapter; 0 leaves out the reference's forward passes."""
    kl: Literal["per_time", "exact"] = "per_time"
    """per_time divides by 2 s^2, as the published runs; exact, and cps always, by 2 std^2 = 2 s^2 D."""
    learning_rate: float = 8e-4
    """AdamW's learning rate in the first epoch."""
    learning_rate_half_life: float = 20.0
    """Epochs in which the learning rate halves; 0 keeps it constant."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, taken over all trained weights."""
    ema_decay: float = 0.97
    """Decay of the averaged weights, which are evaluated and saved; warms up as (1 + n) / (10 + n)."""
    ema_every: int = 1
    """Optimizer steps between two updates of the average."""

    # ------------------------------ policy
    lora_rank: int = 32
    """Rank of the adapter."""
    lora_alpha: int = 64
    """The adapter's product is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ATTENTION + FEED_FORWARD + MODULATION
    """Linear layers that get an adapter, by the end of their names."""
    lora_path: str = ""
    """An adapter to go on from, with its own rank, alpha and targets: a directory, or a hub id."""
    full_finetune: bool = False
    """Train every weight of the transformer instead of an adapter."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Number format of the network; trained weights, latents and losses are at least float32."""
    seed: int = 1
    """A run is a function of it: prompts, noise, windows and the adapter's start."""

    # ------------------------------ machine
    rollout_batch: int = 48
    """Images sampled at once, per rank; 0 picks the largest that fits on a GPU, the fastest on a CPU."""
    train_batch: int = 48
    """Rows replayed at once, per rank; an image has one for each trained step. 0 chooses as above."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    compile: bool = False
    """torch.compile the transformer's blocks: slow at the start, then fewer and larger kernels."""
    offload_text_encoders: bool = False
    """Text encoders wait in host memory and visit the device while an epoch's new prompts are encoded."""
    reward_threads: int = 1
    """CPU cores of each local text reward, per rank."""
    reward_batch: int = 16
    """Images that a local reward's network sees at once, per rank."""
    reward_models: tuple[tuple[str, str], ...] = ()
    """Where rewards load from, if not from the hub: --reward-models pickscore /models/PickScore_v1"""
    reward_urls: tuple[tuple[str, str], ...] = ()
    """Rewards that are served elsewhere: --reward-urls geneval http://host:18085; repeat for more servers."""
    reward_deadline: float = 600.0
    """Seconds for which a server that does not answer is asked again before the run stops."""
    max_unanswered: float = 0.1
    """Share of pictures for which a judge may give no score before the run stops."""
    trust_remote_code: bool = False
    """Allow the reward deqa to run the code that its checkpoint brings."""
    collective_timeout: float = 3600.0
    """Seconds that a rank waits for the others, and their rewards, before it takes them for dead."""
    skip_nonfinite: int = 0
    """Updates that a run may leave out for what is not finite; samples and scores cost all of an epoch's."""

    # ------------------------------ evaluation, saving
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
    """Newest checkpoints that stay whole, beside the best by eval/total; of older ones an adapter stays."""
    output_dir: str = "runs"
    """Where runs are kept."""
    wandb: bool = False
    """Send the metrics to Weights & Biases too; TensorBoard has them in the run's directory anyway."""
    run_name: str = ""
    """Directory of the run under output_dir; an existing one is continued. Empty: preset and time of day."""

    @property
    def trained_steps(self) -> int:
        """How many steps of each sample are trained: the window, or without one the first steps."""
        return self.window_size or math.floor(self.timestep_fraction * self.num_steps + 1e-9)

    @property
    def urls(self) -> dict[str, list[str] | str]:
        """Where each served reward is asked: a URL, or a list of them."""
        urls = {name: [u for n, u in self.reward_urls if n == name] for name, _ in self.reward_urls}
        return {name: several if len(several) > 1 else several[0] for name, several in urls.items()}

    @property
    def half_precision(self) -> bool:
        """Whether rounding is coarse. Ratios then start at 1 only if training replays rollout batches."""
        return self.dtype in ("bfloat16", "float16")


# What the published runs have in common (the paper and its authors' configurations).
PUBLISHED = Config(
    model="stabilityai/stable-diffusion-3.5-medium", prompts="ocr", rewards=(("ocr", 1.0),),
    resolution=(512, 512), max_sequence_length=128, num_steps=10, guidance_scale=4.5, rule="flow_sde",
    noise_level=0.7, window_size=0, groups_per_epoch=48, group_size=24, updates_per_epoch=2, epochs=1000,
    clip_range=1e-4, beta=0.04, kl="per_time", learning_rate=3e-4, learning_rate_half_life=0,
    ema_decay=0.9**2, ema_every=8, lora_rank=32, lora_alpha=64, lora_targets=ATTENTION, dtype="float16",
    rollout_batch=0, train_batch=0, reward_threads=4, eval_every=30, eval_prompts=0, eval_num_steps=40,
    save_every=30)
# The authors' average has decay 0.9 every 8 optimizer steps, but their code applies it once per micro-batch
# of that step. So the decay of their published weights is 0.9 to the power of their micro-batches per update:
# 2 on 32 GPUs, 4 on 4 GPUs or 1 and under Guard, 6 for FLUX.
FOUR, SIX = dict(ema_decay=0.9**4), dict(ema_decay=0.9**6)
GENEVAL = dict(prompts="geneval", rewards=(("geneval", 1.0),))
PICKSCORE = dict(prompts="data/pickscore", rewards=(("pickscore", 1.0),))  # docs/recipes.md fetches them
FAST = dict(guidance_scale=1.0, rule="cps", noise_level=0.8, window_size=3, window_range=(0, 5),
            clip_range=1e-5, beta=0.0)
FLUX = dict(
    model="black-forest-labs/FLUX.1-dev", num_steps=6, guidance_scale=3.5, noise_level=0.9, beta=0.0,
    dtype="bfloat16", lora_rank=64, lora_alpha=128, lora_targets=ATTENTION + FEED_FORWARD, eval_num_steps=28,
    gradient_checkpointing=True, **SIX)
# The authors' settings for Qwen-Image. They average no weights.
QWEN_IMAGE = dict(
    model="Qwen/Qwen-Image", noise_level=1.2, window_size=2, window_range=(0, 5), groups_per_epoch=32,
    group_size=16, guidance_scale=4.0, beta=0.0, ema_decay=0.0, ema_every=1, dtype="bfloat16", lora_rank=64,
    lora_alpha=128, lora_targets=ATTENTION + QWEN_FEED_FORWARD, gradient_checkpointing=True,
    offload_text_encoders=True, eval_num_steps=50)
# Another trainer's examples for Z-Image and FLUX.2-klein-base; docs/recipes.md names them. The guidance scale
# is one more than that of Z-Image's pipeline.
Z_IMAGE = dict(
    model="Tongyi-MAI/Z-Image", max_sequence_length=512, guidance_scale=5.0, window_size=1,
    window_range=(1, 4), groups_per_epoch=48, group_size=16, advantage_std="group", beta=0.0, ema_decay=0.9,
    dtype="bfloat16", lora_rank=64, lora_alpha=128, lora_targets=Z_IMAGE_LAYERS, gradient_checkpointing=True)
FLUX2_KLEIN = Z_IMAGE | dict(
    model="black-forest-labs/FLUX.2-klein-base-4B", num_steps=8, guidance_scale=4.0,
    lora_targets=ATTENTION + FLUX2_FEED_FORWARD, eval_num_steps=28)
# Nobody has published settings for FLUX.2-dev: these are FLUX.1's.
FLUX2_DEV = FLUX | dict(model="black-forest-labs/FLUX.2-dev", max_sequence_length=512, guidance_scale=4.0,
                        lora_targets=ATTENTION + FLUX2_FEED_FORWARD, offload_text_encoders=True)
FLUX_FAST = FLUX | dict(rule="cps", noise_level=0.8, window_size=3, window_range=(0, 3), clip_range=1e-5)

# Steps down to some sigma 0.88 decide an image's colour. They are not trained, and a group shares them. So no
# advantage can reward a background, and pictures stay as varied as they were: docs/experiments.md.
LATE = dict(shared_start_noise=True, window_size=2)

PRESETS = {
    "tiny_ocr": Config(**LATE, window_range=(2, 4), noise_level=1.2, guidance_scale=2.5, epochs=10,
                       eval_every=5, save_every=5, learning_rate=6e-4, learning_rate_half_life=15),
    "tiny_ocr_collapse": Config(),      # trains first steps, so that all pictures get one background
    # The fastest, which collapses where it goes on for longer: docs/experiments.md.
    "tiny_ocr_awm": Config(objective="awm", guidance_scale=2.5, clip_range=1.0, epochs=4, learning_rate=6e-4,
                           learning_rate_half_life=8),
    "sd35m_ocr": PUBLISHED,
    "sd35m_geneval": replace(PUBLISHED, **GENEVAL),
    "sd35m_pickscore": replace(PUBLISHED, **PICKSCORE, beta=0.01),
    "sd35m_ocr_late": replace(PUBLISHED, **LATE, window_range=(3, 5)),            # untried on real weights
    "sd35m_ocr_4gpu": replace(PUBLISHED, groups_per_epoch=16, group_size=16, **FOUR),
    # Its authors published no GenEval run on 4 GPUs: these are the sizes of the other two.
    "sd35m_geneval_4gpu": replace(PUBLISHED, **GENEVAL, groups_per_epoch=16, group_size=16, **FOUR),
    "sd35m_pickscore_4gpu": replace(PUBLISHED, **PICKSCORE, beta=0.01, groups_per_epoch=16, group_size=16,
                                    **FOUR),
    "sd35m_ocr_1gpu": replace(PUBLISHED, groups_per_epoch=8, group_size=8, **FOUR),
    "sd35m_geneval_fast": replace(PUBLISHED, **GENEVAL, **FAST),
    "sd35m_pickscore_fast": replace(PUBLISHED, **PICKSCORE, **FAST, groups_per_epoch=64, group_size=18),
    "sd35m_ocr_guard": replace(PUBLISHED, guard=True, learning_rate=1e-4, clip_range=2e-6, beta=0.0,
                               advantage_std="group", **FOUR),
    "flux_pickscore": replace(PUBLISHED, **PICKSCORE, **FLUX),
    "flux_pickscore_late": replace(PUBLISHED, **PICKSCORE, **FLUX | LATE, window_range=(1, 3)),     # untried
    "flux_fast": replace(PUBLISHED, **PICKSCORE, **FLUX_FAST, advantage_std="group"),
    "flux_geneval_fast": replace(PUBLISHED, **GENEVAL, **FLUX_FAST),
    "qwen_image_pickscore": replace(PUBLISHED, **PICKSCORE, **QWEN_IMAGE),
    "flux2_klein_pickscore": replace(PUBLISHED, **PICKSCORE, **FLUX2_KLEIN),
    "flux2_dev_pickscore": replace(PUBLISHED, **PICKSCORE, **FLUX2_DEV),
    "z_image_pickscore": replace(PUBLISHED, **PICKSCORE, **Z_IMAGE),
}


def parse_config(arguments: list[str], quiet: bool = False) -> tuple[str, Config]:
    """(preset, config) of a command line without its program name. `quiet` prints no --help.

    Raises ConfigError for an unknown preset or option, or a value that does not parse.
    """
    preset = "tiny_ocr"
    if arguments and not arguments[0].startswith("-"):
        preset, *arguments = arguments
    if preset not in PRESETS:
        known = f"{_closest(preset, PRESETS)}; presets: {', '.join(PRESETS)}"
        raise ConfigError(f"unknown preset {preset!r}{known}")
    about = f"{Config.__doc__} These are the values of {preset}; the presets are {', '.join(PRESETS)}."
    config, unknown = parse_options(PRESETS[preset], arguments, "train.py [PRESET]", about, quiet)
    if unknown and unknown[0] in PRESETS:
        raise ConfigError(f"the preset {unknown[0]!r} must come first: train.py {unknown[0]} [--field value]")
    refuse_unknown(unknown, Config)
    return preset, replace(config, **{name: find_place(getattr(config, name)) for name in PLACES})


# Settings that may name a file or a directory.
PLACES = ("model", "prompts", "lora_path", "output_dir")


def find_place(path: str) -> str:
    """A path to open, with "~" expanded. The project's assets are found from any directory."""
    place = os.path.expanduser(path)
    bundled = os.path.join(os.path.dirname(os.path.abspath(__file__)), place)
    return bundled if place.startswith("assets/") and not os.path.exists(place) else place


# The library's words for a mistake, and plainer ones.
PLAINER = {r"^(Value error|Invalid choice|Missing argument) ": "", r"^Error parsing ": "",
           r"^invalid choice": "not a choice:",
           r"invalid literal for int\(\) with base 10:": "not a whole number:",
           r"could not convert string to float:": "not a number:",
           r"Could not find valid parse for arguments:": "expected name value [name value ...], not"}


def parse_options(default, arguments: list[str], prog: str, about: str, quiet: bool = False) -> tuple:
    """A dataclass like `default` with what the command line changes, and the arguments that it does not know.

    prog, about: what --help calls the program, and says of it.
    Raises ConfigError for a value that does not parse, or an option that is given twice.
    """
    refuse_repeated(arguments, [f.name for f in dataclasses.fields(default)])
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
        said = boxes.getvalue() + help_text.getvalue()
        text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]+|-{3,}", " ", said)
        message = " ".join(text.partition("Argument helptext:")[0].partition("For full helptext")[0].split())
        for theirs, ours in PLAINER.items():
            message = re.sub(theirs, ours, message)
        raise ConfigError(f"{message} (given: {' '.join(arguments)}; --help lists all options)") from None


def refuse_repeated(arguments: list[str], names: list[str]) -> None:
    """Raises ConfigError if one of the options is given twice, because the parser would drop the first.

    --a_b, --a-b, --a-b=value and --no-a-b are one option.
    """
    known, given = {name.replace("_", "-") for name in names}, {}
    for word in arguments:
        name = word.partition("=")[0].removeprefix("--").replace("_", "-") if word.startswith("--") else ""
        name = name if name in known else name.removeprefix("no-")
        if name in given and name in known:
            raise ConfigError(f"--{name} is given twice ({given[name]} and {word}): give it once")
        given[name] = word


def refuse_unknown(arguments: list[str], kind: type) -> None:
    """Raises ConfigError if there are any, and names the field of `kind` that is closest to the first."""
    if arguments:
        fields = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(kind)]
        word = arguments[0].partition("=")[0].replace("_", "-")
        if not word.startswith("--") or word in fields:
            raise ConfigError(f"{arguments[0]!r} belongs to no option: --help lists them all")
        raise ConfigError(f"unknown option {arguments[0]!r}{_closest(word, fields)}: --help lists them all")


def _closest(word: str, known) -> str:
    names = {name.lstrip("-"): name for name in known}          # "--lr" shares with "--kl" its dashes alone
    close = difflib.get_close_matches(word.lstrip("-"), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def validate(config: Config) -> None:
    """Raises ConfigError for the first setting that cannot be. Looks at no file and loads nothing."""
    def require(ok: bool, field: str, way_out: str) -> None:
        if not ok:
            raise ConfigError(f"--{field.replace('_', '-')} is {getattr(config, field)!r}: {way_out}")

    awm = config.objective == "awm"                        # it trains no step that was taken
    _validate_rewards(config, require)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int | float):
            most = 2**63 - 1 if field.name == "seed" else 10**9
            require(abs(value) <= most, field.name, f"it must be a finite number, {most:,} at most")
    for field in ("num_steps", "groups_per_epoch", "updates_per_epoch", "reward_threads", "reward_batch",
                  "eval_every", "eval_num_steps", "save_every", "keep_checkpoints", "ema_every", "lora_rank",
                  "lora_alpha", "max_sequence_length", "guidance_scale"):
        require(getattr(config, field) >= 1, field, "it must be at least 1")
    for field in ("epochs", "rollout_batch", "train_batch", "eval_prompts", "eval_images", "window_size",
                  "beta", "weight_decay", "learning_rate_half_life", "skip_nonfinite", "seed"):
        require(getattr(config, field) >= 0, field, "it must be at least 0")
    for field in ("clip_range", "learning_rate", "max_grad_norm", "reward_deadline", "collective_timeout"):
        require(getattr(config, field) > 0, field, "it must be positive")
    require(config.noise_level >= 1e-6, "noise_level", "below 1e-6 a step's variance vanishes in float32")
    require(config.group_size >= 2, "group_size", "it takes at least 2 images of a prompt to compare")
    samples = config.groups_per_epoch * config.group_size
    require(config.updates_per_epoch <= samples, "updates_per_epoch",
            f"an epoch has only {samples} images to share among its updates")
    for field in ("guard", "shared_start_noise"):
        require(not (awm and getattr(config, field)), field,
                f"--objective awm trains no step that was taken; give --no-{field.replace('_', '-')}")
    require(0 <= config.ema_decay < 1, "ema_decay", "it must lie in [0, 1)")
    require(config.reward_deadline <= config.collective_timeout / 2, "reward_deadline",
            f"other ranks wait --collective-timeout {config.collective_timeout:g} seconds at most; "
            "give up to half of that")
    require(0 <= config.max_unanswered <= 1, "max_unanswered", "it is a share and must lie in [0, 1]")
    require(0 < config.timestep_fraction <= 1, "timestep_fraction", "it must lie in (0, 1]")
    require(all(0 < n <= 8192 for n in config.resolution), "resolution", "height and width lie in 1 to 8192")
    cps = config.rule == "cps" and not awm                 # which takes no stochastic step
    require(not cps or config.noise_level <= 1, "noise_level", "under cps, it lies in (0, 1]")
    require(not (config.lora_path and config.full_finetune), "lora_path", "--full-finetune excludes it")
    if config.window_size:
        first, last = config.window_range
        require(0 <= first and last <= config.num_steps, "window_range",
                f"with --num-steps {config.num_steps} it must lie in 0 to {config.num_steps}")
        require(config.window_size <= last - first, "window_size",
                f"it does not fit --window-range {first} {last}")
    trained = config.trained_steps
    require(trained >= 1, "timestep_fraction", f"of {config.num_steps} steps it trains none; raise it")
    last_trained = config.window_range[1] if config.window_size else trained
    require(not cps or last_trained < config.num_steps, "rule",
            "the last step of cps is deterministic; lower --timestep-fraction or --window-range")
    require(config.rule != "cps" or not config.guard, "guard",
            "its ratio needs the log-prob of a Gaussian, which cps has not; choose another --rule")
    require(not re.search(r"[/\\]|^\.{1,2}$", config.run_name), "run_name",
            "it names one directory under --output-dir")


def _validate_rewards(config: Config, require: Callable[[bool, str, str], None]) -> None:
    names = [name for name, _ in config.rewards]
    require(len(set(names)) == len(names), "rewards", "a reward is named twice; give each once")
    require(all(abs(weight) <= 1e30 for _, weight in config.rewards), "rewards",
            "weights must be finite and at most 1e30")
    require(len({*names, *config.eval_rewards}) == len(names) + len(config.eval_rewards), "eval_rewards",
            "a reward is named twice, or trained on as well; --rewards are logged at evaluation anyway")
    for name, _ in config.reward_urls:
        require(name in (*names, *config.eval_rewards), "reward_urls",
                f"give {name!r} a weight in --rewards, or name it in --eval-rewards")
    require(len(set(config.reward_urls)) == len(config.reward_urls), "reward_urls",
            "a server stands there twice")
    require(len(dict(config.reward_models)) == len(config.reward_models), "reward_models",
            "a name stands there twice")


def to_dict(config: Config) -> dict:
    """As json has it: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


