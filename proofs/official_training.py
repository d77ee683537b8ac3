"""The advantages, the losses and the weight average against the authors' functions and training scripts."""

import contextlib
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from config import PRESETS, Config
from grpo import group_advantages, guard_log_ratio
from learner import WeightAverage
from proofs.authors_code import Checkout, quiet
from proofs.comparison import Line
from proofs.official_sampler import schedules
from sampler import Rows, Velocity, replay, rollout
from train import step_loss

# ----------------------------------------------------------------------------------------------- advantages

def random_rewards(groups: int, size: int) -> np.ndarray:
    """Rewards (groups, size) of a random kind, float32."""
    rng = np.random.default_rng(random.getrandbits(32))
    normal = rng.normal(size=(groups, size))
    some_equal = np.where(rng.random((groups, 1)) < 0.5, normal[:, :1], normal)
    kinds = [normal, some_equal, np.full((groups, size), 0.7), 0.5 + 1e-6 * normal, 1e6 + normal,
             rng.random((groups, size)) < 0.3, rng.integers(3, size=(groups, size)) / 3,
             rng.integers(8, size=(groups, size)) / 7]
    return np.asarray(random.choice(kinds), np.float32)


def advantages(checkout: Checkout, trials: int) -> list[Line]:
    """Random epochs, their samples shuffled; and epochs in which a prompt is drawn twice."""
    tracker = checkout.module("flow_grpo/stat_tracking.py").PerPromptStatTracker
    lines = []
    for std in ("global", "group"):
        for case in ("one prompt a group", "one prompt in two groups, taken as one group"):
            worst, zeros, count = 0.0, 0, 0
            for _ in range(trials):
                rewards = random_rewards(random.randint(2, 12), random.randint(2, 24))
                ids = np.arange(len(rewards)).repeat(rewards.shape[1])
                if case.startswith("one prompt in"):
                    ids[ids == 1] = 0
                order = np.random.default_rng(count).permutation(rewards.size)
                r, ids = rewards.ravel()[order], ids[order]
                theirs = tracker(global_std=std == "global").update([f"prompt {g}" for g in ids], r)
                theirs = torch.as_tensor(theirs).clamp(-5, 5)
                ours = group_advantages(torch.from_numpy(r), torch.from_numpy(ids), std)
                worst = max(worst, float((theirs - ours).abs().max()))
                zeros += int(((theirs == 0) != (ours == 0)).sum())
                count += len(r)
            note = f"{zeros} are zero on one side only" + (" (11)" if "two" in case else "")
            lines.append(Line("Advantages", f"{std} std, {case}", count, worst, 1e-6, note))
    return lines


# --------------------------------------------------------------------------------------- losses, gradients

@dataclass(frozen=True)
class Case:
    """A training script with settings under which its update is compared."""

    name: str
    script: str
    config: Config
    steps: int = 10
    moved: float = 1e-3                      # how far the adapter has moved since sampling
    dead: int = 0                            # samples of N whose advantage is zero
    micro_batches: int = 2                   # over which the script spreads the N samples
    tolerance: float = 3e-5                  # of the gradient; strong guidance multiplies rounding
    departure: str = ""                      # why it is more than rounding

    @property
    def flux(self) -> bool:
        return "flux" in self.script

    @property
    def guided(self) -> bool:
        return not self.flux and self.config.guidance_scale > 1


def cases() -> list[Case]:
    ocr, fast, guard, flux = (PRESETS[name] for name in (
        "sd35m_ocr", "sd35m_geneval_fast", "sd35m_ocr_guard", "flux_pickscore"))
    flux_fast, of = PRESETS["flux_fast"], dataclasses.replace
    return [
        Case("sd35m_ocr", "train_sd3", ocr),
        Case("sd35m_ocr without guidance", "train_sd3", of(ocr, guidance_scale=1.0)),
        Case("sd35m_ocr, --kl exact", "train_sd3", of(ocr, kl="exact", guidance_scale=1.0)),
        Case("sd35m_geneval_fast (cps)", "train_sd3_fast", fast, moved=3e-4),
        Case("cps, beta 0.04", "train_sd3_fast", of(fast, beta=0.04), moved=3e-4),
        Case("sd35m_ocr_guard, micro-batches of 1", "train_sd3_GRPO_Guard", guard, moved=1e-4,
             micro_batches=8),
        Case("sd35m_ocr_guard, micro-batches of 4", "train_sd3_GRPO_Guard", guard, moved=1e-4,
             tolerance=0.05, departure="their centring term is the micro-batch's mean (14)"),
        Case("Guard, beta 0.04, micro-batches of 1", "train_sd3_GRPO_Guard", of(guard, beta=0.04),
             moved=1e-4, micro_batches=8),
        Case("flux_pickscore", "train_flux", flux, 6),
        Case("flux_fast (cps)", "train_flux_fast", flux_fast, 6, 3e-4),
        Case("half of the samples with zero advantage, SD3", "train_sd3",
             of(ocr, beta=0.0, guidance_scale=1.0), dead=4),
        Case("half of the samples with zero advantage, FLUX", "train_flux", flux, 6, dead=4)]


