"""Rewards: what a group of pictures is scored by, and the weighted sum that is trained on.

A reward is a callable

    reward(images, prompts, metadata) -> scores

    images    uint8 (B, H, W, 3), RGB
    prompts   list of B strings
    metadata  list of B dicts, whatever the prompt set holds beside the prompt
    scores    float32 (B,), higher is better; or (scores, metrics), metrics being name -> (B,) of numbers that are
              logged and never trained on, NaN for a picture that a metric says nothing about

`REGISTRY` names the ones below; `my_file:my_function` names one of your own, in the same form.
This file needs numpy and pillow alone: each reward imports its engine when it is built.
"""

import difflib
import functools
import importlib
import io
import math
import numbers
import os
import random
import re
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from PIL import Image


class RewardError(RuntimeError):
    """A reward that raised, or returned what is no score; one line with its name and the prompt."""


@dataclass(frozen=True)
class Options:
    """What the rewards of a process have to work with."""

    threads: int = 1                                    # CPU cores of each CPU-bound reward
    device: str = "cpu"                                 # of the networks: "cuda:0"
    batch: int = 16                                     # pictures that a network sees at once
    models: dict = field(default_factory=dict)          # a name of MODELS -> directory, file or hub id in its place

    def __post_init__(self):
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; a reward needs at least 1")
        for name in self.models:
            if name not in MODELS:
                raise ValueError(f"no reward has a model {name!r}; known: {', '.join(MODELS)}")

    def model(self, name):
        """Where the model `name` of MODELS is to be loaded from."""
        return self.models.get(name, MODELS[name])


# What networks are loaded from, unless Options.models says otherwise: hub ids
MODELS = {}


# ---------------------------------------------------------------- JPEG size


def jpeg_incompressibility(images, prompts, metadata):
    """Size of each picture as JPEG at quality 95, in 1,000 bytes. (B, H, W, 3) uint8 -> (B,) float32."""
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return np.array(sizes, np.float32)


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
        raise ValueError(f'prompt {prompt!r} has no text between double quotes, as in: a sign that says "hello"')
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
    lock = threading.Lock()  # OCR engines keep state between calls: one thread at a time

    def reward(images, prompts, metadata):
        targets = [quoted_text(prompt) for prompt in prompts]
        with lock:
            texts = read(images)
        return np.array([text_score(target, text) for target, text in zip(targets, texts, strict=True)], np.float32)

    return reward


# ---------------------------------------------------------------- OCR engines: num_threads -> read

# Pictures that the line recogniser sees at once. Always the same number, since the kernels chosen for another
# batch shape round differently: a picture's text must not depend on the batch it came in.
LINE_BATCH = 4


def _import(module, attribute, packages):
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        reason = textwrap.shorten(str(error), 200)
        raise ImportError(f"cannot import {module} ({reason}): pip install {packages}") from error


def _bgr(images):
    # PP-OCR models learnt from pictures in OpenCV's channel order.
    return np.ascontiguousarray(images[..., ::-1])


def _rapidocr_engine(num_threads, **params):
    _import("onnxruntime", "InferenceSession", "onnxruntime")  # which rapidocr does not require by itself
    RapidOCR = _import("rapidocr", "RapidOCR", "rapidocr")
    return RapidOCR(
        params={
            "Global.log_level": "error",  # a picture without text is a score of 0, not a warning
            "Global.use_cls": False,  # as the reference: text that stands on its head is not read
            "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,  # a tenth faster
            **params,
        }
    )


def rapidocr_reader(num_threads):
    """Reads scenes with rapidocr: finds the lines of text, then recognises each. Its models come in its wheel.

    (B, H, W, 3) uint8 -> B strings, the lines of a picture in reading order with a space between them.
    """
    # The limits of PaddleOCR 2.x, which the reference runs with. rapidocr's own enlarge 512 x 512 to 736 x 736:
    # twice the time.
    engine = _rapidocr_engine(num_threads, **{"Det.limit_type": "max", "Det.limit_side_len": 960})
    return lambda images: [" ".join(engine(image).txts or ()) for image in _bgr(images)]


