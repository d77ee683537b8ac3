"""Pipelines before they train: what a directory or hub id holds, loading, and random ones of published sizes.

Nothing here loads weights before the model's class and its scheduler are known to be supported.
"""

import inspect
import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError

from adapters import find_file
from families import FAMILIES, Family, Text, diffusers_class


def check_model(model: str, guidance_scale: float = 1.0) -> type[Family]:
    """Find the family of `model`: a pipeline's directory, a hub id or random:NAME. Loads no weights.

    Raises ValueError in one line if the model is unknown, if a package that it needs is missing, if its
    scheduler draws what training does not, or if it is distilled to go without guidance and is given some.
    """
    if model.startswith("random:"):
        known = {f"random:{name}": family for family in FAMILIES.values() for name in family.published}
        if model not in known:
            raise ValueError(f"--model {model!r} is unknown: {', '.join(known)} are made with random weights")
        return known[model]
    index = read_index(model)
    family = FAMILIES.get(kind := index["_class_name"])
    if family is None:
        raise ValueError(f"--model {model!r} is a {kind}: only {', '.join(FAMILIES)} are supported")
    for name in needed_parts(family):
        if not index.get(name, [None])[0]:
            raise ValueError(f"--model {model!r} has no {name}: its model_index.json leaves it out; add it")
        # Where packages are missing, transformers has a class of the same name that names them.
        kind = str(index[name][-1])
        if missing := getattr(getattr(transformers, kind, None), "_backends", ()):
            raise ValueError(f"--model {model!r} has a {kind}, which needs {' and '.join(missing)}: "
                             f"pip install {' '.join(missing)}")
    check_scheduler(model, index["scheduler"], find_file("--model", model, SCHEDULER_FILE))
    if guidance_scale != 1 and family.distilled(model, index):
        raise ValueError(f"--guidance-scale is {guidance_scale:g}: {model} is distilled to go without "
                         "guidance; set it to 1, or train the model that it was distilled from")
    return family


def is_distilled(model: str) -> bool:
    """Whether a model that `check_model` takes is distilled to go without guidance."""
    if model.startswith("random:"):
        return False
    index = read_index(model)
    return FAMILIES[index["_class_name"]].distilled(model, index)


def check_memory(family: type[Family], model: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError in one line if the transformer alone is larger in `dtype` than the GPU's whole memory.

    It reads the transformer's settings and no weights. A family that names no transformer is not looked at.
    Raises OSError if there are no settings.
    """
    if device.type != "cuda" or not hasattr(family, "transformer"):
        return
    kind, name = diffusers_class(family.transformer), model.removeprefix("random:")
    random = model.startswith("random:")
    settings = family.published[name] if random else kind.load_config(model, subfolder="transformer")
    with torch.device("meta"):                   # shapes without values
        weights = sum(p.numel() for p in kind.from_config(settings).parameters())
    needed, (_, memory) = weights * dtype.itemsize, torch.cuda.mem_get_info(device)
    if needed > memory:
        half = ", or --dtype bfloat16" if dtype.itemsize > 2 else ""
        raise ValueError(f"--model {model!r} does not fit: its transformer alone takes {needed / 2**30:.1f} "
                         f"GiB in {str(dtype).removeprefix('torch.')}, and the GPU has {memory / 2**30:.1f} "
                         f"GiB: choose a GPU with more memory or a smaller model{half}")


def needed_parts(family: type[Family]) -> list[str]:
    """Name the parts that a pipeline of the family must have."""
    parameters = inspect.signature(diffusers_class(family.pipeline)).parameters.values()
    return [parameter.name for parameter in parameters
            if parameter.default is parameter.empty and parameter.name not in family.may_lack]


def read_index(model: str) -> dict:
    """Read model_index.json: the pipeline's class, and [library, class] of each part. Raises ValueError."""
    path = find_file("--model", model, "model_index.json")
    if path is None:
        raise ValueError(f"--model {model!r} is no diffusers pipeline: {model}/model_index.json is missing")
    try:
        index = json.loads(path.read_text())
        return index | {"_class_name": index["_class_name"]}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"--model {model!r} is no diffusers pipeline: its model_index.json does not name "
                         "its class") from error


