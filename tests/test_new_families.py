"""The families whose text encoder is a language model, alike: each samples as its pipeline does, and trains."""

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import assert_same_run, completed, metrics_of
from test_families import CPU, SIGMA, change, start_noise
from tiny_models import save_flux2_dev, save_flux2_klein, save_qwen_image, save_z_image

from config import ATTENTION, FLUX2_FEED_FORWARD, PRESETS, QWEN_FEED_FORWARD, Z_IMAGE_LAYERS, Config
from families import FAMILIES, QwenImage, diffusers_class
from harness.card import write_card
from pipelines import compile_blocks
from policy import Policy, check_model
from sampler import replay, rollout, timestep_schedule

LENGTH = 96                                        # tokens of a prompt
PROMPTS = ["a red lamp on a chair beside a wide window", "sun"]
STEPS, GUIDANCE = 4, 3.0


@dataclasses.dataclass
class Model:
    """How a family's small model is made, and how its own pipeline is asked for what the policy draws.

    guidance: scale -> the pipeline's arguments. taken: (pipeline, its latents, ours) -> its latents as ours are.
    """

    save: Callable[[Path], str]
    targets: tuple[str, ...]
    guidance: Callable[[float], dict] = lambda scale: dict(guidance_scale=scale)
    taken: Callable[[DiffusionPipeline, torch.Tensor, torch.Tensor], torch.Tensor] = lambda pipe, x, ours: x


def unpacked(pipe: DiffusionPipeline, tokens: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    height, width = (size * pipe.vae_scale_factor for size in ours.shape[-2:])
    return pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor)[:, :, 0]


MODELS = {
    "z_image": Model(save_z_image, Z_IMAGE_LAYERS, guidance=lambda scale: dict(guidance_scale=scale - 1)),
    "qwen_image": Model(
        save_qwen_image, ATTENTION + QWEN_FEED_FORWARD, taken=unpacked,
        guidance=lambda scale: dict(true_cfg_scale=scale, negative_prompt=[""] * 2 if scale > 1 else None)),
    **{kind: Model(
        save, ATTENTION + FLUX2_FEED_FORWARD,
        taken=lambda pipe, x, ours: x.transpose(1, 2).unflatten(2, ours.shape[-2:]))
        for kind, save in (("flux2_klein", save_flux2_klein), ("flux2_dev", save_flux2_dev))}}


