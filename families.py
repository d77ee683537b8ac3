"""What differs between model families: one class per family.

A new family is one more subclass of `Family`, listed in FAMILIES. It may stand in a file of your own, which
puts it there: FAMILIES["ToyPipeline"] = Toy. A program of four lines then takes the command line of train.py.
tests/toy_family.py is such a file:

    from harness.program import run_as_program      # this is train_toy.py, beside train.py
    import toy_family
    from train import main
    run_as_program(main)

    torchrun --nproc_per_node=2 train_toy.py toy --model DIR

sigma runs from 1 (noise) to 0 (data). A velocity points from data to noise: it is d latents / d sigma.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging

# Silence transformers before diffusers imports it, because it would warn that torchvision is missing.
logging.set_verbosity_error()

import diffusers  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402

DIFFUSERS = "0.42.1"              # the version whose pipelines these classes follow
# Embeddings (B, L, D), and what else the network takes: pooled embeddings (B, P), a mask (B, L) of bool, or
# lengths (B,). Tensors of the dtype LENGTHS stay on the host, because shapes depend on their values.
Text = tuple[Tensor, ...]
LENGTHS = torch.int64
# The autoencoder of SD3, FLUX.1 and Z-Image. They differ in its scaling and shift factors.
AUTOENCODER_KL = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
    use_quant_conv=False, use_post_quant_conv=False)


class Family:
    """The contract of a model family. `self.pipe` is a loaded pipeline.

    The pipeline has parts of the names `transformer`, `vae`, `scheduler` and `text_encoder...`. Its class has
    one of diffusers' LoRA mixins, because `save_lora_weights` saves the adapter. The transformer names its
    blocks in `_no_split_modules` if --compile is to compile them. Callers see latents as (B, C, H, W),
    whatever layout the network takes. A subclass defines the methods `tiling`, `encode` and `velocity`, and

    pipeline            the pipeline's class: its name in diffusers, or a class of your own
    preset              the preset of config.PRESETS for such a model, to which your file may add one

    These have defaults, as the other methods have:

    embedded_guidance   whether the network takes the guidance scale as an input
    guidance_argument   how a call of the pipeline names the scale, and which one is no guidance to it
    may_lack            parts that a pipeline can do without
    published           {NAME: settings of the transformer} for `--model random:NAME`

    A family without published sizes needs neither these nor `random_text`:

    transformer, autoencoder   their classes, given as the pipeline's
    vae, scheduler             settings in which a random pipeline departs from diffusers' defaults

    A family is right if `sampler.rollout` without noise ends where the pipeline ends, for prompts of unequal
    length, with and without guidance, at two numbers of steps: tests/test_toy_family.py compares them.
    """

    autoencoder = "AutoencoderKL"
    published, vae, scheduler, may_lack = {}, {}, {}, ()
    embedded_guidance, guidance_argument = False, ("guidance_scale", 1)

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe, self.has_warned = pipe, False

    @staticmethod
    def distilled(model: str, index: dict) -> bool:
        """Whether the model is distilled to go without guidance. index: its model_index.json."""
        return False

    def tiling(self) -> tuple[int, int, int, int | None]:
        """Return C, pixels on a latent's side, latents on a patch's side, and the most patches on a side.

        The last is None if any number will do. A resolution that patches do not tile is then refused.
        """
        raise NotImplementedError

    def schedule(self, num_steps: int, tokens: int) -> dict[str, float | None]:
        """Return keywords for `sampler.timestep_schedule` that give the pipeline's own sigmas.

        tokens: patches of an image. The default is right for a pipeline that hands the scheduler the sigmas
        linspace(1, 1 / num_steps, num_steps), and a dynamic shift on the config's line, as FLUX.1's does. One
        that hands it `num_inference_steps` alone needs SD3's `sigma_min`.
        """
        config = self.pipe.scheduler.config
        dynamic = config.use_dynamic_shifting
        return {"shift": shift_of(config, linear_mu(config, tokens)) if dynamic else config.shift,
                "sigma_min": 1 / num_steps, "shift_terminal": config.shift_terminal or None}

    def encode(self, prompt: str, length: int, device: torch.device) -> Text:
        """Encode one prompt: B is 1. length: --max-sequence-length, tokens of T5 or a language model.

        Every prompt gets the same shapes, because prompts are stacked. Where a pipeline's embeddings are as
        long as the prompt, pad them, and return a mask (QwenImage) or their length (ZImage) besides. Tensors
        go to the device of the network, but for those of the dtype LENGTHS, which stay on the host.
        """
        raise NotImplementedError

    def random_text(self, normal: Callable[..., Tensor], length: int) -> Text:
        """Draw what `encode` would return, in its shapes. normal: draws a tensor of a shape."""
        config = self.pipe.transformer.config
        return normal(1, length, config.joint_attention_dim), normal(1, config.pooled_projection_dim)

    def velocity(self, network: torch.nn.Module, latents: Tensor, sigma: Tensor, text: Text,
                 guidance_scale: float) -> Tensor:
        """Call the network: latents (B, C, H, W), sigma (B,) -> velocity (B, C, H, W). Gradients flow.

        network: `self.pipe.transformer` with its adapter, or the reference. sigma lies between 0 and 1, where
        many networks take 1000 * sigma. text: what `encode` returned for B prompts. guidance_scale is for a
        network with `embedded_guidance`. For others, B holds both branches and `guide` combines them.
        Latents are at least float32, also in half precision, where autocast is on.
        """
        raise NotImplementedError

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """Combine velocities (B, C, H, W): arXiv 2207.12598, eq. 6, where a scale of 1 is no guidance."""
        return unconditional + guidance_scale * (conditional - unconditional)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, H, W) to images (B, 3, height, width) from -1 to 1.

        The default takes an autoencoder that states its scaling_factor and, perhaps, its shift_factor.
        """
        vae = self.pipe.vae
        return vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample


class SD3(Family):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

    pipeline, transformer = "StableDiffusion3Pipeline", "SD3Transformer2DModel"
    preset = "sd35m_ocr"
    published = {
        "sd35m": dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm",
                      pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
        "sd35l": dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm",
                      pos_embed_max_size=192)}
    vae = AUTOENCODER_KL | dict(scaling_factor=1.5305, shift_factor=0.0609)
    scheduler = dict(shift=3.0)
    may_lack = ("text_encoder_3", "tokenizer_3")      # T5, whose embeddings are then zeros

    def tiling(self) -> tuple[int, int, int, int | None]:
        config = self.pipe.transformer.config
        return config.in_channels, self.pipe.vae_scale_factor, config.patch_size, config.pos_embed_max_size

    def schedule(self, num_steps: int, tokens: int) -> dict[str, float | None]:
        # diffusers shifts the grid's end, 1/1000, once at construction, except with dynamic shifting.
        dynamic = self.pipe.scheduler.config.use_dynamic_shifting
        return super().schedule(num_steps, tokens) | {"sigma_min": 1 / 1000 if dynamic else None}

    def encode(self, prompt: str, length: int, device: torch.device) -> Text:
        clip, t5 = self.pipe.tokenizer, self.pipe.tokenizer_3
        if t5:
            warn_if_cut(self, prompt, len(t5(prompt).input_ids), length)
        else:
            tokens = len(clip(prompt).input_ids)
            warn_if_cut(self, prompt, tokens, clip.model_max_length, limit="CLIP's limit")
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt, prompt, prompt, device=device, max_sequence_length=length,
            do_classifier_free_guidance=False)
        return embeds, pooled

    def random_text(self, normal: Callable[..., Tensor], length: int) -> Text:
        return super().random_text(normal, 77 + length)      # CLIP's tokens stand before those of T5

    def velocity(self, network: torch.nn.Module, latents: Tensor, sigma: Tensor, text: Text,
                 guidance_scale: float) -> Tensor:
        return network(latents, *text, 1000 * sigma, return_dict=False)[0]


