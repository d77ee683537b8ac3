"""Advantage Weighted Matching: rows to train on that are no steps (arXiv 2509.25050). `--objective awm`.

Flow-GRPO makes steps that led to a better image likelier. AWM needs the image x_0 alone, whatever
sampler drew it; here the ODE does. The image is noised again, and its velocity is known there:

    x = (1 - sigma) x_0 + sigma eps          v -> eps - x_0
    log p = -sigma mean((v - (eps - x_0))^2)

Up to a term without v, log p is the log-density of x_0 under N(x - sigma v, sigma / 2), one step from sigma
to 0. So a noised image is a row like a step, with the same ratio, clipped loss and KL. The weight sigma is a
choice of this project. Needs sampler.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sampler import Velocity, log_prob


@dataclass
class NoisedRows:
    """Noised images as rows to train on. The loss takes them for `sampler.Rows`."""
    latents: Tensor            # (M, C, H, W)  x
    next_latents: Tensor       # (M, C, H, W)  x_0
    sigma: Tensor              # (M,)          the time at which it was noised
    sigma_next: Tensor         # (M,)          0
    log_prob: Tensor | None    # (M,)          of x_0 under the policy that sampled
    rule: str = "awm"

    def transition(self, velocity: Velocity) -> tuple[Tensor, Tensor]:
        """The Gaussian of x_0 that the velocity implies: mean (M, C, H, W) and std (M, 1, 1, 1)."""
        sigma = self.sigma.view(-1, *[1] * (self.latents.ndim - 1))
        return self.latents - sigma * velocity(self.latents, self.sigma), (sigma / 2).sqrt()


@dataclass
class NoisedImages:
    """What training needs of one micro-batch of images, in place of a `sampler.Trajectory`."""
    final: Tensor              # (B, C, H, W)     x_0
    noise: Tensor              # (S, B, C, H, W)  eps: each image is noised S times
    sigma: Tensor              # (S, B)
    log_probs: Tensor          # (S, B)           under the policy that sampled

    def rows(self, k, samples=None) -> NoisedRows:
        """Row m is the k[m]-th noising of samples[m]. k, samples: as `sampler.Trajectory.rows` has them."""
        samples = torch.arange(len(self.final)) if samples is None else torch.as_tensor(samples)
        k, samples = (i.to(self.final.device) for i in (torch.as_tensor(k).expand_as(samples), samples))
        return noised(self.final[samples], self.noise[k, samples], self.sigma[k, samples],
                      self.log_probs[k, samples])

    @staticmethod
    def concatenate(parts: list["NoisedImages"]) -> "NoisedImages":
        return NoisedImages(
            torch.cat([p.final for p in parts]), torch.cat([p.noise for p in parts], 1),
            torch.cat([p.sigma for p in parts], 1), torch.cat([p.log_probs for p in parts], 1))


def noised(x_0: Tensor, eps: Tensor, sigma: Tensor, old: Tensor | None = None) -> NoisedRows:
    """Rows of images x_0 with noise eps, (M, C, H, W) each, at times sigma (M,). old: log-probs."""
    s = sigma.view(-1, *[1] * (x_0.ndim - 1))
    return NoisedRows((1 - s) * x_0 + s * eps, x_0, sigma, torch.zeros_like(sigma), old)


@torch.no_grad()
def noise_again(velocity: Velocity, final: Tensor, sigma: Tensor, noise: Tensor) -> NoisedImages:
    """Noise images S times each, and keep their log-probs under the policy that sampled them.

    final: (B, C, H, W), float32 or float64. sigma: (S, B), above 0. noise: (S, B, C, H, W), or more.
    """
    sigma = sigma.to(final)
    noise = noise[:len(sigma)].to(final, copy=True)        # so that what is more can be freed
    log_probs = []
    for s, eps in zip(sigma, noise):
        rows = noised(final, eps, s)
        log_probs.append(log_prob(final, *rows.transition(velocity), rows.rule))
    return NoisedImages(final, noise, sigma, torch.stack(log_probs))
