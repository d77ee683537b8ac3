"""Adapters come and go in the formats that people use, and what does not fit is refused in one line."""

import copy
import json
import shutil
import socket
import warnings
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError
from peft import EvaConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_families import PROMPTS, SIGMA, change, load_pipeline, make_policy, pipeline_latents, policy_latents, start_noise

import adapters
from adapters import read_adapter
from policy import Policy, check_model

ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
             "attn.to_add_out"]
STEPS, GUIDANCE = 3, 2.0
RESPONSE = SimpleNamespace(headers={}, request=None)      # what the hub's errors want to know of an answer


def velocity_of(policy, network, text):
    """The velocity of another network in the policy's place."""
    other = copy.copy(policy)
    other.network = network
    return other.velocity(text)


def fresh_pipeline(model: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def of_pipeline(pipe: DiffusionPipeline, noise: torch.Tensor) -> torch.Tensor:
    return pipeline_latents(pipe, noise, (16, 32), num_inference_steps=STEPS, guidance_scale=GUIDANCE)


def written_by_peft(model: str, directory: Path, config=None) -> PeftModel:
    """An adapter as the published trainer leaves it: peft's own save, with alpha twice the rank; weights that do something."""
    network = get_peft_model(fresh_pipeline(model).transformer, config or LoraConfig(
        r=3, lora_alpha=6, init_lora_weights="gaussian", target_modules=ATTENTION))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_B" in name:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    network.save_pretrained(directory)
    return network


def adapted(model: str, lora_path, dtype: str = "float32", **settings) -> Policy:
    return make_policy(model, dtype, lora_path=str(lora_path), **settings)


# --------------------------------------------------------------------------------------------------------------- saving

def test_one_directory_is_loaded_by_peft_and_by_diffusers_and_both_draw_what_the_policy_draws(each_model, tmp_path, caplog):
    policy = make_policy(each_model)
    change(policy, 0.03)
    policy.save(tmp_path)
    noise = start_noise(policy)
    own, untrained = policy_latents(policy, noise, STEPS, GUIDANCE), of_pipeline(load_pipeline(each_model), noise)
    assert (own - untrained).abs().max() > 1e-2

    by_peft, by_diffusers = fresh_pipeline(each_model), fresh_pipeline(each_model)
    by_peft.transformer = PeftModel.from_pretrained(by_peft.transformer, tmp_path / "adapter")
    by_diffusers.load_lora_weights(tmp_path / "adapter")
    for pipe in (by_peft, by_diffusers):
        assert (of_pipeline(pipe, noise) - own).abs().max() < 1e-5
    assert "weights file" not in caplog.text                                              # it is clear which file is whose
    images = policy.decode(own)
    latents = of_pipeline(by_diffusers, noise)
    assert (policy.decode(latents).int() - images.int()).abs().max() <= 1


def test_a_saved_adapter_names_its_model_and_weighs_what_an_adapter_weighs(each_model, tmp_path):
    policy = make_policy(each_model)
    policy.save(tmp_path)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == each_model and (settings["r"], settings["lora_alpha"]) == (4, 8)
    weights = sum(4 * p.numel() for p in policy.parameters)
    files = {f.name: f.stat().st_size for f in (tmp_path / "adapter").iterdir()}
    headers = 2 * 200 * len(policy.parameters)                                            # of names, in both formats
    assert sum(files.values()) < 2 * weights + headers + 20_000                           # settings and a card
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == {
        name.replace(".default", "") for name, p in policy.network.named_parameters() if p.requires_grad}


def test_saving_and_loading_ask_no_hub(model, tmp_path, monkeypatch):
    policy = make_policy(model)
    policy.network.peft_config["default"].base_model_name_or_path = "someone/something"
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args) or [])
    policy.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(model, tmp_path)
    assert not asked


# -------------------------------------------------------------------------------------------------------------- loading

