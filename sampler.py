"""Flow-matching sampling as a Markov chain with log-probabilities (Flow-GRPO, arXiv 2505.05470).

Stands alone: copy the file. Tensors and scalars in, tensors out.

Time runs from sigma = 1 (noise) to sigma = 0 (data):

    x_sigma = (1 - sigma) x_0 + sigma eps          v = eps - x_0          dx/dsigma = v

    symbol          variable            meaning
    sigma, sigma'   sigma, sigma_next   noise share before and after a step, sigma' < sigma
    D               delta               sigma - sigma'
    v               velocity            what the network predicts
    x0, x1          x0, x1              the data and the noise that v implies: x - sigma v, x + (1 - sigma) v
    a               noise_level         how stochastic a step is; 0 is the ODE
    s               s                   the SDE's diffusion coefficient (sigma_t in the paper)
    std             std                 standard deviation of one step, s sqrt(D)

    B samples in a micro-batch, M rows in a training batch, T steps, S of them trained, C H W a latent's size

Any shape after B works. Log-probs are averaged over the latent, not summed: this sets the clip range's scale.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RULES = ("flow_sde", "dance_sde", "cps")
Velocity = Callable[[Tensor, Tensor], Tensor]      # latents (B, C, H, W), sigma (B,) -> velocity (B, C, H, W)


def timestep_schedule(num_steps: int, shift: float = 3.0, sigma_min: float | None = None,
                      dtype: torch.dtype = torch.float32, *, shift_terminal: float | None = None) -> Tensor:
    """Sigmas (T + 1,) from 1 down to 0, equal to diffusers' `FlowMatchEulerDiscreteScheduler`.

    `sigma_min` is the last value of the even grid before the shift. Its default is Stable Diffusion 3's:
    1/1000, shifted once. FLUX passes `sigma_min=1 / num_steps` and `shift=exp(mu)`. `shift_terminal`
    stretches the shifted grid so that the last sigma before 0 is that one, as Qwen-Image's is.
    Raises ValueError if `num_steps` < 1, or < 2 with `shift_terminal`, or if `shift` or `sigma_min` is not
    positive.
    """
    fewest = 1 if shift_terminal is None else 2            # because the last step begins there, not at 1
    if num_steps < fewest:
        raise ValueError(f"num_steps is {num_steps}: at least {fewest} is needed")
    if not shift > 0:
        raise ValueError(f"shift is {shift}: it must be positive (1 leaves the grid as it is)")

    def shifted(sigma):
        return shift * sigma / (1 + (shift - 1) * sigma)       # arXiv 2403.03206, eq. 23

    sigma_min = shifted(1 / 1000) if sigma_min is None else sigma_min
    if not 0 < sigma_min <= 1:
        raise ValueError(f"sigma_min is {sigma_min}: it must lie in (0, 1]")
    sigmas = shifted(torch.linspace(1, sigma_min, num_steps, dtype=torch.float64))
    if shift_terminal is not None:
        sigmas = 1 - (1 - sigmas) * (1 - shift_terminal) / (1 - sigmas[-1])
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]).to(dtype)


def sde_transition(velocity: Tensor, latents: Tensor, sigma, sigma_next, noise_level, rule: str = "flow_sde",
                   second_sigma: float | None = None) -> tuple[Tensor, Tensor]:
    """The Gaussian of one denoising step from `sigma` to `sigma_next`: (mean, std).

    velocity, latents: (B, C, H, W), float32 or float64. sigma, sigma_next, noise_level: scalars or (B,).
    mean: (B, C, H, W). std: broadcasts over the latents, () or (B, 1, 1, 1); 0 if the step is deterministic.
    second_sigma: the schedule's second value, which `flow_sde` puts for sigma in s's 1 - sigma at sigma = 1.

    flow_sde: Flow-GRPO, arXiv 2505.05470, eq. 9. dance_sde: DanceGRPO, 2505.07818. cps: Flow-CPS, 2509.05952.
    With noise_level 0 all three are the Euler step of the ODE.
    Raises ValueError for an unknown rule, half-precision latents, or a `second_sigma` that is missing.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: one of {', '.join(RULES)}")
    if latents.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"latents are {latents.dtype}: a transition needs float32 or float64, "
                         "or its log-prob would belong to another sample")
    x, v = latents, velocity.to(latents.dtype)
    sigma, sigma_next, a = (_per_sample(value, x) for value in (sigma, sigma_next, noise_level))
    delta = sigma - sigma_next
    x0 = x - sigma * v
    x1 = x + (1 - sigma) * v

    if rule == "flow_sde":
        if second_sigma is None:
            if (sigma == 1).any():
                raise ValueError("flow_sde from sigma 1: pass second_sigma, the schedule's second value "
                                 "(s diverges at 1)")
            second_sigma = 0.0
        # s = a sqrt(sigma / (1 - sigma))
        s = a * (sigma / (1 - torch.where(sigma == 1, second_sigma, sigma))).sqrt()
        # mean = x (1 - s^2 D / (2 sigma)) - v (1 + s^2 (1 - sigma) / (2 sigma)) D
        mean = (x * (1 - s**2 * delta / (2 * sigma))
                - v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * delta)
        return mean, s * delta.sqrt()

    if rule == "dance_sde":
        # mean = x - D (v + a^2 (x - (1 - sigma) x0) / (2 sigma^2))
        mean = x - delta * (v + a**2 * (x - (1 - sigma) * x0) / (2 * sigma**2))
        return mean, a * delta.sqrt()

    # mean = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) x1,  std = sigma' sin(a pi / 2)
    std = sigma_next * torch.sin(a * math.pi / 2)
    mean = (1 - sigma_next) * x0 + sigma_next * torch.cos(a * math.pi / 2) * x1
    return mean, std


