"""Rewards: what a group of pictures is scored by, and the weighted sum that is trained on.

A reward is a callable

    reward(images, prompts, metadata) -> scores

    images    uint8 (B, H, W, 3), RGB
    prompts   list of B strings
    metadata  list of B dicts, whatever the prompt set holds beside the prompt
    scores    float32 (B,), higher is better; or (scores, metrics), metrics being name -> (B,) of numbers that are
              logged and never trained on, NaN for a picture that a metric says nothing about

`REGISTRY` names the ones below; `my_file:my_function` names one of your own, in the same form.
This file needs numpy and pillow alone: each reward imports its engine when it is built. So a copy of it serves a reward
from an environment or a machine of its own:

    python rewards.py serve geneval --port 18085
    build_rewards({"geneval": 1.0}, urls={"geneval": "http://host:18085"})
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import copy
import difflib
import functools
import hmac
import importlib
import importlib.util
import inspect
import io
import json
import logging
import math
import numbers
import os
import pickle
import pickletools
import queue
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, UnidentifiedImageError


def cut(line, width):
    """At most `width` characters: of a longer line, its beginning and its end."""
    return line if len(line) <= width else f"{line[: width // 2]} ... {line[5 - width // 2 :]}"


def brief(text, width):
    """One line of at most `width` characters."""
    return cut(" ".join(str(text).split()), width)


class RewardError(RuntimeError):
    """A reward that raised, or returned what is no score; one line with its name and the prompt."""


class NonFiniteScore(RewardError):
    """A score that is no number, or infinite."""


@dataclass(frozen=True)
class Options:
    """What the rewards of a process have to work with."""

    threads: int = 1                                    # CPU cores of each CPU-bound reward
    device: str = "cpu"                                 # of the networks: "cuda:0"
    batch: int = 16                                     # pictures that a network sees at once
    models: dict = field(default_factory=dict)          # a name of MODELS -> directory, file or hub id in its place
    urls: dict = field(default_factory=dict)            # name -> where: http://, pickle+http://, openai+http://
    deadline: float = 600.0                             # seconds for which a server without an answer is asked again
    max_unanswered: float = 0.1                         # share of a judge's answers that may lack a score
    trust_remote_code: bool = False                     # whether DeQA may run the code that its hub repository holds

    def __post_init__(self):
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; a reward needs at least 1")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; a network needs at least 1 picture")
        if not 0 <= self.max_unanswered <= 1:
            raise ValueError(f"max_unanswered is {self.max_unanswered}; a share lies between 0 and 1")
        if not self.deadline > 0:
            raise ValueError(f"deadline is {self.deadline}; a server needs some seconds to answer")
        for name in self.models:
            if name not in MODELS:
                raise ValueError(f"no reward has a model {name!r}; known: {', '.join(MODELS)}")

    def model(self, name):
        """Where the model `name` of MODELS is to be loaded from."""
        return self.models.get(name, MODELS[name])


# What networks are loaded from, unless Options.models says otherwise: hub ids, "repository:file" on the hub,
# a name that the reward's own package knows, or "" for the model of its choice
MODELS = {
    "ocr.detection": "",
    "ocr.recognition": "",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "pickscore.processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "clipscore": "openai/clip-vit-large-patch14",
    "aesthetic.clip": "openai/clip-vit-large-patch14",
    "aesthetic": "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",  # LAION's sac+logos+ava1-l14-linearMSE.pth
    "imagereward": "ImageReward-v1.0",
    "deqa": "zhiyuanyou/DeQA-Score-Mix3",
    "qwenvl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "unifiedreward": "CodeGoat24/UnifiedReward-7b-v1.5",
    "geneval": "facebook/mask2former-swin-small-coco-instance",
    "geneval.clip": "openai/clip-vit-large-patch14",
}


# ---------------------------------------------------------------- workers


def shared_out(workers, share, most_bytes=math.inf):
    """A reward that gives `share` pictures of a batch at a time to whichever of its `workers`, rewards too, is free.

    Fewer where they are over `most_bytes`. Each worker has one call at a time. A picture's score does not depend on the
    number of workers, if it does not on the other pictures of its share.
    """
    free = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)
    threads = ThreadPoolExecutor(len(workers))

    def score(part):
        worker = free.get()
        try:
            return worker(*part)
        finally:
            free.put(worker)

    def reward(images, prompts, metadata):
        size = int(max(1, min(share, most_bytes // max(1, images[0].nbytes))))
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        return joined(list(threads.map(score, [(images[part], prompts[part], metadata[part]) for part in parts])))

    return reward


def joined(answers):
    """What a reward said of the parts of a batch, as of the whole; a metric is NaN where a part does not have it."""
    scores, metrics = zip(*(answer if isinstance(answer, tuple) else (answer, {}) for answer in answers))
    names = dict.fromkeys(name for part in metrics for name in part)
    absent = [np.full(len(part), np.nan, np.float32) for part in scores]
    joint = {name: np.concatenate([part.get(name, nan) for part, nan in zip(metrics, absent)]) for name in names}
    return (np.concatenate(scores), joint) if joint else np.concatenate(scores)


# ---------------------------------------------------------------- code of a user's own


def read_random_streams():
    """The states of the global random streams of `random`, numpy and, where it is loaded, torch, by name."""
    states = {"random": random.getstate(), "numpy": np.random.get_state()}
    if torch := sys.modules.get("torch"):
        states["torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def write_random_streams(states):
    """Set the global random streams to what `read_random_streams` returned."""
    torch = sys.modules.get("torch")
    writers = {"random": random.setstate, "numpy": np.random.set_state}
    if torch:
        writers |= {"torch": torch.set_rng_state, "cuda": torch.cuda.set_rng_state_all}
    for name, state in states.items():
        writers[name](state)


class OwnRandomStreams:
    """Within `with`, the global random streams are the rewards' own: what they seed or draw moves nobody else's.

    Several threads may be within at once. The first to enter puts the process's states aside, and the last to leave
    puts them back, because the streams are global and threads would otherwise restore each other's states. So the
    streams are untouched whenever no reward runs. A thread that draws from them beside a running reward draws from the
    rewards' streams; the trainer draws from generators of its own. The rewards' streams go on from call to call.
    """

    def __init__(self):
        self.lock, self.inside, self.outer, self.own = threading.Lock(), 0, {}, {}

    def __enter__(self):
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.outer = read_random_streams()
                write_random_streams(self.own)

    def __exit__(self, *error):
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.own = read_random_streams()
                write_random_streams(self.outer)


own_random_streams = OwnRandomStreams()


class HeldStream:
    """Stands for a text stream. It keeps what is written in its first 5 seconds until `release`, then it is the stream.

    A file that parses a command line at its import would otherwise print a usage, and then fail. The limit is there
    because a file may also load a model at its import, whose progress somebody waits for. A plain io.StringIO would not
    do, because a logging handler that is made at an import keeps the stream for good.
    """

    def __init__(self, stream):
        self.stream, self.held, self.until = stream, [], time.monotonic() + 5

    def write(self, text):
        if self.held is not None and time.monotonic() < self.until:
            self.held.append(text)
            return len(text)
        self.release(show=True)
        return self.stream.write(text)

    def release(self, show):
        """Stop keeping; write what was kept to the stream where `show` says so. Returns it."""
        held, self.held = "".join(self.held or ()), None
        if show and held:
            self.stream.write(held)
        return held

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def importing(what):
    """A user's file is imported within; whatever it raises, SystemExit too, is a ValueError: `what` and the reason.

    Its random draws, torch's gradient mode and torch's default dtype stay its own.
    """
    streams, torch = (sys.stdout, sys.stderr), sys.modules.get("torch")
    settings = (torch.is_grad_enabled(), torch.get_default_dtype()) if torch else ()
    sys.stdout, sys.stderr = held = [HeldStream(stream) for stream in streams]
    failed = True
    try:
        with own_random_streams:
            yield
        failed = False
    except KeyboardInterrupt:  # Ctrl-C, since imports run in the main thread
        raise
    except BaseException as error:
        lines = [line for stream in held for line in "".join(stream.held or ()).splitlines() if line.strip()]
        printed = f"; it printed {lines[-1]!r}" if lines and isinstance(error, SystemExit) else ""
        reason = brief(f"{type(error).__name__}: {error}{printed}", 300)
        raise ValueError(f"{what} ({reason})") from error
    finally:
        sys.stdout, sys.stderr = streams
        for stream in held:
            stream.release(show=not failed)
        if settings:
            torch.set_grad_enabled(settings[0])
            torch.set_default_dtype(settings[1])


# ---------------------------------------------------------------- JPEG size


def jpeg(image, **how):
    """A JPEG file of `image`, (H, W, 3) uint8, as pillow writes it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", **how)
    return file.getvalue()


def jpeg_incompressibility(images, prompts, metadata):
    """Size of each picture as JPEG at quality 95, in 1,000 bytes. (B, H, W, 3) uint8 -> (B,) float32."""
    return np.array([len(jpeg(image, quality=95)) / 1000 for image in images], np.float32)


def jpeg_compressibility(images, prompts, metadata):
    """Minus the JPEG size over 500: a picture of 500,000 bytes scores -1. (B, H, W, 3) uint8 -> (B,) float32."""
    return -jpeg_incompressibility(images, prompts, metadata) / 500


# ---------------------------------------------------------------- text rendering


def quoted_text(prompt):
    """What stands between the first pair of double quotes of `prompt`: the text that its picture should show.

    Raises ValueError, naming the prompt, where there is no such pair or nothing but space in it.
    """
    quoted = re.search(r'"([^"]*)"', prompt)
    if quoted is None or not quoted[1].strip():
        shown = cut(repr(prompt), 200)
        raise ValueError(f'prompt {shown} has no text between double quotes, as in: a sign that says "hello"')
    return quoted[1]


