"""Group-relative policy optimisation of a Gaussian denoising policy (Flow-GRPO, arXiv 2505.05470).

Stands alone: copy the file. Tensors and scalars in, tensors out; nothing here knows of ranks or networks.

    symbol    variable        meaning
    r         rewards         (N,) of the whole epoch, all ranks
    A         advantages      (N,) or (B,)
    log pi    log_prob        (B,) of one denoising step, averaged over the latent's dimensions
    rho       ratio           exp(log_prob - old_log_prob)
    e         clip_range      how far the ratio may move before its gradient stops

    N samples in an epoch, K of them in a group (the same prompt), B in a micro-batch.
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_ids: Tensor, std: str = "global", eps: float = 1e-4,
                     clip: float = 5.0) -> Tensor:
    """How much each sample beat its group: (r - mean of the group) / (std + eps), clipped to +-`clip`. (N,) -> (N,).

    rewards: (N,) float. group_ids: (N,) integers; samples of one group share an id, whatever their prompt's text.
    std: population standard deviation, "global" over all N rewards (the published runs) or "group" (the paper's eq. 4).
    A group of equal rewards gets exactly 0. Source: arXiv 2505.05470, eq. 4.
    Raises ValueError for another `std`, shapes that differ, or rewards that are not finite.
    """
    if std not in ("global", "group"):
        raise ValueError(f"std is {std!r}: 'global' or 'group'")
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)}: both must be (N,)")
    if not rewards.is_floating_point():
        rewards = rewards.float()                              # counts are rewards too; advantages are not whole numbers
    if not rewards.isfinite().all():
        raise ValueError(f"rewards are not finite: {rewards[~rewards.isfinite()][0].item()}")
    r, (_, group, counts) = rewards.double(), group_ids.unique(return_inverse=True, return_counts=True)
    # Measured from the lowest of their group, equal rewards are exactly 0, and so is their mean.
    above = r - r.new_zeros(len(counts)).scatter_reduce(0, group, r, "amin", include_self=False)[group]
    mean = r.new_zeros(len(counts)).index_add(0, group, above) / counts
    centred = above - mean[group]
    if std == "group":
        scale = (r.new_zeros(len(counts)).index_add(0, group, centred**2) / counts).sqrt()[group]
    else:
        scale = r.std(correction=0)
    return (centred / (scale + eps)).clamp(-clip, clip).to(rewards.dtype)


def zero_variance_groups(rewards: Tensor, group_ids: Tensor) -> int:
    """How many groups have equal rewards, and so nothing to teach. rewards, group_ids: (N,)."""
    return sum(int(rewards[group_ids == g].unique().numel() == 1) for g in group_ids.unique())


def clipped_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's clipped loss of each sample, max(-A rho, -A clip(rho, 1 - e, 1 + e)). All (B,) -> (B,).

    At rho = 1 its gradient is REINFORCE's, -A grad log pi. Source: arXiv 2505.05470, eq. 5; 1707.06347, eq. 7.
    """
    log_ratio, A = log_prob - old_log_prob, advantages
    # Compare rho - 1 with the clip range, rather than -A rho with -A clip(rho), because the products of a ratio near 1 can round
    # to one number in float32, and the maximum of two equal numbers passes half of each gradient.
    excess = log_ratio.expm1()                                 # rho - 1
    clipped = torch.where(A > 0, excess > clip_range, excess < -clip_range)
    bound = 1 + clip_range * A.sign()
    return -A * torch.where(clipped, bound.to(excess), log_ratio.exp())


def _require_noise(std: Tensor) -> None:
    if std.device.type == "cpu" and (std == 0).any():          # on an accelerator, a look at the value would stall the queue
        raise ValueError("std is 0: a deterministic step has no KL and no ratio")


def guard_log_ratio(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's log rho: (B, C, H, W) each, std broadcasting -> (B,). Source: arXiv 2510.22319.

        log rho = std (log pi - log pi_old + mean((mean - mean_old)^2) / (2 std^2))
                = mean((x' - mean_old) (mean - mean_old)) / std

    The plain log-ratio lies below 0 on average, by the term added here, and spreads by 1 / std, so that the clip range means
    something else at every step, and less for ratios above 1. This one is centred. The loss of a step is divided by its D
    besides, which evens out the steps' gradients. The second form has the value of the first and subtracts no log-probs, whose
    rounding in float32 takes over a tenth of the published clip range. It holds for rules whose log-prob is the Gaussian's.
    Raises ValueError where std is 0 (on a CPU).
    """
    _require_noise(std)
    return ((sample - old_mean) * (mean - old_mean) / std).flatten(1).mean(1)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(ref_mean, std^2)), averaged over the latent's dimensions: (B, C, H, W) -> (B,).

        mean((mean - ref_mean)^2) / (2 std^2)

    This is the exact KL of one step. The published settings were tuned with the per-time form: pass s = std / sqrt(D)
    as `std`. Source: arXiv 2505.05470, eq. 10.
    Raises ValueError where std is 0 (on a CPU).
    """
    _require_noise(std)
    return ((mean - ref_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)


@torch.no_grad()
def ratio_statistics(log_prob: Tensor, old_log_prob: Tensor, clip_range: float) -> dict[str, Tensor]:
    """What PPO users watch, per sample: each (B,), to be averaged, or for `ratio_deviation` maximised, over the update.

    approx_kl: (rho - 1) - log rho, an estimate of KL(old || new) that is never negative.
    clip_fraction_high, clip_fraction_low: 1 where rho > 1 + e, where rho < 1 - e.
    ratio: rho. ratio_deviation: |rho - 1|.
    """
    log_ratio = log_prob - old_log_prob
    excess = log_ratio.expm1()                                 # rho - 1; the subtraction would round away a float32 1e-5
    return {
        "approx_kl": excess - log_ratio,
        "clip_fraction_high": (excess > clip_range).to(excess.dtype),
        "clip_fraction_low": (excess < -clip_range).to(excess.dtype),
        "ratio": log_ratio.exp(),
        "ratio_deviation": excess.abs(),
    }
