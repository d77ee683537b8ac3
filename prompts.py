"""Prompt sets, and which prompts an epoch draws.

A set is a built-in name ("words", "ocr", "geneval"), or a file or directory of the user's: one prompt a line, or
GenEval metadata (arXiv 2310.11513), one JSON object a line. The splits "train" and "test" of a built-in set are
disjoint; a directory has a file for each; a single file serves as both.
"""

import json
import os
import re
from dataclasses import dataclass, field
from hashlib import sha256
from io import StringIO
from itertools import combinations, permutations, product
from pathlib import Path
from random import Random

import numpy as np

SPLITS = ("train", "test")
SPLIT_FILES = ("{}.txt", "{}_metadata.jsonl")
DATA = Path(__file__).parent / "assets" / "prompts"          # the lists of words from which the built-in sets are made
SEED = 0  # of the built-in sets: what is in them, and which split holds it


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a reward needs to know beyond its text: {} or, from GenEval metadata, the whole object."""

    text: str
    metadata: dict = field(default_factory=dict, hash=False)


def load_prompts(source: str, split: str) -> list[Prompt]:
    """The prompts of `source` (a built-in name, a directory or a file) for `split` ("train" or "test").

    A built-in name wins over a path of the same name: write "./words" for a directory called words.

    Raises FileNotFoundError where there is no such file, ValueError where its contents are not prompts or the split is
    neither; both say in one line where the fault is and what to do.
    """
    _check_split(split)
    if source in BUILT_IN:
        return BUILT_IN[source](split)
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        path = _split_file(path, split)
    elif not os.path.isfile(path):
        raise FileNotFoundError(f"prompts {source!r}: no such file or directory; give a .txt or .jsonl file, "
                                f"a directory, or a built-in set: {', '.join(BUILT_IN)} "
                                "(the README tells how to fetch published ones)")
    extension = os.path.splitext(path)[1].lower()
    if extension not in (".txt", ".jsonl"):
        raise ValueError(f"prompts {source!r}: unknown kind of file {extension!r}; give a .txt file (one prompt a "
                         "line) or a .jsonl file (one GenEval object a line)")
    lines = _numbered_lines(path)
    prompts = ([Prompt(line) for _, line in lines] if extension == ".txt" else
               [_metadata_prompt(line, f"{path}:{number}") for number, line in lines])
    if not prompts:
        raise ValueError(f"{path}: holds no prompts; write one a line")
    return prompts


def epoch_prompt_indices(num_prompts: int, groups_per_epoch: int, seed: int, epoch: int) -> list[int]:
    """Which prompt each group of `epoch` (from 0) gets: `groups_per_epoch` indices below `num_prompts`.

    The set is gone through in passes, each a permutation seeded by (seed, pass); an epoch takes the next
    `groups_per_epoch` places of that endless sequence. So every prompt is drawn once before any is drawn twice, and
    the draw is a function of its arguments alone: every rank computes the same, and resuming needs no state.

    Raises ValueError for a set or an epoch without prompts, or a negative seed or epoch.
    """
    for name, value, least in (("num_prompts", num_prompts, 1), ("groups_per_epoch", groups_per_epoch, 1),
                               ("seed", seed, 0), ("epoch", epoch, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    start, stop = epoch * groups_per_epoch, (epoch + 1) * groups_per_epoch
    indices = []
    for pass_index in range(start // num_prompts, (stop - 1) // num_prompts + 1):
        order = np.random.default_rng([seed, pass_index]).permutation(num_prompts)
        first = pass_index * num_prompts
        indices += order[max(start - first, 0):stop - first].tolist()
    return indices


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")


def _split_file(directory: str, split: str) -> str:
    kinds = [kind for kind in SPLIT_FILES
             if any(os.path.isfile(os.path.join(directory, kind.format(name))) for name in SPLITS)]
    if len(kinds) == 2:
        raise ValueError(f"{directory}: holds both plain prompts and GenEval metadata; name the file you mean, "
                         f"such as {os.path.join(directory, SPLIT_FILES[0].format(split))}")
    for kind in kinds:
        path = os.path.join(directory, kind.format(split))
        if os.path.isfile(path):
            return path
    expected = " or ".join(kind.format(split) for kind in kinds or SPLIT_FILES)
    raise FileNotFoundError(f"{directory}: no {expected} in this directory; add it, "
                            "or name a file to use for both splits")


def _numbered_lines(path: str) -> list[tuple[int, str]]:
    with open(path, "rb") as file:
        content = file.read()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        number = len(re.split(b"\r\n|\r|\n", content[:error.start]))
        raise ValueError(f"{path}:{number}: not UTF-8: byte {error.start} of the file is "
                         f"0x{content[error.start]:02x}; save it as UTF-8") from None
    # StringIO ends lines at \n, \r\n and \r alone; str.splitlines would also cut JSON strings at U+2028.
    stripped = ((number, line.strip()) for number, line in enumerate(StringIO(text, newline=None), start=1))
    lines = [(number, line) for number, line in stripped if line]
    if "\0" in text:
        number = next(number for number, line in lines if "\0" in line)
        raise ValueError(f"{path}:{number}: holds a zero byte, as text in UTF-16 does; save it as UTF-8")
    return lines


def _metadata_prompt(line: str, place: str) -> Prompt:
    try:
        metadata = json.loads(line)
        json.dumps(metadata, ensure_ascii=False).encode()      # which half of a surrogate pair is not; nothing could read it
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}; write one object a line") from None
    except UnicodeEncodeError:
        raise ValueError(f"{place}: {_shortened(line)} holds half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError):                       # what Python's own limits refuse
        raise ValueError(f"{place}: {_shortened(line)} holds a number of thousands of digits, or is nested too deeply") from None
    text = metadata.get("prompt") if isinstance(metadata, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{place}: {_shortened(line)} is not an object with a non-empty string "prompt"; add one')
    for clause in ("include", "exclude"):
        entries = metadata.get(clause, [])
        if not isinstance(entries, list):
            raise ValueError(f'{place}: "{clause}" is {_shortened(json.dumps(entries))}; make it a list of objects')
        for entry in entries:
            if not _is_object_count(entry):
                raise ValueError(f'{place}: "{clause}" entry {_shortened(json.dumps(entry))} needs a "class" (a name) '
                                 'and a "count" (a whole number, at least 1)')
    return Prompt(text.strip(), metadata)


def _is_object_count(entry) -> bool:
    # type() and not isinstance(): True is an int.
    return (isinstance(entry, dict) and isinstance(entry.get("class"), str) and entry["class"].strip() != ""
            and type(entry.get("count")) is int and entry["count"] >= 1)


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


# ---- words: what the bundled model can spell ----------------------------------------------------------------------

VOCABULARY = (DATA / "words.txt").read_text(encoding="utf-8").split()
WORDS_TEST_PER_LENGTH = {3: 43, 4: 43, 5: 42}


def words(split: str) -> list[str]:
    """The words of `split` ("train" or "test"), lengths mixed, in an order that never changes."""
    _check_split(split)
    # By hash, not by a random generator: the bundled model's weights rest on this split, whatever the Python version.
    ordered = sorted(VOCABULARY, key=lambda word: sha256(word.encode()).digest())
    test = {word for length, count in WORDS_TEST_PER_LENGTH.items()
            for word in [word for word in ordered if len(word) == length][:count]}
    return [word for word in ordered if (word in test) == (split == "test")]


def word_prompts(split: str) -> list[Prompt]:
    """Prompts `the word "lamp"`; 3 to 5 lower-case letters, 128 of them held out."""
    return [Prompt(f'the word "{word}"') for word in words(split)]


# ---- ocr: scenes with a quoted text, for models that know what a shop sign is ------------------------------------

_ocr = json.loads((DATA / "ocr.json").read_text(encoding="utf-8"))
OCR_SCENES, OCR_QUALITIES, OCR_THINGS = _ocr["scenes"], _ocr["qualities"], _ocr["things"]
OCR_NUMBERED, OCR_PHRASES = _ocr["numbered"], _ocr["phrases"]
OCR_TEST_TEXTS = 300
OCR_SCENES_PER_TEXT = 5


def ocr_prompts(split: str) -> list[Prompt]:
    """Scenes with one text in double quotes; the texts of the two splits are disjoint, not only the prompts."""
    _check_split(split)
    rng = Random(SEED)
    texts = [f"{quality} {thing}" for quality, thing in product(OCR_QUALITIES, OCR_THINGS)]
    texts += [f"{place} {number}" for place, number in product(OCR_NUMBERED, range(2, 32))]
    texts += OCR_PHRASES
    rng.shuffle(texts)
    scenes = [rng.sample(OCR_SCENES, OCR_SCENES_PER_TEXT) for _ in texts]
    chosen = slice(OCR_TEST_TEXTS) if split == "test" else slice(OCR_TEST_TEXTS, None)
    prompts = [Prompt(scene.format(f'"{text}"'))
               for text, text_scenes in zip(texts[chosen], scenes[chosen]) for scene in text_scenes]
    rng.shuffle(prompts)
    return prompts


# ---- geneval: objects, numbers, colours and places, after GenEval (arXiv 2310.11513) -----------------------------

_geneval = json.loads((DATA / "geneval.json").read_text(encoding="utf-8"))
GENEVAL_OBJECTS, GENEVAL_COLORS = _geneval["objects"], _geneval["colors"]
GENEVAL_POSITIONS = tuple(_geneval["positions"])
IRREGULAR_PLURALS, COUNTED_BY = _geneval["irregular_plurals"], _geneval["counted_by"]
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}


def _a(name: str, color: str = "") -> str:
    phrase = f"{color} {name}".strip()
    if name in COUNTED_BY:
        phrase = f"{COUNTED_BY[name]} of {phrase}"
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _plural(name: str) -> str:
    if name in COUNTED_BY:
        return f"{COUNTED_BY[name]}s of {name}"
    return IRREGULAR_PLURALS.get(name) or name + ("es" if name.endswith(("s", "ch", "sh")) else "s")


def _single_object(name):
    return dict(include=[{"class": name, "count": 1}], prompt=f"a photo of {_a(name)}")


def _two_object(pair):
    return dict(include=[{"class": name, "count": 1} for name in pair],
                prompt=f"a photo of {_a(pair[0])} and {_a(pair[1])}")


def _counting(name, count):
    return dict(include=[{"class": name, "count": count}], exclude=[{"class": name, "count": count + 1}],
                prompt=f"a photo of {NUMBER_WORDS[count]} {_plural(name)}")


def _colors(name, color):
    return dict(include=[{"class": name, "count": 1, "color": color}], prompt=f"a photo of {_a(name, color)}")


def _position(pair, position):
    # The second object stands first in the list: a position refers to an earlier entry by its index.
    return dict(include=[{"class": pair[1], "count": 1}, {"class": pair[0], "count": 1, "position": [position, 0]}],
                prompt=f"a photo of {_a(pair[0])} {position} {_a(pair[1])}")


def _color_attr(pair, colors):
    return dict(include=[{"class": name, "count": 1, "color": color} for name, color in zip(pair, colors)],
                prompt=f"a photo of {_a(pair[0], colors[0])} and {_a(pair[1], colors[1])}")


# Task: distinct test prompts, distinct train prompts, copies of each in train. The mix is the one Flow-GRPO trains on,
# 7 position : 5 counting : 3 color_attr : 1 colors : 1 two_object : 0 single_object (here 60 prompts, not none). Only
# 240 counting prompts exist; without copies they would be one draw in sixty.
GENEVAL_SIZES = {"single_object": (20, 60, 1), "two_object": (240, 1000, 1), "counting": (40, 200, 25),
                 "colors": (240, 500, 2), "position": (240, 7000, 1), "color_attr": (240, 3000, 1)}


def geneval_prompts(split: str) -> list[Prompt]:
    """The six tasks of GenEval, in its metadata format. Test holds each prompt once; train repeats those of the tasks
    that have few (GENEVAL_SIZES)."""
    _check_split(split)
    rng = Random(SEED)
    # Each pair in one order only: "a cat right of a dog" must not be tested after training "a dog left of a cat".
    pairs = [tuple(rng.sample(pair, 2)) for pair in combinations(GENEVAL_OBJECTS, 2)]
    colorable = [name for name in GENEVAL_OBJECTS if name != "person"]
    colorable_pairs = [pair for pair in pairs if "person" not in pair]
    tasks = {
        "single_object": (_single_object, product(GENEVAL_OBJECTS)),
        "two_object": (_two_object, product(pairs)),
        "counting": (_counting, product(GENEVAL_OBJECTS, NUMBER_WORDS)),
        "colors": (_colors, product(colorable, GENEVAL_COLORS)),
        "position": (_position, product(pairs, GENEVAL_POSITIONS)),
        "color_attr": (_color_attr, product(colorable_pairs, permutations(GENEVAL_COLORS, 2))),
    }
    prompts = []
    for tag, (describe, cases) in tasks.items():
        num_test, num_train, copies = GENEVAL_SIZES[tag]
        drawn = rng.sample(list(cases), num_test + num_train)
        for case in drawn[:num_test] if split == "test" else drawn[num_test:] * copies:
            metadata = {"tag": tag, **describe(*case)}
            prompts.append(Prompt(metadata["prompt"], metadata))
    rng.shuffle(prompts)
    return prompts


BUILT_IN = {"words": word_prompts, "ocr": ocr_prompts, "geneval": geneval_prompts}
