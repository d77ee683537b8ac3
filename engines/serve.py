"""`python rewards.py serve NAME`: one reward over HTTP, with fastapi and uvicorn.

A `BatchScorer` merges the requests of many clients into batches. The server takes any picture that pillow
reads as RGB of 8 bits, bounds what it holds, and shows its form at /docs.
"""
import argparse
import asyncio
import base64
import collections
import hmac
import io
import logging
import math
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from rewards import (REGISTRY, Columns, Reward, build_rewards, check_reward_weights, import_reward, one_line,
                     one_line_errors, picture_file, score_and_check)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # of pictures; pillow reads them by itself
LONGEST = 8192  # pixels of a picture's longer side
SLENDEREST = 64  # longer side over shorter side, because text readers enlarge the shorter one
BODIES = 4  # requests that are read and decoded at once; others wait in the network
READ_SECONDS = 60  # in which the body of a request has to come


class TooLarge(ValueError):
    """A request holds more than the server takes in one."""


def decode_pictures(encoded_pictures: list[str], limit: int) -> list[np.ndarray]:
    """Decode base64 picture files of any sizes to uint8 (H, W, 3), without loss for RGB of 8 bits.

    Raises ValueError, naming the picture, for what is no picture, and TooLarge beyond `limit` decoded bytes.
    """
    images, size = [], 0
    for number, encoded_picture in enumerate(encoded_pictures):
        try:
            file = io.BytesIO(base64.b64decode(encoded_picture, validate=True))
            picture = Image.open(file, formats=FORMATS)
            (width, height), mode = picture.size, picture.mode
            long, short = max(width, height), min(width, height)
            if not 1 <= long <= min(LONGEST, SLENDEREST * short):
                shapes = f"sides are 1 to {LONGEST} pixels, and one at most {SLENDEREST} times the other"
                raise ValueError(f"it is {width} x {height}; {shapes}")
            if mode[0] in "IF":
                raise ValueError(f"its pixels are of mode {mode}; send 8 bits a channel")
            size += 3 * width * height
            if size > limit:
                found = f"with picture {number} it decodes to more than {limit >> 20} MB"
                raise TooLarge(f"{found}; send fewer at once")
            images.append(np.array(picture.convert("RGB")))
        except TooLarge:
            raise
        except UnidentifiedImageError as error:
            raise ValueError(f"picture {number} is no picture of {', '.join(FORMATS)}") from error
        except Exception as error:  # of any type, because decoders raise many
            reason = one_line(str(error), 200) or type(error).__name__
            raise ValueError(f"picture {number} cannot be used: {reason}") from error
    return images


@dataclass(eq=False)
class Part:
    """Pictures of one request and one size that wait for their scores."""

    images: np.ndarray                                  # (B, H, W, 3) uint8
    prompts: list[str]
    metadata: list[dict]
    rows: list[int]                                     # where the pictures stand in their request
    scores: Future = field(default_factory=Future)      # of what score_and_check returns


class BatchScorer:
    """One thread that scores what many requests bring, in order, and merges what fits into a batch."""

    def __init__(self, name: str, reward: Reward, batch: int, max_waiting: int, max_bytes: int) -> None:
        self.name, self.reward, self.batch = name, reward, batch
        self.max_waiting, self.max_bytes = max_waiting, max_bytes
        self.waiting = collections.deque()
        self.held, self.held_bytes = 0, 0  # pictures that wait or are being scored
        self.scored = 0  # pictures
        self.changed = threading.Condition()
        threading.Thread(target=self.work, daemon=True).start()

    def put(self, parts: list[Part]) -> None:
        """Queue all parts of a request, or raise queue.Full. An empty queue takes a request of any size."""
        count, size = sum(len(part.images) for part in parts), sum(part.images.nbytes for part in parts)
        with self.changed:
            full = self.held + count > self.max_waiting or self.held_bytes + size > self.max_bytes
            if self.held and full:
                raise queue.Full
            self.held, self.held_bytes = self.held + count, self.held_bytes + size
            self.waiting.extend(parts)
            self.changed.notify()

    def drop(self, parts: list[Part]) -> None:
        """Take back what still waits of these parts."""
        with self.changed:
            for part in [part for part in parts if part in self.waiting]:
                self.waiting.remove(part)
                self.held -= len(part.images)
                self.held_bytes -= part.images.nbytes

    def take(self) -> list[Part]:
        """Take the oldest part, and later ones of its picture size as long as they fit into its batch."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting)
            first, left = self.waiting.popleft(), collections.deque()
            taken, count = [first], len(first.images)
            for part in self.waiting:
                alike = part.images.shape[1:] == first.images.shape[1:]
                fits = alike and count + len(part.images) <= self.batch
                (taken if fits else left).append(part)
                count += len(part.images) * fits
            self.waiting = left
        return taken

    def score(self, parts: list[Part]) -> list[Columns]:
        """Score parts as one batch, and return the columns of each."""
        images = np.concatenate([part.images for part in parts])
        prompts = [prompt for part in parts for prompt in part.prompts]
        metadata = [entry for part in parts for entry in part.metadata]
        scores = score_and_check(self.name, self.reward, images, prompts, metadata)
        ends = np.cumsum([len(part.images) for part in parts])[:-1]
        columns = {name: np.split(values, ends) for name, values in scores.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(parts))]

    def score_or_fail(self, parts: list[Part]) -> list[Columns | BaseException]:
        """Return each part's columns, or the error that it raises alone, so that it fails no other part."""
        try:
            return self.score(parts)
        except BaseException as error:  # of any type, because this thread must go on
            return [error] if len(parts) == 1 else [self.score_or_fail([part])[0] for part in parts]

    def work(self) -> None:
        """Score parts for ever."""
        while True:
            taken = self.take()
            parts = [part for part in taken if part.scores.set_running_or_notify_cancel()]
            outcomes = self.score_or_fail(parts) if parts else []
            with self.changed:
                self.held -= sum(len(part.images) for part in taken)
                self.held_bytes -= sum(part.images.nbytes for part in taken)
                self.scored += sum(len(part.images) for part in parts)
            for part, outcome in zip(parts, outcomes):
                if isinstance(outcome, BaseException):
                    part.scores.set_exception(outcome)
                else:
                    part.scores.set_result(outcome)