class FLUX(Family):
    """FLUX.1. A token is 2 x 2 latent pixels. The network takes the guidance scale as an input."""

    pipeline, transformer = "FluxPipeline", "FluxTransformer2DModel"
    preset = "flux_pickscore"
    published = {"flux": dict(guidance_embeds=True)}      # other settings are the class's defaults
    vae = AUTOENCODER_KL | dict(scaling_factor=0.3611, shift_factor=0.1159)
    scheduler = dict(shift=3.0, use_dynamic_shifting=True)
    embedded_guidance = True

    @staticmethod
    def distilled(model: str, index: dict) -> bool:
        try:
            settings = diffusers_class(FLUX.transformer).load_config(model, subfolder="transformer")
        except OSError:                                      # without settings, it will not load either
            return False
        return not settings.get("guidance_embeds")           # FLUX.1-schnell takes no guidance scale

    def tiling(self) -> tuple[int, int, int, int | None]:
        return self.pipe.transformer.config.in_channels // 4, self.pipe.vae_scale_factor, 2, None

    def encode(self, prompt: str, length: int, device: torch.device) -> Text:
        warn_if_cut(self, prompt, len(self.pipe.tokenizer_2(prompt).input_ids), length)
        embeds, pooled, _ = self.pipe.encode_prompt(prompt, prompt, device=device, max_sequence_length=length)
        return embeds, pooled

    def velocity(self, network: torch.nn.Module, latents: Tensor, sigma: Tensor, text: Text,
                 guidance_scale: float) -> Tensor:
        embeds, pooled = text
        # An image token's position is (0, row, column). A text token's position is (0, 0, 0).
        image_ids = F.pad(grid(latents.shape[-2] // 2, latents.shape[-1] // 2, latents.device), (1, 0))
        text_ids = image_ids.new_zeros(embeds.shape[1], 3)                           # (L, 3)
        guided = self.pipe.transformer.config.guidance_embeds
        v = network(pack(latents), embeds, pooled, sigma, img_ids=image_ids, txt_ids=text_ids,
                    return_dict=False, guidance=torch.full_like(sigma, guidance_scale) if guided else None)[0]
        return unpack(v, latents)


class QwenImage(Family):
    """Qwen-Image (arXiv 2508.02324). A token is 2 x 2 latent pixels.

    The autoencoder is one of videos, with a mean and a standard deviation for each channel. The guided
    velocity of a token keeps the length that it has without guidance.
    """

    pipeline, transformer = "QwenImagePipeline", "QwenImageTransformer2DModel"
    autoencoder = "AutoencoderKLQwenImage"
    preset = "qwen_image_pickscore"
    published = {"qwen_image": {}}      # Qwen/Qwen-Image has the defaults of diffusers' classes
    scheduler = dict(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    guidance_argument = ('negative_prompt="", true_cfg_scale', 1)
    tiling = FLUX.tiling

    def encode(self, prompt: str, length: int, device: torch.device) -> Text:
        embeds, _ = self.pipe.encode_prompt(prompt, device=device)                   # (1, its own length, D)
        warn_if_cut(self, prompt, embeds.shape[1], length)
        return self._padded(embeds[:, :length], length)

    def random_text(self, normal: Callable[..., Tensor], length: int) -> Text:
        return self._padded(normal(1, length, self.pipe.transformer.config.joint_attention_dim), length)

    @staticmethod
    def _padded(embeds: Tensor, length: int) -> Text:
        """Pad embeddings (1, l, D) to (1, L, D). The mask (1, L) shows the network the first l alone."""
        mask = torch.arange(length, device=embeds.device) < embeds.shape[1]
        return F.pad(embeds, (0, 0, 0, length - embeds.shape[1])), mask[None]

    def velocity(self, network: torch.nn.Module, latents: Tensor, sigma: Tensor, text: Text,
                 guidance_scale: float) -> Tensor:
        embeds, mask = text
        shape = (1, latents.shape[-2] // 2, latents.shape[-1] // 2)                  # frames, rows, columns
        v = network(pack(latents), embeds, mask, timestep=sigma, img_shapes=[[shape]] * len(latents),
                    return_dict=False)[0]
        return unpack(v, latents)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        guided = pack(super().guide(conditional, unconditional, guidance_scale))     # (B, tokens, 4C)
        norm, wanted = (v.norm(dim=-1, keepdim=True) for v in (guided, pack(conditional)))
        return unpack(guided * (wanted / norm), conditional)

    def decode(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        mean, std = (latents.new_tensor(values).view(-1, 1, 1) for values in
                     (config.latents_mean, config.latents_std))                      # (C, 1, 1)
        return self.pipe.vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]


class FLUX2(Family):
    """FLUX.2 klein. A latent pixel is a token: 2 x 2 pixels of the autoencoder, normalised by its batch norm.

    Text is padded and has no mask. `--max-sequence-length` is therefore part of the result.
    """

    pipeline, transformer = "Flux2KleinPipeline", "Flux2Transformer2DModel"
    autoencoder = "AutoencoderKLFlux2"
    preset = "flux2_klein_pickscore"
    # From diffusers' scripts/convert_flux2_to_diffusers.py. Distilled and base models have the same sizes.
    published = {
        "flux2_klein_4b": dict(num_layers=5, num_single_layers=20, num_attention_heads=24,
                               joint_attention_dim=7680, guidance_embeds=False),
        "flux2_klein_9b": dict(num_layers=8, num_single_layers=24, num_attention_heads=32,
                               joint_attention_dim=12288, guidance_embeds=False)}
    scheduler = dict(shift=3.0, use_dynamic_shifting=True)

    @staticmethod
    def distilled(model: str, index: dict) -> bool:
        return bool(index.get("is_distilled"))

    def tiling(self) -> tuple[int, int, int, int | None]:
        return self.pipe.transformer.config.in_channels, 2 * self.pipe.vae_scale_factor, 1, None

    def schedule(self, num_steps: int, tokens: int) -> dict[str, float | None]:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
        config, mu = self.pipe.scheduler.config, compute_empirical_mu(tokens, num_steps)
        own = {"shift": shift_of(config, mu)} if config.use_dynamic_shifting else {}
        return super().schedule(num_steps, tokens) | own

    def encode(self, prompt: str, length: int, device: torch.device) -> Text:
        warn_if_cut(self, prompt, chat_tokens(self.pipe.tokenizer, **self.chat(prompt)), length)
        embeds, _ = self.pipe.encode_prompt(prompt, device=device, max_sequence_length=length)
        return (embeds,)

    def chat(self, prompt: str) -> dict:
        """Return the chat that the pipeline makes of a prompt, as arguments of `apply_chat_template`."""
        return dict(chat_of(prompt), enable_thinking=False)

    def random_text(self, normal: Callable[..., Tensor], length: int) -> Text:
        return (normal(1, length, self.pipe.transformer.config.joint_attention_dim),)

    def velocity(self, network: torch.nn.Module, latents: Tensor, sigma: Tensor, text: Text,
                 guidance_scale: float) -> Tensor:
        # An image token's position is (0, row, column, 0). The k-th text token's position is (0, 0, 0, k).
        image_ids = F.pad(grid(*latents.shape[-2:], latents.device), (1, 1))
        text_ids = F.pad(grid(1, text[0].shape[1], latents.device), (2, 0))
        v = network(latents.flatten(2).transpose(1, 2), text[0], sigma, img_ids=image_ids, txt_ids=text_ids,
                    guidance=torch.full_like(sigma, guidance_scale) if self.embedded_guidance else None,
                    return_dict=False)[0]                                            # (B, H W, C)
        return v.transpose(1, 2).unflatten(2, latents.shape[-2:])

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()                # (C,)
        latents = latents * std[:, None, None] + vae.bn.running_mean[:, None, None]
        return vae.decode(F.pixel_shuffle(latents, 2)).sample


class FLUX2Dev(FLUX2):
    """FLUX.2-dev. Its network takes the guidance scale as an input, its language model an instruction."""

    pipeline = "Flux2Pipeline"
    preset = "flux2_dev_pickscore"
    published = {"flux2_dev": {}}      # black-forest-labs/FLUX.2-dev has the defaults of diffusers' classes
    embedded_guidance = True

    def chat(self, prompt: str) -> dict:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input
        return dict(conversation=format_input([prompt], self.pipe.system_message))


class ZImage(Family):
    """Z-Image (arXiv 2511.22699). The network predicts -v, and its time is 1 - sigma.

    The network takes prompts of their own lengths, because an image's position begins where its prompt ends.
    """

    pipeline, transformer = "ZImagePipeline", "ZImageTransformer2DModel"
    preset = "z_image_pickscore"
    published = {"z_image": dict(axes_lens=(1536, 512, 512))}      # transformer/config.json of the hub's
    vae = FLUX.vae
    scheduler = dict(shift=6.0)
    guidance_argument = ("guidance_scale", 0)

    @staticmethod
    def distilled(model: str, index: dict) -> bool:
        # Turbo's files say so by their name alone.
        return any("turbo" in Path(name).name.lower() for name in (model, index.get("_name_or_path") or ""))

    def tiling(self) -> tuple[int, int, int, int | None]:
        config = self.pipe.transformer.config
        return config.in_channels, self.pipe.vae_scale_factor, 2, min(config.axes_lens[1:])

    def encode(self, prompt: str, length: int, device: torch.device) -> Text:
        chat = dict(chat_of(prompt), enable_thinking=True)
        warn_if_cut(self, prompt, chat_tokens(self.pipe.tokenizer, **chat), length)
        (embeds,), _ = self.pipe.encode_prompt(                                      # (its own length, D)
            prompt, device=device, max_sequence_length=length, do_classifier_free_guidance=False)
        own_length = torch.tensor([len(embeds)], dtype=LENGTHS)
        return F.pad(embeds, (0, 0, 0, length - len(embeds)))[None], own_length

    def random_text(self, normal: Callable[..., Tensor], length: int) -> Text:
        embeds = normal(1, length, self.pipe.transformer.config.cap_feat_dim)
        return embeds, torch.tensor([length], dtype=LENGTHS)

    def velocity(self, network: torch.nn.Module, latents: Tensor, sigma: Tensor, text: Text,
                 guidance_scale: float) -> Tensor:
        prompts = [embeds[:length] for embeds, length in zip(text[0], text[1].tolist())]
        images = list(latents[:, :, None])                                           # B of (C, 1, H, W)
        v = network(images, 1 - sigma, prompts, return_dict=False)[0]                # likewise
        return -torch.stack(v)[:, :, 0]


# ---- what several families share ---------------------------------------------------------------------------

def diffusers_class(name: str | type) -> type:
    """Return diffusers' class of that name, or a class as it is.

    Raises ValueError if the installed version has none.
    """
    if isinstance(name, type):
        return name
    if not hasattr(diffusers, name):
        raise ValueError(f"{name} is missing in diffusers {diffusers.__version__}, which is installed: "
                         f"it takes {DIFFUSERS}; pip install diffusers=={DIFFUSERS}")
    return getattr(diffusers, name)


def pack(latents: Tensor) -> Tensor:
    """Make a token of each 2 x 2 latent pixels: (B, C, H, W) -> (B, H/2 W/2, 4C)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, latents: Tensor) -> Tensor:
    """Undo `pack`: tokens (B, H/2 W/2, 4C) to the shape of `latents` (B, C, H, W)."""
    height, width = latents.shape[-2:]
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def grid(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the (row, column) of each token of an image: (rows * columns, 2)."""
    return torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))


def chat_of(prompt: str) -> dict:
    """Return a chat of one prompt to which a language model is to answer."""
    return dict(conversation=[[{"role": "user", "content": prompt}]], add_generation_prompt=True)


def chat_tokens(tokenizer, **chat) -> int:
    """Count the tokens of one chat, given as arguments of `apply_chat_template`."""
    return len(tokenizer.apply_chat_template(tokenize=True, return_dict=True, **chat)["input_ids"][0])


def linear_mu(config, tokens: int) -> float:
    """Return a dynamic shift, mu, for so many patches.

    It lies on the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
    """
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


def shift_of(config, mu: float) -> float:
    """Return the shift of sigma that a dynamic shift `mu` means."""
    return math.exp(mu) if config.time_shift_type == "exponential" else mu


def warn_if_cut(family: Family, prompt: str, tokens: int, length: int, *,
                limit: str = "--max-sequence-length") -> None:
    """Warn once of a prompt that has more tokens than the encoder is given."""
    if tokens > length and not family.has_warned:
        family.has_warned = True
        tqdm.write(f"warning: the prompt {prompt[:60]!r} has {tokens} tokens and {limit} is {length}: "
                   "its end is left out, and the ends of others as long", file=sys.stderr)


FAMILIES = {family.pipeline: family for family in (SD3, FLUX, QwenImage, FLUX2, FLUX2Dev, ZImage)}