def log_prob(sample: Tensor, mean: Tensor, std: Tensor, rule: str = "flow_sde") -> Tensor:
    """Log-probability (B,) of `sample` (B, C, H, W) under N(mean, std^2), averaged over its dimensions.

    `cps` has its own: -mean((sample - mean)^2), without the Gaussian's scale and normalisation, as Flow-CPS
    (arXiv 2509.05952) and the published settings have it.
    Raises ValueError where std is 0: a deterministic step has no log-prob.
    """
    _require_noise(std)
    square = (sample - mean) ** 2
    if rule != "cps":
        square = square / (2 * std**2) + torch.log(std) + 0.5 * math.log(2 * math.pi)
    return -square.flatten(1).mean(1)                          # (B,)


@dataclass
class Trajectory:
    """What training needs of one micro-batch of samples, on one device and of the latents' dtype."""
    final: Tensor              # (B, C, H, W)         the latents at sigma 0
    latents: Tensor            # (S + 1, B, C, H, W)  before each trained step and after the last, not rounded
    log_probs: Tensor          # (S, B)               of the steps taken
    means: Tensor              # (S, B, C, H, W)      of their Gaussians, or (0, B, C, H, W) if not asked for
    first_step: Tensor         # (B,) int64           sample b's trained steps are the S from first_step[b] on
    sigmas: Tensor             # (T + 1,)             the schedule
    noise_levels: Tensor       # (T, B)               0 where the step was the ODE's
    rule: str                  # of the transitions

    def rows(self, k, samples=None) -> "Rows":
        """The trained transitions as rows: row m is the k[m]-th trained step of samples[m].

        k: int for all rows, or (M,) of 0 ... S - 1.
        samples: (M,) of 0 ... B - 1. None takes every sample once, in order.
        """
        samples = torch.arange(len(self.first_step)) if samples is None else torch.as_tensor(samples)
        k, samples = (i.to(self.first_step.device) for i in (torch.as_tensor(k).expand_as(samples), samples))
        step = self.first_step[samples] + k                                                      # (M,)
        return Rows(
            latents=self.latents[k, samples], next_latents=self.latents[k + 1, samples],
            sigma=self.sigmas[step], sigma_next=self.sigmas[step + 1], second_sigma=self.sigmas[1],
            noise_level=self.noise_levels[step, samples], log_prob=self.log_probs[k, samples],
            mean=self.means[k, samples] if len(self.means) else None, rule=self.rule)

    @staticmethod
    def concatenate(parts: list["Trajectory"]) -> "Trajectory":
        """Make one trajectory of several that share schedule and rule."""
        return Trajectory(
            final=torch.cat([p.final for p in parts]), latents=torch.cat([p.latents for p in parts], 1),
            log_probs=torch.cat([p.log_probs for p in parts], 1),
            means=torch.cat([p.means for p in parts], 1), sigmas=parts[0].sigmas, rule=parts[0].rule,
            first_step=torch.cat([p.first_step for p in parts]),
            noise_levels=torch.cat([p.noise_levels for p in parts], 1))


