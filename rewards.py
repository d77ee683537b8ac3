"""Rewards: a dict name -> weight becomes one callable that scores pictures and adds the scores up.

    reward(images, prompts, metadata) -> scores, or (scores, metrics)

    images    (B, H, W, 3) uint8, RGB, a read-only copy
    prompts   list of B strings
    metadata  list of B dicts, what the prompt set holds beside each prompt
    scores    B finite numbers, higher is better: a list, a numpy array or a torch tensor
    metrics   dict name -> B numbers, which are logged and never trained on; NaN says nothing about a picture

`jpeg_compressibility` is an example. `my_file:my_function` names a reward of your own, and REGISTRY names the
built-in ones in the same way. A function with keyword-only arguments alone is a factory: it gets those of the
options of `build_rewards` that it names, and returns the reward. A reward or factory may have an attribute
`check_prompt(prompt, metadata)`, which raises ValueError for a prompt that the reward cannot score.

This file needs numpy and pillow alone; each file of engines/ needs this one and its own packages. A reward
may run in another environment or on another machine, where this file asks it over HTTP (package httpx2):

    python rewards.py serve geneval --port 18085
    build_rewards({"geneval": 1.0}, urls={"geneval": "http://host:18085"})
"""
import sys

if __name__ == "__main__" and sys.version_info < (3, 10):    # before imports that an older one refuses
    sys.exit("error: rewards.py serve needs Python 3.10 or later, and this is %d.%d" % sys.version_info[:2])

import argparse
import base64
import contextlib
import copy
import difflib
import functools
import importlib
import importlib.util
import inspect
import io
import json
import math
import numbers
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np
from PIL import Image

Reward = Callable[[np.ndarray, list[str], list[dict]], Any]
Columns = dict[str, np.ndarray]
Weights = dict[str, float]
Places = dict[str, str]

REGISTRY = {  # name -> module:function; the module is imported when its reward is checked or built
    **{name: f"{__name__}:{name}" for name in ("jpeg_incompressibility", "jpeg_compressibility")},
    "rapidocr": "engines.ocr:rapidocr",
    "rapidocr_line": "engines.ocr:rapidocr_line",
    "ocr": "engines.ocr:paddleocr",
    **{name: f"engines.clip:{name}" for name in "pickscore clipscore aesthetic imagereward deqa".split()},
    **{name: f"engines.judges:{name}" for name in ("qwenvl", "unifiedreward")},
    "geneval": "engines.geneval:geneval",
}
# What a URL may begin with -> the rewards that can be asked there; None: any
SCHEMES = {"": None, "pickle+": ("geneval", "deqa"), "openai+": ("qwenvl", "unifiedreward")}
IN_FLIGHT = 4  # requests of one served reward at once, because pictures travel while others are scored
REQUEST_BYTES = 1 << 26  # of pixels in one request, far below what a server takes


class RewardError(RuntimeError):
    """A reward raised, or returned what is no score. The message is one line with its name and the prompt."""


class NonFiniteScore(RewardError):
    """A score is NaN or infinite."""


def shorten(line: str, width: int) -> str:
    """Return at most `width` characters: of a longer line, its beginning and its end."""
    return line if len(line) <= width else f"{line[: width // 2]} ... {line[5 - width // 2 :]}"


def one_line(text: object, width: int) -> str:
    """Return `text` as one line of at most `width` characters; an exception comes with its type."""
    text = f"{type(text).__name__}: {text}" if isinstance(text, BaseException) else str(text)
    return shorten(" ".join(text.split()), width)


def import_from(module: str, attribute: str, packages: str) -> Any:
    """Import `attribute` of `module`. Raises ImportError, in one line that says to install `packages`."""
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of any type, because packages may be built for other versions of each other
        reason = one_line(str(error), 200)
        raise ImportError(f"cannot import {module} ({reason}): pip install {packages}") from error


def load_model(reward: str, source: str, load: Callable, **arguments: Any) -> Any:
    """Return `load(source, **arguments)`; whatever goes wrong is a ValueError with `reward` and `source`."""
    try:
        return load(source, **arguments)
    except Exception as error:  # of any type: no such hub id, a damaged file, a missing package
        reason = one_line(error, 300)
        raise ValueError(f"cannot load the model of {reward!r} from {source!r} ({reason})") from error


# ---------------------------------------------------------------- the worked example

