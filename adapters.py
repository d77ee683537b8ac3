"""LoRA adapters in files: find them, read their settings and tensors, and fit them into a network.

Two formats are read: peft's pair of files and diffusers' single file. `Policy.save` writes both.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

# Settings of peft's LoraConfig under which training, saving, and loading by peft or diffusers compute the
# same.
EXACT_SETTINGS = {"r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
                  "use_rslora", "use_dora", "lora_bias"}
# Settings that say where an adapter comes from or how its training began. Its tensors do not depend on them.
DROPPED_SETTINGS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
                    "revision", "inference_mode", "lora_dropout", "init_lora_weights", "fan_in_fan_out",
                    "eva_config", "corda_config", "lora_ga_config", "loftq_config"}
# Values of init_lora_weights that leave the model's own weights alone.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


# ---- files, here or on the hub -----------------------------------------------------------------------------

def is_hub_id(name: str) -> bool:
    return not Path(name).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def find_file(option: str, place: str, name: str) -> Path | None:
    """Find the file `name` in a directory or a hub repository. Returns None if the place has no such file."""
    if is_hub_id(place):
        return from_hub(option, place, name)
    path = Path(place) / name
    return path if path.is_file() else None


def from_hub(option: str, repository: str, name: str) -> Path | None:
    """Download one file of a hub repository. Returns None if the repository has no such file.

    Raises ValueError in one line, with the command-line option that named the repository.
    """
    try:
        return Path(hf_hub_download(repository, name))
    except RemoteEntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise ValueError(f"{option} {repository!r} is gated: accept its licence on its page of the hub, then give "
                         "your token with `hf auth login` or in HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{option} {repository!r} is neither here nor on the hub: correct it, or if it is private, "
                         "give your token with `hf auth login` or in HF_TOKEN") from error
    except Exception as error:
        raise ValueError(f"{option} {repository!r} is neither a directory here nor could it be had from the hub "
                         f"({type(error).__name__}); give a directory, or go online") from error


# ---- adapters ----------------------------------------------------------------------------------------------

def find_adapter(lora_path: str) -> tuple[Path, LoraConfig]:
    """Find the file with an adapter's tensors, and read its settings as training will keep them.

    An adapter lies in a directory, in a checkpoint's `adapter` directory, or on the hub. Loads no tensors.
    Raises ValueError in one line.
    """
    *settings_file, weights = adapter_files(lora_path)
    try:
        with safe_open(weights, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
            metadata = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    except SafetensorError as error:
        raise ValueError(f"{weights} is no whole safetensors file ({error}): fetch it again") from error
    if not shapes:
        raise ValueError(f"--lora-path {lora_path!r} holds no tensors: {weights} is empty")
    try:
        if settings_file:
            settings = json.loads(settings_file[0].read_text())
        else:
            other = [key for key in shapes if not key.startswith("transformer.") or ".lora_" not in key]
            if other:
                raise ValueError(f"it adapts more than the transformer, or in an older format: {other[0]}; load it "
                                 "in diffusers and save it again")
            settings = {key.removeprefix("transformer."): value for key, value in json.loads(metadata).items()}
            if not settings:                                                     # alpha is the rank, as diffusers takes it
                layers = sorted({key.removeprefix("transformer.").partition(".lora_")[0] for key in shapes})
                rank = next(shape[0] for key, shape in shapes.items() if ".lora_A." in key)
                settings = dict(r=rank, lora_alpha=rank, target_modules=layers)
        return weights, kept_settings(settings)
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"--lora-path {lora_path!r} has settings that make no adapter "
                         f"({type(error).__name__}: {error})") from error


def adapter_files(lora_path: str) -> list[Path]:
    """Find peft's two files of an adapter or diffusers' one. The file with the tensors is the last."""
    place = Path(lora_path)
    if not place.exists() and not is_hub_id(lora_path):
        raise ValueError(f"--lora-path {lora_path!r} does not exist: give an adapter's directory, a checkpoint or a "
                         "hub id")
    if place.name == PEFT_FILES[1]:
        place = place.parent
    if place.suffix == ".safetensors" and place.is_file():
        return [place]
    place = place / "adapter" if (place / "adapter").is_dir() else place
    for names in (PEFT_FILES, (DIFFUSERS_FILE,)):
        files = [find_file("--lora-path", str(place), name) for name in names]
        if all(files):
            return files
    raise ValueError(f"--lora-path {lora_path!r} holds no adapter: it has neither {' and '.join(PEFT_FILES)} nor "
                     f"{DIFFUSERS_FILE}, and other formats are not loaded")


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
        raise ValueError(f"its init_lora_weights is {start!r}, which changes the model's own weights: give an "
                         "adapter of the model as it is; for pissa, olora and corda, peft makes one with "
                         "save_pretrained(..., path_initial_model_for_weight_conversion=...)")
    defaults = LoraConfig().to_dict()
    for name, value in settings.items():
        if name in EXACT_SETTINGS | DROPPED_SETTINGS or not value or value == defaults.get(name):
            continue
        # A newer peft writes settings that this one does not know. A number or a string alone turns nothing
        # on.
        if name not in defaults and value is not True and not isinstance(value, dict | list):
            continue
        raise ValueError(f"its {name} is {value!r:.80}, which training could not keep: give an adapter without it, "
                         "or merge this one into its model (peft's merge_and_unload) and give that as --model")
    return LoraConfig(**{name: settings[name] for name in EXACT_SETTINGS if name in settings},
                      base_model_name_or_path=settings.get("base_model_name_or_path"))


def read_adapter(lora_path: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter's settings, and its tensors under peft's names. Raises ValueError in one line."""
    weights, config = find_adapter(lora_path)
    tensors = load_file(weights)
    if weights.name != PEFT_FILES[1]:
        tensors = {f"base_model.model.{key.removeprefix('transformer.')}": value for key, value in tensors.items()}
    return config, tensors


