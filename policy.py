"""A diffusers pipeline as a velocity model: load, adapter, text, guidance, decode, average, save.

    policy = Policy("assets/tiny-sd3", device)
    text = policy.encode(['the word "lamp"'])
    v = policy.velocity(text, guidance_scale=4.5)(latents, sigma)      # (B, C, H, W), (B,) -> (B, C, H, W)

What differs between SD3 and FLUX is a `Family` each; a new one is one more.
"""

import contextlib
import copy
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.utils import logging as transformers_logging

from adapters import fit_adapter, from_hub, is_hub_id, load_adapter
from families import FAMILIES, SCHEDULER_FILE, Family, Text, check_scheduler, random_pipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

TEXT_CACHE = 1024            # prompts whose embeddings are kept, in host memory; one of SD3.5's takes 1.7 MB
DECODE_PIXELS = 2**20        # of the images that the autoencoder decodes at once: 4 of 512 x 512


# ------------------------------------------------------------------------------------------- what can be had, and whence

def check_model(model: str) -> type[Family]:
    """The family of `model`, a pipeline's directory, a hub id or random:NAME; else a ValueError in one line. Loads no weights."""
    if model.startswith("random:"):
        known = {f"random:{name}": family for family in FAMILIES.values() for name in family.published}
        if model not in known:
            raise ValueError(f"--model {model!r} is unknown: {', '.join(known)} are made with random weights")
        return known[model]
    text = read_part(model, "model_index.json")
    if text is None:
        where = "on the hub it has no model_index.json" if is_hub_id(model) else f"{model}/model_index.json does not exist"
        raise ValueError(f"--model {model!r} is no diffusers pipeline: {where}")
    try:
        index = json.loads(text)
        kind = index["_class_name"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"--model {model!r} is no diffusers pipeline: its model_index.json does not name its class") from error
    if kind not in FAMILIES:
        raise ValueError(f"--model {model!r} is a {kind}: only {' and '.join(FAMILIES)} are supported")
    check_scheduler(model, index.get("scheduler"), read_part(model, SCHEDULER_FILE))
    return FAMILIES[kind]


def read_part(model: str, name: str) -> str | None:
    """The text of one file of a pipeline, which is a directory or a hub id; None if the pipeline has no such file."""
    if is_hub_id(model):
        path = from_hub("--model", model, name)
    else:
        path = Path(model) / name if (Path(model) / name).is_file() else None
    return path.read_text(encoding="utf-8", errors="replace") if path else None


# ---------------------------------------------------------------------------------------------------------- the policy

