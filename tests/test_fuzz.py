"""Whatever is typed or read, one line says what is wrong with it, or it is good: command lines, settings, prompt files, metadata.

    FUZZ_EXAMPLES=5000 pytest -n 2 tests/test_fuzz.py         # so many random inputs to each test, other ones every time

Without that, a few, always the same.
"""

import dataclasses
import json
import math
import time
import typing

import pytest
import torch
from helpers import EXAMPLES, fuzz
from hypothesis import strategies as st

from config import PRESETS, Config, ConfigError, parse_config, to_dict, validate
from draws import draw_first_steps, noise_levels
from harness.batches import batch_plan, describe
from harness.checkpoint import changed_fields
from learner import learning_rate
from prompts import load_prompts
from engines.geneval import (GENEVAL_CLASSES, GENEVAL_COLORS, GENEVAL_RELATIONS, GENEVAL_TAGS, Detection, geneval_score)
from engines.ocr import quoted_text, text_score
from harness.scoring import check_reward_prompts
from rewards import REGISTRY, check_reward_weights
from sampler import rollout, timestep_schedule

def refusal(errors, call, *args, **kwargs) -> str:
    """What `call` says where it refuses its arguments: one line, not too long to read; "" where it takes them."""
    try:
        call(*args, **kwargs)
    except errors as error:
        message = str(error)
        assert message and len(message.splitlines()) == 1 and len(message) < 2000, message[:3000]
        return message
    return ""


# ------------------------------------------------------------------------------------------------------------- settings

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)
INTEGERS = st.integers(-3, 30) | st.integers(-10, 10**6) | st.integers()
FLOATS = st.floats(-1, 2) | st.floats() | st.sampled_from([0.0, 1.0, 1e-12, 1e-45, 1e9])
NAMES = st.sampled_from([*REGISTRY, "my_file:my_function", "tiny_ocr", "a b", "", "../x", "."]) | st.text(max_size=8)


def values_of(kind):
    """Values of a field's type, good ones and others."""
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        return (st.lists(values_of(inner[0]), max_size=3).map(tuple) if inner[-1] is ... else st.tuples(*map(values_of, inner)))
    return {bool: st.booleans(), int: INTEGERS, float: FLOATS, str: NAMES}[kind]


def words_of(value) -> list[str]:
    return [word for v in value for word in words_of(v)] if isinstance(value, tuple) else [str(value)]


@st.composite
def changes(draw, few=6):
    return {name: draw(values_of(TYPES[name])) for name in draw(st.lists(st.sampled_from(list(FIELDS)), max_size=few, unique=True))}


@st.composite
def command_lines(draw):
    words = draw(st.sampled_from([[], ["tiny_ocr"], ["sd35m_ocr"], ["flux_fast"]]) | st.lists(st.text(max_size=12), max_size=1))
    for name, value in draw(changes(4)).items():
        flag = "--" + name.replace("_", "-")
        words += [flag, *words_of(value)] if value not in (True, False) or draw(st.booleans()) else [f"--no-{flag[2:]}"]
    for _ in range(draw(st.integers(0, 2))):                                                # what does not belong there
        junk = draw(st.text(max_size=15) | st.sampled_from([
            "--", "-", "--help", "-h", "=", "--epochs=3", "--seed", "1" * 5000, "\n", "1e999", "--rewards", "{}", "é\udcff"]))
        words.insert(draw(st.integers(0, len(words))), junk)
    return words


def accepted_by_all_that_uses_it(config):
    """What a valid configuration promises, before anything is loaded."""
    for world_size in (1, 3, 64):
        plan = batch_plan(config, world_size, branches=2)
        assert 1 <= plan.trained_steps <= config.num_steps and plan.samples_per_rank * world_size >= plan.samples > 0
        described = describe(config, world_size, branches=2)
        assert f"{plan.samples} images" in described and f"({plan.trained_steps} trained)" in described
    assert changed_fields(json.loads(json.dumps(to_dict(config))), config) == []
    assert math.isfinite(learning_rate(config, 1000))
    if config.num_steps > 100 or config.groups_per_epoch > 1000:
        return
    first = draw_first_steps(config, 1)[:3]
    assert (first >= 0).all() and (first + plan.trained_steps <= config.num_steps).all()
    for dtype in (torch.float32, torch.float64):                                            # every trained step is stochastic
        start, levels = torch.zeros(len(first), 1, 1, 1, dtype=dtype), noise_levels(first, config)
        done = rollout(lambda x, sigma: x, start, timestep_schedule(config.num_steps, dtype=dtype), levels, torch.Generator(),
                       rule=config.rule, first_step=first, num_trained=plan.trained_steps)
        assert done.log_probs.shape == (plan.trained_steps, len(first))