@dataclass
class Rows:
    """Transitions to train on, the unit of a training batch: row m is one step of one sample."""
    latents: Tensor            # (M, C, H, W)  before the step, as sampled
    next_latents: Tensor       # (M, C, H, W)  after it
    sigma: Tensor              # (M,)
    sigma_next: Tensor         # (M,)
    second_sigma: Tensor       # ()            the schedule's second value, for a step from sigma 1
    noise_level: Tensor        # (M,)
    log_prob: Tensor           # (M,)          of the step under the policy that sampled
    mean: Tensor | None        # (M, C, H, W)  of its Gaussian under it; None unless rollout kept it
    rule: str

    def transition(self, velocity: Velocity) -> tuple[Tensor, Tensor]:
        """The Gaussian of each step under `velocity`: mean (M, C, H, W) and std (M, 1, 1, 1)."""
        return sde_transition(velocity(self.latents, self.sigma), self.latents, self.sigma, self.sigma_next,
                              self.noise_level, self.rule, second_sigma=self.second_sigma)


@torch.no_grad()
def rollout(velocity: Velocity, latents: Tensor, sigmas: Tensor, noise_levels, noise, *,
            rule: str = "flow_sde", first_step=0, num_trained: int = 0, start_step: int = 0,
            keep_means: bool = False) -> Trajectory:
    """Sample from start noise to data. Keep the `num_trained` steps from `first_step` on for training.

    latents:      (B, C, H, W) at sigmas[start_step], at first start noise; float32 or float64
    sigmas:       (T + 1,) from `timestep_schedule`
    noise_levels: scalar, (T,), or (T, B) if windows differ between samples; 0 makes a step the ODE's
    noise:        (T, B, C, H, W), a torch.Generator, or None for the ODE
    first_step:   int or (B,), not before start_step
    start_step:   the first step to take; a group that shares its start noise has taken the ones before
    keep_means:   whether to keep the trained steps' means as well, which GRPO-Guard needs
    Raises ValueError if shapes disagree, or if a trained step is deterministic.
    """
    T, B, x = len(sigmas) - 1, len(latents), latents                        # x: (B, C, H, W)
    noise_levels = torch.as_tensor(noise_levels, dtype=latents.dtype, device="cpu")
    first_step = torch.as_tensor(first_step, device="cpu")
    _check_shapes(noise_levels=(noise_levels, (), (T,), (T, B)), first_step=(first_step, (), (B,)),
                  noise=(noise, (T, *latents.shape)))
    noise_levels = (noise_levels[:, None] if noise_levels.ndim == 1 else noise_levels).expand(T, B)
    first_step = first_step.expand(B)
    _check_trained_steps(sigmas, noise_levels, first_step, num_trained, start_step, rule)
    if noise is None and noise_levels.any():
        raise ValueError("noise_levels are not 0 but no noise was given: pass a tensor or a torch.Generator")

    # Decide on the host, before the first step, what each step needs, because looking at a device's values
    # between steps would make the host wait for it.
    stochastic = noise_levels.any(1).tolist()                                                    # T booleans
    trained_samples = [((first_step <= step) & (step < first_step + num_trained)).nonzero()[:, 0]
                       .to(latents.device) for step in range(T)]            # T index vectors, up to B long
    sigmas, noise_levels, first_step = sigmas.to(x), noise_levels.to(x), first_step.to(x.device)

    stored = latents.new_empty(num_trained + 1 if num_trained else 0, *latents.shape)
    log_probs = latents.new_empty(num_trained, B)
    means = latents.new_empty(num_trained if keep_means else 0, *latents.shape)
    for step in range(start_step, T):
        # The step's Gaussian under the policy, eq. 9. Its std is 0 where the step is the ODE's.
        mean, std = sde_transition(velocity(x, sigmas[step].expand(B)), x, sigmas[step], sigmas[step + 1],
                                   noise_levels[step], rule, second_sigma=sigmas[1])
        # Draw the next latents from it.
        before, x = x, mean
        if stochastic[step]:
            eps = noise[step] if isinstance(noise, Tensor) else torch.randn(
                x.shape, generator=noise, dtype=x.dtype, device=noise.device)
            x = mean + std * eps.to(x)

        # Keep the transition of each sample that is trained on this step. `slot` is the k of `rows`.
        trained = trained_samples[step]
        if len(trained):
            slot = step - first_step[trained]
            stored[slot, trained] = before[trained]
            stored[slot + 1, trained] = x[trained]
            # Compute log-probs of the whole batch before choosing samples, as `replay` does, because on a GPU
            # the last bit of a sum may depend on how many rows are summed beside it.
            log_probs[slot, trained] = log_prob(x, mean, torch.where(std > 0, std, 1), rule)[trained]
            if keep_means:
                means[slot, trained] = mean[trained]
    return Trajectory(final=x, latents=stored, log_probs=log_probs, means=means, first_step=first_step,
                      sigmas=sigmas, noise_levels=noise_levels, rule=rule)


