"""What differs between model families: one class per family, and published architectures with random weights.

A new family is one more subclass of `Family`, listed in FAMILIES. sigma runs from 1 (noise) to 0 (data).
"""

import functools
import inspect
import json
import math
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

# Silence transformers before diffusers imports it, because it would warn that torchvision is missing.
logging.set_verbosity_error()

from diffusers import (  # noqa: E402
    AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel,
    SD3Transformer2DModel, StableDiffusion3Pipeline)
from diffusers.utils import logging as diffusers_logging  # noqa: E402

Text = tuple[Tensor, Tensor]      # embeddings (B, L, D), pooled embeddings (B, P)


class Family:
    """The contract of a model family. `self.pipe` is a loaded pipeline.

    The pipeline has a `transformer`, a `vae` with a scaling and a shift factor, and a
    `FlowMatchEulerDiscreteScheduler`. Callers see latents as (B, C, H, W), whatever layout the network takes.
    A subclass defines:

    pipeline, transformer    diffusers' classes of the pipeline and of the network
    published                {NAME: settings of the transformer} for `--model random:NAME`
    vae, scheduler           settings in which a random pipeline departs from diffusers' defaults
    clip_tokens              embeddings that stand before those of T5
    may_lack                 parts that a pipeline can do without, besides those that diffusers calls optional
    """

    pipeline: type[DiffusionPipeline]
    transformer: type[torch.nn.Module]
    published: dict[str, dict] = {}
    vae: dict[str, float] = {}
    scheduler: dict[str, float | bool] = {}
    clip_tokens: int = 0
    may_lack: tuple[str, ...] = ()

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe

    @classmethod
    def parts(cls) -> list[str]:
        """Name the parts that a pipeline of this family must have."""
        optional = (*cls.pipeline._optional_components, *cls.may_lack)
        return [name for name in inspect.signature(cls.pipeline).parameters if name not in optional]

    def tiling(self) -> tuple[int, int, int | None]:
        """Return a latent's channels, the side of a patch in latent pixels, and the most patches on a side.

        The last one is None if the network takes any number of patches.
        """
        raise NotImplementedError

    def schedule(self, num_steps: int, tokens: int) -> dict[str, float]:
        """Return keywords for `sampler.timestep_schedule` that give the pipeline's own schedule.

        tokens: patches of an image, on which a dynamic shift depends.
        """
        raise NotImplementedError

    def encode(self, prompt: str, length: int, device: torch.device) -> Text:
        """Encode one prompt, `length` tokens of T5, to embeddings (1, L, D) and pooled ones (1, P)."""
        raise NotImplementedError

    @staticmethod
    def branches(guidance_scale: float) -> int:
        """Count the rows that the network computes per image: 2 for classifier-free guidance, else 1."""
        raise NotImplementedError

    def velocity(self, network: torch.nn.Module, latents: Tensor, sigma: Tensor, text: Text,
                 guidance_scale: float) -> Tensor:
        """Call the network: latents (B, C, H, W), sigma (B,) -> velocity (B, C, H, W). Gradients flow."""
        raise NotImplementedError

    def shift(self, tokens: int) -> float:
        """Return the scheduler's shift of sigma. A dynamic shift depends on the number of patches.

        mu lies on the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
        """
        config = self.pipe.scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        fewest, most = config.base_image_seq_len, config.max_image_seq_len
        slope = (config.max_shift - config.base_shift) / (most - fewest)
        mu = config.base_shift + slope * (tokens - fewest)
        return math.exp(mu) if config.time_shift_type == "exponential" else mu


