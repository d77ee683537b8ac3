"""SD3 and FLUX, alike: the policy samples as the pipeline does, fits the memory, and trains; published sizes; random weights."""

import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
                       FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler, FluxPipeline, FluxTransformer2DModel,
                       StableDiffusion3Pipeline)
from safetensors.torch import load_file, save_file

import adapters
import policy as policy_module
from families import FAMILIES, FLUX, SD3, diffusers_class
from pipelines import is_distilled
from policy import Policy, check_model
from sampler import replay, rollout, timestep_schedule

CPU = torch.device("cpu")
TOKENS = 12
PROMPTS = ['the word "lamp"', 'the word "sun"']
SIGMA = torch.tensor([0.9, 0.3])


def make_policy(model: str, dtype: str = "float32", resolution=(16, 32), **settings) -> Policy:
    torch.manual_seed(0)
    return Policy(model, CPU, dtype, resolution=resolution, max_sequence_length=TOKENS, lora_rank=4, lora_alpha=8, **settings)


def start_noise(policy: Policy, count: int = 2) -> torch.Tensor:
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).to(policy.compute_dtype)


def change(policy: Policy, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters:
            p += scale * torch.randn(p.shape, generator=generator).to(p)


def policy_latents(policy: Policy, noise: torch.Tensor, steps: int, guidance_scale: float) -> torch.Tensor:
    sigmas = timestep_schedule(steps, **policy.schedule_arguments(steps))
    return rollout(policy.velocity(policy.encode(PROMPTS), guidance_scale), noise, sigmas, 0.0, None).final


def pipeline_latents(pipe: DiffusionPipeline, noise: torch.Tensor, resolution, **settings) -> torch.Tensor:
    """The pipeline's own final latents (B, C, H, W), by its own packing where it packs."""
    if isinstance(pipe, FluxPipeline):
        noise = pipe._pack_latents(noise, *noise.shape)
    latents = pipe(PROMPTS, latents=noise, height=resolution[0], width=resolution[1], max_sequence_length=TOKENS,
                   output_type="latent", **settings).images
    return pipe._unpack_latents(latents, *resolution, pipe.vae_scale_factor) if isinstance(pipe, FluxPipeline) else latents


@functools.cache
def untrained_policy(model: str, resolution=(16, 32)) -> Policy:
    """For tests that leave it as it is."""
    return make_policy(model, resolution=resolution)


@functools.cache
def load_pipeline(model: str) -> DiffusionPipeline:
    """Likewise."""
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------------------------------- as the pipeline does it

@pytest.mark.parametrize("resolution, steps, guidance_scale", [
    ((16, 32), 6, 1.0), ((16, 32), 6, 3.5), ((40, 24), 1, 3.5), ((64, 64), 10, 2.0)])
def test_a_rollout_without_noise_ends_where_the_pipeline_ends(each_model, resolution, steps, guidance_scale):
    policy = untrained_policy(each_model, resolution)
    noise = start_noise(policy)
    expected = pipeline_latents(load_pipeline(each_model), noise, resolution, num_inference_steps=steps,
                                guidance_scale=guidance_scale)
    latents = policy_latents(policy, noise, steps, guidance_scale)
    assert latents.shape == expected.shape and (latents - expected).abs().max() < 1e-5
    assert (latents - noise).std() > 0.1


def test_flux_without_guidance_embeddings_and_shift_as_schnell_is_ends_where_its_pipeline_ends(flux_model, tmp_path):
    shutil.copytree(flux_model, tmp_path, dirs_exist_ok=True)
    config = load_pipeline(flux_model).transformer.config
    FluxTransformer2DModel.from_config({**config, "guidance_embeds": False}).save_pretrained(tmp_path / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(tmp_path / "scheduler")
    policy = make_policy(str(tmp_path))
    noise = start_noise(policy)
    expected = pipeline_latents(load_pipeline(str(tmp_path)), noise, (16, 32), num_inference_steps=4)
    assert policy.schedule_arguments(4) == {"shift": 1.0, "sigma_min": 0.25, "shift_terminal": None}
    assert (policy_latents(policy, noise, 4, 1.0) - expected).abs().max() < 1e-5


def test_guidance_that_a_flux_network_does_not_take_is_refused_before_it_loads(flux_model, tmp_path):
    check_model(flux_model, 3.5)
    file = without_weights(flux_model, tmp_path) / "transformer" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps({**load_pipeline(flux_model).transformer.config, "guidance_embeds": False}))
    assert is_distilled(str(tmp_path)) and check_model(str(tmp_path)) is FLUX
    with pytest.raises(ValueError, match="^--guidance-scale is 3.5: .* is distilled to go without guidance; set it to 1"):
        check_model(str(tmp_path), 3.5)


def latents_agree(directory: Path, half: bool = False) -> None:
    """The policy draws what the pipeline at `directory` draws, loaded as diffusers' users load it."""
    policy = make_policy(str(directory))
    pipe = DiffusionPipeline.from_pretrained(directory, **parts_left_out(directory), **({"variant": "fp16"} if half else {}))
    pipe.set_progress_bar_config(disable=True)
    noise = start_noise(policy)
    expected = pipeline_latents(pipe.to(torch.float32), noise, (16, 32), num_inference_steps=4, guidance_scale=2.0)
    assert (policy_latents(policy, noise, 4, 2.0) - expected).abs().max() < 2e-5


def parts_left_out(directory: Path) -> dict:
    return {name: None for name, entry in json.loads((directory / "model_index.json").read_text()).items()
            if entry == [None, None]}


def test_sd3_without_t5_draws_what_its_pipeline_draws(model, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    assert parts_left_out(tmp_path).keys() >= {"text_encoder_3", "tokenizer_3"}
    latents_agree(tmp_path)
    policy = make_policy(str(tmp_path), offload_text_encoders=True)
    embeds, whole = policy.encode(PROMPTS)[0], untrained_policy(model).encode(PROMPTS)[0]
    assert torch.equal(embeds[:, :-TOKENS], whole[:, :-TOKENS])
    assert not embeds[:, -TOKENS:].any() and whole[:, -TOKENS:].any()


def warnings_of_long_prompts(policy: Policy, capfd) -> list[str]:
    policy.encode(["short"])
    assert not capfd.readouterr().err
    policy.encode(["x" * 60, "y" * 61])
    policy.encode(["z" * 62])
    return capfd.readouterr().err.splitlines()


def test_a_prompt_that_is_too_long_is_one_warning_with_both_lengths(each_model, capfd):
    said, = warnings_of_long_prompts(make_policy(each_model), capfd)
    assert "x" * 60 in said and " has 62 tokens and --max-sequence-length is 12: its end is left out" in said


def test_without_t5_a_prompt_that_is_too_long_for_clip_is_one_warning(model, tmp_path, capfd):
    StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None).save_pretrained(tmp_path)
    said, = warnings_of_long_prompts(make_policy(str(tmp_path)), capfd)
    assert re.search(r"x{60}' has \d+ tokens and CLIP's limit is 16: its end is left out", said)


@pytest.mark.parametrize("family, part", [("sd3", "text_encoder"), ("sd3", "text_encoder_2"), ("sd3", "tokenizer"), ("sd3", "vae"),
                                          ("flux", "text_encoder"), ("flux", "text_encoder_2"), ("flux", "tokenizer_2"),
                                          ("flux", "transformer")])
def test_a_pipeline_without_a_part_that_it_needs_is_refused_before_it_loads(model, flux_model, family, part, tmp_path):
    directory = without_weights({"sd3": model, "flux": flux_model}[family], tmp_path)
    index = json.loads((directory / "model_index.json").read_text())
    for broken in (index | {part: [None, None]}, {name: entry for name, entry in index.items() if name != part}):
        (directory / "model_index.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=f"has no {part}: its model_index.json leaves it out") as error:
            check_model(str(directory))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("parts", ["all", "transformer"])
def test_weights_in_files_of_half_precision_load(each_model, tmp_path, parts):
    DiffusionPipeline.from_pretrained(each_model, dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    if parts == "transformer":
        for whole in ("vae", *(p.name for p in Path(each_model).glob("text_encoder*"))):
            shutil.rmtree(tmp_path / whole)
            shutil.copytree(Path(each_model) / whole, tmp_path / whole)
    assert not list((tmp_path / "transformer").glob("*model.safetensors"))
    latents_agree(tmp_path, half=True)


@pytest.mark.slow
def test_a_damaged_file_is_refused_although_one_of_half_precision_lies_beside_it(each_model, tmp_path):
    shutil.copytree(each_model, tmp_path, dirs_exist_ok=True)
    DiffusionPipeline.from_pretrained(each_model, dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    for part in ("transformer", next(p.name for p in Path(each_model).glob("text_encoder*"))):
        damaged = next(path for path in (tmp_path / part).glob("*model.safetensors"))
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-1000])
        with pytest.raises(ValueError, match="cannot be loaded"):
            make_policy(str(tmp_path))
        damaged.write_bytes(whole)
    make_policy(str(tmp_path))


def test_weights_in_bin_files_load_and_run_no_code(each_model, tmp_path):
    load_pipeline(each_model).save_pretrained(tmp_path, safe_serialization=False)
    for encoder in tmp_path.glob("text_encoder*/model.safetensors"):                      # transformers no longer writes others
        torch.save(load_file(encoder), encoder.with_name("pytorch_model.bin"))
        encoder.unlink()
    assert list((tmp_path / "transformer").glob("*.bin")) and not list(tmp_path.glob("*/*.safetensors"))
    latents_agree(tmp_path)
    torch.save({"weight": Runs(tmp_path / "ran")}, next((tmp_path / "transformer").glob("*.bin")))
    with pytest.raises(Exception):  # noqa: B017  (of whatever type)
        make_policy(str(tmp_path))
    assert not (tmp_path / "ran").exists()


class Runs:
    """A pickle that would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def drop_first(file: Path) -> None:
    """Leave out the first tensor by name."""
    tensors = load_file(file)
    save_file({name: tensors[name] for name in sorted(tensors)[1:]}, file, {"format": "pt"})


WEIGHTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_3": "model"}
UNREADABLE = [(f"{part}/{name}.safetensors", spoil, "cannot be loaded: .*" + part) for part, name in WEIGHTS.items() for spoil in (Path.unlink, cut)]
INCOMPLETE = [
    *((f"{part}/{name}.safetensors", drop_first, rf"is not whole: its {part} lacks \w[\w.]+\.(weight|bias);") for part, name in WEIGHTS.items()),
    ("text_encoder/config.json", Path.unlink, "is not whole: its text_encoder lacks config.json;"),
    *((f"{part}/{name}", Path.unlink, f"is not whole: its {part} lacks {what};") for part in ("tokenizer", "tokenizer_3")
      for name, what in (("tokenizer_config.json", "tokenizer_config.json"), ("tokenizer.json", "its vocabulary")))]


@pytest.mark.parametrize("file, spoil, says", UNREADABLE + INCOMPLETE)
def test_a_pipeline_whose_files_are_not_whole_is_refused_in_one_line(model, file, spoil, says, tmp_path, caplog):
    shutil.copytree(model, tmp_path / "sd3")
    spoil(tmp_path / "sd3" / file)
    with pytest.raises(ValueError) as error:
        make_policy(str(tmp_path / "sd3"))
    assert re.match(re.escape(f"--model {str(tmp_path / 'sd3')!r} ") + says, str(error.value)) and "\n" not in str(error.value)
    assert not caplog.text


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_to_load_a_pipeline_is_no_fault_of_its_files(model, error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", fail)
    with pytest.raises(type(error)) as found:
        make_policy(model)
    assert found.value is error


def test_every_input_of_flux_matters(flux_model):
    policy = untrained_policy(flux_model)
    x, text = start_noise(policy), policy.encode(PROMPTS)
    turned = (text[0].flip(0), text[1]), (text[0], text[1].flip(0))
    with torch.no_grad():
        v = policy.velocity(text, 3.5)(x, SIGMA)
        others = [policy.velocity(text, 1.0)(x, SIGMA), policy.velocity(text, 3.5)(x, SIGMA + 0.05),
                  *(policy.velocity(other, 3.5)(x, SIGMA) for other in turned),
                  policy.velocity(text, 3.5)(x.roll(2, -1), SIGMA).roll(-2, -1)]                  # the place
    assert all((other - v).abs().max() > 1e-3 for other in others)


def test_flux_takes_one_transformer_call_whatever_the_guidance_and_sd3_two_rows_with_it(model, flux_model):
    for directory, rows in ((model, 4), (flux_model, 2)):
        policy, seen = untrained_policy(directory), []
        hook = policy.pipe.transformer.proj_out.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        for guidance_scale, expected in ((1.0, 2), (4.5, rows)):
            policy.velocity(policy.encode(PROMPTS), guidance_scale)(start_noise(policy), SIGMA)
            assert seen.pop() == expected == 2 * policy.branches(guidance_scale) and not seen
        hook.remove()


@pytest.mark.parametrize("settings", [dict(shift=1.0), dict(shift=3.0), dict(use_dynamic_shifting=True),
                                      dict(use_dynamic_shifting=True, time_shift_type="linear", max_shift=2.0)])
def test_the_schedule_is_the_one_the_pipeline_sets(each_model, settings, monkeypatch):
    resolution = (40, 24)
    policy, pipe = untrained_policy(each_model, resolution), load_pipeline(each_model)
    scheduler = FlowMatchEulerDiscreteScheduler(base_image_seq_len=8, max_image_seq_len=128, **settings)
    monkeypatch.setattr(policy.pipe, "scheduler", scheduler)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    for steps in (1, 5):
        pipeline_latents(pipe, start_noise(policy), resolution, num_inference_steps=steps)
        sigmas = timestep_schedule(steps, **policy.schedule_arguments(steps))
        assert (sigmas - pipe.scheduler.sigmas).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [FlowMatchLCMScheduler, FlowMatchHeunDiscreteScheduler, EulerDiscreteScheduler,
                                  DPMSolverMultistepScheduler])
@pytest.mark.parametrize("named_in", ["scheduler_config.json alone", "both files"])
def test_a_scheduler_of_another_class_is_refused_before_weights_load(each_model, kind, named_in, tmp_path):
    directory = without_weights(each_model, tmp_path)
    kind().save_pretrained(directory / "scheduler")
    if named_in == "both files":
        index = json.loads((directory / "model_index.json").read_text())
        (directory / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind.__name__]}))
    with pytest.raises(ValueError) as error:
        check_model(str(directory))
    message = str(error.value)
    assert repr(str(directory)) in message and kind.__name__ in message and "\n" not in message
    assert "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)" in message


def without_weights(model: str, directory: Path) -> Path:
    """What `check_model` may read of a pipeline."""
    shutil.copytree(Path(model) / "scheduler", directory / "scheduler")
    shutil.copy(Path(model) / "model_index.json", directory)
    return directory


# One value other than the default of every option of diffusers' class; a new option has none and fails the test.
OTHER_VALUES = dict(num_train_timesteps=500, shift=2.0, use_dynamic_shifting=True, base_shift=0.7, max_shift=1.5,
                    base_image_seq_len=8, max_image_seq_len=128, invert_sigmas=True, shift_terminal=0.1, use_karras_sigmas=True,
                    use_exponential_sigmas=True, use_beta_sigmas=True, time_shift_type="linear", stochastic_sampling=True)
OPTIONS = list(inspect.signature(FlowMatchEulerDiscreteScheduler).parameters)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [*OPTIONS, "use_flow_sigmas"])
def test_every_option_of_the_scheduler_is_followed_or_refused(each_model, name, dynamic, tmp_path, monkeypatch):
    directory = without_weights(each_model, tmp_path)
    options = {"use_dynamic_shifting": dynamic, **OTHER_VALUES, "use_flow_sigmas": True}
    options = {"use_dynamic_shifting": dynamic, name: options[name]}
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(options))
    refused = {"num_train_timesteps", "stochastic_sampling", "invert_sigmas", "use_karras_sigmas",
               "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"}
    if name in refused:
        with pytest.raises(ValueError, match=f"its scheduler's {name} is {options[name]}, .* in scheduler/scheduler_config.json"):
            check_model(str(directory))
        return
    check_model(str(directory))
    policy, pipe = untrained_policy(each_model, (40, 24)), load_pipeline(each_model)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(options)
    monkeypatch.setattr(policy.pipe, "scheduler", scheduler)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    noise = start_noise(policy)
    expected = pipeline_latents(pipe, noise, (40, 24), num_inference_steps=3, guidance_scale=1.0)
    assert (policy_latents(policy, noise, 3, 1.0) - expected).abs().max() < 3e-5    # rounding: one large step ends at sigma 0


@pytest.mark.parametrize("options, name", [
    ('{"shift_terminal": 1.5}', "shift_terminal is 1.5"), ("", "has no scheduler"), ("[1]", "has no scheduler"), ('{"shift": "3"}', "shift is '3'"), ('{"shift": 0}', "shift is 0"),
    ('{"use_dynamic_shifting": true, "max_shift": null}', "max_shift is None"),
    ('{"use_dynamic_shifting": true, "base_image_seq_len": 4096}', "max_image_seq_len is 4096"),
    ('{"use_dynamic_shifting": true, "time_shift_type": "cubic"}', "time_shift_type is 'cubic'"), (None, "has no scheduler")])
def test_a_scheduler_whose_settings_make_none_is_refused_in_one_line(model, options, name, tmp_path):
    file = without_weights(model, tmp_path) / "scheduler" / "scheduler_config.json"
    file.unlink() if options is None else file.write_text(options)
    with pytest.raises(ValueError) as error:
        check_model(str(tmp_path))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_the_scheduler_of_a_model_on_the_hub_is_read_before_its_weights(model, tmp_path, monkeypatch):
    directory = without_weights(model, tmp_path)
    FlowMatchHeunDiscreteScheduler().save_pretrained(directory / "scheduler")
    fetched = []
    monkeypatch.setattr(adapters, "hf_hub_download", lambda repository, name: fetched.append(name) or directory / name)
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler"):
        check_model("someone/something")
    assert fetched == ["model_index.json", "scheduler/scheduler_config.json"]


def test_a_linear_shift_that_a_resolution_makes_negative_is_refused(model, monkeypatch):
    policy = untrained_policy(model)
    monkeypatch.setattr(policy.pipe, "scheduler", FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_image_seq_len=100, base_shift=0.1, max_image_seq_len=200))
    with pytest.raises(ValueError, match="would shift times by -"):
        policy.set_resolution((16, 32))


@pytest.mark.parametrize("resolution", [(20, 32), (16, 36)])
def test_a_resolution_that_flux_cannot_tile_is_refused_with_what_it_takes(flux_model, resolution):
    with pytest.raises(ValueError) as error:
        make_policy(flux_model, resolution=resolution)
    assert str(resolution) in str(error.value) and "multiples of 8" in str(error.value)
    assert make_policy(flux_model, resolution=(8, 4096)).latent_shape == (8, 2, 1024)     # no table of positions ends


def test_flux_has_a_reference_and_a_new_adapter_changes_nothing(flux_model):
    policy, pipe = make_policy(flux_model), load_pipeline(flux_model)
    text, x = policy.encode(PROMPTS), start_noise(policy)
    with torch.no_grad():
        untrained = policy.velocity(text, 3.5, pipe.transformer)(x, SIGMA)
    assert (policy.velocity(text, 3.5)(x, SIGMA) - untrained).abs().max() < 1e-5
    change(policy)
    assert (policy.velocity(text, 3.5)(x, SIGMA) - untrained).abs().max() > 1e-2
    assert (policy.reference_velocity(text, 3.5)(x, SIGMA) - untrained).abs().max() < 1e-5


def test_the_published_targets_of_flux_are_found_by_the_end_of_their_names(flux_model):
    suffixes = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.net.0.proj", "ff_context.net.2")
    policy = make_policy(flux_model, lora_targets=suffixes)
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.") for name, p in policy.network.named_parameters()
               if p.requires_grad}
    expected = {name for name, _ in load_pipeline(flux_model).transformer.named_modules()
                if any(name.endswith("." + suffix) for suffix in suffixes)}
    assert adapted == expected and {name.split("blocks")[0] for name in adapted} == {"transformer_", "single_transformer_"}


# -------------------------------------------------------------------------------------------------------------- memory

@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frozen_weights_are_half_and_adapters_float32_and_a_half_policy_stays_near_float32(each_model, dtype):
    policy, full = make_policy(each_model, dtype), untrained_policy(each_model)
    trained, frozen = set(), set()
    for p in policy.network.parameters():
        (trained if p.requires_grad else frozen).add(p.dtype)
    assert trained == {torch.float32} and frozen == {policy.dtype} == {next(policy.pipe.text_encoder.parameters()).dtype}
    # FLUX rounds time and guidance, times 1000, to the network's dtype: these stay what they are.
    x, sigma, guidance_scale = start_noise(policy), torch.tensor([0.5, 0.25]), 4.0
    velocity = policy.velocity(policy.encode(PROMPTS), guidance_scale)(x, sigma)
    with torch.no_grad():
        expected = full.velocity(full.encode(PROMPTS), guidance_scale)(x, sigma)
    assert velocity.dtype == torch.float32 and 0 < (velocity - expected).norm() < 0.04 * expected.norm()
    velocity.square().mean().backward()
    assert {p.grad.dtype for p in policy.parameters if p.grad is not None} == {torch.float32}


def test_gradient_checkpointing_changes_no_gradient_and_keeps_fewer_activations(each_model):
    def gradient(**settings) -> tuple[torch.Tensor, int]:
        policy = make_policy(each_model, "float64", **settings)
        change(policy)
        text, noise, kept = policy.encode(PROMPTS), start_noise(policy, 8).view(4, 2, *policy.latent_shape), 0
        sigmas = timestep_schedule(3, **policy.schedule_arguments(3), dtype=torch.float64)
        trajectory = rollout(policy.velocity(text, 3.5), noise[0], sigmas, 0.7, noise[1:], num_trained=1)

        def keep(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            log_prob, _, _ = replay(policy.velocity(text, 3.5), trajectory.rows(0))
        assert (log_prob - trajectory.log_probs[0]).abs().max() < 1e-9
        grads = torch.autograd.grad(log_prob.sum(), policy.parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads]), kept

    (plain, much), (checkpointed, little) = gradient(), gradient(gradient_checkpointing=True)
    assert plain.norm() > 0 and (plain - checkpointed).norm() < 1e-9 * plain.norm()
    assert little < 0.5 * much


def test_text_encoders_are_on_the_device_only_while_prompts_are_encoded(each_model, monkeypatch):
    policy, moves = make_policy(each_model, offload_text_encoders=True), []
    encoders = [part for name, part in policy.pipe.components.items() if name.startswith("text_encoder")]
    for i, encoder in enumerate(encoders):          # on a machine where device and host are one, the object tells them apart
        monkeypatch.setattr(encoder, "to", lambda device, i=i: moves.append((i, device is policy.device)))
        encoder.register_forward_hook(lambda *_, i=i: moves.append(f"{i} encodes"))
    policy.cache_text(PROMPTS, 4.5)
    there, back = [(i, True) for i in range(len(encoders))], [(i, False) for i in range(len(encoders))]
    encodes = [f"{i} encodes" for i in range(len(encoders))]
    assert moves == there + encodes * (2 + (policy.branches(4.5) == 2)) + back
    moves.clear()
    policy.cache_text(PROMPTS[::-1], 4.5)
    policy.velocity(policy.encode(PROMPTS), 4.5)
    assert not moves                                                                      # all was known, the empty prompt too
    policy.encode(["another", "more"])
    assert moves == there + encodes * 2 + back
    for found, expected in zip(policy.encode(PROMPTS), untrained_policy(each_model).encode(PROMPTS)):
        assert torch.equal(found, expected)


def test_cached_prompts_stay_until_others_are_announced_however_many_they_are(model, monkeypatch):
    policy, encoded = make_policy(model), []
    size = sum(part.nbytes for part in policy.encode([""]))                               # of one prompt
    policy._text_cache.clear()
    monkeypatch.setattr(policy_module, "TEXT_CACHE", 3 * size)
    encode = policy.family.encode
    monkeypatch.setattr(policy.family, "encode", lambda prompt, *rest: encoded.append(prompt) or encode(prompt, *rest))
    many = [f"prompt {i}" for i in range(6)]
    policy.encode(["one before"])
    policy.cache_text(many, 4.5)
    for _ in range(2):
        for prompt in many:
            policy.velocity(policy.encode([prompt]), 4.5)
    assert encoded == ["one before", *many, ""]
    policy.cache_text(["prompt 4"])                                                       # neither the newest nor the oldest
    for prompt in ("a", "b", "prompt 4"):
        policy.encode([prompt])
    assert encoded[8:] == ["a", "b"] and len(policy._text_cache) == 3


def test_images_are_decoded_in_slices_to_the_same_pixels(each_model, monkeypatch):
    policy, sizes = make_policy(each_model), []
    latents = start_noise(policy, 5)
    policy.pipe.vae.decoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    whole = policy.decode(latents)
    monkeypatch.setattr(policy_module, "DECODE_PIXELS", 2 * 16 * 32 + 1)
    sliced = policy.decode(latents)
    monkeypatch.setattr(policy_module, "DECODE_PIXELS", 1)
    single = policy.decode(latents)
    assert sizes == [5, 2, 2, 1, 1, 1, 1, 1, 1] and whole.shape == (5, 16, 32, 3) and whole.float().std() > 5
    for other in (sliced, single):
        difference = (other.int() - whole.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 1e-3                 # a tie of rounding here and there


# ------------------------------------------------------------------------------------------------------- random weights

@pytest.mark.parametrize("name, count", [("sd35m", 2_243_171_520), ("sd35l", 8_056_627_520), ("flux", 11_901_408_320)])
def test_random_models_have_the_published_number_of_weights(name, count):
    family = check_model(f"random:{name}")
    with torch.device("meta"):
        transformer = diffusers_class(family.transformer)(**family.published[name])
    assert sum(p.numel() for p in transformer.parameters()) == count
    assert FAMILIES[family.pipeline] is family


@pytest.mark.parametrize("family, dtype", [(SD3, "float16"), (FLUX, "bfloat16")])
def test_a_random_model_goes_the_way_of_any_other(family, dtype, monkeypatch):
    small = dict(num_layers=2, num_attention_heads=2, attention_head_dim=16)
    small |= dict(caption_projection_dim=32, qk_norm="rms_norm", dual_attention_layers=(0,)) if family is SD3 else dict(
        num_single_layers=2, axes_dims_rope=(4, 6, 6), guidance_embeds=True)
    monkeypatch.setitem(family.published, "small", small)
    made, init = [], torch.nn.Linear.reset_parameters
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: made.append(self.weight.dtype) or init(self))

    policy = make_policy("random:small", dtype, resolution=(32, 48))
    torch.manual_seed(1)
    again = Policy("random:small", CPU, dtype, resolution=(32, 48), max_sequence_length=TOKENS, lora_rank=4)
    assert made[0] == policy.dtype and set(made) == {policy.dtype, torch.float32}         # the autoencoder's, the adapter's
    assert torch.get_default_dtype() == torch.float32
    assert policy.latent_shape == (16, 4, 6)
    embeds, pooled = policy.encode(["a", "b", "a"])
    assert embeds.shape == (3, TOKENS + 77 * (family is SD3), 4096) and pooled.shape == (3, 2048 if family is SD3 else 768)
    assert torch.equal(embeds[0], embeds[2]) and not torch.equal(embeds[0], embeds[1]) and embeds.dtype == policy.dtype
    assert torch.equal(again.encode(["b"])[0][0], embeds[1])
    x = start_noise(policy)
    velocity = policy.velocity(policy.encode(PROMPTS), 3.5)(x, SIGMA)
    assert velocity.isfinite().all() and velocity.std() > 1e-2
    assert torch.equal(again.velocity(again.encode(PROMPTS), 3.5)(x, SIGMA), velocity)    # whatever the seed of the run
    velocity.square().mean().backward()
    assert sum(p.grad.norm() for p in policy.parameters if p.grad is not None) > 0
    images = policy.decode(x)
    assert images.shape == (2, 32, 48, 3) and images.float().std() > 0


def test_an_unknown_random_model_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="random:sd36.*random:sd35m, random:sd35l, random:flux"):
        check_model("random:sd36")


# ------------------------------------------------------------------------------------------------------------ training

@pytest.mark.slow
def test_flux_trains_on_two_ranks_by_the_command_that_users_run(flux_model, tmp_path):
    root = Path(policy_module.__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", root / "train.py",
               "--model", flux_model, "--output-dir", tmp_path, "--run-name", "flux",
               *("--rewards jpeg_incompressibility 1 --resolution 16 32 --guidance-scale 3.5 --num-steps 3 --window-size 2 "
                 "--window-range 0 3 --groups-per-epoch 1 --group-size 3 --updates-per-epoch 1 --epochs 1 --beta 0.1 "
                 "--eval-prompts 2 --eval-num-steps 2").split()]
    done = subprocess.run(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True,
                          timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, last = map(json.loads, (tmp_path / "flux" / "metrics.jsonl").read_text().splitlines())
    assert last["epoch"] == 1 and last["grad_norm"] > 0 and last["ratio_deviation_before"] < 1e-5
    saved = tmp_path / "flux" / "checkpoints" / "epoch_00001" / "adapter"
    pipe = DiffusionPipeline.from_pretrained(flux_model)
    pipe.load_lora_weights(saved)
    assert any("lora_A" in name for name, _ in pipe.transformer.named_parameters())
