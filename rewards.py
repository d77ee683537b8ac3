"""Rewards: what a group of pictures is scored by, and the weighted sum that is trained on.

A reward is a callable

    reward(images, prompts, metadata) -> scores

    images    uint8 (B, H, W, 3), RGB
    prompts   list of B strings
    metadata  list of B dicts, whatever the prompt set holds beside the prompt
    scores    float32 (B,), higher is better; or (scores, metrics), metrics being name -> (B,) of numbers that are
              logged and never trained on, NaN for a picture that a metric says nothing about

`REGISTRY` names the ones below; `my_file:my_function` names one of your own, in the same form.
This file needs numpy and pillow alone: each reward imports its engine when it is built.
"""

import difflib
import functools
import importlib
import io
import math
import numbers
import os
import re
import sys
import textwrap
import threading
from dataclasses import dataclass, field

import numpy as np
from PIL import Image


class RewardError(RuntimeError):
    """A reward that raised, or returned what is no score; one line with its name and the prompt."""


@dataclass(frozen=True)
class Options:
    """What the rewards of a process have to work with."""

    threads: int = 1                                    # CPU cores of each CPU-bound reward
    device: str = "cpu"                                 # of the networks: "cuda:0"
    batch: int = 16                                     # pictures that a network sees at once
    models: dict = field(default_factory=dict)          # a name of MODELS -> directory, file or hub id in its place

    def __post_init__(self):
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; a reward needs at least 1")
        for name in self.models:
            if name not in MODELS:
                raise ValueError(f"no reward has a model {name!r}; known: {', '.join(MODELS)}")

    def model(self, name):
        """Where the model `name` of MODELS is to be loaded from."""
        return self.models.get(name, MODELS[name])


# What networks are loaded from, unless Options.models says otherwise: hub ids
MODELS = {
    "geneval": "facebook/mask2former-swin-small-coco-instance",
    "geneval.clip": "openai/clip-vit-large-patch14",
}


# ---------------------------------------------------------------- JPEG size


def jpeg_incompressibility(images, prompts, metadata):
    """Size of each picture as JPEG at quality 95, in 1,000 bytes. (B, H, W, 3) uint8 -> (B,) float32."""
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return np.array(sizes, np.float32)


def jpeg_compressibility(images, prompts, metadata):
    """Minus the JPEG size over 500: a picture of 500,000 bytes scores -1. (B, H, W, 3) uint8 -> (B,) float32."""
    return -jpeg_incompressibility(images, prompts, metadata) / 500


# ---------------------------------------------------------------- text rendering


def quoted_text(prompt):
    """What stands between the first pair of double quotes of `prompt`: the text that its picture should show.

    Raises ValueError, naming the prompt, where there is no such pair or nothing but space in it.
    """
    quoted = re.search(r'"([^"]*)"', prompt)
    if quoted is None or not quoted[1].strip():
        raise ValueError(f'prompt {prompt!r} has no text between double quotes, as in: a sign that says "hello"')
    return quoted[1]


def edit_distance(a, b):
    """Levenshtein distance of two strings: the fewest insertions, deletions and substitutions between them."""
    distances = list(range(len(b) + 1))
    for i, char_a in enumerate(a, 1):
        previous, distances = distances, [i]
        for j, char_b in enumerate(b, 1):
            distances.append(min(previous[j] + 1, distances[-1] + 1, previous[j - 1] + (char_a != char_b)))
    return distances[-1]


def text_score(target, recognised):
    """The text reward of Flow-GRPO (arXiv 2505.05470), in [0, 1]; case and spaces do not count.

        1                                                    where the target occurs in the recognised text
        1 - min(edit distance, len(target)) / len(target)    elsewhere

    Raises ValueError for an empty target.
    """
    target, recognised = ("".join(text.lower().split()) for text in (target, recognised))
    if not target:
        raise ValueError("the target of a text reward is empty")
    if target in recognised:
        return 1.0
    return 1 - min(edit_distance(target, recognised), len(target)) / len(target)