class Network(torch.nn.Module):
    """A small policy with an adapter, called as the authors' scripts call a transformer."""

    def __init__(self, width: int, time_scale: float):
        super().__init__()
        self.time_scale = time_scale
        self.register_buffer("weight", torch.randn(width, width) / width**0.5)
        self.adapter = torch.nn.Parameter(0.02 * torch.randn(width, width))
        self.enabled = True
        self.config = SimpleNamespace(guidance_embeds=False)

    @property
    def module(self) -> "Network":
        """What DistributedDataParallel wraps."""
        return self

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor,
                **ignored) -> tuple[Tensor]:
        t, text = (value.view(-1, *[1] * (hidden_states.ndim - 1))
                   for value in (timestep / self.time_scale, encoder_hidden_states.mean((1, 2))))
        weight = self.weight + self.adapter if self.enabled else self.weight
        return (torch.tanh(hidden_states @ weight + t + text) + 0.3 * hidden_states,)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.enabled = False
        yield
        self.enabled = True

    def velocity(self, text: Tensor, scale: float) -> Velocity:
        """This project's policy: the same network, guided."""
        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            v = self(x, sigma * self.time_scale, text)[0]
            if scale == 1:
                return v
            unconditional = self(x, sigma * self.time_scale, torch.zeros_like(text))[0]
            return unconditional + scale * (v - unconditional)
        return velocity

    def reference_velocity(self, text: Tensor, scale: float) -> Velocity:
        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with self.disable_adapter():
                return self.velocity(text, scale)(x, sigma)
        return velocity


class Recorder(Accelerator):
    """A real accelerator that keeps the gradient of each optimizer step, and does not clip it."""

    def __init__(self, accumulated: int):
        super().__init__(cpu=True, gradient_accumulation_steps=accumulated)
        self.gradients: list[Tensor] = []

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        self.gradients.append(next(iter(parameters)).grad.clone())


def run_update(checkout: Checkout, case: Case, epoch: "Epoch", batches: int,
               accumulated: int) -> tuple[Tensor, list[dict], list[int]]:
    """Run a script's own update phase on an epoch.

    Returns the gradient of each optimizer step, what the script logs at each, and its `global_step` each time
    it steps its weight average.
    The samples are spread over `batches` micro-batches, of which `accumulated` make an optimizer step.
    """
    script, config, samples, network = f"scripts/{case.script}.py", case.config, epoch.samples, epoch.network
    S = samples["log_probs"].shape[1]
    recorder, logged, averaged = Recorder(accumulated * S), [], []
    optimizer = recorder.prepare(torch.optim.SGD([network.adapter], lr=0.0))
    train = SimpleNamespace(
        num_inner_epochs=1, cfg=case.guided, beta=config.beta, adv_clip_max=5, clip_range=config.clip_range,
        max_grad_norm=1.0, ema=True)
    sample = SimpleNamespace(
        num_batches_per_epoch=batches, num_steps=samples["timesteps"].shape[1],
        guidance_scale=config.guidance_scale, noise_level=config.noise_level,
        sde_type={"flow_sde": "sde", "cps": "cps"}[config.rule])
    names = vars(checkout.module(script)) | dict(
        samples=samples, config=SimpleNamespace(train=train, sample=sample, rationorm=config.guard),
        accelerator=recorder, optimizer=optimizer, transformer=network, autocast=contextlib.nullcontext,
        pipeline=SimpleNamespace(scheduler=epoch.scheduler, transformer=network), tqdm=lambda each, **_: each,
        wandb=SimpleNamespace(log=lambda metrics, step: logged.append(metrics)), global_step=0, epoch=0,
        num_train_timesteps=S, transformer_trainable_parameters=[network.adapter],
        ema=SimpleNamespace(step=lambda parameters, step: averaged.append(step)),
        train_neg_prompt_embeds=torch.zeros_like(samples["prompt_embeds"]),
        train_neg_pooled_prompt_embeds=torch.zeros_like(samples["pooled_prompt_embeds"]))
    with quiet():
        exec(checkout.update_phase(script), names)
    return torch.stack(recorder.gradients), [each for each in logged if "policy_loss" in each], averaged