def picture_file(image: np.ndarray, form: str, **settings: int) -> bytes:
    """Encode `image`, (H, W, 3) uint8, with pillow as a "JPEG", "PNG" or "PPM"."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=form, **settings)
    return file.getvalue()


def jpeg_incompressibility(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """Return the size of each picture as a JPEG file of quality 95, in 1,000 bytes: (B,) float32."""
    return np.array([len(picture_file(image, "JPEG", quality=95)) / 1000 for image in images], np.float32)


def jpeg_compressibility(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """Return minus the JPEG size over 500, so that a picture of 500,000 bytes scores -1: (B,) float32."""
    return -jpeg_incompressibility(images, prompts, metadata) / 500


# ---------------------------------------------------------------- the weighted dict

def build_rewards(weights: Weights, start_thread: Callable | None = None, *, threads: int = 1,
                  batch: int = 16, device: str = "cpu", models: Places = {}, urls: Places = {},
                  deadline: float = 600.0, max_unanswered: float = 0.1,
                  trust_remote_code: bool = False) -> "Rewards":
    """Build the engines of `weights`, name -> weight, and return the `Rewards` of them.

    threads            CPU cores of each text reward
    batch              pictures that a network sees at once
    device             of the networks, as in "cuda:0"
    models             reward -> hub id or path of its model; a second one is "pickscore.processor"
    urls               reward -> where it is asked: http://, pickle+http://, openai+http://
    deadline           seconds for which a server that does not answer is asked again
    max_unanswered     share of a judge's answers that may lack a score
    trust_remote_code  whether a model may run the code that its hub repository holds

    Raises ValueError as `check_reward_weights` does and for a bad option, ImportError for a missing package.
    """
    options = dict(threads=threads, batch=batch, device=device, deadline=deadline,
                   max_unanswered=max_unanswered, trust_remote_code=trust_remote_code)
    for name, least, most in (("threads", 1, math.inf), ("batch", 1, math.inf), ("deadline", 0.001, math.inf),
                              ("max_unanswered", 0, 1)):
        if not least <= options[name] <= most:
            raise ValueError(f"{name} is {options[name]}; it must be from {least} to {most}")
    for model in models:
        if not any(f"{model}.".startswith(f"{name}.") for name in (*weights, *REGISTRY)):
            raise ValueError(f"no reward has a model {model!r}; name a reward, or as pickscore.processor")
    check_reward_weights(weights, urls)
    components = {name: build_reward(name, urls, models, **options) for name in weights}
    return Rewards(weights, components, start_thread)


class Rewards:
    """Several rewards that are computed side by side, and their weighted sum. Any thread may call it."""

    def __init__(self, weights: Weights, components: dict[str, Reward],
                 start_thread: Callable | None = None) -> None:
        """`components` holds a reward for each name of `weights`; their threads call `start_thread` first.

        A trainer sets the CUDA device there, because it is per thread and a reward may say "cuda" alone.
        """
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.components, self.start_thread = components, start_thread
        self.threads = ThreadPoolExecutor(len(components), initializer=start_thread)
        # torch.from_numpy warns of read-only pictures. Ignore it, because each reward has a copy.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")

    def subset(self, weights: Weights) -> "Rewards":
        """Return the same components under other weights, without those that `weights` does not name."""
        return Rewards(weights, {name: self.components[name] for name in weights}, self.start_thread)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Columns:
        """Return each component's scores by name, its metrics as "name/metric", and their "total".

        All are (B,) float32; only metrics may be NaN. `images`: (B, H, W, 3) uint8, B >= 1; `prompts`,
        `metadata`: B each. Raises ValueError for other inputs, and RewardError as `score_and_check` does.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[3:] != (3,):
            shape = getattr(images, "shape", None)
            found = type(images).__name__ if shape is None else f"{images.dtype} {tuple(shape)}"
            raise ValueError(f"images must be a numpy array, uint8 (B, H, W, 3), not {found}")
        if not 1 <= len(images) == len(prompts) == len(metadata):
            counts = f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata"
            raise ValueError(f"a batch needs at least 1 image, as many prompts and metadata, not {counts}")
        scores, batch = {}, (images, prompts, metadata)
        jobs = [self.threads.submit(score_and_check, *item, *batch) for item in self.components.items()]
        for job in jobs:
            scores |= job.result()
        # total = sum_i weight_i score_i
        scores["total"] = sum(self.weights[name] * scores[name] for name in self.components)
        return scores

    def probe(self, prompt: str, metadata: dict, height: int, width: int) -> None:
        """Score a grey picture, so that a reward that cannot work raises RewardError now, not after hours."""
        self(np.full((1, height, width, 3), 128, np.uint8), [prompt], [metadata])


