"""Claims about rewards.py, proven on the real rapidocr engines.

PaddleOCR is not installed here: of the reward `ocr`, only the parsing of its results is tested, on results built
by hand.
"""

import functools
import io
import itertools
import logging
import math
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import rewards
from engines import ocr
from engines.ocr import text_score
from config import Config
from harness.run import make_rewards
from harness.scoring import check_reward_prompts, probe
from prompts import Prompt
from rewards import (RewardError, build_reward, build_rewards, check_reward_weights, import_reward,
                     jpeg_compressibility)

LINE = (64, 32)  # width, height of a picture of one word
SCENE = (512, 512)


def render(text, size, font_size, fill="black", background="white"):
    """A picture of `text`, centred: (H, W, 3) uint8."""
    image = Image.new("RGB", size, background)
    font = ImageFont.load_default(font_size)
    ImageDraw.Draw(image).text((size[0] / 2, size[1] / 2), text, font=font, fill=fill, anchor="mm", align="center")
    return np.array(image)


def noisy_words(words, seed=0):
    """Pictures of words under strong noise, so that some are read wrong: (B, 32, 64, 3) uint8."""
    clean = np.stack([render(word, LINE, 20) for word in words]).astype(float)
    noise = np.random.default_rng(seed).normal(0, 150, clean.shape)
    return (clean + noise).clip(0, 255).astype(np.uint8)


@functools.cache
def reward(name):
    return build_reward(name)


def score(name, image, target):
    return reward(name)(image[None], [f'a sign that says "{target}"'], [{}])[0]


def one_line(error, *contents):
    """Asserts that a raised error is one line that holds every one of `contents`."""
    message = str(error.value)
    assert "\n" not in message
    for content in contents:
        assert content in message
    return True


# ---------------------------------------------------------------- text score


@pytest.mark.parametrize(
    "a, b, distance",
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("intention", "execution", 5)],
)
def test_edit_distance_of_textbook_pairs(a, b, distance):
    assert ocr.edit_distance(a, b) == ocr.edit_distance(b, a) == distance


def test_edit_distance_is_its_recursive_definition_and_a_metric():
    @functools.cache
    def recursive(a, b):
        if not a or not b:
            return len(a) + len(b)
        substituted = recursive(a[1:], b[1:]) + (a[0] != b[0])
        return min(recursive(a[1:], b) + 1, recursive(a, b[1:]) + 1, substituted)

    words = ["".join(letters) for n in range(5) for letters in itertools.product("ab", repeat=n)][::2]
    distances = {(a, b): ocr.edit_distance(a, b) for a in words for b in words}
    for (a, b), distance in distances.items():
        assert distance == recursive(a, b) == distances[b, a]
        assert (distance == 0) == (a == b)
        assert all(distance <= distances[a, c] + distances[c, b] for c in words)


@pytest.mark.parametrize(
    "target, recognised, expected",
    [
        ("hello", "hello", 1),
        ("Hello World", "say HELLOworld!", 1),  # case and spaces do not count; surplus around the target does not
        ("hello", "hallo", 1 - 1 / 5),
        ("hello", "hel", 1 - 2 / 5),
        ("hello", "", 0),
        ("cat", "qqqqqqqqqqqqqqqqqq", 0),  # the distance is cut off at the target's length: never negative
        ("héllo", "HÉLLO", 1),
        ("ΑΣ Β", "ΑΣΒ", 1),  # a sigma is another letter at the end of a word, so the spaces go first
    ],
)
def test_text_score_of_known_pairs(target, recognised, expected):
    assert text_score(target, recognised) == pytest.approx(expected, abs=1e-12)


def test_text_score_of_an_empty_target_is_an_error():
    with pytest.raises(ValueError):
        text_score("  ", "anything")


@pytest.mark.parametrize(
    "prompt, quoted",
    [
        ('a sign that says "hello"', "hello"),
        ('"first" and "second"', "first"),
        ('says "Hello World" in blue', "Hello World"),
        ("it's a \"dog's\" bowl", "dog's"),
        ('says "two\nlines"', "two\nlines"),
        ('a "b', "b"),  # a quote that is not closed reaches to the end, as the authors score it
    ],
)
def test_quoted_text_is_between_the_first_pair_of_double_quotes(prompt, quoted):
    assert ocr.quoted_text(prompt) == quoted