# ---------------------------------------------------------------- the application

def define_forms() -> SimpleNamespace:
    """Define what /score and /health take and give, for pydantic to check and for the page /docs to show."""
    from pydantic import BaseModel, Field

    grey = base64.b64encode(picture_file(np.full((8, 8, 3), 128, np.uint8), "PNG")).decode()
    example = {"images": [grey], "prompts": ['a sign that says "hello"'], "metadata": [{}]}

    class ScoreRequest(BaseModel, extra="forbid", json_schema_extra={"examples": [example]}):
        """As many images as prompts and metadata."""

        images: list[str] = Field(min_length=1, description=f"base64 of files: {', '.join(FORMATS)}")
        prompts: list[Annotated[str, Field(max_length=10_000)]] = Field(min_length=1)
        metadata: list[dict] = Field(min_length=1, description="what the prompt set holds beside each, or {}")

    class ScoreResponse(BaseModel):
        """A number for each image, in their order."""

        scores: list[float | None] = Field(description="null is a score that is not finite")
        metrics: dict[str, list[float | None]] = Field(description="null says nothing about an image")

    class Health(BaseModel):
        reward: str
        ready: bool
        waiting: int = Field(description="images that wait or are being scored")
        scored: int = Field(description="images that were scored")
        refused: int = Field(description="requests that were not answered with scores")

    class Problem(BaseModel):
        detail: str

    return SimpleNamespace(request=ScoreRequest, response=ScoreResponse, health=Health, problem=Problem)


class RequestReader:
    """Reads and decodes the bodies of requests, at most BODIES at once and `max_request_mb` each."""

    def __init__(self, form: Any, check: Callable | None, max_request_mb: int, max_waiting: int) -> None:
        """`form`: pydantic's class of a request. `check(prompt, metadata)`: the reward's `check_prompt`."""
        self.form, self.check, self.max_waiting = form, check, max_waiting
        self.max_request_mb, self.max_request = max_request_mb, max_request_mb << 20
        self.body_slots = asyncio.Semaphore(BODIES)

    async def read_body(self, request: Any) -> tuple[bytes, int]:
        """Return the body and its size. A body that is too large is read to its end and dropped."""
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            chunks.append(chunk)
            if size > self.max_request:
                chunks.clear()
        return b"".join(chunks), size

    def parse(self, body: bytes) -> list[Part]:
        """Return the parts of a request. Raises ValueError, TooLarge or pydantic's ValidationError."""
        sent = self.form.model_validate_json(body)
        counts = len(sent.images), len(sent.prompts), len(sent.metadata)
        if len(set(counts)) > 1:
            found = "{}, {} and {}".format(*counts)
            raise ValueError(f"as many images as prompts and metadata are needed, not {found}")
        if counts[0] > self.max_waiting:
            raise TooLarge(f"{counts[0]} images are more than {self.max_waiting}; send fewer at once")
        with one_line_errors("the reward cannot check a prompt", ValueError):
            for prompt, metadata in zip(sent.prompts, sent.metadata) if self.check else ():
                self.check(prompt, metadata)
        images, by_size = decode_pictures(sent.images, self.max_request), {}
        for row, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(row)
        return [Part(np.stack([images[i] for i in rows]), [sent.prompts[i] for i in rows],
                     [sent.metadata[i] for i in rows], rows) for rows in by_size.values()]

    async def receive(self, request: Any) -> list[Part]:
        """Return the parts of a request, or raise an HTTPException with a status that OpenAPI lists."""
        from fastapi import HTTPException
        from fastapi.concurrency import run_in_threadpool
        from pydantic import ValidationError
        from starlette.requests import ClientDisconnect

        length = request.headers.get("content-length", "")
        too_large = length.isdecimal() and int(length) > self.max_request
        most = f"a request has at most {self.max_request_mb} MB; send fewer images at once"
        late = f"the request did not come within {READ_SECONDS} s; ask again"
        try:
            # Read a body that is too large for 2 seconds, because a client that is cut off sees no answer.
            body, size = await asyncio.wait_for(self.read_body(request), 2 if too_large else READ_SECONDS)
            if size > self.max_request:
                raise TooLarge(most)
            return await run_in_threadpool(self.parse, body)
        except asyncio.TimeoutError:
            raise HTTPException(*(413, most) if too_large else (503, late)) from None
        except ClientDisconnect:
            raise HTTPException(400, "the client left") from None
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise HTTPException(422, f"{where}: {first['msg']}" if where else first["msg"]) from None
        except TooLarge as error:
            raise HTTPException(413, str(error)) from None
        except ValueError as error:
            raise HTTPException(422, one_line(str(error), 500)) from None


