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
import difflib
import functools
import hmac
import importlib
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
import textwrap
import threading
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, UnidentifiedImageError


class RewardError(RuntimeError):
    """A reward that raised, or returned what is no score; one line with its name and the prompt."""


@dataclass(frozen=True)
class Options:
    """What the rewards of a process have to work with."""

    threads: int = 1                                    # CPU cores of each CPU-bound reward
    device: str = "cpu"                                 # of the networks: "cuda:0"
    batch: int = 16                                     # pictures that a network sees at once
    models: dict = field(default_factory=dict)          # a name of MODELS -> directory, file or hub id in its place
    urls: dict = field(default_factory=dict)  # name -> where it is served: http://, pickle+http://, openai+http://
    deadline: float = 600.0  # seconds for which a server that does not answer is asked again
    trust_remote_code: bool = False                     # whether DeQA may run the code that its hub repository holds

    def __post_init__(self):
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; a reward needs at least 1")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; a network needs at least 1 picture")
        if not self.deadline > 0:
            raise ValueError(f"deadline is {self.deadline}; a server needs some seconds to answer")
        for name in self.models:
            if name not in MODELS:
                raise ValueError(f"no reward has a model {name!r}; known: {', '.join(MODELS)}")

    def model(self, name):
        """Where the model `name` of MODELS is to be loaded from."""
        return self.models.get(name, MODELS[name])


# What networks are loaded from, unless Options.models says otherwise: hub ids
MODELS = {}


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
    except ImportError as error:
        reason = textwrap.shorten(str(error), 200)
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
    "jpeg_incompressibility": lambda options: shared_out([jpeg_incompressibility] * options.threads, 8),
    "jpeg_compressibility": lambda options: shared_out([jpeg_compressibility] * options.threads, 8),
    "rapidocr": lambda options: text_workers(rapidocr_reader, options.threads, 1),
    "rapidocr_line": lambda options: text_workers(rapidocr_line_reader, options.threads, LINE_BATCH),
    "ocr": lambda options: text_workers(lambda: paddleocr_reader(1), options.threads, 1),
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
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
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


def is_remote(name, urls):
    """Whether another process computes the whole reward; those behind openai+http:// are computed here, by asking."""
    return name in urls and not urls[name].startswith("openai+")


def check_reward_urls(weights, urls):
    """Raises ValueError, in one line, for a URL that no reward is asked at."""
    for name, url in urls.items():
        if name not in weights:
            raise ValueError(f"reward {name!r} has a URL, {url}, but no weight; those with one: {', '.join(weights)}")
        if not re.fullmatch(r"(pickle\+|openai\+)?https?://[^\s/]+(/\S*)?", url):
            schemes = "http://, https://, pickle+http:// or openai+http://"
            raise ValueError(f"reward {name!r} cannot be asked at {url!r}; a URL starts with {schemes} and a host")
        if url.startswith("pickle+") and name not in PICKLED:
            raise ValueError(f"reward {name!r} cannot be asked at {url!r}; pickle+ is for {' and '.join(PICKLED)}")


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
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise RewardError(f"{url} answered something else than scores of {count} pictures ({reason})") from error


def ask_server(name, url, deadline, images, prompts, metadata):
    """Scores and metrics from `python rewards.py serve`, which is shown the environment's REWARD_TOKEN."""
    token, (host, _, port) = os.environ.get("REWARD_TOKEN"), url.partition("://")[2].partition("/")[0].partition(":")
    with ENCODING:
        # Base64 needs no quoting; json.dumps would look at every letter for some that do.
        pictures = b'", "'.join(base64.b64encode(png(image)) for image in images)
    words = json.dumps(list(prompts)).encode(), json.dumps(list(metadata)).encode()
    answer = post(
        f"{url.rstrip('/')}/score",
        content=b'{"images": ["%b"], "prompts": %b, "metadata": %b}' % (pictures, *words),
        headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}".encode()} if token else {}),
        deadline=deadline,
        how_to_start=f"python rewards.py serve {name} --host {host} --port {port or 80}",
    )

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
    tuples, large = 0, len(data) > 1 << 24
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
    }

    class PlainUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in admitted:
                raise ValueError(f"the pickle asks for {module}.{name}, which is no plain data: refused, and not run")
            return admitted[module, name]

    return PlainUnpickler(io.BytesIO(data)).load()


# ---------------------------------------------------------------- the weighted dict


def build_rewards(weights, **options):
    """The `Rewards` of a dict name -> weight, its engines built; keywords are the fields of `Options`.

    Raises ValueError as `check_reward_weights` does, and ImportError for a package that is not installed.
    """
    options = Options(**options)
    check_reward_weights(weights, options.urls)
    return Rewards(weights, {name: build_reward(name, options) for name in weights})


def build_reward(name, options):
    """The callable of one reward: here, or its server's."""
    if is_remote(name, options.urls):
        return remote_reward(name, options.urls[name], options)
    return import_reward(name) if ":" in name else REGISTRY[name](options)


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

    def probe(self, prompt, metadata, height, width):
        """Score one plain grey picture, so that a reward that cannot work is a RewardError now, not after hours."""
        self(np.full((1, height, width, 3), 128, np.uint8), [prompt], [metadata])


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
            reason = textwrap.shorten(f"{error}", 200) or type(error).__name__
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
            taken, left = [self.waiting.popleft()], collections.deque()
            for part in self.waiting:
                count = sum(len(other.images) for other in taken)
                fits = part.images.shape[1:] == taken[0].images.shape[1:] and count + len(part.images) <= self.batch
                (taken if fits else left).append(part)
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
        except Exception as error:
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
                if isinstance(outcome, Exception):
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
        prompts: list[str] = Field(min_length=1)
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
        log.warning("%s", textwrap.shorten(f"{line}: {error.status_code} {error.detail}", 300))
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
                raise HTTPException(408, f"the request did not come within {READ_SECONDS} s") from None
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
            raise HTTPException(422, str(error)) from None

    refusals = {
        400: "The client left before its request was whole, or it is no HTTP",
        401: "The bearer token is missing or another",
        408: f"The request did not come within {READ_SECONDS} s",
        413: f"More than {max_request_mb} MB, as sent or decoded, or more than {max_waiting} images",
        415: "The content type is not application/json",
        422: "Not the form described, no pictures, or prompts that this reward cannot score",
        500: "The reward failed",
        503: "Too much waits already; ask again",
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
        except Exception as error:
            raise HTTPException(500, str(error)) from error
        count = sum(len(part.rows) for part in parts)
        columns = {}
        for part, outcome in zip(parts, outcomes):
            for column, values in outcome.items():
                for row, value in zip(part.rows, values.tolist()):
                    columns.setdefault(column, [None] * count)[row] = value if math.isfinite(value) else None
        scores = columns.pop(name)
        return JSONResponse({"scores": scores, "metrics": {c.removeprefix(f"{name}/"): v for c, v in columns.items()}})

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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what uvicorn raises again once it has closed
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
            threads=given.threads, device=given.device, batch=given.batch, trust_remote_code=given.trust_remote_code,
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