def edit_distance(a, b):
    """Levenshtein distance of two strings: the fewest insertions, deletions and substitutions between them."""
    distances = list(range(len(b) + 1))
    for i, char_a in enumerate(a, 1):
        previous, distances = distances, [i]
        for j, char_b in enumerate(b, 1):
            distances.append(min(previous[j] + 1, distances[-1] + 1, previous[j - 1] + (char_a != char_b)))
    return distances[-1]


def text_score(target, recognised):
    """The text reward of Flow-GRPO (arXiv 2505.05470), in [0, 1]; case and spaces do not count.

        1                                                    where the target occurs in the recognised text
        1 - min(edit distance, len(target)) / len(target)    elsewhere

    Raises ValueError for an empty target.
    """
    target, recognised = ("".join(text.lower().split()) for text in (target, recognised))
    if not target:
        raise ValueError("the target of a text reward is empty")
    if target in recognised:
        return 1.0
    return 1 - min(edit_distance(target, recognised), len(target)) / len(target)


def text_reward(read):
    """The reward that scores each prompt's quoted text against what `read(images) -> B strings` finds.

    Returned as a callable of this file's form; its ValueError is that of `quoted_text`.
    """

    def reward(images, prompts, metadata):
        targets = [quoted_text(prompt) for prompt in prompts]
        texts = read(images)
        return np.array([text_score(target, text) for target, text in zip(targets, texts, strict=True)], np.float32)

    return reward


def text_workers(make_reader, count, share):
    """A text reward of `count` engines, that are given `share` pictures at a time."""
    return shared_out([text_reward(make_reader()) for _ in range(count)], share)


# ---------------------------------------------------------------- OCR engines, one for each worker

# Pictures that the line recogniser sees at once. Always the same number, since the kernels chosen for another
# batch shape round differently: a picture's text must not depend on the batch it came in.
LINE_BATCH = 4


def _import(module, attribute, packages):
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a package built for another version of what it needs raises more than ImportError
        reason = brief(error, 200)
        raise ImportError(f"cannot import {module} ({reason}): pip install {packages}") from error


def _bgr(images):
    # PP-OCR models learnt from pictures in OpenCV's channel order.
    return np.ascontiguousarray(images[..., ::-1])


def _rapidocr_engine(**params):
    _import("onnxruntime", "InferenceSession", "onnxruntime")  # which rapidocr does not require by itself
    RapidOCR = _import("rapidocr", "RapidOCR", "rapidocr")
    return RapidOCR(
        params={
            "Global.log_level": "error",  # a picture without text is a score of 0, not a warning
            "Global.use_cls": False,  # as the reference: text that stands on its head is not read
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,  # a tenth faster
            **params,
        }
    )


def rapidocr_reader():
    """Reads scenes with rapidocr: finds the lines of text, then recognises each. Its models come in its wheel.

    (B, H, W, 3) uint8 -> B strings, the lines of a picture in reading order with a space between them.
    """
    # The limits of PaddleOCR 2.x, which the reference runs with. rapidocr's own enlarge 512 x 512 to 736 x 736:
    # twice the time.
    engine = _rapidocr_engine(**{"Det.limit_type": "max", "Det.limit_side_len": 960})
    return lambda images: [" ".join(engine(image).txts or ()) for image in _bgr(images)]


def rapidocr_line_reader():
    """Reads each picture as one line of text with rapidocr's recogniser, without detection: for pictures of one word.

    (B, H, W, 3) uint8 -> B strings. Pictures are scaled to a height of 48; the time grows with their width there.
    """
    # rapidocr widens a batch to its widest picture, starting from rec_img_shape. The default start, 320, is
    # mostly padding for a short word; from a square, the width follows the pictures.
    params = {"Rec.rec_img_shape": [3, 48, 48], "Rec.rec_batch_num": LINE_BATCH}
    engine = _rapidocr_engine(**params)

    def read(images):
        padding = -len(images) % LINE_BATCH
        lines = [*_bgr(images), *[np.zeros_like(images[0])] * padding]
        return list(engine.recognize_txt(lines).txts[: len(images)])

    return read


def paddle_text(result):
    """The text in what PaddleOCR returns for one picture, line by line with a space between.

    3.x: `[{"rec_texts": [text, ...], ...}]`. 2.x: `[[[box, (text, score)], ...]]`, or `[None]` where there is no text.
    """
    page = result[0]
    if isinstance(page, dict):
        return " ".join(page["rec_texts"])
    return " ".join(text for _, (text, _) in page or ())


def _paddle_model(kind, model):
    # PaddleOCR refuses a directory without the name of what is in it, which its inference.yml holds.
    if not os.path.isdir(model):
        return {f"text_{kind}_model_name": model} if model else {}
    safe_load = _import("yaml", "safe_load", "pyyaml")
    with open(os.path.join(model, "inference.yml"), encoding="utf-8") as file:
        name = safe_load(file)["Global"]["model_name"]
    return {f"text_{kind}_model_dir": model, f"text_{kind}_model_name": name}


def paddleocr_reader(detection="", recognition=""):
    """Reads scenes with PaddleOCR, 3.x or 2.x, as the reference does.

    (B, H, W, 3) uint8 -> B strings, the lines of a picture in reading order with a space between them. `detection`,
    `recognition`: directories of models or, in 3.x, names of PaddleOCR's own; without them, PaddleOCR downloads those
    for English. 3.x runs on paddlepaddle or, where that is not installed or a model is an .onnx, on onnxruntime.
    """
    PaddleOCR = _import("paddleocr", "PaddleOCR", "paddleocr paddlepaddle")
    if hasattr(PaddleOCR, "predict"):
        models = _paddle_model("detection", detection) | _paddle_model("recognition", recognition)
        engine = {"cpu_threads": 1}
        onnx = [model for model in (detection, recognition) if model and os.path.isfile(f"{model}/inference.onnx")]
        if onnx or importlib.util.find_spec("paddle") is None:
            _import("onnxruntime", "InferenceSession", "onnxruntime")
            engine = {"engine": "onnxruntime", "engine_config": {"intra_op_num_threads": 1}}
        reader = PaddleOCR(
            **(models or {"lang": "en"}),
            **engine,
            device="cpu",
            text_rec_score_thresh=0.5,  # what 2.x does unasked
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
        )
        return lambda images: [paddle_text(reader.predict(image)) for image in _bgr(images)]
    models = {"det_model_dir": detection or None, "rec_model_dir": recognition or None}
    reader = PaddleOCR(
        lang="en", use_gpu=False, use_angle_cls=False, cpu_threads=1, show_log=False, **models
    )
    return lambda images: [paddle_text(reader.ocr(image, cls=False)) for image in _bgr(images)]


# ---------------------------------------------------------------- networks in this process


@contextlib.contextmanager
def _loading(name, source):
    """Whatever goes wrong in loading the model `name` of MODELS from `source` becomes one line that names both."""
    try:
        yield
    except Exception as error:  # of any type: a hub id that does not exist, a file that breaks off, a missing package
        reason = brief(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"cannot load the model {name!r} from {source!r} ({reason})") from error


def _pretrained(name, kind, options, **arguments):
    """The model `name` of MODELS, or what prepares its inputs, loaded by the class `kind` of transformers."""
    loader = _import("transformers", kind, "transformers torch")
    with _loading(name, options.model(name)):
        return loader.from_pretrained(options.model(name), **arguments)


def network_reward(score, options):
    """The reward of a network: `score(pictures, prompts) -> (b,) tensor` is asked for at most `options.batch` at once.

    `pictures` are PIL's: where an array is 3 high or wide, transformers would have to guess which axis the colours are.
    """
    torch = importlib.import_module("torch")
    lock = threading.Lock()  # tokenizers keep state between calls: one thread at a time

    def reward(images, prompts, metadata):
        scores = []
        with lock, torch.inference_mode():
            for start in range(0, len(images), options.batch):
                pictures = [Image.fromarray(image) for image in images[start : start + options.batch]]
                scores += score(pictures, list(prompts[start : start + options.batch])).tolist()
        return np.array(scores, np.float32)

    return reward


def clip_reward(model, processor, scale, options):
    """exp(logit_scale) cos(image, prompt) / scale, of CLIP's two embeddings; a prompt is cut to CLIP's 77 tokens.

    `model`, `processor`: names of MODELS. In float32, as the reference.
    """
    network = _pretrained(model, "CLIPModel", options, dtype="float32").to(options.device).eval()
    processor = _pretrained(processor, "CLIPProcessor", options)
    tokens = network.config.text_config.max_position_embeddings

    def score(pictures, prompts):
        texts = {"padding": True, "truncation": True, "max_length": tokens}
        inputs = processor(images=pictures, text=prompts, return_tensors="pt", **texts).to(options.device)
        outputs = network(**inputs)  # its embeddings are of length 1
        return network.logit_scale.exp() * (outputs.image_embeds * outputs.text_embeds).sum(-1) / scale

    return network_reward(score, options)


def pickscore(options):
    """PickScore (arXiv 2305.01569) over 26, as the reference scales it."""
    return clip_reward("pickscore", "pickscore.processor", 26, options)


def clipscore(options):
    """The similarity of picture and prompt that CLIP ViT-L/14 (arXiv 2103.00020) was trained by, over 30."""
    return clip_reward("clipscore", "clipscore", 30, options)


