"""Claims about served rewards: the real server in a process of its own, asked by the real client.

Only servers that others wrote are played by a few lines here.
"""

import base64
import contextlib
import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import hypothesis
import numpy as np
import pytest
import schemathesis
import torch
from helpers import wait_until
from PIL import Image
from test_rewards import noisy_words, render

import rewards
import train
from engines import clip, ocr, serve as server
from engines.pickled import read_plain_pickle
from harness.scoring import probe
from prompts import Prompt
from rewards import RewardError, Rewards, build_rewards

ROOT = Path(rewards.__file__).parent

# Rewards of a user's own, in a file of their own
OWN = '''
import time
import numpy as np

def identity(images, prompts, metadata):
    """What a picture's first pixel encodes; as metrics, what its prompt and its metadata hold, and its batch's size."""
    time.sleep(0.0005 * len(images))
    scores = images[:, 0, 0].astype(float) @ [65536, 256, 1]
    of_metadata = [entry.get("number", float("nan")) for entry in metadata]
    return scores, {"prompt": np.array([float(prompt) for prompt in prompts]), "metadata": np.array(of_metadata),
                    "batch": np.full(len(images), len(images))}

def slow(images, prompts, metadata):
    time.sleep(0.15)
    return np.zeros(len(images))

def broken(images, prompts, metadata):
    raise KeyError("a\\nbug")

def tagged(images, prompts, metadata):
    return np.zeros(len(images))

tagged.check_prompt = lambda prompt, metadata: metadata["tag"]

def of_dark(images, prompts, metadata):
    return np.where(images.mean((1, 2, 3)) < 1, np.nan, 1.0)
'''


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("own")
    (directory / "own.py").write_text(OWN)
    return directory


@pytest.fixture(scope="module")
def serve(own_files):
    """`serve(name, *flags, token=None)`: the real command; (process, URL, the file of its log), once it listens."""
    processes = []

    def start(name, *flags, token=None, port=0, shown=r"127\.0\.0\.1"):
        log = own_files / f"log{len(processes)}"
        environment = {name: value for name, value in os.environ.items() if name != "REWARD_TOKEN"}
        environment |= {"OMP_NUM_THREADS": "1"} | ({"REWARD_TOKEN": token} if token else {})
        command = [sys.executable, ROOT / "rewards.py", "serve", name, "--port", str(port), *flags]
        process = subprocess.Popen(command, cwd=own_files, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)
        processes.append(process)
        wait_until(lambda: "\n" in log.read_text() or process.poll() is not None, 60)
        found = re.search(rf"serving {name} at (http://{shown}:\d+):", log.read_text())
        assert found, log.read_text()
        return process, found[1], log

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def jpeg(serve):
    return serve("jpeg_incompressibility", "--threads", "2", "--max-request-mb", "1")[1]


@pytest.fixture(scope="module")
def line(serve):
    return serve("rapidocr_line")[1]


@pytest.fixture(scope="module")
def identity(serve):
    return serve("own:identity", "--batch", "8")[1]


def noise(count, height=24, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def remote(name, url, **options):
    return build_rewards({name: 1.0}, urls={name: url}, **options)


def file_of(image, form="PNG", **how):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **how)
    return file.getvalue()


def ask(url, files, prompts=None, metadata=None):
    """A POST as other programs would send it."""
    images = [base64.b64encode(file).decode() for file in files]
    prompts = [""] * len(files) if prompts is None else prompts
    metadata = [{}] * len(files) if metadata is None else metadata
    return httpx2.post(f"{url}/score", json={"images": images, "prompts": prompts, "metadata": metadata}, timeout=60)


def one_line(error, *contents):
    message = str(error.value)
    assert "\n" not in message
    for content in contents:
        assert content in message, message
    return True


# ---------------------------------------------------------------- workers


def test_readers_run_side_by_side_and_each_has_one_call_at_a_time():
    together, busy = threading.Barrier(3, timeout=10), []

    def make_reader():
        inside = []

        def read(images):
            inside.append(1)
            busy.append(len(inside))
            together.wait()  # nobody passes before three are here
            inside.pop()
            return [str(image[0, 0, 0]) for image in images]

        return read

    images = noise(18)
    prompts = [f'"{image[0, 0, 0]}"' for image in images]
    assert ocr.text_reward(make_reader, 3, 2)(images, prompts, [{}] * 18).tolist() == [1] * 18
    assert busy == [1] * 9


def test_an_engine_is_built_for_each_worker(monkeypatch):
    built, make = [], ocr.rapidocr_engine
    monkeypatch.setattr(ocr, "rapidocr_engine", lambda **params: built.append(make(**params)) or built[-1])
    build_rewards({"rapidocr_line": 1.0}, threads=3)
    assert len(built) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rapidocr_line", "rapidocr"])
def test_scores_do_not_depend_on_the_number_of_workers_to_the_bit(name):
    words = ["cat", "stone", "river", "moon", "tree", "lamp", "door", "bird", "fish"]
    images = noisy_words(words)
    if name == "rapidocr":
        images = np.stack([render(word, (192, 96), 40) for word in words])
    batch = images, [f'"{word}"' for word in words[:4] + words[:5]], [{}] * len(words)
    scores = [build_rewards({name: 1.0}, threads=threads)(*batch)["total"].tolist() for threads in (1, 2, 3)]
    assert scores[0] == scores[1] == scores[2] and len(set(scores[0])) > 1


