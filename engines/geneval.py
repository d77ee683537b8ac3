"""GenEval (arXiv 2310.11513): does a picture show the objects, counts, colours and positions of its prompt?

The rules (`check_prompt`, `geneval_score`) need numpy alone. `geneval` is the reward: Mask2Former finds the
objects and CLIP names their colours.
"""
import difflib
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from rewards import Columns, Reward, one_line, one_line_errors

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_CLASSES = tuple(name.strip() for name in """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
    backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
    baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl,
    banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
    potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard,
    cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
    hair drier, toothbrush
    """.split(","))
# COCO's names of classes that GenEval names otherwise
GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_COLOR_PROMPTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")
GENEVAL_CONFIDENCE = 0.3  # an object counts above it
GENEVAL_COUNTING_CONFIDENCE = 0.9  # the same for the tag "counting"
GENEVAL_MAX_OBJECTS = 16  # of a class


@dataclass(eq=False)
class Detection:
    """An object in a picture."""

    name: str                       # of GENEVAL_CLASSES
    confidence: float
    box: tuple                      # x0, y0, x1, y1 in pixels, y downwards, x1 and y1 just outside
    mask: np.ndarray | None = None  # bool (H, W): the object's pixels
    color: str | None = None        # of GENEVAL_COLORS, for those of `geneval_color_asked`


# ---------------------------------------------------------------- the rules

def has(clause: dict, key: str) -> bool:
    """Tell whether a clause has `key`. The library `datasets` writes None for a key that it does not have."""
    return clause.get(key) is not None


def check_prompt(prompt: str, metadata: dict) -> None:
    """Raise ValueError, in one line with the prompt and the value, unless GenEval can judge `metadata`."""
    def needs(what: str, value: Any, way_out: str = "") -> ValueError:
        shown, found = one_line(repr(prompt), 200), one_line(repr(value), 200)
        return ValueError(f"prompt {shown}: GenEval's metadata needs {what}, not {found}{way_out}")

    tag, include, exclude = metadata.get("tag"), metadata.get("include"), metadata.get("exclude")
    way_out = '; give prompts as GenEval objects in a .jsonl file, or the built-in set "geneval"'
    if tag not in GENEVAL_TAGS:
        raise needs(f'a "tag", one of {", ".join(GENEVAL_TAGS)}', tag, way_out)
    if not isinstance(include, list) or not include:
        raise needs('"include", a list of at least one object', include, way_out)
    if not isinstance(exclude, list | None):
        raise needs('"exclude" to be a list of objects, or left out', exclude)
    clauses = [("include", clause) for clause in include] + [("exclude", clause) for clause in exclude or ()]
    for key, clause in clauses:
        if not isinstance(clause, dict):
            raise needs(f'objects with "class" and "count" in its "{key}"', clause)
        name, count = clause.get("class"), clause.get("count")
        if name not in GENEVAL_CLASSES:
            close = "".join(difflib.get_close_matches(str(name), GENEVAL_CLASSES, n=1))
            close = GENEVAL_NAMES.get(str(name), close)
            hint = f"; did you mean {close!r}?" if close else f"; known: {', '.join(GENEVAL_CLASSES)}"
            raise needs(f'a "class" that GenEval knows in its "{key}"', name, hint)
        if type(count) is not int or count < 1:
            raise needs(f'a "count" of {name!r} that is a whole number, at least 1', count)
    for index, clause in enumerate(include):
        name, color, position = clause["class"], clause.get("color"), clause.get("position")
        if has(clause, "color") and color not in GENEVAL_COLORS:
            raise needs(f'a "color" of {name!r} out of {", ".join(GENEVAL_COLORS)}', color)
        if has(clause, "position"):
            if not isinstance(position, list | tuple) or len(position) != 2:
                raise needs(f'a "position" of {name!r} that is [relation, index of its target]', position)
            relation, target = position
            if relation not in GENEVAL_RELATIONS:
                raise needs(f"a relation of {name!r} out of {', '.join(GENEVAL_RELATIONS)}", relation)
            if type(target) is not int or not 0 <= target < index:
                earlier = 'the index, from 0, of an earlier entry of "include"'
                raise needs(f"a target of {name!r} that is {earlier}", target)


def geneval_objects(detections: Sequence[Detection], metadata: dict) -> dict[str, list[Detection]]:
    """Return class name -> its detections above the tag's confidence, best first, at most 16."""
    least = GENEVAL_COUNTING_CONFIDENCE if metadata["tag"] == "counting" else GENEVAL_CONFIDENCE
    objects = {}
    for detection in sorted(detections, key=lambda detection: -detection.confidence):
        if detection.confidence > least:
            objects.setdefault(detection.name, []).append(detection)
    return {name: found[:GENEVAL_MAX_OBJECTS] for name, found in objects.items()}


def geneval_color_asked(detections: Sequence[Detection], metadata: dict) -> list[Detection]:
    """Return the detections whose colour `geneval_score` looks at."""
    objects = geneval_objects(detections, metadata)
    asked = []
    for clause in metadata["include"]:
        found = objects.get(clause["class"], [])
        if has(clause, "color") and len(found) >= clause["count"]:
            asked += found[: clause["count"]]
    return asked