@fuzz(20, words=command_lines())
def test_a_command_line_is_read_or_refused_in_one_line(words):
    accepted = []
    try:
        message = refusal(ConfigError, lambda: accepted.append(parse_config(words, quiet=True)[1]))
    except SystemExit as stop:
        assert stop.code in (0, None) and {"--help", "-h"} & set(words)
        return
    if not message and not refusal(ConfigError, validate, accepted[0]):
        accepted_by_all_that_uses_it(accepted[0])


@fuzz(100, changes=changes(), preset=st.sampled_from(list(PRESETS)))
def test_settings_are_refused_in_one_line_or_taken_by_all_that_uses_them(changes, preset):
    config = dataclasses.replace(PRESETS[preset], **changes)
    if not refusal(ConfigError, validate, config):
        accepted_by_all_that_uses_it(config)


# ------------------------------------------------------------------------------------------------- prompt files, metadata

KEYS = st.text(max_size=5) | st.sampled_from(["class", "count", "prompt"])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6)
CLASSES, COLORS, PLACES = map(st.sampled_from, (GENEVAL_CLASSES, GENEVAL_COLORS, GENEVAL_RELATIONS))


@st.composite
def geneval_objects(draw):
    """GenEval metadata, in most cases with one thing in it replaced, added or left out."""
    include = []
    for index in range(draw(st.integers(1, 3))):
        clause = {"class": draw(CLASSES), "count": draw(st.integers(1, 4))}
        if draw(st.booleans()):
            clause["color"] = draw(COLORS)
        if index and draw(st.booleans()):
            clause["position"] = [draw(PLACES), draw(st.integers(0, index - 1))]
        include.append(clause)
    metadata = {"prompt": draw(st.text(max_size=10)), "tag": draw(st.sampled_from(GENEVAL_TAGS)), "include": include}
    if draw(st.booleans()):
        metadata["exclude"] = [{"class": draw(CLASSES), "count": draw(st.integers(1, 5))}]
    place = metadata
    while draw(st.booleans()) and place:
        key = draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if isinstance(place[key], (dict, list)) and draw(st.booleans()):
            place = place[key]
        elif draw(st.booleans()):
            place[key] = draw(JSON | INTEGERS)
        elif isinstance(place, dict):
            del place[key]
        else:
            place.insert(key, draw(JSON))
    return metadata


DEEP = st.builds(lambda depth, pair: pair[0] * depth + pair[1] * depth, st.integers(1, 3000),
                 st.sampled_from(["[]", ('{"a":', "}")]))
ODD_LINES = [
    '{"prompt": "a cat"}', '{"prompt": "\\ud800"}', '{"prompt": ' + "1" * 5000 + "}", '{"prompt": "a"} {}', "{", "", " ", "\0",
    "\u2028", '{"prompt": "a", "include": [{"class": "cat", "count": ' + "9" * 4000 + "}]}", "\x1c", 'the word "cat"']
LINES = st.one_of(
    st.text(max_size=30), geneval_objects().map(json.dumps), geneval_objects().map(lambda m: json.dumps(m, ensure_ascii=False)),
    JSON.map(json.dumps), DEEP, DEEP.map('{{"prompt": "a cat", "include": {}}}'.format),
    DEEP.map('{{"prompt": "a", "b": {}}}'.format), st.sampled_from(ODD_LINES))
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def checked(path):
    """What is wrong with a prompt file, "" where nothing is."""
    found = []
    message = refusal((ValueError, OSError), lambda: found.extend(load_prompts(str(path), "train")))
    assert found or message.startswith(str(path))
    for prompt in found:
        assert prompt.text == prompt.text.strip() != "" and prompt.text.encode()
    for reward in ("geneval", "rapidocr"):
        refusal(ValueError, check_reward_prompts, {reward: 1.0}, [p.text for p in found], [p.metadata for p in found])
    return message


@fuzz(60, lines=st.lists(LINES, max_size=5), end=st.sampled_from(["\n", "\r\n", "\r"]), encoding=st.sampled_from(ENCODINGS),
      extension=st.sampled_from(["txt", "jsonl"]))
