"""A diffusers pipeline as a velocity model: load, text, guidance, decode, save.

    policy = Policy("assets/tiny-sd3", device)
    text = policy.encode(['the word "lamp"'])
    v = policy.velocity(text, guidance_scale=4.5)(latents, sigma)      # (B, C, H, W), (B,) -> (B, C, H, W)

`families.py` holds what differs between model families, `pipelines.py` how a model is found and loaded, and
`adapters.py` the files of LoRA adapters.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.utils import logging as transformers_logging

from adapters import fit_adapter, load_adapter
from families import LENGTHS, Text
from pipelines import check_model, compile_blocks, load_pipeline, random_text
from sampler import Velocity

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

TEXT_CACHE = 2**31           # bytes of embeddings that stay in host memory: some 1,200 prompts of SD3.5
DECODE_PIXELS = 2**20        # pixels that the autoencoder decodes at once: 4 images of 512 x 512


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from host memory. A GPU fetches it while this process goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Start to copy tensors to host memory. Returns a function that waits for the copies and returns them.

    The function does not wait for work that the GPU was given after this call.
    """
    if tensors[0].device.type != "cuda":
        return lambda: list(tensors)
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
              for tensor in tensors]
    # A blocking event lets the waiting thread sleep. The default event would keep a CPU core busy.
    done = torch.cuda.Event(blocking=True)
    done.record()

    def wait_for_copies() -> list[Tensor]:
        done.synchronize()
        return copies

    return wait_for_copies


def quiet_libraries() -> None:
    """Turn off what diffusers and transformers print, but for how far a download is."""
    hub_bars_off = are_progress_bars_disabled()
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()           # transformers turns off the hub's bars with its own
        # They warn of each prompt that is cut, thrice, and of files that another try of loading finds.
        logging.set_verbosity(logging.CRITICAL)
    if not hub_bars_off:
        enable_progress_bars()