def geneval_relations(box: Sequence[float], target: Sequence[float]) -> set[str]:
    """Return where `box` stands, seen from `target`: none of GENEVAL_RELATIONS, one, or two on a diagonal."""
    corners, target_corners = np.reshape(box, (2, 2)), np.reshape(target, (2, 2))  # (2 corners, x and y)
    offset = corners.mean(0) - target_corners.mean(0)
    margin = 0.1 * (np.ptp(corners, axis=0) + np.ptp(target_corners, axis=0))
    reduced = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0)
    if np.all(np.abs(reduced) < 1e-3):
        return set()
    dx, dy = reduced / np.linalg.norm(offset)
    return {name for name, along in zip(GENEVAL_RELATIONS, (-dx, dx, -dy, dy)) if along > 0.5}


def score_attributes(clause: dict, objects: list[Detection], groups: list[list[Detection]]) -> list[float]:
    """Return the terms, in [0, 1], of a clause's colour and position, for as many objects as it wants.

    `groups` holds the objects of each earlier clause, [] for a clause that is not met. A position without its
    target is wrong.
    """
    terms = []
    if has(clause, "color"):
        # 1 - |wanted - with that colour| / wanted
        terms.append(sum(each.color == clause["color"] for each in objects) / len(objects))
    if has(clause, "position"):
        # Departure from the reference code, which appends a 0 and a 1 for a wrong position. We append the 0.
        relation, target = clause["position"]
        pairs = [(each.box, other.box) for each in objects for other in groups[target]]
        terms.append(float(bool(pairs) and all(relation in geneval_relations(*pair) for pair in pairs)))
    return terms


def geneval_score(detections: Sequence[Detection], metadata: dict) -> tuple[float, float, float]:
    """Return GenEval's judgement (arXiv 2310.11513) of a picture's detections: (score, strict, accuracy).

    `score` is what Flow-GRPO (arXiv 2505.05470) trains on, the mean of these terms over "include":

        count        1 - |wanted - found| / wanted, which a crowd makes negative
        colour       1 - |wanted - with that colour| / wanted, if the count is exact
        position     1 if each object stands so to each of its target, else 0, if the count is exact
        count wrong  a single 0 replaces colour and position
        target       a clause that is not met itself makes the position 0

    `strict` is 1.0 if every clause is exactly right, else 0.0; score and accuracy are then 1 too. `accuracy`,
    the benchmark's, is 1.0 if there are at least as many objects and the most confident of them are right,
    else 0.0. Both want fewer than `count` of what "exclude" names. `check_prompt` says what `metadata` is.
    """
    objects = geneval_objects(detections, metadata)
    terms, exact_groups, best_groups = [], [], []  # groups: the objects of each clause, [] if it is not met
    for clause in metadata["include"]:
        found, wanted = objects.get(clause["class"], []), clause["count"]
        terms.append(1 - abs(wanted - len(found)) / wanted)
        if len(found) == wanted:
            attributes = score_attributes(clause, found, exact_groups)
        else:
            attributes = [0.0] if has(clause, "color") or has(clause, "position") else []
        terms += attributes
        exact_groups.append(found if len(found) == wanted and all(term == 1 for term in attributes) else [])
        best = found[:wanted]
        met = len(best) == wanted and all(term == 1 for term in score_attributes(clause, best, best_groups))
        best_groups.append(best if met else [])
    excluded = metadata.get("exclude") or ()
    allowed = all(len(objects.get(clause["class"], [])) < clause["count"] for clause in excluded)
    return sum(terms) / len(terms), float(allowed and all(exact_groups)), float(allowed and all(best_groups))


# ---------------------------------------------------------------- the networks

def load_pretrained(kind: str, source: str) -> Any:
    """Load a network or a processor from `source` by the class `kind` of transformers."""
    with one_line_errors("reward 'geneval' needs: pip install torch transformers scipy"):
        import scipy.optimize  # noqa: F401, without which there is no Mask2Former
        import transformers
        loader = getattr(transformers, kind)
    with one_line_errors(f"cannot load the model of 'geneval' from {source!r}"):
        return loader.from_pretrained(source)