def test_a_prompt_file_in_any_encoding_is_read_or_refused_in_one_line(folder, lines, end, encoding, extension):
    path = folder / f"lines.{extension}"
    path.write_bytes(end.join(lines).encode(encoding, "replace"))
    message = checked(path)
    if encoding.startswith(("utf-16", "utf-32")) and any(map(str.strip, lines)):
        assert "UTF-8" in message


@pytest.mark.skipif(not EXAMPLES, reason="takes a minute, and a million plain prompts are loaded by test_prompts.py")
def test_a_million_objects_load_within_a_minute_of_computing(folder):
    path, started = folder / "million.jsonl", time.process_time()
    path.write_text("".join(f'{{"prompt": "{i} cats", "tag": "counting", "include": [{{"class": "cat", "count": {i + 1}}}]}}\n'
                            for i in range(10**6)))
    loaded = load_prompts(str(path), "test")
    check_reward_prompts({"geneval": 1.0}, [p.text for p in loaded], [p.metadata for p in loaded])
    assert len(loaded) == 10**6 and loaded[-1].text == "999999 cats" and time.process_time() - started < 60


PIECES = [b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"a", b'{"prompt": "a"}']


@fuzz(60, content=st.binary(max_size=60) | st.lists(st.sampled_from(PIECES)).map(b"".join),
      extension=st.sampled_from(["txt", "jsonl"]))
def test_any_bytes_are_prompts_or_refused_in_one_line(folder, content, extension):
    path = folder / f"bytes.{extension}"
    path.write_bytes(content)
    checked(path)


@fuzz(60, before=st.lists(st.sampled_from(["", "  ", '{"prompt": "fine"}', '{"prompt": "a\u2028b"}'])),
      end=st.sampled_from(["\n", "\r\n", "\r"]), broken=LINES, bad_byte=st.booleans())
def test_a_bad_line_is_named_by_its_number_whatever_ends_lines(folder, before, end, broken, bad_byte):
    path = folder / "broken.jsonl"
    content = end.join([*before, broken.replace("\n", " ").replace("\r", " ")]).encode("utf-8", "replace")
    path.write_bytes(content + b"\xff" * bad_byte + end.encode())
    message = checked(path)
    assert not bad_byte or "not UTF-8" in message
    assert not message or message.startswith((f"{path}:{len(before) + 1}: ", f"{path}: holds no prompts"))


@fuzz(100, metadata=geneval_objects() | st.dictionaries(st.sampled_from(["tag", "include", "exclude"]), JSON), prompt=st.text(),
      seen=st.lists(st.tuples(CLASSES, st.floats(0, 1), st.tuples(*[st.floats(-50, 50)] * 4), COLORS)))
def test_metadata_that_geneval_takes_it_can_judge(metadata, prompt, seen):
    if not refusal(ValueError, check_reward_prompts, {"geneval": 1.0}, [prompt], [metadata]):
        detections = [Detection(name, sure, box, color=color) for name, sure, box, color in seen]
        score, strict, accuracy = geneval_score(detections, metadata)
        assert math.isfinite(score) and score <= 1 and {strict, accuracy} <= {0.0, 1.0}


@fuzz(100, prompt=st.text(alphabet='"a \t\n\x1c\u2028\u00a0') | st.builds('{}"{}"{}'.format, *[st.text(max_size=9)] * 3),
      read=st.text())
def test_a_prompt_that_a_text_reward_takes_it_can_score(prompt, read):
    if not refusal(ValueError, check_reward_prompts, {"rapidocr": 1.0}, [prompt], [{}]):
        assert 0 <= text_score(quoted_text(prompt), read) <= 1


SCHEMES = ["http", "https", "pickle+http", "openai+http", "ftp"]
HOSTS = ["host", "host:1", "host:99999", "[::1]:8", "[", "host:x", ""]
URLS = st.text(max_size=20) | st.builds("{}://{}{}".format, st.sampled_from(SCHEMES), st.sampled_from(HOSTS) | st.text(max_size=6),
                                        st.sampled_from(["", "/", "/v1", "?a"]) | st.text(max_size=6))


@fuzz(100, weights=st.dictionaries(NAMES | st.text(max_size=6).map("no_{}:x".format), FLOATS | INTEGERS | JSON, max_size=4),
      urls=st.dictionaries(NAMES, URLS, max_size=2))
def test_weights_and_urls_are_taken_or_refused_in_one_line(weights, urls):
    refusal(ValueError, check_reward_weights, weights, urls)