SCHEDULER_FILE = "scheduler/scheduler_config.json"
SCHEDULER = FlowMatchEulerDiscreteScheduler.__name__
# Options that change what a pipeline draws, each with the one value that `sampler.rollout` reproduces.
SCHEDULER_OPTIONS = {
    "num_train_timesteps": 1000, "stochastic_sampling": False,
    "invert_sigmas": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "use_flow_sigmas": False}


def check_scheduler(model: str, entry: list | None, file: Path | None) -> None:
    """Raise ValueError in one line if a rollout without noise would not draw what the pipeline draws.

    entry: what model_index.json says of the scheduler, [library, class]. file: the pipeline's SCHEDULER_FILE.
    """
    try:
        options = json.loads(file.read_text()) if file else None
        kinds = {entry[1], options.get("_class_name", entry[1])}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"--model {model!r} has no scheduler: model_index.json does not name its class, or "
                         f"{SCHEDULER_FILE} is missing or no JSON object; save the pipeline again") from error
    if kinds != {SCHEDULER}:
        kind = next(kind for kind in kinds if kind != SCHEDULER)
        raise ValueError(
            f"--model {model!r} has the scheduler {kind}, which draws otherwise than training samples: only "
            f"{SCHEDULER} is supported; set pipe.scheduler = {SCHEDULER}.from_config(pipe.scheduler.config) "
            "and save the pipeline")
    parameters = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
    options = {name: parameter.default for name, parameter in parameters.items()} | options

    def need(name: str, good: bool, needed: str) -> None:
        if not good:
            raise ValueError(f"--model {model!r}: its scheduler's {name} is {options[name]!r}, which is not "
                             f"supported; set it to {needed} in {SCHEDULER_FILE}")

    for name, needed in SCHEDULER_OPTIONS.items():
        value = options.get(name, needed)
        need(name, value == needed or not (value or needed), json.dumps(needed))
    finite = lambda value: type(value) in (int, float) and abs(value) < math.inf
    if options["use_dynamic_shifting"]:
        for name in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
            need(name, finite(options[name]), "a number")
        need("max_image_seq_len", options["base_image_seq_len"] != options["max_image_seq_len"],
             "a number above base_image_seq_len")
        need("time_shift_type", options["time_shift_type"] in ("exponential", "linear"),
             '"exponential" or "linear"')
    else:
        need("shift", finite(options["shift"]) and options["shift"] > 0, "a number above 0")
    terminal = options["shift_terminal"] or 0          # None, False and 0 all turn an option off
    need("shift_terminal", finite(terminal) and 0 <= terminal < 1, "null or a number between 0 and 1")


def load_pipeline(family: type[Family], model: str, device: torch.device, dtypes: dict[str, torch.dtype]
                  ) -> DiffusionPipeline:
    """Load a pipeline from a directory or the hub, or make random:NAME on `device`.

    dtypes: those of "transformer" and "vae", and the "default" of other parts. Weights may be in safetensors
    or .bin files, in full or in half precision. Raises ValueError in one line, also if a file lacks weights.
    """
    if model.startswith("random:"):
        return random_pipeline(family, model.removeprefix("random:"), device, dtypes)
    index = read_index(model)
    # Pass None for the parts that the index leaves out, because diffusers would miss them.
    parts = {name: None for name, entry in index.items() if entry == [None, None]}
    parts |= load_text_encoders(model, index, dtypes["default"])
    pipe = load_or_refuse(diffusers_class(family.pipeline).from_pretrained, model, dtype=dtypes, **parts)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            # diffusers leaves the weights that a file lacks on the meta device.
            refuse_missing(model, name, [key for key, weight in part.named_parameters() if weight.is_meta])
        elif name.startswith("tokenizer") and part is not None:
            tokenizer = getattr(part, "tokenizer", part)             # a processor holds one
            # A tokenizer without its vocabulary takes every word for the unknown token.
            if tokenizer("a").input_ids == tokenizer("b").input_ids:
                refuse_missing(model, name, ["its vocabulary"])
    return pipe


