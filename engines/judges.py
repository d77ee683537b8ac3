"""Rewards by judges, which are vision-language models that grade a picture from 1 to 5 in words.

A judge runs in this process or behind an OpenAI-compatible server (vLLM, sglang), openai+http://host:port/v1.
"""
import base64
import collections
import os
import re
import threading
from collections.abc import Callable
from multiprocessing.pool import ThreadPool

import numpy as np
from PIL import Image

from rewards import (Columns, Reward, RewardError, http_client, one_line, one_line_errors, picture_file, post,
                     without_user)

# Asks a judge about images (B, H, W, 3) with their prompts at a temperature, and returns B answers
Ask = Callable[[np.ndarray, list[str], float], list[str]]

ANSWER_TOKENS = 2048  # in which a judge has to come to its score

# A score from 1 to 5, perhaps as "4/5" or "**4**", and not the beginning of 45, 4/10 or 3-4
SCORE = re.compile(
    r"[\s*]*([1-5](?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*5(?:\.0+)?)?"
    r"(?!\w|[.,][0-9]|\s*(?:/|%|out of)|\s*(?:-|–|to|or|of)\s*[0-9])")

QUALITY_QUESTION = """You judge the aesthetic quality of a picture, on this scale:
1. Bad: blurred beyond recognition, noisy, far too dark, a chaos of a composition.
2. Poor: visibly blurred, badly lit, pale colours, an awkward composition that cuts its subject off.
3. Fair: sharp and well enough lit, but dull in colour; the composition is sound and has no idea of its own.
4. Good: sharp, well exposed, vivid colours, a thoughtful composition that leads the eye to its subject.
5. Excellent: outstandingly clear, perfectly exposed, rich in colour, a masterly composition that moves the \
viewer.

First weigh the picture by these criteria in detail, within a <Thought> tag; then give it a score from 1 to \
5 within a <Score> tag:
<Thought>
your reasoning
</Thought>
<Score>X</Score>"""

ALIGNMENT_QUESTION = """You are given a text caption and a picture that was generated from it. \
Judge the picture by:
1. Alignment with the caption: whether the objects it names are there, with their attributes and relations.
2. Overall image quality: how clear and detailed it is, how true its colours are, and how pleasing it is as \
a whole.
From both, give a score from 1 to 5 after 'Final Score:'.
Text Caption: [{prompt}]"""

# Where a judge's score stands in its answer
QWENVL_SCORE = r"(?i)<Score>([^<]*)</Score>"
UNIFIED_SCORE = r"(?i)Final Score\s*\**\s*:\s*(.*)"


def parse_score(answer: str, pattern: str) -> float | None:
    """Return the score from 1 to 5 where `pattern` last matches in a judge's answer, or None."""
    found = re.findall(pattern, answer)
    score = SCORE.match(found[-1]) if found else None
    return float(score[1]) if score and float(score[1]) <= 5 else None


def judge_reward(name: str, ask: Ask, pattern: str, max_unanswered: float) -> Reward:
    """Return the reward of a judge: its score over 5. Metric `unanswered`: 1 for a picture without a score.

    `pattern` finds the score in an answer. A judge that gives none is asked once more. A picture without one
    gets the mean of those with its prompt in this call, or else of the last 1,000 pictures. The trainer puts
    its whole group's mean there (harness/scoring.py). If all of the last 1,000 lack a score, or more than the
    share `max_unanswered`, a RewardError shows the last answer.
    """
    lock = threading.Lock()
    recent = collections.deque(maxlen=1000)  # scores, NaN for none

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> tuple[np.ndarray, Columns]:
        answers = ask(images, prompts, 0)
        scores = np.array([parse_score(answer, pattern) for answer in answers], float)  # None becomes NaN
        missing = np.flatnonzero(np.isnan(scores))
        if len(missing):  # ask at a temperature, because at 0 the answer would be the same
            answers = ask(images[missing], [prompts[i] for i in missing], 0.7)
            scores[missing] = [parse_score(answer, pattern) for answer in answers]
        silent = np.isnan(scores)
        with lock:
            recent.extend(scores)
            known = np.array(recent)
        known, asked = known[~np.isnan(known)], len(known)
        # Of fewer than ten pictures one may lack a score, because a share would say little.
        if silent.any() and (not len(known) or asked - len(known) > max_unanswered * max(asked, 10)):
            last = answers[np.flatnonzero(silent[missing])[-1]]
            raise RewardError(f"reward {name!r}: no score from 1 to 5 for {asked - len(known)} of the last "
                              f"{asked} pictures (max_unanswered is {max_unanswered:.0%}); the last answer "
                              f"is {one_line(last, 200)!r}")
        texts = np.array(prompts, object)
        for i in np.flatnonzero(silent):
            same = scores[~silent & (texts == prompts[i])]
            scores[i] = same.mean() if len(same) else known.mean()
        return scores / 5, {"unanswered": silent.astype(np.float32)}

    return reward