def test_an_adapter_in_the_published_layout_loads_and_training_goes_on_from_it(each_model, tmp_path):
    network = written_by_peft(each_model, tmp_path)
    policy = adapted(each_model, tmp_path)
    text, x = policy.encode(PROMPTS), start_noise(policy)
    with torch.no_grad():
        expected = velocity_of(policy, network, text)(x, SIGMA)
        untrained = velocity_of(policy, load_pipeline(each_model).transformer, text)(x, SIGMA)
    before = policy.velocity(text)(x, SIGMA)
    assert (before - expected).abs().max() < 1e-5 and (before - untrained).abs().max() > 1e-3
    assert len(policy.parameters) == sum("lora_" in name for name, _ in network.named_parameters())
    assert {min(p.shape) for p in policy.parameters} == {3}                               # its own rank, not the policy's 4

    optimizer = torch.optim.SGD(policy.parameters, lr=1e-3)
    before.square().mean().backward()
    optimizer.step()
    after = policy.velocity(text)(x, SIGMA)
    assert after.square().mean() < before.square().mean()
    assert (policy.reference_velocity(text)(x, SIGMA) - untrained).abs().max() < 1e-5     # the model without any adapter
    policy.save(tmp_path / "on")
    pipe = fresh_pipeline(each_model)
    pipe.load_lora_weights(tmp_path / "on" / "adapter")
    with torch.no_grad():
        assert (velocity_of(policy, pipe.transformer, text)(x, SIGMA) - after).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_loaded_adapter_is_trained_in_full_precision_and_without_its_dropout(model, tmp_path, dtype):
    written_by_peft(model, tmp_path, LoraConfig(r=3, lora_alpha=6, lora_dropout=0.5, target_modules=ATTENTION))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: value.bfloat16() for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    policy = adapted(model, tmp_path, dtype)
    assert {p.dtype for p in policy.parameters} == {policy.compute_dtype}
    assert torch.equal(policy.parameters[0].to(torch.bfloat16), next(iter(
        tensors[name.replace(".default", "")].bfloat16() for name, p in policy.network.named_parameters() if p.requires_grad)))
    text, x = policy.encode(PROMPTS), start_noise(policy)
    assert torch.equal(policy.velocity(text)(x, SIGMA), policy.velocity(text)(x, SIGMA))


@pytest.mark.slow
def test_checkpoints_and_diffusers_files_load_as_adapters(each_model, tmp_path):
    policy = make_policy(each_model)
    change(policy)
    policy.save(tmp_path)
    weights = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(weights, alone)
    text, x = policy.encode(PROMPTS), start_noise(policy)
    with torch.no_grad():
        expected = policy.velocity(text)(x, SIGMA)
        for path in (tmp_path, tmp_path / "adapter", alone, weights):
            assert (adapted(each_model, path).velocity(text)(x, SIGMA) - expected).abs().max() < 1e-5, path

        save_file(load_file(weights), alone / weights.name)                               # without its settings
        pipe = fresh_pipeline(each_model)
        pipe.load_lora_weights(alone)
        found = adapted(each_model, alone).velocity(text)(x, SIGMA)
        assert (found - velocity_of(policy, pipe.transformer, text)(x, SIGMA)).abs().max() < 1e-5
        assert (found - expected).abs().max() > 1e-3                                      # where alpha is taken for the rank


UNSTATED = {                           # settings that a diffusers file without metadata shows in its tensors alone
    "ranks": (dict(rank_pattern={"0.attn.to_q": 5, "1.attn.to_k": 2}, target_modules=["to_q", "to_k"]), {}),
    "dora": (dict(use_dora=True), {}),
    "bias of B": (dict(lora_bias=True), {}),
    "one alpha": ({}, {"": 1.5}),
    "alphas": (dict(rank_pattern={"0.attn.to_q": 5}), {"": 6.0, "0.attn.to_q": 2.0}),
    "alphas of some": (dict(rank_pattern={"0.attn.to_q": 5}), {"1.attn.to_v": 1.0}),
    "one name in another": (dict(target_modules=r"proj_out|single_transformer_blocks\.0\.proj_out",
                                 rank_pattern={"^proj_out": 2}), {}),
    "the top alone": (dict(target_modules="proj_out"), {}),
}