def _tensors(name, options):
    """The tensors by name in a file of weights, which is not trusted to hold anything else.

    The model `name` of MODELS is a path or, on the hub, repository:file.
    """
    path = options.model(name)
    with _loading(name, path):
        if not os.path.exists(path):
            repository, _, file = path.partition(":")
            if not file:
                raise FileNotFoundError("there is no such file, and on the hub it would be repository:file")
            path = _import("huggingface_hub", "hf_hub_download", "huggingface_hub")(repository, file)
        if path.endswith(".safetensors"):
            return _import("safetensors.torch", "load_file", "safetensors")(path)
        return _import("torch", "load", "torch")(path, map_location="cpu", weights_only=True)


def aesthetic(options):
    """LAION's aesthetic predictor, improved: about 1 to 10, from the direction of CLIP ViT-L/14's image embedding."""
    weights = _tensors("aesthetic", options)
    names = [(f"layers.{i}.weight", f"layers.{i}.bias") for i in (0, 2, 4, 6, 7)]  # between them, dropout alone
    missing = [name for pair in names for name in pair if name not in set(weights)]
    if missing:
        raise ValueError(f"{options.model('aesthetic')!r} does not hold LAION's aesthetic predictor: no {missing[0]!r}")
    layers = [[weights[name].float().to(options.device) for name in pair] for pair in names]
    network = _pretrained("aesthetic.clip", "CLIPModel", options, dtype="float32").to(options.device).eval()
    processor = _pretrained("aesthetic.clip", "CLIPProcessor", options)
    functional = importlib.import_module("torch.nn.functional")

    def score(pictures, prompts):
        inputs = processor(images=pictures, return_tensors="pt").to(options.device)
        embeds = functional.normalize(network.get_image_features(**inputs).pooler_output)
        for weight, bias in layers:
            embeds = functional.linear(embeds, weight, bias)
        return embeds.squeeze(-1)

    return network_reward(score, options)


def imagereward(options):
    """ImageReward (arXiv 2304.05977) of each picture with its own prompt, which is cut to 35 tokens.

    The model may be a directory that holds the hub repository's ImageReward.pt and med_config.json.
    """
    own = (
        "image-reward and what it needs (see the README) into an environment of its own, since it does not run beside "
        "transformers 5, and serve it from there: python rewards.py serve imagereward"
    )
    load = _import("ImageReward", "load", own)
    source = options.model("imagereward")
    files = {"name": source}
    if os.path.isdir(source):
        files = {"name": f"{source}/ImageReward.pt", "med_config": f"{source}/med_config.json"}
    with _loading("imagereward", source):
        network = load(**files, device=options.device)
    torch = importlib.import_module("torch")

    def score(pictures, prompts):
        # The package's own `score` would rank a list of pictures for one prompt.
        texts = {"padding": "max_length", "truncation": True, "max_length": 35}
        tokens = network.blip.tokenizer(prompts, return_tensors="pt", **texts).to(options.device)
        pixels = torch.stack([network.preprocess(picture) for picture in pictures]).to(options.device)
        return network.score_gard(tokens.input_ids, tokens.attention_mask, pixels).squeeze(-1)

    return network_reward(score, options)


def deqa(options):
    """DeQA-Score (arXiv 2501.11561) over 5: the technical quality of a picture, whatever the prompt.

    The network is code that its repository on the hub holds: it runs only where `options.trust_remote_code` allows it.
    """
    source = options.model("deqa")
    if not options.trust_remote_code:
        raise ValueError(f"reward 'deqa' runs code that {source!r} holds: read it, then set trust_remote_code (--trust-remote-code)")
    dtype = _import("torch", "float16" if options.device.startswith("cuda") else "float32", "torch")
    arguments = {"trust_remote_code": True, "attn_implementation": "eager", "torch_dtype": dtype}
    network = _pretrained("deqa", "AutoModelForCausalLM", options, **arguments).to(options.device).eval()
    return network_reward(lambda pictures, prompts: network.score(pictures).float() / 5, options)


# ---------------------------------------------------------------- asking a server


@functools.cache
def _client():
    # One for the process: threads may share it, and it keeps connections open between requests.
    Limits = _import("httpx2", "Limits", "httpx2")
    return _import("httpx2", "Client", "httpx2")(limits=Limits(max_connections=None))


def post(url, *, json=None, content=None, headers=None, deadline=600.0, how_to_start=""):
    """What the server answers to a POST of `json` or of the bytes `content`: an httpx2.Response of status 2xx.

    A server that cannot be reached, or answers 5xx, is asked again, less and less often, for `deadline` seconds; one
    that answers 500, which is a failure of its own, three times in all. Raises RewardError, in one line with the last
    answer and `how_to_start`, when that is over; and at once for any other status, which another try would not change.
    """
    client = _client()
    import httpx2

    away = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError)
    end, wait, failures, silent = time.monotonic() + deadline, 0.25, 0, True
    while True:
        try:
            # At most half of the deadline: a machine that vanished without a word is asked twice.
            timeout = max(min(deadline / 2, end - time.monotonic()), 0.1)
            response = client.post(url, json=json, content=content, headers=headers, timeout=timeout)
            if response.is_success:
                return response
            answer = brief(f"{response.status_code} {response.text}", 400)
            failures += response.status_code == 500
            if response.status_code < 500:
                raise RewardError(f"{url} refused the request: {answer}")
            if failures == 3:
                raise RewardError(f"{url} failed {failures} times; the last answer was {answer}")
        except away as error:
            answer = brief(f"{type(error).__name__}: {error}", 400)
        left = end - time.monotonic()
        if left <= 0:
            start = f"; start it with: {how_to_start}" if how_to_start else ""
            raise RewardError(f"{url} did not answer in {deadline:g} s; the last answer was {answer}{start}")
        if silent and deadline - left > 3:
            print(f"waiting up to {left:.0f} s more for {url}: {answer}", file=sys.stderr, flush=True)
            silent = False
        time.sleep(min(wait * random.uniform(0.5, 1), left))  # ranks that failed together do not come back together
        wait = min(2 * wait, 15)


# ---------------------------------------------------------------- judges: models that answer in words

# Tokens in which a judge has to come to its score
ANSWER_TOKENS = 2048

# A score from 1 to 5, perhaps as "4/5" or "**4**", and not the beginning of 45, 4/10 or 3-4
SCORE = re.compile(
    r"[\s*]*([1-5](?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*5(?:\.0+)?)?"
    r"(?!\w|[.,][0-9]|\s*(?:/|%|out of)|\s*(?:-|–|to|or|of)\s*[0-9])"
)

QUALITY_QUESTION = """You judge the aesthetic quality of a picture, on this scale:
1. Bad: blurred beyond recognition, noisy, far too dark, a chaos of a composition.
2. Poor: visibly blurred, badly lit, pale colours, an awkward composition that cuts its subject off.
3. Fair: sharp and well enough lit, but dull in colour; the composition is sound and has no idea of its own.
4. Good: sharp, well exposed, vivid colours, a thoughtful composition that leads the eye to its subject.
5. Excellent: outstandingly clear, perfectly exposed, rich in colour, a masterly composition that moves the viewer.

First weigh the picture by these criteria in detail, within a <Thought> tag; then give it a score from 1 to 5 within a \
<Score> tag:
<Thought>
your reasoning
</Thought>
<Score>X</Score>"""

ALIGNMENT_QUESTION = """You are given a text caption and a picture that was generated from it. Judge the picture by:
1. Alignment with the caption: whether the objects it names are there, with their attributes and relations.
2. Overall image quality: how clear and detailed it is, how true its colours are, and how pleasing it is as a whole.
From both, give a score from 1 to 5 after 'Final Score:'.
Text Caption: [{prompt}]"""

# What stands where a judge's score should
QWENVL_SCORE = r"(?i)<Score>([^<]*)</Score>"
UNIFIED_SCORE = r"(?i)Final Score\s*\**\s*:\s*(.*)"


def judged(answer, pattern):
    """The score in a judge's `answer`, from 1 to 5: what stands where `pattern` last matches; None without one."""
    found = re.findall(pattern, answer)
    score = SCORE.match(found[-1]) if found else None
    return float(score[1]) if score and float(score[1]) <= 5 else None


def judge_reward(name, ask, pattern, options):
    """The reward of a judge: its score over 5. Metric `unanswered`: 1 where it gave none, though asked twice.

    `ask(images, prompts, temperature) -> B answers`; `pattern` finds the score in one. A picture without a score gets
    the mean of those with its prompt, so that it has no advantage over them, or else of the last 1,000 pictures. Raises
    RewardError, with the last answer, where more than the allowed share of these have no score, or all.
    """
    lock = threading.Lock()
    recent = collections.deque(maxlen=1000)  # scores, NaN for none

    def reward(images, prompts, metadata):
        answers = ask(images, prompts, 0)
        scores = np.array([judged(answer, pattern) for answer in answers], float)  # None becomes NaN
        missing = np.flatnonzero(np.isnan(scores))
        if len(missing):  # again, and not at temperature 0, where the answer would be the same
            answers = ask(images[missing], [prompts[i] for i in missing], 0.7)
            scores[missing] = [judged(answer, pattern) for answer in answers]
        silent = np.isnan(scores)
        with lock:
            recent.extend(scores)
            known = np.array(recent)
        known, asked = known[~np.isnan(known)], len(known)
        # Of fewer than ten pictures, one may be without a score: a share would say little.
        if silent.any() and (not len(known) or asked - len(known) > options.max_unanswered * max(asked, 10)):
            last = answers[np.flatnonzero(silent[missing])[-1]]
            raise RewardError(
                f"reward {name!r}: no score from 1 to 5 for {asked - len(known)} of the last {asked} pictures "
                f"(max_unanswered is {options.max_unanswered:.0%}); the last answer is {brief(last, 200)!r}"
            )
        texts = np.array(prompts, object)
        for i in np.flatnonzero(silent):
            same = scores[~silent & (texts == prompts[i])]
            scores[i] = same.mean() if len(same) else known.mean()
        return scores / 5, {"unanswered": silent.astype(np.float32)}

    return reward