def replay(velocity: Velocity, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """The rows' transitions under the present network: (log_prob (M,), mean (M, C, H, W), std (M, 1, 1, 1)).

    Differentiable through `velocity`. With the network that sampled, log_prob equals rows.log_prob.
    """
    mean, std = rows.transition(velocity)
    return log_prob(rows.next_latents, mean, std, rows.rule), mean, std


def _per_sample(value, latents: Tensor) -> Tensor:
    """A scalar as () and a (B,) vector as (B, 1, 1, 1), of the latents' dtype and device."""
    value = torch.as_tensor(value, dtype=latents.dtype, device=latents.device)
    return value if value.ndim == 0 else value.reshape(-1, *[1] * (latents.ndim - 1))


def _check_shapes(**named) -> None:
    for name, (value, *shapes) in named.items():
        if isinstance(value, Tensor) and value.shape not in shapes:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, not " + " or ".join(map(str, shapes)))


def _require_noise(std: Tensor) -> None:
    # Look at the value on a CPU alone, because the host of an accelerator would wait. `rollout` has checked.
    if std.device.type == "cpu" and (std == 0).any():
        raise ValueError("std is 0: a deterministic step (noise_level 0, or cps at sigma 0) has no log-prob")


def _check_trained_steps(sigmas: Tensor, noise_levels: Tensor, first_step: Tensor, num_trained: int,
                         start_step: int, rule: str) -> None:
    """Raise ValueError unless every trained step is taken and is stochastic."""
    T = len(sigmas) - 1
    if not 0 <= start_step < T:
        raise ValueError(f"start_step is {start_step}: it must lie in 0 to {T - 1}")
    if num_trained and (first_step.min() < start_step or first_step.max() + num_trained > T):
        raise ValueError(f"trained steps {first_step.min()} to {first_step.max() + num_trained - 1} "
                         f"do not lie in {start_step} to {T - 1}")
    for k in range(num_trained):
        step = first_step + k
        ends_at_0 = rule == "cps" and (sigmas[step + 1] == 0).any()         # where cps adds no noise
        if (noise_levels[step, torch.arange(len(step))] == 0).any() or ends_at_0:
            raise ValueError(f"a trained step among {step.unique().tolist()} is deterministic and has no "
                             "log-prob: train fewer steps or raise noise_level")
