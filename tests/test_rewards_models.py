"""Claims about the rewards that are networks, and about those that ask a server.

The networks are the real classes with random weights, in checkpoints of the hub's format that are built here and loaded
by the code that loads the published ones. Nothing but a network peer is faked, and of DeQA, whose class is code that
its hub repository holds, that file. Packages that do not live in one environment are tested where they are installed:

    pytest --noconftest tests/test_rewards_models.py
"""

import base64
import importlib
import io
import json
import pathlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import rewards
from engines import judges
from rewards import RewardError, build_reward, build_rewards

LONG = "a very long caption of a small brown dog " * 10  # more than 77 tokens
PROMPTS = ["a red cat", LONG, "two green trees", 'a sign that says "hello"', "a red cat", LONG + "and a cat"]


def pictures(height, width, count=6, seed=0):
    """Smooth random pictures, (count, height, width, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, 3, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC)) for image in coarse])


def one_line(error, *contents):
    message = str(error.value)
    assert "\n" not in message
    for content in contents:
        assert content in message


def installed(module):
    """A test that needs `module`, and whatever breaks its import elsewhere."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return pytest.mark.skip(f"{module} does not import here: {error}")
    return lambda test: test


needs_transformers = installed("transformers.models.qwen2_5_vl")  # which the transformers beside ImageReward lacks


# ---------------------------------------------------------------- CLIP: pickscore, clipscore, aesthetic


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A directory with a small random CLIPModel and its CLIPProcessor; 77 positions, embeddings of 768."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**layers, **special, "vocab_size": len(tokens), "max_position_embeddings": 77}
    vision = {**layers, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:  # so that pictures and prompts matter as much as in a trained model
                torch.nn.init.normal_(parameter, std=0.3)
        network.logit_scale.fill_(4.0)
    directory = str(tmp_path_factory.mktemp("clip"))
    network.save_pretrained(directory)
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size=size[0], crop_size=size[1]), tokenizer).save_pretrained(directory)
    return directory


def clip_embeddings(directory, image, prompt):
    """The two embeddings, one picture at a time, from the parts of the network; each of length 1, in float64."""
    import torch
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    network, tokenizer = CLIPModel.from_pretrained(directory).eval(), CLIPTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt).input_ids
    ids = ids if len(ids) <= 77 else [*ids[:76], tokenizer.eos_token_id]
    pixels = CLIPImageProcessor.from_pretrained(directory)(Image.fromarray(image), return_tensors="pt").pixel_values
    with torch.no_grad():
        of_image = network.visual_projection(network.vision_model(pixels).pooler_output)[0].double().numpy()
        of_text = network.text_projection(network.text_model(torch.tensor([ids])).pooler_output)[0].double().numpy()
    return of_image / np.linalg.norm(of_image), of_text / np.linalg.norm(of_text)