def openai_judge(name, question, options):
    """`ask` of `judge_reward` through an OpenAI-compatible server (vLLM, sglang), up to 64 pictures at once.

    `question(prompt)` is what is asked of each. The server's key, if it wants one, is in OPENAI_API_KEY.
    """
    address, model = options.urls.get(name, ""), options.model(name)
    if not address.startswith(("openai+http://", "openai+https://")):
        needs = f"reward {name!r} needs a server, as openai+http://host:port/v1, not {address!r}"
        raise ValueError(f"{needs}; one is: vllm serve {model}")
    _client()  # so that a missing package is found now
    url = address.removeprefix("openai+").rstrip("/") + "/chat/completions"
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    threads = ThreadPoolExecutor(64)

    def answer(image, prompt, temperature):
        picture = "data:image/png;base64," + base64.b64encode(png(image)).decode()
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question(prompt)}]
        messages = [{"role": "user", "content": content}]
        request = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": ANSWER_TOKENS}
        start = f"vllm serve {model}"
        response = post(url, json=request, headers=headers, deadline=options.deadline, how_to_start=start)
        try:
            return response.json()["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError) as error:
            said = brief(response.text, 200)
            raise RewardError(f"{url} is no OpenAI-compatible server: it answered {said!r}") from error

    def ask(images, prompts, temperature):
        return list(threads.map(answer, images, prompts, [temperature] * len(images)))

    return ask


def qwenvl(options):
    """Qwen2.5-VL's grade of a picture's aesthetic quality, whatever the prompt, over 5.

    In this process by transformers, or through an OpenAI-compatible server where `options.urls` has one.
    """
    if "qwenvl" in options.urls:
        ask = openai_judge("qwenvl", lambda prompt: QUALITY_QUESTION, options)
        return judge_reward("qwenvl", ask, QWENVL_SCORE, options)
    _import("torchvision", "ops", "torchvision")  # which transformers needs for this model's processor
    dtype = "bfloat16" if options.device.startswith("cuda") else "float32"
    network = _pretrained("qwenvl", "Qwen2_5_VLForConditionalGeneration", options, dtype=dtype)
    network.to(options.device).eval()
    processor = _pretrained("qwenvl", "AutoProcessor", options)
    content = [{"type": "image"}, {"type": "text", "text": QUALITY_QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    lock = threading.Lock()
    torch = importlib.import_module("torch")

    def ask(images, prompts, temperature):
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        answers = []
        with lock, torch.inference_mode():
            for start in range(0, len(images), options.batch):
                pictures = [Image.fromarray(image) for image in images[start : start + options.batch]]
                inputs = processor(
                    images=pictures, text=[text] * len(pictures), padding=True, padding_side="left", return_tensors="pt"
                ).to(options.device)
                tokens = network.generate(**inputs, max_new_tokens=ANSWER_TOKENS, **sampling)
                answers += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    return judge_reward("qwenvl", ask, QWENVL_SCORE, options)


def unifiedreward(options):
    """UnifiedReward's grade (arXiv 2503.05236) of a picture's alignment with its prompt and of its quality, over 5.

    Through an OpenAI-compatible server, which `options.urls` has to name.
    """
    ask = openai_judge("unifiedreward", lambda prompt: ALIGNMENT_QUESTION.format(prompt=prompt), options)
    return judge_reward("unifiedreward", ask, UNIFIED_SCORE, options)


# ---------------------------------------------------------------- GenEval: objects, counts, colours, positions

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_CLASSES = tuple(name.strip() for name in """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush
    """.split(","))
GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # COCO's -> its own
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_COLOR_PROMPTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")
GENEVAL_CONFIDENCE, GENEVAL_COUNTING_CONFIDENCE = 0.3, 0.9  # an object counts above it; the second under tag counting
GENEVAL_MAX_OBJECTS = 16  # of a class


@dataclass(eq=False)
class Detection:
    """An object in a picture."""

    name: str  # of GENEVAL_CLASSES
    confidence: float
    box: tuple  # x0, y0, x1, y1 in pixels, y downwards, x1 and y1 just outside
    mask: np.ndarray = None  # bool (H, W): which pixels it has
    color: str = None  # of GENEVAL_COLORS; the rules need that of `geneval_color_asked` only


def geneval_check(prompt, metadata):
    """Raises ValueError, in one line with the prompt and the value, unless `metadata` is what GenEval can judge."""

    def needs(what, value, way_out=""):
        shown, found = cut(repr(prompt), 200), cut(repr(value), 200)
        return ValueError(f"prompt {shown}: GenEval's metadata needs {what}, not {found}{way_out}")

    tag, include, exclude = metadata.get("tag"), metadata.get("include"), metadata.get("exclude", [])
    way_out = '; give prompts as GenEval objects in a .jsonl file, or the built-in set "geneval"'
    if tag not in GENEVAL_TAGS:
        raise needs(f'a "tag", one of {", ".join(GENEVAL_TAGS)}', tag, way_out)
    if not isinstance(include, list) or not include:
        raise needs('"include", a list of at least one object', include, way_out)
    if not isinstance(exclude, list):
        raise needs('"exclude" to be a list of objects, or left out', exclude)
    for key, clause in [("include", clause) for clause in include] + [("exclude", clause) for clause in exclude]:
        if not isinstance(clause, dict):
            raise needs(f'objects with "class" and "count" in its "{key}"', clause)
        name, count = clause.get("class"), clause.get("count")
        if name not in GENEVAL_CLASSES:
            close = difflib.get_close_matches(str(name), GENEVAL_CLASSES, n=1)
            close = GENEVAL_NAMES.get(str(name)) or "".join(close)
            way_out = f"; did you mean {close!r}?" if close else f"; known: {', '.join(GENEVAL_CLASSES)}"
            raise needs(f'a "class" that GenEval knows in its "{key}"', name, way_out)
        if type(count) is not int or count < 1:
            raise needs(f'a "count" of {name!r} that is a whole number, at least 1', count)
    for index, clause in enumerate(include):
        name, color, position = clause["class"], clause.get("color"), clause.get("position")
        if "color" in clause and color not in GENEVAL_COLORS:
            raise needs(f'a "color" of {name!r} out of {", ".join(GENEVAL_COLORS)}', color)
        if "position" in clause:
            if not isinstance(position, (list, tuple)) or len(position) != 2:
                raise needs(f'a "position" of {name!r} that is [relation, index of its target]', position)
            relation, target = position
            if relation not in GENEVAL_RELATIONS:
                raise needs(f"a relation of {name!r} out of {', '.join(GENEVAL_RELATIONS)}", relation)
            if type(target) is not int or not 0 <= target < index:
                raise needs(f'a target of {name!r} that is the index, from 0, of an earlier entry of "include"', target)


def geneval_objects(detections, metadata):
    """What counts as seen: {class name: its detections above the tag's confidence, best first, at most 16}."""
    least = GENEVAL_COUNTING_CONFIDENCE if metadata["tag"] == "counting" else GENEVAL_CONFIDENCE
    objects = {}
    for detection in sorted(detections, key=lambda detection: -detection.confidence):
        if detection.confidence > least:
            objects.setdefault(detection.name, []).append(detection)
    return {name: found[:GENEVAL_MAX_OBJECTS] for name, found in objects.items()}


def geneval_color_asked(detections, metadata):
    """The detections whose colour `geneval_score` looks at."""
    objects = geneval_objects(detections, metadata)
    asked = []
    for clause in metadata["include"]:
        found = objects.get(clause["class"], [])
        if "color" in clause and len(found) >= clause["count"]:
            asked += found[: clause["count"]]
    return asked


def geneval_relations(box, target):
    """Where `box` stands seen from `target`, out of GENEVAL_RELATIONS: none, one, or two on a diagonal."""
    corners, target_corners = np.reshape(box, (2, 2)), np.reshape(target, (2, 2))  # (2 corners, x and y)
    offset = corners.mean(0) - target_corners.mean(0)
    margin = 0.1 * (np.ptp(corners, axis=0) + np.ptp(target_corners, axis=0))
    reduced = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0)
    if np.all(np.abs(reduced) < 1e-3):
        return set()
    dx, dy = reduced / np.linalg.norm(offset)
    return {name for name, along in zip(GENEVAL_RELATIONS, (-dx, dx, -dy, dy)) if along > 0.5}


def _geneval_attributes(clause, objects, groups):
    # The terms, in [0, 1], of the clause's colour and position, for exactly as many objects as it wants. `groups`:
    # the objects of each earlier clause that is met, [] of one that is not: a position without its target is wrong.
    terms = []
    if "color" in clause:
        # 1 - |wanted - with that colour| / wanted
        terms.append(sum(each.color == clause["color"] for each in objects) / len(objects))
    if "position" in clause:
        # The correction: the reference code gives a wrong position its 0, and then a stray 1, a second term beside it.
        relation, target = clause["position"]
        pairs = [(each.box, other.box) for each in objects for other in groups[target]]
        terms.append(float(bool(pairs) and all(relation in geneval_relations(*pair) for pair in pairs)))
    return terms


def geneval_score(detections, metadata):
    """GenEval's judgement (arXiv 2310.11513) of a picture's detections: (score, strict, accuracy).

        score       what Flow-GRPO (arXiv 2505.05470) trains on, the mean over terms. Each clause of `include` gives
                    1 - |wanted - found| / wanted, which a crowd makes negative. Where the count is exact, a colour
                    gives 1 - |wanted - with that colour| / wanted, and a position 1 or 0: whether each object stands
                    so to each of its target, a clause that is itself met. Where it is not, one 0 for both
        strict      1.0 where every clause is exactly right, 0.0 elsewhere; then score and accuracy are 1 too
        accuracy    the benchmark's, 1.0 or 0.0: at least the count, the `count` most confident objects rightly
                    coloured and placed

    Strict and accuracy both want fewer than `count` of what `exclude` names. `metadata` as `geneval_check` demands.
    """
    objects = geneval_objects(detections, metadata)
    terms, exact_groups, best_groups = [], [], []  # groups: the objects of each clause, [] where it is not met
    for clause in metadata["include"]:
        found, wanted = objects.get(clause["class"], []), clause["count"]
        terms.append(1 - abs(wanted - len(found)) / wanted)
        if len(found) == wanted:
            attributes = _geneval_attributes(clause, found, exact_groups)
        else:
            attributes = [0.0] if "color" in clause or "position" in clause else []
        terms += attributes
        exact_groups.append(found if len(found) == wanted and all(term == 1 for term in attributes) else [])
        best = found[:wanted]
        met = len(best) == wanted and all(term == 1 for term in _geneval_attributes(clause, best, best_groups))
        best_groups.append(best if met else [])
    allowed = all(len(objects.get(clause["class"], [])) < clause["count"] for clause in metadata.get("exclude", []))
    return sum(terms) / len(terms), float(allowed and all(exact_groups)), float(allowed and all(best_groups))


def geneval_detector(options):
    """images (B, H, W, 3) uint8 -> for each a list of its Detections above GENEVAL_CONFIDENCE, by Mask2Former."""
    packages = "torch transformers scipy"
    _import("scipy.optimize", "linear_sum_assignment", packages)  # without which transformers builds no Mask2Former
    functional = _import("torch.nn", "functional", packages)
    processor = _pretrained("geneval", "Mask2FormerImageProcessor", options)
    network = _pretrained("geneval", "Mask2FormerForUniversalSegmentation", options).to(options.device).eval()
    labels = network.config.id2label
    names = [GENEVAL_NAMES.get(labels[index], labels[index]) for index in range(len(labels))]

    def detect(images):
        inputs = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt").to(options.device)
        outputs = network(**inputs)
        probabilities = outputs.class_queries_logits.softmax(-1)[..., :-1]  # (B, queries, classes); the last: nothing
        return [objects(*each, images.shape[1:3]) for each in zip(probabilities, outputs.masks_queries_logits)]

    def objects(probabilities, mask_logits, size):
        # As transformers' post_process_instance_segmentation, overlapping instances whole, 384 x 384 pixels first; but
        # on the network's device, for the few queries alone that can pass: a mask takes from its class's confidence.
        confidence, index = probabilities.flatten().topk(len(probabilities))
        confidence, index = confidence[confidence > GENEVAL_CONFIDENCE], index[confidence > GENEVAL_CONFIDENCE]
        if not len(index):
            return []
        query, label = index // len(names), index % len(names)
        logits = functional.interpolate(mask_logits[query][None], size=(384, 384), mode="bilinear")[0]  # (N, 384, 384)
        inside = (logits > 0).float()
        confidence = confidence * (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        masks = functional.interpolate(inside[None], size=size)[0].bool().cpu().numpy()  # (N, H, W), of nearest pixels
        found = []
        for name, score, mask in zip([names[i] for i in label.tolist()], confidence.tolist(), masks):
            (ys,), (xs,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
            if score > GENEVAL_CONFIDENCE and len(xs):
                box = int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
                found.append(Detection(name, score, box, mask))
        return found

    detect.names = frozenset(names)
    return detect


def geneval_color_reader(options):
    """list of (image (H, W, 3) uint8, Detection) -> each one's colour, zero-shot by CLIP: a list of GENEVAL_COLORS."""
    normalize = _import("torch.nn.functional", "normalize", "torch transformers")
    processor = _pretrained("geneval.clip", "CLIPProcessor", options)
    network = _pretrained("geneval.clip", "CLIPModel", options).to(options.device).eval()

    @functools.cache
    def color_features(name):
        texts = [prompt.format(color, name) for color in GENEVAL_COLORS for prompt in GENEVAL_COLOR_PROMPTS]
        inputs = processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(options.device)
        features = normalize(network.get_text_features(**inputs).pooler_output, dim=-1)
        return normalize(features.unflatten(0, (len(GENEVAL_COLORS), -1)).mean(1), dim=-1)  # (colours, D)

    def crop(image, detection):
        x0, y0, x1, y1 = detection.box
        mask = detection.mask[y0:y1, x0:x1, None]
        return Image.fromarray(np.where(mask, image[y0:y1, x0:x1], np.uint8(0x99)))  # what is not the object turns grey

    def colors(pairs):
        found = []
        for start in range(0, len(pairs), options.batch):
            chunk = pairs[start : start + options.batch]
            inputs = processor(images=[crop(*pair) for pair in chunk], return_tensors="pt").to(options.device)
            features = network.get_image_features(**inputs).pooler_output  # (B, D); their norms choose no colour
            for (_, detection), feature in zip(chunk, features):
                found.append(GENEVAL_COLORS[(color_features(detection.name) @ feature).argmax()])
        return found

    return colors


def geneval_reward(options):
    """GenEval's score of each picture by Mask2Former and CLIP; metadata as `geneval_check` demands, else ValueError.

    Metrics: strict_accuracy, accuracy, and accuracy/<tag>, which is NaN for the pictures of another tag.
    """
    detect, colors = geneval_detector(options), geneval_color_reader(options)
    import torch

    lock = threading.Lock()  # tokenizers keep state between calls: one thread at a time

    def judge(images, metadata):
        detections = detect(images)
        asked = [
            (image, detection)
            for image, found, each in zip(images, detections, metadata)
            for detection in geneval_color_asked(found, each)
        ]
        for (_, detection), color in zip(asked, colors(asked)):
            detection.color = color
        return [geneval_score(found, each) for found, each in zip(detections, metadata)]

    def reward(images, prompts, metadata):
        for prompt, each in zip(prompts, metadata, strict=True):
            geneval_check(prompt, each)
            for clause in each["include"] + each.get("exclude", []):
                if clause["class"] not in detect.names:
                    model, name = options.model("geneval"), clause["class"]
                    raise ValueError(f"{model} does not know {name!r}; give geneval a detector of COCO's 80 classes")
        rows = []
        with lock, torch.inference_mode():
            for start in range(0, len(images), options.batch):
                part = slice(start, start + options.batch)
                rows += judge(images[part], metadata[part])
        scores, strict, accuracy = np.array(rows, np.float32).T
        tags = np.array([each["tag"] for each in metadata])
        by_tag = {f"accuracy/{tag}": np.where(tags == tag, accuracy, np.nan) for tag in GENEVAL_TAGS}
        return scores, {"strict_accuracy": strict, "accuracy": accuracy} | by_tag

    return reward


# ---------------------------------------------------------------- names

# name -> factory(options) that builds the callable; nothing heavy is imported before it is called
REGISTRY = {
    "jpeg_incompressibility": lambda options: shared_out([jpeg_incompressibility] * options.threads, 8),
    "jpeg_compressibility": lambda options: shared_out([jpeg_compressibility] * options.threads, 8),
    "rapidocr": lambda options: text_workers(rapidocr_reader, options.threads, 1),
    "rapidocr_line": lambda options: text_workers(rapidocr_line_reader, options.threads, LINE_BATCH),
    "ocr": lambda options: text_workers(
        lambda: paddleocr_reader(options.model("ocr.detection"), options.model("ocr.recognition")), options.threads, 1
    ),
    "pickscore": pickscore,
    "clipscore": clipscore,
    "aesthetic": aesthetic,
    "imagereward": imagereward,
    "deqa": deqa,
    "qwenvl": qwenvl,
    "unifiedreward": unifiedreward,
    "geneval": geneval_reward,
}


def _check_quoted(prompt, metadata):
    quoted_text(prompt)


# name -> check(prompt, metadata), which raises ValueError for a prompt that the reward cannot score
PROMPT_CHECKS = {name: _check_quoted for name in ("rapidocr", "rapidocr_line", "ocr")} | {"geneval": geneval_check}


def import_reward(name):
    """The callable that `my_file:my_function` names; `my_file.py` may lie in the current directory.

    Raises ValueError, in one line, where the module cannot be imported, or holds no such callable.
    """
    module_name, _, attribute = name.partition(":")
    module_name = module_name.removesuffix(".py")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with importing(f"reward {name!r}: cannot import {module_name!r} from {os.getcwd()}"):
        module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise ValueError(f"reward {name!r}: module {module_name!r} has no {attribute!r}")
    reward = getattr(module, attribute)
    if not callable(reward):
        kind = type(reward).__name__
        raise ValueError(f"reward {name!r} is a {kind}, not a function of (images, prompts, metadata)")
    return reward


def check_reward_weights(weights, urls={}):
    """Raises ValueError, in one line, unless `weights` (name -> weight) can be built. Loads no engine.

    At least one reward, every name known, importable or served elsewhere (`urls`: name -> URL), every weight a finite
    number, not all of them 0.
    """
    if not weights:
        raise ValueError(f"no reward given; known: {', '.join(REGISTRY)}, or your own as my_file:my_function")
    for name, weight in weights.items():
        if is_remote(name, urls):
            pass  # its server knows it
        elif ":" in name:
            import_reward(name)
        elif name not in REGISTRY:
            close = difflib.get_close_matches(name, REGISTRY, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ";"
            known = ", ".join(REGISTRY)
            raise ValueError(f"unknown reward {name!r}{hint} known: {known}, or your own as my_file:my_function")
        if not isinstance(weight, numbers.Real) or not abs(weight) <= sys.float_info.max:
            raise ValueError(f"the weight of reward {name!r} is {weight!r}; it must be a finite number")
    check_reward_urls(weights, urls)
    if not any(weights.values()):
        raise ValueError(f"every reward weight is 0 ({', '.join(weights)}); give at least one another value")


def check_reward_prompts(weights, prompts, metadata):
    """Raises ValueError, in one line with the reward and the prompt, for the first prompt that a reward cannot score.

    Loads no engine. `weights`: name -> weight; `prompts`, `metadata`: lists of the same length.
    """
    for name in weights:
        check = PROMPT_CHECKS.get(name)
        if check is None:
            continue
        for prompt, prompt_metadata in zip(prompts, metadata, strict=True):
            try:
                check(prompt, prompt_metadata)
            except ValueError as error:
                raise ValueError(f"reward {name!r}: {error}") from error


# ---------------------------------------------------------------- rewards that are served elsewhere

IN_FLIGHT = 4  # requests of one reward at once: pictures travel while others are scored
REQUEST_BYTES = 1 << 26  # of pixels in one request, far below what a server takes

ENCODING = threading.Lock()  # one request at a time, so that the first is on its way soon

PICKLED = ("geneval", "deqa")  # what existing reward-servers score; they are asked, and answer, in pickles
JUDGES = ("qwenvl", "unifiedreward")  # what an OpenAI-compatible server is asked for


def is_remote(name, urls):
    """Whether another process computes the whole reward; those behind openai+http:// are computed here, by asking."""
    return name in urls and not urls[name].startswith("openai+")


def check_reward_urls(weights, urls):
    """Raises ValueError, in one line, for a URL that no reward is asked at."""
    for name, url in urls.items():
        if name not in weights:
            raise ValueError(f"reward {name!r} has a URL, {url!r}, but no weight; those with one: {', '.join(weights)}")
        try:
            good = urlsplit(url).hostname and urlsplit(url).port != 0  # which raises for what is no port
        except ValueError:
            good = False
        if not good or not re.fullmatch(r"(pickle\+|openai\+)?https?://[^\s/?#]+(/[^\s?#]*)?", url):
            schemes = "http://, https://, pickle+http:// or openai+http://"
            raise ValueError(f"reward {name!r} cannot be asked at {url!r}; a URL starts with {schemes} and a host")
        for scheme, names in (("pickle+", PICKLED), ("openai+", JUDGES)):
            if url.startswith(scheme) and name not in names:
                raise ValueError(f"reward {name!r} cannot be asked at {url!r}; {scheme} is for {' and '.join(names)}")


def remote_reward(name, url, options):
    """The reward `name` as the server at `url` computes it, in this file's form."""
    scheme, _, address = url.rpartition("+")
    ask = ask_pickle_server if scheme == "pickle" else ask_server
    workers = [functools.partial(ask, name, address, options.deadline)] * IN_FLIGHT
    return shared_out(workers, options.batch, REQUEST_BYTES)


def png(image):
    """A PNG file of `image`, (H, W, 3) uint8. Not compressed, as networks are faster than zlib and pillow's filters."""
    height, width, _ = image.shape
    rows = np.insert(image.reshape(height, 3 * width), 0, 0, axis=1)  # each row begins with its filter, 0: none
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),  # 8 bits of red, green and blue
        (b"IDAT", zlib.compress(rows.tobytes(), 0)),
        (b"IEND", b""),
    ]
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        file += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return file


def understood(url, count, read, content):
    """(scores, metrics) of `count` pictures, as `read(content)` finds them in an answer; otherwise a RewardError."""

    def column(values):
        numbers = np.asarray([math.nan if value is None else value for value in values])
        if numbers.shape != (count,) or numbers.dtype.kind not in "biuf":
            raise ValueError(f"{numbers.dtype} of shape {numbers.shape}")
        return numbers.astype(np.float32)

    try:
        scores, metrics = read(content)
        return column(scores), {metric: column(values) for metric, values in metrics.items()}
    except Exception as error:
        reason = brief(f"{type(error).__name__}: {error}", 300)
        raise RewardError(f"{url} answered something else than scores of {count} pictures ({reason})") from error


@functools.cache  # once
def warn_of_name(url, served, name):
    warning = f"warning: {url} serves the reward {served!r}, which goes here by the name {name!r}"
    print(warning, file=sys.stderr, flush=True)


def ask_server(name, url, deadline, images, prompts, metadata):
    """Scores and metrics from `python rewards.py serve`, which is shown the environment's REWARD_TOKEN."""
    token, server = os.environ.get("REWARD_TOKEN"), urlsplit(url)
    with ENCODING:
        # Base64 needs no quoting; json.dumps would look at every letter for some that do.
        pictures = b'", "'.join(base64.b64encode(png(image)) for image in images)
    words = json.dumps(list(prompts)).encode(), json.dumps(list(metadata)).encode()
    answer = post(
        f"{url.rstrip('/').removesuffix('/score')}/score",
        content=b'{"images": ["%b"], "prompts": %b, "metadata": %b}' % (pictures, *words),
        headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}".encode()} if token else {}),
        deadline=deadline,
        how_to_start=f"python rewards.py serve {name} --host {server.hostname} --port {server.port or 'PORT'}",
    )

    if (served := answer.headers.get("X-Reward", name)) != name:
        warn_of_name(url, served, name)

    def read(content):
        answer = json.loads(content)
        return answer["scores"], answer["metrics"]

    return understood(url, len(images), read, answer.content)


def ask_pickle_server(name, url, deadline, images, prompts, metadata):
    """Scores and metrics from the reward-server that Flow-GRPO (arXiv 2505.05470) trains with: GenEval's or DeQA's."""
    request = {"images": [jpeg(image) for image in images]}  # of pillow's quality, 75, as its own client does
    if name == "geneval":
        # Its rules read the prompt in the metadata. Strict judgement alone would save it little, and accuracy be lost.
        request["meta_datas"] = [{"prompt": prompt, **entry} for prompt, entry in zip(prompts, metadata)]
        request["only_strict"] = False
    how_to_start = f'gunicorn "app_{name}:create_app()" in its checkout'
    answer = post(url, content=pickle.dumps(request, 4), deadline=deadline, how_to_start=how_to_start)

    def read(content):
        answer = read_plain_pickle(content)
        if name == "deqa":
            return answer["outputs"], {}
        metrics = {"strict_accuracy": answer["strict_rewards"], "accuracy": answer["rewards"]}
        for kind, key in (("strict_accuracy", "group_strict_rewards"), ("accuracy", "group_rewards")):
            for tag, values in answer[key].items():  # -10 marks a picture of another tag
                metrics[f"{kind}/{tag}"] = [None if value == -10 else value for value in values]
        return answer["scores"], metrics

    return understood(url, len(images), read, answer.content)


def read_plain_pickle(data):
    """What `data`, a pickle, holds: plain containers, numbers, strings, and numpy scalars, which come as plain ones.

    Raises ValueError for a pickle that names anything else, and calls nothing that it names.
    """
    # Data alone can end a process too: hashing a tuple takes the C stack to its depth, a memo all memory to its index.
    tuples, large = 0, len(data) > 1 << 20
    for opcode, argument, _ in [] if large else pickletools.genops(data):
        tuples += opcode.name.startswith("TUPLE")
        large |= tuples > 10_000 or "PUT" in opcode.name and argument > len(data)
    if large:
        raise ValueError("the pickle is larger, or wants more memory, than scores need: refused")

    class Dtype:  # in the place of numpy.dtype
        def __init__(self, kind, *_):
            self.kind, self.order = kind, "|"

        def __setstate__(self, state):
            self.order = state[1]

    def scalar(dtype, content):
        name = f"{dtype.order}{dtype.kind}"
        if not re.fullmatch(r"[<>|]([biu][1248]|f[248]|U\d{1,4})", name):
            raise ValueError(f"the pickle holds a numpy scalar of type {name!r}: refused")
        return np.frombuffer(content, name, count=1)[0].item()

    admitted = {
        ("numpy", "dtype"): Dtype,
        ("numpy.core.multiarray", "scalar"): scalar,  # numpy 1
        ("numpy._core.multiarray", "scalar"): scalar,  # numpy 2
        ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),  # bytes, as protocols 0 to 2 have them
        **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
    }

    class PlainUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in admitted:
                raise ValueError(f"the pickle asks for {module}.{name}, which is no plain data: refused, and not run")
            return admitted[module, name]

    return PlainUnpickler(io.BytesIO(data)).load()


# ---------------------------------------------------------------- the weighted dict


def build_rewards(weights, start_thread=None, **options):
    """The `Rewards` of a dict name -> weight, its engines built; keywords are the fields of `Options`.

    Raises ValueError as `check_reward_weights` does, and ImportError for a package that is not installed.
    """
    options = Options(**options)
    check_reward_weights(weights, options.urls)
    return Rewards(weights, {name: build_reward(name, options) for name in weights}, start_thread)


def build_reward(name, options):
    """The callable of one reward: here, or its server's. What fails is a ValueError, ImportError or OSError."""
    try:
        with own_random_streams:
            if is_remote(name, options.urls):
                return remote_reward(name, options.urls[name], options)
            return import_reward(name) if ":" in name else REGISTRY[name](options)
    except (ValueError, ImportError, OSError, KeyboardInterrupt):
        raise
    except BaseException as error:  # of a device that is not there, or too small; of sys.exit
        reason = brief(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"reward {name!r} cannot be built ({reason})") from error


class Rewards:
    """Several rewards, computed side by side, and their weighted sum. May be called from any thread."""

    def __init__(self, weights, components, start_thread=None):
        """`weights`: name -> number; `components`: name -> reward callable, the same names.

        `start_thread`: called first in each thread that runs rewards. The current GPU is each thread's own, so a trainer
        sets it there, for rewards that say "cuda" and no number.
        """
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.components = components
        self.start_thread = start_thread
        # torch.from_numpy warns of the read-only pictures; it writes to a copy at most, see component_scores.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        self.threads = ThreadPoolExecutor(len(components), initializer=start_thread)

    def subset(self, weights):
        """The same components under other weights; those that `weights` does not name are left out."""
        return Rewards(weights, {name: self.components[name] for name in weights}, self.start_thread)

    def __call__(self, images, prompts, metadata):
        """Each component's raw scores by name, its metrics as "name/metric", and "total", sum_i weight_i score_i.

        All are (B,) float32; only metrics may be NaN. `images`: (B, H, W, 3) uint8; `prompts`, `metadata`: lists of
        length B >= 1. Raises ValueError for other inputs, and RewardError where a component raises or does not return
        B finite numbers.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            found = f"{images.dtype} {tuple(images.shape)}" if hasattr(images, "shape") else type(images).__name__
            raise ValueError(f"images must be a numpy array, uint8 (B, H, W, 3), not {found}")
        if not 1 <= len(images) == len(prompts) == len(metadata):
            counts = f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata"
            raise ValueError(f"a batch needs as many images as prompts and metadata, at least 1, not {counts}")
        batch = images, prompts, metadata
        scores = {}
        with own_random_streams:
            for columns in self.threads.map(lambda item: component_scores(*item, *batch), self.components.items()):
                scores |= columns
        scores["total"] = sum(self.weights[name] * scores[name] for name in self.components)
        return scores

    def probe(self, prompt, metadata, height, width):
        """Score one plain grey picture, so that a reward that cannot work is a RewardError now, not after hours."""
        self(np.full((1, height, width, 3), 128, np.uint8), [prompt], [metadata])


def component_scores(name, reward, images, prompts, metadata):
    """What one reward says: {name: scores} and its metrics. What is wrong with it is a RewardError, never a score.

    The reward gets copies of everything, so that nothing that it does reaches the kept pictures or another reward. Its
    pictures are read-only besides, so that one that writes is told so. Accepts whatever numpy reads as B real numbers,
    and a torch tensor on any device.
    """
    batch = f"for a batch of {len(prompts)} that starts with prompt {brief(repr(prompts[0]), 80)}"
    images, prompts, metadata = images.copy(), list(prompts), copy.deepcopy(list(metadata))
    images.flags.writeable = False
    columns, metrics = {}, {}
    try:
        said = reward(images, prompts, metadata)
        if isinstance(said, tuple) and len(said) == 2 and isinstance(said[1], dict):
            said, metrics = said
        for column, values in [(name, said), *((f"{name}/{metric}", values) for metric, values in metrics.items())]:
            if hasattr(values, "detach"):  # a torch tensor, without importing torch
                values = values.detach().cpu().double()
            columns[column] = np.asarray(values)
    except RewardError:
        raise
    except BaseException as error:  # sys.exit and KeyboardInterrupt too: they are the reward's, and end no run
        reason = brief(f"{type(error).__name__}: {error}", 300)
        if re.search("read-?only", reason):
            reason += "; the pictures that a reward gets cannot be written to, work on images.copy()"
        raise RewardError(f"reward {name!r} failed {batch}: {reason}") from error
    for column, values in columns.items():
        if values.shape != (len(prompts),) or values.dtype.kind not in "biuf":
            found = f"{values.dtype} of shape {values.shape}"
            if values.dtype == object and not values.ndim:
                found = name_of_kind(values.item())
            raise RewardError(f"reward {column!r} returned {found}, not numbers of shape ({len(prompts)},), {batch}")
        columns[column] = values.astype(np.float32)
    for score, prompt in zip(columns[name], prompts):
        if not math.isfinite(score):
            raise NonFiniteScore(f"reward {name!r} is {score} for prompt {brief(repr(prompt), 80)}")
    return columns


def name_of_kind(value):
    """What `value`, which a reward returned in place of numbers, is to be called."""
    if inspect.iscoroutine(value):
        value.close()  # without which Python warns that nobody awaited it
        return "a coroutine (write it with def, not async def)"
    return "None" if value is None else f"a {type(value).__name__}"


# ---------------------------------------------------------------- python rewards.py serve

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # of pictures; all without an outside program
LONGEST, SLENDEREST = 8192, 64  # side of a picture in pixels, and over the other side: text readers enlarge the shorter
BODIES = 4  # requests that are read and decoded at once; others wait in the network
READ_SECONDS = 60  # for the body of a request to come


class TooLarge(ValueError):
    """A request beyond what the server holds for one."""


def decode_pictures(encoded_pictures, limit):
    """Base64 picture files -> list of uint8 (H, W, 3), of any sizes. Losslessly, where they are RGB of 8 bits.

    Raises ValueError, naming the picture, for what is no whole picture; TooLarge beyond `limit` bytes when decoded.
    """
    images, size = [], 0
    for number, encoded_picture in enumerate(encoded_pictures):
        try:
            picture = Image.open(io.BytesIO(base64.b64decode(encoded_picture, validate=True)), formats=FORMATS)
            (width, height), mode = picture.size, picture.mode
            long, short = max(width, height), min(width, height)
            if not 1 <= long <= min(LONGEST, SLENDEREST * short):
                shapes = f"sides are 1 to {LONGEST} pixels, and one at most {SLENDEREST} times the other"
                raise ValueError(f"it is {width} x {height}; {shapes}")
            if mode[0] in "IF":
                raise ValueError(f"its pixels are of mode {mode}; send 8 bits a channel")
            size += 3 * width * height
            if size > limit:
                raise TooLarge(f"with picture {number} it decodes to more than {limit >> 20} MB; send fewer at once")
            images.append(np.array(picture.convert("RGB")))
        except TooLarge:
            raise
        except UnidentifiedImageError as error:
            raise ValueError(f"picture {number} is no picture of {', '.join(FORMATS)}") from error
        except Exception as error:  # of whatever kind a decoder raises on what is no picture
            reason = brief(error, 200) or type(error).__name__
            raise ValueError(f"picture {number} cannot be used: {reason}") from error
    return images


@dataclass(eq=False)
class Part:
    """Pictures of one request and one size, waiting for their scores."""

    images: np.ndarray      # (B, H, W, 3) uint8
    prompts: list
    metadata: list
    rows: list              # where they stand in their request
    scores: Future = field(default_factory=Future)      # of what component_scores returns


class Scorer:
    """One thread that scores what many requests bring, first come first served, and merges what fits into a batch."""

    def __init__(self, name, reward, batch, max_waiting, max_bytes):
        self.name, self.reward, self.batch = name, reward, batch
        self.max_waiting, self.max_bytes = max_waiting, max_bytes
        self.waiting = collections.deque()
        self.held, self.held_bytes, self.scored = 0, 0, 0       # pictures that wait or are being scored, and that were
        self.changed = threading.Condition()
        threading.Thread(target=self.work, daemon=True).start()

    def put(self, parts):
        """Queue all parts of a request, or raise queue.Full. An empty queue takes a request of any size."""
        count, size = sum(len(part.images) for part in parts), sum(part.images.nbytes for part in parts)
        with self.changed:
            full = self.held + count > self.max_waiting or self.held_bytes + size > self.max_bytes
            if self.held and full:
                raise queue.Full
            self.held, self.held_bytes = self.held + count, self.held_bytes + size
            self.waiting.extend(parts)
            self.changed.notify()

    def take(self):
        """The oldest part, and younger ones of its size as long as they fit into a batch with it."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting)
            first, left = self.waiting.popleft(), collections.deque()
            taken, count = [first], len(first.images)
            for part in self.waiting:
                fits = part.images.shape[1:] == first.images.shape[1:] and count + len(part.images) <= self.batch
                (taken if fits else left).append(part)
                count += len(part.images) * fits
            self.waiting = left
        return taken

    def score(self, parts):
        images = np.concatenate([part.images for part in parts])
        prompts, metadata = (sum((getattr(part, name) for part in parts), []) for name in ("prompts", "metadata"))
        scores = component_scores(self.name, self.reward, images, prompts, metadata)
        ends = np.cumsum([len(part.images) for part in parts])[:-1]
        columns = {name: np.split(values, ends) for name, values in scores.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(parts))]

    def outcomes(self, parts):
        """The scores of each part, or the error that it raises by itself: nobody fails for another's pictures."""
        try:
            return self.score(parts)
        except BaseException as error:  # also sys.exit: this thread goes on
            return [error] if len(parts) == 1 else [self.outcomes([part])[0] for part in parts]

    def work(self):
        while True:
            taken = self.take()
            parts = [part for part in taken if part.scores.set_running_or_notify_cancel()]
            outcomes = self.outcomes(parts) if parts else []
            with self.changed:
                self.held -= sum(len(part.images) for part in taken)
                self.held_bytes -= sum(part.images.nbytes for part in taken)
                self.scored += sum(len(part.images) for part in parts)
            for part, outcome in zip(parts, outcomes):
                if isinstance(outcome, BaseException):
                    part.scores.set_exception(outcome)
                else:
                    part.scores.set_result(outcome)