def geneval_detector(model: str, device: str) -> Callable[[np.ndarray], list[list[Detection]]]:
    """Return Mask2Former as images (B, H, W, 3) uint8 -> for each its Detections above GENEVAL_CONFIDENCE.

    Its attribute `names` holds the class names that it knows.
    """
    processor = load_pretrained("Mask2FormerImageProcessor", model)
    network = load_pretrained("Mask2FormerForUniversalSegmentation", model).to(device).eval()
    from torch.nn import functional
    labels = network.config.id2label
    names = [GENEVAL_NAMES.get(labels[index], labels[index]) for index in range(len(labels))]

    def detect(images: np.ndarray) -> list[list[Detection]]:
        pictures = [Image.fromarray(image) for image in images]
        outputs = network(**processor(images=pictures, return_tensors="pt").to(device))
        probabilities = outputs.class_queries_logits.softmax(-1)[..., :-1]  # (B, queries, classes)
        masks = outputs.masks_queries_logits  # (B, queries, h, w)
        return [objects(*each, images.shape[1:3]) for each in zip(probabilities, masks)]

    def objects(probabilities: Any, mask_logits: Any, size: tuple[int, int]) -> list[Detection]:
        # Do as transformers' post_process_instance_segmentation, with whole overlapping instances and
        # 384 x 384 pixels first. Look at few queries only, because a mask can but lower its confidence.
        confidence, index = probabilities.flatten().topk(len(probabilities))
        passing = confidence > GENEVAL_CONFIDENCE
        confidence, index = confidence[passing], index[passing]
        if not len(index):
            return []
        query, label = index // len(names), index % len(names)
        # (N, 384, 384), then (N, H, W) by the nearest pixels
        logits = functional.interpolate(mask_logits[query][None], size=(384, 384), mode="bilinear")[0]
        inside = (logits > 0).float()
        confidence = confidence * (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        masks = functional.interpolate(inside[None], size=size)[0].bool().cpu().numpy()
        found = []
        for name, score, mask in zip([names[i] for i in label.tolist()], confidence.tolist(), masks):
            (ys,), (xs,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
            if score > GENEVAL_CONFIDENCE and len(xs):
                box = int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
                found.append(Detection(name, score, box, mask))
        return found

    detect.names = frozenset(names)
    return detect


def geneval_color_reader(model: str, device: str, batch: int) -> Callable[[list], list[str]]:
    """Return CLIP as list of (image (H, W, 3) uint8, Detection) -> the colour of each, zero-shot."""
    processor = load_pretrained("CLIPProcessor", model)
    network = load_pretrained("CLIPModel", model).to(device).eval()
    from torch.nn.functional import normalize

    @functools.cache
    def color_features(name: str) -> Any:
        texts = [prompt.format(color, name) for color in GENEVAL_COLORS for prompt in GENEVAL_COLOR_PROMPTS]
        inputs = processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(device)
        features = normalize(network.get_text_features(**inputs).pooler_output, dim=-1)
        return normalize(features.unflatten(0, (len(GENEVAL_COLORS), -1)).mean(1), dim=-1)  # (colours, D)

    def crop(image: np.ndarray, detection: Detection) -> Image.Image:
        x0, y0, x1, y1 = detection.box
        mask = detection.mask[y0:y1, x0:x1, None]
        return Image.fromarray(np.where(mask, image[y0:y1, x0:x1], np.uint8(0x99)))  # grey around the object

    def colors(pairs: list) -> list[str]:
        found = []
        for start in range(0, len(pairs), batch):
            chunk = pairs[start : start + batch]
            inputs = processor(images=[crop(*pair) for pair in chunk], return_tensors="pt").to(device)
            features = network.get_image_features(**inputs).pooler_output  # (B, D), of any length
            for (_, detection), feature in zip(chunk, features):
                found.append(GENEVAL_COLORS[(color_features(detection.name) @ feature).argmax()])
        return found

    return colors


# ---------------------------------------------------------------- the reward

def geneval(*, device: str = "cpu", batch: int = 16,
            model: str = "facebook/mask2former-swin-small-coco-instance",
            clip: str = "openai/clip-vit-large-patch14") -> Reward:
    """Build GenEval's score by Mask2Former (`model`) and CLIP. It checks its prompts as `check_prompt` does.

    Metrics: strict_accuracy, accuracy, and each of a tag, such as accuracy/colors, which is NaN for the
    pictures of another tag.
    """
    detect, colors = geneval_detector(model, device), geneval_color_reader(clip, device, batch)
    import torch
    lock = threading.Lock()  # one thread at a time, because tokenizers keep state between calls

    def judge(images: np.ndarray, metadata: list[dict]) -> list[tuple[float, float, float]]:
        detections = detect(images)
        asked = [(image, detection) for image, found, each in zip(images, detections, metadata)
                 for detection in geneval_color_asked(found, each)]
        for (_, detection), color in zip(asked, colors(asked)):
            detection.color = color
        return [geneval_score(found, each) for found, each in zip(detections, metadata)]

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> tuple[np.ndarray, Columns]:
        for prompt, each in zip(prompts, metadata, strict=True):
            check_prompt(prompt, each)
            for clause in each["include"] + (each.get("exclude") or []):
                if (name := clause["class"]) not in detect.names:
                    way_out = "give geneval a detector of COCO's 80 classes"
                    raise ValueError(f"{model} does not know {name!r}; {way_out}")
        rows = []
        with lock, torch.inference_mode():
            for start in range(0, len(images), batch):
                part = slice(start, start + batch)
                rows += judge(images[part], metadata[part])
        scores, strict, accuracy = np.array(rows, np.float32).T
        tags = np.array([each["tag"] for each in metadata])
        overall = {"strict_accuracy": strict, "accuracy": accuracy}
        return scores, overall | {f"{name}/{tag}": np.where(tags == tag, values, np.nan)
                                  for name, values in overall.items() for tag in GENEVAL_TAGS}

    return reward


geneval.check_prompt = check_prompt
