"""A diffusers pipeline as a velocity model: load, adapter, text, guidance, decode, average, save.

    policy = Policy("assets/tiny-sd3", device)
    text = policy.encode(['the word "lamp"'])
    v = policy.velocity(text, guidance_scale=4.5)(latents, sigma)      # (B, C, H, W), (B,) -> (B, C, H, W)
"""

import contextlib
import json
import os
from pathlib import Path

import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")      # before the import, which has things to say about torchvision

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers.utils import logging as transformers_logging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

TEXT_CACHE = 1024      # prompts whose embeddings are kept, in host memory; one of SD3.5's takes 1.7 MB


def check_model(model: str) -> None:
    """Raises ValueError, in one line, unless `model` is a StableDiffusion3Pipeline: a directory or a hub id. Loads no weights."""
    index = Path(model) / "model_index.json"
    if not index.exists():
        if Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise ValueError(f"--model {model!r} is no diffusers pipeline: {index} does not exist")
        try:
            index = Path(hf_hub_download(model, "model_index.json"))
        except Exception as error:
            raise ValueError(f"--model {model!r} is neither a directory here nor a pipeline that could be had from the hub "
                             f"({type(error).__name__}); give a directory, or log in or go on line") from error
    kind = json.loads(index.read_text()).get("_class_name")
    if kind != "StableDiffusion3Pipeline":
        raise ValueError(f"--model {model!r} is a {kind}: only StableDiffusion3Pipeline is supported")


