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

import base64
import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import math
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool  # of daemon threads, for which the end of a program does not wait
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
from PIL import Image

Reward = Callable[[np.ndarray, list[str], list[dict]], Any]
Columns = dict[str, np.ndarray]
Places = dict[str, Any]  # reward -> a path, a URL or a list of URLs
ANSWERED: dict[str, float] = {}  # URL -> when it last answered this process, by time.monotonic()
IN_FLIGHT = 4  # requests of one served reward at once, because pictures travel while others are scored


class RewardError(RuntimeError):
    """A reward raised, or returned what is no score. The message is one line with its name and the prompt."""


class NonFiniteScore(RewardError):
    """A score is NaN or infinite."""


def one_line(text: object, width: int) -> str:
    """Return a text, or an error with its type, in one line, cut in its middle to `width` characters."""
    text = f"{type(text).__name__}: {text}" if isinstance(text, BaseException) else str(text)
    line = " ".join(part.strip() for part in text.splitlines())
    return line if len(line) <= width else f"{line[: width // 2]} ... {line[5 - width // 2 :]}"


# ---------------------------------------------------------------- the weighted dict

class Rewards:
    """Several rewards that are computed side by side, and their weighted sum. Any thread may call it."""

    def __init__(self, weights: dict[str, float], components: dict[str, Reward],
                 start_thread: Callable = lambda: None) -> None:
        """`components` holds a reward for each name of `weights`; their threads call `start_thread` first."""
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.components = {name: components[name] for name in weights}
        self.start_thread = start_thread

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Columns:
        """Return each component's scores by name, its metrics as "name/metric", and their "total".

        All are (B,) float32; only metrics may be NaN. `images`: (B, H, W, 3) uint8, B >= 1; `prompts`,
        `metadata`: B each. Raises ValueError for other inputs, RewardError, and of these NonFiniteScore.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[3:] != (3,):
            found = f"{getattr(images, 'dtype', type(images).__name__)} {tuple(getattr(images, 'shape', ()))}"
            raise ValueError(f"images must be a numpy array, uint8 (B, H, W, 3), not {found}")
        if not 1 <= len(images) == len(prompts) == len(metadata):
            counts = f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata"
            raise ValueError(f"a batch needs at least 1 image, as many prompts and metadata, not {counts}")

        def score(name: str) -> Columns:
            self.start_thread()
            columns = score_and_check(name, self.components[name], images, prompts, metadata)
            for value, text in zip(columns[name], prompts):
                if not math.isfinite(value):
                    raise NonFiniteScore(f"reward {name!r} is {value} for prompt {one_line(repr(text), 80)}")
            return columns

        with ThreadPool(len(self.components)) as threads:
            # Wait for all, also if one fails, because no reward may still run when the next call begins.
            columns = threads.map(score, self.components, chunksize=1)
        scores = {column: values for part in columns for column, values in part.items()}
        # total = sum_i weight_i score_i
        scores["total"] = sum(self.weights[name] * scores[name] for name in self.components)
        return scores


def score_and_check(name: str, reward: Reward, images: np.ndarray, prompts: Sequence[str],
                    metadata: Sequence[dict]) -> Columns:
    """Call a reward on copies of its own. Returns {name: scores, "name/metric": metric}, (B,) float32."""
    images, metrics = images.copy(), {}
    images.flags.writeable = False
    try:
        scores = reward(images, list(prompts), copy.deepcopy(list(metadata)))
        if isinstance(scores, tuple) and len(scores) == 2 and isinstance(scores[1], dict):
            scores, metrics = scores
        columns = {f"{name}/{key}": to_column(f"{name}/{key}", metrics[key], len(prompts)) for key in metrics}
        for column in columns.values():  # because an infinite metric would make every mean infinite
            column[~np.isfinite(column)] = np.nan
        return {name: to_column(name, scores, len(prompts)), **columns}
    except RewardError:
        raise
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: a reward must not end the run
        batch = f"for a batch of {len(prompts)} that starts with prompt {one_line(repr(prompts[0]), 80)}"
        hint = "; pictures are read-only, so work on images.copy()" if "read-only" in str(error) else ""
        raise RewardError(f"reward {name!r} failed {batch}: {one_line(error, 300)}{hint}") from error


def to_column(name: str, values: Any, count: int) -> np.ndarray:
    """Return `values` as (count,) float32. Raises ValueError, which says what they are instead."""
    if hasattr(values, "detach"):  # a torch tensor; torch is not imported here
        values = values.detach().cpu().double()
    column = np.asarray(values)
    if column.shape != (count,) or column.dtype.kind not in "biuf":
        found = f"{one_line(repr(values), 60)}, a {type(values).__name__} of shape {column.shape}"
        if inspect.iscoroutine(values):
            values.close()  # because Python warns of a coroutine that nobody awaited
            found += " (write it with def, not async def)"
        raise ValueError(f"{name!r} is {found}, not numbers of shape ({count},)")
    with np.errstate(over="ignore"):
        return column.astype(np.float32)


# ---------------------------------------------------------------- the registry

REGISTRY = {  # name -> module:function; the module is imported when its reward is checked or built
    **{name: f"{__name__}:{name}" for name in ("jpeg_incompressibility", "jpeg_compressibility")},
    **{name: f"engines.ocr:{name}" for name in ("rapidocr", "rapidocr_line")},
    "ocr": "engines.ocr:paddleocr",
    **{name: f"engines.clip:{name}" for name in "pickscore clipscore aesthetic imagereward deqa".split()},
    **{name: f"engines.judges:{name}" for name in ("qwenvl", "unifiedreward")},
    "geneval": "engines.geneval:geneval",
}


def build_rewards(weights: dict[str, float], start_thread: Callable = lambda: None, *, urls: Places = {},
                  models: Places = {}, **options: Any) -> Rewards:
    """Build the `Rewards` of `weights`, name -> weight. The rest is as `build_reward` takes and raises it."""
    check_reward_weights(weights, urls)
    for model in models:
        if not any(f"{model}.".startswith(f"{name}.") for name in (*weights, *REGISTRY)):
            raise ValueError(f"no reward has a model {model!r}; name a reward, or as pickscore.processor")
    components = {name: build_reward(name, urls, models, **options) for name in weights}
    return Rewards(weights, components, start_thread)


def build_reward(name: str, urls: Places = {}, models: Places = {}, *, threads: int = 1, batch: int = 16,
                 device: str = "cpu", deadline: float = 600.0, max_unanswered: float = 0.1,
                 trust_remote_code: bool = False) -> Reward:
    """Build one reward, here or as a client of its server. Raises ValueError, ImportError or OSError.

    urls               reward -> http://..., pickle+http://... or openai+http://..., or a list of servers
    models             reward -> hub id or path of its model; a second one is "pickscore.processor"
    threads            CPU cores of each text reward
    batch              pictures that a network sees at once
    device             of the networks, as in "cuda:0"
    deadline           seconds for which a server that does not answer is asked again
    max_unanswered     share of a judge's answers that may lack a score
    trust_remote_code  whether a model may run the code that its hub repository holds
    """
    if not (threads >= 1 and batch >= 1 and deadline > 0 and 0 <= max_unanswered <= 1):
        given = f"threads {threads}, batch {batch}, deadline {deadline}, max_unanswered {max_unanswered}"
        raise ValueError(f"{given}: they must be at least 1, at least 1, more than 0, and from 0 to 1")
    servers = parse_urls(name, urls) if name in urls else {}
    if servers and "openai+" not in servers.values():  # because engines.judges asks those
        return remote_reward(name, servers, batch, deadline)
    options = dict(threads=threads, batch=batch, device=device, deadline=deadline, url=urls.get(name, ""),
                   max_unanswered=max_unanswered, trust_remote_code=trust_remote_code)
    reward = import_reward(name)
    keywords = inspect.signature(reward).parameters
    if not all(keyword.kind is keyword.KEYWORD_ONLY for keyword in keywords.values()):
        return reward
    for model in models:  # "name" gives the keyword "model", "name.part" the keyword "part"
        if f"{model}.".startswith(f"{name}."):
            part = model[len(name) + 1:] or "model"
            options[part] = models[model]
            if part not in keywords:
                raise ValueError(f"reward {name!r} has no model {model!r}, but {', '.join(keywords)}")
    with one_line_errors(f"reward {name!r} cannot be built", ValueError, ImportError, OSError):
        return reward(**{keyword: options[keyword] for keyword in keywords if keyword in options})


def import_reward(name: str) -> Callable:
    """Import an entry of REGISTRY, `my_file:function` of this directory, or `path/to/file.py:function`."""
    module, _, attribute = REGISTRY.get(name, name).rpartition(":")
    problem = f"reward {name!r}: cannot import {attribute!r} of {module!r} from {os.getcwd()}"
    # A file that parses the command line of this program would make argparse print a usage and exit.
    parses = ValueError("it parses a command line when it is imported")
    with one_line_errors(problem), patch("argparse.ArgumentParser.error", side_effect=parses):
        built_in = importlib.import_module(module) if name in REGISTRY else None  # no own file hides it
        reward = getattr(built_in or import_module(module, os.getcwd()), attribute)
        inspect.signature(reward)  # raises if it is no function
    return reward


@functools.cache
def import_module(module: str, directory: str) -> Any:
    """Import a file of `directory`, by its path or its module's name, or else any module by its name."""
    name = module.removesuffix(".py")
    file = os.path.join(directory, (name if "/" in name else name.replace(".", "/")) + ".py")
    for place in (directory, os.path.dirname(file)):  # because a file may import its neighbours
        sys.path += [place] * (place not in sys.path)
    importlib.invalidate_caches()
    found = importlib.util.find_spec(name) if "/" not in name else None
    if not os.path.exists(file) or found and os.path.realpath(found.origin or "") == os.path.realpath(file):
        return importlib.import_module(name)
    # Load the file itself, because another module, perhaps Python's own, has its name or is found first.
    spec = importlib.util.spec_from_file_location(os.path.basename(name), file)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, loaded)  # so that multiprocessing can name its functions
    spec.loader.exec_module(loaded)
    return loaded


