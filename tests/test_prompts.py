import functools
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import prompts
from draws import epoch_prompt_indices
from engines.geneval import check_prompt
from prompts import BUILT_IN, Prompt, load_prompts

ROOT = Path(prompts.__file__).parent
COLORS = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"}


built_in = functools.cache(load_prompts)


def texts(source, split):
    load = built_in if source in BUILT_IN else load_prompts
    return [prompt.text for prompt in load(str(source), split)]


def error(kind, source, split="train"):
    """The message with which loading fails: always one line."""
    with pytest.raises(kind) as caught:
        load_prompts(str(source), split)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- built-in sets ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, least_train, least_test", [("words", 772, 128), ("ocr", 10_000, 1_000),
                                                           ("geneval", 10_000, 1_000)])
def test_a_built_in_set_is_large_enough_and_its_splits_are_disjoint(name, least_train, least_test):
    train, test = texts(name, "train"), texts(name, "test")
    assert len(set(train)) >= least_train and len(set(test)) >= least_test
    assert not {text.lower() for text in train} & {text.lower() for text in test}
    assert len(test) == len(set(test))


def test_built_in_sets_are_the_same_in_another_process_with_another_hash_seed():
    code = ("import hashlib, prompts\n"
            "for name in prompts.BUILT_IN:\n"
            "    for split in prompts.SPLITS:\n"
            "        print(hashlib.sha256(repr(prompts.load_prompts(name, split)).encode()).hexdigest())")
    here = [hashlib.sha256(repr(load_prompts(name, split)).encode()).hexdigest()
            for name in BUILT_IN for split in prompts.SPLITS]
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
                               check=True)
        assert there.stdout.split() == here


def test_building_a_set_and_drawing_an_epoch_leave_global_random_state_alone():
    random.seed(7), np.random.seed(7)
    expected = random.random(), np.random.rand()
    random.seed(7), np.random.seed(7)
    for name in BUILT_IN:
        load_prompts(name, "train")
    epoch_prompt_indices(100, 48, seed=0, epoch=3)
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("name, split, digest", [
    ("words", "train", "515cf94b1f3247c392733d193493934b459926aa27b9db3811e00a0b86017ed3"),
    ("words", "test", "438c899575b60935fb9a2a31e0af07bb96940a1186672ef9aa23a1c4c6a81aa2"),
    ("ocr", "train", "714573bdf2be444274cb5c4e00de5d8e78657c9997ef008126a46522d8f94428"),
    ("ocr", "test", "9aeabaccbc07462d725716f3d5be6d51dd96badd79a04bfe7ac5709450a7494d"),
    ("geneval", "train", "ac4b718fddad6d8206432c97db699e135a5b3f3e0ae29b2b2d8e56bd9ec0bf3d"),
    ("geneval", "test", "fae8bba61d3dc1ee93ef53c586fb8ce76135e150dd6f31e5e049e861df6babbe")])
def test_a_built_in_set_is_the_one_it_always_was(name, split, digest):
    found = json.dumps([[prompt.text, prompt.metadata] for prompt in built_in(name, split)])
    assert hashlib.sha256(found.encode()).hexdigest() == digest


def test_words_are_distinct_lower_case_and_three_to_five_letters_long():
    for split in prompts.SPLITS:
        for prompt in load_prompts("words", split):
            assert re.fullmatch(r'the word "[a-z]{3,5}"', prompt.text) and prompt.metadata == {}
    assert len(prompts.VOCABULARY) == len(set(prompts.VOCABULARY))
    assert sorted(prompts.words("train") + prompts.words("test")) == sorted(prompts.VOCABULARY)


def test_word_lengths_are_balanced_and_train_words_use_every_letter_often():
    test_lengths = Counter(map(len, prompts.words("test")))
    train_lengths = Counter(map(len, prompts.words("train")))
    assert sum(test_lengths.values()) == 128 and max(test_lengths.values()) - min(test_lengths.values()) <= 1
    assert max(train_lengths.values()) <= 1.2 * min(train_lengths.values())
    letters = Counter("".join(prompts.words("train")))
    assert len(letters) == 26 and min(letters.values()) >= 15


def test_the_word_split_is_the_one_the_bundled_model_was_trained_on():
    digest = hashlib.sha256(" ".join(prompts.words("test")).encode()).hexdigest()
    assert digest == "86844e55bfd5b800191bbb1ed18a609cc58b0700356a62b8c099c4a4d4e89d17"