def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From host memory; a GPU fetches it while this process goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Copies on their way to host memory. The call waits for them, and not for what a GPU was asked to do after this."""
    if tensors[0].device.type != "cuda":
        return lambda: list(tensors)
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    done = torch.cuda.Event()
    done.record()

    def arrived() -> list[Tensor]:
        done.synchronize()
        return copies

    return arrived


class Policy:
    """A pipeline's transformer, trained by an adapter or whole, and the frozen parts around it.

    The network computes in `dtype`, in which its frozen weights sit; weights that are trained are float32 (float64 throughout
    for "float64"). The reference policy is the network with its adapter off, also where training goes on from `lora_path`; under
    `full_finetune` it is a frozen copy.
    """

    def __init__(self, model: str, device: torch.device, dtype: str = "float32", resolution: tuple[int, int] = (512, 512),
                 max_sequence_length: int = 128, lora_rank: int = 32, lora_alpha: int = 64,
                 lora_targets: tuple[str, ...] | str = "all-linear", full_finetune: bool = False,
                 with_reference: bool = True, lora_path: str = "", offload_text_encoders: bool = False,
                 gradient_checkpointing: bool = False, compile: bool = False):
        """An adapter at `lora_path` brings rank, alpha and targets of its own; with `lora_rank` 0 and none there is none.

        Raises ValueError for a resolution that the model's patches do not tile, or that exceeds its positions, for a sigma
        schedule that is not supported, and for an adapter that does not fit.
        """
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        self.model, self.device, self.dtype = model, device, DTYPES[dtype]
        self.compute_dtype = torch.float64 if dtype == "float64" else torch.float32      # of latents and trained weights
        self.max_sequence_length = max_sequence_length
        frozen = torch.float32 if full_finetune and dtype != "float64" else self.dtype
        # The autoencoder stays in full precision: what it draws is what is scored.
        family = check_model(model)
        if model.startswith("random:"):
            self.pipe = random_pipeline(family, model.removeprefix("random:"), device, frozen, self.compute_dtype)
        else:
            self.pipe = family.pipeline.from_pretrained(
                model, use_safetensors=True, dtype={"default": self.dtype, "transformer": frozen, "vae": self.compute_dtype})
        self.family = family(self.pipe)
        self.set_resolution(resolution)
        self.offload_text_encoders = offload_text_encoders
        for name, part in self.pipe.components.items():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).to("cpu" if offload_text_encoders and name.startswith("text_encoder") else device)

        transformer = self.pipe.transformer.requires_grad_(full_finetune)
        self.reference = None
        if full_finetune:
            if with_reference:
                self.reference = torch.nn.Module.to(copy.deepcopy(transformer), self.dtype).requires_grad_(False)
            self.network = transformer
        elif lora_path:
            self.network = load_adapter(transformer, lora_path, model)
        elif lora_rank:
            targets = lora_targets if isinstance(lora_targets, str) else list(lora_targets)
            self.network = get_peft_model(transformer, LoraConfig(
                r=lora_rank, lora_alpha=lora_alpha, init_lora_weights="gaussian", target_modules=targets))
        else:
            self.network = transformer
        if isinstance(self.network, PeftModel):
            self.network.peft_config["default"].base_model_name_or_path = model
        self.network.eval()                                  # an adapter's dropout would replay another policy than sampled
        if dtype == "float64":
            self.network.double()
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if compile:                                          # block by block: all of a kind share one compilation
            torch._dynamo.config.recompile_limit = 64        # with and without gradients, with and without the adapter, batch sizes
            for block in [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]:
                block.compile()
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self._text_cache: dict[str, Text] = {}
        self._text_kept = 0

    def set_resolution(self, resolution: tuple[int, int]) -> None:
        """Height and width of the images to come, in pixels. Raises ValueError for what the model's patches do not tile."""
        channels, patch, most = self.family.tiling()
        scale = self.pipe.vae_scale_factor
        unit = scale * patch
        if any(size < unit or size % unit or size > (most or math.inf) * unit for size in resolution):
            limit = f" up to {most * unit}" if most else ""
            raise ValueError(f"--resolution is {resolution}: {self.model} takes multiples of {unit}{limit}")
        self.latent_shape = (channels, *(size // scale for size in resolution))          # C, H, W
        self.tokens = math.prod(size // unit for size in resolution)                     # patches of an image
        if not (shift := self.family.shift(self.tokens)) > 0:
            raise ValueError(f"--resolution is {resolution}: the scheduler of {self.model} would shift its times by {shift:.3g}, "
                             "which must be above 0; give another resolution, or time_shift_type \"exponential\"")

    def schedule_arguments(self, num_steps: int) -> dict[str, float]:
        """For sampler.timestep_schedule(num_steps, **these): the pipeline's own schedule at this resolution."""
        return self.family.schedule(num_steps, self.tokens)

    def branches(self, guidance_scale: float) -> int:
        """Transformer calls of a velocity."""
        return self.family.branches(guidance_scale)

    # --------------------------------------------------------------------------------------------------- adapters

    def add_adapter(self, name: str, lora_path: str) -> None:
        """Another adapter on the same weights. One that does not fit is a ValueError, and leaves the policy as it was."""
        transformer = self.pipe.transformer
        with torch.device("meta"):                           # tried without weights: what is refused leaves layers behind
            skeleton = type(transformer).from_config(transformer.config)
        fit_adapter(skeleton, lora_path, self.model, name)
        self.network = load_adapter(self.network, lora_path, self.model, name).eval()

    def use_adapter(self, name: str, strength: float = 1.0) -> None:
        """From now on the network is the model with this adapter: 1 is as it was trained, 0 the model itself, to the bit."""
        if not isinstance(self.network, PeftModel):
            return
        if not strength:
            return self.network.base_model.disable_adapter_layers()
        self.network.base_model.enable_adapter_layers()
        self.network.set_adapter(name, inference_mode=True)
        for layer in self.network.modules():
            if isinstance(layer, LoraLayer):
                layer.set_scale(name, strength)

    # ------------------------------------------------------------------------------------------------------- text

    @torch.no_grad()
    def cache_text(self, prompts: list[str], guidance_scale: float = 1.0) -> None:
        """Encode now what `velocity` will take for `prompts`, and keep all of it until the next call.

        Text encoders that are kept off the device come for this once, rather than for every batch.
        """
        prompts = list(dict.fromkeys([*prompts, *[""] * (self.branches(guidance_scale) - 1)]))
        self._text_kept = len(prompts)
        self._encode_missing(prompts)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Text:
        """Embeddings (B, L, D) and pooled embeddings (B, P) of `prompts`; each distinct prompt is encoded once."""
        self._encode_missing(prompts)
        text = tuple(to_device(torch.stack(part), self.device) for part in zip(*(self._text_cache[p] for p in prompts)))
        while len(self._text_cache) > max(TEXT_CACHE, self._text_kept):
            self._text_cache.pop(next(iter(self._text_cache)))
        return text

    def _encode_missing(self, prompts: list[str]) -> None:
        """One at a time: in a batch, the last bits of an embedding depend on the batch's size, and a resumed run, whose cache
        starts empty, would batch other prompts together.
        """
        missing = [p for p in dict.fromkeys(prompts) if p not in self._text_cache]
        try:
            if missing and self.offload_text_encoders:
                self._move_text_encoders(self.device)
            for prompt in missing:
                text = (self.family.encode(prompt, self.max_sequence_length, self.device) if self.pipe.text_encoder is not None
                        else self._random_text(prompt))
                self._text_cache[prompt] = tuple(part[0].cpu() for part in text)
        finally:
            if missing and self.offload_text_encoders:
                self._move_text_encoders(torch.device("cpu"))
        for prompt in dict.fromkeys(prompts):                                    # what was wanted last is forgotten last
            self._text_cache[prompt] = self._text_cache.pop(prompt)

    def _move_text_encoders(self, device: torch.device) -> None:
        for name, part in self.pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(device)

    def _random_text(self, prompt: str) -> Text:
        """In place of the encoders that a random model has not: numbers of the same shape, always the same for a prompt."""
        generator, config = torch.Generator().manual_seed(zlib.crc32(prompt.encode())), self.pipe.transformer.config
        tokens = self.family.clip_tokens + self.max_sequence_length
        shapes = (1, tokens, config.joint_attention_dim), (1, config.pooled_projection_dim)
        return tuple(torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes)

    # --------------------------------------------------------------------------------------------------- velocity

    def velocity(self, text: Text, guidance_scale: float = 1.0, network=None, negative_prompt: str = ""):
        """The policy as `velocity(latents (B, C, H, W), sigma (B,)) -> (B, C, H, W)`, in the latents' dtype, with gradients.

        text: what `encode` made of the B prompts. With classifier-free guidance, the guided velocity is the policy: gradients
        go through both branches, which share one call of the network; it guides away from `negative_prompt`.
        """
        network = network or self.network
        if self.branches(guidance_scale) == 2:
            text = tuple(torch.cat([negative.expand_as(part), part])                    # (2B, ...)
                         for negative, part in zip(self.encode([negative_prompt]), text))

        def guided(latents: Tensor, sigma: Tensor) -> Tensor:
            copies = len(text[0]) // len(latents)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype in (torch.float16, torch.bfloat16)):
                v = self.family.velocity(network, torch.cat([latents] * copies), torch.cat([sigma] * copies), text,
                                         guidance_scale).to(latents.dtype)
            if copies == 1:
                return v
            unconditional, conditional = v.chunk(2)
            # v = v_uncond + w (v_cond - v_uncond): arXiv 2207.12598, eq. 6, in diffusers' scale, where w = 1 is none
            return unconditional + guidance_scale * (conditional - unconditional)

        return guided

    def reference_velocity(self, text: Text, guidance_scale: float = 1.0):
        """The velocity of the model without an adapter, or before full fine-tuning, as `velocity`, without gradients."""
        guided = self.velocity(text, guidance_scale, self.reference)

        @torch.no_grad()
        def of_reference(latents: Tensor, sigma: Tensor) -> Tensor:
            with contextlib.nullcontext() if self.reference is not None else self._without_adapter():
                return guided(latents, sigma)

        return of_reference

    @contextlib.contextmanager
    def _without_adapter(self):
        """As peft's own `disable_adapter`, without its survey of all layers, which takes longer than a small network's call."""
        self.network.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.network.base_model.enable_adapter_layers()

    # ----------------------------------------------------------------------------------------------------- images

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) as images: uint8 (B, 8H, 8W, 3) for a VAE of compression 8.

        A few at a time: full-size activations of the autoencoder take more memory than anything else here.
        """
        vae = self.pipe.vae
        latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        pixels = math.prod(latents.shape[-2:]) * self.pipe.vae_scale_factor**2
        images = [((vae.decode(part).sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
                  for part in latents.split(max(1, DECODE_PIXELS // pixels))]
        return torch.cat(images).permute(0, 2, 3, 1).contiguous()

    # ----------------------------------------------------------------------------------------------------- saving

    def save(self, directory: Path) -> None:
        """The trained weights as people use them: `directory/adapter`, or diffusers' `directory/transformer`.

        The adapter is there in both formats: for peft's `PeftModel.from_pretrained(pipe.transformer, directory / "adapter")`
        and for diffusers' `pipe.load_lora_weights(directory / "adapter")`.
        """
        if not isinstance(self.network, PeftModel):
            return self.network.save_pretrained(directory / "transformer")
        self.network.save_pretrained(directory / "adapter", save_embedding_layers=False)         # "auto" asks the hub
        tensors = get_peft_model_state_dict(self.network, save_embedding_layers=False)
        settings = self.network.peft_config["default"].to_dict()
        self.pipe.save_lora_weights(
            directory / "adapter", {key.removeprefix("base_model.model."): value for key, value in tensors.items()},
            transformer_lora_adapter_metadata=settings)                          # without it, alpha would be taken for the rank
