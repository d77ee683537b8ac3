"""How much one call takes: what is chosen, and what is said where it was too much."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import distributed
from config import Config
from harness import batches
from harness.batches import available_memory, choose_batches, fastest, largest_that_fits
from harness.faults import DoesNotFit, within_memory
from harness.run import prepare
from families import Family
from pipelines import check_memory, check_model
from prompts import Prompt
from rewards import RewardError


def trial(size: int) -> float:
    """Seconds of an image, on a device that holds twelve."""
    if size > 12:
        raise torch.OutOfMemoryError("out of memory")
    return {1: 9.0, 2: 5.0, 4: 3.0, 8: 4.0, 12: 4.5}[size]


def test_the_largest_batch_that_fits_is_chosen_and_one_image_must():
    assert largest_that_fits([1, 2, 4, 8, 12, 16, 32], trial) == 12
    assert largest_that_fits([1, 2], trial) == 2
    with pytest.raises(torch.OutOfMemoryError):
        largest_that_fits([16, 32], trial)


def test_the_fastest_batch_is_chosen_and_none_beyond_the_most():
    assert fastest([1, 2, 4, 8, 12], trial) == 4
    assert fastest([1, 2, 4, 8, 12, 16], trial, most=12) == 4
    assert fastest([8, 12], trial, most=4) == 8


@pytest.mark.parametrize("dtype, chosen", [("float32", (48, 72)), ("bfloat16", (24, 24))])
def test_batches_hold_as_much_as_a_rank_has_for_one_call_and_leave_two_rollouts(monkeypatch, dtype, chosen):
    """96 images on each of two ranks, four updates, three trained steps."""
    monkeypatch.setattr(batches, "fastest", lambda sizes, trial: sizes[-1])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, value])
    config = dataclasses.replace(Config(), rollout_batch=0, train_batch=0, dtype=dtype)
    found = choose_batches(SimpleNamespace(parameters=[], device=torch.device("cpu")), [], config)
    assert (found.rollout_batch, found.train_batch) == chosen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_tries_no_training_batch(monkeypatch, dtype):
    def try_batch(policy, texts, guidance_scale, training, memory):
        assert not training
        return 1.0

    monkeypatch.setattr(batches, "try_batch", try_batch)
    monkeypatch.setattr(distributed, "gather_vectors", lambda vector: vector[None])
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value])
    config = dataclasses.replace(Config(), rollout_batch=0, train_batch=0, dtype=dtype, eval_only=True)
    policy = SimpleNamespace(parameters=[], device=torch.device("cpu"))
    found = choose_batches(policy, [Prompt("a", {})], config)
    assert found.rollout_batch > 0 and found.train_batch == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"),
                                   MemoryError("bad_alloc"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_says_where_and_what_to_lower(error):
    with pytest.raises(DoesNotFit, match="rank 0 .*; lower --train-batch; the plan was: 3 batches"), within_memory(
            "lower --train-batch", "3 batches"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), RewardError("the server says: CUDA out of memory"),
                                   ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, within_memory("lower --train-batch", "3 batches"):
        raise error
    assert caught.value is error


# ---- a GPU's memory ----------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.fixture
def shared_gpu(monkeypatch):
    """A GPU of 24 bytes, of which others hold 13. This process has reserved 1 and used `used` at the most."""
    def pretend(used: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 24))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: used)
    return pretend


def test_what_others_hold_on_a_gpu_is_not_available(shared_gpu):
    shared_gpu(used=0)
    assert available_memory(SimpleNamespace(device=GPU, parameters=[])) == pytest.approx(0.8 * (10 + 1))
    trained = torch.zeros(1, dtype=torch.float16)
    assert available_memory(SimpleNamespace(device=GPU, parameters=[trained])) == pytest.approx(0.8 * (10 + 1) - 4 * 2)


def test_a_single_image_passes_if_it_runs_and_more_only_if_they_leave_a_fifth(shared_gpu):
    """The tensors are on a GPU without values."""
    shared_gpu(used=10)
    policy = SimpleNamespace(device=GPU, parameters=[], compiled=False, latent_shape=(1, 2, 2),
                             compute_dtype=torch.float32, encode=lambda texts: texts,
                             velocity=lambda text, scale: lambda latents, sigma: latents)
    memory = available_memory(policy)
    with FakeTensorMode():
        trial = lambda size: batches.try_batch(policy, ["a"] * size, 1.0, training=False, memory=memory)
        with pytest.raises(torch.OutOfMemoryError, match="2 images leave less than a fifth"):
            trial(2)
        assert largest_that_fits([1, 2], trial) == 1


def test_a_gpu_that_holds_not_one_image_is_told_with_the_plan_and_the_way_out(shared_gpu, monkeypatch):
    def velocity(latents, sigma):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")

    shared_gpu(used=0)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    policy = SimpleNamespace(device=GPU, parameters=[], compiled=False, latent_shape=(1, 2, 2),
                             compute_dtype=torch.float32, encode=lambda texts: texts,
                             velocity=lambda text, scale: velocity)
    config = dataclasses.replace(Config(), rollout_batch=0, train_batch=0)
    with FakeTensorMode(), pytest.raises(DoesNotFit, match="not one image fits: --gradient-checkpointing, "
                                         "--offload-text-encoders, or a lower --resolution; the plan was: epoch"):
        choose_batches(policy, [Prompt("a")], config)


@pytest.mark.parametrize("dtype, gib", [("float16", "4.2 GiB in float16"), ("float32", "8.4 GiB in float32")])
def test_a_transformer_larger_than_the_gpu_is_refused_and_one_just_as_large_is_not(monkeypatch, dtype, gib):
    """Stable Diffusion 3.5 Medium has 2.24 billion weights."""
    dtype, weights = getattr(torch, dtype), 2_243_171_520
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, weights * dtype.itemsize))
    check_memory(check_model("random:sd35m"), "random:sd35m", dtype, GPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, weights * dtype.itemsize - 1))
    with pytest.raises(ValueError, match=f"'random:sd35m' does not fit: .* {gib}, .*: choose a GPU with more"):
        check_memory(check_model("random:sd35m"), "random:sd35m", dtype, GPU)


def test_a_run_on_a_gpu_too_small_for_the_model_ends_before_weights_are_loaded(monkeypatch, model, tmp_path):
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(distributed, "own_device", lambda: GPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 100_000))
    with pytest.raises(ValueError, match="does not fit: .* or a smaller model, or --dtype bfloat16") as caught:
        prepare(["--model", str(tmp_path / "model"), "--rewards", "jpeg_compressibility", "1"])
    assert "\n" not in str(caught.value)


def test_a_family_of_ones_own_that_names_no_transformer_is_taken_on_a_gpu():
    check_memory(type("Own", (Family,), {}), "no/such/model", torch.float32, GPU)