def test_an_ocr_prompt_quotes_one_text_and_no_text_is_in_both_splits():
    def quoted(split):
        found = [re.fullmatch(r'[^"]*"([^"]+)"[^"]*', text) for text in texts("ocr", split)]
        assert all(found)
        return {match[1].lower().replace(" ", "") for match in found}

    train, test = quoted("train"), quoted("test")
    assert len(train) >= 2_000 and len(test) >= 200 and not train & test


def test_every_ocr_scene_has_exactly_one_place_for_the_text():
    assert all(scene.count("{}") == 1 and '"' not in scene for scene in prompts.OCR_SCENES)
    assert len(set(prompts.OCR_SCENES)) == len(prompts.OCR_SCENES)


# ---- GenEval ----------------------------------------------------------------------------------------------------

def geneval(tag):
    both = built_in("geneval", "train") + built_in("geneval", "test")
    return [prompt for prompt in both if prompt.metadata["tag"] == tag]


def test_geneval_has_its_80_objects_and_six_tasks_in_both_splits():
    assert len(set(prompts.GENEVAL_OBJECTS)) == 80 and set(prompts.GENEVAL_COLORS) == COLORS
    for split in prompts.SPLITS:
        tags = {prompt.metadata["tag"] for prompt in built_in("geneval", split)}
        assert tags == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}


def test_geneval_metadata_holds_the_prompt_known_classes_and_survives_json():
    for split in prompts.SPLITS:
        for text, metadata in ((prompt.text, prompt.metadata) for prompt in built_in("geneval", split)):
            assert metadata["prompt"] == text and json.loads(json.dumps(metadata)) == metadata
            assert set(metadata) - {"exclude"} == {"tag", "include", "prompt"}
            assert ("exclude" in metadata) == (metadata["tag"] == "counting")
            assert {entry["class"] for entry in metadata["include"]} <= set(prompts.GENEVAL_OBJECTS)
            assert not any(entry["class"] == "person" and "color" in entry for entry in metadata["include"])
            assert len({entry["class"] for entry in metadata["include"]}) == len(metadata["include"])


@pytest.mark.parametrize("tag, entry_keys", [
    ("single_object", [{"class", "count"}]),
    ("two_object", [{"class", "count"}] * 2),
    ("counting", [{"class", "count"}]),
    ("colors", [{"class", "count", "color"}]),
    ("position", [{"class", "count"}, {"class", "count", "position"}]),
    ("color_attr", [{"class", "count", "color"}] * 2),
])
def test_each_geneval_task_has_the_entries_that_its_scorer_reads(tag, entry_keys):
    for prompt in geneval(tag):
        assert [set(entry) for entry in prompt.metadata["include"]] == entry_keys
        if tag != "counting":
            assert all(entry["count"] == 1 for entry in prompt.metadata["include"])


def test_a_counting_prompt_excludes_one_more_than_it_includes():
    words = {2: "two", 3: "three", 4: "four"}
    for prompt in geneval("counting"):
        (include,), (exclude,) = prompt.metadata["include"], prompt.metadata["exclude"]
        assert prompt.text.startswith(f"a photo of {words[include['count']]} ")
        assert exclude == {"class": include["class"], "count": include["count"] + 1}


def test_a_position_prompt_places_its_first_object_relative_to_its_second():
    for prompt in geneval("position"):
        target, placed = prompt.metadata["include"]
        relation, index = placed["position"]
        assert index == 0 and relation in ("left of", "right of", "above", "below")
        first, second = prompt.text.removeprefix("a photo of ").split(f" {relation} ")
        assert first.endswith(placed["class"]) and second.endswith(target["class"])


def test_colored_prompts_name_each_color_before_its_object():
    for prompt in geneval("colors") + geneval("color_attr"):
        phrases = prompt.text.removeprefix("a photo of ").split(" and ")
        assert len(phrases) == len(prompt.metadata["include"])
        for phrase, entry in zip(phrases, prompt.metadata["include"]):
            assert entry["color"] in COLORS and phrase.endswith(f"{entry['color']} {entry['class']}")


def test_no_position_prompt_says_in_other_words_what_another_says():
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    claims = {(placed["class"], placed["position"][0], target["class"])
              for target, placed in (prompt.metadata["include"] for prompt in geneval("position"))}
    assert not claims & {(target, mirrored[relation], placed) for placed, relation, target in claims}


