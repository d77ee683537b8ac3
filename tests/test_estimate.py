"""What a recipe is said to cost agrees with what was measured, on a CPU here and on an H200 before."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from diffusers import SD3Transformer2DModel
from helpers import ROOT
from make_tiny_sd3 import make_pipeline

import distributed
from config import PRESETS, Config
from families import FAMILIES
from harness.run import make_policy, make_rewards
from harness.scoring import Scorer
from learner import Learner
from prompts import load_prompts
from tools import counts, estimate
from tools.estimate import GIB, Estimate
from train import evaluate_slice

SD35M = PRESETS["sd35m_ocr"]
# One epoch of 8 images in one batch, as it was measured.
MEASURED = dataclasses.replace(SD35M, groups_per_epoch=1, group_size=8, train_batch=8)
TRAIN = """
import gc, json, pathlib, sys, torch
from policy import Policy
words = json.loads(sys.argv[1])
images = words.pop("images")
policy = Policy(device=torch.device("cpu"), **words)
def step(images):
    v = policy.velocity(policy.encode(["a"] * images))
    latents = torch.zeros(images, *policy.latent_shape)
    v(latents, latents.new_full((images,), 0.5)).sum().backward()
    for p in policy.parameters:
        p.grad = None
    gc.collect()
def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
step(1)
before = status("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")        # the peak begins anew
step(images)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def middle_model(tmp_path_factory) -> str:
    """A random Stable Diffusion 3 of 27 M weights in its transformer."""
    pipe = make_pipeline()
    pipe.transformer = SD3Transformer2DModel(**{**pipe.transformer.config, "num_layers": 6, "num_attention_heads": 8,
                                                "attention_head_dim": 48, "caption_projection_dim": 384})
    directory = tmp_path_factory.mktemp("middle")
    pipe.save_pretrained(directory)
    return str(directory)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize("name, checkpointing, images", [
    ("tiny", False, 256), ("tiny", True, 512), ("middle", False, 64), ("middle", True, 192)])