@contextlib.contextmanager
def one_line_errors(problem: str, *passing: type) -> Iterator[None]:
    """Within, what code of others raises is a one-line ValueError, but for Ctrl-C and the types `passing`."""
    try:
        yield
    except (KeyboardInterrupt, *passing):
        raise
    except BaseException as error:
        raise ValueError(f"{problem} ({one_line(error, 300)})") from error


def check_reward_weights(weights: dict[str, float], urls: Places = {}) -> None:
    """Raise ValueError, in one line, unless `weights` can be built or asked at `urls`. Loads no engine."""
    known = f"known: {', '.join(REGISTRY)}, or your own as my_file:my_function"
    if not any(weights.values()):
        raise ValueError(f"no reward has a weight other than 0 (given: {list(weights)}); {known}")
    for name, weight in weights.items():
        if name in ("total", "thumbnail", "drift"):  # columns that a run has itself
            raise ValueError(f"a reward cannot be called {name!r}: give it another name")
        if not isinstance(weight, (int, float, np.number)) or not abs(weight) <= 1e30:
            raise ValueError(f"the weight of reward {name!r} is {weight!r}; it must be finite, at most 1e30")
        if name not in REGISTRY and name not in urls:
            if ":" not in name:
                raise ValueError(f"unknown reward {name!r}; {known}")
            import_reward(name)
    for name in urls:
        parse_urls(name, urls)


