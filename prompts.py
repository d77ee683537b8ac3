"""Prompt sets: built-in ones and the user's files.

A source is a built-in name ("words", "ocr", "geneval"), a file or a directory. A .txt file holds one prompt
per line. A .jsonl file holds GenEval metadata (arXiv 2310.11513), one JSON object per line. The splits train
and test of a built-in set are disjoint. A directory holds one file per split. A single file serves as both.
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


SPLITS = ("train", "test")
SPLIT_FILES = ("{}.txt", "{}_metadata.jsonl")
DATA = Path(__file__).parent / "assets" / "prompts"     # word lists from which the built-in sets are made
SEED = 0    # the built-in sets are drawn with this seed, so that they are the same on every machine


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and what a reward needs beyond it: the whole GenEval object, or {} for plain text."""

    text: str
    metadata: dict = field(default_factory=dict, hash=False)


def load_prompts(source: str, split: str) -> list[Prompt]:
    """Load the prompts of `source` (a built-in name, a directory or a file) for `split` ("train" or "test").

    A built-in name wins over a path of the same name, so write "./words" for a directory called words.

    Raises FileNotFoundError if there is no such file, and ValueError if the file holds no valid prompts or
    the split is unknown. Either message is one line that names the place and the way out.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    if source in BUILT_IN:
        return BUILT_IN[source](split)
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        path = _split_file(path, split)
    elif not os.path.isfile(path):
        raise FileNotFoundError(f"prompts {source!r}: no such file or directory; give a .txt or .jsonl file, "
                                f"a directory, or a built-in set: {', '.join(BUILT_IN)} "
                                "(docs/recipes.md tells how to fetch published ones)")
    extension = os.path.splitext(path)[1].lower()
    if extension not in (".txt", ".jsonl"):
        raise ValueError(f"prompts {source!r}: unknown kind of file {extension!r}; give a .txt file (one "
                         "prompt a line) or a .jsonl file (one GenEval object a line)")
    lines = _numbered_lines(path)
    prompts = ([Prompt(line) for _, line in lines] if extension == ".txt" else
               [_metadata_prompt(line, f"{path}:{number}") for number, line in lines])
    if not prompts:
        raise ValueError(f"{path}: holds no prompts; write one a line")
    return prompts


def _split_file(directory: str, split: str) -> str:
    kinds = [kind for kind in SPLIT_FILES
             if any(os.path.isfile(os.path.join(directory, kind.format(name))) for name in SPLITS)]
    if len(kinds) == 2:
        raise ValueError(f"{directory}: holds both plain prompts and GenEval metadata; name the file you "
                         f"mean, such as {os.path.join(directory, SPLIT_FILES[0].format(split))}")
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
    # Split lines with StringIO, which ends them at \n, \r\n and \r, because str.splitlines would also cut a
    # JSON string at U+2028.
    stripped = ((number, line.strip()) for number, line in enumerate(StringIO(text, newline=None), start=1))
    lines = [(number, line) for number, line in stripped if line]
    if "\0" in text:
        number = next(number for number, line in lines if "\0" in line)
        raise ValueError(f"{path}:{number}: holds a zero byte, as text in UTF-16 does; save it as UTF-8")
    return lines


def _metadata_prompt(line: str, place: str) -> Prompt:
    """A line as a prompt. A reward that reads more of the object checks it, such as engines/geneval.py."""
    try:
        metadata = json.loads(line)
        # Encode it once, because JSON can hold half of a surrogate pair, which no tokenizer would take.
        json.dumps(metadata, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:   # Python limits a number's digits and the depth of nesting
        raise ValueError(f"{place}: not JSON that can be used: {error}; write one object a line") from None
    text = metadata.get("prompt") if isinstance(metadata, dict) else None
    if not isinstance(text, str) or not text.strip():
        shown = line if len(line) <= 80 else line[:77] + "..."
        raise ValueError(f'{place}: {shown} is not an object with a non-empty string "prompt"; add one')
    return Prompt(text.strip(), metadata)


# ---- words: single words, which the bundled model can spell ------------------------------------------------

VOCABULARY = (DATA / "words.txt").read_text(encoding="utf-8").split()
WORDS_TEST_PER_LENGTH = {3: 43, 4: 43, 5: 42}


def words(split: str) -> list[str]:
    """List the words of `split` ("train" or "test"), lengths mixed, in a fixed order."""
    # Order by hash rather than by a random generator, because the bundled model was trained on this split and
    # the split must not depend on the Python version.
    ordered = sorted(VOCABULARY, key=lambda word: sha256(word.encode()).digest())
    test = {word for length, count in WORDS_TEST_PER_LENGTH.items()
            for word in [word for word in ordered if len(word) == length][:count]}
    return [word for word in ordered if (word in test) == (split == "test")]


def word_prompts(split: str) -> list[Prompt]:
    """Make prompts such as `the word "lamp"`: words of 3 to 5 lower-case letters. 128 are test words."""
    return [Prompt(f'the word "{word}"') for word in words(split)]


# ---- ocr: scenes with a quoted text, for models that can draw scenes ---------------------------------------

_ocr = json.loads((DATA / "ocr.json").read_text(encoding="utf-8"))
OCR_SCENES, OCR_QUALITIES, OCR_THINGS = _ocr["scenes"], _ocr["qualities"], _ocr["things"]
OCR_NUMBERED, OCR_PHRASES = _ocr["numbered"], _ocr["phrases"]
OCR_TEST_TEXTS = 300
OCR_SCENES_PER_TEXT = 5


def ocr_prompts(split: str) -> list[Prompt]:
    """Make scenes with one text in double quotes. The two splits share no text."""
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


# ---- geneval: objects, numbers, colours and places, after GenEval (arXiv 2310.11513) -----------------------

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


# The next three functions return a prompt's GenEval metadata without its tag.

def _one_of_each(*things: tuple[str, str]) -> dict:
    """Ask for one object of each (name, color). The color is "" for any."""
    return dict(include=[{"class": name, "count": 1} | ({"color": color} if color else {})
                         for name, color in things],
                prompt="a photo of " + " and ".join(_a(name, color) for name, color in things))


def _counting(name: str, count: int) -> dict:
    return dict(include=[{"class": name, "count": count}], exclude=[{"class": name, "count": count + 1}],
                prompt=f"a photo of {NUMBER_WORDS[count]} {_plural(name)}")


def _position(pair: tuple[str, str], position: str) -> dict:
    # List the second object first, because a position refers to an earlier entry by its index.
    first, second = pair
    placed = {"class": first, "count": 1, "position": [position, 0]}
    return dict(include=[{"class": second, "count": 1}, placed],
                prompt=f"a photo of {_a(first)} {position} {_a(second)}")


# Per task: distinct test prompts, distinct train prompts, copies of each train prompt. The mix follows
# Flow-GRPO's 7 position : 5 counting : 3 color_attr : 1 colors : 1 two_object : 0 single_object, except that
# 60 single_object prompts are in. Counting needs copies, because only 240 counting prompts exist and they
# would be one draw in sixty.
GENEVAL_SIZES = {"single_object": (20, 60, 1), "two_object": (240, 1000, 1), "counting": (40, 200, 25),
                 "colors": (240, 500, 2), "position": (240, 7000, 1), "color_attr": (240, 3000, 1)}


def geneval_prompts(split: str) -> list[Prompt]:
    """Make prompts of GenEval's six tasks, in its metadata format. GENEVAL_SIZES says how many of each."""
    rng = Random(SEED)
    # Keep each pair in one order, because otherwise training on "a dog left of a cat" would teach the test
    # prompt "a cat right of a dog".
    pairs = [tuple(rng.sample(pair, 2)) for pair in combinations(GENEVAL_OBJECTS, 2)]
    colorable = [name for name in GENEVAL_OBJECTS if name != "person"]
    colorable_pairs = [pair for pair in pairs if "person" not in pair]
    tasks = {
        "single_object": (lambda name: _one_of_each((name, "")), product(GENEVAL_OBJECTS)),
        "two_object": (lambda pair: _one_of_each((pair[0], ""), (pair[1], "")), product(pairs)),
        "counting": (_counting, product(GENEVAL_OBJECTS, NUMBER_WORDS)),
        "colors": (lambda name, color: _one_of_each((name, color)), product(colorable, GENEVAL_COLORS)),
        "position": (_position, product(pairs, GENEVAL_POSITIONS)),
        "color_attr": (lambda pair, colors: _one_of_each(*zip(pair, colors)),
                       product(colorable_pairs, permutations(GENEVAL_COLORS, 2))),
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
