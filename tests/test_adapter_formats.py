"""Adapters as other trainers write them draw what they draw in diffusers, or are refused with the cause."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from test_adapters import adapted, fresh_pipeline, of_pipeline, refusal
from test_families import policy_latents, start_noise, untrained_policy

from adapter_formats import to_diffusers
from adapters import fit_adapter, read_adapter

STEPS, GUIDANCE = 3, 2.0

# The original model's layers, and the layers of diffusers that their rows belong to.
DOUBLE = {"img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.proj": ("attn.to_out.0",),
          "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",), "img_mod.lin": ("norm1.linear",),
          "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.proj": ("attn.to_add_out",),
          "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",), "txt_mod.lin": ("norm1_context.linear",)}
SINGLE = {"linear2": ("proj_out",), "modulation.lin": ("norm.linear",)}
LINEAR1 = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
FLUX_TOP = {"img_in": "x_embedder", "txt_in": "context_embedder", "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2", "final_layer.linear": "proj_out",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1"}
MMDIT = {"x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn.proj": ("attn.to_out.0",),
         "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.proj": ("attn2.to_out.0",),
         "x_block.mlp.fc1": ("ff.net.0.proj",), "x_block.mlp.fc2": ("ff.net.2",), "x_block.adaLN_modulation.1": ("norm1.linear",),
         "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
         "context_block.attn.proj": ("attn.to_add_out",), "context_block.mlp.fc1": ("ff_context.net.0.proj",),
         "context_block.mlp.fc2": ("ff_context.net.2",), "context_block.adaLN_modulation.1": ("norm1_context.linear",)}


# ---------------------------------------------------------------------------------------------- files in those layouts

def original_layers(transformer: torch.nn.Module) -> dict[str, list[torch.nn.Linear]]:
    """The original model's name of each layer of the blocks, and the layers that diffusers has in its place."""
    kinds = [("joint_blocks", "transformer_blocks", MMDIT)]
    if isinstance(transformer, FluxTransformer2DModel):
        kinds = [("double_blocks", "transformer_blocks", DOUBLE), ("single_blocks", "single_transformer_blocks", SINGLE)]
    modules, found = dict(transformer.named_modules()), {}
    for theirs, ours, table in kinds:
        for i in range(len(modules[ours])):
            for name, parts in table.items():
                if all(f"{ours}.{i}.{part}" in modules for part in parts):
                    found[f"{theirs}.{i}.{name}"] = [modules[f"{ours}.{i}.{part}"] for part in parts]
    return found