def parse_urls(name: str, urls: Places) -> dict[str, str]:
    """Return the addresses of a reward's servers, each with its scheme of SCHEMES, or raise ValueError."""
    servers = {}
    for url in np.atleast_1d(urls[name]).tolist() or [""]:
        match, problem = re.fullmatch(URL, url), f"reward {name!r} cannot be asked at {without_user(url)!r}"
        if not match or not 0 < int(match["port"] or 80) < 1 << 16:
            schemes = "http://, https://, pickle+http:// or openai+http://"
            raise ValueError(f"{problem}; a URL starts with {schemes} and a host")
        servers[match["address"]] = scheme = match["scheme"]
        if (names := SCHEMES[scheme]) and name not in names:
            raise ValueError(f"{problem}; {scheme} is for {' and '.join(names)}")
        if scheme == "openai+" and not isinstance(urls[name], str):
            raise ValueError(f"{problem}; give one openai+ URL and no list, or put a balancer there")
    return servers


# What a URL may begin with -> the rewards that can be asked there; None: any
SCHEMES = {"": None, "pickle+": ("geneval", "deqa"), "openai+": ("qwenvl", "unifiedreward")}
URL = (r"(?P<scheme>pickle\+|openai\+|)(?P<address>https?://(?:[^\s/?#@]*@)?"
       r"(?:\[[\da-fA-F:.]+\]|[^\s/?#:@]+)(?::(?P<port>\d{1,5}))?(?:/[^\s?#]*)?)")