def make_app(name, reward, batch=16, max_request_mb=256, max_waiting=4096, token=""):
    """The FastAPI application that serves `reward` as `name`. `token`: what a client must show, if not empty."""
    FastAPI = _import("fastapi", "FastAPI", "fastapi uvicorn")
    from fastapi import HTTPException, Request, Security
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPBearer
    from pydantic import BaseModel, Field, ValidationError
    from starlette.exceptions import HTTPException as AnyHTTPException
    from starlette.requests import ClientDisconnect

    grey = base64.b64encode(png(np.full((8, 8, 3), 128, np.uint8))).decode()
    example = {"images": [grey], "prompts": ['a sign that says "hello"'], "metadata": [{}]}

    class ScoreRequest(BaseModel, extra="forbid", json_schema_extra={"examples": [example]}):
        """As many images as prompts and metadata."""

        images: list[str] = Field(min_length=1, description=f"base64 of files, of any sizes: {', '.join(FORMATS)}")
        prompts: list[Annotated[str, Field(max_length=10_000)]] = Field(min_length=1)
        metadata: list[dict] = Field(min_length=1, description="what the prompt set holds beside each prompt, or {}")

    class ScoreResponse(BaseModel):
        """A number for each image, in their order."""

        scores: list[float]
        metrics: dict[str, list[float | None]] = Field(description="null where a metric says nothing about an image")

    class Health(BaseModel):
        reward: str
        ready: bool
        waiting: int = Field(description="images that wait or are being scored")
        scored: int = Field(description="images that were scored")
        refused: int = Field(description="requests that were not answered with scores")

    class Problem(BaseModel):
        detail: str

    log = logging.getLogger("rewards")
    max_request = max_request_mb << 20
    scorer = Scorer(name, reward, batch, max_waiting, 4 * max_request)
    door = asyncio.Semaphore(BODIES)
    check = PROMPT_CHECKS.get(name, lambda prompt, metadata: None)
    app = FastAPI(title=f"The reward {name}", summary="A reward of nano-flow-grpo, for --reward-urls.", version="1")
    app.state.refused = 0

    @app.exception_handler(AnyHTTPException)
    async def refuse(request, error):
        app.state.refused += 1
        line = f"{request.method} {request.url.path} from {request.client and request.client.host}"
        log.warning("%s", brief(f"{line}: {error.status_code} {error.detail}", 300))
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    async def read_body(request):
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            chunks.append(chunk)
            if size > max_request:
                chunks.clear()
        return b"".join(chunks), size

    def parse(body):
        sent = ScoreRequest.model_validate_json(body)
        counts = len(sent.images), len(sent.prompts), len(sent.metadata)
        if len(set(counts)) > 1:
            raise ValueError("as many images as prompts and metadata are needed, not {}, {} and {}".format(*counts))
        if counts[0] > max_waiting:
            raise TooLarge(f"{counts[0]} images are more than {max_waiting}; send fewer at once")
        for prompt, metadata in zip(sent.prompts, sent.metadata):
            check(prompt, metadata)
        images, by_size = decode_pictures(sent.images, max_request), {}
        for row, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(row)
        return [Part(np.stack([images[i] for i in rows]), [sent.prompts[i] for i in rows],
                     [sent.metadata[i] for i in rows], rows) for rows in by_size.values()]

    async def receive(request):
        """The parts of a request, or an HTTPException with the status that OpenAPI lists."""
        length = request.headers.get("content-length", "")
        too_large = length.isdecimal() and int(length) > max_request
        try:
            # What is too large is read to its end and dropped, for a while: a client that is cut off sees no answer.
            body, size = await asyncio.wait_for(read_body(request), 2 if too_large else READ_SECONDS)
            too_large = size > max_request
        except asyncio.TimeoutError:
            if not too_large:
                raise HTTPException(503, f"the request did not come within {READ_SECONDS} s; ask again") from None
        except ClientDisconnect:
            raise HTTPException(400, "the client left") from None
        if too_large:
            raise HTTPException(413, f"a request has at most {max_request_mb} MB; send fewer images at once")
        try:
            return await run_in_threadpool(parse, body)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise HTTPException(422, f"{where}: {first['msg']}" if where else first["msg"]) from None
        except TooLarge as error:
            raise HTTPException(413, str(error)) from None
        except ValueError as error:
            raise HTTPException(422, brief(error, 500)) from None

    refusals = {
        400: "The client left before its request was whole, or it is no HTTP",
        401: "The bearer token is missing or another",
        413: f"More than {max_request_mb} MB, as sent or decoded, or more than {max_waiting} images",
        415: "The content type is not application/json",
        422: "Not the form described, no pictures, or prompts that this reward cannot score",
        500: "The reward failed",
        503: f"Too much waits already, or the request did not come within {READ_SECONDS} s; ask again",
    }

    @app.post(
        "/score",
        response_model=ScoreResponse,
        responses={status: {"model": Problem, "description": text} for status, text in refusals.items()},
        dependencies=[Security(HTTPBearer(auto_error=False))] if token else [],
        openapi_extra={"requestBody": {
            "required": True, "content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}}},
    )
    async def score(request: Request):
        """The score of each image, and what the reward logs beside it."""
        shown = request.headers.get("authorization", "").encode("latin-1")
        if token and not hmac.compare_digest(shown, f"Bearer {token}".encode()):
            raise HTTPException(401, "the bearer token is missing or another: set REWARD_TOKEN as at the server",
                                {"WWW-Authenticate": "Bearer"})
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the content type must be application/json")
        async with door:
            parts = await receive(request)
        try:
            scorer.put(parts)
        except queue.Full:
            raise HTTPException(503, f"{scorer.held} images wait already; ask again", {"Retry-After": "1"}) from None
        try:
            outcomes = [await asyncio.wrap_future(part.scores) for part in parts]
        except asyncio.CancelledError:
            raise HTTPException(503, "the server is being stopped") from None
        except BaseException as error:
            raise HTTPException(500, brief(error, 500)) from error
        count = sum(len(part.rows) for part in parts)
        columns = {}
        for part, outcome in zip(parts, outcomes):
            for column, values in outcome.items():
                for row, value in zip(part.rows, values.tolist()):
                    columns.setdefault(column, [None] * count)[row] = value if math.isfinite(value) else None
        scores = columns.pop(name)
        metrics = {column.removeprefix(f"{name}/"): values for column, values in columns.items()}
        return JSONResponse({"scores": scores, "metrics": metrics}, headers={"X-Reward": name})

    @app.get("/health", response_model=Health)
    async def health():
        """That the server is up, and what it has done."""
        return Health(reward=name, ready=True, waiting=scorer.held, scored=scorer.scored, refused=app.state.refused)

    return app


def serve(name, host, port, options, max_request_mb, max_waiting):
    """Serve one reward until SIGTERM or Ctrl-C. Raises ValueError, ImportError or OSError where that cannot be."""
    check_reward_weights({name: 1.0}, options.urls)
    Config, Server = (_import("uvicorn", part, "fastapi uvicorn") for part in ("Config", "Server"))
    # Bound before the reward loads: a port that is taken is an error now, and early clients wait.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=1024)
    token = os.environ.get("REWARD_TOKEN", "")
    batch = options.batch * options.threads  # all workers are busy for most of it
    app = make_app(name, build_reward(name, options), batch, max_request_mb, max_waiting, token)
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}"
    print(f"serving {name} at {address}: train.py --reward-urls {name} {address}; form and trial: {address}/docs")
    if not token and host not in ("127.0.0.1", "localhost", "::1"):
        print("warning: whoever reaches this port can use it; set REWARD_TOKEN here and where you train")
    sys.stdout.flush()
    for stop in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again once it has closed; work in hand is dropped
        signal.signal(stop, lambda *_: os._exit(0))
    Server(Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listening])


