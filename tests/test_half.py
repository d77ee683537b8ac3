"""In float16, gradients of one row of thousands are small: the first loss scale must keep them from vanishing."""

import dataclasses

import pytest
import torch
from helpers import policy_of

from config import PRESETS, parse_config
from learner import Learner

ROWS_OF_UPDATE = 1152 // 2 * 9           # of preset sd35m_ocr: samples of an update, and trained steps of each
DIMENSIONS = 16 * 64 * 64                # of its latents, over which a log-prob is averaged


@pytest.fixture(scope="module")
def policies(model):
    """The same network with the same adapter, in float16 and in float32."""
    found = {}
    for dtype in ("float16", "float32"):
        _, config = parse_config(["--resolution", "16", "32", "--dtype", dtype, "--lora-rank", "8", "--lora-alpha", "16"])
        torch.manual_seed(0)
        policy = found[dtype] = policy_of(model, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in policy.network.named_parameters():
                if "lora_B" in name:                       # as after some training; it starts at 0
                    p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    with torch.no_grad():                                  # the frozen weights' rounding is not what is measured
        for p, half in zip(found["float32"].network.parameters(), found["float16"].network.parameters(), strict=True):
            p.copy_(half)
    return found


def adapter_gradients(policy, scale: float) -> list[torch.Tensor]:
    """Of each matrix of the adapter, from 8 rows with their part of an update of the preset; unscaled again.

    A log-prob's derivative by the velocity is noise over the latent's dimensions, times D / std, which is about 1.
    """
    generator = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(8, *policy.latent_shape, generator=generator) for _ in range(2))
    sigma = torch.linspace(0.1, 1.0, 8)
    text = policy.encode([f'the word "{word}"' for word in "lamp hand zoo oar hood age dome jar".split()])
    v = policy.velocity(tuple(part.to(policy.dtype) for part in text))(latents, sigma)
    loss = (v * noise).sum() * scale / (ROWS_OF_UPDATE * DIMENSIONS)
    return [g / scale for g in torch.autograd.grad(loss, policy.parameters, materialize_grads=True, allow_unused=True)]


def worst_error(policies, scale: float) -> float:
    """The largest relative error of a matrix's gradient in float16."""
    exact, half = adapter_gradients(policies["float32"], 1.0), adapter_gradients(policies["float16"], scale)
    return max(((b - a).norm() / a.norm()).item() for a, b in zip(exact, half, strict=True) if a.any())


def first_scale(policy) -> float:
    return Learner(policy, dataclasses.replace(PRESETS["sd35m_ocr"], dtype="float16")).scaler.get_scale()


def test_gradients_in_float16_are_those_in_float32_to_2_percent(policies):
    assert worst_error(policies, first_scale(policies["float16"])) < 0.02


def test_a_first_scale_of_2_to_the_16_would_lose_gradients(policies):
    """Of queries first, whose gradients are the smallest."""
    assert worst_error(policies, 2.0**16) > 0.04
