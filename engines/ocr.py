"""The text reward of Flow-GRPO (arXiv 2505.05470): does a picture show the text that its prompt quotes?

`rapidocr` and `paddleocr` find and read the lines of a scene; `rapidocr_line` reads a picture as one line.
"""
import importlib.util
import os
import queue
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rewards import Reward, one_line, one_line_errors

Reader = Callable[[np.ndarray], list[str]]  # (B, H, W, 3) uint8 -> the text in each picture

# Pictures that the line recogniser sees at once. The number is constant, because kernels for another batch
# shape round differently and a picture's text must not depend on its batch.
LINE_BATCH = 4


# ---------------------------------------------------------------- the score

def quoted_text(prompt: str) -> str:
    """Return what stands between the first two double quotes of `prompt`, which its picture should show.

    A quote that is not closed reaches to the end, as in the authors' code. Raises ValueError, with the
    prompt, if there is no quote or only space is in it.
    """
    quoted = re.search(r'"([^"]*)', prompt)
    if quoted is None or not quoted[1].strip():
        shown = one_line(repr(prompt), 200)
        raise ValueError(f'prompt {shown} has no text between double quotes, as in: a sign that says "hello"')
    return quoted[1]


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and substitutions from `a` to `b`."""
    distances = list(range(len(b) + 1))
    for i, char_a in enumerate(a, 1):
        previous, distances = distances, [i]
        for j, char_b in enumerate(b, 1):
            distances.append(min(previous[j] + 1, distances[-1] + 1, previous[j - 1] + (char_a != char_b)))
    return distances[-1]


def text_score(target: str, recognised: str) -> float:
    """Return the text reward of a picture (arXiv 2505.05470, section 5). Case and spaces do not count.

        1                                                    if the recognised text contains the target
        1 - min(edit distance, len(target)) / len(target)    otherwise

    Raises ValueError for an empty target.
    """
    # Lower the case last, because a Greek sigma becomes another letter at the end of a word.
    target, recognised = ("".join(text.split()).lower() for text in (target, recognised))
    if not target:
        raise ValueError("the target of a text reward is empty")
    if target in recognised:
        return 1.0
    return 1 - min(edit_distance(target, recognised), len(target)) / len(target)


def check_prompt(prompt: str, metadata: dict) -> None:
    """Raise ValueError for a prompt without a quoted text."""
    quoted_text(prompt)


def text_reward(make_reader: Callable[[], Reader], count: int, share: int) -> Reward:
    """Return the reward that compares each prompt's quoted text with what a reader finds in its picture.

    `make_reader` builds `count` readers, because an engine serves one thread at a time. Whichever reader is
    free gets the next `share` pictures.
    """
    free, threads = queue.SimpleQueue(), ThreadPoolExecutor(count)
    for _ in range(count):
        free.put(make_reader())

    def score(images: np.ndarray, targets: list[str]) -> list[float]:
        reader = free.get()
        try:
            texts = reader(images)
        finally:
            free.put(reader)
        return [text_score(*pair) for pair in zip(targets, texts, strict=True)]

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        targets = [quoted_text(prompt) for prompt in prompts]
        parts = [slice(start, start + share) for start in range(0, len(images), share)]
        scores = threads.map(score, [images[part] for part in parts], [targets[part] for part in parts])
        return np.array([value for part in scores for value in part], np.float32)

    return reward


# ---------------------------------------------------------------- the readers

def to_bgr(images: np.ndarray) -> np.ndarray:
    """Reverse the channels, because PP-OCR models learnt from pictures in OpenCV's order."""
    return np.ascontiguousarray(images[..., ::-1])


def rapidocr_engine(**params: Any) -> Any:
    """Build rapidocr on one core, with settings of its own in `params`."""
    with one_line_errors("cannot read text: pip install rapidocr onnxruntime"):
        import onnxruntime  # noqa: F401, which rapidocr does not require by itself
        from rapidocr import RapidOCR
    return RapidOCR(params={
        "Global.log_level": "error",  # because a picture without text is a score of 0, not a warning
        "Global.use_cls": False,  # text that stands on its head is not read, as in the reference
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,  # which is a tenth faster
        **params})