def text_reward(read):
    """The reward that scores each prompt's quoted text against what `read(images) -> B strings` finds.

    Returned as a callable of this file's form; its ValueError is that of `quoted_text`.
    """
    lock = threading.Lock()  # OCR engines keep state between calls: one thread at a time

    def reward(images, prompts, metadata):
        targets = [quoted_text(prompt) for prompt in prompts]
        with lock:
            texts = read(images)
        return np.array([text_score(target, text) for target, text in zip(targets, texts, strict=True)], np.float32)

    return reward


# ---------------------------------------------------------------- OCR engines: num_threads -> read

# Pictures that the line recogniser sees at once. Always the same number, since the kernels chosen for another
# batch shape round differently: a picture's text must not depend on the batch it came in.
LINE_BATCH = 4


def _import(module, attribute, packages):
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        reason = textwrap.shorten(str(error), 200)
        raise ImportError(f"cannot import {module} ({reason}): pip install {packages}") from error


def _bgr(images):
    # PP-OCR models learnt from pictures in OpenCV's channel order.
    return np.ascontiguousarray(images[..., ::-1])


def _rapidocr_engine(num_threads, **params):
    _import("onnxruntime", "InferenceSession", "onnxruntime")  # which rapidocr does not require by itself
    RapidOCR = _import("rapidocr", "RapidOCR", "rapidocr")
    return RapidOCR(
        params={
            "Global.log_level": "error",  # a picture without text is a score of 0, not a warning
            "Global.use_cls": False,  # as the reference: text that stands on its head is not read
            "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,  # a tenth faster
            **params,
        }
    )


def rapidocr_reader(num_threads):
    """Reads scenes with rapidocr: finds the lines of text, then recognises each. Its models come in its wheel.

    (B, H, W, 3) uint8 -> B strings, the lines of a picture in reading order with a space between them.
    """
    # The limits of PaddleOCR 2.x, which the reference runs with. rapidocr's own enlarge 512 x 512 to 736 x 736:
    # twice the time.
    engine = _rapidocr_engine(num_threads, **{"Det.limit_type": "max", "Det.limit_side_len": 960})
    return lambda images: [" ".join(engine(image).txts or ()) for image in _bgr(images)]


def rapidocr_line_reader(num_threads):
    """Reads each picture as one line of text with rapidocr's recogniser, without detection: for pictures of one word.

    (B, H, W, 3) uint8 -> B strings. Pictures are scaled to a height of 48; the time grows with their width there.
    """
    # rapidocr widens a batch to its widest picture, starting from rec_img_shape. The default start, 320, is
    # mostly padding for a short word; from a square, the width follows the pictures.
    params = {"Rec.rec_img_shape": [3, 48, 48], "Rec.rec_batch_num": LINE_BATCH}
    engine = _rapidocr_engine(num_threads, **params)

    def read(images):
        padding = -len(images) % LINE_BATCH
        lines = [*_bgr(images), *[np.zeros_like(images[0])] * padding]
        return list(engine.recognize_txt(lines).txts[: len(images)])

    return read


def paddle_text(result):
    """The text in what PaddleOCR returns for one picture, line by line with a space between.

    3.x: `[{"rec_texts": [text, ...], ...}]`. 2.x: `[[[box, (text, score)], ...]]`, or `[None]` where there is no text.
    """
    page = result[0]
    if isinstance(page, dict):
        return " ".join(page["rec_texts"])
    return " ".join(text for _, (text, _) in page or ())


def paddleocr_reader(num_threads):
    """Reads scenes with PaddleOCR, 3.x or 2.x, as the reference does; its models are downloaded on first use.

    (B, H, W, 3) uint8 -> B strings, the lines of a picture in reading order with a space between them.
    """
    PaddleOCR = _import("paddleocr", "PaddleOCR", "paddleocr paddlepaddle")
    if hasattr(PaddleOCR, "predict"):
        engine = PaddleOCR(
            lang="en",
            device="cpu",
            cpu_threads=num_threads,
            text_rec_score_thresh=0.5,  # what 2.x does unasked
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
        )
        return lambda images: [paddle_text(engine.predict(image)) for image in _bgr(images)]
    engine = PaddleOCR(lang="en", use_gpu=False, use_angle_cls=False, cpu_threads=num_threads, show_log=False)
    return lambda images: [paddle_text(engine.ocr(image, cls=False)) for image in _bgr(images)]