def without_user(url: str) -> str:
    """Return a URL without "user:password@"."""
    return re.sub(r"^(\w[\w+.-]*:/*)?[^/]*@", r"\1", url)


# ---------------------------------------------------------------- the worked example: JPEG

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


# ---------------------------------------------------------------- the client of a served reward

def remote_reward(name: str, servers: dict[str, str], batch: int, deadline: float) -> Reward:
    """Return the reward `name` as its `servers` compute it, at most `batch` pictures a request."""
    asks = {}  # address -> what asks there: (send, images, prompts, metadata) -> scores, metrics
    for address, scheme in servers.items():
        ask = importlib.import_module("engines.pickled").ask_pickle_server if scheme else ask_server
        asks[address] = functools.partial(ask, name, address)

    def ask_all(parts: list[tuple]) -> list[tuple]:
        send = functools.partial(post, deadline=deadline)
        with ThreadPool(min(IN_FLIGHT, len(parts))) as threads:
            return list(threads.imap(lambda part: asks[address](send, *part), parts))

    if len(asks) > 1:
        ask_all = importlib.import_module("engines.servers").Servers(name, asks, deadline).ask_all

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> tuple[np.ndarray, Columns]:
        share = len(images) / len(asks)  # of a server; all requests are about equally large
        size = math.ceil(share / math.ceil(share / batch))
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        answers = ask_all([(images[part], prompts[part], metadata[part]) for part in parts])
        scores, metrics = np.zeros(len(images), np.float32), {}
        for part, (scores[part], columns) in zip(parts, answers):
            for metric, column in columns.items():  # NaN in a part that lacks it
                metrics.setdefault(metric, np.full(len(images), np.nan, np.float32))[part] = column
        return scores, metrics

    return reward


def ask_server(name: str, url: str, send: Callable, images: np.ndarray, prompts: list[str],
               metadata: list[dict]) -> tuple[np.ndarray, Columns]:
    """Ask `python rewards.py serve` for scores and metrics, by `send`, which is `post` or works like it."""
    # PPM is pixels alone, because networks are faster than compression.
    pictures = [base64.b64encode(picture_file(image, "PPM")).decode() for image in images]
    server, token = urlsplit(url), os.environ.get("REWARD_TOKEN")
    start = f"python rewards.py serve {name} --host {server.hostname} --port {server.port or 'PORT'}"
    response = send(f"{url.rstrip('/').removesuffix('/score')}/score", how_to_start=start,
                    json={"images": pictures, "prompts": prompts, "metadata": metadata},
                    headers={"Authorization": f"Bearer {token}".encode()} if token else {})
    if (served := response.headers.get("X-Reward", name)) != name:
        raise RewardError(f"{without_user(url)} serves the reward {served!r}, not {name!r}")
    with one_line_errors(f"{without_user(url)} answered something else than scores of each picture"):
        answer = response.json()
        return read_answer(len(images), answer["scores"], answer["metrics"])


def read_answer(count: int, scores: Sequence, metrics: dict[str, Sequence]) -> tuple[np.ndarray, Columns]:
    """Return an answer's scores and metrics as (count,) float32, in which None becomes NaN."""
    columns = [to_column(name, [math.nan if value is None else value + 0.0 for value in values], count)
               for name, values in (("scores", scores), *metrics.items())]  # + 0.0, because it refuses a list
    return columns[0], dict(zip(metrics, columns[1:]))


