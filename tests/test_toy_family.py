"""A family in a file of one's own, whose pipeline diffusers does not have: it samples as its pipeline does, and trains."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import CHEAP, ROOT, SMALL, flags, metrics_of

from config import PRESETS
from families import FAMILIES
from policy import Policy
from sampler import rollout, timestep_schedule

PROMPTS = ['the word "lamp"', 'the word "sun", in a picture']
SIZE = (16, 32)
STARTER = """
from harness.program import run_as_program
import toy_family
from train import main
run_as_program(main)
"""


@pytest.fixture(scope="module")
def toy():
    """The file, which adds its family and its preset to the project's as long as the tests here run."""
    import toy_family
    yield toy_family
    del FAMILIES["ToyPipeline"], PRESETS["toy"]


@pytest.fixture(scope="module")
def directory(toy, tmp_path_factory) -> str:
    return toy.save_toy(tmp_path_factory.mktemp("toy"))


def compare(toy, directory: str, steps: int, scale: float, adapter: str = "") -> tuple[float, int]:
    """The largest difference of the policy's last latents from the pipeline's, and of its pictures, of 255."""
    policy = Policy(directory, torch.device("cpu"), resolution=SIZE, max_sequence_length=16, lora_rank=0, lora_path=adapter)
    noise = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    sigmas = timestep_schedule(steps, **policy.schedule_arguments(steps))
    pipe = toy.ToyPipeline.from_pretrained(directory)
    if adapter:
        pipe.load_lora_weights(adapter)
        assert pipe.get_active_adapters()
    expected, images = pipe(PROMPTS, *SIZE, guidance_scale=scale, num_inference_steps=steps, latents=noise)
    with torch.no_grad():
        found = rollout(policy.velocity(policy.encode(PROMPTS), scale), noise, sigmas, 0.0, None).final
    assert (expected - noise).std() > 0.1
    pictures = policy.decode(found).numpy().astype(int)
    return (found - expected).abs().max().item(), np.abs(pictures - np.round(255 * images)).max()


@pytest.mark.parametrize("steps, scale", [(1, 1.0), (4, 3.0), (7, 1.0)])
def test_a_family_of_ones_own_draws_what_its_pipeline_draws(toy, directory, steps, scale):
    latents, pictures = compare(toy, directory, steps, scale)
    assert latents < 1e-5 and pictures <= 1


@pytest.mark.slow
def test_a_family_of_ones_own_trains_on_two_ranks_and_its_pipeline_takes_the_adapter(toy, directory, tmp_path):
    (tmp_path / "train_toy.py").write_text(STARTER)
    settings = {**SMALL, **CHEAP, "model": directory, "output_dir": tmp_path, "run_name": "run", "epochs": 1, "dtype": "float32"}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "assets")))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_toy.py",
                           "toy", *flags(**settings)], cwd=tmp_path, capture_output=True, text=True, timeout=250,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    *_, last = metrics_of(tmp_path / "run")
    assert last["epoch"] == 1 and last["grad_norm"] > 0 and last["ratio_deviation_before"] < 1e-5
    latents, pictures = compare(toy, directory, 4, 3.0, str(tmp_path / "run" / "checkpoints" / "epoch_00001" / "adapter"))
    assert latents < 1e-5 and pictures <= 1
