"""Group-relative policy optimisation of a Gaussian denoising policy (Flow-GRPO, arXiv 2505.05470).

Stands alone: copy the file. Tensors and scalars in, tensors out. Nothing here knows of ranks or networks.

Time runs from sigma = 1 (noise) to 0 (data). A step goes from sigma to sigma' < sigma, and is N(mean, std^2).

    symbol        variable               meaning
    r             rewards                (N,) of the whole epoch, all ranks
    A             advantages             by how much a sample beat its group, (N,) or (B,)
    x'            sample                 (B, C, H, W) latents after the step
    D, s          -                      sigma - sigma', and the SDE's diffusion coefficient: std = s sqrt(D)
    log pi        log_prob               (B,) of one step, averaged over the latent's dimensions
    log pi_old    old_log_prob           (B,) the same under the policy that sampled
    rho           ratio                  exp(log pi - log pi_old)
    e             clip_range             how far rho may move from 1 before its gradient stops
    mean_ref      ref_mean               (B, C, H, W) the step's mean under the reference policy

    N samples in an epoch, K of them in a group (the same prompt), B in a batch, C H W the size of a latent
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_ids: Tensor, std: str = "global", eps: float = 1e-4,
                     clip: float = 5.0) -> Tensor:
    """By how much each sample beat its group: (N,) -> (N,). Source: arXiv 2505.05470, eq. 4.

        A = (r - mean(r of the group)) / (std + eps), clipped to +-clip

    rewards: (N,) numbers. group_ids: (N,) integers; the samples of a group share an id.
    std: the population standard deviation, over all N rewards ("global", the published runs) or over the
    group's ("group", the paper). Advantages have the rewards' dtype, or float32 if these are whole numbers.
    A group of equal rewards gets exactly 0.
    Raises ValueError for another `std`, shapes that differ, or rewards that are not finite.
    """
    if std not in ("global", "group"):
        raise ValueError(f"std is {std!r}: 'global' or 'group'")
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        shapes = f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)}"
        raise ValueError(f"{shapes}: both must be (N,)")
    if not rewards.is_floating_point():
        rewards = rewards.float()                  # because advantages of whole numbers are not whole numbers
    if not rewards.isfinite().all():
        raise ValueError(f"rewards are not finite: {rewards[~rewards.isfinite()][0].item()}")
    r = rewards.double()
    _, group, counts = group_ids.unique(return_inverse=True, return_counts=True)      # (N,), (groups,)
    # for g in groups: above[g] = r[g] - min(r[g]); centred[g] = above[g] - mean(above[g])
    # Subtract the group's lowest reward first, because equal rewards then are exactly 0, as is their mean.
    above = r - r.new_zeros(len(counts)).scatter_reduce(0, group, r, "amin", include_self=False)[group]
    mean = r.new_zeros(len(counts)).index_add(0, group, above) / counts                       # (groups,)
    centred = above - mean[group]                                                             # (N,)
    if std == "group":
        scale = (r.new_zeros(len(counts)).index_add(0, group, centred**2) / counts).sqrt()[group]      # (N,)
    else:
        scale = r.std(correction=0)                                                           # ()
    return (centred / (scale + eps)).clamp(-clip, clip).to(rewards.dtype)


def weighted_advantages(rewards: dict[str, Tensor], weights: dict[str, float], group_ids: Tensor,
                        of: str = "sum", std: str = "global") -> Tensor:
    """Advantages (N,) of several rewards. `of` says of what: their weighted "sum", or "each" of them.

        sum:   A = group_advantages(sum_i w_i r_i, std)
        each:  A = group_advantages(sum_i w_i group_advantages(r_i, std), "global")

    In a sum, a reward that varies much drowns one that varies little. So "each" brings every reward to one
    scale before it is weighted. Its outer call finds group means of 0, and only divides by the epoch's
    standard deviation. With std "group" it is GDPO, arXiv 2601.05242.
    rewards: name -> (N,). weights: name -> w_i. The rest is as in `group_advantages`.
    """
    if of not in ("sum", "each"):
        raise ValueError(f"of is {of!r}: 'sum' or 'each'")
    if of == "each":
        rewards = {name: group_advantages(rewards[name], group_ids, std) for name in weights}
        std = "global"
    return group_advantages(sum(w * rewards[name] for name, w in weights.items()), group_ids, std)


def zero_variance_groups(rewards: Tensor, group_ids: Tensor) -> int:
    """Count the groups whose rewards are all equal, because they teach nothing. rewards, group_ids: (N,)."""
    return sum(int(rewards[group_ids == g].unique().numel() == 1) for g in group_ids.unique())


def clipped_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's clipped loss of each step. All are (B,). Source: arXiv 2505.05470, eq. 5; 1707.06347, eq. 7.

        max(-A rho, -A clip(rho, 1 - e, 1 + e))

    At rho = 1 its gradient is REINFORCE's, -A grad log pi.
    """
    log_ratio, A = log_prob - old_log_prob, advantages
    # Compare rho - 1 with the clip range, and not -A rho with -A clip(rho), because these products can round
    # to one number in float32 if rho is near 1. The maximum of equal numbers passes half of each gradient.
    excess = log_ratio.expm1()                                                    # rho - 1
    clipped = torch.where(A > 0, excess > clip_range, excess < -clip_range)
    bound = 1 + clip_range * A.sign()                                             # 1 + e or 1 - e
    return -A * torch.where(clipped, bound.to(excess), log_ratio.exp())


