"""The floor of an epoch: the bare calls that the algorithm needs, each as fast as this machine makes it."""

import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import distributed
from config import Config
from harness.faults import is_out_of_memory
from policy import Policy
from prompts import Prompt
from rewards import Rewards

PIECES = {"rollout": "forward", "replay": "forward + backward", "reference": "reference forward",
          "decode": "VAE decode", "reward": "reward"}
NETWORK = ("rollout", "replay", "reference")


class Floor:
    """The pieces that the algorithm cannot do without, and what a row of each costs in seconds.

    A row is one image in a call of the network, the VAE or the rewards; with guidance the network has two.
    """

    def __init__(self, policy: Policy, rewards: Rewards, prompts: list[Prompt], config: Config):
        self.policy, self.rewards, self.prompts, self.config = policy, rewards, prompts, config
        self.branches = policy.branches(config.guidance_scale)
        self.images = config.groups_per_epoch * config.group_size
        # The trainer's own, (B, H, W, 3) uint8, because a reward's time may depend on what it sees.
        self.pictures: Tensor
        self.rows: dict[str, int] = {}                     # piece -> of this rank in an epoch
        self.fastest: dict[str, tuple[int, int]] = {}      # piece -> batch size, threads
        self.rates = defaultdict(list)                     # piece -> seconds of a row, measured

    def share(self, other: "Floor") -> None:
        """Measure a row once for both if it costs the same in both. The floors then differ in rows alone."""
        same = ("model", "rewards", "resolution", "max_sequence_length", "dtype", "lora_rank", "lora_targets",
                "lora_path", "full_finetune", "gradient_checkpointing", "compile", "rollout_batch",
                "train_batch")
        if self.images == other.images and all(
                getattr(self.config, name) == getattr(other.config, name) for name in same):
            self.rates, self.fastest = other.rates, other.fastest

    def call(self, piece: str, batch: int) -> Callable[[], object]:
        """Prepare a call of a piece on that many images."""
        drawn = [self.prompts[i % len(self.prompts)] for i in range(batch)]
        texts = [prompt.text for prompt in drawn]
        if piece in NETWORK:
            return network_calls(self.policy, texts, self.config.guidance_scale)[piece]
        if piece == "decode":
            latents = random_latents(self.policy, batch)
            return lambda: self.policy.decode(latents)
        pictures = np.take(self.pictures.cpu().numpy(), range(batch), axis=0, mode="wrap")
        return lambda: self.rewards(pictures, texts, [prompt.metadata for prompt in drawn])

    def rate(self, piece: str, batch: int, threads: int, seconds: float) -> float:  # all ranks
        """Seconds of a row in a batch of this size on so many threads, on all ranks at once."""
        before = torch.get_num_threads()
        rows = batch * self.branches if piece in NETWORK else batch
        torch.set_num_threads(threads)
        distributed.wait_for_all()
        try:
            call = self.call(piece, batch)
            call()                               # warm
            return seconds_per_call(call, self.policy.device, seconds) / rows
        except RuntimeError as error:            # larger than what the trainer was given
            if not is_out_of_memory(error):
                raise
            return math.inf
        finally:
            torch.set_num_threads(before)
            self.policy.network.zero_grad()

    def choose_fastest(self) -> None:  # all ranks
        """Find the fastest batch size and threads of each piece.

        Their rates are measured anew later, because the best of several measurements looks better than it is.
        """
        threads = {torch.get_num_threads()}
        if self.policy.device.type == "cpu":
            threads |= {1, max(1, usable_cores() // distributed.world_size())}
        for piece in PIECES:
            training = piece in ("replay", "reference")
            own = self.config.train_batch if training else self.config.rollout_batch
            most = -(-self.images // distributed.world_size())     # a rank has no more to put into a batch
            if training and not self.config.half_precision:
                most *= self.config.trained_steps                  # but several steps go into one
            batches = {min(most, batch) for batch in (-(-own // 4), -(-own // 2), own, 2 * own)}
            if self.config.compile and piece in NETWORK:       # each size would be compiled by itself
                batches = {min(most, own)}
            candidates = [(batch, n) for batch in sorted(batches) for n in sorted(threads)]
            needed = any(distributed.gather_objects(self.rows[piece] > 0))
            if needed and piece not in self.fastest:
                rates = {candidate: min(self.rate(piece, *candidate, 0.3) for _ in range(2))
                         for candidate in candidates}
                self.fastest[piece] = min(rates, key=rates.get)

    def measure(self) -> None:  # all ranks
        for piece, chosen in self.fastest.items():
            self.rates[piece].append(self.rate(piece, *chosen, 1.0))

    def seconds(self) -> dict[str, float]:
        """Piece -> this rank's seconds of an epoch."""
        return {piece: statistics.median(rates) * self.rows[piece]
                for piece, rates in self.rates.items() if self.rows[piece]}

    def flops(self) -> dict[str, float]:
        """Of one row, by piece: those of matrix products and attention.

        A multiplication and an addition are two.
        """
        counts = dict.fromkeys(NETWORK, 0.0)
        for piece in NETWORK:
            if self.rows[piece]:
                call = self.call(piece, 1)
                with FlopCounterMode(display=False) as counter:
                    call()
                counts[piece] = counter.get_total_flops() / self.branches
        self.policy.network.zero_grad()
        return counts


def random_latents(policy: Policy, images: int) -> Tensor:
    return torch.randn(images, *policy.latent_shape, dtype=policy.compute_dtype, device=policy.device)


def network_calls(policy: Policy, texts: list[str], guidance_scale: float) -> dict[str, Callable[[], object]]:
    """Piece of NETWORK -> a call of it on an image for each text. A replay adds to the weights' gradients."""
    text, latents = policy.encode(texts), random_latents(policy, len(texts))
    sigma, gradient = latents.new_full((len(texts),), 0.5), torch.full_like(latents, 1e-6)
    velocity = policy.velocity(text, guidance_scale)
    reference = policy.reference_velocity(text, guidance_scale)

    @torch.enable_grad()
    def replay() -> None:
        velocity(latents, sigma).backward(gradient)

    return {"rollout": torch.no_grad()(lambda: velocity(latents, sigma)), "replay": replay,
            "reference": lambda: reference(latents, sigma)}


# ---- measuring ---------------------------------------------------------------------------------------------

def usable_cores() -> int:
    """CPU cores that this process may use. An affinity, as of taskset, makes them fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Mean over as many calls as fit into `seconds`."""
    synchronize(device)
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < seconds:
        call()
        synchronize(device)
        calls += 1
    return (time.perf_counter() - started) / calls


def matrix_product_rate(device: torch.device, size: int = 8192) -> float:
    """FLOPs a second of bf16 matrix products, large enough to be at the device's best."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * size**3 / seconds_per_call(lambda: [a @ b for _ in range(10)], device, 1.0) * 10