class Policy:
    """The transformer of a Stable Diffusion 3 pipeline, trained by an adapter or whole, and the frozen parts around it.

    The network computes in `dtype`; weights that are trained are float32 (float64 throughout for "float64").
    The reference policy is the same network with its adapter off, or, under `full_finetune`, a frozen copy.
    """

    def __init__(self, model: str, device: torch.device, dtype: str = "float32", resolution: tuple[int, int] = (512, 512),
                 max_sequence_length: int = 128, lora_rank: int = 32, lora_alpha: int = 64,
                 lora_targets: tuple[str, ...] | str = "all-linear", full_finetune: bool = False,
                 with_reference: bool = True):
        """Raises ValueError for a resolution that the model's patches do not tile, or that exceeds its positions."""
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        self.device, self.dtype = device, DTYPES[dtype]
        self.compute_dtype = torch.float64 if dtype == "float64" else torch.float32      # of latents and trained weights
        self.max_sequence_length = max_sequence_length
        frozen = torch.float32 if full_finetune and dtype != "float64" else self.dtype
        # The autoencoder stays in full precision: what it draws is what is scored.
        self.pipe = StableDiffusion3Pipeline.from_pretrained(
            model, dtype={"default": self.dtype, "transformer": frozen, "vae": self.compute_dtype})
        self.pipe.to(device)
        for part in (self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3):
            if part is not None:
                part.requires_grad_(False)
        self._check_resolution(model, resolution)
        if self.pipe.scheduler.config.get("use_dynamic_shifting"):
            raise ValueError(f"--model {model!r}: its scheduler shifts sigmas by resolution, which is not supported")

        transformer = self.pipe.transformer.requires_grad_(full_finetune)
        self.reference = None
        if full_finetune:
            if with_reference:
                self.reference = SD3Transformer2DModel.from_pretrained(
                    model, subfolder="transformer", dtype=self.dtype).to(device).requires_grad_(False)
            self.network = transformer
        else:
            targets = lora_targets if isinstance(lora_targets, str) else list(lora_targets)
            self.network = get_peft_model(transformer, LoraConfig(
                r=lora_rank, lora_alpha=lora_alpha, init_lora_weights="gaussian", target_modules=targets))
        if dtype == "float64":
            self.network.double()
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self._text_cache: dict[str, tuple[Tensor, Tensor]] = {}

    def _check_resolution(self, model: str, resolution: tuple[int, int]) -> None:
        config = self.pipe.transformer.config
        unit = self.pipe.vae_scale_factor * config.patch_size
        largest = config.pos_embed_max_size * unit
        if any(size % unit or size > largest for size in resolution):
            raise ValueError(f"--resolution is {resolution}: {model} takes multiples of {unit} up to {largest}")
        self.latent_shape = (config.in_channels, *(size // self.pipe.vae_scale_factor for size in resolution))   # C, H, W

    @property
    def shift(self) -> float:
        """Of the pipeline's own sigma schedule."""
        return self.pipe.scheduler.config.shift

    # ------------------------------------------------------------------------------------------------------- text

    @torch.no_grad()
    def cache_text(self, prompts: list[str]) -> None:
        """Encode each of `prompts` that is not cached yet.

        One at a time: in a batch, the last bits of an embedding depend on the batch's size, and a resumed run, whose cache
        starts empty, would batch other prompts together.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._text_cache:
                embeds, _, pooled, _ = self.pipe.encode_prompt(
                    prompt, prompt, prompt, device=self.device, do_classifier_free_guidance=False,
                    max_sequence_length=self.max_sequence_length)
                self._text_cache[prompt] = embeds[0].cpu(), pooled[0].cpu()

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) and pooled embeddings (B, P) of `prompts`; each distinct prompt is encoded once."""
        self.cache_text(prompts)
        embeds, pooled = zip(*(self._text_cache[p] for p in prompts))
        while len(self._text_cache) > TEXT_CACHE:
            self._text_cache.pop(next(iter(self._text_cache)))
        return torch.stack(embeds).to(self.device), torch.stack(pooled).to(self.device)

    # --------------------------------------------------------------------------------------------------- velocity

    def branches(self, guidance_scale: float) -> int:
        """Calls of the transformer for one image's velocity."""
        return 1 if guidance_scale == 1 else 2

    def velocity(self, text: tuple[Tensor, Tensor], guidance_scale: float = 1.0, network=None):
        """The policy as `velocity(latents (B, C, H, W), sigma (B,)) -> (B, C, H, W)`, in the latents' dtype, with gradients.

        text: what `encode` made of the B prompts. With guidance, the guided velocity is the policy: gradients go through
        both branches, which share one call of the network.
        """
        network = network or self.network
        embeds, pooled = text
        if guidance_scale != 1:
            empty = self.encode([""])
            embeds = torch.cat([empty[0].expand_as(embeds), embeds])                     # (2B, L, D)
            pooled = torch.cat([empty[1].expand_as(pooled), pooled])                     # (2B, P)

        def guided(latents: Tensor, sigma: Tensor) -> Tensor:
            copies = len(embeds) // len(latents)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype in (torch.float16, torch.bfloat16)):
                v = network(torch.cat([latents] * copies), embeds, pooled,
                            torch.cat([1000 * sigma] * copies), return_dict=False)[0].to(latents.dtype)
            if copies == 1:
                return v
            unconditional, conditional = v.chunk(2)
            # v = v_uncond + w (v_cond - v_uncond): arXiv 2207.12598, eq. 6, in diffusers' scale, where w = 1 is none
            return unconditional + guidance_scale * (conditional - unconditional)

        return guided

    def reference_velocity(self, text: tuple[Tensor, Tensor], guidance_scale: float = 1.0):
        """The velocity before any training, as `velocity`, without gradients."""
        guided = self.velocity(text, guidance_scale, self.reference)

        @torch.no_grad()
        def of_reference(latents: Tensor, sigma: Tensor) -> Tensor:
            with contextlib.nullcontext() if self.reference is not None else self.network.disable_adapter():
                return guided(latents, sigma)

        return of_reference

    # ----------------------------------------------------------------------------------------------------- images

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) as images: uint8 (B, 8H, 8W, 3) for a VAE of compression 8, on the CPU."""
        vae = self.pipe.vae
        images = vae.decode((latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample
        images = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return images.permute(0, 2, 3, 1).contiguous().cpu()

    # ----------------------------------------------------------------------------------------------------- saving

    def save(self, directory: Path) -> None:
        """The trained weights as people use them: peft's `directory/adapter`, or diffusers' `directory/transformer`."""
        self.network.save_pretrained(directory / ("adapter" if isinstance(self.network, PeftModel) else "transformer"))


class WeightAverage:
    """Exponential moving average of trained weights, d = min((1 + n) / (10 + n), decay) after n optimizer steps."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float, every: int):
        self.parameters, self.decay, self.every = parameters, decay, every
        self.steps = 0                                                                   # optimizer steps seen
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Call once after each optimizer step."""
        self.steps += 1
        if self.steps % self.every == 0:
            decay = min((1 + self.steps) / (10 + self.steps), self.decay)
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """Within, the trained weights are the average; afterwards they are themselves again."""
        kept = [p.detach().clone() for p in self.parameters]
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for p, value in zip(self.parameters, values):
            p.copy_(value)