@pytest.mark.parametrize("prompt", ["a cat", "", 'one "', 'says ""', 'says "  "', 'says "" and "cat"', "'cat'"])
def test_a_prompt_without_a_quoted_text_is_an_error_that_names_it(prompt):
    with pytest.raises(ValueError) as error:
        ocr.quoted_text(prompt)
    assert one_line(error, repr(prompt))


# ---------------------------------------------------------------- JPEG size


def test_jpeg_scores_are_the_bytes_of_pillows_encoder():
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 40, 3), dtype=np.uint8)
    images[1] = 128
    expected = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        expected.append(len(buffer.getvalue()))
    scores = build_rewards({"jpeg_incompressibility": 1, "jpeg_compressibility": 1})(images, [""] * 3, [{}] * 3)
    np.testing.assert_allclose(scores["jpeg_incompressibility"] * 1000, expected, rtol=1e-6)
    np.testing.assert_allclose(scores["jpeg_compressibility"] * 500 * 1000, -np.array(expected), rtol=1e-6)


def test_noise_compresses_worse_than_a_flat_picture():
    flat = np.full((64, 64, 3), 90, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    incompressibility = rewards.jpeg_incompressibility(np.stack([flat, noise]), ["", ""], [{}, {}])
    compressibility = rewards.jpeg_compressibility(np.stack([flat, noise]), ["", ""], [{}, {}])
    assert incompressibility[1] > 5 * incompressibility[0] > 0
    assert compressibility[1] < compressibility[0] < 0


# ---------------------------------------------------------------- OCR


@pytest.mark.parametrize("name, size, font_size", [("rapidocr", SCENE, 60), ("rapidocr_line", LINE, 22)])
@pytest.mark.parametrize("fill, background", [("black", "white"), ("yellow", "navy")])
def test_a_rendered_word_scores_one_and_less_for_another_target(name, size, font_size, fill, background):
    image = render("Stone", size, font_size, fill, background)
    assert score(name, image, "Stone") == 1
    assert score(name, image, "stove") == pytest.approx(1 - 1 / 5)
    assert score(name, image, "pigs") < 0.5


def test_rapidocr_joins_the_lines_of_a_scene_in_reading_order():
    image = render("green\ntea\nhouse", SCENE, 60)
    assert score("rapidocr", image, "green tea house") == 1
    assert score("rapidocr", image, "house tea green") < 1


@pytest.mark.parametrize("name, size", [("rapidocr", SCENE), ("rapidocr_line", LINE)])
def test_a_picture_without_text_scores_zero_and_logs_nothing(name, size, caplog):
    blank = np.full((size[1], size[0], 3), 128, np.uint8)
    logging.getLogger("RapidOCR").addHandler(caplog.handler)
    try:
        assert build_reward(name)(blank[None], ['"word"'], [{}]) == [0]
    finally:
        logging.getLogger("RapidOCR").removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("height, width", [(32, 64), (64, 32), (17, 200), (512, 512)])
def test_rapidocr_line_takes_pictures_of_any_shape(height, width):
    images = np.full((5, height, width, 3), 128, np.uint8)
    assert reward("rapidocr_line")(images, ['"cat"'] * 5, [{}] * 5).tolist() == [0] * 5


@pytest.fixture
def network_calls(monkeypatch):
    """Every (input, output) of the networks that rapidocr runs."""
    from rapidocr.inference_engine.onnxruntime.main import OrtInferSession

    calls, run = [], OrtInferSession.__call__

    def recorded(session, inputs):
        outputs = run(session, inputs)
        calls.append((inputs.copy(), outputs.copy()))
        return outputs

    monkeypatch.setattr(OrtInferSession, "__call__", recorded)
    return calls


def test_rapidocr_line_scores_a_picture_the_same_in_any_batch_to_the_bit(network_calls):
    words = ["cat", "stone", "river", "moon", "tree", "lamp", "door", "bird", "fish", "sand", "wolf"]
    images = noisy_words(words)
    prompts, metadata = [f'"{word}"' for word in words], [{}] * len(words)

    def scored_in(order, batch):
        """Scores and network outputs of each picture, scored in `order`, `batch` at a time."""
        network_calls.clear()
        scores = np.zeros(len(words), np.float32)
        for start in range(0, len(words), batch):
            ids = order[start : start + batch]
            scores[ids] = reward("rapidocr_line")(images[ids], [prompts[i] for i in ids], metadata[: len(ids)])
        outputs = {row.tobytes(): output for x, y in network_calls for row, output in zip(x, y)}
        return scores, outputs

    expected, expected_outputs = scored_in(np.arange(len(words)), len(words))
    assert 0 < expected.mean() < 1 and len(set(expected)) > 2  # a reading that noise could sway
    for batch in (1, 2, 3, 4, 7, 11):
        scores, outputs = scored_in(np.random.default_rng(batch).permutation(len(words)), batch)
        assert scores.tolist() == expected.tolist()
        assert outputs.keys() == expected_outputs.keys()
        assert all(np.array_equal(outputs[row], expected_outputs[row]) for row in outputs)


def test_rapidocr_line_recognises_without_detection_at_the_width_of_the_picture(network_calls):
    score("rapidocr_line", render("cat", LINE, 22), "cat")
    assert [inputs.shape for inputs, _ in network_calls] == [(ocr.LINE_BATCH, 3, 48, 96)]


@pytest.mark.parametrize("name", ["rapidocr", "rapidocr_line"])
def test_the_networks_see_blue_green_red(name, network_calls):
    score(name, np.full((64, 64, 3), (255, 128, 0), np.uint8), "cat")
    np.testing.assert_allclose(network_calls[0][0][0].mean(axis=(1, 2)), [-1, 0, 1], atol=0.01)


@pytest.mark.parametrize("name, size", [("rapidocr", SCENE), ("rapidocr_line", LINE)])
def test_rapidocr_never_touches_the_network(name, size, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("network")

    for call in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, call, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    fresh = build_reward(name)
    assert fresh(render("cat", size, 22)[None], ['"cat"'], [{}]) == [1]


@pytest.mark.parametrize("name, size, count", [("rapidocr", (256, 128), 2), ("rapidocr_line", LINE, 12)])
def test_threads_that_share_a_reward_get_their_own_scores(name, size, count):
    words = ["cat", "stone", "river", "moon"]

    def own_scores(word):
        images = np.stack([render(word, size, 22)] * count)
        return reward(name)(images, [f'"{other}"' for other in (word, "zzz") * (count // 2)], [{}] * count).tolist()

    with ThreadPoolExecutor(len(words)) as pool:
        assert list(pool.map(own_scores, words)) == [[1, 0] * (count // 2)] * len(words)


def test_an_engine_is_used_by_one_thread_at_a_time():
    inside, seen = [], []

    def read(images):
        inside.append(threading.get_ident())
        seen.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return ["cat"] * len(images)

    shared = ocr.text_reward(lambda: read, 1, 1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: shared(np.zeros((1, 8, 8, 3), np.uint8), ['"cat"'], [{}]), range(8)))
    assert seen == [1] * 8


def test_a_background_worker_gives_the_scores_of_the_main_thread():
    weighted = build_rewards({"rapidocr_line": 1.0, "jpeg_compressibility": 0.1})
    batch = (noisy_words(["cat", "stone", "river"]), ['"cat"', '"stone"', '"river"'], [{}] * 3)
    expected = weighted(*batch)
    with ThreadPoolExecutor(max_workers=1) as worker:
        for future in [worker.submit(weighted, *batch) for _ in range(3)]:
            assert {name: scores.tolist() for name, scores in future.result().items()} == {
                name: scores.tolist() for name, scores in expected.items()
            }


def test_the_lines_that_paddleocr_finds_are_joined(monkeypatch):
    class PaddleOCR:
        def __init__(self, **settings):
            self.texts = iter((["green", "tea"], []))

        def predict(self, image):
            return [{"rec_texts": next(self.texts), "rec_scores": []}]

    monkeypatch.setitem(sys.modules, "paddleocr", SimpleNamespace(PaddleOCR=PaddleOCR))
    images, prompt = np.zeros((2, 8, 8, 3), np.uint8), 'a sign that says "green tea"'
    assert build_rewards({"ocr": 1})(images, [prompt] * 2, [{}] * 2)["ocr"].tolist() == [1, 0]


@pytest.mark.parametrize(
    "name, module, package", [("ocr", "paddleocr", "paddlepaddle"), ("rapidocr", "onnxruntime", "onnxruntime")]
)
def test_a_missing_engine_is_one_line_that_says_what_to_install(name, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError) as error:
        build_rewards({name: 1})
    assert one_line(error, module, "pip install", package)


# ---------------------------------------------------------------- names, weights and prompts at start-up


def test_import_and_checks_load_no_engine():
    code = (
        "import sys, rewards\n"
        "rewards.check_reward_weights(dict.fromkeys(rewards.REGISTRY, 1.0))\n"
        "checks = [getattr(rewards.import_reward(name), 'check_prompt', None) for name in rewards.REGISTRY]\n"
        "metadata = {'tag': 'single_object', 'include': [{'class': 'cat', 'count': 1}]}\n"
        "assert [check('says \"cat\"', metadata) for check in checks if check] == [None] * 4\n"
        "print(sorted({'torch', 'cv2', 'onnxruntime', 'rapidocr', 'paddleocr'} & set(sys.modules)))"
    )
    here = os.path.dirname(rewards.__file__)
    ran = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "weights, contents",
    [
        ({}, ["no reward", "rapidocr_line", "my_file:my_function"]),
        ({"rapidocr_lin": 1.0}, ["'rapidocr_lin'", " rapidocr_line,", "my_file:my_function"]),
        ({"beauty": 1.0}, ["'beauty'", "known", *rewards.REGISTRY]),
        ({"rapidocr": float("nan")}, ["'rapidocr'", "nan", "finite"]),
        ({"jpeg_compressibility": 1.0, "rapidocr": float("-inf")}, ["'rapidocr'", "-inf", "finite"]),
        ({"rapidocr": "much"}, ["'rapidocr'", "'much'", "finite"]),
        ({"rapidocr": 0.0, "jpeg_compressibility": 0}, ["0", "rapidocr", "jpeg_compressibility"]),
        ({"no_such_file:score": 1.0}, ["'no_such_file:score'", "No module named"]),
        ({"math:no_such_name": 1.0}, ["'math:no_such_name'", "'math'", "'no_such_name'"]),
        ({"math:pi": 1.0}, ["'math:pi'", "3.14", "not a callable"]),
        ({":score": 1.0}, ["':score'"]),
    ],
)
def test_weights_that_cannot_be_built_are_one_line_that_names_them(weights, contents):
    for check in (check_reward_weights, build_rewards):
        with pytest.raises(ValueError) as error:
            check(weights)
        assert one_line(error, *contents)


def test_a_reward_needs_at_least_one_thread():
    with pytest.raises(ValueError) as error:
        build_rewards({"jpeg_compressibility": 1}, threads=0)
    assert one_line(error, "threads", "0")


def test_a_prompt_that_a_text_reward_cannot_score_is_named():
    prompts = ['says "cat"', "a dog\nin the sun"]
    for name in ("rapidocr", "rapidocr_line", "ocr"):
        with pytest.raises(ValueError) as error:
            check_reward_prompts({"jpeg_compressibility": 1.0, name: 0.5}, prompts, [{}, {}])
        assert one_line(error, repr(name), repr(prompts[1]))
    check_reward_prompts({"jpeg_compressibility": 1.0}, prompts, [{}, {}])  # which scores any prompt


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    """A current directory with a user's own files in it."""
    (tmp_path / "own_rewards.py").write_text(
        "def brightness(images, prompts, metadata):\n    return images.mean(axis=(1, 2, 3))\n"
    )
    (tmp_path / "broken_rewards.py").write_text("def brightness(images:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_dotted_name_is_a_function_of_a_file_in_the_current_directory(own_rewards):
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 200)])
    scores = build_rewards({"own_rewards:brightness": 2.0})(images, ["a", "b"], [{}, {}])
    assert scores["own_rewards:brightness"].tolist() == [10, 200]
    assert scores["total"].tolist() == [20, 400]


def test_a_dotted_name_whose_file_does_not_import_is_one_line(own_rewards):
    with pytest.raises(ValueError) as error:
        check_reward_weights({"broken_rewards:brightness": 1.0})
    assert one_line(error, "'broken_rewards:brightness'", "SyntaxError")


# ---------------------------------------------------------------- the weighted dict

IMAGES = np.zeros((3, 8, 8, 3), np.uint8)
PROMPTS = ["red\ncat", "green cat", "blue cat"]
METADATA = [{"gives": 1.0}, {"gives": 2.0}, {"gives": 3.0}]


def rewards_of(**components):
    return rewards.Rewards(dict.fromkeys(components, 1), components)


def test_total_is_the_weighted_sum_of_raw_float32_scores():
    components = {
        "metadata": lambda images, prompts, metadata: [entry["gives"] for entry in metadata],
        "length": lambda images, prompts, metadata: np.array([len(prompt) for prompt in prompts]),
        "logged_only": lambda images, prompts, metadata: np.ones(len(images), bool),
    }
    scores = rewards.Rewards({"metadata": 0.5, "length": -2, "logged_only": 0}, components)(IMAGES, PROMPTS, METADATA)
    assert list(scores) == ["metadata", "length", "logged_only", "total"]
    assert all(value.dtype == np.float32 and value.shape == (3,) for value in scores.values())
    assert scores["metadata"].tolist() == [1, 2, 3] and scores["length"].tolist() == [7, 9, 8]
    np.testing.assert_allclose(scores["total"], [0.5 - 14, 1 - 18, 1.5 - 16], rtol=1e-6)


def test_a_torch_tensor_is_accepted_with_gradient_and_in_half_precision():
    scores = rewards_of(
        grad=lambda *batch: torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        half=lambda *batch: torch.tensor([0.5, 1.5, 2.5], dtype=torch.bfloat16),
    )(IMAGES, PROMPTS, METADATA)
    assert scores["grad"].tolist() == [1, 2, 3] and scores["half"].tolist() == [0.5, 1.5, 2.5]
    assert scores["total"].dtype == np.float32


def test_a_reward_that_raises_stops_with_its_name_prompt_and_cause():
    def picky(images, prompts, metadata):
        raise KeyError("no\nkey")

    with pytest.raises(RewardError) as error:
        rewards_of(fine=rewards.jpeg_compressibility, picky=picky)(IMAGES, PROMPTS, METADATA)
    assert one_line(error, "'picky'", repr(PROMPTS[0]), "KeyError")
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_a_score_that_is_not_finite_stops_with_the_first_such_prompt(value):
    with pytest.raises(RewardError) as error, np.errstate(over="ignore"):
        rewards_of(odd=lambda *batch: np.array([0.0, value, np.nan]))(IMAGES, PROMPTS, METADATA)
    assert one_line(error, "'odd'", repr(PROMPTS[1]))
    assert re.search(r"nan|inf", str(error.value))


@pytest.mark.parametrize(
    "returned",
    [
        np.zeros(2), np.zeros((3, 1)), np.float32(1), None, ["a", "b", "c"], [0.1, None, 0.3], [[1], [2, 3], [4]],
        np.zeros(3, complex), {"score": 1}, torch.zeros(3, 1),
    ],
)  # fmt: skip
def test_what_is_not_one_number_per_picture_stops_with_the_reward_and_the_prompt(returned):
    with pytest.raises(RewardError) as error:
        rewards_of(odd=lambda *batch: returned)(IMAGES, PROMPTS, METADATA)
    assert one_line(error, "'odd'", repr(PROMPTS[0]))


@pytest.mark.parametrize(
    "images, prompts, metadata, content",
    [
        (IMAGES.astype(np.float32), PROMPTS, METADATA, "float32"),
        (IMAGES.transpose(0, 3, 1, 2), PROMPTS, METADATA, "(3, 3, 8, 8)"),
        (IMAGES[0], PROMPTS, METADATA, "(8, 8, 3)"),
        (list(IMAGES), PROMPTS, METADATA, "list"),
        (torch.zeros(3, 8, 8, 3, dtype=torch.uint8), PROMPTS, METADATA, "torch.uint8"),
        (IMAGES[:2], PROMPTS, METADATA, "2 images, 3 prompts"),
        (IMAGES, PROMPTS, METADATA[:1], "1 metadata"),
        (IMAGES[:0], [], [], "0 images"),
    ],
)
def test_a_batch_of_the_wrong_form_is_refused(images, prompts, metadata, content):
    with pytest.raises(ValueError) as error:
        rewards_of(jpeg=rewards.jpeg_compressibility)(images, prompts, metadata)
    assert one_line(error, content)


# ---------------------------------------------------------------- what a reward may not change or end


def by_numpy(images, prompts, metadata):
    images[:] = 0


def by_torch(images, prompts, metadata):
    torch.from_numpy(images).zero_()


def by_force(images, prompts, metadata):
    images.setflags(write=True)
    images[:] = 0


@pytest.mark.parametrize("write", [by_numpy, by_torch, by_force])
def test_a_reward_that_writes_to_its_pictures_changes_nobody_elses(write):
    images, seen = np.full((3, 8, 8, 3), 200, np.uint8), threading.Barrier(2, timeout=10)

    def writer(images, *others):
        try:
            write(images, *others)
        finally:
            seen.wait()
        return np.zeros(3)

    def reader(images, prompts, metadata):
        seen.wait()
        return images.mean((1, 2, 3))

    both = rewards_of(writer=writer, reader=reader)
    if write is by_numpy:
        with pytest.raises(RewardError) as error:
            both(images, PROMPTS, METADATA)
        assert one_line(error, "'writer'", "read-only", "images.copy()")
    else:
        assert both(images, PROMPTS, METADATA)["reader"].tolist() == [200] * 3
    assert (images == 200).all()


def test_a_reward_gets_prompts_and_metadata_of_its_own_nested_ones_too():
    prompts, metadata = ["a", "b", "c"], [{"include": [{"count": 1}]} for _ in range(3)]

    def vandal(images, prompts, metadata):
        prompts[0] = "other"
        metadata[1]["include"][0]["count"] = 9
        metadata[2]["include"].clear()
        return np.zeros(len(prompts))

    rewards_of(vandal=vandal, other=vandal)(IMAGES, prompts, metadata)
    assert prompts == ["a", "b", "c"] and metadata == [{"include": [{"count": 1}]}] * 3


def stream_states():
    return random.getstate()[1], np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.get_rng_state().tolist()


def draw_from_streams():
    return random.random() + np.random.rand() + torch.rand(1).item()


def seed_streams(*batch):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    return [draw_from_streams() for _ in range(3)]


def test_the_random_streams_are_untouched_by_rewards_that_seed_them_side_by_side():
    together = threading.Barrier(2, timeout=10)

    def overlapping(*batch):
        together.wait()
        return seed_streams()[:1]

    before = stream_states()
    for _ in range(2):
        probe(rewards_of(one=overlapping, two=overlapping), Prompt("a", {}), (8, 8))
    assert stream_states() == before


def test_the_random_streams_are_untouched_by_a_reward_that_fails_or_a_slower_one():
    ended = []

    def slow(*batch):
        time.sleep(0.3)
        ended.append(seed_streams())
        return [0]

    before = stream_states()
    with pytest.raises(RewardError):
        probe(rewards_of(odd=lambda *batch: seed_streams() and 1 / 0, slow=slow), Prompt("a", {}), (8, 8))
    assert stream_states() == before and ended


def test_a_reward_that_draws_draws_anew_at_each_call():
    drawn = []

    def draws(*batch):
        drawn.append(draw_from_streams())
        return [0]

    for _ in range(3):
        probe(rewards_of(random=draws), Prompt("a", {}), (8, 8))
    assert len(set(drawn)) == 3


def test_a_run_that_builds_a_reward_keeps_its_streams_and_settings_of_torch(own_rewards, tmp_path, monkeypatch):
    (tmp_path / "seeds_rewards.py").write_text(
        "import random, numpy, torch\nrandom.seed(0); numpy.random.seed(0); torch.manual_seed(0)\n"
        "torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64)\n"
        "def score(images, prompts, metadata):\n    return numpy.zeros(len(images))\n"
    )
    before = stream_states()
    probe(make_rewards(Config(rewards=(("seeds_rewards:score", 1.0),)), torch.device("cpu")), Prompt("a", {}), (8, 8))
    assert stream_states() == before and torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit("so"), type("Odd", (BaseException,), {})()])
def test_whatever_a_reward_raises_is_a_reward_error_with_its_name(raised):
    def ends(*batch):
        raise raised

    with pytest.raises(RewardError) as error:
        rewards_of(ends=ends)(IMAGES, PROMPTS, METADATA)
    assert one_line(error, "'ends'", repr(PROMPTS[0]), type(raised).__name__)


async def asynchronous(images, prompts, metadata):
    return np.zeros(len(images))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reward, named", [
    (lambda *batch: None, "'odd' is None"),
    (lambda *batch: {"score": 1}, "'odd' is {'score': 1}, a dict of shape ()"),
    (lambda *batch: (np.zeros(3), {"metric": None}), "'odd/metric' is None"),
    (asynchronous, "'odd' is <coroutine object asynchronous"),
    (asynchronous, "(write it with def, not async def)"),
    (lambda *batch: (score for score in range(3)), "'odd' is <generator object"),
    (lambda *batch: np.zeros((3, 1)), "of shape (3, 1), not numbers of shape (3,)"),
])  # fmt: skip
def test_what_a_reward_returns_in_place_of_numbers_is_named(reward, named):
    with pytest.raises(RewardError) as error:
        rewards_of(odd=reward)(IMAGES, PROMPTS, METADATA)
    assert one_line(error, "reward 'odd'", named, repr(PROMPTS[0]))


