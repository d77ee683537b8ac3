"""What differs between model families, a class each, and their published architectures with random weights."""

import inspect
import json
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

logging.set_verbosity_error()      # before the next import, which has things to say about torchvision

from diffusers import (  # noqa: E402
    AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel,
    SD3Transformer2DModel, StableDiffusion3Pipeline)

Text = tuple[Tensor, Tensor]      # embeddings (B, L, D), pooled embeddings (B, P)


class Family:
    """What a kind of pipeline does in its own way. A new one is a subclass, listed in FAMILIES, that says:

    pipeline, transformer       diffusers' classes of the whole and of the network
    tiling()                    a latent's channels, its pixels on a side of a patch, most patches on a side (None: any number)
    schedule(T, tokens)         sampler.timestep_schedule's arguments for T steps of so many patches, as the pipeline has them
    encode(prompt, length, device)      embeddings (1, L, D) and pooled (1, P) of one prompt, of `length` T5 tokens
    branches(guidance_scale)    transformer calls of a guided velocity: 2 for classifier-free guidance, else 1; static
    velocity(network, latents, sigma, text, guidance_scale)
                                one call: (B, C, H, W), (B,), what `encode` made -> (B, C, H, W); gradients flow

    All are about `self.pipe`, a loaded pipeline with a `transformer`, a `vae` with scaling and shift factor, and a flow-matching
    `scheduler`. Outside, latents are (B, C, H, W), however the network takes them. For `--model random:NAME` it may say besides:

    published, vae, scheduler   {NAME: the transformer's settings}, what is particular in those of autoencoder and scheduler
    clip_tokens                 how many embeddings stand before T5's
    """

    published: dict[str, dict] = {}

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe

    def shift(self, tokens: int) -> float:
        """The scheduler's, or its dynamic one: mu lies on a line through two pairs (patches, mu)."""
        config = self.pipe.scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        return math.exp(mu) if config.time_shift_type == "exponential" else mu


class SD3(Family):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

    pipeline, transformer = StableDiffusion3Pipeline, SD3Transformer2DModel
    clip_tokens = 77
    published = {
        "sd35m": dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
                      dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
        "sd35l": dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
                      qk_norm="rms_norm")}
    vae = dict(scaling_factor=1.5305, shift_factor=0.0609)
    scheduler = dict(shift=3.0)

    def tiling(self) -> tuple[int, int, int | None]:
        config = self.pipe.transformer.config
        return config.in_channels, config.patch_size, config.pos_embed_max_size

    def schedule(self, num_steps: int, tokens: int) -> dict[str, float]:
        dynamic = self.pipe.scheduler.config.use_dynamic_shifting                # the grid's end is shifted once, if it can be
        return {"shift": self.shift(tokens), **({"sigma_min": 1 / 1000} if dynamic else {})}

    def encode(self, prompt: str, length: int, device: torch.device) -> Text:
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompt, prompt, prompt, device=device, do_classifier_free_guidance=False,
                                                       max_sequence_length=length)
        return embeds, pooled

    @staticmethod
    def branches(guidance_scale: float) -> int:
        return 1 if guidance_scale == 1 else 2

    def velocity(self, network, latents: Tensor, sigma: Tensor, text: Text, guidance_scale: float) -> Tensor:
        return network(latents, *text, 1000 * sigma, return_dict=False)[0]