def test_articles_and_plurals_are_english():
    for split in prompts.SPLITS:
        for text in texts("geneval", split):
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
    plurals = {include["class"]: prompt.text.split(" ", 4)[4] for prompt in geneval("counting")
               for include in prompt.metadata["include"]}
    expected = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice",
                "bus": "buses", "bench": "benches", "sandwich": "sandwiches", "couch": "couches", "dog": "dogs",
                "wine glass": "wine glasses", "toothbrush": "toothbrushes", "giraffe": "giraffes", "vase": "vases",
                "skis": "pairs of skis", "scissors": "pairs of scissors", "broccoli": "heads of broccoli"}
    assert {name: plurals[name] for name in expected} == expected


def test_geneval_train_holds_the_mix_of_tasks_that_flow_grpo_trains_on():
    counts = Counter(prompt.metadata["tag"] for prompt in built_in("geneval", "train"))
    unit = counts["two_object"]
    assert [counts[tag] / unit for tag in ("position", "counting", "color_attr", "colors")] == [7, 5, 3, 1]


# ---- files ------------------------------------------------------------------------------------------------------

def test_a_directory_gives_each_split_its_own_file(tmp_path):
    write(tmp_path / "train.txt", "a cat\na dog\n")
    write(tmp_path / "test.txt", "a fox\n")
    assert load_prompts(str(tmp_path), "train") == [Prompt("a cat", {}), Prompt("a dog", {})]
    assert load_prompts(str(tmp_path), "test") == [Prompt("a fox", {})]


def test_a_file_serves_both_splits(tmp_path):
    path = write(tmp_path / "mine.txt", "a cat\n")
    assert texts(path, "train") == texts(path, "test") == ["a cat"]


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbfa cat\nun caf\xc3\xa9\n",
    b"a cat\r\nun caf\xc3\xa9\r\n",
    b"a cat\run caf\xc3\xa9",
    b"\n  a cat \t\n\n   \nun caf\xc3\xa9",
], ids=["byte order mark", "CRLF", "CR", "blank lines and spaces"])
def test_line_ends_blank_lines_and_byte_order_marks_are_no_part_of_a_prompt(tmp_path, content):
    assert texts(write(tmp_path / "a.txt", content), "train") == ["a cat", "un café"]


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "one\u2028line"}\n')
    assert texts(path, "train") == ["one\u2028line"]


def test_the_built_in_geneval_set_written_as_metadata_files_loads_back_unchanged(tmp_path):
    for split in prompts.SPLITS:
        lines = [json.dumps(prompt.metadata) for prompt in built_in("geneval", split)]
        write(tmp_path / f"{split}_metadata.jsonl", "\n".join(lines))
    for split in prompts.SPLITS:
        assert load_prompts(str(tmp_path), split) == built_in("geneval", split)


def test_metadata_keeps_keys_that_only_the_users_reward_knows(tmp_path):
    metadata = {"prompt": "a cat", "answer": [1, {"deep": None}]}
    assert load_prompts(str(write(tmp_path / "a.jsonl", json.dumps(metadata))), "test") == [Prompt("a cat", metadata)]


@pytest.mark.slow
def test_a_million_lines_load_within_seconds(tmp_path):
    path = write(tmp_path / "many.txt", "".join(f"a photo of number {number}\n" for number in range(1_000_000)))
    start = time.process_time()
    loaded = load_prompts(str(path), "train")
    assert time.process_time() - start < 10
    assert len(loaded) == 1_000_000 and loaded[-1].text == "a photo of number 999999"


# ---- bad input --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", ["no/such/path", "geneva", "", "a very long prompt instead of a path " * 100])
def test_a_missing_path_is_named_beside_the_built_in_sets(source):
    message = error(FileNotFoundError, source)
    assert repr(source) in message and all(name in message for name in BUILT_IN)


def test_an_unknown_split_is_named():
    for source in [*BUILT_IN, "no/such/path"]:
        assert "'validation'" in error(ValueError, source, "validation")


@pytest.mark.parametrize("present, missing", [("train.txt", "test.txt"),
                                              ("train_metadata.jsonl", "test_metadata.jsonl")])
def test_a_directory_without_the_splits_file_names_that_file(tmp_path, present, missing):
    write(tmp_path / present, '{"prompt": "a cat"}')
    message = error(FileNotFoundError, tmp_path, "test")
    assert str(tmp_path) in message and missing in message