def random_lora(layers: dict[str, list[torch.nn.Linear]], alphas: bool = True) -> dict[str, torch.Tensor]:
    """LAYER.down, LAYER.up and LAYER.alpha, with another rank and another alpha for every layer."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for number, (layer, parts) in enumerate(layers.items()):
        rank = 2 + number % 3
        rows = sum(part.out_features for part in parts)
        tensors[f"{layer}.down"] = torch.randn(rank, parts[0].in_features, generator=generator) / 8
        tensors[f"{layer}.up"] = torch.randn(rows, rank, generator=generator) / 8
        if alphas:
            tensors[f"{layer}.alpha"] = torch.tensor(0.5 + number % 5)
    return tensors


def written(tensors: dict[str, torch.Tensor], path: Path, prefix: str, part: str, dots: str = ".") -> Path:
    """A file with keys `prefix` + layer + the name of the part: "lora_down" for down, or "lora_A"."""
    words = {"down": "down", "up": "up"} if part != "lora_A" else {"down": "A", "up": "B"}
    stem = {"lora_down": ".lora_", "lora_A": ".lora_", "lora.down": ".lora."}[part]
    keys = {key: (*key.rpartition(".")[::2],) for key in tensors}
    save_file({f"{prefix}{layer.replace('.', dots)}" + (".alpha" if kind == "alpha" else f"{stem}{words[kind]}.weight"): tensors[key]
               for key, (layer, kind) in keys.items()}, path)
    return path


def noise_of(model: str) -> torch.Tensor:
    return start_noise(untrained_policy(model))


def picture(model: str, path: Path) -> torch.Tensor:
    return policy_latents(adapted(model, path), noise_of(model), STEPS, GUIDANCE)


def diffusers_picture(model: str, path: Path | None) -> torch.Tensor:
    pipe = fresh_pipeline(model)
    if path:
        pipe.load_lora_weights(path.parent, weight_name=path.name)
    return of_pipeline(pipe, noise_of(model))


def agree(model: str, path: Path, expected: torch.Tensor) -> None:
    found = picture(model, path)
    assert (found - expected).abs().max() < 1e-5
    assert (found - diffusers_picture(model, None)).abs().max() > 1e-2


LAYOUTS = {"kohya": ("lora_unet_", "lora_down", "_"), "ComfyUI": ("diffusion_model.", "lora_down", "."),
           "A and B": ("diffusion_model.", "lora_A", "."), "peft's prefix": ("base_model.model.", "lora_A", "."),
           "whole checkpoint's prefix": ("model.diffusion_model.", "lora_down", "."), "no prefix": ("", "lora_A", ".")}


# --------------------------------------------------------------------------------------------------------------- FLUX.1

@pytest.mark.parametrize("layout, alphas", [*((layout, True) for layout in LAYOUTS), ("kohya", False)])
def test_flux_in_the_original_layout_draws_what_diffusers_draws(flux_model, tmp_path, layout, alphas):
    prefix, part, dots = LAYOUTS[layout]
    tensors = random_lora(original_layers(fresh_pipeline(flux_model).transformer), alphas)
    kohya = written(tensors, tmp_path / "kohya.safetensors", *LAYOUTS["kohya"])
    path = written(tensors, tmp_path / "style.safetensors", prefix, part, dots)
    # diffusers reads two of the layouts, and takes the others for files without LoRA.
    read_by_diffusers = part == "lora_down" and prefix in ("lora_unet_", "diffusion_model.")
    agree(flux_model, path, diffusers_picture(flux_model, path if read_by_diffusers else kohya))


def test_flux_as_onetrainer_and_xlabs_write_it_draws_what_diffusers_draws(flux_model, tmp_path):
    layers = {name: [module] for name, module in fresh_pipeline(flux_model).transformer.named_modules()
              if re.search(r"attn\.(to_|add_)(q|k|v|out\.0|add_out)", name) and isinstance(module, torch.nn.Linear)}
    path = written(random_lora(layers), tmp_path / "onetrainer.safetensors", "lora_transformer_", "lora_down", "_")
    agree(flux_model, path, diffusers_picture(flux_model, path))

    originals = original_layers(fresh_pipeline(flux_model).transformer)
    names = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1", "txt_attn.proj": "proj_lora2"}
    tensors = {}
    for key, value in random_lora(originals, alphas=False).items():
        _, i, layer, kind = re.fullmatch(r"(double|single)_blocks\.(\d)\.(.+)\.(down|up)", key).groups()
        if layer in names:
            tensors[f"double_blocks.{i}.processor.{names[layer]}.{kind}.weight"] = value
    save_file(tensors, tmp_path / "xlabs.safetensors")
    agree(flux_model, tmp_path / "xlabs.safetensors", diffusers_picture(flux_model, tmp_path / "xlabs.safetensors"))


def test_flux_of_published_width_is_cut_as_diffusers_cuts_it(tmp_path):
    """Its fused layers have the sizes that diffusers' converter knows. Every layer keeps its own scale alpha / rank."""
    with torch.device("meta"):
        skeleton = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    layers = original_layers(skeleton)
    layers["single_blocks.0.linear1"] = [skeleton.get_submodule(f"single_transformer_blocks.0.{part}") for part in LINEAR1["linear1"]]
    tensors = random_lora(layers)
    sparse = "double_blocks.0.img_attn.qkv"      # block-diagonal, as sd-scripts leaves layers that it trained apart
    tensors |= {f"{sparse}.down": torch.randn(6, 3072), f"{sparse}.up": torch.block_diag(*torch.randn(3, 3072, 2))}
    path = written(tensors, tmp_path / "kohya.safetensors", *LAYOUTS["kohya"])
    config, found = read_adapter(str(path))
    expected = FluxPipeline.lora_state_dict(str(path))
    assert found.keys() == {key.replace("transformer.", "base_model.model.", 1) for key in expected}
    network, _ = fit_adapter(skeleton, str(path), "random:flux", "default")
    for key in expected:
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            scale = network.get_submodule(f"base_model.model.{layer}").scaling["default"]
            A, B = (found[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
            torch.testing.assert_close(A.double().T @ B[:50].double().T * scale, expected[key].double().T
                                       @ expected[key.replace("lora_A", "lora_B")][:50].double().T, rtol=1e-6, atol=1e-7)
    assert len(found[f"base_model.model.transformer_blocks.0.attn.to_q{'.lora_A.weight'}"]) == 2


def test_flux_layers_outside_the_blocks_count_too_with_their_alphas(flux_model, tmp_path):
    """diffusers drops them when it loads the file. The law is the change of weights, which is alpha / rank B A."""
    pipe = fresh_pipeline(flux_model)
    layers = {name: [pipe.transformer.get_submodule(ours)] for name, ours in FLUX_TOP.items()}
    tensors = random_lora(layers)
    path = written(tensors, tmp_path / "kohya.safetensors", *LAYOUTS["kohya"])
    with torch.no_grad():
        for name, (module,) in layers.items():
            module.weight += tensors[f"{name}.alpha"] / len(tensors[f"{name}.down"]) * tensors[f"{name}.up"] @ tensors[f"{name}.down"]
    agree(flux_model, path, of_pipeline(pipe, noise_of(flux_model)))


# ------------------------------------------------------------------------------------------------------------------ SD3

@pytest.fixture(scope="module")
def dual_model(model, tmp_path_factory) -> str:
    """As SD3.5 medium has, two of its blocks with a second attention."""
    directory = tmp_path_factory.mktemp("dual") / "model"
    shutil.copytree(model, directory)
    torch.manual_seed(0)
    config = SD3Transformer2DModel.load_config(model, subfolder="transformer")
    SD3Transformer2DModel.from_config({**config, "dual_attention_layers": (0, 1)}).save_pretrained(directory / "transformer")
    return str(directory)


def merged_by_diffusers(transformer: SD3Transformer2DModel, tensors: dict[str, torch.Tensor]) -> None:
    """Add alpha / rank B A, brought from the original layout by diffusers' converter of whole checkpoints."""
    layers = original_layers(transformer)
    change = {f"{layer}.weight": tensors.get(f"{layer}.alpha", torch.tensor(float(len(tensors[f"{layer}.down"]))))
              / len(tensors[f"{layer}.down"]) * tensors[f"{layer}.up"] @ tensors[f"{layer}.down"] for layer in layers}
    width, blocks = transformer.inner_dim, len(transformer.transformer_blocks)
    rest = [f"joint_blocks.{i}.{name}" for i in range(blocks) for name in MMDIT] + [
        "x_embedder.proj", "context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1", "t_embedder.mlp.0",
        "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2"]
    rest += [f"joint_blocks.{i}.{block}.attn{n}.ln_{kind}" for i in range(blocks) for block in ("x_block", "context_block")
             for n in ("", "2") for kind in "qk"]
    dual = {layer for layer in change if ".attn2." in layer}
    checkpoint = {f"{name}.{kind}": torch.zeros(6 * width) for name in rest for kind in ("weight", "bias")
                  if ".attn2." not in name or any(layer.startswith(name.partition("attn2")[0]) for layer in dual)}
    converted = convert_sd3_transformer_checkpoint_to_diffusers({**checkpoint, "pos_embed": torch.zeros(1), **change})
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name in converted and converted[name].shape == parameter.shape and parameter.ndim == 2:
                parameter += converted[name]


@pytest.mark.parametrize("layout, dual, alphas", [*((layout, True, True) for layout in LAYOUTS), ("kohya", False, False)])
def test_sd3_in_the_original_layout_draws_what_diffusers_draws_with_it_merged(model, dual_model, tmp_path, layout, dual, alphas):
    model = dual_model if dual else model
    pipe = fresh_pipeline(model)
    layers = original_layers(pipe.transformer)
    assert any(".attn2." in layer for layer in layers) == dual
    tensors = random_lora(layers, alphas)
    path = written(tensors, tmp_path / "style.safetensors", *LAYOUTS[layout])
    merged_by_diffusers(pipe.transformer, tensors)
    agree(model, path, of_pipeline(pipe, noise_of(model)))


# ----------------------------------------------------------------------------------------------------------------- both

@pytest.mark.parametrize("part", ["lora.down", "lora_down"])
def test_diffusers_names_with_older_words_for_a_and_b_load(each_model, tmp_path, part):
    layers = {name: [module] for name, module in fresh_pipeline(each_model).transformer.named_modules()
              if name.endswith(("attn.to_q", "attn.to_out.0"))}
    tensors = random_lora(layers, alphas=False)
    path = written(tensors, tmp_path / "older.safetensors", "transformer.", part)
    same = written(tensors, tmp_path / "today.safetensors", "transformer.", "lora_A")
    agree(each_model, path, diffusers_picture(each_model, same))


def test_what_training_saves_of_a_converted_adapter_is_loaded_by_diffusers(each_model, tmp_path):
    path = written(random_lora(original_layers(fresh_pipeline(each_model).transformer)), tmp_path / "kohya.safetensors",
                   *LAYOUTS["kohya"])
    adapted(each_model, path).save(tmp_path)
    saved = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    agree(each_model, path, diffusers_picture(each_model, saved))
    assert (picture(each_model, tmp_path) - picture(each_model, path)).abs().max() < 1e-5


def test_each_alpha_is_kept_as_a_setting_to_the_bit(flux_model, tmp_path):
    tensors = random_lora(original_layers(fresh_pipeline(flux_model).transformer))
    path = written(tensors, tmp_path / "kohya.safetensors", *LAYOUTS["kohya"])
    network = adapted(flux_model, path).network
    for i in range(2):
        for name, parts in DOUBLE.items():
            for part in parts:
                module = network.get_submodule(f"base_model.model.transformer_blocks.{i}.{part}")
                assert module.lora_alpha["default"] == tensors[f"double_blocks.{i}.{name}.alpha"].item()
                assert torch.equal(module.lora_A["default"].weight, tensors[f"double_blocks.{i}.{name}.down"])


# ------------------------------------------------------------------------------------------------------------- refusals

LAYER, ONE = "lora_unet_double_blocks_0_img_attn_proj", torch.ones(2, 2)
PAIR = {f"{LAYER}.lora_down.weight": ONE, f"{LAYER}.lora_up.weight": ONE.clone()}


def place(layer: str) -> dict[str, torch.Tensor]:
    return {key.replace(LAYER, layer): value.clone() for key, value in PAIR.items()}


@pytest.mark.parametrize("tensors, named, cause", [
    (PAIR | {f"{LAYER}.dora_scale": ONE.clone()}, f"{LAYER}.dora_scale", "is not converted"),
    (PAIR | {f"{LAYER}.lora_mid.weight": ONE.clone()}, f"{LAYER}.lora_mid.weight", "is not converted"),
    (PAIR | {f"{LAYER}.diff_b": ONE.clone()}, f"{LAYER}.diff_b", "is not converted"),
    (PAIR | {f"{LAYER}_2.alpha": torch.tensor(1.0)}, f"{LAYER}_2.alpha", "is not converted"),
    ({f"{LAYER}.hada_w1_a": ONE}, f"{LAYER}.hada_w1_a", "is not converted"),
    (PAIR | {f"{LAYER}.alpha": torch.ones(2)}, f"{LAYER}.alpha has shape (2,)", "one number"),
    (PAIR | place("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "lora_te1", "of a text encoder"),
    (PAIR | place("text_encoders.clip_l.transformer.mlp.fc1"), "text_encoders.clip_l", "of a text encoder"),
    (PAIR | place("lora_unet_input_blocks_1_0_proj_in"), "lora_unet_input_blocks_1_0_proj_in", "converter"),
    (PAIR | place("lora_unet_double_blocks_99_img_attn_proj"), "double_blocks_99", "converter"),
    (PAIR | place("lora_transformer_single_transformer_blocks_0_attn_to_q"), LAYER, "place in diffusers"),
    (place("lora_transformer_transformer_blocks_0_ff_net_0_proj") | place("lora_transformer_transformer_blocks_0_ff_net_2"),
     "transformer_blocks_0_ff_net", "place in diffusers"),
    (place("lora_unet_joint_blocks_0_x_block_attn_proj") | place("lora_unet_context_embedder"), "lora_unet_context_embedder",
     "place in diffusers"),
    (place("lora_unet_single_blocks_0_linear1"), "FLUX.1's own layers in their own sizes", "AssertionError"),
    ({f"{LAYER}.lora_down.weight": ONE}, LAYER, "has a lora_down and no lora_up"),
    ({"lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight": ONE}, "joint_blocks_0_x_block_attn_proj has a lora_down",
     "no lora_up"),
    ({f"{LAYER}.lora_up.weight": ONE}, f"{LAYER}.lora_B.weight", "is not converted")], ids=lambda value: str(value)[:40])
def test_what_would_be_lost_of_a_file_is_refused_in_one_line(tmp_path, tensors, named, cause):
    save_file(tensors, tmp_path / "style.safetensors")
    message = refusal(read_adapter, str(tmp_path / "style.safetensors"))
    assert named in message and cause in message


def test_tensors_that_no_trainer_above_wrote_keep_their_names():
    tensors = {"transformer.x.lora_A.weight": ONE, "unet.down_blocks.0.proj.lora_B.weight": ONE}
    assert to_diffusers(tensors).keys() == tensors.keys()


def test_a_directory_with_a_file_under_another_name_is_refused_with_that_file(tmp_path):
    save_file(PAIR, tmp_path / "my style.safetensors")
    assert refusal(read_adapter, str(tmp_path)).endswith(f"such as {tmp_path / 'my style.safetensors'}")