def rapidocr_line_reader(num_threads):
    """Reads each picture as one line of text with rapidocr's recogniser, without detection: for pictures of one word.

    (B, H, W, 3) uint8 -> B strings. Pictures are scaled to a height of 48; the time grows with their width there.
    """
    # rapidocr widens a batch to its widest picture, starting from rec_img_shape. The default start, 320, is
    # mostly padding for a short word; from a square, the width follows the pictures.
    params = {"Rec.rec_img_shape": [3, 48, 48], "Rec.rec_batch_num": LINE_BATCH}
    engine = _rapidocr_engine(num_threads, **params)

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


def paddleocr_reader(num_threads):
    """Reads scenes with PaddleOCR, 3.x or 2.x, as the reference does; its models are downloaded on first use.

    (B, H, W, 3) uint8 -> B strings, the lines of a picture in reading order with a space between them.
    """
    PaddleOCR = _import("paddleocr", "PaddleOCR", "paddleocr paddlepaddle")
    if hasattr(PaddleOCR, "predict"):
        engine = PaddleOCR(
            lang="en",
            device="cpu",
            cpu_threads=num_threads,
            text_rec_score_thresh=0.5,  # what 2.x does unasked
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
        )
        return lambda images: [paddle_text(engine.predict(image)) for image in _bgr(images)]
    engine = PaddleOCR(lang="en", use_gpu=False, use_angle_cls=False, cpu_threads=num_threads, show_log=False)
    return lambda images: [paddle_text(engine.ocr(image, cls=False)) for image in _bgr(images)]


# ---------------------------------------------------------------- asking a server


@functools.cache
def _client():
    # One for the process: threads may share it, and it keeps connections open between requests.
    Limits = _import("httpx2", "Limits", "httpx2")
    return _import("httpx2", "Client", "httpx2")(limits=Limits(max_connections=None))


def post(url, *, json=None, content=None, headers=None, deadline=600.0, how_to_start=""):
    """What the server answers to a POST of `json` or of the bytes `content`: an httpx2.Response of status 2xx.

    A server that cannot be reached, or answers 429 or 5xx, is asked again, less and less often, for `deadline` seconds.
    Raises RewardError, in one line, when they are over, with the last answer and `how_to_start`; and at once for any
    other status, which asking again would not change.
    """
    client = _client()
    import httpx2

    away = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError)
    end, wait = time.monotonic() + deadline, 0.25
    while True:
        try:
            # Half of the deadline: a machine that vanished without a word is asked twice.
            response = client.post(url, json=json, content=content, headers=headers, timeout=max(deadline / 2, 0.1))
            if response.is_success:
                return response
            answer = f"{response.status_code} {response.text}"
        except away as error:
            response, answer = None, f"{type(error).__name__}: {error}"
        answer = textwrap.shorten(answer, 300)
        if response is not None and response.status_code < 500 and response.status_code != 429:
            raise RewardError(f"{url} refused the request: {answer}")
        if time.monotonic() + wait > end:
            start = f"; start it with: {how_to_start}" if how_to_start else ""
            raise RewardError(f"{url} did not answer in {deadline:g} s; the last answer was {answer}{start}")
        time.sleep(wait * random.uniform(0.5, 1))  # ranks that failed together do not come back together
        wait = min(2 * wait, 15)


# ---------------------------------------------------------------- names

# name -> factory(options) that builds the callable; nothing heavy is imported before it is called
REGISTRY = {
    "jpeg_incompressibility": lambda options: jpeg_incompressibility,
    "jpeg_compressibility": lambda options: jpeg_compressibility,
    "rapidocr": lambda options: text_reward(rapidocr_reader(options.threads)),
    "rapidocr_line": lambda options: text_reward(rapidocr_line_reader(options.threads)),
    "ocr": lambda options: text_reward(paddleocr_reader(options.threads)),
}