@pytest.fixture(scope="module", params=[".pth", ".safetensors"])
def predictor(request, tmp_path_factory):
    """(path, network): a random predictor of LAION's shape, and the file that holds its tensors."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    network = torch.nn.Sequential(
        linear(768, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1), linear(64, 16),
        linear(16, 1),
    )  # fmt: skip
    weights = {f"layers.{name}": tensor for name, tensor in network.state_dict().items()}
    path = str(tmp_path_factory.mktemp("predictor") / f"predictor{request.param}")
    (save_file if request.param == ".safetensors" else torch.save)(weights, path)
    return path, network.eval()


@needs_transformers
@pytest.mark.parametrize("name, scale", [("pickscore", 26), ("clipscore", 30)])
@pytest.mark.parametrize("height, width", [(40, 56), (70, 33), (3, 48), (48, 3)])
def test_a_clip_reward_is_the_scaled_cosine_of_each_picture_and_its_own_prompt(clip, name, scale, height, width):
    images = pictures(height, width)
    models = {model: clip for model in ("pickscore", "pickscore.processor", "clipscore")}
    scores = build_rewards({name: 1}, batch=4, models=models)(images, PROMPTS, [{}] * 6)[name]
    expected = [np.dot(*clip_embeddings(clip, *pair)) * np.exp(4) / scale for pair in zip(images, PROMPTS)]
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert len(set(scores.round(3))) == 6


@needs_transformers
@pytest.mark.parametrize("height, width", [(40, 56), (48, 3)])
def test_the_aesthetic_reward_is_the_predictor_of_the_direction_of_the_embedding(clip, predictor, height, width):
    import torch

    path, network = predictor
    images = pictures(height, width)
    models = {"aesthetic": path, "aesthetic.clip": clip}
    scores = build_rewards({"aesthetic": 1}, batch=4, models=models)(images, PROMPTS, [{}] * 6)["aesthetic"]
    embeddings = torch.tensor(np.stack([clip_embeddings(clip, image, "")[0] for image in images])).float()
    with torch.no_grad():
        np.testing.assert_allclose(scores, network(embeddings)[:, 0], atol=1e-6)
    assert len(set(scores.round(5))) == 6


@needs_transformers
@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic"])
def test_a_score_depends_neither_on_the_order_nor_on_the_size_of_the_batch(clip, predictor, name):
    models = {"pickscore": clip, "pickscore.processor": clip, "clipscore": clip, "aesthetic.clip": clip}
    models["aesthetic"] = predictor[0]
    images, order = pictures(40, 56), np.random.default_rng(0).permutation(6)
    expected = build_rewards({name: 1}, models=models)(images, PROMPTS, [{}] * 6)[name]
    for batch in (1, 2, 4, 16):
        reward = build_rewards({name: 1}, batch=batch, models=models)
        scores = reward(images[order], [PROMPTS[i] for i in order], [{}] * 6)[name]
        np.testing.assert_allclose(scores, expected[order], atol=2e-5)


@needs_transformers
def test_threads_that_share_a_network_get_their_own_scores(clip):
    reward = build_rewards({"clipscore": 1}, batch=2, models={"clipscore": clip})
    images = pictures(40, 56)
    expected = reward(images, PROMPTS, [{}] * 6)["clipscore"]
    with ThreadPoolExecutor(4) as pool:
        for i, scores in enumerate(pool.map(lambda i: reward(images[i:], PROMPTS[i:], [{}] * (6 - i)), [0, 1, 2, 3] * 3)):
            np.testing.assert_allclose(scores["clipscore"], expected[i % 4 :], atol=2e-5)


@needs_transformers
def test_a_model_that_cannot_be_loaded_is_one_line_that_names_it(tmp_path, clip):
    with pytest.raises(ValueError) as error:
        build_rewards({"clipscore": 1}, models={"clipscore": str(tmp_path)})
    one_line(error, "'clipscore'", str(tmp_path))
    with pytest.raises(ValueError) as error:
        build_rewards({"aesthetic": 1}, models={"aesthetic": "no/such/file.pth", "aesthetic.clip": clip})
    one_line(error, "'aesthetic'", "no/such/file.pth")


@needs_transformers
def test_predictor_weights_are_read_as_tensors_and_nothing_else(tmp_path, clip):
    import torch

    class Touch:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)

    torch.save({"layers.0.weight": Touch()}, tmp_path / "hostile.pth")
    torch.save({"layers.0.weight": torch.zeros(1024, 768)}, tmp_path / "other.pth")
    for file, content in (("hostile.pth", "eights"), ("other.pth", "'layers.0.bias'")):
        with pytest.raises(ValueError) as error:
            build_rewards({"aesthetic": 1}, models={"aesthetic": str(tmp_path / file), "aesthetic.clip": clip})
        one_line(error, file, content)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- DeQA

DEQA = '''
import numpy, torch, transformers

class TinyConfig(transformers.PretrainedConfig):
    model_type = "tiny_deqa"

class TinyModel(transformers.PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.post_init()

    def score(self, images):
        means = [numpy.asarray(image).mean((0, 1)) / 255 for image in images]
        return 1 + 4 * torch.tensor(numpy.array(means), dtype=self.weight.dtype) @ self.weight.softmax(0)
'''


@pytest.fixture
def deqa(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import save_file
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    directory = tmp_path / "tiny_deqa"
    directory.mkdir()
    (directory / "modeling_tiny.py").write_text(f"open({str(directory / 'ran')!r}, 'w').close()\n{DEQA}")
    classes = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyModel"}
    (directory / "config.json").write_text(json.dumps({"model_type": "tiny_deqa", "auto_map": classes}))
    save_file({"weight": torch.tensor([0.0, 1.0, 2.0])}, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


@needs_transformers
def test_deqa_is_what_its_own_code_scores_over_five(deqa):
    images, order = pictures(20, 31), [3, 0, 5, 1, 4, 2]
    reward = build_rewards({"deqa": 1}, batch=4, models={"deqa": deqa}, trust_remote_code=True)
    assert pathlib.Path(deqa, "ran").exists()
    weight = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    expected = (1 + 4 * images.mean((1, 2)) / 255 @ weight) / 5
    np.testing.assert_allclose(reward(images, PROMPTS, [{}] * 6)["deqa"], expected, atol=1e-6)
    np.testing.assert_allclose(reward(images[order], PROMPTS, [{}] * 6)["deqa"], expected[order], atol=1e-6)


@needs_transformers
def test_deqa_runs_no_code_of_the_hub_unless_it_may(deqa):
    with pytest.raises(ValueError) as error:
        build_rewards({"deqa": 1}, models={"deqa": deqa})
    one_line(error, "'deqa'", deqa, "trust_remote_code")
    assert not pathlib.Path(deqa, "ran").exists()


# ---------------------------------------------------------------- Qwen2.5-VL in this process


def qwen_checkpoint(directory, speaks):
    """A small random Qwen2.5-VL and its processor; where it `speaks`, it says nothing but scores, by what it sees."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2Tokenizer, Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )  # fmt: skip

    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[], eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.add_tokens([f"<Score>{score}</Score>" for score in range(1, 6)])
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**layers, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "rope_parameters": rope}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "depth": 2, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    network = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:  # what was seen matters more than the token that comes after it
                torch.nn.init.normal_(parameter, std=0.02 if "embed_tokens" in name else 0.2)
        if speaks:
            network.lm_head.weight[:-5] = 0
            network.lm_head.weight[-5:] -= network.lm_head.weight[-5:].mean(0)  # so that one of them is above 0
    network.save_pretrained(directory)
    template = (
        "{% for message in messages %}<|im_start|>{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>"
        "{% endfor %}<|im_start|>"
    )
    size = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 16}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**size), tokenizer, Qwen2VLVideoProcessor(), chat_template=template
    )
    processor.save_pretrained(directory)
    return str(directory)


