"""A diffusers pipeline as a velocity model: load, adapter, text, guidance, decode, average, save.

    policy = Policy("assets/tiny-sd3", device)
    text = policy.encode(['the word "lamp"'])
    v = policy.velocity(text, guidance_scale=4.5)(latents, sigma)      # (B, C, H, W), (B,) -> (B, C, H, W)

What differs between SD3 and FLUX is a `Family` each; a new one is one more.
"""

import contextlib
import copy
import inspect
import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")      # before the import, which has things to say about torchvision

from diffusers import (AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel,
                       SD3Transformer2DModel, StableDiffusion3Pipeline)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging as transformers_logging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

TEXT_CACHE = 1024            # prompts whose embeddings are kept, in host memory; one of SD3.5's takes 1.7 MB
DECODE_PIXELS = 2**20        # of the images that the autoencoder decodes at once: 4 of 512 x 512

Text = tuple[Tensor, Tensor]      # embeddings (B, L, D), pooled embeddings (B, P)


# ------------------------------------------------------------------------------------------------------ model families

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


# ------------------------------------------------------------------------------------------- what can be had, and whence

def check_model(model: str) -> type[Family]:
    """The family of `model`, a pipeline's directory, a hub id or random:NAME; else a ValueError in one line. Loads no weights."""
    if model.startswith("random:"):
        known = {f"random:{name}": family for family in FAMILIES.values() for name in family.published}
        if model not in known:
            raise ValueError(f"--model {model!r} is unknown: {', '.join(known)} are made with random weights")
        return known[model]
    index = Path(model) / "model_index.json"
    if not index.exists():
        if not is_hub_id(model):
            raise ValueError(f"--model {model!r} is no diffusers pipeline: {index} does not exist")
        index = from_hub("--model", model, "model_index.json")
        if index is None:
            raise ValueError(f"--model {model!r} is no diffusers pipeline: on the hub it has no model_index.json")
    try:
        kind = json.loads(index.read_text())["_class_name"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"--model {model!r} is no diffusers pipeline: {index} does not name its class") from error
    if kind not in FAMILIES:
        raise ValueError(f"--model {model!r} is a {kind}: only {' and '.join(FAMILIES)} are supported")
    return FAMILIES[kind]


def is_hub_id(name: str) -> bool:
    return not Path(name).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def from_hub(option: str, repository: str, name: str) -> Path | None:
    """A file of a hub repository, None where the repository has none of that name. Raises ValueError in one line."""
    try:
        return Path(hf_hub_download(repository, name))
    except RemoteEntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise ValueError(f"{option} {repository!r} is gated: accept its licence on its page of the hub, then give your token "
                         "with `hf auth login` or in HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{option} {repository!r} is neither here nor on the hub: correct it, or if it is private, give your "
                         "token with `hf auth login` or in HF_TOKEN") from error
    except Exception as error:
        raise ValueError(f"{option} {repository!r} is neither a directory here nor could it be had from the hub "
                         f"({type(error).__name__}); give a directory, or go online") from error


PEFT_FILES, DIFFUSERS_FILE = ("adapter_config.json", "adapter_model.safetensors"), "pytorch_lora_weights.safetensors"


def find_adapter(lora_path: str) -> list[Path]:
    """The files of an adapter, peft's two or diffusers' one: in a directory, in a checkpoint's `adapter`, or on the hub.

    Raises ValueError in one line. Loads no weights.
    """
    place = Path(lora_path)
    if not place.exists() and not is_hub_id(lora_path):
        raise ValueError(f"--lora-path {lora_path!r} does not exist: give an adapter's directory, a checkpoint or a hub id")
    if place.name == PEFT_FILES[1]:
        place = place.parent
    if place.suffix == ".safetensors" and place.is_file():
        return [place]
    place = place / "adapter" if (place / "adapter").is_dir() else place

    def find(name: str) -> Path | None:
        if not place.exists():
            return from_hub("--lora-path", lora_path, name)
        return place / name if (place / name).exists() else None

    for names in (PEFT_FILES, (DIFFUSERS_FILE,)):
        files = [find(name) for name in names]
        if all(files):
            return files
    raise ValueError(f"--lora-path {lora_path!r} holds no adapter: it has neither {' and '.join(PEFT_FILES)} nor "
                     f"{DIFFUSERS_FILE}, and other formats are not loaded")


