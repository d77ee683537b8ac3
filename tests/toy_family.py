"""A model family in a file of one's own: a pipeline that diffusers does not have, its family and its preset."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_pipeline import ZImageLoraLoaderMixin
from make_tiny_sd3 import make_pipeline
from torch import nn

from config import PRESETS, Config
from families import FAMILIES, Family

# ---- the model: two blocks of cross-attention on patches of 2 x 2 latent pixels --------------------------------


class ToyBlock(nn.Module):
    def __init__(self, width: int, text_width: int):
        super().__init__()
        self.norm, self.to_q, self.to_out = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.to_kv, self.to_text_kv = nn.Linear(width, 2 * width), nn.Linear(text_width, 2 * width)

    def forward(self, x, text):
        y = self.norm(x)
        k, v = torch.cat([self.to_kv(y), self.to_text_kv(text)], 1).chunk(2, -1)
        return x + self.to_out(F.scaled_dot_product_attention(self.to_q(y), k, v))


class ToyTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    @register_to_config
    def __init__(self, in_channels: int = 8, width: int = 32, text_width: int = 64):
        super().__init__()
        self.image_in, self.time_in = nn.Linear(4 * in_channels + 2, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(ToyBlock(width, text_width) for _ in range(2))
        self.image_out = nn.Linear(width, 4 * in_channels)

    def forward(self, latents, time, text):
        """Latents (B, C, H, W), time (B,) from 1000 to 0, text (B, L, D) -> velocity (B, C, H, W)."""
        x = F.pixel_unshuffle(latents, 2)
        size = rows, columns = x.shape[-2:]
        place = torch.stack(torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij"))
        x = torch.cat([x, place.to(x).expand(len(x), -1, -1, -1)], 1).flatten(2).transpose(1, 2)
        x = self.image_in(x) + self.time_in(time[:, None, None].to(x.dtype) / 1000)
        for block in self.blocks:
            x = block(x, text)
        return F.pixel_shuffle(self.image_out(x).transpose(1, 2).unflatten(2, size), 2)


class ToyPipeline(DiffusionPipeline, ZImageLoraLoaderMixin):
    """It saves and loads adapters by the mixin of a family that trains the transformer alone."""

    def __init__(self, transformer, vae, scheduler, text_encoder, tokenizer):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder,
                              tokenizer=tokenizer)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def encode_prompt(self, prompts: list[str], max_sequence_length: int, device: torch.device):
        ids = self.tokenizer(prompts, padding="max_length", max_length=max_sequence_length, truncation=True,
                             return_tensors="pt").input_ids
        return self.text_encoder(ids.to(device)).last_hidden_state                            # (B, L, D)

    @torch.no_grad()
    def __call__(self, prompts: list[str], height: int, width: int, guidance_scale: float = 1.0,
                 num_inference_steps: int = 10, max_sequence_length: int = 16, latents=None):
        """Latents to start from -> latents (B, C, H, W) and pictures (B, height, width, 3) from 0 to 1."""
        text = self.encode_prompt(prompts, max_sequence_length, latents.device)
        no_text = self.encode_prompt([""] * len(prompts), max_sequence_length, latents.device)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            time = t.expand(len(latents))
            v, without = self.transformer(latents, time, text), self.transformer(latents, time, no_text)
            latents = self.scheduler.step(without + guidance_scale * (v - without), t, latents, return_dict=False)[0]
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return latents, VaeImageProcessor().postprocess(images, output_type="np")


# ---- its family -------------------------------------------------------------------------------------------------

class Toy(Family):
    pipeline, preset = ToyPipeline, "toy"

    def tiling(self):
        return self.pipe.transformer.config.in_channels, self.pipe.vae_scale_factor, 2, None

    def schedule(self, num_steps, tokens):
        return super().schedule(num_steps, tokens) | {"sigma_min": None}

    def encode(self, prompt, length, device):
        return (self.pipe.encode_prompt([prompt], length, device),)

    def velocity(self, network, latents, sigma, text, guidance_scale):
        return network(latents, 1000 * sigma, *text)


FAMILIES["ToyPipeline"] = Toy
PRESETS["toy"] = Config(resolution=(16, 32), max_sequence_length=16, lora_targets=("to_q", "to_kv", "to_text_kv", "to_out"))


def save_toy(directory: Path) -> str:
    """In the hub's format, with random weights."""
    torch.manual_seed(0)
    parts = make_pipeline()
    vae = type(parts.vae).from_config({**parts.vae.config, "scaling_factor": 0.5, "shift_factor": None})
    ToyPipeline(ToyTransformer(), vae, parts.scheduler, parts.text_encoder, parts.tokenizer).save_pretrained(directory)
    return str(directory)
