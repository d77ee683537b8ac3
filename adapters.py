"""LoRA adapters in files: find, read, check and fit them into a network."""

import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def is_hub_id(name: str) -> bool:
    return not Path(name).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def from_hub(option: str, repository: str, name: str) -> Path | None:
    """A file of a hub repository, None where the repository has none of that name. Raises ValueError in one line."""
    try:
        return Path(hf_hub_download(repository, name))
    except RemoteEntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise ValueError(f"{option} {repository!r} is gated: accept its licence on its page of the hub, then give your token "
                         "with `hf auth login` or in HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{option} {repository!r} is neither here nor on the hub: correct it, or if it is private, give your "
                         "token with `hf auth login` or in HF_TOKEN") from error
    except Exception as error:
        raise ValueError(f"{option} {repository!r} is neither a directory here nor could it be had from the hub "
                         f"({type(error).__name__}); give a directory, or go online") from error


PEFT_FILES, DIFFUSERS_FILE = ("adapter_config.json", "adapter_model.safetensors"), "pytorch_lora_weights.safetensors"

# Settings of peft's LoraConfig under which training, saving and loading by peft and diffusers all compute the same.
EXACT_SETTINGS = {"r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
                  "lora_bias"}
# Settings that say where an adapter comes from or how its training began. The adapter's tensors do not depend on them.
DROPPED_SETTINGS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
                    "inference_mode", "lora_dropout", "init_lora_weights", "fan_in_fan_out", "eva_config", "corda_config",
                    "lora_ga_config", "loftq_config"}
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")       # values of init_lora_weights that leave the model alone


def find_adapter(lora_path: str) -> tuple[Path, LoraConfig]:
    """The file with an adapter's tensors, and its settings as training will keep them. Loads no tensors.

    An adapter is peft's two files or diffusers' one: in a directory, in a checkpoint's `adapter`, or on the hub.
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
                raise ValueError(f"it adapts more than the transformer, or in an older format: {other[0]}; load it in diffusers "
                                 "and save it again")
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
    """peft's two files of an adapter or diffusers' one, the tensors last."""
    place = Path(lora_path)
    if not place.exists() and not is_hub_id(lora_path):
        raise ValueError(f"--lora-path {lora_path!r} does not exist: give an adapter's directory, a checkpoint or a hub id")
    if place.name == PEFT_FILES[1]:
        place = place.parent
    if place.suffix == ".safetensors" and place.is_file():
        return [place]
    place = place / "adapter" if (place / "adapter").is_dir() else place

    def find(name: str) -> Path | None:
        if not place.exists():
            return from_hub("--lora-path", lora_path, name)
        return place / name if (place / name).exists() else None

    for names in (PEFT_FILES, (DIFFUSERS_FILE,)):
        files = [find(name) for name in names]
        if all(files):
            return files
    raise ValueError(f"--lora-path {lora_path!r} holds no adapter: it has neither {' and '.join(PEFT_FILES)} nor "
                     f"{DIFFUSERS_FILE}, and other formats are not loaded")


def kept_settings(settings: dict) -> LoraConfig:
    """The settings of an adapter as training keeps and saves them. Raises ValueError for a setting that training cannot keep.

    Training runs without dropout, so the dropout becomes 0: what was saved would be random where it is loaded. A start such as
    PiSSA's changes the model's own weights, so neither the KL's reference nor a pipeline that loads the adapter would be right.
    """
    kind, start = str(settings.get("peft_type", "LORA")), settings.get("init_lora_weights")
    if kind != "LORA" or not settings.get("target_modules"):
        raise ValueError(f"its settings are of peft type {kind} and name the layers {settings.get('target_modules')}: "
                         "only LORA with its layers named is supported")
    if start not in PLAIN_STARTS:
        raise ValueError(f"its init_lora_weights is {start!r}, which changes the model's own weights: give an adapter of the "
                         "model as it is; for pissa, olora and corda, peft makes one with save_pretrained(..., "
                         "path_initial_model_for_weight_conversion=...)")
    defaults = LoraConfig().to_dict()
    for name, value in settings.items():
        unknown_detail = name not in defaults and value is not True and not isinstance(value, dict | list)
        if name not in EXACT_SETTINGS | DROPPED_SETTINGS and value and value != defaults.get(name) and not unknown_detail:
            raise ValueError(f"its {name} is {value!r:.80}, which training could not keep: give an adapter without it, or merge "
                             "this one into its model (peft's merge_and_unload) and give that as --model")
    return LoraConfig(**{name: settings[name] for name in EXACT_SETTINGS if name in settings},
                      base_model_name_or_path=settings.get("base_model_name_or_path"))


def read_adapter(lora_path: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's settings, and its tensors by peft's names. Raises ValueError in one line."""
    weights, config = find_adapter(lora_path)
    tensors = load_file(weights)
    if weights.name != PEFT_FILES[1]:
        tensors = {f"base_model.model.{key.removeprefix('transformer.')}": value for key, value in tensors.items()}
    return config, tensors


def load_adapter(network: torch.nn.Module, lora_path: str, model: str, name: str = "default") -> PeftModel:
    """A transformer, which may have adapters already, with this one too, to train. Raises ValueError as `fit_adapter` does."""
    network, tensors = fit_adapter(network, lora_path, model, name)
    set_peft_model_state_dict(network, tensors, adapter_name=name)
    return network


def fit_adapter(network: torch.nn.Module, lora_path: str, model: str, name: str) -> tuple[PeftModel, dict[str, Tensor]]:
    """The transformer with the adapter's layers, and the tensors that belong into them.

    Raises ValueError, with the first tensor that does not fit, if one does not; the transformer is then of no further use.
    """
    config, tensors = read_adapter(lora_path)
    trained_on, config.base_model_name_or_path = config.base_model_name_or_path, None

    def require(ok: bool, key: str, needed) -> None:
        if not ok:
            found = f"has shape {tuple(tensors[key].shape)}" if key in tensors else "is missing"
            raise ValueError(f"--lora-path {lora_path!r} does not fit --model {model!r}: {key} {found}, {needed}; "
                             f"give the model that it was trained on ({trained_on or 'it does not say which'})")

    layers = {layer for layer, _ in (network.get_base_model() if isinstance(network, PeftModel) else network).named_modules()}
    for key in tensors:
        require(key.removeprefix("base_model.model.").partition(".lora_")[0] in layers, key, "the model has no such layer")
    try:
        if isinstance(network, PeftModel):
            network.add_adapter(name, config)
        else:
            network = get_peft_model(network, config, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--lora-path {lora_path!r} does not fit --model {model!r}: {error}") from error
    own = get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)
    for key, value in own.items():
        require(key in tensors and tensors[key].shape == value.shape, key, f"the model needs {tuple(value.shape)}")
    for key, value in tensors.items():
        require(key in own, key, "but its own settings do not name that layer")
        require(bool(value.isfinite().all()), key, "and numbers that are not finite")
    return network, tensors