class SD3(Family):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

    pipeline, transformer = StableDiffusion3Pipeline, SD3Transformer2DModel
    published = {
        "sd35m": dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm",
                      pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
        "sd35l": dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm",
                      pos_embed_max_size=192)}
    vae = dict(scaling_factor=1.5305, shift_factor=0.0609)
    scheduler = dict(shift=3.0)
    clip_tokens = 77
    may_lack = ("text_encoder_3", "tokenizer_3")      # T5, whose embeddings are then zeros

    def tiling(self) -> tuple[int, int, int | None]:
        config = self.pipe.transformer.config
        return config.in_channels, config.patch_size, config.pos_embed_max_size

    def schedule(self, num_steps: int, tokens: int) -> dict[str, float]:
        # diffusers shifts the grid's end, 1/1000, once at construction, except with dynamic shifting.
        dynamic = self.pipe.scheduler.config.use_dynamic_shifting
        return {"shift": self.shift(tokens), **({"sigma_min": 1 / 1000} if dynamic else {})}

    def encode(self, prompt: str, length: int, device: torch.device) -> Text:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt, prompt, prompt, device=device, max_sequence_length=length,
            do_classifier_free_guidance=False)
        return embeds, pooled

    @staticmethod
    def branches(guidance_scale: float) -> int:
        return 1 if guidance_scale == 1 else 2

    def velocity(self, network: torch.nn.Module, latents: Tensor, sigma: Tensor, text: Text,
                 guidance_scale: float) -> Tensor:
        return network(latents, *text, 1000 * sigma, return_dict=False)[0]


class FLUX(Family):
    """FLUX.1. A token is 2 x 2 latent pixels. The network takes the guidance scale as an input."""

    pipeline, transformer = FluxPipeline, FluxTransformer2DModel
    published = {"flux": dict(guidance_embeds=True)}      # other settings are the class's defaults
    vae = dict(scaling_factor=0.3611, shift_factor=0.1159)
    scheduler = dict(shift=3.0, use_dynamic_shifting=True)

    def tiling(self) -> tuple[int, int, int | None]:
        return self.pipe.transformer.config.in_channels // 4, 2, None

    def schedule(self, num_steps: int, tokens: int) -> dict[str, float]:
        return {"shift": self.shift(tokens), "sigma_min": 1 / num_steps}

    def encode(self, prompt: str, length: int, device: torch.device) -> Text:
        embeds, pooled, _ = self.pipe.encode_prompt(prompt, prompt, device=device, max_sequence_length=length)
        return embeds, pooled

    @staticmethod
    def branches(guidance_scale: float) -> int:
        return 1

    def velocity(self, network: torch.nn.Module, latents: Tensor, sigma: Tensor, text: Text,
                 guidance_scale: float) -> Tensor:
        embeds, pooled = text
        rows, columns = (torch.arange(size // 2, device=latents.device) for size in latents.shape[-2:])
        # An image token's position is (0, row, column). A text token's position is (0, 0, 0).
        image_ids = F.pad(torch.cartesian_prod(rows, columns), (1, 0))               # (H/2 W/2, 3)
        text_ids = image_ids.new_zeros(embeds.shape[1], 3)                           # (L, 3)
        tokens = F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)            # (B, H/2 W/2, 4C)
        guided = self.pipe.transformer.config.guidance_embeds
        v = network(tokens, embeds, pooled, sigma, img_ids=image_ids, txt_ids=text_ids, return_dict=False,
                    guidance=torch.full_like(sigma, guidance_scale) if guided else None)[0]
        v = v.transpose(1, 2).unflatten(2, (len(rows), len(columns)))                # (B, 4C, H/2, W/2)
        return F.pixel_shuffle(v, 2)                                                 # (B, C, H, W)


FAMILIES = {family.pipeline.__name__: family for family in (SD3, FLUX)}


def compile_blocks(transformer: torch.nn.Module) -> None:
    """Compile each block by itself, so that all blocks of a kind share one compilation."""
    # Raise the limit, because gradients or none, the adapter or none, and each batch size are a version each.
    torch._dynamo.config.recompile_limit = 64
    for block in [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]:
        block.compile()


# ---- schedulers --------------------------------------------------------------------------------------------

SCHEDULER_FILE = "scheduler/scheduler_config.json"
SCHEDULER = FlowMatchEulerDiscreteScheduler.__name__
# Options that change what a pipeline draws, each with the one value that `sampler.rollout` reproduces.
SCHEDULER_OPTIONS = {
    "num_train_timesteps": 1000, "stochastic_sampling": False, "shift_terminal": None,
    "invert_sigmas": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "use_flow_sigmas": False}


def check_scheduler(model: str, entry: list | None, file: Path | None) -> None:
    """Raise ValueError in one line if a rollout without noise would not draw what the pipeline draws.

    entry: what model_index.json says of the scheduler, [library, class]. file: the pipeline's SCHEDULER_FILE.
    """
    try:
        options = json.loads(file.read_text()) if file else None
        kinds = {entry[1], options.get("_class_name", entry[1])}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"--model {model!r} has no scheduler: model_index.json does not name its class, or "
                         f"{SCHEDULER_FILE} is missing or no JSON object; save the pipeline again") from error
    if kinds != {SCHEDULER}:
        kind = next(kind for kind in kinds if kind != SCHEDULER)
        raise ValueError(
            f"--model {model!r} has the scheduler {kind}, which draws otherwise than training samples: only "
            f"{SCHEDULER} is supported; set pipe.scheduler = {SCHEDULER}.from_config(pipe.scheduler.config) "
            "and save the pipeline")
    parameters = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
    options = {name: parameter.default for name, parameter in parameters.items()} | options

    def refuse(name: str, needed: str) -> None:
        raise ValueError(f"--model {model!r}: its scheduler's {name} is {options[name]!r}, which is not "
                         f"supported; set it to {needed} in {SCHEDULER_FILE}")

    for name, needed in SCHEDULER_OPTIONS.items():
        value = options.get(name, needed)
        if value != needed and (value or needed):      # None, False and 0 all turn an option off
            refuse(name, json.dumps(needed))
    dynamic = options["use_dynamic_shifting"]
    line = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    for name in line if dynamic else ("shift",):
        if type(options[name]) not in (int, float) or not abs(options[name]) < math.inf:
            refuse(name, "a number")
    if not dynamic and not options["shift"] > 0:
        refuse("shift", "a number above 0")
    if dynamic and options["base_image_seq_len"] == options["max_image_seq_len"]:
        refuse("max_image_seq_len", "a number above base_image_seq_len")
    if dynamic and options["time_shift_type"] not in ("exponential", "linear"):
        refuse("time_shift_type", '"exponential" or "linear"')