@needs_transformers
@installed("torchvision.ops")
def test_qwenvl_is_the_score_that_the_model_writes_about_each_picture(tmp_path, monkeypatch):
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    monkeypatch.setattr(judges, "ANSWER_TOKENS", 1)
    monkeypatch.setattr(judges, "QUALITY_QUESTION", "Well?")  # short, so that the picture weighs something beside it
    directory = qwen_checkpoint(tmp_path, speaks=True)
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    text = f"<|im_start|><|vision_start|><|image_pad|><|vision_end|>{judges.QUALITY_QUESTION}<|im_end|><|im_start|>"
    for images in (pictures(60, 90), pictures(64, 3)):
        expected = []
        for image in images:  # alone, so without padding
            inputs = processor(images=[Image.fromarray(image)], text=[text], return_tensors="pt")
            with torch.no_grad():
                token = network(**inputs).logits[0, -1].argmax()
            expected.append(int(processor.tokenizer.decode(token)[len("<Score>")]) / 5)
        for batch in (1, 4, 16):
            reward = build_rewards({"qwenvl": 1}, batch=batch, models={"qwenvl": directory})
            scores = reward(images, PROMPTS, [{}] * 6)
            np.testing.assert_allclose(scores["qwenvl"], expected)
            assert not scores["qwenvl/unanswered"].any()
    assert len(set(expected)) > 1


@needs_transformers
@installed("torchvision.ops")
def test_qwenvl_that_writes_no_score_stops_with_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "ANSWER_TOKENS", 4)
    reward = build_rewards({"qwenvl": 1}, models={"qwenvl": qwen_checkpoint(tmp_path, speaks=False)})
    with pytest.raises(RewardError) as error:
        reward(pictures(60, 90), PROMPTS, [{}] * 6)
    one_line(error, "'qwenvl'", "6 of the last 6", "the last answer is")