def test_a_directory_without_any_prompt_file_names_both_kinds(tmp_path):
    message = error(FileNotFoundError, tmp_path)
    assert str(tmp_path) in message and "train.txt" in message and "train_metadata.jsonl" in message


@pytest.mark.parametrize("text, metadata", [("train.txt", "train_metadata.jsonl"),
                                            ("train.txt", "test_metadata.jsonl")])
def test_a_directory_with_both_kinds_asks_for_the_file(tmp_path, text, metadata):
    write(tmp_path / text, "a cat")
    write(tmp_path / metadata, '{"prompt": "a cat"}')
    for split in prompts.SPLITS:
        message = error(ValueError, tmp_path, split)
        assert str(tmp_path) in message and "name the file" in message


def test_a_file_of_another_kind_is_refused_by_its_extension(tmp_path):
    message = error(ValueError, write(tmp_path / "a.csv", "a cat"))
    assert "a.csv" in message and ".txt" in message and ".jsonl" in message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts_is_named(tmp_path, name, content):
    path = write(tmp_path / name, content)
    assert str(path) in error(ValueError, path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_invalid_utf8_is_named_by_file_line_and_byte(tmp_path, name):
    path = write(tmp_path / name, b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "caf\xe9"}\n')
    offset = path.read_bytes().index(b"\xe9")
    message = error(ValueError, path)
    assert f"{path}:3:" in message and f"byte {offset} " in message and "0xe9" in message


@pytest.mark.parametrize("line, complaint", [
    ('{"prompt": "a cat"', "not JSON"),
    ("a cat", "not JSON"),
    ('"a cat"', '"prompt"'),
    ('["a cat"]', '"prompt"'),
    ("null", '"prompt"'),
    ('{"text": "a cat"}', '"prompt"'),
    ('{"prompt": 3}', '"prompt"'),
    ('{"prompt": null}', '"prompt"'),
    ('{"prompt": "  "}', '"prompt"'),
])
def test_bad_metadata_is_named_by_file_line_and_key(tmp_path, line, complaint):
    path = write(tmp_path / "a.jsonl", '{"prompt": "fine"}\n\n' + line + "\n")
    message = error(ValueError, path)
    assert message.startswith(f"{path}:3: ") and complaint in message


def test_an_object_with_a_null_field_as_the_library_datasets_writes_it_is_a_prompt(tmp_path):
    metadata = {"prompt": "a photo of a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}], "exclude": None}
    (prompt,) = load_prompts(str(write(tmp_path / "a.jsonl", json.dumps(metadata))), "train")
    assert prompt.metadata == metadata and check_prompt(prompt.text, prompt.metadata) is None


def test_a_long_bad_line_is_shortened_in_its_message(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "cat " * 10_000}))
    assert len(error(ValueError, path)) < 300


# ---- the draw of an epoch ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_prompts, groups", [(10, 3), (7, 7), (5, 12), (1, 4), (48, 48), (100, 1)])
def test_every_prompt_is_drawn_once_before_any_is_drawn_twice(num_prompts, groups):
    epochs = 3 * num_prompts
    drawn = [index for epoch in range(epochs) for index in epoch_prompt_indices(num_prompts, groups, 5, epoch)]
    assert len(drawn) == epochs * groups
    for first in range(0, len(drawn) - num_prompts + 1, num_prompts):
        assert sorted(drawn[first:first + num_prompts]) == list(range(num_prompts))


def test_the_draw_does_not_depend_on_how_the_sequence_is_cut_into_epochs():
    whole = epoch_prompt_indices(11, 60, seed=3, epoch=0)
    for groups in (1, 4, 12, 30):
        assert whole == [index for epoch in range(60 // groups) for index in epoch_prompt_indices(11, groups, 3, epoch)]


def test_each_pass_and_each_seed_has_its_own_order():
    orders = {tuple(epoch_prompt_indices(50, 50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_each_prompt_is_equally_likely_at_each_place():
    first = Counter(epoch_prompt_indices(4, 1, seed, 0)[0] for seed in range(2_000))
    # 500 expected, standard deviation 19.4: five of them.
    assert all(abs(first[index] - 500) < 97 for index in range(4))


def test_a_late_epoch_of_a_large_set_costs_no_more_than_its_own_pass():
    start = time.process_time()
    indices = epoch_prompt_indices(1_000_000, 48, seed=0, epoch=10**9)
    assert time.process_time() - start < 2
    assert len(set(indices)) == 48 and all(type(index) is int and 0 <= index < 1_000_000 for index in indices)