@dataclass
class Epoch:
    """N sampled trajectories of a case: for the authors' script (`samples`), and as rows for `step_loss`."""

    network: Network
    scheduler: FlowMatchEulerDiscreteScheduler
    samples: dict[str, Tensor]
    rows: Rows
    text: Tensor
    advantages: Tensor                       # (N S,) float64
    at_the_edge: int                         # rows whose ratio rounds onto the edge of the clip range


def sample_epoch(case: Case, N: int = 8) -> Epoch:
    """Sample by a small policy, and move it. Advantages are normal, but 0 at the edge of the clip range."""
    config, T = case.config, case.steps
    S = config.window_size or T - 1
    shape = (64, 16) if case.flux else (4, 8, 8)
    scheduler, sigmas = schedules(case.flux, T)
    network = Network(shape[-1], 1.0 if case.flux else 1000.0)
    text, first = torch.randn(N, 2, 3), random.randint(0, T - 1 - S)
    scale = config.guidance_scale if case.guided else 1.0
    levels = torch.zeros(T)
    levels[first:first + S] = config.noise_level
    taken = rollout(network.velocity(text, scale), torch.randn(N, *shape), sigmas, levels,
                    torch.randn(T, N, *shape), rule=config.rule, first_step=first, num_trained=S,
                    keep_means=True)
    with torch.no_grad():
        network.adapter += case.moved * torch.randn_like(network.adapter)
    k, n = torch.arange(S).repeat(N), torch.arange(N).repeat_interleave(S)
    rows = taken.rows(k, n)

    # Rounding decides whether a float32 ratio within a few last digits of the clip range's edge is clipped.
    # Take such rows out on both sides, by an advantage of 0. They are departure 12.
    with torch.no_grad():
        new, mean, std = replay(network.velocity(text[n], scale), rows)
        log_ratio = new - rows.log_prob
        if config.guard:
            log_ratio = guard_log_ratio(rows.next_latents, mean, rows.mean, std)
        edge = (log_ratio.expm1().abs() - config.clip_range).abs() < 3e-7
    A = 2 * torch.randn(N, S, dtype=torch.float64)
    A[N - case.dead:] = 0
    A.view(-1)[edge] = 0

    # The scripts without windows look at as many timesteps as there are steps.
    steps = slice(first, first + S) if "fast" in case.script else slice(0, T)
    by_sample = {name: value.transpose(0, 1) for name, value in (
        ("latents", taken.latents[:-1]), ("next_latents", taken.latents[1:]), ("log_probs", taken.log_probs),
        ("prev_sample_mean", taken.means))}
    samples = by_sample | dict(
        timesteps=scheduler.timesteps[steps].repeat(N, 1), advantages=A, prompt_embeds=text,
        pooled_prompt_embeds=torch.zeros(N, 3), image_ids=torch.zeros(N, 1, 3))
    return Epoch(network, scheduler, samples, rows, text[n], A.flatten(), int(edge.sum()))


def our_gradient(case: Case, epoch: Epoch) -> tuple[Tensor, float, int]:
    """(gradient of the mean loss, its KL in the authors' form, clipped rows)."""
    config = case.config if case.guided else dataclasses.replace(case.config, guidance_scale=1.0)
    epoch.network.zero_grad()
    A = epoch.advantages.clamp(-5, 5).float()
    loss, watched = step_loss(epoch.network, epoch.rows, epoch.text, A, config)
    loss.mean().backward()
    kl = watched.get("kl", torch.zeros(1))
    if config.kl == "exact" and config.rule != "cps":      # which is the authors' over D
        kl = kl * (epoch.rows.sigma - epoch.rows.sigma_next)
    clipped = watched["clip_fraction_high"] + watched["clip_fraction_low"]
    return epoch.network.adapter.grad.clone(), float(kl.detach().mean()), int(clipped.sum())


