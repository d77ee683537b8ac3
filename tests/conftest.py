import os
import shutil
import time
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""       # laws are tested on the CPU, some by more processes than there are GPUs

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from make_tiny_sd3 import make_pipeline
from transformers import CLIPTextModel

torch.set_num_threads(1)          # the tensors here are too small to share


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: item.path.name != "test_train.py")      # the longest file first: the others go beside it


def save_small_sd3(directory: Path) -> None:
    """In the hub's format: a small StableDiffusion3Pipeline, all nine parts, with random weights."""
    torch.manual_seed(0)
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "embedder" in name and parameter.ndim == 2:      # so that prompt and time matter as much as in a trained model
                parameter *= 3
    pipe.save_pretrained(directory)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    save_small_sd3(directory)
    return str(directory)


@pytest.fixture(scope="session")
def flux_model(tmp_path_factory) -> str:
    """As `model`, a small FluxPipeline with guidance embeddings and dynamic shifting."""
    torch.manual_seed(0)
    parts = make_pipeline()
    transformer = FluxTransformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "embed" in name and parameter.ndim == 2:                 # prompt, time and guidance matter
                parameter *= 3
    pipe = FluxPipeline(
        transformer=transformer, vae=AutoencoderKL.from_config({**parts.vae.config, "scaling_factor": 0.5, "shift_factor": 0.1}),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=128),
        text_encoder=CLIPTextModel(parts.text_encoder.config), tokenizer=parts.tokenizer,
        text_encoder_2=parts.text_encoder_3, tokenizer_2=parts.tokenizer_3)
    directory = tmp_path_factory.mktemp("flux")
    pipe.save_pretrained(directory)
    return str(directory)


@pytest.fixture(params=["sd3", "flux"])
def each_model(request, model, flux_model) -> str:
    return {"sd3": model, "flux": flux_model}[request.param]


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; what needs it is skipped where Chromium or the package playwright is missing."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"])
        yield browser
        browser.close()


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Running, and not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