def load_adapter(network: torch.nn.Module, lora_path: str, model: str, name: str = "default") -> PeftModel:
    """Add an adapter to a transformer, to be trained. The transformer may have other adapters already.

    Raises ValueError as `fit_adapter` does.
    """
    network, tensors = fit_adapter(network, lora_path, model, name)
    set_peft_model_state_dict(network, tensors, adapter_name=name)
    return network


def fit_adapter(network: torch.nn.Module, lora_path: str, model: str, name: str
                ) -> tuple[PeftModel, dict[str, Tensor]]:
    """Add the adapter's layers to a transformer. Returns it with the tensors that belong into these layers.

    Raises ValueError that names the first tensor that does not fit. The transformer is then of no further
    use.
    """
    config, tensors = read_adapter(lora_path)
    trained_on, config.base_model_name_or_path = config.base_model_name_or_path, None

    def require(ok: bool, key: str, needed: str) -> None:
        if not ok:
            found = f"has shape {tuple(tensors[key].shape)}" if key in tensors else "is missing"
            raise ValueError(f"--lora-path {lora_path!r} does not fit --model {model!r}: {key} {found}, {needed}; "
                             f"give the model that it was trained on ({trained_on or 'it does not say which'})")

    base = network.get_base_model() if isinstance(network, PeftModel) else network
    layers = {layer for layer, _ in base.named_modules()}
    for key in tensors:
        layer = key.removeprefix("base_model.model.").partition(".lora_")[0]
        require(layer in layers, key, "the model has no such layer")
    try:
        if isinstance(network, PeftModel):
            network.add_adapter(name, config)
        else:
            network = get_peft_model(network, config, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--lora-path {lora_path!r} does not fit --model {model!r}: {error}") from error
    own = get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)
    for key, value in own.items():
        fits = key in tensors and tensors[key].shape == value.shape
        require(fits, key, f"the model needs {tuple(value.shape)}")
    for key, value in tensors.items():
        require(key in own, key, "but its own settings do not name that layer")
        require(bool(value.isfinite().all()), key, "and numbers that are not finite")
    return network, tensors