def test_the_memory_of_a_training_batch_is_the_processs_within_15_percent(middle_model, name, checkpointing, images):
    words = dict(model=middle_model if name == "middle" else "assets/tiny-sd3", resolution=(64, 64), max_sequence_length=12,
                 gradient_checkpointing=checkpointing, lora_rank=8)
    counted = counts.count(Config(**words))
    words |= dict(lora_targets=Config.lora_targets, images=images)
    # Have every large block returned to the system when it is freed.
    done = subprocess.run([sys.executable, "-c", TRAIN, json.dumps(words)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}, timeout=300)
    measured = int(done.stdout)
    predicted = counted.call("training").on(words["images"])[3] - counted.network - counted.autoencoder
    assert measured > 0.25 * GIB and predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_a_row_of_sd35m_takes_the_flops_that_were_counted_on_a_gpu():
    call = counts.count(SD35M).call("rollout")
    assert call.on(1)[0] / 2 == pytest.approx(2.23e12, rel=0.02)        # two rows, because of guidance
    assert call.on(2)[0] == pytest.approx(2 * call.on(1)[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("phase", ["rollout", "training", "reference", "decode"])
def test_many_images_take_what_a_few_foretell(guidance_scale, phase):
    """Without guidance, one image is one row, which takes fewer kernels than several rows do."""
    counted = counts.count(dataclasses.replace(PRESETS["tiny_ocr"], guidance_scale=guidance_scale))
    flops, moved, kernels, peak = counted.tally(phase, 48)
    assert list(counted.call(phase).on(48)) == [flops, pytest.approx(moved, rel=1e-3), kernels, pytest.approx(peak, rel=1e-3)]


@pytest.mark.slow
@pytest.mark.parametrize("config, gib_an_image, gib, images", [
    (SD35M, 4.5, 41.7, 8), (dataclasses.replace(SD35M, gradient_checkpointing=True), 0.4, 18.0, 32),
    (PRESETS["flux_pickscore"], 0.57, 32.3, 16)])
def test_memory_is_what_an_h200_took(config, gib_an_image, gib, images):
    call = counts.count(config).call("training")
    assert call.more[3] / GIB == pytest.approx(gib_an_image, rel=0.1)
    assert call.on(images)[3] / GIB == pytest.approx(gib, rel=0.04)


@pytest.mark.slow
def test_times_are_what_an_h200_took():
    e = Estimate(MEASURED, "H200")
    assert e.counts.call("training").on(1)[2] == pytest.approx(9454, rel=0.02)                # kernels
    assert e.plan.samples / e.epoch == pytest.approx(1.08, rel=0.03)                        # images a second
    assert e.plan.samples * e.image_flops / e.epoch / 665e12 == pytest.approx(0.289, rel=0.03)
    for phase, seconds in {"rollout": 0.181, "training": 0.434, "reference": 0.171}.items():
        assert 8 * e.seconds(phase) == pytest.approx(seconds, rel=0.06)
    one = Estimate(dataclasses.replace(MEASURED, train_batch=1, rollout_batch=1), "H200")
    assert one.seconds("rollout") == pytest.approx(0.073, rel=0.15)
    # The same rule says too much of FLUX, and its time still lies in the range.
    flux = Estimate(dataclasses.replace(PRESETS["flux_pickscore"], train_batch=16), "H200").seconds("training")
    slow, fast = estimate.RANGE
    assert flux / fast < 0.155 < flux / slow


@pytest.mark.slow
def test_every_preset_has_a_row_and_every_random_model_its_counts():
    rows = estimate.table("H200", 8).splitlines()[2:]
    assert len(rows) == len(PRESETS) and not any(row.endswith("| | | | | |") for row in rows)
    for family in FAMILIES.values():
        for name in family.published:
            config = dataclasses.replace(SD35M, model=f"random:{name}", lora_targets="all-linear")
            assert counts.count(config).call("rollout").on(1)[0] > 1e12


@pytest.mark.slow
def test_text_encoders_that_visit_the_card_have_to_fit_beside_the_network():
    with pytest.raises(ValueError, match=r"--card H100 has 79.1 GiB, and \S+FLUX.2-dev with its text encoders needs 109.6"):
        Estimate(PRESETS["flux2_dev_pickscore"], "H100")


@pytest.mark.parametrize("settings", [{}, {"full_finetune": True, "beta": 0.1}, {"full_finetune": True}])
def test_an_evaluation_is_estimated_by_the_calls_that_the_trainer_makes(settings):
    """Drift takes a call of the policy and one of the reference, which full fine-tuning without a KL lacks."""
    config = dataclasses.replace(PRESETS["tiny_ocr"], eval_num_steps=3, rewards=(("jpeg_compressibility", 1.0),), **settings)
    prompts, calls = load_prompts(config.prompts, "test")[:2], []
    device = distributed.setup()
    try:
        policy = make_policy(config, device)
        policy.cache_text([prompt.text for prompt in prompts], config.guidance_scale)
        policy.before_call = lambda: calls.append(1)
        scorer = Scorer(make_rewards(config, device), policy, config)
        evaluate_slice(Learner(policy, config), scorer, prompts, [0, 1], config)
        scorer.thread.shutdown()
    finally:
        distributed.shutdown()
    estimated = Estimate(config).eval_times
    assert len(calls) == estimated["rollout"] + estimated["reference"]


def test_a_reference_that_full_finetuning_keeps_takes_memory():
    without, kept = (counts.count(Config(full_finetune=True, beta=beta)) for beta in (0.0, 0.1))
    assert kept.network == 2 * without.network


def test_gpus_share_the_work_and_its_trajectories():
    one, four = (Estimate(PRESETS["tiny_ocr"], "A100", gpus) for gpus in (1, 4))
    assert one.epoch == pytest.approx(4 * four.epoch) and one.trajectories == 4 * four.trajectories


def test_a_card_too_small_for_one_image_names_its_memory_and_the_way_out(monkeypatch):
    monkeypatch.setitem(estimate.CARDS, "small", dataclasses.replace(estimate.CARDS["A100"], memory=0.51))
    config = dataclasses.replace(PRESETS["tiny_ocr"], train_batch=0, rollout_batch=0, resolution=(64, 64))
    with pytest.raises(ValueError, match=r"--card small has 0.51 GiB, and one image of assets/tiny-sd3 at \(64, 64\) needs "
                                         r"0.\d GiB: --gradient-checkpointing, --offload-text-encoders, a lower"):
        Estimate(config, "small")