def main(arguments):
    """The command line; its exit code."""
    parser = argparse.ArgumentParser(prog="rewards.py", description="The rewards of nano-flow-grpo.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "serve", help="serve one reward over HTTP", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Environment: REWARD_TOKEN, if set, is the bearer token that clients must show.")
    command.add_argument("name", help=f"{', '.join(REGISTRY)}, or your own as my_file:my_function")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    command.add_argument("--port", type=int, default=18085, help="0 for any that is free")
    command.add_argument("--device", default="cpu", help="of networks: cuda:0")
    command.add_argument("--threads", type=int, default=1, help="CPU cores of a CPU-bound reward")
    command.add_argument("--batch", type=int, default=16, help="images scored at once, for each of the threads")
    command.add_argument("--models", nargs="+", default=[], metavar="NAME PATH", help="where models are loaded from")
    command.add_argument("--trust-remote-code", action="store_true", help="run Python files that a model brings")
    command.add_argument("--deadline", type=float, default=200.0, help="seconds for which a judge is asked again")
    command.add_argument("--max-unanswered", type=float, default=0.1, help="share of pictures a judge may not score")
    command.add_argument("--url", default="", help="where it asks in its turn: openai+http://..., pickle+http://...")
    command.add_argument("--max-request-mb", type=int, default=256, help="of a request, as sent and decoded")
    command.add_argument("--max-waiting", type=int, default=4096, help="images held at once")
    given = parser.parse_args(arguments)
    try:
        if len(given.models) % 2:
            raise ValueError(f"--models {' '.join(given.models)}: give pairs, a name and a path")
        for flag in ("max_request_mb", "max_waiting"):
            if getattr(given, flag) < 1:
                raise ValueError(f"--{flag.replace('_', '-')} is {getattr(given, flag)}; it must be at least 1")
        options = Options(
            threads=given.threads, device=given.device, batch=given.batch, deadline=given.deadline,
            max_unanswered=given.max_unanswered,
            trust_remote_code=given.trust_remote_code,
            models=dict(zip(given.models[::2], given.models[1::2])), urls={given.name: given.url} if given.url else {})
        serve(given.name, given.host, given.port, options, given.max_request_mb, given.max_waiting)
    except (ValueError, ImportError, OSError, OverflowError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