class Unanswered(Exception):
    """A server gave no answer for now. `status`: its own or 0. `after`: seconds that it asks to wait."""
    def __init__(self, answer: str, status: int = 0, after: str = "") -> None:
        super().__init__(answer)
        self.status, self.after = status, float(after) if re.fullmatch(r"\d{1,9}", after) else 0.0


def post(url: str, *, deadline: float = 600.0, how_to_start: str = "", **request: Any) -> Any:
    """Do as `post_once`, and ask a server again that has given this process no answer for `deadline` seconds.

    It is asked less and less often, not before its Retry-After, and three times in all if it answers 500, a
    failure of its own. Raises RewardError after that, in one line with the last answer.
    """
    wait, failures, said, started = 0.25, 0, False, time.monotonic()
    left_of = lambda: max(started, ANSWERED.get(url, 0.0)) + deadline - time.monotonic()
    server, start = without_user(url), f"; start it with: {how_to_start}" if how_to_start else ""
    while True:
        try:
            return post_once(url, max(left_of(), 0.1), **request)
        except Unanswered as error:
            answer = error
        failures, left = failures + (answer.status == 500), left_of()
        if failures == 3:
            raise RewardError(f"{server} failed 3 times; the last answer was {answer}")
        if left <= 0:
            raise RewardError(f"{server} did not answer in {deadline:g} s; the last answer: {answer}{start}")
        if not said and deadline - left > 3:
            print(f"waiting up to {left:.0f} s more for {server}: {answer}", file=sys.stderr, flush=True)
            said = True
        # Wait a random time, so that ranks that failed together do not come back together.
        time.sleep(min(max(wait * random.uniform(0.5, 1), answer.after * random.uniform(1, 1.1)), left))
        wait = min(2 * wait, 15)


def post_once(url: str, seconds: float, **request: Any) -> Any:
    """POST, and return the httpx2.Response of status 2xx. `request`: `json` or `content`, and `headers`.

    Raises Unanswered without an answer in `seconds` or for 5xx, 408 and 429, and RewardError for others.
    """
    client = http_client()
    import httpx2
    try:
        timeout = httpx2.Timeout(seconds, connect=min(seconds, 10))  # because a machine may have vanished
        response = client.post(url, timeout=timeout, **request)
    except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError,
            httpx2.ProxyError) as error:
        raise Unanswered(one_line(error, 400)) from error
    if response.is_success:
        ANSWERED[url] = time.monotonic()
        return response
    status, answer = response.status_code, one_line(f"{response.status_code} {response.text}", 400)
    if status >= 500 or status in (408, 429):
        raise Unanswered(answer, status, response.headers.get("retry-after", ""))
    hint = "; send fewer pictures at once (--reward-batch), or let it take more" if status == 413 else ""
    if response.next_request:
        hint = f"; it redirects, give {without_user(str(response.next_request.url))} as its address"
    raise RewardError(f"{without_user(url)} refused the request: {answer}{hint}")


@functools.cache
def http_client() -> Any:
    """Return the process's HTTP client, which threads share. Proxies are not for servers on this machine."""
    try:
        import httpx2
    except ImportError as error:
        raise RewardError("a served reward needs the package httpx2: pip install httpx2") from error
    limits = httpx2.Limits(max_connections=None)
    # Probe silent connections, but for proxies', because a machine that vanished is as silent as one at work.
    timers = {"TCP_KEEPIDLE": 15, "TCP_KEEPALIVE": 15, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 3}       # 60 s
    probes = [(socket.IPPROTO_TCP, getattr(socket, k), v) for k, v in timers.items() if hasattr(socket, k)]
    probes.append((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
    direct = httpx2.HTTPTransport(limits=limits, socket_options=probes)
    places = ["all://localhost", "all://127.0.0.0/8", "all://[::1]"]
    places += ["all://"] * ("all" not in getproxies())         # where a proxy for all has its place
    return httpx2.Client(limits=limits, mounts=dict.fromkeys(places, direct))


if __name__ == "__main__":
    from engines.serve import main
    sys.exit(main(sys.argv[1:]))