# ---------------------------------------------------------------- ImageReward


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    """A directory with a random ImageReward in its hub repository's files: the real class, one layer of text."""
    import torch
    from ImageReward.ImageReward import ImageReward

    directory = tmp_path_factory.mktemp("image_reward")
    (directory / "bert-base-uncased").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a very long caption of small brown dog red cat tree".split()]
    (directory / "bert-base-uncased" / "vocab.txt").write_text("\n".join(words))
    config = {
        "hidden_size": 768, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 64,
        "max_position_embeddings": 64, "add_cross_attention": True, "architectures": ["BertModel"], "type_vocab_size": 2,
    }  # fmt: skip
    (directory / "med_config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)  # its tokenizer is "bert-base-uncased", here a directory
        torch.manual_seed(0)
        network = ImageReward(med_config=str(directory / "med_config.json"))
        with torch.no_grad():
            for parameter in network.mlp.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        torch.save(network.state_dict(), directory / "ImageReward.pt")
        yield str(directory)


@installed("ImageReward")
def test_imagereward_that_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(ValueError) as error:
        build_rewards({"imagereward": 1}, models={"imagereward": str(tmp_path / "nothing")})
    one_line(error, "'imagereward'", "nothing")


@installed("ImageReward")
def test_imagereward_is_the_package_s_own_score_of_each_picture_with_its_own_prompt(image_reward):
    import ImageReward

    network = ImageReward.load(f"{image_reward}/ImageReward.pt", "cpu", med_config=f"{image_reward}/med_config.json")
    images, order = pictures(40, 56), [3, 0, 5, 1, 4, 2]
    expected = np.array([network.score(*pair) for pair in zip(PROMPTS, map(Image.fromarray, images))])
    reward = build_rewards({"imagereward": 1}, batch=4, models={"imagereward": image_reward})
    np.testing.assert_allclose(reward(images, PROMPTS, [{}] * 6)["imagereward"], expected, atol=1e-4)
    shuffled = reward(images[order], [PROMPTS[i] for i in order], [{}] * 6)["imagereward"]
    np.testing.assert_allclose(shuffled, expected[order], atol=1e-4)
    assert len(set(expected.round(3))) == 6


def test_imagereward_without_its_package_is_one_line_that_says_to_serve_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ValueError) as error:
        build_rewards({"imagereward": 1})
    one_line(error, "ImageReward", "pip install", "environment of its own", "python rewards.py serve imagereward")


# ---------------------------------------------------------------- PaddleOCR


def paddle_directory(directory, network, name, transforms, decoder):
    directory.mkdir()
    (directory / "inference.onnx").write_bytes(network.read_bytes())
    steps = {"Global": {"model_name": name}, "PreProcess": {"transform_ops": transforms}, "PostProcess": decoder}
    (directory / "inference.yml").write_text(json.dumps(steps))  # JSON is YAML
    return str(directory)