def guard_log_ratio(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's log rho, which is centred at every step. Source: arXiv 2510.22319.

        log rho = std (log pi - log pi_old + mean((mean - mean_old)^2) / (2 std^2))
                = mean((x' - mean_old) (mean - mean_old)) / std

    sample, mean, old_mean: (B, C, H, W). std broadcasts over them. Returns (B,).

    The plain log-ratio lies below 0 on average, by the term that is added here, and it spreads by 1 / std. So
    a clip range means something else at every step, and acts less on ratios above 1. This ratio means the
    same at every step. Guard also divides a step's loss by its D; the caller does that.

    The second form has the value of the first. It is used because it subtracts no log-probs, whose float32
    rounding is some percent of the published clip range. It does not hold for cps, whose log-prob is no
    Gaussian's.
    Raises ValueError if std is 0, on a CPU.
    """
    _require_noise(std)
    return ((sample - old_mean) * (mean - old_mean) / std).flatten(1).mean(1)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(mean_ref, std^2)) of each step. Source: arXiv 2505.05470, eq. 10.

        mean((mean - mean_ref)^2) / (2 std^2), averaged over the latent's dimensions

    mean, ref_mean: (B, C, H, W). std broadcasts over them. Returns (B,).

    This is the exact KL of one step. The published settings were tuned with the KL per unit of time. For that
    one, pass s = std / sqrt(D) as `std`.
    Raises ValueError if std is 0, on a CPU.
    """
    _require_noise(std)
    return ((mean - ref_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)


@torch.no_grad()
def ratio_statistics(log_prob: Tensor, old_log_prob: Tensor, clip_range: float) -> dict[str, Tensor]:
    """What users of PPO watch, for each step: log-probs (B,) -> name -> (B,).

    Average them over an update, but take `ratio_deviation`'s maximum.
    """
    log_ratio = log_prob - old_log_prob
    excess = log_ratio.expm1()        # rho - 1, whose subtraction would lose 1e-5 to rounding in float32
    return {
        "approx_kl": excess - log_ratio,          # an estimate of KL(old || new) that is never negative
        "clip_fraction_high": (excess > clip_range).to(excess.dtype),        # 1 if rho > 1 + e, else 0
        "clip_fraction_low": (excess < -clip_range).to(excess.dtype),        # 1 if rho < 1 - e, else 0
        "ratio": log_ratio.exp(),
        "ratio_deviation": excess.abs(),
    }


def _require_noise(std: Tensor) -> None:
    # Look at the value on a CPU alone, because on an accelerator this would make the host wait for it.
    if std.device.type == "cpu" and (std == 0).any():
        raise ValueError("std is 0: a deterministic step has no KL and no ratio")