class Policy:
    """A pipeline's transformer, which an adapter or full fine-tuning trains, and the frozen parts around it.

    The network computes in `dtype`, and its frozen weights have that dtype. Trained weights are float32, or
    float64 if `dtype` is "float64". The reference policy is the network without its adapter, also when
    training goes on from `lora_path`. Under `full_finetune` it is a frozen copy of the model, in the dtype of
    the trained weights, because other weights would round otherwise and differ before training.
    """

    def __init__(self, model: str, device: torch.device, dtype: str = "float32", *,
                 resolution: tuple[int, int] = (512, 512), max_sequence_length: int = 128,
                 lora_rank: int = 32, lora_alpha: int = 64, lora_path: str = "",
                 lora_targets: tuple[str, ...] | str = "all-linear", full_finetune: bool = False,
                 with_reference: bool = True, offload_text_encoders: bool = False,
                 gradient_checkpointing: bool = False, compile: bool = False):
        """Load the model and give it an adapter: a new one, that at `lora_path`, or none (`lora_rank` 0).

        resolution: height and width in pixels. max_sequence_length: tokens of a prompt, as T5 or the
        language model counts them. An adapter at `lora_path` keeps its own rank, alpha and targets.
        with_reference: full fine-tuning keeps a frozen copy. Raises ValueError if the model is not supported,
        the adapter does not fit it, or its patches do not tile the resolution.
        """
        quiet_libraries()
        self.model, self.device, self.dtype = model, device, DTYPES[dtype]
        # Latents and trained weights have this dtype.
        self.compute_dtype = torch.float64 if dtype == "float64" else torch.float32
        self.max_sequence_length = max_sequence_length
        # Every call of a network calls this first. It may raise to stop a rollout.
        self.before_call: Callable[[], None] = lambda: None
        if device.type == "cuda":
            # Full precision forbids TF32, to which cuDNN rounds the inputs of convolutions by default. Half
            # precision allows it, also in the autoencoder.
            torch.backends.cudnn.allow_tf32 = dtype not in ("float32", "float64")

        # The autoencoder's weights have full precision, because its pictures are what rewards score.
        dtypes = {"default": self.dtype, "transformer": self.compute_dtype if full_finetune else self.dtype,
                  "vae": self.compute_dtype}
        family = check_model(model)
        self.pipe = load_pipeline(family, model, device, dtypes)
        self.family = family(self.pipe)
        self.set_resolution(resolution)
        self.offload_text_encoders = offload_text_encoders
        for name, part in self.pipe.components.items():
            if isinstance(part, torch.nn.Module):
                on_host = offload_text_encoders and name.startswith("text_encoder")
                part.requires_grad_(False).to("cpu" if on_host else device)

        self.network = transformer = self.pipe.transformer.requires_grad_(full_finetune)
        self.reference = None
        if full_finetune and with_reference:
            self.reference = copy.deepcopy(transformer).requires_grad_(False)
        if lora_path and not full_finetune:
            self.network = load_adapter(transformer, lora_path, model)
        elif lora_rank and not full_finetune:
            self.network = self._new_adapter(lora_rank, lora_alpha, lora_targets)
        if isinstance(self.network, PeftModel):
            self.network.peft_config["default"].base_model_name_or_path = model
        self.network.eval()      # no dropout, because replay must compute what the rollout computed
        if dtype == "float64":
            self.network.double()
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.compiled = compile
        if compile:
            compile_blocks(transformer)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self._text_cache: dict[str, Text] = {}
        self._text_kept = 0

    def set_resolution(self, resolution: tuple[int, int]) -> None:
        """Set height and width of the next images, in pixels. Raises ValueError if the model takes others."""
        channels, scale, patch, most = self.family.tiling()
        unit = scale * patch
        if any(size < unit or size % unit or size > (most or math.inf) * unit for size in resolution):
            limit = f" up to {most * unit}" if most else ""
            raise ValueError(f"--resolution is {resolution}: {self.model} takes multiples of {unit}{limit}")
        self.latent_shape = (channels, *(size // scale for size in resolution))          # C, H, W
        self.tokens = math.prod(size // unit for size in resolution)                     # patches of an image
        if not (shift := self.family.schedule(1, self.tokens)["shift"]) > 0:
            raise ValueError(f"--resolution is {resolution}: the scheduler of {self.model} would shift times "
                             f"by {shift:.3g}, which must be above 0; give another resolution")

    def checksum(self) -> int:
        """Return a number by which ranks see that they hold other weights: the sum of all 8-byte words."""
        total, parts = 0, [*self.pipe.components.values(), self.reference]
        for part in filter(lambda part: isinstance(part, torch.nn.Module), parts):
            for weight in part.state_dict().values():
                flat = weight.flatten().view(torch.int8)
                flat = flat.clone() if flat.storage_offset() % 8 else flat         # so that words are whole
                words = len(flat) // 8 * 8
                total += flat[:words].view(torch.int64).sum().item() + flat[words:].sum().item()
        return total

    def schedule_arguments(self, num_steps: int) -> dict[str, float | None]:
        """Return keywords for `sampler.timestep_schedule`: the pipeline's own schedule at this resolution."""
        return self.family.schedule(num_steps, self.tokens)

    def branches(self, guidance_scale: float) -> int:
        """Count the rows that the network computes per image: 2 with classifier-free guidance, else 1."""
        return 1 if guidance_scale == 1 or self.family.embedded_guidance else 2

    # ---- adapters ------------------------------------------------------------------------------------------

    def _new_adapter(self, rank: int, alpha: int, targets: tuple[str, ...] | str) -> PeftModel:
        """Give the transformer an adapter that changes nothing yet.

        targets: ends of layers' names, or one pattern. Raises ValueError if a target has no layer.
        """
        # Look for each target, because peft is content if one of them has a layer.
        names = [f".{name}" for name, _ in self.pipe.transformer.named_modules()]
        ends = () if isinstance(targets, str) else targets
        unknown = [end for end in ends if not any(name.endswith(f".{end}") for name in names)]
        way_out = f"the preset {self.family.preset} names those of its family"
        if unknown:
            raise ValueError(f"--lora-targets is {targets}: {self.model} has no layer "
                             f"{', '.join(unknown)}; {way_out}")
        settings = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian",
                              target_modules=targets if isinstance(targets, str) else list(targets))
        try:
            return get_peft_model(self.pipe.transformer, settings)
        except ValueError as error:
            raise ValueError(f"--lora-targets is {targets}: {self.model} has no such layer; {way_out}"
                             ) from error

    def add_adapter(self, name: str, lora_path: str) -> None:
        """Load another adapter onto the same weights. Raises ValueError, changing nothing, if it misfits."""
        # Try it on a copy without weights first, because peft leaves half-installed layers behind.
        with torch.device("meta"):
            skeleton = type(self.pipe.transformer).from_config(self.pipe.transformer.config)
        fit_adapter(skeleton, lora_path, self.model, name)
        self.network = load_adapter(self.network, lora_path, self.model, name).eval()

    def use_adapter(self, name: str, strength: float = 1.0) -> None:
        """Switch to an adapter. Strength 1 is the adapter as trained, 0 is the model itself to the bit."""
        if not isinstance(self.network, PeftModel):
            return
        if not strength:
            self.network.base_model.disable_adapter_layers()
            return
        self.network.base_model.enable_adapter_layers()
        self.network.set_adapter(name, inference_mode=True)
        for layer in self.network.modules():
            if isinstance(layer, LoraLayer):
                layer.set_scale(name, strength)

    # ---- text ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cache_text(self, prompts: list[str], guidance_scale: float = 1.0) -> None:
        """Encode all `prompts` now, so that offloaded encoders move once. Keeps them until the next call."""
        prompts = list(dict.fromkeys([*prompts, *[""] * (self.branches(guidance_scale) - 1)]))
        self._text_kept = len(prompts)
        self._encode_missing(prompts)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Text:
        """Return embeddings (B, L, D) and the rest of `Text`, on the device. Each prompt is encoded once.

        Lengths stay on the host, because shapes depend on them and the host would wait for the device.
        """
        self._encode_missing(prompts)
        # Copy each prompt once, and repeat it on the device, because rows of one sample share their prompt.
        place = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
        kept = map(torch.stack, zip(*(self._text_cache[prompt] for prompt in place)))
        index = torch.tensor([place[prompt] for prompt in prompts])
        on_device = to_device(index, self.device)
        text = tuple(part[index] if part.dtype == LENGTHS else to_device(part, self.device)[on_device]
                     for part in kept)
        most = TEXT_CACHE // sum(part.nbytes for part in self._text_cache[prompts[0]])       # prompts
        while len(self._text_cache) > max(most, self._text_kept):
            self._text_cache.pop(next(iter(self._text_cache)))
        return text

    def _encode_missing(self, prompts: list[str]) -> None:
        """Encode those prompts that the cache does not hold.

        Prompts are encoded one at a time, because the last bits of an embedding depend on the batch size. A
        resumed run starts with an empty cache and would otherwise batch other prompts together.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_cache]
        moved = []
        if missing and self.offload_text_encoders:
            parts = self.pipe.components.items()
            moved = [part for name, part in parts if name.startswith("text_encoder") and part is not None]
        try:
            for part in moved:
                part.to(self.device)
            for prompt in missing:
                self.before_call()
                if self.model.startswith("random:"):
                    text = random_text(self.family, prompt, self.max_sequence_length, self.dtype)
                else:
                    text = self.family.encode(prompt, self.max_sequence_length, self.device)
                self._text_cache[prompt] = tuple(part[0].cpu() for part in text)     # (L, D), ...
        finally:
            for part in moved:
                part.to("cpu")
        # Put the prompts in use at the end of the cache, because its oldest entries are dropped first.
        for prompt in dict.fromkeys(prompts):
            self._text_cache[prompt] = self._text_cache.pop(prompt)

    # ---- velocity ------------------------------------------------------------------------------------------

    def velocity(self, text: Text, guidance_scale: float = 1.0, reference: bool = False,
                 negative_prompt: str = "") -> Velocity:
        """Return the policy as a function of latents (B, C, H, W) and sigma (B,). Gradients flow through it.

        text: what `encode` made of the B prompts. reference: only `reference_velocity` passes it. The
        velocity has the latents' dtype. With classifier-free guidance the guided velocity is the policy: one
        network call computes both branches, with gradients, and points away from `negative_prompt`.
        """
        network = self.reference if reference and self.reference is not None else self.network
        if self.branches(guidance_scale) == 2:
            negative_text = self.encode([negative_prompt])
            text = tuple(torch.cat([negative.expand_as(part), part])                 # (2B, ...)
                         for negative, part in zip(negative_text, text))
        autocast = self.dtype in (torch.float16, torch.bfloat16)
        # A compiled network is one program with gradients and another without, and the two round differently.
        # So the policy samples by the program that replays, and drops the gradients. The reference has no
        # ratio and runs without gradients.
        with_gradients = self.compiled and not reference

        def guided_velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            self.before_call()
            branches = len(text[0]) // len(latents)
            x, t = torch.cat([latents] * branches), torch.cat([sigma] * branches)
            training = torch.is_grad_enabled()
            with (torch.set_grad_enabled(training or with_gradients),
                  torch.autocast(self.device.type, self.dtype, enabled=autocast)):
                v = self.family.velocity(network, x, t, text, guidance_scale)        # (branches B, C, H, W)
            v = (v if training else v.detach()).to(latents.dtype)
            if branches == 1:
                return v
            unconditional, conditional = v.chunk(2)
            return self.family.guide(conditional, unconditional, guidance_scale)

        return guided_velocity

    def reference_velocity(self, text: Text, guidance_scale: float = 1.0) -> Velocity:
        """Return the untrained model as a function of latents and sigma, without gradients."""
        velocity = self.velocity(text, guidance_scale, reference=True)

        @torch.no_grad()
        def untrained_velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            if self.reference is not None:
                return velocity(latents, sigma)
            # peft's own `disable_adapter` surveys all layers, which takes longer than a small network's call.
            self.network.base_model.disable_adapter_layers()
            try:
                return velocity(latents, sigma)
            finally:
                self.network.base_model.enable_adapter_layers()

        return untrained_velocity

    @torch.no_grad()
    def drift(self, text: Text, noise: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Return how far training has moved the velocity at sigma 1, from noise (B, C, H, W): (B,).

        It is the mean squared difference from the reference, or NaN if full fine-tuning keeps no reference.
        """
        sigma = torch.ones(len(noise), dtype=noise.dtype, device=noise.device)
        if self.reference is None and not isinstance(self.network, PeftModel):
            return torch.full_like(sigma, math.nan)
        velocities = self.velocity(text, guidance_scale), self.reference_velocity(text, guidance_scale)
        trained, untrained = (velocity(noise, sigma) for velocity in velocities)
        return ((trained - untrained) ** 2).flatten(1).mean(1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, H, W) to images: uint8 (B, 8H, 8W, 3) if the autoencoder compresses 8 times.

        A few images at a time, because the autoencoder's activations take more memory than anything else.
        """
        _, scale, _, _ = self.family.tiling()
        pixels = math.prod(latents.shape[-2:]) * scale**2                            # of one image
        images = []
        for part in latents.to(self.pipe.vae.dtype).split(max(1, DECODE_PIXELS // pixels)):
            image = (self.family.decode(part) / 2 + 0.5).clamp(0, 1)                 # (b, 3, 8H, 8W), 0 to 1
            images.append((image * 255).round().to(torch.uint8))
        return torch.cat(images).permute(0, 2, 3, 1).contiguous()

    def save(self, directory: Path) -> None:
        """Save the trained weights in the formats that others load.

        Full fine-tuning writes diffusers' `directory/transformer`. An adapter is written for both
        `PeftModel.from_pretrained(pipe.transformer, directory / "adapter")` and
        `pipe.load_lora_weights(directory / "adapter")`.
        """
        if not isinstance(self.network, PeftModel):
            self.network.save_pretrained(directory / "transformer")
            return
        # save_embedding_layers="auto" is peft's default and would ask the hub.
        self.network.save_pretrained(directory / "adapter", save_embedding_layers=False)
        tensors = get_peft_model_state_dict(self.network, save_embedding_layers=False)
        # Give diffusers the settings too, because without them it takes the rank for alpha.
        self.pipe.save_lora_weights(
            directory / "adapter",
            {key.removeprefix("base_model.model."): value for key, value in tensors.items()},
            transformer_lora_adapter_metadata=self.network.peft_config["default"].to_dict())