def read_adapter(lora_path: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's own settings, and its tensors by peft's names. Raises ValueError in one line."""
    *settings, weights = find_adapter(lora_path)
    try:
        with safe_open(weights, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    except SafetensorError as error:
        raise ValueError(f"{weights} is no whole safetensors file ({error}): fetch it again") from error
    if not tensors:
        raise ValueError(f"--lora-path {lora_path!r} holds no tensors: {weights} is empty")
    try:
        if settings:
            config = LoraConfig.from_pretrained(settings[0].parent)
        else:
            other = [key for key in tensors if not key.startswith("transformer.") or ".lora_" not in key]
            if other:
                raise ValueError(f"it adapts more than the transformer, or in an older format: {other[0]}; load it in diffusers "
                                 "and save it again")
            tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
            config = {key.removeprefix("transformer."): value for key, value in json.loads(metadata).items()}
            if not config:                                                       # alpha is the rank, as diffusers takes it
                rank = next(len(value) for key, value in tensors.items() if ".lora_A." in key)
                config = dict(r=rank, lora_alpha=rank, target_modules=sorted({key.partition(".lora_")[0] for key in tensors}))
            config = LoraConfig.from_peft_type(**config)
            tensors = {f"base_model.model.{key}": value for key, value in tensors.items()}
        if not isinstance(config, LoraConfig) or not config.target_modules:
            raise ValueError(f"its settings are of peft type {config.peft_type.value} and name the layers "
                             f"{config.target_modules}: only LORA with its layers named is supported")
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"--lora-path {lora_path!r} has settings that make no adapter "
                         f"({type(error).__name__}: {error})") from error
    return config, tensors


def load_adapter(network: torch.nn.Module, lora_path: str, model: str, name: str = "default") -> PeftModel:
    """A transformer, which may have adapters already, with this one too, to train. Raises ValueError as `fit_adapter` does."""
    network, tensors = fit_adapter(network, lora_path, model, name)
    set_peft_model_state_dict(network, tensors, adapter_name=name)
    return network


def fit_adapter(network: torch.nn.Module, lora_path: str, model: str, name: str) -> tuple[PeftModel, dict[str, Tensor]]:
    """The transformer with the adapter's layers, and the tensors that belong into them.

    Raises ValueError, with the first tensor that does not fit, if one does not; the transformer is then of no further use.
    """
    config, tensors = read_adapter(lora_path)
    trained_on, config.base_model_name_or_path, config.inference_mode = config.base_model_name_or_path, None, False

    def require(ok: bool, key: str, needed) -> None:
        if not ok:
            found = f"has shape {tuple(tensors[key].shape)}" if key in tensors else "is missing"
            raise ValueError(f"--lora-path {lora_path!r} does not fit --model {model!r}: {key} {found}, {needed}; "
                             f"give the model that it was trained on ({trained_on or 'it does not say which'})")

    layers = {layer for layer, _ in (network.get_base_model() if isinstance(network, PeftModel) else network).named_modules()}
    for key in tensors:
        require(key.removeprefix("base_model.model.").partition(".lora_")[0] in layers, key, "the model has no such layer")
    try:
        if isinstance(network, PeftModel):
            network.add_adapter(name, config)
        else:
            network = get_peft_model(network, config, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--lora-path {lora_path!r} does not fit --model {model!r}: {error}") from error
    own = get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)
    for key, value in own.items():
        require(key in tensors and tensors[key].shape == value.shape, key, f"the model needs {tuple(value.shape)}")
    for key, value in tensors.items():
        require(key in own, key, "but its own settings do not name that layer")
        require(bool(value.isfinite().all()), key, "and numbers that are not finite")
    return network, tensors


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
        self._check_schedule()
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

    def _check_schedule(self) -> None:
        for option in ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
            if self.pipe.scheduler.config.get(option):
                raise ValueError(f"--model {self.model!r}: its scheduler's {option} is not supported; give one that does without")

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