# ---------------------------------------------------------------- GenEval: objects, counts, colours, positions

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_CLASSES = tuple(name.strip() for name in """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush
    """.split(","))
GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # COCO's -> its own
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_COLOR_PROMPTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")
GENEVAL_CONFIDENCE, GENEVAL_COUNTING_CONFIDENCE = 0.3, 0.9  # an object counts above it; the second under tag counting
GENEVAL_MAX_OBJECTS = 16  # of a class


@dataclass(eq=False)
class Detection:
    """An object in a picture."""

    name: str  # of GENEVAL_CLASSES
    confidence: float
    box: tuple  # x0, y0, x1, y1 in pixels, y downwards, x1 and y1 just outside
    mask: np.ndarray = None  # bool (H, W): which pixels it has
    color: str = None  # of GENEVAL_COLORS; the rules need that of `geneval_color_asked` only


def geneval_check(prompt, metadata):
    """Raises ValueError, in one line with the prompt and the value, unless `metadata` is what GenEval can judge."""

    def needs(what, value, way_out=""):
        return ValueError(f"prompt {prompt!r}: GenEval's metadata needs {what}, not {value!r}{way_out}")

    tag, include, exclude = metadata.get("tag"), metadata.get("include"), metadata.get("exclude", [])
    way_out = '; give prompts as GenEval objects in a .jsonl file, or the built-in set "geneval"'
    if tag not in GENEVAL_TAGS:
        raise needs(f'a "tag", one of {", ".join(GENEVAL_TAGS)}', tag, way_out)
    if not isinstance(include, list) or not include:
        raise needs('"include", a list of at least one object', include, way_out)
    if not isinstance(exclude, list):
        raise needs('"exclude" to be a list of objects, or left out', exclude)
    for key, clause in [("include", clause) for clause in include] + [("exclude", clause) for clause in exclude]:
        if not isinstance(clause, dict):
            raise needs(f'objects with "class" and "count" in its "{key}"', clause)
        name, count = clause.get("class"), clause.get("count")
        if name not in GENEVAL_CLASSES:
            close = difflib.get_close_matches(str(name), GENEVAL_CLASSES, n=1)
            close = GENEVAL_NAMES.get(str(name)) or "".join(close)
            way_out = f"; did you mean {close!r}?" if close else f"; known: {', '.join(GENEVAL_CLASSES)}"
            raise needs(f'a "class" that GenEval knows in its "{key}"', name, way_out)
        if type(count) is not int or count < 1:
            raise needs(f'a "count" of {name!r} that is a whole number, at least 1', count)
    for index, clause in enumerate(include):
        name, color, position = clause["class"], clause.get("color"), clause.get("position")
        if "color" in clause and color not in GENEVAL_COLORS:
            raise needs(f'a "color" of {name!r} out of {", ".join(GENEVAL_COLORS)}', color)
        if "position" in clause:
            if not isinstance(position, (list, tuple)) or len(position) != 2:
                raise needs(f'a "position" of {name!r} that is [relation, index of its target]', position)
            relation, target = position
            if relation not in GENEVAL_RELATIONS:
                raise needs(f"a relation of {name!r} out of {', '.join(GENEVAL_RELATIONS)}", relation)
            if type(target) is not int or not 0 <= target < index:
                raise needs(f'a target of {name!r} that is the index, from 0, of an earlier entry of "include"', target)