def score_and_check(name: str, reward: Reward, images: np.ndarray, prompts: Sequence[str],
                    metadata: Sequence[dict]) -> Columns:
    """Call one reward; return {name: scores, "name/metric": metric}, each (B,) float32, or raise RewardError.

    The reward gets copies, because what it writes must not reach the kept pictures or another reward. Its
    pictures are read-only besides, so that a reward that writes to them learns of it.
    """
    batch = f"for a batch of {len(prompts)} that starts with prompt {one_line(repr(prompts[0]), 80)}"
    images, columns, metrics = images.copy(), {}, {}
    images.flags.writeable = False
    try:
        with own_random_streams:
            returned = reward(images, list(prompts), copy.deepcopy(list(metadata)))
        if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict):
            returned, metrics = returned
        for column, values in {name: returned, **{f"{name}/{key}": metrics[key] for key in metrics}}.items():
            if hasattr(values, "detach"):  # a torch tensor; torch is not imported here
                values = values.detach().cpu().double()
            columns[column] = np.asarray(values)
    except RewardError:
        raise
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: a reward must not end the run
        read_only = re.search("read-?only", str(error))
        hint = "; pictures are read-only, so work on images.copy()" if read_only else ""
        raise RewardError(f"reward {name!r} failed {batch}: {one_line(error, 300)}{hint}") from error
    for column, values in columns.items():
        if values.shape != (len(prompts),) or values.dtype.kind not in "biuf":
            found = f"{values.dtype} of shape {values.shape}"
            if values.dtype == object and not values.ndim:
                found = "None" if values.item() is None else f"a {type(values.item()).__name__}"
                if inspect.iscoroutine(values.item()):
                    values.item().close()  # because Python warns of a coroutine that nobody awaited
                    found += " (write it with def, not async def)"
            wanted = f"numbers of shape ({len(prompts)},)"
            raise RewardError(f"reward {column!r} returned {found}, not {wanted}, {batch}")
        with np.errstate(over="ignore"):
            columns[column] = values.astype(np.float32)
        if column != name:  # an infinite metric would make every mean infinite, so it says nothing instead
            columns[column][~np.isfinite(columns[column])] = np.nan
    for score, prompt in zip(columns[name], prompts):
        if not math.isfinite(score):
            raise NonFiniteScore(f"reward {name!r} is {score} for prompt {one_line(repr(prompt), 80)}")
    return columns


class OwnRandomStreams:
    """Within `with`, the global random streams of `random`, numpy and torch are the rewards' own.

    What a reward seeds or draws moves no other stream, and goes on in its next call. Several threads may be
    within: the first to enter puts the process's states aside and the last to leave puts them back, because
    threads that each did so would restore each other's. So the streams are untouched whenever no reward runs.
    Whatever draws from them beside a running reward draws from the rewards'. The trainer never does.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.aside = threading.Lock(), 0, []

    def swap(self, change: int, entering: bool) -> None:
        """Count a thread in or out; the first in and the last out exchange the states for those put aside."""
        with self.lock:
            self.inside += change
            if self.inside != entering:
                return
            streams = [(random.getstate, random.setstate), (np.random.get_state, np.random.set_state)]
            if torch := sys.modules.get("torch"):
                streams.append((torch.get_rng_state, torch.set_rng_state))
                if torch.cuda.is_initialized():
                    streams.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
            states = [read() for read, _ in streams]
            for (_, write), state in zip(streams, self.aside):
                write(state)
            self.aside = states

    def __enter__(self) -> None:
        self.swap(1, entering=True)

    def __exit__(self, *error: object) -> None:
        self.swap(-1, entering=False)


own_random_streams = OwnRandomStreams()


# ---------------------------------------------------------------- names: import, build, check

def import_reward(name: str) -> Callable:
    """Import an entry of REGISTRY, `my_file:function` of this directory, or `path/to/file.py:function`.

    Raises ValueError, in one line, where the module cannot be imported or holds no such callable.
    """
    module, _, attribute = REGISTRY.get(name, name).rpartition(":")
    with guard_import(name, module):
        found = getattr(import_module(module, os.getcwd()), attribute, None)
    if found is None:
        raise ValueError(f"reward {name!r}: module {module!r} has no {attribute!r}")
    if not callable(found):
        kind = type(found).__name__
        raise ValueError(f"reward {name!r} is a {kind}, not a function of (images, prompts, metadata)")
    return found


@functools.cache
def import_module(module: str, directory: str) -> Any:
    """Import a file of `directory`, by its path or its module's name, or any other module by its name."""
    path = module if "/" in module else module.removesuffix(".py").replace(".", "/")
    file = Path(directory, path.removesuffix(".py") + ".py")
    module = module.removesuffix(".py")
    for place in (directory, str(file.parent)):  # a file may import its neighbours
        if place not in sys.path:
            sys.path.append(place)
    importlib.invalidate_caches()
    if not file.exists():
        return importlib.import_module(module)
    spec = importlib.util.find_spec(module) if "/" not in module else None
    if spec and spec.origin and Path(spec.origin).resolve() == file.resolve():
        return importlib.import_module(module)
    # Load the file itself, because another module, perhaps Python's own, has its name or is found first.
    spec = importlib.util.spec_from_file_location(file.stem, file)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, loaded)  # so that multiprocessing can name its functions
    spec.loader.exec_module(loaded)
    return loaded