def openai_judge(name: str, question: str, url: str, model: str, deadline: float) -> Ask:
    """Return an `Ask` of an OpenAI-compatible server, which sees up to 64 pictures at once.

    `question` may hold {prompt}, the picture's own. The server's key, if it wants one, is in OPENAI_API_KEY.
    """
    how_to_start = f"vllm serve {model}"
    if not url.startswith(("openai+http://", "openai+https://")):
        needs = f"reward {name!r} needs a server, as openai+http://host:port/v1, not {without_user(url)!r}"
        raise ValueError(f"{needs}; one is: {how_to_start}")
    http_client()  # now, so that a missing package is found before training
    url = url.removeprefix("openai+").rstrip("/") + "/chat/completions"
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask_one(image: np.ndarray, prompt: str, temperature: float) -> str:
        encoded = base64.b64encode(picture_file(image, "PNG", compress_level=1)).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
        text = {"type": "text", "text": question.format(prompt=prompt)}
        messages = [{"role": "user", "content": [picture, text]}]
        request = {"model": model, "messages": messages, "temperature": temperature,
                   "max_tokens": ANSWER_TOKENS}
        response = post(url, json=request, headers=headers, deadline=deadline, how_to_start=how_to_start)
        try:
            content = response.json()["choices"][0]["message"]["content"] or ""
            # A list holds parts, of which those of text have a "text".
            parts = [{"text": content}] if isinstance(content, str) else content
            return "".join(part.get("text") or "" for part in parts)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            said = one_line(response.text, 200)
            raise RewardError(f"no OpenAI-compatible server: {without_user(url)} said {said!r}") from error

    def ask(images: np.ndarray, prompts: list[str], temperature: float) -> list[str]:
        with ThreadPool(min(64, len(images))) as threads:  # daemons, for which no program's end waits
            pictures = zip(images, prompts)
            return list(threads.imap(lambda picture: ask_one(*picture, temperature), pictures))

    return ask


def qwenvl_in_process(model: str, device: str, batch: int) -> Ask:
    """Return an `Ask` of Qwen2.5-VL by transformers in this process, `batch` pictures at once."""
    with one_line_errors("reward 'qwenvl' needs: pip install transformers torch torchvision"):
        import torch
        import torchvision  # noqa: F401, which transformers needs for this model's processor
        from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    with one_line_errors(f"cannot load the model of 'qwenvl' from {model!r}"):
        network = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=dtype).to(device).eval()
        processor = AutoProcessor.from_pretrained(model)
    content = [{"type": "image"}, {"type": "text", "text": QUALITY_QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    lock = threading.Lock()  # one thread at a time, because tokenizers keep state between calls

    def ask(images: np.ndarray, prompts: list[str], temperature: float) -> list[str]:
        sampling = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        answers = []
        with lock, torch.inference_mode():
            for start in range(0, len(images), batch):
                pictures = [Image.fromarray(image) for image in images[start : start + batch]]
                inputs = processor(images=pictures, text=[text] * len(pictures), padding=True,
                                   padding_side="left", return_tensors="pt").to(device)
                tokens = network.generate(**inputs, max_new_tokens=ANSWER_TOKENS, **sampling)
                tokens = tokens[:, inputs["input_ids"].shape[1] :]  # the answer, without the question
                answers += processor.batch_decode(tokens, skip_special_tokens=True)
        return answers

    return ask


def qwenvl(*, device: str = "cpu", batch: int = 16, model: str = "Qwen/Qwen2.5-VL-7B-Instruct", url: str = "",
           deadline: float = 600.0, max_unanswered: float = 0.1) -> Reward:
    """Build Qwen2.5-VL's grade of a picture's aesthetic quality, whatever the prompt, over 5.

    It runs in this process by transformers, or through the OpenAI-compatible server at `url`.
    """
    if url:
        ask = openai_judge("qwenvl", QUALITY_QUESTION, url, model, deadline)
    else:
        ask = qwenvl_in_process(model, device, batch)
    return judge_reward("qwenvl", ask, QWENVL_SCORE, max_unanswered)


def unifiedreward(*, model: str = "CodeGoat24/UnifiedReward-7b-v1.5", url: str = "", deadline: float = 600.0,
                  max_unanswered: float = 0.1) -> Reward:
    """Build UnifiedReward's grade (arXiv 2503.05236) of alignment with the prompt and of quality, over 5.

    It needs an OpenAI-compatible server at `url`.
    """
    ask = openai_judge("unifiedreward", ALIGNMENT_QUESTION, url, model, deadline)
    return judge_reward("unifiedreward", ask, UNIFIED_SCORE, max_unanswered)
