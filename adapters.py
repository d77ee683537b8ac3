"""LoRA adapters in files: find them, read their settings and tensors, and fit them into a network.

Two formats are read: peft's pair of files and a single file, whose names `adapter_formats.py` brings to
diffusers'. `Policy.save` writes the pair and diffusers' file. Only safetensors are opened, because other
files of weights can run code.
"""

import json
import re
from pathlib import Path

import torch
from diffusers.utils.peft_utils import get_peft_kwargs
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from adapter_formats import to_diffusers

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

# Settings of LoraConfig under which training, saving, and loading by peft or diffusers compute the same.
EXACT_SETTINGS = {"r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
                  "use_rslora", "use_dora", "lora_bias"}
# Settings that say where an adapter comes from or how its training began. Its tensors do not depend on them.
DROPPED_SETTINGS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
                    "revision", "inference_mode", "lora_dropout", "init_lora_weights", "fan_in_fan_out",
                    "eva_config", "corda_config", "lora_ga_config", "loftq_config"}
# Values of init_lora_weights that leave the model's own weights alone.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def is_hub_id(name: str) -> bool:
    return not Path(name).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def find_file(option: str, place: str, name: str) -> Path | None:
    """Find the file `name` in a directory, or download it from the hub. Returns None if it is not there.

    Raises ValueError in one line, with the command-line option that named the place.
    """
    if not is_hub_id(place):
        path = Path(place) / name
        return path if path.is_file() else None
    token = "give your token with `hf auth login` or in HF_TOKEN"
    try:
        return Path(hf_hub_download(place, name))
    except RemoteEntryNotFoundError:
        return None
    except GatedRepoError:
        cause = f"is gated: accept its licence on its page of the hub, then {token}"
    except RepositoryNotFoundError:
        cause = f"is neither here nor on the hub: correct it, or if private, {token}"
    except Exception as error:
        cause = f"is no directory, and the hub gives none ({type(error).__name__}); correct it, or go online"
    raise ValueError(f"{option} {place!r} {cause}")


def read_adapter(lora_path: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter: its settings as training keeps them, tensors by peft's names. Raises ValueError."""
    *settings_file, weights = adapter_files(lora_path)
    try:
        with safe_open(weights, "pt") as file:
            metadata = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is no whole safetensors file ({error}): fetch it again") from error
    try:
        if not tensors:
            raise ValueError("its file holds no tensors")
        for key, value in tensors.items():
            if key.startswith(("text_encoder", "lora_te")):
                raise ValueError(f"{key} is of a text encoder, and only the transformer is trained here")
            if key.endswith(".alpha") and value.numel() != 1:
                raise ValueError(f"{key} has shape {tuple(value.shape)}, and an alpha is one number")
            if not value.isfinite().all():
                raise ValueError(f"{key} has shape {tuple(value.shape)} and numbers that are not finite: "
                                 "give an earlier checkpoint")
        if settings_file:
            settings = json.loads(settings_file[0].read_text())
        else:
            tensors, stated = to_diffusers(tensors), json.loads(metadata)
            settings = {key.removeprefix("transformer."): value for key, value in stated.items()}
            settings = settings or settings_of_tensors(tensors)
            tensors = {f"base_model.model.{key.removeprefix('transformer.')}": value
                       for key, value in tensors.items() if not key.endswith(".alpha")}
        # Older versions of peft ended this name otherwise.
        older = "lora_magnitude_vector.weight"
        tensors = {key.replace(older, older.removesuffix(".weight")): value for key, value in tensors.items()}
        return kept_settings(settings), tensors
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--lora-path {lora_path!r} is no adapter that can be trained on "
                         f"({type(error).__name__}: {error})") from error


def adapter_files(lora_path: str) -> list[Path]:
    """Find peft's two files of an adapter or diffusers' one. The file with the tensors is the last.

    They lie in a directory or a hub repository, or one level below: in `adapter`, where our checkpoints have
    them, or in `lora`, where those of Flow-GRPO's authors do.
    """
    place = Path(lora_path)
    if not place.exists() and not is_hub_id(lora_path):
        raise ValueError(f"--lora-path {lora_path!r} does not exist: give an adapter's directory, a "
                         "checkpoint or a hub id")
    if place.name == PEFT_FILES[1]:
        place = place.parent
    if place.suffix == ".safetensors" and place.is_file():
        return [place]
    for below in ("", "adapter/", "lora/"):
        for names in (PEFT_FILES, (DIFFUSERS_FILE,)):
            files = [find_file("--lora-path", str(place), below + name) for name in names]
            if all(files):
                return files
    deeper = [path.parent for name in (PEFT_FILES[1], DIFFUSERS_FILE) for depth in (1, 2, 3)
              for path in place.glob("*/" * depth + name)]
    # The last whole checkpoint: epoch_00012, and neither epoch_00003 nor epoch_00015.corrupt
    last = max(deeper, default=None,
               key=lambda path: [int(number) for number in re.findall(r"[-_](\d+)/", f"{path}/")])
    single = sorted(place.glob("*.safetensors"))
    hint = (f"give {last}" if deeper else f"give a file in it, such as {single[0]}" if single
            else "an adapter in one file under another name is given by that file, ending in .safetensors")
    raise ValueError(f"--lora-path {lora_path!r} holds no adapter: it has neither {' and '.join(PEFT_FILES)} "
                     f"nor {DIFFUSERS_FILE}; {hint}")