@pytest.fixture(scope="session", params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def directory(name, tmp_path_factory) -> str:
    return MODELS[name].save(tmp_path_factory.mktemp(name))


def make_policy(directory: str, dtype: str = "float32", resolution=(16, 32), length=LENGTH, **settings) -> Policy:
    torch.manual_seed(0)
    return Policy(directory, CPU, dtype, resolution=resolution, max_sequence_length=length, lora_rank=4, lora_alpha=8,
                  **settings)


@functools.cache
def untrained_policy(directory: str, resolution=(16, 32)) -> Policy:
    return make_policy(directory, resolution=resolution)


def fresh_pipeline(directory: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_pipeline(name: str, pipe: DiffusionPipeline, noise: torch.Tensor, resolution, steps: int, scale: float,
                length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's own last latents (B, C, H, W) and its pictures, uint8 (B, height, width, 3).

    It draws its start noise from the seed of `start_noise`.
    """
    model, kept = MODELS[name], []

    def keep(pipe, step, time, tensors):
        kept.append(tensors["latents"])
        return {}

    seed = torch.Generator().manual_seed(0)
    images = pipe(prompt=list(PROMPTS), generator=seed, height=resolution[0], width=resolution[1],
                  num_inference_steps=steps, max_sequence_length=length, output_type="np", callback_on_step_end=keep,
                  **model.guidance(scale)).images
    return model.taken(pipe, kept[-1], noise), torch.from_numpy(np.round(images * 255)).to(torch.uint8)


def by_policy(policy: Policy, noise: torch.Tensor, steps: int, scale: float, prompts=PROMPTS) -> torch.Tensor:
    sigmas = timestep_schedule(steps, **policy.schedule_arguments(steps))
    return rollout(policy.velocity(policy.encode(prompts), scale), noise, sigmas, 0.0, None).final


def assert_same_images(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1 and b.float().std() > 5


# ---- as the pipeline does it ---------------------------------------------------------------------------------

@pytest.mark.parametrize("resolution, steps, scale", [((16, 32), 5, 1.0), ((32, 16), 4, 3.5), ((64, 48), 6, 2.0)])
def test_a_rollout_without_noise_ends_where_the_pipeline_ends(name, directory, resolution, steps, scale):
    policy = untrained_policy(directory, resolution)
    noise = start_noise(policy)
    expected, images = by_pipeline(name, fresh_pipeline(directory), noise, resolution, steps, scale)
    found = by_policy(policy, noise, steps, scale)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5
    assert (found - noise).std() > 0.1
    assert_same_images(policy.decode(found), images)


def test_flux2_dev_is_the_hubs_where_torchvision_is_with_its_processor(tmp_path):
    pytest.importorskip("torchvision", reason="FLUX.2-dev's processor needs it; a tokenizer stands for it in the tests of this file")
    assert type(fresh_pipeline(save_flux2_dev(tmp_path)).tokenizer).__name__ == "PixtralProcessor"


def test_a_prompt_that_is_cut_is_cut_where_the_pipeline_cuts_it(name, directory):
    policy = make_policy(directory, length=48)
    noise = start_noise(policy)
    expected, _ = by_pipeline(name, fresh_pipeline(directory), noise, (16, 32), STEPS, GUIDANCE, length=48)
    assert (by_policy(policy, noise, STEPS, GUIDANCE) - expected).abs().max() < 1e-5
    assert policy.family.has_warned


def test_prompts_of_unequal_length_in_one_batch_equal_themselves_alone(directory):
    policy = untrained_policy(directory)
    noise = start_noise(policy)
    together = by_policy(policy, noise, STEPS, GUIDANCE)
    for k, prompt in enumerate(PROMPTS):
        alone = by_policy(policy, noise[k:k + 1], STEPS, GUIDANCE, [prompt])
        assert (together[k] - alone[0]).abs().max() < 1e-5
    swapped = by_policy(policy, noise, STEPS, GUIDANCE, PROMPTS[::-1])
    assert (swapped - together).abs().max() > 1e-2                                        # prompts matter


def test_every_input_of_the_network_matters(directory):
    policy = untrained_policy(directory)
    x, text = start_noise(policy), policy.encode(PROMPTS)
    with torch.no_grad():
        v = policy.velocity(text)(x, SIGMA)
        others = [policy.velocity(text)(x, SIGMA + 0.05), policy.velocity(policy.encode(PROMPTS[::-1]))(x, SIGMA),
                  policy.velocity(text, 3.5)(x, SIGMA), policy.velocity(text)(x.roll(2, -1), SIGMA).roll(-2, -1)]
    assert all((other - v).abs().max() > 1e-3 for other in others)


# ---- training ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replay_of_the_batch_that_was_sampled_has_a_ratio_of_exactly_1(name, directory, dtype):
    policy = make_policy(directory, dtype, lora_targets=MODELS[name].targets)
    change(policy, 0.02)
    text, noise = policy.encode(PROMPTS), start_noise(policy, 2 * (STEPS + 1)).view(STEPS + 1, 2, *policy.latent_shape)
    sigmas = timestep_schedule(STEPS, **policy.schedule_arguments(STEPS))
    velocity = policy.velocity(text, GUIDANCE)
    trajectory = rollout(velocity, noise[0], sigmas, 0.7, noise[1:], num_trained=STEPS - 1)
    for k in range(STEPS - 1):
        log_prob, _, _ = replay(velocity, trajectory.rows(k))
        assert torch.equal(log_prob.exp() / trajectory.log_probs[k].exp(), torch.ones(2))
        log_prob.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters if p.grad is not None)
    assert sum(p.grad.norm() > 0 for p in policy.parameters if p.grad is not None) > 4


def test_gradient_checkpointing_changes_no_velocity_and_no_gradient(name, directory):
    plain = make_policy(directory, lora_targets=MODELS[name].targets)
    kept = make_policy(directory, lora_targets=MODELS[name].targets, gradient_checkpointing=True)
    x, text = start_noise(plain), plain.encode(PROMPTS)
    for policy in (plain, kept):
        change(policy)
    expected, found = (policy.velocity(text, GUIDANCE)(x, SIGMA) for policy in (plain, kept))
    assert (found - expected).abs().max() < 1e-5
    gradients = [torch.autograd.grad(v.square().sum(), policy.parameters, allow_unused=True, materialize_grads=True)
                 for policy, v in ((plain, expected), (kept, found))]
    assert all((a - b).abs().max() <= 1e-4 * a.abs().max() for a, b in zip(*gradients))


def test_the_pipeline_draws_with_a_saved_adapter_what_the_policy_draws(name, directory, tmp_path):
    policy = make_policy(directory, lora_targets=MODELS[name].targets)
    change(policy)
    policy.save(tmp_path)
    noise = start_noise(policy)
    own = by_policy(policy, noise, STEPS, GUIDANCE)
    assert (own - by_policy(untrained_policy(directory), noise, STEPS, GUIDANCE)).abs().max() > 1e-2
    pipe = fresh_pipeline(directory)
    pipe.load_lora_weights(tmp_path / "adapter")
    latents, images = by_pipeline(name, pipe, noise, (16, 32), STEPS, GUIDANCE)
    assert (latents - own).abs().max() < 1e-5
    assert_same_images(policy.decode(own), images)
    again = make_policy(directory, lora_path=str(tmp_path))
    assert (by_policy(again, noise, STEPS, GUIDANCE) - own).abs().max() < 1e-5


def test_every_block_is_compiled_by_itself(directory):
    transformer = fresh_pipeline(directory).transformer
    compile_blocks(transformer)
    blocks = [block for part in transformer.children() if isinstance(part, torch.nn.ModuleList) for block in part]
    compiled = [module for module in transformer.modules() if module._compiled_call_impl]
    assert blocks and set(compiled) == set(blocks)


def test_the_model_card_asks_the_pipeline_for_the_guidance_of_training(name, directory, tmp_path):
    (tmp_path / "adapter").mkdir()
    config = dataclasses.replace(Config(), model=directory, guidance_scale=3.0)
    write_card(tmp_path / "adapter", tmp_path, config, type(fresh_pipeline(directory)).__name__, command="", license={},
               history=[], epoch=1)
    call, = re.findall(r"image = (pipe\(.*\))\.images", (tmp_path / "adapter" / "README.md").read_text())
    asked = eval(call, {"pipe": lambda prompt, **arguments: arguments})
    expected = MODELS[name].guidance(3.0)
    assert {key: asked[key] for key in expected if "scale" in key} == {
        key: value for key, value in expected.items() if "scale" in key}
    assert ("negative_prompt" in asked) == ("negative_prompt" in expected)


@pytest.fixture(scope="module")
def run_of(name, directory, command) -> Callable[..., Path]:
    """`run_of(run_name, ranks, **changes)`: a run of two epochs by the real command, in float64; its directory."""
    settings = dict(
        model=directory, lora_targets=MODELS[name].targets, max_sequence_length=LENGTH, groups_per_epoch=1, num_steps=3,
        window_size=2, window_range=(0, 3), eval_prompts=2, eval_images=2, updates_per_epoch=1, epochs=2)
    return lambda run_name, ranks, **changes: completed(command(f"{run_name}_{name}", ranks, **{**settings, **changes}))


@pytest.fixture(scope="module")
def on_two_ranks(run_of) -> Path:
    return run_of("whole", 2)


def test_a_run_on_two_ranks_that_is_resumed_is_the_run_that_was_not(run_of, on_two_ranks):
    run_of("halves", 2, epochs=1)
    resumed = run_of("halves", 2)
    assert_same_run(on_two_ranks, resumed)
    *_, last = metrics_of(resumed)
    assert last["epoch"] == 2 and last["grad_norm"] > 0 and last["ratio_deviation_before"] < 1e-5


def test_three_ranks_with_other_micro_batches_do_what_two_do(run_of, on_two_ranks):
    assert_same_run(on_two_ranks, run_of("three", 3, rollout_batch=2, train_batch=1))


# ---- published sizes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("random_name, count", [
    ("qwen_image", 20_430_401_088), ("flux2_klein_4b", 3_875_544_576), ("flux2_klein_9b", 9_078_581_248),
    ("flux2_dev", 32_223_281_152), ("z_image", 6_154_908_736)])
def test_random_models_have_the_published_number_of_weights(random_name, count):
    family = check_model(f"random:{random_name}")
    with torch.device("meta"):
        transformer = diffusers_class(family.transformer)(**family.published[random_name])
    assert sum(p.numel() for p in transformer.parameters()) == count
    targets = PRESETS[family.preset].lora_targets
    names = [n for n, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert all(any(n.endswith("." + target) for n in names) for target in targets)


# ---- bad input -----------------------------------------------------------------------------------------------

def in_one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_family_that_the_installed_diffusers_lacks_names_the_version(tmp_path, monkeypatch):
    class Future(QwenImage):
        pipeline = "QwenImage9Pipeline"

    monkeypatch.setitem(FAMILIES, Future.pipeline, Future)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": Future.pipeline}))
    with pytest.raises(ValueError) as error:
        check_model(str(tmp_path))
    in_one_line(error, "QwenImage9Pipeline", "pip install diffusers==")


@pytest.mark.skipif(bool(importlib.util.find_spec("torchvision")), reason="torchvision is installed")
def test_flux2_devs_processor_names_the_package_that_it_needs(tmp_path):
    directory = save_flux2_dev(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "PixtralProcessor"]}))
    with pytest.raises(ValueError) as error:
        check_model(directory)
    in_one_line(error, "PixtralProcessor", "pip install torchvision")


def test_an_unknown_pipeline_names_those_that_are_supported(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(ValueError) as error:
        check_model(str(tmp_path))
    in_one_line(error, "SanaPipeline", *FAMILIES)


@pytest.mark.parametrize("save, words", [(save_flux2_klein, {"is_distilled": True}), (save_z_image, {})])
def test_guidance_of_a_distilled_model_is_refused_before_it_loads(tmp_path, save, words):
    directory = save(tmp_path / "Z-Image-Turbo", **words)
    for weights in tmp_path.glob("*/*/*.safetensors"):
        weights.unlink()
    check_model(directory)
    check_model(directory, 1.0)
    with pytest.raises(ValueError) as error:
        check_model(directory, 4.0)
    in_one_line(error, "--guidance-scale is 4", "distilled", "set it to 1")


def test_targets_of_another_family_are_refused_with_the_preset_of_ones_own(directory):
    with pytest.raises(ValueError) as error:
        make_policy(directory, lora_targets=("attn.to_query",))
    in_one_line(error, "attn.to_query", check_model(directory).preset)


def test_a_resolution_that_does_not_fit_says_what_does(directory):
    with pytest.raises(ValueError) as error:
        make_policy(directory, resolution=(16, 36))
    in_one_line(error, "(16, 36)", "multiples of 8")


def test_a_prompt_that_is_too_long_is_one_warning_with_both_lengths(directory, capsys):
    policy = make_policy(directory, length=40)
    policy.encode(["short"])
    assert not capsys.readouterr().err
    policy.encode(["x" * 60, "y" * 61])
    policy.encode(["z" * 62])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and "--max-sequence-length is 40" in said[0] and "x" * 60 in said[0]
    tokens = int(said[0].partition(" has ")[2].split()[0])
    assert 60 < tokens < 90