def losses(checkout: Checkout, trials: int) -> list[Line]:
    """Each script's own update, run in one optimizer step, against `step_loss` on the same trajectories."""
    present = [case for case in cases() if checkout.has(f"scripts/{case.script}.py")]
    return [line for case in present for line in case_lines(checkout, case, max(4, trials // 50))]


def case_lines(checkout: Checkout, case: Case, epochs: int) -> list[Line]:
    config, topic = case.config, "Losses and gradients"
    source = (checkout.root / f"scripts/{case.script}.py").read_text(encoding="utf-8")
    detached = case.guided and "noise_pred_uncond.detach()" in source
    # The SD3 scripts average over the samples that they keep, and this project over all (departure 3).
    live = 0.5 if case.dead and not case.flux else 1.0
    worst, worst_kl, cosine, totals = 0.0, 0.0, 1.0, Counter()
    for _ in range(epochs):
        epoch = sample_epoch(case)
        theirs, logged, _ = run_update(checkout, case, epoch, case.micro_batches, case.micro_batches)
        ours, kl, clipped = our_gradient(case, epoch)
        worst = max(worst, float((ours - live * theirs[0]).norm() / theirs.norm()))
        cosine = min(cosine, float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0)))
        if config.beta:
            worst_kl = max(worst_kl, abs(kl / float(logged[0]["kl_loss"].detach()) - 1))
        totals.update(pairs=len(epoch.advantages), clipped=clipped, edge=epoch.at_the_edge)

    notes = [f"{totals['clipped']:,} clipped"] + ([case.departure] if case.departure else [])
    if live != 1:
        notes.append("ours is half of theirs (3)")
    if totals["edge"]:
        notes.append(f"{totals['edge']} at the clip range's edge left out (12)")
    gradient = Line(topic, f"{case.name}: gradient, relative", totals["pairs"], worst, case.tolerance,
                    "; ".join(notes), departs=bool(case.departure))
    if detached:
        gradient = Line(topic, f"{case.name}: 1 - cosine of the gradients", totals["pairs"], 1 - cosine, 2.0,
                        "this checkout detaches the unconditional branch (13)", departs=True)
    exact = config.kl == "exact" and config.rule != "cps"
    note = "times D, the step's length" if exact else "as theirs (2)" if config.rule == "cps" else ""
    kl = Line(topic, f"{case.name}: KL, relative", totals["pairs"], worst_kl, 1e-4, note)
    # The exact form is another loss, so its gradient is not theirs.
    return ([] if exact else [gradient]) + ([kl] if config.beta else [])


# ------------------------------------------------------------------------------------------- weight average

def lag(average_of: Callable[[list], Callable[[int], Tensor]], steps: int = 2000) -> float:
    """How many optimizer steps an average lies behind a weight that grows by 1 in each.

    average_of: takes the weights, and returns a function from the optimizer step to the averaged weight.
    """
    weight, lags = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)), []
    average = average_of([weight])
    for n in range(1, steps + 1):
        with torch.no_grad():
            weight += 1
        lags.append(n - float(average(n)))
    return float(np.mean(lags[-400:]))


def their_average(wrapper: type, settings: dict, times: int) -> Callable[[list], Callable[[int], Tensor]]:
    """The authors' average, which their loop steps `times` times under one `global_step`."""
    def average_of(weights: list) -> Callable[[int], Tensor]:
        kept = wrapper(weights, **settings)

        def average(n: int) -> Tensor:
            for _ in range(times):
                kept.step(weights, n)
            return kept.ema_parameters[0]
        return average
    return average_of


def our_average(config: Config) -> Callable[[list], Callable[[int], Tensor]]:
    def average_of(weights: list) -> Callable[[int], Tensor]:
        kept = WeightAverage(weights, config.ema_decay, config.ema_every)

        def average(n: int) -> Tensor:
            kept.step()
            return kept.average[0]
        return average
    return average_of


def weight_average(checkout: Checkout, trials: int) -> list[Line]:
    """How often a script's loop steps its average per optimizer step, and how far that average lags."""
    lines = []
    wrapper = checkout.module("flow_grpo/ema.py").EMAModuleWrapper
    for preset, script, batches in (("sd35m_ocr", "train_sd3", 4), ("sd35m_ocr_4gpu", "train_sd3", 8),
                                    ("sd35m_ocr_guard", "train_sd3_GRPO_Guard", 8),
                                    ("flux_pickscore", "train_flux", 12)):
        path, config = f"scripts/{script}.py", PRESETS[preset]
        if not checkout.has(path):
            continue
        case = Case(preset, script, config, 6 if "flux" in script else 10)
        averaged = run_update(checkout, case, sample_epoch(case, N=batches), batches,
                              batches // config.updates_per_epoch)[2]
        times = Counter(averaged)[1]         # calls between the first and the second optimizer step
        settings = checkout.call_in_main(path, "ema", dict(
            EMAModuleWrapper=lambda parameters, device, **settings: settings,
            transformer_trainable_parameters=[], accelerator=SimpleNamespace(device="cpu")))
        theirs, ours = lag(their_average(wrapper, settings, times)), lag(our_average(config))
        decay = settings["decay"]
        note = (f"theirs {theirs:.1f}, ours {ours:.1f}; their loop steps it {times} times per optimizer step "
                f"(1), so {decay} is {decay ** times:.3f}")
        lines.append(Line("Weight average: optimizer steps that it lags behind",
                          f"{preset}, {batches} micro-batches", 2000, abs(ours - theirs), 0.5, note))
    return lines