def _check_quoted(prompt, metadata):
    quoted_text(prompt)


# name -> check(prompt, metadata), which raises ValueError for a prompt that the reward cannot score
PROMPT_CHECKS = {name: _check_quoted for name in ("rapidocr", "rapidocr_line", "ocr")}


def import_reward(name):
    """The callable that `my_file:my_function` names; `my_file.py` may lie in the current directory.

    Raises ValueError, in one line, where the module cannot be imported, or holds no such callable.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"reward {name!r}: cannot import {module_name!r} from {os.getcwd()} ({reason})") from error
    if not hasattr(module, attribute):
        raise ValueError(f"reward {name!r}: module {module_name!r} has no {attribute!r}")
    reward = getattr(module, attribute)
    if not callable(reward):
        kind = type(reward).__name__
        raise ValueError(f"reward {name!r} is a {kind}, not a function of (images, prompts, metadata)")
    return reward


def check_reward_weights(weights):
    """Raises ValueError, in one line, unless `weights` (name -> weight) can be built. Loads no engine.

    At least one reward, every name known or importable, every weight a finite number, not all of them 0.
    """
    if not weights:
        raise ValueError(f"no reward given; known: {', '.join(REGISTRY)}, or your own as my_file:my_function")
    for name, weight in weights.items():
        if ":" in name:
            import_reward(name)
        elif name not in REGISTRY:
            close = difflib.get_close_matches(name, REGISTRY, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ";"
            known = ", ".join(REGISTRY)
            raise ValueError(f"unknown reward {name!r}{hint} known: {known}, or your own as my_file:my_function")
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} is {weight!r}; it must be a finite number")
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


# ---------------------------------------------------------------- the weighted dict


def build_rewards(weights, **options):
    """The `Rewards` of a dict name -> weight, its engines built; keywords are the fields of `Options`.

    Raises ValueError as `check_reward_weights` does, and ImportError for a package that is not installed.
    """
    check_reward_weights(weights)
    options = Options(**options)
    components = {name: import_reward(name) if ":" in name else REGISTRY[name](options) for name in weights}
    return Rewards(weights, components)


class Rewards:
    """Several rewards and their weighted sum. May be called from any thread."""

    def __init__(self, weights, components):
        """`weights`: name -> number; `components`: name -> reward callable, the same names."""
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.components = components

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
        scores = {}
        for name, reward in self.components.items():
            scores |= component_scores(name, reward, images, prompts, metadata)
        scores["total"] = sum(self.weights[name] * scores[name] for name in self.components)
        return scores


def component_scores(name, reward, images, prompts, metadata):
    """What one reward says: {name: scores} and its metrics, made sure of: what is wrong is a RewardError, never a score.

    Accepts whatever numpy reads as B real numbers, and a torch tensor on any device.
    """
    batch = f"for a batch of {len(prompts)} that starts with prompt {prompts[0]!r}"

    def numbers_of(what, values):
        if hasattr(values, "detach"):  # a torch tensor, without importing torch
            values = values.detach().cpu().double()
        values = np.asarray(values)
        if values.shape != (len(prompts),) or values.dtype.kind not in "biuf":
            found = f"{values.dtype} of shape {values.shape}"
            raise RewardError(f"reward {name!r} returned {found}{what}, not numbers of shape ({len(prompts)},), {batch}")
        return values.astype(np.float32)

    try:
        scores = reward(images, prompts, metadata)
        scores, metrics = scores if isinstance(scores, tuple) and len(scores) == 2 and isinstance(scores[1], dict) else (scores, {})
        scores = numbers_of("", scores)
        metrics = {f"{name}/{metric}": numbers_of(f" as metric {metric!r}", values) for metric, values in metrics.items()}
    except RewardError:
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise RewardError(f"reward {name!r} failed {batch}: {reason}") from error
    for score, prompt in zip(scores, prompts):
        if not math.isfinite(score):
            raise RewardError(f"reward {name!r} is {score} for prompt {prompt!r}")
    return {name: scores} | metrics