@pytest.mark.parametrize("settings, alphas", UNSTATED.values(), ids=UNSTATED)
def test_a_diffusers_file_without_settings_means_what_diffusers_takes_it_for(flux_model, tmp_path, settings, alphas):
    """FLUX, whose loader alone reads alphas in diffusers."""
    written_by_peft(flux_model, tmp_path / "peft", LoraConfig(**{"r": 3, "target_modules": ATTENTION_SHORT, **settings}))
    tensors = {key.replace("base_model.model.", "transformer."): value
               for key, value in load_file(tmp_path / "peft" / "adapter_model.safetensors").items()}
    layers = {key.partition(".lora_")[0] for key in tensors}
    for end, alpha in alphas.items():
        tensors |= {f"{layer}.alpha": torch.tensor(alpha) for layer in layers if layer.endswith(end)}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    pipe = fresh_pipeline(flux_model)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    policy = adapted(flux_model, tmp_path / "pytorch_lora_weights.safetensors")
    text, x = policy.encode(PROMPTS), start_noise(policy)
    with torch.no_grad():
        expected, untrained = (velocity_of(policy, network, text)(x, SIGMA)
                               for network in (pipe.transformer, load_pipeline(flux_model).transformer))
        assert (policy.velocity(text)(x, SIGMA) - expected).abs().max() < 1e-5
        assert (expected - untrained).abs().max() > 1e-3
        policy.save(tmp_path / "on")
        again = adapted(flux_model, tmp_path / "on")
        assert (again.velocity(text)(x, SIGMA) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("below", ["lora", "adapter"])
def test_a_checkpoint_of_the_authors_layout_is_an_adapter(model, tmp_path, below):
    written_by_peft(model, tmp_path / "checkpoint-60" / below)
    found = adapted(model, tmp_path / "checkpoint-60")
    for p, expected in zip(found.parameters, adapted(model, tmp_path / "checkpoint-60" / below).parameters, strict=True):
        assert torch.equal(p, expected)
    message = refusal(read_adapter, str(tmp_path))                                        # two levels: several may lie there
    assert message.endswith(f"give {tmp_path / 'checkpoint-60' / below}")


def test_an_adapter_comes_from_the_hub_by_its_id_in_either_format(model, tmp_path, monkeypatch):
    written_by_peft(model, tmp_path / "peft")
    policy = adapted(model, tmp_path / "peft")
    policy.save(tmp_path)
    (tmp_path / "diffusers").mkdir()
    shutil.copy(tmp_path / "adapter" / "pytorch_lora_weights.safetensors", tmp_path / "diffusers")

    def download(repository, name):
        assert repository in ("someone/peft", "someone/diffusers", "someone/authors")
        path = tmp_path / repository.partition("/")[2] / name
        if not path.exists():
            raise RemoteEntryNotFoundError("404", response=RESPONSE)
        return str(path)

    monkeypatch.setattr(adapters, "hf_hub_download", download)
    shutil.copytree(tmp_path / "peft", tmp_path / "authors" / "lora")
    for name in ("someone/peft", "someone/diffusers", "someone/authors"):
        for found, expected in zip(adapted(model, name).parameters, policy.parameters, strict=True):
            assert torch.equal(found, expected)


ATTENTION_SHORT = ["attn.to_q", "attn.to_v"]
KEPT = {                               # settings of LoraConfig
    "patterns": dict(rank_pattern={"0.attn.to_q": 5}, alpha_pattern={"1.attn.to_v": 1}),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "bias of B": dict(lora_bias=True),
    "expression": dict(target_modules=r".*transformer_blocks\.\d\.attn\.to_q"),
    "exclusion": dict(exclude_modules=["attn.to_v"]),
    "dropout": dict(lora_dropout=0.3),
    "orthogonal start": dict(r=4, init_lora_weights="orthogonal"),
    "eva start": dict(init_lora_weights="eva", eva_config=EvaConfig()),
    "bare start": dict(init_lora_weights=False),
    "a language model's": dict(task_type="CAUSAL_LM", fan_in_fan_out=True, lora_dropout=0.1, use_rslora=True, use_dora=True,
                               rank_pattern={"to_q": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", KEPT.values(), ids=KEPT)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_an_adapter_trains_and_is_saved_exactly_under_every_setting_that_is_taken(model, tmp_path, settings):
    train_and_save_exactly(model, tmp_path, settings)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_an_adapter_of_flux_with_several_settings_at_once_trains_and_is_saved_exactly(flux_model, tmp_path):
    train_and_save_exactly(flux_model, tmp_path, KEPT["a language model's"])


def train_and_save_exactly(model: str, tmp_path: Path, settings: dict) -> None:
    base = load_pipeline(model).transformer
    network = written_by_peft(model, tmp_path, LoraConfig(**{
        "r": 3, "lora_alpha": 6, "target_modules": ATTENTION_SHORT, **settings, "task_type": None})).eval()
    edit_settings(tmp_path, **{name: value for name, value in settings.items() if name in ("task_type", "fan_in_fan_out")})
    policy = adapted(model, tmp_path)
    text, x = policy.encode(PROMPTS), start_noise(policy)

    def velocity(network) -> torch.Tensor:
        with torch.no_grad():
            return velocity_of(policy, network, text)(x, SIGMA)

    untrained = velocity(base)
    assert (velocity(policy.network) - velocity(network)).abs().max() < 1e-5
    assert (velocity(network) - untrained).abs().max() > 1e-3
    change(policy, 0.03)
    trained = velocity(policy.network)
    assert (trained - velocity(network)).abs().max() > 1e-3
    assert (policy.reference_velocity(text)(x, SIGMA) - untrained).abs().max() < 1e-5     # the model, not what a start made of it
    policy.save(tmp_path / "on")
    policy.use_adapter("default", 1.0)                                                    # the scale that every layer has of its own
    assert torch.equal(velocity(policy.network), trained)

    by_peft, by_diffusers = fresh_pipeline(model), fresh_pipeline(model)
    by_peft.transformer = PeftModel.from_pretrained(by_peft.transformer, tmp_path / "on" / "adapter").train()
    by_diffusers.load_lora_weights(tmp_path / "on" / "adapter")
    by_diffusers.transformer.train()                                                      # nothing that was saved is random
    for pipe in (by_peft, by_diffusers):
        assert (velocity(pipe.transformer) - trained).abs().max() < 1e-5
    again = adapted(model, tmp_path / "on")
    assert (velocity(again.network) - trained).abs().max() < 1e-5
    fresh = make_policy(model)
    fresh.add_adapter("other", str(tmp_path / "on"))                                      # as the demo does
    fresh.use_adapter("other")
    assert (velocity(fresh.network) - trained).abs().max() < 1e-5


def edit_settings(directory: Path, **changes) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ------------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("settings", [
    dict(init_lora_weights="pissa"), dict(init_lora_weights="pissa_niter_4"), dict(init_lora_weights="olora"),
    dict(modules_to_save=["proj_out"]), dict(bias="all"), dict(bias="lora_only"),
    dict(target_modules=["attn.to_q"], trainable_token_indices={"proj_out": [0]})], ids=str)
def test_an_adapter_that_changes_the_model_itself_is_refused_before_the_model_loads(model, tmp_path, settings):
    settings = {"r": 3, "target_modules": ATTENTION_SHORT, **settings}
    name, value = list(settings.items())[-1]
    if name == "trainable_token_indices":                   # made for embeddings of words: written by hand
        settings.pop(name)
    written_by_peft(model, tmp_path, LoraConfig(**settings))
    edit_settings(tmp_path, **{name: value})
    message = refusal(read_adapter, str(tmp_path))
    assert f"{name} is {value!r}" in message and str(tmp_path) in message and ("--model" in message or "of the model" in message)


@pytest.mark.parametrize("name, value", [
    ("init_lora_weights", "loftq"), ("init_lora_weights", "corda"), ("init_lora_weights", "lora_ga"), ("init_lora_weights", "mica"),
    ("init_lora_weights", "of next year"), ("layers_to_transform", [1]), ("layer_replication", [[0, 2], [1, 2]]), ("target_parameters", ["pos_embed"]),
    ("megatron_config", {"a": 1}), ("alora_invocation_tokens", [1]), ("use_qalora", True), ("kasa_config", {"a": 1}),
    ("monteclora_config", {"a": 1}), ("velora_config", {"a": 1}), ("arrow_config", {"a": 1}), ("use_bdlora", {"a": 1}),
    ("ensure_weight_tying", True), ("use_what_comes_next", True), ("next_config", {"a": 1})])
def test_a_setting_that_training_could_not_keep_is_refused_by_name(model, tmp_path, name, value):
    LoraConfig(target_modules=["attn.to_q"]).save_pretrained(tmp_path)
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(8, 8)}, tmp_path / "adapter_model.safetensors")
    read_adapter(str(tmp_path))
    edit_settings(tmp_path, **{name: value})
    assert f"{name} is {value!r}" in refusal(read_adapter, str(tmp_path))


def test_details_of_settings_that_are_off_are_no_reason_to_refuse(tmp_path):
    """A newer peft writes settings that this one does not know; a number or a name alone turns nothing on."""
    LoraConfig(target_modules=["attn.to_q"]).save_pretrained(tmp_path)
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(8, 8)}, tmp_path / "adapter_model.safetensors")
    edit_settings(tmp_path, group_size_of_next_year=16, core_of_next_year="some.module", use_next_year=False, next_config=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_adapter(str(tmp_path))


def test_every_setting_of_peft_is_kept_dropped_or_refused_and_a_new_one_is_looked_at():
    unlisted = {field.name for field in fields(LoraConfig)} - adapters.EXACT_SETTINGS - adapters.DROPPED_SETTINGS
    assert unlisted == {"bias", "modules_to_save", "megatron_config", "megatron_core", "trainable_token_indices", "velora_config",
                        "alora_invocation_tokens", "use_qalora", "qalora_group_size", "layers_to_transform", "layers_pattern", "monteclora_config", "layer_replication",
                        "runtime_config", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying"}


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    return message


def test_an_adapter_of_another_architecture_is_refused_with_the_first_tensor_that_has_no_place(model, flux_model, tmp_path):
    everything = LoraConfig(r=3, target_modules=["attn.to_q", "proj_mlp"])
    network = written_by_peft(flux_model, tmp_path, everything)
    first = next(iter(load_file(tmp_path / "adapter_model.safetensors")))
    message = refusal(adapted, model, tmp_path)
    assert str(tmp_path) in message and model in message and "the model has no such layer" in message
    assert first in message and str(tuple(network.state_dict()[first.replace(".weight", ".default.weight")].shape)) in message


@pytest.mark.parametrize("fault", ["missing", "rank", "width", "stranger"])
def test_an_adapter_whose_tensors_do_not_fit_is_refused_with_the_first_of_them(model, tmp_path, fault):
    written_by_peft(model, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = "base_model.model.transformer_blocks.1.attn.to_k.lora_A.weight"
    if fault == "missing":
        del tensors[key]
        expected = f"{key} is missing, the model needs (3, 128)"
    elif fault == "stranger":
        key = "base_model.model.transformer_blocks.1.ff.net.2.lora_A.weight"
        tensors[key] = torch.zeros(3, 512)
        expected = f"{key} has shape (3, 512), but its own settings do not name that layer"
    else:
        tensors[key] = torch.zeros(5, 128) if fault == "rank" else torch.zeros(3, 96)
        expected = f"{key} has shape {tuple(tensors[key].shape)}, the model needs (3, 128)"
    save_file(tensors, weights)
    message = refusal(adapted, model, tmp_path)
    assert expected in message and model in message and str(tmp_path) in message


@pytest.mark.parametrize("rename, cause", [
    (lambda key: "module." + key, "take 'module.' out"),
    (lambda key: key.replace("base_model.model.", "base_model.model.module."), "take 'module.' out"),
    (lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."), "take '_orig_mod.' out"),
    (lambda key: key.replace(".attn.", "._orig_mod.attn."), "take '_orig_mod.' out"),
    (lambda key: key.replace("base_model.model.", "base_model.model.transformer."), "take 'transformer.' out"),
    (lambda key: key.replace("base_model.model.", "diffusion_model."), "take 'diffusion_model.' out"),
    (lambda key: "base_model.model.proj_out.weight" if "0.attn.to_q.lora_A" in key else key, "modules_to_save"),
    (lambda key: key.replace("base_model.model.", "text_encoder."), "of a text encoder")])
def test_an_adapter_under_other_names_is_refused_with_the_cause(model, tmp_path, rename, cause):
    written_by_peft(model, tmp_path, LoraConfig(r=3, target_modules=ATTENTION_SHORT))
    weights = tmp_path / "adapter_model.safetensors"
    save_file({rename(key): value for key, value in load_file(weights).items()}, weights)
    message = refusal(adapted, model, tmp_path)
    assert cause in message and "give the model" not in message


@pytest.mark.parametrize("key, cause", [
    ("base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight", "put its adapter_config.json beside it"),
    ("transformer.transformer_blocks.0.attn.to_q.hada_w1_a", "of an unknown format"),
    ("transformer.proj_out.weight", "modules_to_save"),
    ("transformer.transformer_blocks.0.attn.to_q.lora_B.weight", "no lora_A"),
    ("text_encoder.text_model.q_proj.lora_A.weight", "of a text encoder")])
def test_a_file_that_diffusers_would_not_take_as_it_is_is_refused_with_the_cause(tmp_path, key, cause):
    weights = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({key: torch.zeros(2, 2)}, weights)
    message = refusal(read_adapter, str(weights))
    assert cause in message and (key in message or "no lora_A" in cause)


def test_what_holds_no_adapter_of_ours_is_refused(model, tmp_path):
    assert "does not exist" in refusal(read_adapter, str(tmp_path / "nothing"))
    assert "does not exist" in refusal(adapted, model, "nothing")
    assert "holds no adapter" in refusal(read_adapter, model)
    torch.save({}, tmp_path / "adapter_model.bin")                                        # could run code: never opened
    (tmp_path / "adapter_config.json").write_text("{}")
    message = refusal(adapted, model, tmp_path)
    assert "adapter_model.safetensors" in message and "pytorch_lora_weights.safetensors" in message
    get_peft_model(fresh_pipeline(model).transformer, LoHaConfig(target_modules=["to_q"])).save_pretrained(tmp_path / "loha")
    assert "LOHA" in refusal(adapted, model, tmp_path / "loha")
    (tmp_path / "text").mkdir()
    save_file({"text_encoder.layer.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "text" / "pytorch_lora_weights.safetensors")
    assert "text_encoder.layer.lora_A.weight" in refusal(adapted, model, tmp_path / "text")
    (tmp_path / "empty").mkdir()
    save_file({}, tmp_path / "empty" / "pytorch_lora_weights.safetensors")
    assert "no tensors" in refusal(adapted, model, tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_lora_weights.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert "no whole safetensors file" in refusal(adapted, model, tmp_path / "empty")


def test_a_run_in_place_of_an_adapter_is_told_its_last_whole_checkpoint(model, tmp_path):
    for name in ("epoch_00009", "epoch_00012", "epoch_00010", "epoch_00015.corrupt", "partial"):
        (tmp_path / "checkpoints" / name / "adapter").mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "adapter" / "adapter_model.safetensors").touch()
    message = refusal(read_adapter, str(tmp_path))
    assert f"give {tmp_path / 'checkpoints/epoch_00012/adapter'}" in message


@pytest.mark.parametrize("edit", [
    lambda c: c.pop("target_modules"), lambda c: c.clear(), lambda c: c.update(peft_type="FOO"), lambda c: c.update(r="four"),
    lambda c: c.update(r=0), lambda c: c.update(target_modules=["no.such.layer"]), lambda c: c.update(unknown_field=1, r=-1), None])
def test_an_adapter_whose_settings_make_none_is_refused_in_one_line(model, tmp_path, edit):
    written_by_peft(model, tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(settings.read_text())
    if edit:
        edit(config)
    settings.write_text(json.dumps(config) if edit else "{not json")
    with pytest.raises(ValueError) as error:
        adapted(model, tmp_path)
    assert str(error.value).startswith(f"--lora-path {str(tmp_path)!r}") and "\n" not in str(error.value)


def test_an_adapter_that_holds_a_nan_is_refused_with_the_tensor(model, tmp_path):
    written_by_peft(model, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = sorted(tensors)[3]
    tensors[key] = tensors[key] * float("nan")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=f"{key} has shape .* not finite"):
        adapted(model, weights)


@pytest.mark.parametrize("content", ["[]", "{not json", "{}"])
def test_a_pipeline_without_a_readable_index_is_refused_with_the_file(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match="model_index.json does not name its class"):
        check_model(str(tmp_path))


@pytest.mark.parametrize("look, option", [(check_model, "--model"), (read_adapter, "--lora-path")])
@pytest.mark.parametrize("error, hint", [
    (GatedRepoError("401\nlong", response=RESPONSE), "is gated: accept its licence"),
    (RepositoryNotFoundError("401\nlong", response=RESPONSE), "neither here nor on the hub"),
    (LocalEntryNotFoundError("off line\nlong"), "go online"),
    (OSError("several\nlines"), "go online"),
    (RemoteEntryNotFoundError("404\nlong", response=RESPONSE), "has neither|model_index.json is missing")])
def test_what_the_hub_does_not_give_is_told_in_one_line_with_the_way_out(look, option, error, hint, monkeypatch):
    def download(*_):
        raise error

    monkeypatch.setattr(adapters, "hf_hub_download", download)
    message = refusal(look, "someone/something")
    assert message.startswith(f"{option} 'someone/something'") and any(part in message for part in hint.split("|"))
    if isinstance(error, RepositoryNotFoundError):
        assert "HF_TOKEN" in message and ("gated" in message) == isinstance(error, GatedRepoError)
