"""Advantage Weighted Matching: rows to train on that are no steps (arXiv 2509.25050). `--objective awm`.

Flow-GRPO makes the steps likelier that led to a better image. AWM needs the image x_0 alone, whatever
sampler drew it; here the ODE does. The image is noised again, and its velocity is known there:

    x = (1 - sigma) x_0 + sigma eps          v -> eps - x_0
    log p = -sigma mean((v - (eps - x_0))^2)

Up to a constant, log p is the log-density of x_0 under N(x - sigma v, sigma / 2), one step from sigma to 0.
So a noised image is a row like a step, with the same ratio, clipped loss and KL. The weight sigma is a choice
of this project. Needs sampler.py.
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
    sigma: Tensor              # (M,)          the share of noise
    sigma_next: Tensor         # (M,)          0
    log_prob: Tensor           # (M,)          of x_0 under the policy that sampled
    mean, rule = None, "awm"

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
        x_0, sigma = self.final[samples], self.sigma[k, samples]
        wide = sigma.view(-1, *[1] * (x_0.ndim - 1))
        return NoisedRows(
            latents=(1 - wide) * x_0 + wide * self.noise[k, samples], next_latents=x_0, sigma=sigma,
            sigma_next=torch.zeros_like(sigma), log_prob=self.log_probs[k, samples])

    @staticmethod
    def concatenate(parts: list["NoisedImages"]) -> "NoisedImages":
        return NoisedImages(
            torch.cat([p.final for p in parts]), torch.cat([p.noise for p in parts], 1),
            torch.cat([p.sigma for p in parts], 1), torch.cat([p.log_probs for p in parts], 1))


@torch.no_grad()
def noise_again(velocity: Velocity, final: Tensor, sigma: Tensor, noise: Tensor) -> NoisedImages:
    """Noise images S times each, and keep their log-probs under the policy, which has sampled them.

    final: (B, C, H, W), float32 or float64. sigma: (S, B), above 0. noise: (S, B, C, H, W), or more.
    """
    images = NoisedImages(final, noise[:len(sigma)].to(final), sigma.to(final), log_probs=sigma.to(final))
    log_probs = []
    for k in range(len(sigma)):
        rows = images.rows(k)
        log_probs.append(log_prob(rows.next_latents, *rows.transition(velocity), rows.rule))
    images.log_probs = torch.stack(log_probs)
    return images