# ---- pipelines ---------------------------------------------------------------------------------------------

def load_pipeline(family: type[Family], model: str, index: dict, *, dtypes: dict[str, torch.dtype]
                  ) -> DiffusionPipeline:
    """Load a pipeline from a directory or the hub. index: its model_index.json. dtypes: by part, or
    "default".

    Weights may be in safetensors or .bin files, in full or in half precision. Raises ValueError in one line.
    """
    # Pass None for the parts that the index leaves out, because diffusers would miss them.
    left_out = {name: None for name, entry in index.items() if entry == [None, None]}
    load = functools.partial(family.pipeline.from_pretrained, model, dtype=dtypes, **left_out)
    # Silence diffusers, because it logs what is missing even where the next try finds it.
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        return load()
    except (OSError, ValueError) as error:
        try:
            return load(variant="fp16")
        except (OSError, ValueError):
            reason = " ".join(str(error).split())
            raise ValueError(f"--model {model!r} cannot be loaded: {reason:.300}") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)


def random_pipeline(family: type[Family], name: str, device: torch.device, *, dtype: torch.dtype,
                    vae_dtype: torch.dtype) -> DiffusionPipeline:
    """Make a published architecture with random weights, always the same ones, to measure time and memory.

    It has no text encoders; `random_text` stands in for them. The parts are made on `device` and in their
    dtypes, so that no large network exists twice.
    """
    def make(kind: type[torch.nn.Module], dtype: torch.dtype, **settings) -> torch.nn.Module:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return kind(**settings).eval()
        finally:
            torch.set_default_dtype(default)

    parts = dict.fromkeys(inspect.signature(family.pipeline).parameters)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(**family.scheduler)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        parts["transformer"] = make(family.transformer, dtype, **family.published[name])
        parts["vae"] = make(
            AutoencoderKL, vae_dtype, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
            up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512),
            latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **family.vae)
    return family.pipeline(**parts)


def random_text(family: Family, prompt: str, length: int, dtype: torch.dtype) -> Text:
    """Draw embeddings (1, L, D) and pooled embeddings (1, P). A prompt always gets the same numbers."""
    generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
    config = family.pipe.transformer.config
    embeds = torch.randn(1, family.clip_tokens + length, config.joint_attention_dim, generator=generator)
    pooled = torch.randn(1, config.pooled_projection_dim, generator=generator)
    return embeds.to(dtype), pooled.to(dtype)