async def collect_scores(name: str, scorer: BatchScorer, parts: list[Part], request: Any) -> dict[str, Any]:
    """Score the parts of a request and return the form of an answer, or raise an HTTPException.

    What waits for a client that left is dropped, because it may ask again and would wait for itself.
    """
    from fastapi import HTTPException

    try:
        scorer.put(parts)
    except queue.Full:
        full = f"{scorer.held} images wait already; ask again"
        raise HTTPException(503, full, {"Retry-After": "1"}) from None
    try:
        futures = [asyncio.wrap_future(part.scores) for part in parts]
        while (await asyncio.wait(futures, timeout=1))[1]:  # some are pending
            if await request.is_disconnected():
                scorer.drop(parts)
                for future in futures:
                    future.cancel()
                raise HTTPException(400, "the client left")
        outcomes = await asyncio.gather(*futures)
    except HTTPException:
        raise
    except asyncio.CancelledError:
        raise HTTPException(503, "the server is being stopped") from None
    except BaseException as error:
        raise HTTPException(500, one_line(str(error), 500)) from error
    count, columns = sum(len(part.rows) for part in parts), {}
    for part, outcome in zip(parts, outcomes):
        for column, values in outcome.items():
            for row, value in zip(part.rows, values.tolist()):
                columns.setdefault(column, [None] * count)[row] = value if math.isfinite(value) else None
    scores = columns.pop(name)
    metrics = {column.removeprefix(f"{name}/"): values for column, values in columns.items()}
    return {"scores": scores, "metrics": metrics}


def check_headers(headers: Any, token: str) -> None:
    """Raise an HTTPException for a request without the bearer token, or of another content type than JSON."""
    from fastapi import HTTPException

    shown = headers.get("authorization", "").encode("latin-1")
    if token and not hmac.compare_digest(shown, f"Bearer {token}".encode()):
        raise HTTPException(401, "the bearer token is missing or another: set REWARD_TOKEN as at the server",
                            {"WWW-Authenticate": "Bearer"})
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the content type must be application/json")


def make_app(name: str, reward: Reward, batch: int = 16, max_request_mb: int = 256, max_waiting: int = 4096,
             token: str = "", check: Callable | None = None) -> Any:
    """Return the FastAPI application that serves `reward` as `name`.

    token: what a client must show, if not empty. check: the reward's `check_prompt`.
    """
    from fastapi import FastAPI, Request, Security
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPBearer
    from starlette.exceptions import HTTPException as AnyHTTPException

    forms, log = define_forms(), logging.getLogger("rewards")
    reader = RequestReader(forms.request, check, max_request_mb, max_waiting)
    scorer = BatchScorer(name, reward, batch, max_waiting, 4 * reader.max_request)
    summary = "A reward of nano-flow-grpo, for --reward-urls."
    app = FastAPI(title=f"The reward {name}", summary=summary, version="1")
    app.state.refused = 0

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Any, error: Any) -> Any:
        app.state.refused += 1
        line = f"{request.method} {request.url.path} from {request.client and request.client.host}"
        log.warning("%s", one_line(f"{line}: {error.status_code} {error.detail}", 300))
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    refusals = {
        400: "The client left, or its request is no HTTP",
        401: "The bearer token is missing or another",
        413: f"More than {max_request_mb} MB, as sent or decoded, or more than {max_waiting} images",
        415: "The content type is not application/json",
        422: "Not the form described, no pictures, or prompts that this reward cannot score",
        500: "The reward failed",
        503: f"Too much waits already, or the request did not come within {READ_SECONDS} s; ask again",
    }
    responses = {status: {"model": forms.problem, "description": text} for status, text in refusals.items()}
    body = {"required": True, "content": {"application/json": {"schema": forms.request.model_json_schema()}}}

    @app.post("/score", response_model=forms.response, responses=responses,
              openapi_extra={"requestBody": body},
              dependencies=[Security(HTTPBearer(auto_error=False))] if token else [])
    async def score(request: Request):
        """The score of each image, and what the reward logs beside it."""
        check_headers(request.headers, token)
        async with reader.body_slots:
            parts = await reader.receive(request)
        return JSONResponse(await collect_scores(name, scorer, parts, request), headers={"X-Reward": name})

    @app.get("/health", response_model=forms.health)
    async def health():
        """That the server is up, and what it has done."""
        return forms.health(reward=name, ready=True, waiting=scorer.held, scored=scorer.scored,
                            refused=app.state.refused)

    return app