def test_files_of_the_current_directory_do_not_hide_built_in_rewards(own_rewards, tmp_path):
    (tmp_path / "engines").mkdir()
    for name in ("rewards.py", "engines/ocr.py"):
        (tmp_path / name).write_text("def brightness(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    assert import_reward("jpeg_compressibility") is jpeg_compressibility
    assert import_reward("rapidocr").__module__ == "engines.ocr" and str(tmp_path) not in sys.modules["engines.ocr"].__file__
    assert import_reward("rewards:brightness")(np.ones((1, 2, 2, 3)), [], []) == [1]


@pytest.mark.parametrize("name", ["total", "thumbnail", "drift"])
def test_a_served_reward_has_not_the_name_of_a_column_that_a_run_has_itself(name):
    with pytest.raises(ValueError) as error:
        check_reward_weights({name: 1.0}, {name: "http://host:1"})
    assert one_line(error, f"a reward cannot be called {name!r}")


def test_a_file_that_parses_a_command_line_is_one_line_and_prints_nothing(own_rewards, tmp_path, capfd):
    (tmp_path / "parsing_rewards.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--needed', required=True)\n"
        "parser.parse_args([])\n"
    )
    with pytest.raises(ValueError) as error:
        check_reward_weights({"parsing_rewards:score": 1.0})
    assert one_line(error, "'parsing_rewards:score'", "it parses a command line")
    assert capfd.readouterr() == ("", "")


def test_what_a_file_prints_and_logs_at_its_import_and_later_is_shown(own_rewards, tmp_path, capfd):
    (tmp_path / "chatty_rewards.py").write_text(
        "import logging, sys\nprint('imported')\nhandler = logging.StreamHandler()\n"
        "def score(images, prompts, metadata):\n"
        "    handler.emit(logging.LogRecord('x', 20, 'f', 1, 'called', (), None))\n    return [0]\n"
    )
    probe(build_rewards({"chatty_rewards:score": 1.0}), Prompt("a", {}), (8, 8))
    assert capfd.readouterr() == ("imported\n", "called\n")


# ---------------------------------------------------------------- factories and prompt checks of one's own


def test_a_file_of_ones_own_may_hold_a_factory_that_gets_the_options_that_it_names(own_rewards, tmp_path):
    (tmp_path / "own_factory.py").write_text(
        "def brightness(*, device, batch, model='default'):\n"
        "    assert (device, batch, model) == ('cuda:1', 3, 'here')\n"
        "    return lambda images, prompts, metadata: images.mean((1, 2, 3))\n"
        "def exits(*, device):\n    raise SystemExit(3)\n"
        "def other(*, model='default'):\n    return lambda *batch: None\n"
    )
    name = "own_factory:brightness"
    probe(build_rewards({name: 1.0}, device="cuda:1", batch=3, models={name: "here"}), Prompt("a", {}), (8, 8))
    with pytest.raises(ValueError) as error:
        build_rewards({"own_factory:exits": 1.0})
    assert one_line(error, "'own_factory:exits' cannot be built", "SystemExit: 3")
    with pytest.raises(ValueError) as error:
        build_rewards({"own_factory:other": 1.0}, models={"own_factory:other.part": "x"})
    assert one_line(error, "'own_factory:other.part'", "model")


def test_a_reward_of_ones_own_may_check_its_prompts(own_rewards, tmp_path):
    (tmp_path / "checking_rewards.py").write_text(
        "def score(images, prompts, metadata):\n    return [0] * len(images)\n"
        "def check(prompt, metadata):\n    metadata.pop('tag')\n"
        "score.check_prompt = check\n"
    )
    metadata = [{"tag": 1}, {}]
    with pytest.raises(ValueError) as error:
        check_reward_prompts({"checking_rewards:score": 1.0}, ["a", "b"], metadata)
    assert one_line(error, "'checking_rewards:score'", "KeyError", "'tag'") and metadata == [{"tag": 1}, {}]


def test_a_file_of_ones_own_that_is_served_elsewhere_is_not_imported(own_rewards, tmp_path):
    (tmp_path / "served_rewards.py").write_text("raise SystemExit(1)\n")
    urls = {"served_rewards:score": "http://host:1"}
    check_reward_weights({"served_rewards:score": 1.0}, urls)
    check_reward_prompts({"served_rewards:score": 1.0}, ["a"], [{}], urls)
    build_rewards({"served_rewards:score": 1.0}, urls=urls)


def test_a_reward_is_a_file_by_its_path_or_name_whatever_else_has_that_name(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text("from neighbour import VALUE\ndef f(i, p, m): return [VALUE] * len(p)\n")
    (tmp_path / "sub" / "neighbour.py").write_text("VALUE = 2.0\n")
    (tmp_path / "test.py").write_text("def f(i, p, m): return [3.0] * len(p)\n")       # Python has a package of this name
    (tmp_path / "random.py").write_text("def f(i, p, m): return [4.0] * len(p)\n")     # and this file itself uses that one
    monkeypatch.chdir(tmp_path)
    names = ["sub/mine.py:f", f"{tmp_path}/sub/mine.py:f", "test:f", "random.py:f"]
    scores = build_rewards(dict.fromkeys(names, 1.0))(IMAGES, PROMPTS, METADATA)
    assert [scores[name][0] for name in names] == [2, 2, 3, 4]


def test_a_files_neighbours_are_looked_for_in_the_current_directory_first(tmp_path, monkeypatch):
    for name in "abcdef":                                   # because a set's order may be right by chance
        (tmp_path / name).mkdir()
        (tmp_path / name / f"in_{name}.py").write_text("def f(i, p, m): return [1.0] * len(p)\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        before = list(sys.path)
        build_rewards({f"{name}/in_{name}.py:f": 1.0})
        assert sys.path == [*before, str(tmp_path), str(tmp_path / name)]
        monkeypatch.undo()


def test_an_infinite_metric_says_nothing_and_an_infinite_score_is_an_error():
    def measured(images, prompts, metadata):
        return [1.0] * len(prompts), {"psnr": [math.inf, 2.0, -math.inf][:len(prompts)]}

    columns = rewards.Rewards({"own": 1}, {"own": measured})(IMAGES[:3], PROMPTS[:3], METADATA[:3])
    assert np.isnan(columns["own/psnr"][[0, 2]]).all() and columns["own/psnr"][1] == 2
    with pytest.raises(rewards.NonFiniteScore):
        rewards.Rewards({"own": 1}, {"own": lambda i, p, m: [math.inf] * len(p)})(IMAGES, PROMPTS, METADATA)


def test_a_thread_that_cannot_start_raises_and_hangs_nothing():
    def broken():
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no device"):
        rewards.Rewards({"a": 1.0}, {"a": lambda *batch: np.zeros(3)}, broken)(IMAGES, PROMPTS, METADATA)
