"""A GPU that is not there: on a CPU build of PyTorch, tensors of device "cuda" without values.

What a real GPU would do wrong raises here: tensors of two devices in one operation, and every look of the host at a value, for
which it would wait. So a step of training can be walked through at its published size, in seconds and without memory.

    python tests/fake_gpu.py FAMILY [FAULT]          one process, because patches of PyTorch stay
"""

import dataclasses
import math
import sys
import tempfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GUARD = """
#include <torch/extension.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
// An accelerator needs a guard that switches devices. This one does nothing.
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {}
"""
GPU = torch.device("cuda", 0)


class HostWaits(AssertionError):
    """The host looked at a value of the device, or made it wait for a copy."""


class FakeGPU(TorchDispatchMode):
    """Within, operations on "cuda" tensors compute shapes, types and devices only. Operations on the CPU are real."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.host_may_wait = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        on_gpu = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        to_gpu = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not on_gpu and not to_gpu:
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_") and on_gpu and on_gpu[0].device.type == "cuda":
            if any(index is not None and index.device.type == "cpu" for index in args[1]):
                raise HostWaits(f"{name} of a GPU's tensor with an index on the CPU")
        if not self.host_may_wait and name in ("_to_copy", "copy_") and on_gpu and on_gpu[-1].device.type == "cuda":
            target = kwargs.get("device") or (args[0].device if name == "copy_" else GPU)
            if target.type == "cpu":
                raise HostWaits(f"{name} from the GPU to the host")
        with self.fake:
            return function(*args, **kwargs)


def start() -> FakeGPU:
    """Give this process its GPU. Needs a C++ compiler."""
    from torch.utils.cpp_extension import load
    place = Path(tempfile.gettempdir()) / "nano_flow_grpo_fake_gpu"
    place.mkdir(exist_ok=True)
    source = place / "guard.cpp"
    if not source.exists() or source.read_text() != GUARD:
        source.write_text(GUARD)
    load("nano_flow_grpo_guard", [str(source)], build_directory=str(place), verbose=False)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False      # else autocast on "cuda" turns itself off
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.cuda._lazy_init = lambda: None
    torch._C._set_only_lift_cpu_tensors(True)       # torch.tensor(number, device="cuda") makes it on the CPU and copies it
    torch.cuda.is_bf16_supported = lambda *_: True
    torch.cuda.reset_peak_memory_stats = lambda *_: None
    return FakeGPU()


def fake_policy(gpu: FakeGPU, model: str, dtype: str, checkpointing: bool):
    """A policy of the published size, of whose parts on the GPU there are only shapes."""
    from config import PRESETS
    from policy import Policy, check_model

    policy = Policy(model, torch.device("meta"), dtype, resolution=(512, 512), max_sequence_length=128, lora_rank=32,
                    lora_alpha=64, lora_targets=PRESETS[check_model(model).preset].lora_targets,
                    gradient_checkpointing=checkpointing)
    with gpu:
        for module in [*policy.network.modules(), *policy.pipe.vae.modules()]:
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is not None:
                        fake = torch.empty(value.shape, dtype=value.dtype, device=GPU)
                        tensors[name] = torch.nn.Parameter(fake, requires_grad=value.requires_grad) if isinstance(
                            value, torch.nn.Parameter) else fake
    policy.device = GPU
    policy.parameters = [p for p in policy.network.parameters() if p.requires_grad]
    return policy


FAULTS = {
    "an index on the CPU": lambda rows: dataclasses.replace(rows, latents=rows.latents[torch.arange(len(rows.latents))]),
    "a look at a value": lambda rows: dataclasses.replace(rows, noise_level=rows.noise_level * rows.sigma.max().item()),
    "a tensor on the wrong device": lambda rows: dataclasses.replace(rows, sigma=torch.zeros(len(rows.sigma)))}


def walk(family: str, fault: str = "") -> None:
    """Try a batch; sample, decode, replay, reference, loss, AWM's rows and drift, all on the GPU, at the published size."""
    from config import PRESETS
    from draws import draw_sigmas, noise_levels
    from harness.batches import try_batch
    from matching import noise_again
    from policy import check_model
    from sampler import rollout, timestep_schedule
    from train import step_loss

    preset = PRESETS[check_model(f"random:{family}").preset]
    config = dataclasses.replace(preset, beta=0.04, num_steps=4)
    gpu, images = start(), 2
    policy = fake_policy(gpu, f"random:{family}", config.dtype, config.gradient_checkpointing)
    for windows, guard in ((2, True), (0, False)):
        config = dataclasses.replace(config, guard=guard, window_size=windows, window_range=(0, 3))
        first_step = torch.tensor([0, 1]) if windows else torch.zeros(images, dtype=torch.long)
        sigmas = timestep_schedule(config.num_steps, **policy.schedule_arguments(config.num_steps))
        noise = torch.randn(config.num_steps + 1, images, *policy.latent_shape)
        with gpu:
            noise = noise.to(GPU)
            text = policy.encode(["a", "b"])
            velocity = policy.velocity(text, config.guidance_scale)
            trajectory = rollout(velocity, noise[0], sigmas, noise_levels(first_step, config), noise[1:], rule=config.rule,
                                 first_step=first_step, num_trained=config.trained_steps, keep_means=guard)
            pictures = policy.decode(trajectory.final)
            rows = trajectory.rows([0, 1], [0, 1])
            if fault:
                rows = FAULTS[fault](rows)
            A = torch.ones(images).to(GPU)
            loss, watched = step_loss(policy, rows, text, A, config)
            noised = noise_again(velocity, trajectory.final, draw_sigmas(config, 1, [0, 1], sigmas), noise[1:])
            awm, _ = step_loss(policy, noised.rows([0, 1], [0, 1]), text, A, dataclasses.replace(config, guard=False))
            drift = policy.drift(text, noise[0], config.guidance_scale)
            gpu.host_may_wait = True                            # a trial waits until its call is done
            try_batch(policy, ["a", "b"], config.guidance_scale, training=False, memory=math.inf)
            gpu.host_may_wait = False
            found = {"drift": drift, "awm": awm, "final": trajectory.final, "log_probs": trajectory.log_probs, "pictures": pictures, "loss": loss, **watched}
            assert all(value.device == GPU for value in found.values()), found
            assert loss.requires_grad and loss.shape == (images,) and loss.dtype == torch.float32
            assert pictures.shape == (images, 512, 512, 3) and pictures.dtype == torch.uint8
    print("walked", family)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    walk(*sys.argv[1:])