def test_a_request_holds_a_batch_and_metrics_are_nan_where_its_answer_has_none():
    def answer(number, body):
        prompts = json.loads(body)["prompts"]
        metric = {"0": {}, "2": {"a": [7, 7]}, "4": {"b": [8]}}[prompts[0]]
        return 200, json.dumps({"scores": [float(prompt) for prompt in prompts], "metrics": metric}).encode()

    with Peer(answer) as peer:
        scores = remote("any", f"http://{peer.address}", batch=2)(noise(5), list("01234"), [{}] * 5)
    assert len(peer.requests) == 3 and scores["any"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(scores["any/a"], [np.nan, np.nan, 7, 7, np.nan])
    np.testing.assert_array_equal(scores["any/b"], [np.nan] * 4 + [8])


# ---------------------------------------------------------------- the server's answers


def test_a_served_reward_says_what_it_says_here_to_the_bit(jpeg, line):
    words = ["cat", "stone", "river", "moon", "tree", "lamp", "door"] * 3
    for name, url in (("jpeg_incompressibility", jpeg), ("rapidocr_line", line)):
        batch = noisy_words(words, seed=3), [f'"{word}"' for word in words], [{}] * len(words)
        here, there = build_rewards({name: 0.3})(*batch), build_rewards({name: 0.3}, urls={name: url}, batch=4)(*batch)
        assert here.keys() == there.keys() and len(set(here[name])) > 2
        for key in here:
            assert there[key].dtype == np.float32 and there[key].tolist() == here[key].tolist()


def test_metrics_of_a_served_reward_arrive_with_their_gaps(identity):
    metadata = [{"number": 5}, {}, {"number": -0.5}]
    there = remote("own:identity", identity)(noise(3), ["1", "2", "3"], metadata)
    assert list(there) == ["own:identity", *(f"own:identity/{m}" for m in ("prompt", "metadata", "batch")), "total"]
    assert there["own:identity/prompt"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(there["own:identity/metadata"], [5, np.nan, -0.5])


def test_a_server_of_another_reward_is_refused_with_its_address_and_both_names(jpeg):
    with pytest.raises(RewardError) as error:
        remote("aesthetic", jpeg)(noise(2), ["", ""], [{}] * 2)
    assert one_line(error, f"{jpeg} serves the reward 'jpeg_incompressibility', not 'aesthetic'")


def test_pictures_of_several_sizes_in_one_request_keep_their_places(jpeg):
    pictures = [noise(1, *size, seed=i)[0] for i, size in enumerate([(8, 9), (40, 30), (8, 9), (30, 40), (40, 30)])]
    expected = [rewards.jpeg_incompressibility([picture], [""], [{}])[0] for picture in pictures]
    answer = ask(jpeg, [file_of(picture) for picture in pictures])
    assert answer.status_code == 200 and answer.json() == {"scores": [float(e) for e in expected], "metrics": {}}


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (24, 64), (64, 1), (200, 301)])
def test_pictures_travel_without_loss(height, width):
    image = noise(1, height, width)[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(rewards.picture_file(image, "PPM")))), image)
    (decoded,) = server.decode_pictures([base64.b64encode(rewards.picture_file(image, "PPM")).decode()], 1 << 20)
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, image)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_any_usual_picture_file_is_read_as_rgb(form, mode):
    mode = {("JPEG", "P"): "CMYK", ("PPM", "P"): "RGBA"}.get((form, mode), mode)  # which have no palette
    file = file_of(Image.fromarray(noise(1)[0]).convert(mode), form)
    (decoded,) = server.decode_pictures([base64.b64encode(file).decode()], 1 << 20)
    assert np.array_equal(decoded, np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


def test_health_counts_and_the_form_is_described(identity):
    before = httpx2.get(f"{identity}/health").json()
    remote("own:identity", identity)(noise(5), ["0"] * 5, [{}] * 5)
    assert ask(identity, [b"nonsense"]).status_code == 422
    after = httpx2.get(f"{identity}/health").json()
    assert (after["reward"], after["ready"], after["waiting"]) == ("own:identity", True, 0)
    assert after["scored"] - before["scored"] == 5 and after["refused"] - before["refused"] == 1
    described = httpx2.get(f"{identity}/openapi.json").json()["paths"]["/score"]["post"]
    schema = described["requestBody"]["content"]["application/json"]["schema"]
    assert sorted(schema["properties"]) == sorted(schema["required"]) == ["images", "metadata", "prompts"]
    assert httpx2.post(f"{identity}/score", json=schema["examples"][0] | {"prompts": ["3"]}).json()["scores"] == [0x808080]
    assert {"401", "413", "422", "500", "503"} <= set(described["responses"])
    assert "swagger" in httpx2.get(f"{identity}/docs").text.lower()


# ---------------------------------------------------------------- what the server refuses


def slender():
    return file_of(noise(1, 1, 200)[0])


@pytest.mark.parametrize("name, file, says", [
    ("nothing", b"", "picture 1"),
    ("garbage", b"\x00\x01nonsense" * 9, "no picture of PNG"),
    ("a whole header and half of the data", file_of(noise(1)[0])[:900], "picture 1"),
    ("damaged data", file_of(noise(1)[0]).replace(b"IDAT", b"IDAX"), "picture 1"),
    ("no pixels", b"P6 0 0 255\n", "picture 1"),
    ("too slender", slender(), "200 x 1"),
    ("too long", file_of(Image.new("1", (8193, 200))), "8193 x 200"),
    ("a bomb for pillow", file_of(Image.new("1", (20000, 20000))), "picture 1"),
    ("16 bits", file_of(Image.new("I;16", (8, 8))), "I;16"),
    ("floats", file_of(Image.new("F", (8, 8)), "TIFF"), "mode F"),
    ("a program for another program", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no picture of PNG"),
])  # fmt: skip
def test_a_picture_that_is_none_is_the_clients_fault_and_says_which(jpeg, name, file, says):
    answer = ask(jpeg, [file_of(noise(1)[0]), file])
    assert answer.status_code == 422 and says in answer.json()["detail"] and "picture 1" in answer.json()["detail"]


def test_what_decodes_to_more_than_a_request_may_hold_is_refused_before_it_is_decoded(jpeg):
    answer = ask(jpeg, [file_of(Image.new("RGB", (8000, 8000)))])  # 200 KB in the file, 192 MB decoded
    assert answer.status_code == 413 and "more than 1 MB" in answer.json()["detail"]


GOOD = base64.b64encode(file_of(noise(1)[0])).decode()


@pytest.mark.parametrize("body, says", [
    (b"nonsense", "JSON"), (b"", "JSON"), (b"[]", "object"), (b"{}", "images"), (b"\xff\xfe", "JSON"),
    ({"images": [], "prompts": [], "metadata": []}, "images"),
    ({"images": [GOOD], "prompts": ['"a"']}, "metadata"),
    ({"images": [GOOD], "prompts": ['"a"', '"b"'], "metadata": [{}]}, "1, 2 and 1"),
    ({"images": [GOOD], "prompts": ['"a"'], "metadata": [[]]}, "metadata.0"),
    ({"images": [GOOD], "prompts": [1], "metadata": [{}]}, "prompts.0"),
    ({"images": [None], "prompts": ['"a"'], "metadata": [{}]}, "images.0"),
    ({"images": ["%%%"], "prompts": ['"a"'], "metadata": [{}]}, "picture 0"),
    ({"images": ["é"], "prompts": ['"a"'], "metadata": [{}]}, "picture 0"),
    ({"images": [GOOD], "prompts": ['"a"'], "metadata": [{}], "more": 1}, "more"),
    ({"images": [GOOD], "prompts": ["a cat"], "metadata": [{}]}, "'a cat'"),        # rapidocr_line wants a quoted text
    (b'{"images": [' + b"[" * 100_000, "JSON"),
])  # fmt: skip
def test_a_request_of_another_form_is_the_clients_fault_and_says_why(line, body, says):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx2.post(f"{line}/score", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and says in answer.json()["detail"], answer.text


def test_another_content_type_is_refused_which_is_what_a_web_page_could_send(jpeg):
    assert httpx2.post(f"{jpeg}/score", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415


def test_a_request_that_is_too_large_is_refused_while_it_comes_and_the_server_goes_on(jpeg):
    json_type = {"Content-Type": "application/json"}
    answer = httpx2.post(f"{jpeg}/score", content=b" " * (3 << 20), headers=json_type)
    assert answer.status_code == 413 and "at most 1 MB" in answer.json()["detail"]
    chunks = (b" " * 65536 for _ in range(48))  # of a length that is not told in advance
    assert httpx2.post(f"{jpeg}/score", content=chunks, headers=json_type).status_code == 413
    host, port = jpeg.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:  # promised and never sent
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 999999999999\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert ask(jpeg, [file_of(noise(1)[0])]).status_code == 200


def test_a_token_is_asked_for_and_never_shown(serve, monkeypatch):
    _, url, log = serve("jpeg_incompressibility", token="secret-word")
    monkeypatch.setenv("REWARD_TOKEN", "secret-word")
    remote("jpeg_incompressibility", url)(noise(2), ["", ""], [{}, {}])
    for token in ("another", "secret-wor", "sécret", ""):
        monkeypatch.setenv("REWARD_TOKEN", token)
        started = time.monotonic()
        with pytest.raises(RewardError) as error:
            remote("jpeg_incompressibility", url)(noise(2), ["", ""], [{}, {}])
        assert one_line(error, url, "REWARD_TOKEN")
        assert time.monotonic() - started < 5  # 4xx is not asked again
    assert httpx2.get(f"{url}/health").json()["scored"] == 2 and "secret" not in log.read_text()


def test_a_reward_that_fails_is_the_servers_fault_and_its_reason_reaches_the_client(serve):
    url = serve("own:broken")[1]
    answer = ask(url, [file_of(noise(1)[0])], ["a prompt"])
    assert answer.status_code == 500 and "KeyError" in answer.json()["detail"] and "'a prompt'" in answer.json()["detail"]
    with pytest.raises(RewardError) as error:
        remote("own:broken", url, deadline=0.5)(noise(1), ["a prompt"], [{}])
    assert one_line(error, url, "500", "KeyError", "'a prompt'")


def test_a_prompt_that_the_rewards_check_fails_on_is_refused_with_the_reason(serve):
    url = serve("own:tagged")[1]
    answer = ask(url, [file_of(noise(1)[0])])
    assert answer.status_code == 422 and answer.json()["detail"] == "the reward cannot check a prompt (KeyError: 'tag')"
    assert ask(url, [file_of(noise(1)[0])], metadata=[{"tag": "colors"}]).status_code == 200


def test_a_full_server_says_when_to_ask_again_and_a_client_that_does_gets_every_score(serve):
    url = serve("own:slow", "--max-waiting", "2", "--batch", "1")[1]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: ask(url, [file_of(noise(1)[0])]), range(6)))
    full = [answer for answer in answers if answer.status_code == 503]
    assert full and {answer.status_code for answer in answers} == {200, 503}
    assert all(answer.headers["Retry-After"] == "1" and "wait already" in answer.json()["detail"] for answer in full)
    assert remote("own:slow", url, batch=1)(noise(6), [""] * 6, [{}] * 6)["total"].tolist() == [0] * 6


def test_a_score_that_is_not_finite_is_known_as_such_at_the_client_and_asked_for_once(serve):
    url, images = serve("own:of_dark")[1], noise(2)
    images[1] = 0
    with pytest.raises(rewards.NonFiniteScore) as error:
        remote("own:of_dark", url)(images, ["light", "dark"], [{}] * 2)
    assert one_line(error, "'own:of_dark' is nan", "'dark'")
    health = httpx2.get(f"{url}/health").json()
    assert (health["scored"], health["refused"]) == (2, 0)


def test_what_a_client_that_left_waits_for_is_not_scored(serve):
    url = serve("own:slow", "--batch", "1")[1]

    def leave(_):
        request = {"images": [base64.b64encode(file_of(noise(1)[0])).decode()], "prompts": [""], "metadata": [{}]}
        with contextlib.suppress(rewards.Unanswered):        # the first ones are answered
            rewards.post_once(f"{url}/score", 0.7, json=request)

    with ThreadPoolExecutor(40) as pool:                     # 6 s of work
        list(pool.map(leave, range(40)))
    health = lambda: httpx2.get(f"{url}/health").json()
    wait_until(lambda: health()["waiting"] == 0, 5)
    assert health()["scored"] < 30


# ---------------------------------------------------------------- many clients


class Recorded:
    """A reward that notes its batches, and holds back its first one until it is let go."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()

    def __call__(self, images, prompts, metadata):
        self.batches.append((images.shape, list(prompts)))
        self.go.wait(10)
        if "bad" in prompts:
            raise KeyError("bad")
        return images[:, 0, 0, 0]


def put(scorer, *prompts, height=8):
    part = server.Part(noise(len(prompts), height, 8, seed=len(prompts)), list(prompts), [{}] * len(prompts), [])
    scorer.put([part])
    return part


def test_what_waits_is_merged_by_size_in_order_up_to_a_batch():
    reward = Recorded()
    scorer = server.BatchScorer("name", reward, 4, 100, 1 << 20)
    first = put(scorer, "a")
    wait_until(lambda: reward.batches, 5)
    parts = [first, put(scorer, "b", "c"), put(scorer, "d", height=9), put(scorer, "e"), put(scorer, "f", "g"),
             put(scorer, "h", height=9), put(scorer, *"ijklm")]
    reward.go.set()
    for part in parts:
        assert part.scores.result(10)["name"].tolist() == part.images[:, 0, 0, 0].tolist()
    assert ["".join(prompts) for _, prompts in reward.batches] == ["a", "bce", "dh", "fg", "ijklm"]
    assert [shape[1] for shape, _ in reward.batches] == [8, 8, 9, 8, 8]
    assert scorer.held == scorer.held_bytes == 0 and scorer.scored == 13


def test_nobody_fails_for_the_pictures_of_another():
    reward = Recorded()
    scorer = server.BatchScorer("name", reward, 9, 100, 1 << 20)
    first = put(scorer, "a")
    wait_until(lambda: reward.batches, 5)
    parts = [first, put(scorer, "b", "c"), put(scorer, "d", "bad"), put(scorer, "e")]
    reward.go.set()
    with pytest.raises(RewardError) as error:
        parts.pop(2).scores.result(10)
    assert one_line(error, "'name'", "'d'", "KeyError")
    for part in parts:
        assert part.scores.result(10)["name"].tolist() == part.images[:, 0, 0, 0].tolist()


def test_a_queue_is_bounded_by_pictures_and_by_bytes_and_a_part_given_up_is_not_scored():
    reward = Recorded()
    scorer = server.BatchScorer("name", reward, 1, 3, 4 * 8 * 8 * 3)
    first = put(scorer, "a")
    wait_until(lambda: reward.batches, 5)
    given_up = put(scorer, "b", "c")
    for part in (dict(height=8), dict(height=80)):
        with pytest.raises(server.queue.Full):
            put(scorer, "d", **part)
    given_up.scores.cancel()
    reward.go.set()
    first.scores.result(10)
    wait_until(lambda: scorer.held == 0, 5)
    with pytest.raises(server.queue.Full):
        reward.go.clear()
        put(scorer, "e")
        put(scorer, "f", height=80)
    reward.go.set()
    assert "bc" not in ["".join(prompts) for _, prompts in reward.batches]


CLIENT = """
import sys, numpy as np, rewards
url, client, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
reward = rewards.build_rewards({"own:identity": 1.0}, urls={"own:identity": url}, batch=7)
columns = {}
for start in range(0, 1000, 50):
    numbers = np.arange(start, start + 50)
    images = np.zeros((50, 4 + client % 2, 4, 3), np.uint8)
    images[:, 0, 0] = np.stack([np.full(50, client), numbers // 256, numbers % 256], 1)
    scores = reward(images, [str(1000 * client + n) for n in numbers], [{"number": int(2000 * client + n)} for n in numbers])
    for name, values in scores.items():
        columns.setdefault(name, []).extend(values.tolist())
np.savez(file, **{name.partition("/")[2] or name: values for name, values in columns.items()})
"""


def test_four_clients_of_1000_images_get_their_own_scores_though_the_server_is_killed_and_restarted(serve, own_files):
    process, url, _ = serve("own:identity", "--batch", "16")
    files = [own_files / f"client{client}.npz" for client in range(4)]
    clients = [subprocess.Popen([sys.executable, "-c", CLIENT, url, str(client), file],
                                env={**os.environ, "PYTHONPATH": str(ROOT)}) for client, file in enumerate(files)]
    wait_until(lambda: httpx2.get(f"{url}/health").json()["scored"] > 1000, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    assert all(client.poll() is None for client in clients)             # in the middle
    serve("own:identity", "--batch", "16", port=int(url.rpartition(":")[2]))
    assert [client.wait(60) for client in clients] == [0] * 4
    numbers, largest = np.arange(1000), 0
    for client, file in enumerate(files):
        columns = np.load(file)
        assert columns["total"].tolist() == (65536 * client + numbers).tolist()
        assert columns["prompt"].tolist() == (1000 * client + numbers).tolist()
        assert columns["metadata"].tolist() == (2000 * client + numbers).tolist()
        largest = max(largest, columns["batch"].max())
    assert 7 < largest <= 16                                            # requests of 7 pictures were merged


# ---------------------------------------------------------------- fuzz


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jpeg", "line"])
@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_no_request_that_the_openapi_page_allows_or_forbids_makes_an_internal_error(name, mode, request):
    url = request.getfixturevalue(name)
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    # Too large is a refusal as well: what breaks one limit, of a prompt's length say, may break that of a request first.
    schema.config.checks.negative_data_rejection.expected_statuses = ["4xx"]
    # Equal lengths, whole pictures and quoted texts are more than a schema can say: what it allows may be refused.
    allowed = [schemathesis.checks.positive_data_acceptance]
    pictures, statuses = [GOOD, base64.b64encode(file_of(noise(1, 3, 50)[0])).decode(), GOOD[:200]], set()

    @hypothesis.settings(max_examples=15, deadline=None, database=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(schema["/score"]["POST"].as_strategy(generation_mode=mode), hypothesis.strategies.integers(1, 6))
    def fuzz(case, count):
        statuses.add(case.call_and_validate(excluded_checks=allowed).status_code)
        if mode == schemathesis.GenerationMode.POSITIVE:  # and as it is with pictures, three times out of four
            prompts, metadata = ([*column, *[default] * count][:count] for column, default in (
                (case.body["prompts"][:2], 'the word "a"'), (case.body["metadata"][:2], {})))
            case.body = {"images": (pictures * 2)[:count], "prompts": prompts, "metadata": metadata}
            statuses.add(case.call_and_validate(excluded_checks=allowed).status_code)

    fuzz()
    assert 422 in statuses and (200 in statuses) == (mode == schemathesis.GenerationMode.POSITIVE)
    assert all(status < 500 for status in statuses)
    assert httpx2.get(f"{url}/health").json()["ready"]


# ---------------------------------------------------------------- a server that stays away


class Peer(ThreadingHTTPServer):
    """A server of others: `answer(number of the request, body) -> (status, body, *headers)`."""

    def __init__(self, answer):
        self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                self.requests.append(body)
                status, content, *headers = answer(len(self.requests), body)
                handler.send_response(status)
                for header in headers:
                    handler.send_header(*header)
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                handler.wfile.write(content)

            def do_GET(handler):
                handler.send_error(404)

            def log_message(handler, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)


def test_the_deadline_counts_from_the_last_answer_that_the_server_gave_this_process():
    started = time.monotonic()
    busy = lambda body: body == b"late" and time.monotonic() - started < 2
    with Peer(lambda number, body: (503, b"busy") if busy(body) else (200, b"ok")) as peer:
        url = f"http://{peer.address}/"
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(rewards.post, url, content=b"late", deadline=0.8)
            while not late.done():
                rewards.post(url, content=b"other", deadline=5)
                time.sleep(0.1)
        assert late.result().content == b"ok" and time.monotonic() - started > 2


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the system does not list its connections")
def test_a_silent_connection_is_probed():
    def answer(number, body):
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        ours = [line for line in lines if line[2].endswith(f":{peer.server_port:04X}") and line[3] == "01"]
        return 200, ours[0][5].encode()                      # "02:..." while a timer of probes runs

    with Peer(answer) as peer:
        assert rewards.post(f"http://{peer.address}/", content=b"abc").content.startswith(b"02:")


SCORED = json.dumps({"scores": [0.5, 1.5], "metrics": {"m": [None, 2]}}).encode()


def test_a_server_that_stays_away_is_one_line_with_its_address_last_answer_and_how_to_start_it():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(RewardError) as error:
        remote("geneval", f"http://127.0.0.1:{port}/", deadline=1)(noise(2), ["", ""], [{}, {}])
    assert 0.4 < time.monotonic() - started < 20
    assert one_line(error, f"http://127.0.0.1:{port}/score", "refused",
                    f"python rewards.py serve geneval --host 127.0.0.1 --port {port}")


def test_a_server_in_trouble_is_asked_again_and_one_that_refuses_is_not():
    with Peer(lambda number, body: (503, b"busy") if number < 3 else (200, SCORED)) as peer:
        scores = remote("any", f"http://{peer.address}")(noise(2), ["a", "b"], [{}, {"x": 1}])
        assert scores["any"].tolist() == [0.5, 1.5] and len(peer.requests) == 3
        np.testing.assert_array_equal(scores["any/m"], [np.nan, 2])
        assert json.loads(peer.requests[0])["metadata"] == [{}, {"x": 1}]
    for status in (400, 401, 404, 413, 422):
        with Peer(lambda number, body: (status, b"because")) as peer, pytest.raises(RewardError) as error:
            remote("any", f"http://{peer.address}")(noise(2), ["a", "b"], [{}, {}])
        assert one_line(error, peer.address, str(status), "because") and len(peer.requests) == 1


@pytest.mark.parametrize("content", [
    b"nonsense", b"[]", b"{}", b'{"scores": [1, 2]}', b'{"scores": [1], "metrics": {}}', b'{"scores": 1, "metrics": {}}',
    b'{"scores": ["1", "2"], "metrics": {}}', b'{"scores": [1, 2], "metrics": {"m": [1]}}',
    b'{"scores": [[1], [2]], "metrics": {}}',
    b'{"scores": [1, null], "metrics": {}}', b'{"scores": [1, NaN], "metrics": {}}',
])  # fmt: skip
def test_an_answer_that_is_no_score_of_each_picture_stops_and_never_counts_as_one(content):
    with Peer(lambda number, body: (200, content)) as peer, pytest.raises(RewardError) as error:
        remote("any", f"http://{peer.address}")(noise(2), ["a", "b"], [{}, {}])
    assert one_line(error) and (peer.address in str(error.value) or "nan" in str(error.value))


# ---------------------------------------------------------------- the reward-server of Flow-GRPO


def test_geneval_of_an_existing_server_is_asked_with_jpeg_and_metadata_and_its_answer_understood():
    def answer(number, body):
        asked = pickle.loads(body)
        assert sorted(asked) == ["images", "meta_datas", "only_strict"] and asked["only_strict"] is False
        found = np.stack([np.asarray(Image.open(io.BytesIO(file), formats=["JPEG"])) for file in asked["images"]])
        brightness = [np.float64(picture.mean()) for picture in found]
        by_tag = {tag: [1.0 if entry["tag"] == tag else -10.0 for entry in asked["meta_datas"]] for tag in ("colors", "counting")}
        return 200, pickle.dumps({"scores": brightness, "rewards": [float(entry["prompt"]) for entry in asked["meta_datas"]],
                                  "strict_rewards": [0.0] * len(found), "group_rewards": by_tag,
                                  "group_strict_rewards": by_tag})

    images = np.stack([np.full((16, 24, 3), 5 * value, np.uint8) for value in range(7)])
    tags = ["colors", "counting", "position"] * 2 + ["colors"]
    with Peer(answer) as peer:
        scores = remote("geneval", f"pickle+http://{peer.address}", batch=3)(
            images, [str(i) for i in range(7)], [{"tag": tag, "include": []} for tag in tags])
    np.testing.assert_allclose(scores["total"], 5 * np.arange(7), atol=1)
    assert scores["geneval/accuracy"].tolist() == list(range(7)) and scores["geneval/strict_accuracy"].tolist() == [0] * 7
    for tag in ("colors", "counting"):
        expected = [1 if t == tag else np.nan for t in tags]
        np.testing.assert_array_equal(scores[f"geneval/accuracy/{tag}"], expected)
        np.testing.assert_array_equal(scores[f"geneval/strict_accuracy/{tag}"], expected)


def test_deqa_of_an_existing_server_is_asked_with_images_alone():
    def answer(number, body):
        asked = pickle.loads(body)
        assert list(asked) == ["images"]
        return 200, pickle.dumps({"outputs": [len(file) for file in asked["images"]]})

    images = noise(5)
    with Peer(answer) as peer:
        scores = remote("deqa", f"pickle+http://{peer.address}", batch=2)(images, [""] * 5, [{}] * 5)
    assert scores["deqa"].tolist() == [len(file_of(image, "JPEG")) for image in images]


def test_lists_within_lists_of_a_small_pickle_are_an_error_and_are_not_expanded():
    deep = [0.5]
    for _ in range(25):
        deep = [deep, deep]                                 # by reference, so that 250 bytes hold 2**25 numbers
    with Peer(lambda number, body: (200, pickle.dumps({"outputs": deep}))) as peer:
        started = time.process_time()
        with pytest.raises(RewardError) as error:
            remote("deqa", f"pickle+http://{peer.address}")(noise(2), [""] * 2, [{}] * 2)
    assert one_line(error, peer.address, "TypeError", "list") and time.process_time() - started < 1


PLAIN = {"a": [1, -2.5, True, None, "text", b"bytes", 2**70, (1, (2, 3)), {"b": [[], {}, ()]}], "s": {1, 2}, 3: float("inf")}
SCALARS = [np.float64(0.1), np.float32(0.1), np.float16(0.5), np.int64(-7), np.uint8(200), np.int32(5), np.bool_(True),
           np.str_("word"), np.float64("nan")]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_data_and_numpy_scalars_of_either_numpy_are_read(protocol):
    plain = {key: value for key, value in PLAIN.items() if protocol >= 4 or key != "s"}     # where sets have opcodes
    assert read_plain_pickle(pickle.dumps(plain, protocol)) == plain
    new = pickle.dumps(SCALARS, protocol)
    modules = [b"numpy._core.multiarray", b"numpy.core.multiarray"]
    old = new.replace(*modules)
    if protocol >= 4:                                                                      # there, lengths are written down
        old = new.replace(*[b"\x8c" + bytes([len(module)]) + module for module in modules])
        old = old[:2] + b"\x95" + (len(old) - 11).to_bytes(8, "little") + old[11:]
    assert old != new
    for data in (new, old):
        read = read_plain_pickle(data)
        assert all(type(value) in (float, int, bool, str) for value in read)
        np.testing.assert_equal(read, [value.item() for value in SCALARS])


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function, named", [
    (os.system, "system"), (eval, "eval"), (exec, "exec"), (getattr, "getattr"), (__import__, "__import__"),
    (subprocess.Popen, "Popen"), (np.load, "load"), (np.ndarray, "ndarray"), (pickle.loads, "loads"), (type, "type"),
])  # fmt: skip
def test_a_pickle_that_calls_something_is_refused_and_is_not_run(function, named, protocol, tmp_path):
    mark = tmp_path / "ran"
    code = {os.system: f"touch {mark}", subprocess.Popen: ["touch", str(mark)]}.get(function, f"open({str(mark)!r}, 'w')")
    with pytest.raises(ValueError) as error:
        read_plain_pickle(pickle.dumps({"scores": [Calls(function, code)]}, protocol))
    assert one_line(error, named, "refused") and not mark.exists()


def test_a_peer_that_answers_with_os_system_stops_the_client_with_one_line_and_runs_nothing(tmp_path):
    mark = tmp_path / "ran"
    poisoned = pickle.dumps({"outputs": [Calls(os.system, f"touch {mark}")]})
    with Peer(lambda number, body: (200, poisoned)) as peer, pytest.raises(RewardError) as error:
        remote("deqa", f"pickle+http://{peer.address}")(noise(1), [""], [{}])
    assert one_line(error, peer.address, "system", "refused") and not mark.exists()
    pickle.loads(poisoned)
    assert mark.exists()  # which it would have


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_and_numpy_scalars_come_through_a_pickle_of_any_protocol(protocol):
    plain = {"scores": [1, 2.5, True, None], "tags": {"a", "b"}, "both": (b"bytes", "text", frozenset({3}))}
    data = pickle.dumps({**plain, "numpy": [np.float32(0.5), np.int64(-7), np.bool_(True)]}, protocol)
    assert read_plain_pickle(data) == {**plain, "numpy": [0.5, -7, True]}


@pytest.mark.parametrize("data", [
    b"", b"nonsense", pickle.dumps([1, 2])[:-3], pickle.dumps(np.zeros(3)), pickle.dumps(np.float64(1)).replace(b"f8", b"O8"),
    pickle.dumps(np.datetime64("2020")), b"N" + b"\x85" * 300_000 + b"}\x94h\x00N0.",
    b"Nr\xff\xff\xff\xff.", b"(l" + b"N" * (1 << 24) + b"e.",
])  # fmt: skip
def test_a_pickle_that_is_damaged_or_holds_more_than_plain_data_is_an_error(data):
    with pytest.raises((ValueError, EOFError, pickle.UnpicklingError)):
        read_plain_pickle(data)


# ---------------------------------------------------------------- URLs, probe, the command


@pytest.mark.parametrize("url", ["http://host", "https://host:1/path", "http://[::1]:18085", "http://user:word@host:1/"])
def test_a_url_of_a_host_with_or_without_port_path_and_user_is_taken(url):
    rewards.check_reward_weights({"jpeg_compressibility": 1.0}, {"jpeg_compressibility": url})


@pytest.mark.parametrize("urls, contents", [
    ({"jpeg_compressibility": "ftp://host:1"}, ["'jpeg_compressibility'", "ftp://host:1", "pickle+http://"]),
    ({"jpeg_compressibility": "host:1"}, ["host:1", "http://"]),
    ({"jpeg_compressibility": "http://"}, ["'http://'"]),
    ({"jpeg_compressibility": ""}, ["''"]),
    ({"jpeg_compressibility": "pickle+http://host:1"}, ["pickle+", "geneval", "deqa"]),
    ({"jpeg_compressibility": "openai+http://host:1/v1"}, ["openai+", "qwenvl", "unifiedreward"]),
    ({"jpeg_compressibility": "http://host:port"}, ["'http://host:port'"]),
    ({"jpeg_compressibility": "http://host:99999"}, ["'http://host:99999'"]),
    ({"jpeg_compressibility": "http://host?x"}, ["'http://host?x'"]),
])  # fmt: skip
def test_a_url_that_cannot_be_asked_is_one_line(urls, contents):
    for check in (rewards.check_reward_weights, lambda weights, urls: build_rewards(weights, urls=urls)):
        with pytest.raises(ValueError) as error:
            check({"jpeg_compressibility": 1.0}, urls)
        assert one_line(error, *contents)


def test_what_goes_wrong_in_building_a_reward_is_one_line_whatever_it_raises(monkeypatch):
    def no_such_device(*, device):
        raise AssertionError("compiled without that device")

    monkeypatch.setattr(clip, "clipscore", no_such_device)
    with pytest.raises(ValueError) as error:
        build_rewards({"clipscore": 1.0})
    assert one_line(error, "'clipscore' cannot be built", "AssertionError", "compiled without that device")


def test_the_address_of_the_request_itself_will_do(jpeg):
    assert remote("jpeg_incompressibility", f"{jpeg}/score")(noise(1), [""], [{}])["total"] > 0


def test_a_name_that_only_the_server_knows_needs_a_url():
    build_rewards({"known_there": 1.0}, urls={"known_there": "https://host:1/path"})
    for urls in ({}, {"known_there": "openai+http://host:1"}):
        with pytest.raises(ValueError) as error:
            build_rewards({"known_there": 1.0}, urls=urls)
        assert one_line(error, "'known_there'")


def test_a_probe_scores_one_grey_picture_with_every_reward_and_stops_where_one_cannot():
    seen = []

    def fine(images, prompts, metadata):
        seen.append((images, prompts, metadata))
        return [0]

    probe(Rewards({"fine": 1}, {"fine": fine}), Prompt("a prompt", {"tag": 1}), (16, 24))
    (((image,), prompts, metadata),) = seen
    assert image.shape == (16, 24, 3) and (image == 128).all() and (prompts, metadata) == (["a prompt"], [{"tag": 1}])
    with pytest.raises(RewardError) as error:
        probe(Rewards({"fine": 1, "odd": 1}, {"fine": fine, "odd": lambda *batch: 1 / 0}), Prompt("a prompt", {}), (16, 24))
    assert one_line(error, "'odd'", "'a prompt'", "ZeroDivisionError")


def run_command(*arguments, code):
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_what_cannot_be_served_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, contents in [
            (["jpeg_compressibility", "--port", port], ["in use"]),
            (["jpeg_compress"], ["'jpeg_compress'", "known: jpeg_incompressibility"]),
            (["no_such_file:score"], ["no_such_file"]),
            (["jpeg_compressibility", "--models", "one"], ["--models one"]),
            (["jpeg_compressibility", "--max-waiting", "0"], ["--max-waiting"]),
            (["jpeg_compressibility", "--threads", "0"], ["threads"]),
            (["jpeg_compressibility", "--url", "ftp://x"], ["ftp://x"]),
        ]:
            assert server.main(["serve", *arguments]) == 2
            said = capsys.readouterr()
            assert not said.out and re.fullmatch(r"error: [^\n]+\n", said.err)
            assert all(content in said.err for content in contents)


def test_serving_asks_for_its_packages_by_name_and_importing_loads_none_of_them():
    code = "import sys, engines.serve; sys.modules['fastapi'] = sys.modules['uvicorn'] = None; engines.serve.main(sys.argv[1:])"
    ran = run_command("serve", "jpeg_compressibility", "--port", "0", code=code)
    assert "pip install fastapi uvicorn" in ran.stderr and ran.stderr.count("\n") == 1
    loaded = "import sys, engines.serve; print({'fastapi', 'uvicorn', 'pydantic', 'httpx2', 'torch', 'tyro'} & set(sys.modules))"
    assert run_command(code=loaded).stdout == "set()\n"


def test_a_server_may_listen_on_ipv6(serve):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    url = serve("jpeg_compressibility", "--host", "::1", shown=r"\[::1\]")[1]
    assert remote("jpeg_compressibility", url)(noise(2), ["", ""], [{}, {}])["total"].shape == (2,)


def test_a_password_in_a_url_is_never_shown(capfd):
    seen = []

    def answer(number, body):
        return 401, b"no"

    with Peer(answer) as peer:
        url = f"http://user:secret@{peer.address}/a+b"
        for urls in (url, [url, url.replace("secret", "hidden")]):
            with pytest.raises(RewardError) as error:
                remote("any", urls)(noise(1), [""], [{}])
            assert one_line(error, peer.address, "401")
            seen.append(str(error.value))
    with pytest.raises(RewardError) as error:
        remote("any", [url, f"{url}/other"], deadline=0.5)(noise(1), [""], [{}])
    with pytest.raises(ValueError) as refused:
        remote("any", f"ftp+{url}")
    said = "".join([*seen, str(error.value), str(refused.value), *capfd.readouterr()])
    assert "secret" not in said and "hidden" not in said and peer.address in said


def test_a_url_may_have_a_plus_in_its_path():
    def answer(number, body):
        return 200, pickle.dumps({"outputs": [1.0]})

    with Peer(answer) as peer:
        for url in (f"pickle+http://{peer.address}/a+b", [f"pickle+http://{peer.address}/a+b", f"pickle+http://{peer.address}/c+d"]):
            assert remote("deqa", url)(noise(1), [""], [{}])["deqa"].tolist() == [1]


def test_the_end_of_a_program_does_not_wait_for_a_silent_server():
    code = """
import sys, threading, numpy as np, rewards
reward = rewards.build_rewards({"any": 1.0}, urls={"any": sys.argv[1:] if len(sys.argv) > 2 else sys.argv[1]})
threading.Thread(target=reward, args=(np.zeros((1, 8, 8, 3), np.uint8), [""], [{}]), daemon=True).start()
threading.Event().wait(1)
"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url, started = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        for urls in ([url], [url, f"{url}/other"]):
            ran = run_command(*urls, code=code)
            assert ran.returncode == 0 and not ran.stderr and time.monotonic() - started < 60


def test_the_way_to_start_a_server_is_told_with_an_address_that_it_takes():
    with pytest.raises(RewardError) as error:
        remote("geneval", "http://[::1]:9", deadline=0.1)(noise(1), [""], [{}])
    assert one_line(error, "python rewards.py serve geneval --host ::1 --port 9")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_at_once_and_quietly_when_told_to(serve, sign):
    process, url, log = serve("jpeg_compressibility")
    remote("jpeg_compressibility", url)(noise(2), ["", ""], [{}, {}])
    process.send_signal(sign)
    assert process.wait(5) == 0 and log.read_text().count("\n") == 1


# ---------------------------------------------------------------- training


def test_training_with_the_reward_in_another_process_gives_the_same_weights_to_the_bit(line, tmp_path, monkeypatch):
    def weights(name, *flags):
        arguments = """--rewards rapidocr_line 1 --groups-per-epoch 2 --group-size 4 --updates-per-epoch 1 --epochs 2
            --num-steps 4 --window-size 2 --window-range 0 3 --eval-prompts 4 --eval-num-steps 4 --eval-images 0
            --rollout-batch 3 --train-batch 4""".split()
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--output-dir", str(tmp_path), "--run-name", name, *flags])
        train.main()
        state = torch.load(tmp_path / name / "checkpoints" / "epoch_00002" / "state.pt", weights_only=True)
        metrics = [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return state["trained"], [[m.get(key) for key in ("eval/total", "reward/rapidocr_line")] for m in metrics]

    scored = httpx2.get(f"{line}/health").json()["scored"]
    here, there = weights("here"), weights("there", "--reward-urls", "rapidocr_line", line)
    assert httpx2.get(f"{line}/health").json()["scored"] - scored == 1 + 4 + 2 * 8 + 4        # a probe, two evaluations
    assert here[1] == there[1] and len({row[1] for row in here[1]}) > 1
    assert all(torch.equal(a, b) for a, b in zip(here[0], there[0], strict=True))
