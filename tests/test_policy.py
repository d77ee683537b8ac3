"""The pipeline as a velocity model: what it computes is what diffusers computes; what trains is what should."""

import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel

import adapters
import policy as policy_module
from harness.batches import try_batch
from policy import Policy, check_model
from sampler import rollout, timestep_schedule

CPU = torch.device("cpu")
HEIGHT, WIDTH, TOKENS = 16, 32, 12
PROMPTS = ['the word "lamp"', 'the word "sun"']


def make_policy(model: str, dtype: str = "float32", **settings) -> Policy:
    return Policy(model, CPU, dtype, resolution=(HEIGHT, WIDTH), max_sequence_length=TOKENS, lora_rank=4, lora_alpha=8, **settings)


def start_noise(policy: Policy, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *policy.latent_shape, generator=generator).to(policy.compute_dtype)


def change(policy: Policy, scale: float = 0.1) -> None:
    """What training does: every trained weight becomes another."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters:
            p += scale * torch.randn(p.shape, generator=generator).to(p)


@pytest.fixture(scope="module")
def policy(model) -> Policy:
    """Float32, as loaded; tests leave it so."""
    return make_policy(model)


@pytest.fixture(scope="module")
def pipe(model) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------------------------------- as the pipeline does it

@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("steps", [3, 10])
def test_a_rollout_without_noise_ends_where_the_pipeline_ends(policy, pipe, guidance_scale, steps):
    noise = start_noise(policy, 2)
    expected = pipe(PROMPTS, latents=noise, num_inference_steps=steps, guidance_scale=guidance_scale, height=HEIGHT,
                    width=WIDTH, max_sequence_length=TOKENS, output_type="latent").images
    velocity = policy.velocity(policy.encode(PROMPTS), guidance_scale)
    latents = rollout(velocity, noise, timestep_schedule(steps, **policy.schedule_arguments(steps)), 0.0, None).final
    assert (latents - expected).abs().max() < 1e-5
    assert (latents[0] - latents[1]).std() > 0.1 and (latents - noise).std() > 0.1


def test_pictures_are_uint8_and_those_of_the_pipeline_within_one_level(policy, pipe):
    noise = start_noise(policy, 2)
    expected = pipe(PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=1.0, height=HEIGHT, width=WIDTH,
                    max_sequence_length=TOKENS, output_type="pil").images
    sigmas = timestep_schedule(3, **policy.schedule_arguments(3))
    latents = rollout(policy.velocity(policy.encode(PROMPTS)), noise, sigmas, 0.0, None).final
    images = policy.decode(latents)
    assert images.dtype == torch.uint8 and images.shape == (2, HEIGHT, WIDTH, 3) and images.device == CPU
    difference = np.abs(images.numpy().astype(int) - np.stack(expected).astype(int))
    assert difference.max() <= 1 and difference.mean() < 0.01                              # a tie of rounding here and there
    assert images.float().std() > 5


def test_no_guidance_is_the_conditional_branch_and_guidance_extrapolates_from_the_empty_prompt(policy):
    x, sigma = start_noise(policy, 2), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        conditional, empty = (policy.velocity(policy.encode(p))(x, sigma) for p in (PROMPTS, ["", ""]))
        guided = policy.velocity(policy.encode(PROMPTS), 4.5)(x, sigma)
    assert (guided - (empty + 4.5 * (conditional - empty))).abs().max() < 1e-5
    assert (guided - conditional).abs().max() > 1e-2


def test_guidance_sends_gradients_through_both_branches(model):
    policy, w = make_policy(model, "float64"), 4.5
    change(policy)
    x, sigma = start_noise(policy, 2), torch.tensor([0.9, 0.3], dtype=torch.float64)

    def gradient(prompts, guidance_scale):
        loss = policy.velocity(policy.encode(prompts), guidance_scale)(x, sigma)[:, 0].sum()        # linear in the velocity
        return torch.cat([g.flatten() for g in torch.autograd.grad(
            loss, policy.parameters, allow_unused=True, materialize_grads=True)])

    conditional, unconditional = gradient(PROMPTS, 1.0), gradient(["", ""], 1.0)
    guided = gradient(PROMPTS, w)
    assert (guided - (w * conditional + (1 - w) * unconditional)).norm() < 1e-5 * guided.norm()
    assert (guided - w * conditional).norm() > 1e-2 * guided.norm()


def test_each_distinct_prompt_is_encoded_once(model, monkeypatch):
    policy = make_policy(model)
    encode_prompt, encoded = policy.pipe.encode_prompt, []

    def counted(prompt, *args, **kwargs):
        encoded.append(prompt)
        return encode_prompt(prompt, *args, **kwargs)

    monkeypatch.setattr(policy.pipe, "encode_prompt", counted)
    policy.encode(["a", "b", "a"])
    policy.encode(["c", "b", "c"])
    for _ in range(3):
        policy.velocity(policy.encode(["a", "c"]), 4.5)
    assert encoded == ["a", "b", "c", ""]

    embeds, pooled = policy.encode(["c", "a", "c"])
    assert torch.equal(embeds[0], embeds[2]) and not torch.equal(embeds[0], embeds[1])
    expected, _, expected_pooled, _ = encode_prompt(["c"], ["c"], ["c"], do_classifier_free_guidance=False,
                                                    max_sequence_length=TOKENS)
    assert (embeds[0] - expected[0]).abs().max() < 1e-5 and (pooled[0] - expected_pooled[0]).abs().max() < 1e-5


def test_the_embedding_of_a_prompt_does_not_depend_on_the_prompts_beside_it(model):
    together, alone = make_policy(model).encode(["a", "b", "c", "d", "e"]), make_policy(model).encode(["c"])
    assert torch.equal(together[0][2], alone[0][0]) and torch.equal(together[1][2], alone[1][0])


def test_the_adapter_sits_where_it_is_told_to(model):
    policy = make_policy(model, lora_targets=("attn.to_q", "norm1.linear"))
    adapted = {name.split(".lora_")[0].split("transformer_blocks.")[1].split(".", 1)[1]
               for name, p in policy.network.named_parameters() if p.requires_grad}
    assert adapted == {"attn.to_q", "norm1.linear"}


def test_the_text_cache_forgets_the_oldest_prompts_and_still_answers_for_all(policy, monkeypatch):
    many = [f"prompt {i}" for i in range(5)]
    size = sum(part.nbytes for part in policy.encode(many[:1]))                      # of one prompt, in float32
    monkeypatch.setattr(policy_module, "TEXT_CACHE", 3 * size)
    embeds, _ = policy.encode(many)
    assert len(embeds) == 5 and len(policy._text_cache) == 3
    again, _ = policy.encode(many)
    assert (again - embeds).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------ the reference

@pytest.mark.parametrize("full_finetune", [False, True])
def test_the_reference_is_the_untrained_network_however_the_trained_one_has_changed(model, pipe, full_finetune):
    policy = make_policy(model, full_finetune=full_finetune)
    change(policy)
    text, x, sigma = policy.encode(PROMPTS), start_noise(policy, 2), torch.tensor([0.9, 0.3])
    of_policy, of_reference = policy.velocity(text)(x, sigma), policy.reference_velocity(text)(x, sigma)
    with torch.no_grad():
        untrained = pipe.transformer(x, *text, 1000 * sigma, return_dict=False)[0]
    assert (of_reference - untrained).abs().max() < 1e-5
    assert (of_policy - untrained).abs().max() > 1e-2
    assert of_policy.requires_grad and not of_reference.requires_grad
    assert torch.equal(policy.velocity(text)(x, sigma), of_policy)                   # the adapter is on again


@pytest.mark.parametrize("settings", [{}, {"full_finetune": True}])
def test_drift_is_the_mean_squared_difference_from_the_reference_at_sigma_1(model, settings):
    policy, sigma = make_policy(model, **settings), torch.ones(2)
    text, noise = policy.encode(PROMPTS), start_noise(policy, 2)
    assert policy.drift(text, noise, 4.5).abs().max() < 1e-10                        # before training
    change(policy)
    with torch.no_grad():
        moved = policy.velocity(text, 4.5)(noise, sigma) - policy.reference_velocity(text, 4.5)(noise, sigma)
    drift = policy.drift(text, noise, 4.5)
    assert drift.shape == (2,) and torch.allclose(drift, (moved**2).mean((1, 2, 3)))
    assert drift.min() > 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_finetuning_in_half_precision_starts_with_a_drift_of_exactly_0(model, dtype):
    policy = make_policy(model, dtype, full_finetune=True)
    assert torch.equal(policy.drift(policy.encode(PROMPTS), start_noise(policy, 2), 4.5), torch.zeros(2))


def test_drift_is_nan_where_full_finetuning_keeps_no_reference(model):
    policy = make_policy(model, full_finetune=True, with_reference=False)
    assert policy.drift(policy.encode(PROMPTS), start_noise(policy, 2)).isnan().all()


def test_a_new_adapter_changes_nothing_and_is_all_that_trains(policy, pipe):
    text, x, sigma = policy.encode(PROMPTS), start_noise(policy, 2), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        untrained = pipe.transformer(x, *text, 1000 * sigma, return_dict=False)[0]
        assert (policy.velocity(text)(x, sigma) - untrained).abs().max() < 1e-5
    names = [name for name, p in policy.network.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    for part in (policy.pipe.vae, policy.pipe.text_encoder, policy.pipe.text_encoder_2, policy.pipe.text_encoder_3):
        assert not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("compile", [False, True])
def test_a_compiled_policy_samples_with_gradients_and_drops_them(model, monkeypatch, compile):
    policy = make_policy(model, compile=compile)         # nothing is compiled before the first call of a block
    with_gradients = []

    def velocity(network, x, t, text, guidance_scale):
        with_gradients.append(torch.is_grad_enabled())
        return x * policy.parameters[0].sum()

    monkeypatch.setattr(policy.family, "velocity", velocity)
    text, latents, sigma = policy.encode(PROMPTS), start_noise(policy, 2), torch.ones(2)
    with torch.no_grad():
        assert not policy.velocity(text, 4.5)(latents, sigma).requires_grad
    assert not policy.reference_velocity(text, 4.5)(latents, sigma).requires_grad
    assert policy.velocity(text, 4.5)(latents, sigma).requires_grad
    assert with_gradients == [compile, False, True]


@pytest.mark.slow
def test_the_search_for_batch_sizes_compiles_nothing(model):
    torch._dynamo.reset()                                # forgets what other tests compiled
    policy, frames = make_policy(model, compile=True), torch._dynamo.utils.counters["frames"]
    before = frames.copy()
    assert try_batch(policy, PROMPTS, 4.5, training=False, memory=math.inf) > 0
    assert try_batch(policy, PROMPTS, 4.5, training=True, memory=math.inf) > 0
    assert frames == before


# ------------------------------------------------------------------------------------------------ calls of the network

@pytest.mark.parametrize("full_finetune", [False, True])
def test_before_call_runs_before_each_call_of_the_network_and_may_stop_it(model, full_finetune):
    policy, order = make_policy(model, full_finetune=full_finetune), []
    for network in (policy.pipe.transformer, policy.reference):
        if network is not None:
            network.register_forward_pre_hook(lambda *_: order.append("network"))
    text, x, sigma = policy.encode(PROMPTS), start_noise(policy, 2), torch.tensor([0.9, 0.3])
    guided, untrained = policy.velocity(text, 4.5), policy.reference_velocity(text)
    policy.before_call = lambda: order.append("before")                              # set after the velocities were made
    guided(x, sigma), untrained(x, sigma), guided(x, sigma)
    assert order == ["before", "network"] * 3

    def stop():
        raise KeyError("stop")

    policy.before_call = stop
    for velocity in (guided, untrained):
        with pytest.raises(KeyError):
            velocity(x, sigma)
    assert len(order) == 6
    policy.before_call = lambda: None
    assert guided(x, sigma).isfinite().all() and order[6:] == ["network"]            # the adapter is on again


# -------------------------------------------------------------------------------------------------------------- dtypes

def test_a_float64_policy_computes_in_float64_in_every_part(model):
    policy, seen = make_policy(model, "float64"), {}
    parts = {"transformer": policy.network, **{name: getattr(policy.pipe, name) for name in
             ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")}}
    for name, part in parts.items():
        assert {t.dtype for t in part.parameters()} == {torch.float64}, name
        for module in part.modules():
            if not list(module.children()) and list(module.parameters(recurse=False)):
                module.register_forward_hook(lambda _, __, output, name=name: seen.setdefault(name, set()).add(output.dtype))
    velocity = policy.velocity(policy.encode(PROMPTS), 4.5)
    sigmas = timestep_schedule(2, **policy.schedule_arguments(2), dtype=torch.float64)
    trajectory = rollout(velocity, start_noise(policy, 2), sigmas, 0.7, start_noise(policy, 4).view(2, 2, *policy.latent_shape),
                         num_trained=1)
    policy.decode(trajectory.final)
    assert seen == {name: {torch.float64} for name in parts}
    assert {trajectory.final.dtype, trajectory.latents.dtype, trajectory.log_probs.dtype} == {torch.float64}


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.03), ("float16", 0.004)])
@pytest.mark.parametrize("full_finetune", [False, True])
def test_half_precision_stays_near_float32_and_trains_float32_weights(model, policy, dtype, tolerance, full_finetune):
    half = make_policy(model, dtype, full_finetune=full_finetune)
    x, sigma = start_noise(half, 2), torch.tensor([0.9, 0.3])
    velocity = half.velocity(half.encode(PROMPTS), 4.5)(x, sigma)
    with torch.no_grad():
        expected = policy.velocity(policy.encode(PROMPTS), 4.5)(x, sigma)
    assert 0 < (velocity - expected).norm() < tolerance * expected.norm()
    assert velocity.dtype == torch.float32 and x.dtype == torch.float32
    assert {p.dtype for p in half.parameters} == {torch.float32}
    velocity.square().mean().backward()
    gradients = [p.grad for p in half.parameters if p.grad is not None]
    assert {g.dtype for g in gradients} == {torch.float32} and sum(g.norm() for g in gradients) > 0


# ------------------------------------------------------------------------------------------------- saving, fine-tuning

def test_the_saved_adapter_loads_with_peft_into_the_pipeline_and_draws_the_same(model, pipe, tmp_path):
    policy = make_policy(model)
    change(policy)
    policy.save(tmp_path)
    loaded = PeftModel.from_pretrained(SD3Transformer2DModel.from_pretrained(model, subfolder="transformer"), tmp_path / "adapter")
    text, x, sigma = policy.encode(PROMPTS), start_noise(policy, 2), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        found = loaded(x, *text, 1000 * sigma, return_dict=False)[0]
        assert (found - policy.velocity(text)(x, sigma)).abs().max() < 1e-5
        assert (found - pipe.transformer(x, *text, 1000 * sigma, return_dict=False)[0]).abs().max() > 1e-2
    assert sum(f.stat().st_size for f in tmp_path.rglob("*")) < 0.1 * 4 * sum(p.numel() for p in pipe.transformer.parameters())


def test_full_fine_tuning_trains_every_weight_of_the_transformer_and_saves_one_that_diffusers_loads(model, pipe, tmp_path):
    policy = make_policy(model, full_finetune=True, with_reference=False)
    assert len(policy.parameters) == len(list(pipe.transformer.parameters()))
    assert policy.reference is None
    change(policy)
    policy.save(tmp_path)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    for (name, p), trained, before in zip(loaded.named_parameters(), policy.parameters, pipe.transformer.parameters(), strict=True):
        assert torch.equal(p, trained) and not torch.equal(p, before), name


# ------------------------------------------------------------------------------------------------------ at the door

@pytest.mark.parametrize("resolution", [(20, 32), (16, 36), (16, 4096)])
def test_a_resolution_that_the_model_cannot_tile_is_refused_with_what_it_takes(model, resolution):
    with pytest.raises(ValueError) as error:
        Policy(model, CPU, "float32", resolution=resolution, max_sequence_length=TOKENS)
    assert str(resolution) in str(error.value) and "multiples of 8 up to 128" in str(error.value)


def test_a_target_without_a_layer_is_refused_though_another_has_one(model):
    with pytest.raises(ValueError, match=r"^--lora-targets is .*: .* has no layer attn.to_kk, q; the preset sd35m_ocr names"):
        make_policy(model, lora_targets=("attn.to_q", "attn.to_kk", "q"))


def test_a_model_is_checked_by_its_index_and_scheduler_alone(model, tmp_path, monkeypatch):
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(Path(model) / name, tmp_path / name)
    check_model(str(tmp_path))                                                            # nothing else is looked at
    check_model(model)

    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AuraFlowPipeline"}))
    with pytest.raises(ValueError, match="is a AuraFlowPipeline: only StableDiffusion3Pipeline, FluxPipeline, "):
        check_model(str(tmp_path))
    for missing in (str(tmp_path / "nothing"), "nothing", "./no/thing"):
        with pytest.raises(ValueError) as error:
            check_model(missing)
        assert repr(missing) in str(error.value) and "model_index.json" in str(error.value)

    def offline(*_):
        raise OSError("several\nlines")
    monkeypatch.setattr(adapters, "hf_hub_download", offline)
    with pytest.raises(ValueError) as error:
        check_model("someone/something")
    assert "'someone/something'" in str(error.value) and "\n" not in str(error.value)


def test_loading_a_policy_warns_of_nothing(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_policy(model)