def geneval_objects(detections, metadata):
    """What counts as seen: {class name: its detections above the tag's confidence, best first, at most 16}."""
    least = GENEVAL_COUNTING_CONFIDENCE if metadata["tag"] == "counting" else GENEVAL_CONFIDENCE
    objects = {}
    for detection in sorted(detections, key=lambda detection: -detection.confidence):
        if detection.confidence > least:
            objects.setdefault(detection.name, []).append(detection)
    return {name: found[:GENEVAL_MAX_OBJECTS] for name, found in objects.items()}


def geneval_color_asked(detections, metadata):
    """The detections whose colour `geneval_score` looks at."""
    objects = geneval_objects(detections, metadata)
    asked = []
    for clause in metadata["include"]:
        found = objects.get(clause["class"], [])
        if "color" in clause and len(found) >= clause["count"]:
            asked += found[: clause["count"]]
    return asked


def geneval_relations(box, target):
    """Where `box` stands seen from `target`, out of GENEVAL_RELATIONS: none, one, or two on a diagonal."""
    corners, target_corners = np.reshape(box, (2, 2)), np.reshape(target, (2, 2))  # (2 corners, x and y)
    offset = corners.mean(0) - target_corners.mean(0)
    margin = 0.1 * (np.ptp(corners, axis=0) + np.ptp(target_corners, axis=0))
    reduced = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0)
    if np.all(np.abs(reduced) < 1e-3):
        return set()
    dx, dy = reduced / np.linalg.norm(offset)
    return {name for name, along in zip(GENEVAL_RELATIONS, (-dx, dx, -dy, dy)) if along > 0.5}


def _geneval_attributes(clause, objects, groups):
    # The terms, in [0, 1], of the clause's colour and position, for exactly as many objects as it wants. `groups`:
    # the objects of each earlier clause that is met, [] of one that is not: a position without its target is wrong.
    terms = []
    if "color" in clause:
        # 1 - |wanted - with that colour| / wanted
        terms.append(sum(each.color == clause["color"] for each in objects) / len(objects))
    if "position" in clause:
        # The correction: the reference code gives a wrong position its 0, and then a stray 1, a second term beside it.
        relation, target = clause["position"]
        pairs = [(each.box, other.box) for each in objects for other in groups[target]]
        terms.append(float(bool(pairs) and all(relation in geneval_relations(*pair) for pair in pairs)))
    return terms


def geneval_score(detections, metadata):
    """GenEval's judgement (arXiv 2310.11513) of a picture's detections: (score, strict, accuracy).

        score       what Flow-GRPO (arXiv 2505.05470) trains on, the mean over terms. Each clause of `include` gives
                    1 - |wanted - found| / wanted, which a crowd makes negative. Where the count is exact, a colour
                    gives 1 - |wanted - with that colour| / wanted, and a position 1 or 0: whether each object stands
                    so to each of its target, a clause that is itself met. Where it is not, one 0 for both
        strict      1.0 where every clause is exactly right, 0.0 elsewhere; then score and accuracy are 1 too
        accuracy    the benchmark's, 1.0 or 0.0: at least the count, the `count` most confident objects rightly
                    coloured and placed

    Strict and accuracy both want fewer than `count` of what `exclude` names. `metadata` as `geneval_check` demands.
    """
    objects = geneval_objects(detections, metadata)
    terms, exact_groups, best_groups = [], [], []  # groups: the objects of each clause, [] where it is not met
    for clause in metadata["include"]:
        found, wanted = objects.get(clause["class"], []), clause["count"]
        terms.append(1 - abs(wanted - len(found)) / wanted)
        if len(found) == wanted:
            attributes = _geneval_attributes(clause, found, exact_groups)
        else:
            attributes = [0.0] if "color" in clause or "position" in clause else []
        terms += attributes
        exact_groups.append(found if len(found) == wanted and all(term == 1 for term in attributes) else [])
        best = found[:wanted]
        met = len(best) == wanted and all(term == 1 for term in _geneval_attributes(clause, best, best_groups))
        best_groups.append(best if met else [])
    allowed = all(len(objects.get(clause["class"], [])) < clause["count"] for clause in metadata.get("exclude", []))
    return sum(terms) / len(terms), float(allowed and all(exact_groups)), float(allowed and all(best_groups))


