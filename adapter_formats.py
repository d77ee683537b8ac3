"""LoRA files of other trainers, brought to diffusers' names.

    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight             kohya's sd-scripts, FLUX.1
    lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight          the same, SD3
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight          ComfyUI: the original model's names
    lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight    OneTrainer
    double_blocks.0.processor.qkv_lora1.down.weight                     XLabs

diffusers' own converter renames the layers of FLUX.1. It has none for SD3, whose table stands here.
"""

import re

import torch
from torch import Tensor

from families import FLUX, diffusers_class

A, B, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
DOWN, UP = (re.compile(rf"\.(lora_{word}|lora\.{word}|{word})\.weight$") for word in ("down", "up"))
FOREIGN = re.compile(r"^lora_(unet|transformer)_|(double|single|joint)_blocks[._]")
PREFIX = re.compile(r"^(base_model\.model|model\.diffusion_model|diffusion_model)\.")

# A layer of the original's blocks -> the layers in diffusers' block, in the order of its rows.
SD3_LAYERS = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",), "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",), "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",)}


def to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a file's tensors to LAYER.lora_A.weight, LAYER.lora_B.weight and LAYER.alpha of diffusers.

    A layer that diffusers splits, such as qkv, becomes several, each with its scale alpha / rank. Names of no
    trainer above stay as they are. Raises ValueError for a tensor or a layer that would be lost.
    """
    tensors = {UP.sub(B, DOWN.sub(A, key)): value for key, value in tensors.items()}
    if not any(map(FOREIGN.search, tensors)):
        return tensors
    tensors = {PREFIX.sub("", key): value for key, value in tensors.items()}
    ranks = {key.removesuffix(A): len(value) for key, value in tensors.items() if key.endswith(A)}
    if lost := tensors.keys() - {layer + part for layer in ranks for part in (A, B, ALPHA)}:
        raise ValueError(f"{min(lost)} is not lora_down, lora_up or alpha of a layer (perhaps of DoRA, LoHa "
                         "or LoKr), which is not converted")
    for layer in ranks:
        if layer + B not in tensors:
            raise ValueError(f"{layer} has a lora_down and no lora_up: the file is not whole, fetch it again")
    rename = rename_sd3 if any("joint_blocks" in layer for layer in ranks) else rename_flux
    weights = {key: value for key, value in tensors.items() if not key.endswith(ALPHA)}
    # Find out which layer each new one comes from: numbers in place of the weights come out where they went.
    numbers = {layer + A: torch.full_like(tensors[layer + A], number, dtype=torch.float64)
               for number, layer in enumerate(ranks)}
    try:
        converted, numbered = rename(weights), rename(weights | numbers)
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise ValueError("diffusers' converter takes FLUX.1's own layers in their own sizes, and these are "
                         f"others ({cause})") from error
    places = {key.removesuffix(A): list(ranks)[int(value.flatten()[0])]
              for key, value in numbered.items() if key.endswith(A)}
    if lost := ranks.keys() - places.values():
        raise ValueError(f"{min(lost)} is a layer whose place in diffusers' transformer is not known")
    for place, layer in places.items():
        # A part of a layer may need a part of its rank alone, as the rest is zero. The scale stays the same.
        alpha = float(tensors.get(layer + ALPHA, ranks[layer])) * len(converted[place + A]) / ranks[layer]
        converted[place + ALPHA] = torch.tensor(alpha, dtype=torch.float64)
    return converted


def rename_flux(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename FLUX.1's layers as diffusers does when it loads a file."""
    xlabs = any(".processor." in key for key in tensors)
    down, up = (f".{'' if xlabs else 'lora_'}{word}.weight" for word in ("down", "up"))
    named = {}
    for key, value in tensors.items():
        prefix = "" if xlabs or key.startswith("lora_") else "diffusion_model."
        named[prefix + key.replace(A, down).replace(B, up)] = value
        if key.startswith("lora_transformer_") and key.endswith(A):          # the converter insists on alphas
            named[key.replace(A, ALPHA)] = torch.tensor(float(len(value)))
    return diffusers_class(FLUX.pipeline).lora_state_dict(named)


def rename_sd3(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layers of SD3's blocks, and cut those that hold several of diffusers' layers."""
    renamed = {}
    for key, down in tensors.items():
        layer = re.fullmatch(r"(?:lora_unet_)?joint_blocks[._](\d+)[._](.+)" + re.escape(A), key)
        if not layer or not (names := SD3_LAYERS.get(layer[2].replace(".", "_"))):
            continue
        up = tensors[key.replace(A, B)]
        # The last block's context has a shift and a scale, and diffusers has them in the other order.
        if names == ("norm1_context.linear",) and len(up) == 2 * down.shape[1]:
            up = torch.cat(up.chunk(2)[::-1])
        for name, rows in zip(names, up.chunk(len(names))):
            place = f"transformer_blocks.{layer[1]}.{name}"
            renamed |= {place + A: down, place + B: rows}
    return renamed