# ---------------------------------------------------------------- the command

def serve(given: argparse.Namespace) -> None:
    """Serve one reward until SIGTERM or Ctrl-C. `given`: the command line that `main` parses.

    Raises ValueError, ImportError or OSError if that cannot be.
    """
    if len(given.models) % 2:
        raise ValueError(f"--models {' '.join(given.models)}: give pairs, a name and a path")
    if min(given.max_request_mb, given.max_waiting) < 1:
        raise ValueError(f"--max-request-mb is {given.max_request_mb} and --max-waiting {given.max_waiting}: "
                         "each must be at least 1")
    name, host, urls = given.name, given.host, {given.name: given.url} if given.url else {}
    check_reward_weights({name: 1.0}, urls)
    with one_line_errors("cannot serve: pip install fastapi uvicorn"):
        import fastapi  # noqa: F401, which make_app needs
        from uvicorn import Config, Server
    # Listen before the reward loads, so that a port that is taken is an error now and early clients wait.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, given.port), family=family, backlog=1024)
    token = os.environ.get("REWARD_TOKEN", "")
    reward = build_rewards(
        {name: 1.0}, threads=given.threads, device=given.device, batch=given.batch, deadline=given.deadline,
        max_unanswered=given.max_unanswered, trust_remote_code=given.trust_remote_code, urls=urls,
        models=dict(zip(given.models[::2], given.models[1::2]))).components[name]
    # A reward that another server computes may not be importable here.
    known = name in REGISTRY or not urls
    check = getattr(import_reward(name), "check_prompt", None) if known else None
    batch = given.batch * given.threads  # so that all workers are busy for most of it
    app = make_app(name, reward, batch, max_request_mb=given.max_request_mb, max_waiting=given.max_waiting,
                   token=token, check=check)
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}"
    flag = f"train.py --rewards {name} 1 --reward-urls {name} {address}"
    print(f"serving {name} at {address}: {flag}; form and trial: {address}/docs")
    if not token and host not in ("127.0.0.1", "localhost", "::1"):
        print("warning: whoever reaches this port can use it; set REWARD_TOKEN here and where you train")
    sys.stdout.flush()
    # Drop work in hand when told to stop, because uvicorn would wait for it and raise the signal once more.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: os._exit(0))
    Server(Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listening])


def main(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="rewards.py", description="The rewards of nano-flow-grpo.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "serve", help="serve one reward over HTTP", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Environment: REWARD_TOKEN, if set, is the bearer token that clients must show.")
    command.add_argument("name", help=f"{', '.join(REGISTRY)}, or your own as my_file:my_function")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    command.add_argument("--port", type=int, default=18085, help="0 for any that is free")
    command.add_argument("--device", default="cpu", help="of networks: cuda:0")
    command.add_argument("--threads", type=int, default=1, help="CPU cores of a text reward")
    command.add_argument("--batch", type=int, default=16, help="images scored at once, for each thread")
    command.add_argument("--models", nargs="+", default=[], metavar="NAME PATH", help="where models are")
    command.add_argument("--trust-remote-code", action="store_true", help="run Python files of a model")
    command.add_argument("--deadline", type=float, default=200.0, help="seconds to ask a judge again")
    command.add_argument("--max-unanswered", type=float, default=0.1, help="share a judge may not score")
    command.add_argument("--url", default="", help="where it asks in turn: openai+http://..., pickle+...")
    command.add_argument("--max-request-mb", type=int, default=256, help="of a request, as sent and decoded")
    command.add_argument("--max-waiting", type=int, default=4096, help="images held at once")
    try:
        serve(parser.parse_args(arguments))
    except (ValueError, ImportError, OSError, OverflowError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0