def geneval_detector(options):
    """images (B, H, W, 3) uint8 -> for each a list of its Detections above GENEVAL_CONFIDENCE, by Mask2Former."""
    packages = "torch transformers scipy"
    _import("scipy.optimize", "linear_sum_assignment", packages)  # without which transformers builds no Mask2Former
    functional = _import("torch.nn", "functional", packages)
    Mask2Former = _import("transformers", "Mask2FormerForUniversalSegmentation", packages)
    source = options.model("geneval")
    processor = _import("transformers", "Mask2FormerImageProcessor", packages).from_pretrained(source)
    network = Mask2Former.from_pretrained(source).to(options.device).eval()
    labels = network.config.id2label
    names = [GENEVAL_NAMES.get(labels[index], labels[index]) for index in range(len(labels))]

    def detect(images):
        inputs = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt").to(options.device)
        outputs = network(**inputs)
        probabilities = outputs.class_queries_logits.softmax(-1)[..., :-1]  # (B, queries, classes); the last: nothing
        return [objects(*each, images.shape[1:3]) for each in zip(probabilities, outputs.masks_queries_logits)]

    def objects(probabilities, mask_logits, size):
        # As transformers' post_process_instance_segmentation, overlapping instances whole, 384 x 384 pixels first; but
        # on the network's device, for the few queries alone that can pass: a mask takes from its class's confidence.
        confidence, index = probabilities.flatten().topk(len(probabilities))
        confidence, index = confidence[confidence > GENEVAL_CONFIDENCE], index[confidence > GENEVAL_CONFIDENCE]
        if not len(index):
            return []
        query, label = index // len(names), index % len(names)
        logits = functional.interpolate(mask_logits[query][None], size=(384, 384), mode="bilinear")[0]  # (N, 384, 384)
        inside = (logits > 0).float()
        confidence = confidence * (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        masks = functional.interpolate(inside[None], size=size)[0].bool().cpu().numpy()  # (N, H, W), of nearest pixels
        found = []
        for name, score, mask in zip([names[i] for i in label.tolist()], confidence.tolist(), masks):
            (ys,), (xs,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
            if score > GENEVAL_CONFIDENCE and len(xs):
                box = int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
                found.append(Detection(name, score, box, mask))
        return found

    detect.names = frozenset(names)
    return detect


def geneval_color_reader(options):
    """list of (image (H, W, 3) uint8, Detection) -> each one's colour, zero-shot by CLIP: a list of GENEVAL_COLORS."""
    packages = "torch transformers"
    normalize = _import("torch.nn.functional", "normalize", packages)
    source = options.model("geneval.clip")
    processor = _import("transformers", "CLIPProcessor", packages).from_pretrained(source)
    network = _import("transformers", "CLIPModel", packages).from_pretrained(source).to(options.device).eval()

    @functools.cache
    def color_features(name):
        texts = [prompt.format(color, name) for color in GENEVAL_COLORS for prompt in GENEVAL_COLOR_PROMPTS]
        inputs = processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(options.device)
        features = normalize(network.get_text_features(**inputs).pooler_output, dim=-1)
        return normalize(features.unflatten(0, (len(GENEVAL_COLORS), -1)).mean(1), dim=-1)  # (colours, D)

    def crop(image, detection):
        x0, y0, x1, y1 = detection.box
        alone = np.where(detection.mask[..., None], image, np.uint8(0x99))  # all that is not the object turns grey
        return Image.fromarray(alone[y0:y1, x0:x1])

    def colors(pairs):
        found = []
        for start in range(0, len(pairs), options.batch):
            chunk = pairs[start : start + options.batch]
            inputs = processor(images=[crop(*pair) for pair in chunk], return_tensors="pt").to(options.device)
            features = network.get_image_features(**inputs).pooler_output  # (B, D); their norms choose no colour
            for (_, detection), feature in zip(chunk, features):
                found.append(GENEVAL_COLORS[(color_features(detection.name) @ feature).argmax()])
        return found

    return colors


def geneval_reward(options):
    """GenEval's score of each picture by Mask2Former and CLIP; metadata as `geneval_check` demands, else ValueError.

    Metrics: strict_accuracy, accuracy, and accuracy/<tag>, which is NaN for the pictures of another tag.
    """
    detect, colors = geneval_detector(options), geneval_color_reader(options)
    import torch

    lock = threading.Lock()  # tokenizers keep state between calls: one thread at a time

    def judge(images, metadata):
        detections = detect(images)
        asked = [
            (image, detection)
            for image, found, each in zip(images, detections, metadata)
            for detection in geneval_color_asked(found, each)
        ]
        for (_, detection), color in zip(asked, colors(asked)):
            detection.color = color
        return [geneval_score(found, each) for found, each in zip(detections, metadata)]

    def reward(images, prompts, metadata):
        for prompt, each in zip(prompts, metadata, strict=True):
            geneval_check(prompt, each)
            for clause in each["include"] + each.get("exclude", []):
                if clause["class"] not in detect.names:
                    model, name = options.model("geneval"), clause["class"]
                    raise ValueError(f"{model} does not know {name!r}; give geneval a detector of COCO's 80 classes")
        rows = []
        with lock, torch.inference_mode():
            for start in range(0, len(images), options.batch):
                part = slice(start, start + options.batch)
                rows += judge(images[part], metadata[part])
        scores, strict, accuracy = np.array(rows, np.float32).T
        tags = np.array([each["tag"] for each in metadata])
        by_tag = {f"accuracy/{tag}": np.where(tags == tag, accuracy, np.nan) for tag in GENEVAL_TAGS}
        return scores, {"strict_accuracy": strict, "accuracy": accuracy} | by_tag

    return reward


# ---------------------------------------------------------------- names

# name -> factory(options) that builds the callable; nothing heavy is imported before it is called
REGISTRY = {
    "jpeg_incompressibility": lambda options: jpeg_incompressibility,
    "jpeg_compressibility": lambda options: jpeg_compressibility,
    "rapidocr": lambda options: text_reward(rapidocr_reader(options.threads)),
    "rapidocr_line": lambda options: text_reward(rapidocr_line_reader(options.threads)),
    "ocr": lambda options: text_reward(paddleocr_reader(options.threads)),
    "geneval": geneval_reward,
}


def _check_quoted(prompt, metadata):
    quoted_text(prompt)


# name -> check(prompt, metadata), which raises ValueError for a prompt that the reward cannot score
PROMPT_CHECKS = {name: _check_quoted for name in ("rapidocr", "rapidocr_line", "ocr")} | {"geneval": geneval_check}


def import_reward(name):
    """The callable that `my_file:my_function` names; `my_file.py` may lie in the current directory.

    Raises ValueError, in one line, where the module cannot be imported, or holds no such callable.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"reward {name!r}: cannot import {module_name!r} from {os.getcwd()} ({reason})") from error
    if not hasattr(module, attribute):
        raise ValueError(f"reward {name!r}: module {module_name!r} has no {attribute!r}")
    reward = getattr(module, attribute)
    if not callable(reward):
        kind = type(reward).__name__
        raise ValueError(f"reward {name!r} is a {kind}, not a function of (images, prompts, metadata)")
    return reward


def check_reward_weights(weights):
    """Raises ValueError, in one line, unless `weights` (name -> weight) can be built. Loads no engine.

    At least one reward, every name known or importable, every weight a finite number, not all of them 0.
    """
    if not weights:
        raise ValueError(f"no reward given; known: {', '.join(REGISTRY)}, or your own as my_file:my_function")
    for name, weight in weights.items():
        if ":" in name:
            import_reward(name)
        elif name not in REGISTRY:
            close = difflib.get_close_matches(name, REGISTRY, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ";"
            known = ", ".join(REGISTRY)
            raise ValueError(f"unknown reward {name!r}{hint} known: {known}, or your own as my_file:my_function")
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} is {weight!r}; it must be a finite number")
    if not any(weights.values()):
        raise ValueError(f"every reward weight is 0 ({', '.join(weights)}); give at least one another value")


def check_reward_prompts(weights, prompts, metadata):
    """Raises ValueError, in one line with the reward and the prompt, for the first prompt that a reward cannot score.

    Loads no engine. `weights`: name -> weight; `prompts`, `metadata`: lists of the same length.
    """
    for name in weights:
        check = PROMPT_CHECKS.get(name)
        if check is None:
            continue
        for prompt, prompt_metadata in zip(prompts, metadata, strict=True):
            try:
                check(prompt, prompt_metadata)
            except ValueError as error:
                raise ValueError(f"reward {name!r}: {error}") from error


# ---------------------------------------------------------------- the weighted dict


def build_rewards(weights, **options):
    """The `Rewards` of a dict name -> weight, its engines built; keywords are the fields of `Options`.

    Raises ValueError as `check_reward_weights` does, and ImportError for a package that is not installed.
    """
    check_reward_weights(weights)
    options = Options(**options)
    components = {name: import_reward(name) if ":" in name else REGISTRY[name](options) for name in weights}
    return Rewards(weights, components)


class Rewards:
    """Several rewards and their weighted sum. May be called from any thread."""

    def __init__(self, weights, components):
        """`weights`: name -> number; `components`: name -> reward callable, the same names."""
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.components = components

    def __call__(self, images, prompts, metadata):
        """Each component's raw scores by name, its metrics as "name/metric", and "total", sum_i weight_i score_i.

        All are (B,) float32; only metrics may be NaN. `images`: (B, H, W, 3) uint8; `prompts`, `metadata`: lists of
        length B >= 1. Raises ValueError for other inputs, and RewardError where a component raises or does not return
        B finite numbers.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            found = f"{images.dtype} {tuple(images.shape)}" if hasattr(images, "shape") else type(images).__name__
            raise ValueError(f"images must be a numpy array, uint8 (B, H, W, 3), not {found}")
        if not 1 <= len(images) == len(prompts) == len(metadata):
            counts = f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata"
            raise ValueError(f"a batch needs as many images as prompts and metadata, at least 1, not {counts}")
        scores = {}
        for name, reward in self.components.items():
            scores |= component_scores(name, reward, images, prompts, metadata)
        scores["total"] = sum(self.weights[name] * scores[name] for name in self.components)
        return scores


def component_scores(name, reward, images, prompts, metadata):
    """What one reward says: {name: scores} and its metrics, made sure of: what is wrong is a RewardError, never a score.

    Accepts whatever numpy reads as B real numbers, and a torch tensor on any device.
    """
    batch = f"for a batch of {len(prompts)} that starts with prompt {prompts[0]!r}"

    def numbers_of(what, values):
        if hasattr(values, "detach"):  # a torch tensor, without importing torch
            values = values.detach().cpu().double()
        values = np.asarray(values)
        if values.shape != (len(prompts),) or values.dtype.kind not in "biuf":
            found = f"{values.dtype} of shape {values.shape}"
            raise RewardError(f"reward {name!r} returned {found}{what}, not numbers of shape ({len(prompts)},), {batch}")
        return values.astype(np.float32)

    try:
        scores = reward(images, prompts, metadata)
        scores, metrics = scores if isinstance(scores, tuple) and len(scores) == 2 and isinstance(scores[1], dict) else (scores, {})
        scores = numbers_of("", scores)
        metrics = {f"{name}/{metric}": numbers_of(f" as metric {metric!r}", values) for metric, values in metrics.items()}
    except RewardError:
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise RewardError(f"reward {name!r} failed {batch}: {reason}") from error
    for score, prompt in zip(scores, prompts):
        if not math.isfinite(score):
            raise RewardError(f"reward {name!r} is {score} for prompt {prompt!r}")
    return {name: scores} | metrics