@installed("paddleocr")
@installed("rapidocr")
def test_paddleocr_reads_with_models_of_local_directories(tmp_path, monkeypatch):
    """The package's own class, on onnxruntime, with the PP-OCR networks that rapidocr's wheel holds."""
    import onnxruntime
    import rapidocr

    def refuse(*arguments, **keywords):
        raise AssertionError("network")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setenv("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
    wheel = pathlib.Path(rapidocr.__file__).parent / "models"
    detection, recognition = (next(wheel.glob(f"PP-OCR*_{kind}_small.onnx")) for kind in ("det", "rec"))
    letters = onnxruntime.InferenceSession(recognition).get_modelmeta().custom_metadata_map["character"].split("\n")
    decode = {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    normalise = {"NormalizeImage": {"mean": mean, "std": std, "scale": 1 / 255, "order": "hwc"}}
    models = {
        "ocr.detection": paddle_directory(
            tmp_path / "det", detection, "PP-OCRv6_small_det",
            [decode, {"DetResizeForTest": {}}, normalise, {"ToCHWImage": None}], {"name": "DBPostProcess"},
        ),
        "ocr.recognition": paddle_directory(
            tmp_path / "rec", recognition, "PP-OCRv6_small_rec",
            [decode, {"RecResizeImg": {"image_shape": [3, 48, 320]}}], {"name": "CTCLabelDecode", "character_dict": letters},
        ),
    }  # fmt: skip
    images = []
    for text in ("green\ntea\nhouse", "Stone", "", "stove"):
        image = Image.new("RGB", (320, 256), "white")
        font = ImageFont.load_default(50)
        ImageDraw.Draw(image).text((160, 128), text, font=font, fill="black", anchor="mm", align="center")
        images.append(np.array(image))
    targets = ["green tea house", "Stone", "stone", "stone"]
    prompts = [f'a sign that says "{target}"' for target in targets]
    reward = build_rewards({"ocr": 1}, models=models)
    np.testing.assert_allclose(reward(np.stack(images), prompts, [{}] * 4)["ocr"], [1, 1, 0, 1 - 1 / 5])


# ---------------------------------------------------------------- asking a server


class Peer:
    """A server in a thread; `answer(body, headers) -> (status, bytes[, headers])` is what it says to a POST."""

    def __init__(self, answer, port=0):
        peer, self.requests, self.at_once, self.most_at_once = self, [], 0, 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    peer.requests.append((self.path, body, self.headers))
                    peer.at_once += 1
                    peer.most_at_once = max(peer.most_at_once, peer.at_once)
                status, content, *more = answer(body, self.headers)
                with lock:
                    peer.at_once -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                for header in more:
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

        self.server = Server(("127.0.0.1", port), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def judge(says):
    """A Peer in OpenAI's format: `says(image (H, W, 3), text, request) -> answer`."""

    def answer(body, headers):
        request = json.loads(body)
        picture, text = request["messages"][0]["content"]
        head, _, data = picture["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        message = {"role": "assistant", "content": says(image, text["text"], request)}
        return 200, json.dumps({"choices": [{"index": 0, "message": message}]}).encode()

    return Peer(answer)


def ask(peer, name="unifiedreward", **options):
    return build_rewards({name: 1}, urls={name: f"openai+http://{peer.address}/v1"}, **options)


def grey(values):
    return np.stack([np.full((9, 3, 3), value, np.uint8) for value in values])


def test_a_server_that_fails_for_a_while_costs_time_and_nothing_else():
    statuses = [503, 502, 500, 500]
    with Peer(lambda body, headers: (statuses.pop() if statuses else 200, body[::-1])) as peer:
        response = rewards.post(f"http://{peer.address}/", content=b"abc")
    assert response.content == b"cba" and len(peer.requests) == 5


def test_a_server_that_starts_late_is_waited_for():
    with Peer(None) as peer:
        port = peer.server.server_port
    late = []
    timer = threading.Timer(0.5, lambda: late.append(Peer(lambda body, headers: (200, b"here"), port)))
    timer.start()
    assert rewards.post(f"http://127.0.0.1:{port}/", json={}, deadline=20).content == b"here"
    timer.join()
    late[0].__exit__()


def test_a_server_that_stays_away_stops_with_its_address_its_last_answer_and_how_to_start_it():
    with Peer(lambda body, headers: (503, b"still\nloading")) as peer:
        url = f"http://{peer.address}/score"
        with pytest.raises(RewardError) as error:
            rewards.post(url, json={}, deadline=0.6, how_to_start="serve it")
        one_line(error, url, "0.6 s", "503 still loading", "serve it")
    with pytest.raises(RewardError) as error:
        rewards.post(url, json={}, deadline=0.6, how_to_start="serve it")
    one_line(error, url, "refused", "serve it")


def test_a_server_whose_reward_fails_is_asked_three_times_and_its_reason_is_passed_on():
    detail = "reward 'own:bad' failed for a batch that starts with " + 300 * "a very long prompt " + "KeyError: 'tag'"
    with Peer(lambda body, headers: (500, detail.encode())) as peer, pytest.raises(RewardError) as error:
        rewards.post(f"http://{peer.address}/", content=b"abc")
    one_line(error, peer.address, "failed 3 times", "500 reward 'own:bad' failed", "KeyError: 'tag'")
    assert len(peer.requests) == 3


def test_a_deadline_is_used_up_before_a_server_is_given_up():
    with Peer(lambda body, headers: (503, b"loading")) as peer, pytest.raises(RewardError, match="in 1.5 s"):
        start = time.monotonic()
        rewards.post(f"http://{peer.address}/", content=b"abc", deadline=1.5)
    assert 1.5 <= time.monotonic() - start < 20


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_a_request_that_a_server_refuses_is_not_repeated(status):
    with Peer(lambda body, headers: (status, b'{"detail":"no\nsuch model"}')) as peer:
        with pytest.raises(RewardError) as error:
            # A short deadline, because the second request may come after the peer has gone, and Python's end waits for it.
            ask(peer, deadline=5)(grey([10, 20]), ["a", "b"], [{}] * 2)
        one_line(error, peer.address, str(status), "such model")
        assert len(peer.requests) <= 2  # one for each picture


@pytest.mark.parametrize("status", [408, 429])
def test_a_server_that_asks_to_wait_is_asked_again_and_not_before(status):
    times = []

    def answer(body, headers):
        times.append(time.monotonic())
        return (200, b"here") if len(times) > 1 else (status, b"slower", ("Retry-After", "1"))

    with Peer(answer) as peer:
        assert rewards.post(f"http://{peer.address}/", content=b"abc").content == b"here"
    assert len(times) == 2 and times[1] - times[0] >= 1


def test_a_server_that_asks_to_wait_for_longer_than_the_deadline_stops_at_the_deadline():
    with Peer(lambda body, headers: (429, b"quota", ("Retry-After", "3600"))) as peer, pytest.raises(RewardError) as error:
        rewards.post(f"http://{peer.address}/", content=b"abc", deadline=0.5)
    one_line(error, peer.address, "0.5 s", "429 quota")


def test_a_proxy_in_the_environment_does_not_hide_a_server_on_this_machine(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    rewards.http_client.cache_clear()
    with Peer(lambda body, headers: (200, b"here")) as peer:
        for host in (peer.address, peer.address.replace("127.0.0.1", "localhost")):
            assert rewards.post(f"http://{host}/", content=b"abc", deadline=5).content == b"here"
    rewards.http_client.cache_clear()


@pytest.mark.parametrize("location, address", [("https://other:1/v1", "https://other:1/v1"), ("/new", "/new")])
def test_a_redirect_names_the_address_to_give(location, address):
    with Peer(lambda body, headers: (307, b"", ("Location", location))) as peer, pytest.raises(RewardError) as error:
        rewards.post(f"http://{peer.address}/old", content=b"abc")
    one_line(error, peer.address, "redirects", address)


def test_a_request_that_is_too_large_says_how_to_make_it_smaller():
    with Peer(lambda body, headers: (413, b"too large")) as peer, pytest.raises(RewardError) as error:
        rewards.post(f"http://{peer.address}/", content=b"abc")
    one_line(error, peer.address, "413", "--reward-batch")


# ---------------------------------------------------------------- judges


@pytest.mark.parametrize(
    "answer, score",
    [
        ("Final Score: 4", 4), ("Final Score: 4.0", 4), ("Final Score: 4/5", 4), ("Final Score: 3.5 / 5.0", 3.5),
        ("**Final Score:** 2", 2), ("**Final Score**: **2**", 2), ("Final Score:\n\n5.", 5), ("final score: 1 of the", 1),
        ("Final Score: 4 out of 5", 4), ("Final Score: X\n...\nFinal Score: 3", 3), ("Final Score: 5, since", 5),
        ("4", None), ("", None), ("Final Score:", None), ("Final Score: X", None), ("Final Score: 0", None),
        ("Final Score: 0.5", None), ("Final Score: 6", None), ("Final Score: 5.5", None), ("Final Score: 45", None),
        ("Final Score: 4/10", None), ("Final Score: 4.5/10", None), ("Final Score: 4/50", None), ("Final Score: 3-4", None),
        ("Final Score: 3 to 4", None), ("Final Score: 40%", None), ("Final Score: -4", None), ("Final Score: nan", None),
        ("Final Score: 4 out of 10", None), ("Final Score: 1e9", None), ("Final Score: four", None),
        ("Final Score: 4\nFinal Score: none", None),
    ],
)  # fmt: skip
def test_a_score_is_a_number_from_one_to_five_after_the_last_mark(answer, score):
    with judge(lambda image, text, request: answer) as peer:
        reward = ask(peer, max_unanswered=1)
        if score is None:
            with pytest.raises(RewardError):
                reward(grey([0]), ["cat"], [{}])
        else:
            assert reward(grey([0]), ["cat"], [{}])["unifiedreward"] == pytest.approx(score / 5)


@pytest.mark.parametrize(
    "answer, score",
    [
        ("<Thought>3</Thought>\n<Score>4</Score>", 4), ("a <Score> it is: <Score> 3.5 </Score>", 3.5),
        ("<Score>4/5</Score>", 4), ("<Score>4", None), ("<Score>X</Score>", None), ("<Score>9</Score>", None),
    ],
)  # fmt: skip
def test_qwenvl_answers_between_tags(answer, score):
    assert judges.parse_score(answer, judges.QWENVL_SCORE) == score


def test_a_judge_sees_each_picture_with_its_prompt_without_loss_and_no_score_is_swapped():
    """The judge grades by the picture and the prompt alone, in no order, many at once."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 24, 17, 3), np.uint8)
    prompts = [f"caption {i} with [brackets], {{braces}} and \u201cquotes\u201d" for i in rng.permutation(200)]
    numbers = {image.tobytes(): i for i, image in enumerate(images)}
    unseen = set(range(200))

    def says(image, text, request):
        i = numbers[image.tobytes()]
        unseen.remove(i)
        time.sleep(0.002 * (i % 7))
        assert image.shape == (24, 17, 3) and f"Text Caption: [{prompts[i]}]" in text
        assert request["model"] == "CodeGoat24/UnifiedReward-7b-v1.5"
        return f"Alignment ... quality ...\nFinal Score: {1 + i % 401 / 100:.2f}"

    with judge(says) as peer:
        scores = ask(peer)(images, prompts, [{}] * 200)
        assert 8 <= peer.most_at_once <= 64
        assert {path for path, _, _ in peer.requests} == {"/v1/chat/completions"}
    np.testing.assert_allclose(scores["unifiedreward"], (1 + np.arange(200) / 100) / 5, rtol=1e-6)
    assert not unseen and not scores["unifiedreward/unanswered"].any()


def test_a_server_that_is_busy_now_and_then_changes_no_score():
    busy = np.random.default_rng(0)
    lock = threading.Lock()

    def answer(body, headers):
        with lock:
            if busy.random() < 0.3:
                return 503, b"busy"
        text = json.loads(body)["messages"][0]["content"][1]["text"]
        score = int(text.rpartition("Text Caption: [number ")[2].rstrip("]")) % 5 + 1
        return 200, json.dumps({"choices": [{"message": {"content": f"Final Score: {score}"}}]}).encode()

    with Peer(answer) as peer:
        scores = ask(peer)(grey([0] * 40), [f"number {i}" for i in range(40)], [{}] * 40)["unifiedreward"]
    np.testing.assert_allclose(scores, (np.arange(40) % 5 + 1) / 5)


def test_qwenvl_asks_a_server_where_it_has_one(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "the key")
    asked = []

    def says(image, text, request):
        asked.append((text, request["model"], request["temperature"]))
        return f"<Thought>so</Thought><Score>{image[0, 0, 0]}</Score>"

    with judge(says) as peer:
        scores = ask(peer, "qwenvl", models={"qwenvl": "my/judge"})(grey([1, 5, 2]), ["a", "b", "c"], [{}] * 3)
        assert all(headers["Authorization"] == "Bearer the key" for _, _, headers in peer.requests)
    np.testing.assert_allclose(scores["qwenvl"], [0.2, 1, 0.4])
    assert asked == [(judges.QUALITY_QUESTION, "my/judge", 0)] * 3


def by_grey(image, text, request):
    """1 to 5 as the picture's grey says; 0: no score; 9: a score only at a higher temperature."""
    value = image[0, 0, 0]
    value = 3 if value == 9 and request["temperature"] else value
    return f"I cannot say. {value}" if value in (0, 9) else f"Final Score: {value}"


def test_a_judge_without_a_score_is_asked_again():
    with judge(by_grey) as peer:
        scores = ask(peer)(grey([9, 5]), ["cat", "cat"], [{}] * 2)
        assert len(peer.requests) == 3
    np.testing.assert_allclose(scores["unifiedreward"], [3 / 5, 1])
    assert not scores["unifiedreward/unanswered"].any()


def test_a_picture_without_a_score_gets_the_mean_of_its_prompt_and_else_of_what_was_scored_lately():
    with judge(by_grey) as peer:
        reward = ask(peer, max_unanswered=0.5)
        assert reward(grey([3, 3]), ["cat", "hen"], [{}] * 2)["unifiedreward"].tolist() == pytest.approx([0.6, 0.6])
        prompts = ["cat", "dog", "cat", "cat", "hen", "dog"]
        scores = reward(grey([1, 5, 0, 2, 0, 4]), prompts, [{}] * 6)
        alone = reward(grey([0]), ["cow"], [{}])["unifiedreward"]
    cat, lately = 1.5, (3 + 3 + 1 + 5 + 2 + 4) / 6
    np.testing.assert_allclose(scores["unifiedreward"], np.array([1, 5, cat, 2, lately, 4]) / 5, rtol=1e-6)
    np.testing.assert_allclose(alone, [lately / 5], rtol=1e-6)
    assert scores["unifiedreward/unanswered"].tolist() == [0, 0, 1, 0, 1, 0]


def test_a_judge_that_never_gave_a_score_stops_with_its_last_answer():
    with judge(by_grey) as peer, pytest.raises(RewardError) as error:
        ask(peer, max_unanswered=1)(grey([0, 0]), ["cat", "dog"], [{}] * 2)
    one_line(error, "'unifiedreward'", "2 of the last 2", "I cannot say. 0")


@pytest.mark.slow
def test_more_than_the_allowed_share_of_pictures_without_a_score_stops_however_many_went_well_before():
    with judge(by_grey) as peer:
        reward = ask(peer, max_unanswered=0.1)
        for _ in range(3):  # 2 of 20, 4 of 40, ...: not more than the share
            reward(grey([0, 0] + [4] * 18), ["cat"] * 20, [{}] * 20)
        with pytest.raises(RewardError) as error:
            reward(grey([0, 4, 4]), ["cat"] * 3, [{}] * 3)  # 7 of 63
        one_line(error, "'unifiedreward'", "7 of the last 63", "10%", "I cannot say. 0")
        with pytest.raises(RewardError, match="2 of the last 10"):
            ask(peer, max_unanswered=0.1)(grey([0, 0] + [4] * 8), ["cat"] * 10, [{}] * 10)
        ask(peer, max_unanswered=0.1)(grey([0] + [4] * 7), ["cat"] * 8, [{}] * 8)  # one of a few is no share
        reward = ask(peer, max_unanswered=0.1)
        for _ in range(50):
            reward(grey([4] * 40), ["cat"] * 40, [{}] * 40)
        with pytest.raises(RewardError, match="of the last 1000"):
            for _ in range(6):
                reward(grey([0, 4] * 20), ["cat"] * 40, [{}] * 40)


def test_an_answer_in_a_list_of_parts_is_read():
    parts = [{"type": "text", "text": "Final "}, {"type": "audio"}, {"type": "text", "text": "Score: 4"}]
    with judge(lambda image, text, request: parts) as peer:
        assert ask(peer)(grey([0]), ["cat"], [{}])["unifiedreward"] == pytest.approx(4 / 5)


def test_what_is_no_chat_completion_stops_with_what_came():
    for content in (b"<html>a page</html>", b'{"object": "list"}', b"[]", b'{"choices": []}'):
        with Peer(lambda body, headers, content=content: (200, content)) as peer, pytest.raises(RewardError) as error:
            ask(peer)(grey([1]), ["cat"], [{}])
        one_line(error, peer.address, "OpenAI-compatible", content.decode())


@pytest.mark.parametrize("url", [None, "", "http://host:1/v1", "openai+host"])
def test_unifiedreward_needs_the_address_of_a_server(url):
    with pytest.raises(ValueError) as error:
        build_reward("unifiedreward") if url is None else judges.unifiedreward(url=url)
    one_line(error, "'unifiedreward'", "openai+http://host:port/v1", "vllm serve CodeGoat24/UnifiedReward-7b-v1.5")


@pytest.mark.parametrize("options", [{"max_unanswered": 1.5}, {"batch": 0}, {"models": {"clip": "x"}}])
def test_an_option_that_cannot_be_is_one_line(options):
    with pytest.raises(ValueError) as error:
        build_rewards({"jpeg_compressibility": 1}, **options)
    one_line(error, next(iter(options))[:5])