def paddle_model(kind: str, model: str) -> dict[str, str]:
    """Return PaddleOCR's arguments for a model, which is a directory, a name or "" for its own choice."""
    if not os.path.isdir(model):
        return {f"text_{kind}_model_name": model} if model else {}
    # PaddleOCR wants the name of what is in a directory, and inference.yml holds it.
    with one_line_errors("cannot read inference.yml: pip install pyyaml"):
        from yaml import safe_load
    with open(os.path.join(model, "inference.yml"), encoding="utf-8") as file:
        name = safe_load(file)["Global"]["model_name"]
    return {f"text_{kind}_model_dir": model, f"text_{kind}_model_name": name}


def paddleocr_reader(detection: str = "", recognition: str = "") -> Reader:
    """Build a reader of scenes by PaddleOCR 3.x, as the reference reads. Lines are joined by a space.

    `detection`, `recognition`: directories of models, or names of PaddleOCR's own, which fetches those for
    English in place of "". It runs on paddlepaddle, or on onnxruntime if that is missing or a model is an
    .onnx.
    """
    with one_line_errors("cannot read text: pip install paddleocr paddlepaddle"):
        from paddleocr import PaddleOCR
    models = paddle_model("detection", detection) | paddle_model("recognition", recognition)
    engine = {"cpu_threads": 1}
    onnx = any(model and os.path.isfile(f"{model}/inference.onnx") for model in (detection, recognition))
    if onnx or importlib.util.find_spec("paddle") is None:
        with one_line_errors("cannot run .onnx models: pip install onnxruntime"):
            import onnxruntime  # noqa: F401
        engine = {"engine": "onnxruntime", "engine_config": {"intra_op_num_threads": 1}}
    reader = PaddleOCR(
        **(models or {"lang": "en"}), **engine, device="cpu",
        text_rec_score_thresh=0.5,  # the default of 2.x, which the reference runs
        use_doc_orientation_classify=False, use_doc_unwarping=False, use_textline_orientation=False)
    return lambda images: [" ".join(reader.predict(image)[0]["rec_texts"]) for image in to_bgr(images)]


# ---------------------------------------------------------------- the rewards

def rapidocr(*, threads: int = 1) -> Reward:
    """Build the text reward of scenes by rapidocr, with an engine on each of `threads` cores.

    A picture's lines are joined by a space, in reading order. The package's wheel holds its models.
    """
    def make_reader() -> Reader:
        # The reference runs with these limits of PaddleOCR 2.x. rapidocr's own enlarge 512 x 512 to 736 x
        # 736, which takes twice the time.
        engine = rapidocr_engine(**{"Det.limit_type": "max", "Det.limit_side_len": 960})
        return lambda images: [" ".join(engine(image).txts or ()) for image in to_bgr(images)]

    return text_reward(make_reader, threads, 1)


def rapidocr_line(*, threads: int = 1) -> Reward:
    """Build the text reward of pictures of one word by rapidocr's recogniser, without detection.

    Pictures are scaled to a height of 48, so the time grows with their width at that height.
    """
    def make_reader() -> Reader:
        # rapidocr widens a batch to its widest picture, starting from rec_img_shape. Start from a square,
        # because the default start, 320, is mostly padding for a short word.
        engine = rapidocr_engine(**{"Rec.rec_img_shape": [3, 48, 48], "Rec.rec_batch_num": LINE_BATCH})

        def read(images: np.ndarray) -> list[str]:
            padding = -len(images) % LINE_BATCH
            lines = [*to_bgr(images), *[np.zeros_like(images[0])] * padding]
            return list(engine.recognize_txt(lines).txts[: len(images)])

        return read

    return text_reward(make_reader, threads, LINE_BATCH)


def paddleocr(*, threads: int = 1, detection: str = "", recognition: str = "") -> Reward:
    """Build the text reward of scenes by PaddleOCR; see `paddleocr_reader` for its models."""
    return text_reward(lambda: paddleocr_reader(detection, recognition), threads, 1)


rapidocr.check_prompt = rapidocr_line.check_prompt = paddleocr.check_prompt = check_prompt