@contextlib.contextmanager
def guard_import(name: str, module: str) -> Iterator[None]:
    """Within, whatever the file of the reward `name` raises is a ValueError, also SystemExit."""
    # Keep what argparse prints, because a file that parses a command line prints a usage and exits. Restore
    # torch's settings, because a file may switch off the gradients that training needs.
    printed, print_message = [""], argparse.ArgumentParser._print_message
    torch = sys.modules.get("torch")
    settings = (torch.is_grad_enabled(), torch.get_default_dtype()) if torch else None
    argparse.ArgumentParser._print_message = lambda parser, message, file=None: printed.append(message)
    try:
        with own_random_streams:
            yield
    except KeyboardInterrupt:  # Ctrl-C, because imports run in the main thread
        raise
    except BaseException as error:
        problem = f"cannot import {module!r} from {os.getcwd()}"
        reason = one_line(f"{one_line(error, 300)} {printed[-1]}", 300)
        raise ValueError(f"reward {name!r}: {problem} ({reason})") from error
    finally:
        argparse.ArgumentParser._print_message = print_message
        if settings:
            torch.set_grad_enabled(settings[0])
            torch.set_default_dtype(settings[1])


def build_reward(name: str, urls: Places = {}, models: Places = {}, **options: Any) -> Reward:
    """Build one reward, here or as a client of its server. `options` are those of `build_rewards`.

    What fails is a ValueError, ImportError or OSError.
    """
    if is_remote(name, urls):
        return remote_reward(name, urls[name], options.get("batch", 16), options.get("deadline", 600.0))
    reward = import_reward(name)
    try:
        parameters = inspect.signature(reward).parameters
    except (ValueError, TypeError):  # of a function written in C
        return reward
    if not all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values()):
        return reward
    for model, path in models.items():  # "name" gives the keyword "model", "name.part" the keyword "part"
        if f"{model}.".startswith(f"{name}."):
            keyword = model[len(name) + 1:] or "model"
            options[keyword] = path
            if keyword not in parameters:
                raise ValueError(f"reward {name!r} has no model {model!r}, but {', '.join(parameters)}")
    options |= {"url": urls[name]} if name in urls else {}
    try:
        with own_random_streams:
            return reward(**{keyword: options[keyword] for keyword in parameters if keyword in options})
    except (ValueError, ImportError, OSError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a device that is not there or too small; sys.exit
        raise ValueError(f"reward {name!r} cannot be built ({one_line(error, 300)})") from error


def check_reward_weights(weights: Weights, urls: Places = {}) -> None:
    """Raise ValueError, in one line, unless `weights` can be built. Loads no engine.

    Each reward is known, importable or served (`urls`: name -> URL); each weight is finite, and one is not 0.
    """
    known = f"known: {', '.join(REGISTRY)}, or your own as my_file:my_function"
    if not weights:
        raise ValueError(f"no reward given; {known}")
    for name, weight in weights.items():
        if not is_remote(name, urls) and ":" in name:
            import_reward(name)
        elif not is_remote(name, urls) and name not in REGISTRY:
            close = difflib.get_close_matches(name, REGISTRY, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ";"
            raise ValueError(f"unknown reward {name!r}{hint} {known}")
        if not isinstance(weight, numbers.Real) or not abs(weight) <= sys.float_info.max:
            raise ValueError(f"the weight of reward {name!r} is {weight!r}; it must be a finite number")
    for name, url in urls.items():
        if name not in weights:
            weighted = ", ".join(weights)
            raise ValueError(f"reward {name!r} has a URL, {url!r}, but no weight; those with one: {weighted}")
        host = r"(?:[^\s/?#@]*@)?(?:\[[\da-fA-F:.]+\]|[^\s/?#:@]+)"
        match = re.fullmatch(rf"(pickle\+|openai\+|)https?://{host}(?::(\d{{1,5}}))?(?:/[^\s?#]*)?", url)
        problem = f"reward {name!r} cannot be asked at {url!r}"
        if not match or not 0 < int(match[2] or 80) < 1 << 16:
            schemes = "http://, https://, pickle+http:// or openai+http://"
            raise ValueError(f"{problem}; a URL starts with {schemes} and a host")
        if (names := SCHEMES[match[1]]) and name not in names:
            raise ValueError(f"{problem}; {match[1]} is for {' and '.join(names)}")
    if not any(weights.values()):
        raise ValueError(f"every reward weight is 0 ({', '.join(weights)}); give at least one another value")


def find_prompt_check(name: str, urls: Places = {}) -> Callable | None:
    """Return the `check_prompt` of a reward, or None if it has none or cannot be imported here.

    A file of your own that has a URL is not imported, because it may be for another environment.
    """
    if name not in REGISTRY and (":" not in name or name in urls):
        return None
    try:
        return getattr(import_reward(name), "check_prompt", None)
    except ValueError:
        return None


def check_reward_prompts(weights: Iterable[str], prompts: Sequence[str], metadata: Sequence[dict],
                         urls: Places = {}) -> None:
    """Raise ValueError, one line with reward and prompt, for the first prompt that a reward cannot score."""
    for name in weights:
        if check := find_prompt_check(name, urls):
            try:
                with own_random_streams:
                    for prompt, entry in zip(prompts, metadata, strict=True):
                        check(prompt, copy.deepcopy(entry))
            except (Exception, SystemExit) as error:
                reason = str(error)
                if not isinstance(error, ValueError):
                    reason = f"{one_line(error, 200)}, for prompt {one_line(repr(prompt), 80)}"
                raise ValueError(f"reward {name!r}: {reason}") from error


# ---------------------------------------------------------------- the client of a served reward

def split_batch(columns: Sequence[Sequence], size: int) -> list[list[Sequence]]:
    """Cut (images, prompts, metadata) into parts of `size` pictures."""
    return [[column[start:start + size] for column in columns] for start in range(0, len(columns[0]), size)]


def concatenate(answers: list[tuple[np.ndarray, Columns]]) -> tuple[np.ndarray, Columns]:
    """Join the answers to the parts of a batch. A metric is NaN in a part that does not have it."""
    scores, metrics = zip(*answers)
    absent = [np.full(len(part), np.nan, np.float32) for part in scores]
    names = dict.fromkeys(name for part in metrics for name in part)
    return np.concatenate(scores), {name: np.concatenate([
        part.get(name, nan) for part, nan in zip(metrics, absent)]) for name in names}


def is_remote(name: str, urls: Places) -> bool:
    """Tell whether another process computes the reward. Those of openai+ are computed here, by asking."""
    return name in urls and not urls[name].startswith("openai+")


def remote_reward(name: str, url: str, batch: int, deadline: float) -> Reward:
    """Return the reward `name` as the server at `url` computes it, `batch` pictures a request."""
    ask = import_reward("engines.pickled:ask_pickle_server") if url.startswith("pickle+") else ask_server
    address, threads = url.rpartition("+")[2], ThreadPoolExecutor(IN_FLIGHT)

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Any:
        size = max(1, min(batch, REQUEST_BYTES // max(1, images[0].nbytes)))
        parts = split_batch((images, prompts, metadata), size)
        return concatenate(list(threads.map(lambda part: ask(name, address, deadline, *part), parts)))

    return reward


@functools.cache
def http_client(loopback: bool) -> Any:
    """Return the process's HTTP client, which threads share and which keeps connections open.

    Requests to this machine ignore http_proxy and the like, because a proxy elsewhere could not pass them on.
    """
    Client, Limits = (import_from("httpx2", name, "httpx2") for name in ("Client", "Limits"))
    return Client(limits=Limits(max_connections=None), trust_env=not loopback)


def post(url: str, *, json: Any = None, content: bytes | None = None, headers: dict | None = None,
         deadline: float = 600.0, how_to_start: str = "") -> Any:
    """POST `json` or the bytes `content`, and return the httpx2.Response of status 2xx.

    A server that cannot be reached, or answers 5xx, 408 or 429, is asked again, less and less often and not
    before its Retry-After, for `deadline` seconds. One that answers 500, a failure of its own, is asked three
    times in all. Raises RewardError after that and for any other status, in one line with the last answer and
    `how_to_start`.
    """
    host = urlsplit(url).hostname or ""
    client = http_client(loopback=host in ("localhost", "::1") or host.startswith("127."))
    import httpx2
    away = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError)
    end, wait, failures, silent = time.monotonic() + deadline, 0.25, 0, True
    while True:
        after = 0.0
        try:
            # At most half of the deadline, so that a machine that vanished without a word is asked twice.
            timeout = max(min(deadline / 2, end - time.monotonic()), 0.1)
            response = client.post(url, json=json, content=content, headers=headers, timeout=timeout)
            if response.is_success:
                return response
            status, answer = response.status_code, one_line(f"{response.status_code} {response.text}", 400)
            if status < 500 and status not in (408, 429):
                moved = urljoin(url, response.headers.get("location", ""))
                hints = {413: "; send fewer pictures at once (--reward-batch), or let it take more",
                         **dict.fromkeys(range(300, 400), f"; it redirects, give {moved} as its address")}
                raise RewardError(f"{url} refused the request: {answer}{hints.get(status, '')}")
            failures += status == 500
            if failures == 3:
                raise RewardError(f"{url} failed {failures} times; the last answer was {answer}")
            if re.fullmatch(r"\d{1,9}", seconds := response.headers.get("retry-after", "")):
                after = float(seconds)
        except away as error:
            answer = one_line(error, 400)
        left = end - time.monotonic()
        if left <= 0:
            start = f"; start it with: {how_to_start}" if how_to_start else ""
            raise RewardError(f"{url} did not answer in {deadline:g} s; the last answer was {answer}{start}")
        if silent and deadline - left > 3:
            print(f"waiting up to {left:.0f} s more for {url}: {answer}", file=sys.stderr, flush=True)
            silent = False
        # Wait a random time, so that ranks that failed together do not come back together.
        time.sleep(min(max(wait * random.uniform(0.5, 1), after * random.uniform(1, 1.1)), left))
        wait = min(2 * wait, 15)


def parse_answer(url: str, count: int, read: Callable, content: bytes) -> tuple[np.ndarray, Columns]:
    """Return the (scores, metrics) of `count` pictures that `read(content)` finds, or raise RewardError."""
    def column(values: Sequence) -> np.ndarray:
        numbers = np.asarray([math.nan if value is None else value for value in values])
        if numbers.shape != (count,) or numbers.dtype.kind not in "biuf":
            raise ValueError(f"{numbers.dtype} of shape {numbers.shape}")
        return numbers.astype(np.float32)

    try:
        scores, metrics = read(content)
        return column(scores), {metric: column(values) for metric, values in metrics.items()}
    except Exception as error:
        found = f"something else than scores of {count} pictures ({one_line(error, 300)})"
        raise RewardError(f"{url} answered {found}") from error


print_once = functools.cache(print)


def ask_server(name: str, url: str, deadline: float, images: np.ndarray, prompts: list[str],
               metadata: list[dict]) -> tuple[np.ndarray, Columns]:
    """Ask `python rewards.py serve` for scores and metrics. It is shown the environment's REWARD_TOKEN."""
    token, server = os.environ.get("REWARD_TOKEN"), urlsplit(url)
    # PPM is pixels alone, because networks are faster than compression. Base64 needs no json.dumps.
    pictures = b'", "'.join(base64.b64encode(picture_file(image, "PPM")) for image in images)
    words = json.dumps(list(prompts)).encode(), json.dumps(list(metadata)).encode()
    body = b'{"images": ["%b"], "prompts": %b, "metadata": %b}' % (pictures, *words)
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {token}".encode()} if token else {}
    start = f"python rewards.py serve {name} --host {server.hostname} --port {server.port or 'PORT'}"
    answer = post(f"{url.rstrip('/').removesuffix('/score')}/score", content=body, headers=headers,
                  deadline=deadline, how_to_start=start)
    if (served := answer.headers.get("X-Reward", name)) != name:
        print_once(f"warning: {url} serves the reward {served!r}, which goes here by the name {name!r}",
                   file=sys.stderr, flush=True)

    def read(content: bytes) -> list:
        answer = json.loads(content)
        return [answer[key] for key in ("scores", "metrics")]

    return parse_answer(url, len(images), read, answer.content)


if __name__ == "__main__":
    from engines.serve import main
    sys.exit(main(sys.argv[1:]))