def load_text_encoders(model: str, index: dict, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Load transformers' networks, and see that tokenizers have settings. Raises ValueError in one line.

    The pipeline does not load them itself, because it would drop transformers' report of the weights that a
    file lacks, which then have random values.
    """
    encoders = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] != "transformers":
            continue
        kind = getattr(transformers, entry[1], object)
        is_network = issubclass(kind, transformers.PreTrainedModel)
        # A part without this file would take the settings that are its class's defaults.
        settings = "config.json" if is_network else "tokenizer_config.json"
        has_settings = is_network or name.startswith("tokenizer")
        if has_settings and find_file("--model", model, f"{name}/{settings}") is None:
            refuse_missing(model, name, [settings])
        if is_network:
            encoders[name], report = load_or_refuse(
                kind.from_pretrained, model, subfolder=name, dtype=dtype, output_loading_info=True)
            # Embeddings do not come from the head, so a file may leave it out.
            missing = (key for key in report["missing_keys"] if not key.startswith("lm_head."))
            refuse_missing(model, name, sorted(missing))
    return encoders


def refuse_missing(model: str, part: str, missing: list[str]) -> None:
    """Raise ValueError in one line if there is anything missing."""
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"--model {model!r} is not whole: its {part} lacks {', '.join(missing[:3])}{more}; "
                         "fetch its files again")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU, the CPU or one of their libraries ran out of memory."""
    signs = ("out of memory", "allocate memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def load_or_refuse(load: Callable, model: str, **settings):
    """Load files of full precision, or where there are none those of half precision. ValueError in one line.

    An error of too little memory stays what it is, because the files are not its cause.
    """
    errors = []
    for variant in {}, {"variant": "fp16"}:
        try:
            return load(model, **settings, **variant)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            errors.append(error)
        # A damaged file, or a part that is missing, is no reason to take other weights.
        if not re.search("no file named|does not appear to have(?!.*checkpoint index)", str(errors[0])):
            break
    part = f"{settings['subfolder']}: " if "subfolder" in settings else ""
    reason = " ".join(str(errors[0]).split())
    raise ValueError(f"--model {model!r} cannot be loaded: {part}{reason:.300}") from errors[0]


def random_pipeline(family: type[Family], name: str, device: torch.device, dtypes: dict[str, torch.dtype]
                    ) -> DiffusionPipeline:
    """Make a published architecture with random weights, always the same ones, to measure time and memory.

    It has no text encoders; `random_text` stands in for them. The parts are made on `device` and in their
    dtypes, so that no large network exists twice.
    """
    parts = dict.fromkeys([*needed_parts(family), *family.may_lack])
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(**family.scheduler)
    networks = {"transformer": (family.transformer, family.published[name]),
                "vae": (family.autoencoder, family.vae)}
    default = torch.get_default_dtype()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            for part, (kind, settings) in networks.items():
                torch.set_default_dtype(dtypes[part])
                parts[part] = diffusers_class(kind)(**settings).eval()
    finally:
        torch.set_default_dtype(default)
    return diffusers_class(family.pipeline)(**parts)


def random_text(family: Family, prompt: str, length: int, dtype: torch.dtype) -> Text:
    """Draw the text of one prompt, in the shapes of `family.encode`. A prompt always gets the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
    return family.random_text(lambda *shape: torch.randn(shape, generator=generator).to(dtype), length)


def compile_blocks(transformer: torch.nn.Module) -> None:
    """Compile each block by itself, so that all blocks of a kind share one compilation."""
    # Raise the limit, because gradients or none, the adapter or none, and each batch size are a version each.
    torch._dynamo.config.recompile_limit = 64
    for block in transformer.modules():
        if type(block).__name__ in transformer._no_split_modules:
            block.compile()
