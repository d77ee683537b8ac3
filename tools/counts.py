"""What the trainer's calls take, counted without weights or a GPU: FLOPs, bytes moved, bytes of memory.

The calls are the policy's own. They run on tensors without values (PyTorch's FakeTensorMode), of the
published size and in the run's dtype, and each operation tells what it takes.
"""

import functools
import math
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from config import Config
from policy import Policy
from tools.floor import network_calls, random_latents

# A hub id -> the `random:` model of its size, and billions of weights in its text encoders.
PUBLISHED = {"stabilityai/stable-diffusion-3.5-medium": ("random:sd35m", 5.58),
             "stabilityai/stable-diffusion-3.5-large": ("random:sd35l", 5.58),
             "black-forest-labs/FLUX.1-dev": ("random:flux", 4.89),
             "Qwen/Qwen-Image": ("random:qwen_image", 8.29),
             "black-forest-labs/FLUX.2-klein-base-4B": ("random:flux2_klein_4b", 4.02),
             "black-forest-labs/FLUX.2-klein-base-9B": ("random:flux2_klein_9b", 8.19),
             "black-forest-labs/FLUX.2-dev": ("random:flux2_dev", 24.01),
             "Tongyi-MAI/Z-Image": ("random:z_image", 4.02)}

aten = torch.ops.aten
# PyTorch counts attention on a GPU alone.
flop_registry[aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop
flop_registry[aten._scaled_dot_product_flash_attention_for_cpu_backward] = sdpa_backward_flop


class Tally(TorchDispatchMode):
    """Counts what operations within take: FLOPs, bytes read and written, kernels, the most bytes alive."""

    def __init__(self, alive: list[Tensor]):
        """alive: tensors that exist before."""
        super().__init__()
        self.flops = self.moved = self.kernels = self.alive = self.peak = 0
        self.storages: set[int] = set()
        self._see(alive)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace != "aten":
            return out
        operation = function.overloadpacket
        # PyTorch's own FlopCounterMode would keep alive what checkpointing computes again.
        if operation in flop_registry:
            self.flops += flop_registry[operation](*args, **(kwargs or {}), out_val=out)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not function.is_view and operation is not aten.detach:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved += sum(tensor.nbytes for tensor in read + made)
            self.kernels += 1
        self._see(made)
        return out

    def _see(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, storage: int, size: int) -> None:
        self.storages.discard(storage)
        self.alive -= size


@dataclass(frozen=True)
class Call:
    """A call on two images and on three: each [FLOPs, bytes moved, kernels, peak bytes].

    Other numbers of images lie on the line through both. One image is not counted, because PyTorch's linear
    layer starts one kernel on a single row, and two on a part of several rows' tokens.
    """
    two: np.ndarray
    three: np.ndarray

    @property
    def more(self) -> np.ndarray:
        """What an image more takes."""
        return self.three - self.two

    def on(self, images: float) -> np.ndarray:
        return self.two + (images - 2) * self.more


# The settings on which counts depend.
COUNTED = ("model", "dtype", "resolution", "max_sequence_length", "guidance_scale", "lora_rank",
           "lora_targets", "full_finetune", "gradient_checkpointing", "offload_text_encoders")


def count(config: Config) -> "Counts":
    """Make the counts of a setting, or find those of an earlier one whose calls are the same."""
    kept = float(config.full_finetune and config.beta > 0)      # whether training keeps a copy as reference
    return Counts(Config(**{name: getattr(config, name) for name in COUNTED}, beta=kept))


@functools.cache
class Counts:
    """What calls of a policy take, by phase, and the bytes of what stays in memory.

    Raises ValueError in one line if the model is not supported or does not take the resolution.
    """

    def __init__(self, config: Config):
        model, billions = PUBLISHED.get(config.model, (config.model, 0.0))
        # A random model is born without values. Another one is loaded, because its encoders tell the text's
        # size.
        device = torch.device("meta" if model.startswith("random:") else "cpu")
        self.policy = policy = Policy(
            model, device, config.dtype, resolution=config.resolution,
            max_sequence_length=config.max_sequence_length, lora_rank=config.lora_rank,
            lora_targets=config.lora_targets, full_finetune=config.full_finetune,
            with_reference=config.beta > 0, gradient_checkpointing=config.gradient_checkpointing)
        policy.cache_text(["a"], config.guidance_scale)
        self.embeddings = sum(part.nbytes for part in policy.encode(["a"]))          # bytes of one prompt's
        encoders = [part for name, part in policy.pipe.components.items()
                    if name.startswith("text_encoder") and part is not None]
        self.encoders = sum(map(size_of, encoders)) + int(billions * 1e9) * policy.dtype.itemsize
        self.text_encoders = 0 if config.offload_text_encoders else self.encoders    # bytes that stay
        networks = [network for network in (policy.network, policy.reference) if network is not None]
        self.network, self.autoencoder = sum(map(size_of, networks)), size_of(policy.pipe.vae)       # bytes
        self.latent = math.prod(policy.latent_shape) * policy.compute_dtype.itemsize # bytes of one image's

        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        for part in networks:
            lose_values(part, self.fake, like_a_gpu=config.half_precision)
        lose_values(policy.pipe.vae, self.fake)
        policy.device = torch.device("cpu")
        policy.parameters = [p for p in policy.network.parameters() if p.requires_grad]
        self.trained_weights = sum(p.numel() for p in policy.parameters)
        self.trained = sum(p.nbytes for p in policy.parameters)                      # bytes of these
        self.guidance_scale, self.branches = config.guidance_scale, policy.branches(config.guidance_scale)
        self.alive = [tensor for part in (*networks, policy.pipe.vae)
                      for tensor in (*part.parameters(), *part.buffers())]
        self.known: dict[str, Call] = {}

    def call(self, phase: str) -> Call:
        """Count a call of a phase, once."""
        if phase not in self.known:
            self.known[phase] = Call(self.tally(phase, 2), self.tally(phase, 3))
        return self.known[phase]

    def tally(self, phase: str, images: int) -> np.ndarray:
        """Count a call of a phase on so many images."""
        # Text has values, because lengths are read from it.
        calls = network_calls(self.policy, ["a"] * images, self.guidance_scale)
        calls["training"] = calls["replay"]
        calls["decode"] = lambda: self.policy.decode(random_latents(self.policy, images))
        with self.fake, torch.no_grad(), Tally(self.alive) as counted:
            calls[phase]()
        self.policy.network.zero_grad()
        return np.array([counted.flops, counted.moved, counted.kernels, counted.peak], dtype=float)


def size_of(part: nn.Module) -> int:
    """Bytes of its weights and buffers."""
    return sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))


def lose_values(part: nn.Module, fake: FakeTensorMode, like_a_gpu: bool = False) -> None:
    """Leave only shapes of a module's weights, buffers and other tensors, as if they were on the CPU.

    like_a_gpu: a GPU's autocast computes norms in float32, and that of a CPU does not.
    """
    for module in part.modules():
        if like_a_gpu and isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
            module.float().register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
        with fake:
            for tensors in (module._parameters, module._buffers, vars(module)):
                for name, value in tensors.items():
                    if isinstance(value, Tensor):
                        tensors[name] = torch.empty(value.shape, dtype=value.dtype,
                                                    requires_grad=value.requires_grad)
