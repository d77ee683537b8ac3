"""Rewards that are networks: PickScore, CLIPScore, LAION's aesthetic predictor, ImageReward and DeQA.

`device` is torch's, `batch` the most pictures that a network sees at once. A model is a hub id or a path.
"""
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from rewards import Reward, one_line_errors

CLIP = "openai/clip-vit-large-patch14"


def load_pretrained(reward: str, kind: str, source: str, **arguments: Any) -> Any:
    """Load a network or a processor of `reward` from `source` by the class `kind` of transformers."""
    with one_line_errors(f"reward {reward!r} needs: pip install transformers torch"):
        import transformers
        loader = getattr(transformers, kind)
    with one_line_errors(f"cannot load the model of {reward!r} from {source!r}"):
        return loader.from_pretrained(source, **arguments)


def network_reward(score: Callable, batch: int) -> Reward:
    """Return the reward of a network: `score(pictures, prompts) -> (b,) tensor` for `batch` pictures at once.

    They are pillow's, because transformers would have to guess the colour axis of an array 3 high or wide.
    """
    import torch
    lock = threading.Lock()  # one thread at a time, because tokenizers keep state between calls

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        scores = []
        with lock, torch.inference_mode():
            for start in range(0, len(images), batch):
                pictures = [Image.fromarray(image) for image in images[start : start + batch]]
                scores += score(pictures, list(prompts[start : start + batch])).tolist()
        return np.array(scores, np.float32)

    return reward


def clip_reward(name: str, model: str, processor: str, scale: float, device: str, batch: int) -> Reward:
    """Return the reward exp(logit_scale) cos(image, prompt) / scale of CLIP's embeddings, in float32.

    A prompt is cut to CLIP's 77 tokens.
    """
    network = load_pretrained(name, "CLIPModel", model, dtype="float32").to(device).eval()
    prepare = load_pretrained(name, "CLIPProcessor", processor)
    tokens = network.config.text_config.max_position_embeddings

    def score(pictures: list, prompts: list[str]) -> Any:
        texts = {"padding": True, "truncation": True, "max_length": tokens}
        inputs = prepare(images=pictures, text=prompts, return_tensors="pt", **texts).to(device)
        outputs = network(**inputs)  # its embeddings are of length 1
        return network.logit_scale.exp() * (outputs.image_embeds * outputs.text_embeds).sum(-1) / scale

    return network_reward(score, batch)


def pickscore(*, device: str = "cpu", batch: int = 16, model: str = "yuvalkirstain/PickScore_v1",
              processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K") -> Reward:
    """Build PickScore (arXiv 2305.01569) over 26, as the reference scales it."""
    return clip_reward("pickscore", model, processor, 26, device, batch)


def clipscore(*, device: str = "cpu", batch: int = 16, model: str = CLIP) -> Reward:
    """Build the similarity of picture and prompt by CLIP ViT-L/14 (arXiv 2103.00020), over 30."""
    return clip_reward("clipscore", model, model, 30, device, batch)


def read_tensors(path: str) -> dict[str, Any]:
    """Read tensors by name from a path or "repository:file" on the hub. Runs no pickled code."""
    if not os.path.exists(path):
        repository, _, file = path.partition(":")
        if not file:
            raise FileNotFoundError("there is no such file, and on the hub it would be repository:file")
        from huggingface_hub import hf_hub_download
        path = hf_hub_download(repository, file)
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file
        return load_file(path)
    import torch
    return torch.load(path, map_location="cpu", weights_only=True)


def aesthetic(*, device: str = "cpu", batch: int = 16, clip: str = CLIP,
              model: str = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth") -> Reward:
    """Build LAION's aesthetic predictor: about 1 to 10, from the direction of CLIP's image embedding.

    The default `model` is LAION's sac+logos+ava1-l14-linearMSE.pth.
    """
    with one_line_errors(f"cannot load the model of 'aesthetic' from {model!r}"):
        weights = read_tensors(model)
        layers = [[weights[f"layers.{i}.{kind}"].float().to(device) for kind in ("weight", "bias")]
                  for i in (0, 2, 4, 6, 7)]  # with dropout in between
    network = load_pretrained("aesthetic", "CLIPModel", clip, dtype="float32").to(device).eval()
    processor = load_pretrained("aesthetic", "CLIPProcessor", clip)
    from torch.nn import functional

    def score(pictures: list, prompts: list[str]) -> Any:
        inputs = processor(images=pictures, return_tensors="pt").to(device)
        embeds = functional.normalize(network.get_image_features(**inputs).pooler_output)  # (b, 768)
        for weight, bias in layers:
            embeds = functional.linear(embeds, weight, bias)
        return embeds.squeeze(-1)

    return network_reward(score, batch)


def imagereward(*, device: str = "cpu", batch: int = 16, model: str = "ImageReward-v1.0") -> Reward:
    """Build ImageReward (arXiv 2304.05977) of each picture with its own prompt, which is cut to 35 tokens.

    `model` may be a directory that holds the hub repository's ImageReward.pt and med_config.json.
    """
    own = ("image-reward and what it needs (docs/rewards.md) into an environment of its own, since it does "
           "not run beside transformers 5, and serve it from there: python rewards.py serve imagereward")
    with one_line_errors(f"reward 'imagereward' needs: pip install {own}"):
        from ImageReward import load
    files = {"name": model}
    if os.path.isdir(model):
        files = {"name": f"{model}/ImageReward.pt", "med_config": f"{model}/med_config.json"}
    with one_line_errors(f"cannot load the model of 'imagereward' from {model!r}"):
        network = load(**files, device=device)
    import torch

    def score(pictures: list, prompts: list[str]) -> Any:
        # Not the package's own `score`, because it would rank a list of pictures for one prompt.
        texts = {"padding": "max_length", "truncation": True, "max_length": 35}
        tokens = network.blip.tokenizer(prompts, return_tensors="pt", **texts).to(device)
        pixels = torch.stack([network.preprocess(picture) for picture in pictures]).to(device)
        return network.score_gard(tokens.input_ids, tokens.attention_mask, pixels).squeeze(-1)

    return network_reward(score, batch)


def deqa(*, device: str = "cpu", batch: int = 16, model: str = "zhiyuanyou/DeQA-Score-Mix3",
         trust_remote_code: bool = False) -> Reward:
    """Build DeQA-Score (arXiv 2501.11561) over 5: the technical quality of a picture, whatever the prompt.

    The network is code that its hub repository holds, so it runs only if `trust_remote_code` allows it.
    """
    if not trust_remote_code:
        raise ValueError(f"reward 'deqa' runs code that {model!r} holds: read it, then set trust_remote_code "
                         "(--trust-remote-code)")
    import torch  # because the older transformers that its code needs takes no dtype by name
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    arguments = {"trust_remote_code": True, "attn_implementation": "eager", "torch_dtype": dtype}
    network = load_pretrained("deqa", "AutoModelForCausalLM", model, **arguments).to(device).eval()
    return network_reward(lambda pictures, prompts: network.score(pictures).float() / 5, batch)