class FLUX(Family):
    """FLUX.1: 2 x 2 latent pixels are a token, and the guidance scale is an input of the network, which was distilled on it."""

    pipeline, transformer = FluxPipeline, FluxTransformer2DModel
    clip_tokens = 0
    published = {"flux": dict(guidance_embeds=True)}                             # the rest is the class's default
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

    def velocity(self, network, latents: Tensor, sigma: Tensor, text: Text, guidance_scale: float) -> Tensor:
        embeds, pooled = text
        rows, columns = (torch.arange(size // 2, device=latents.device) for size in latents.shape[-2:])
        image_ids = F.pad(torch.cartesian_prod(rows, columns), (1, 0))                           # (H/2 W/2, 3): 0, row, column
        tokens = F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)                        # (B, H/2 W/2, 4C)
        guidance = torch.full_like(sigma, guidance_scale) if self.pipe.transformer.config.guidance_embeds else None
        v = network(tokens, embeds, pooled, sigma, img_ids=image_ids, txt_ids=image_ids.new_zeros(embeds.shape[1], 3),
                    guidance=guidance, return_dict=False)[0]                                     # (B, H/2 W/2, 4C)
        return F.pixel_shuffle(v.transpose(1, 2).unflatten(2, (len(rows), len(columns))), 2)


FAMILIES = {family.pipeline.__name__: family for family in (SD3, FLUX)}


# ---- schedulers

SCHEDULER_FILE = "scheduler/scheduler_config.json"
SCHEDULER = FlowMatchEulerDiscreteScheduler.__name__
# Scheduler options that change what a pipeline draws, each with the one value that `sampler.rollout` reproduces.
SCHEDULER_OPTIONS = {"num_train_timesteps": 1000, "stochastic_sampling": False, "shift_terminal": None, "invert_sigmas": False,
                     "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
                     "use_flow_sigmas": False}


def check_scheduler(model: str, entry, text: str | None) -> None:
    """Raise ValueError in one line if a rollout without noise would not draw what the pipeline draws with its scheduler.

    `entry` is what model_index.json says of the scheduler: [library, class]. `text` is what SCHEDULER_FILE holds.
    """
    try:
        options = json.loads(text or "")
        kinds = {entry[1], options.get("_class_name", entry[1])}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"--model {model!r} has no scheduler: model_index.json does not name its class, or {SCHEDULER_FILE} is missing or "
                         "no JSON object; save the pipeline again") from error
    if kinds != {SCHEDULER}:
        kind = next(kind for kind in kinds if kind != SCHEDULER)
        raise ValueError(f"--model {model!r} has the scheduler {kind}, which draws otherwise than training samples: only "
                         f"{SCHEDULER} is supported; set pipe.scheduler = {SCHEDULER}.from_config(pipe.scheduler.config) and "
                         "save the pipeline")
    defaults = {name: p.default for name, p in inspect.signature(FlowMatchEulerDiscreteScheduler).parameters.items()}
    options = defaults | options

    def refuse(name: str, needed: str):
        raise ValueError(f"--model {model!r}: its scheduler's {name} is {options[name]!r}, which is not supported; set it to "
                         f"{needed} in {SCHEDULER_FILE}")

    for name, needed in SCHEDULER_OPTIONS.items():
        value = options.get(name, needed)
        if value != needed and (value or needed):
            refuse(name, json.dumps(needed))
    dynamic = options["use_dynamic_shifting"]
    for name in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len") if dynamic else ("shift",):
        if type(options[name]) not in (int, float) or not abs(options[name]) < math.inf:
            refuse(name, "a number")
    if not dynamic and not options["shift"] > 0:
        refuse("shift", "a number above 0")
    if dynamic:
        if options["base_image_seq_len"] == options["max_image_seq_len"]:
            refuse("max_image_seq_len", "a number above base_image_seq_len")
        if options["time_shift_type"] not in ("exponential", "linear"):
            refuse("time_shift_type", '"exponential" or "linear"')


# ------------------------------------------------------------------------------------------------------ random weights

def random_pipeline(family: type[Family], name: str, device: torch.device, dtype: torch.dtype,
                    vae_dtype: torch.dtype) -> DiffusionPipeline:
    """A published architecture with random weights, always the same ones, for timing and memory without a download.

    It is made on `device` and in its dtypes, so that no large network exists twice. It has no text encoders; see `encode`.
    """
    def made(kind, dtype: torch.dtype, **settings) -> torch.nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return kind(**settings).eval()
        finally:
            torch.set_default_dtype(before)

    parts = dict.fromkeys(inspect.signature(family.pipeline).parameters)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        parts["transformer"] = made(family.transformer, dtype, **family.published[name])
        parts["vae"] = made(
            AutoencoderKL, vae_dtype, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False, **family.vae)
    return family.pipeline(**{**parts, "scheduler": FlowMatchEulerDiscreteScheduler(**family.scheduler)})