def settings_of_tensors(tensors: dict[str, Tensor]) -> dict:
    """Derive the settings of a diffusers file that does not state them, as diffusers does.

    A layer's rank is the height of its lora_A. Its alpha is the tensor `.alpha`, or its rank if no layer has
    one. Raises ValueError, with the cause, if the tensors are not LoRA of a transformer.
    """
    for key in tensors:
        if key.startswith("base_model.model."):
            raise ValueError(f"{key} is of a peft adapter: name the file {PEFT_FILES[1]}, and put its "
                             f"{PEFT_FILES[0]} beside it")
        if not re.search(r"\.(lora_A\.|lora_B\.|lora_magnitude_vector|alpha)", key):
            whole = ".lora" not in key and key.endswith((".weight", ".bias"))
            cause = "a weight of the model itself (modules_to_save)" if whole else "of an unknown format"
            raise ValueError(f"{key} is {cause}: load it in diffusers and save its LoRA layers again")

    tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    ranks = {key.partition(".lora_A.")[0]: len(value) for key, value in tensors.items() if ".lora_A." in key}
    if not ranks:
        raise ValueError("it holds no lora_A, so no layer has a rank")
    alphas = {key: value.item() for key, value in tensors.items() if key.endswith(".alpha")}
    settings = get_peft_kwargs(ranks, alphas, tensors)
    # Patterns and targets are regular expressions, in which "^proj_out" is not the proj_out of a block.
    for name in ("rank_pattern", "alpha_pattern"):
        settings[name] = {f"^{re.escape(layer)}": value for layer, value in settings[name].items()}
    return settings | {"target_modules": "|".join(map(re.escape, ranks))}


def kept_settings(settings: dict) -> LoraConfig:
    """Make the settings that training keeps and saves. Raises ValueError for a setting that it cannot keep.

    Dropout becomes 0, because training runs without it and a saved dropout would make the adapter random
    elsewhere. A start such as PiSSA's is refused, because it changes the model's own weights: the KL's
    reference would not be the model, and a pipeline that loads the adapter would not draw what training drew.
    """
    kind, start = str(settings.get("peft_type", "LORA")), settings.get("init_lora_weights")
    if kind != "LORA" or not settings.get("target_modules"):
        raise ValueError(f"its settings are of peft type {kind} and name the layers "
                         f"{settings.get('target_modules')}: only LORA with its layers named is supported")
    if start not in PLAIN_STARTS:
        raise ValueError(f"its init_lora_weights is {start!r}, which changes the model's own weights: give "
                         "an adapter of the model as it is, which peft's save_pretrained makes by "
                         "path_initial_model_for_weight_conversion")
    defaults = LoraConfig().to_dict()
    for name, value in settings.items():
        if name in EXACT_SETTINGS | DROPPED_SETTINGS or not value or value == defaults.get(name):
            continue
        # A newer peft writes settings that this one does not know. A number or a string turns nothing on.
        if name in defaults or value is True or isinstance(value, dict | list):
            raise ValueError(f"its {name} is {value!r:.80}, which training could not keep: give an adapter "
                             "without it, or merge it into its model (merge_and_unload), then the --model")
    return LoraConfig(**{name: settings[name] for name in EXACT_SETTINGS if name in settings},
                      base_model_name_or_path=settings.get("base_model_name_or_path"))


def load_adapter(network: torch.nn.Module, lora_path: str, model: str, name: str = "default") -> PeftModel:
    """Add an adapter to a transformer, which may have others. Raises ValueError as `fit_adapter` does."""
    network, tensors = fit_adapter(network, lora_path, model, name)
    set_peft_model_state_dict(network, tensors, adapter_name=name)
    return network


def fit_adapter(network: torch.nn.Module, lora_path: str, model: str, name: str
                ) -> tuple[PeftModel, dict[str, Tensor]]:
    """Add the adapter's layers to a transformer. Returns it with the tensors that belong into these layers.

    Raises ValueError, with the first tensor that does not fit. The transformer is then of no further use.
    """
    config, tensors = read_adapter(lora_path)
    trained_on, config.base_model_name_or_path = config.base_model_name_or_path, None
    other_model = f"give the model that it was trained on ({trained_on or 'it does not say which'})"

    def refuse(key: str, reason: str) -> None:
        found = f"has shape {tuple(tensors[key].shape)}" if key in tensors else "is missing"
        raise ValueError(f"--lora-path {lora_path!r} does not fit --model {model!r}: {key} {found}, {reason}")

    base = network.get_base_model() if isinstance(network, PeftModel) else network
    layers = {layer for layer, _ in base.named_modules() if layer}
    for key in tensors:
        if cause := why_not_a_layer(key, layers, other_model):
            refuse(key, cause)
    try:
        if isinstance(network, PeftModel):
            network.add_adapter(name, config)
        else:
            network = get_peft_model(network, config, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--lora-path {lora_path!r} does not fit --model {model!r}: {error}") from error
    own = get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)
    for key, value in own.items():
        if key not in tensors or tensors[key].shape != value.shape:
            refuse(key, f"the model needs {tuple(value.shape)}; {other_model}")
    for key in tensors:
        if key not in own:
            refuse(key, "but its own settings do not name that layer; give those that were saved with it")
    return network, tensors


def why_not_a_layer(key: str, layers: set[str], other_model: str) -> str:
    """Return "" if a tensor is of a LoRA layer of the model, else the cause. other_model: what to do then."""
    layer, is_lora, _ = key.removeprefix("base_model.model.").partition(".lora_")
    if not is_lora:
        return "a weight of the model itself (modules_to_save, bias); save the LoRA tensors alone"
    if layer in layers:
        return ""
    parts = layer.split(".")
    wrappers = [part for part in parts if part in ("_orig_mod", "module")]
    for start in range(len(parts)):
        if ".".join(part for part in parts[start:] if part not in wrappers) in layers:
            prefix = wrappers[0] if wrappers else ".".join(parts[:start])
            return f"a layer under the name of a wrapper; take '{prefix}.' out of the names in the file"
    return f"the model has no such layer; {other_model}"
