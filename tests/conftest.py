import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""       # laws are tested on the CPU, some by more processes than there are GPUs

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from helpers import ROOT, SMALL, flags, run_here, save_small_sd3
from make_tiny_sd3 import make_pipeline
from transformers import CLIPTextModel

torch.set_num_threads(1)          # the tensors here are too small to share


LAUNCHERS = {"start", "command", "found", "browser", "serve", "server"}      # fixtures with processes of their own: torchrun, servers, a browser
# Files about what the first command does not use. They take a third of the time of all that is not slow otherwise.
ASIDE = {f"test_{name}.py" for name in ("new_families", "adapter_formats", "estimate", "demo", "showcase")}


@pytest.hookimpl(tryfirst=True)           # before pytest looks at -m
def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: item.path.name != "test_train.py")      # the longest file first: the others go beside it
    for item in items:
        if item.path.name in ASIDE or LAUNCHERS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


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


@pytest.fixture(scope="module")
def train_here(model, tmp_path_factory):
    """`train_here(name, before, **changes)`: a run in this process, as one rank; its directory.

    before: called with the `Run` before it trains.
    """
    runs = tmp_path_factory.mktemp("runs")

    def run(name: str, before=None, **changes) -> Path:
        run_here(flags(**{"model": model, "output_dir": runs, "run_name": name, **SMALL, **changes}), before)
        return runs / name

    return run


@pytest.fixture(scope="module")
def start(model, tmp_path_factory):
    """`start(name, ranks, **changes)`: the real command, on so many ranks (0: without torchrun), and the run's directory.

    In place of a number, `ranks` may be the launcher's own words.
    """
    runs = tmp_path_factory.mktemp("commands")
    processes = []

    def run(name: str, ranks: int | list[str], *words: str, cwd=ROOT, path=ROOT, **changes):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        if isinstance(ranks, list):
            launcher = ranks
        arguments = flags(**{"model": model, "output_dir": runs, "run_name": name, **SMALL, **changes})
        process = subprocess.Popen([sys.executable, *launcher, ROOT / "train.py", *arguments, *words], cwd=cwd,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path)}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        return process, runs / name

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def command(start):
    """`command(name, ranks, **changes)`: the real command to its end: (exit code, stdout, stderr, the run's directory)."""
    def run(*args, **changes) -> tuple[int, str, str, Path]:
        process, directory = start(*args, **changes)
        out, err = process.communicate(timeout=250)
        return process.returncode, out, err, directory

    return run
