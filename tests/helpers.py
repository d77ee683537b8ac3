"""What several test files and proofs share: small runs, what they left, and how two of them compare."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from make_tiny_sd3 import make_pipeline
from PIL import Image

import distributed
import harness.run
import train
from config import Config
from policy import Policy

ROOT = Path(train.__file__).parent
TIMES = {"seconds", "images_per_second", "reward_wait"}                # the metrics that are not a function of the seed

# Two groups of four, three of four steps trained, two updates; in float64, so that nothing hides behind rounding.
SMALL = dict(
    resolution=(16, 32), rewards=("jpeg_incompressibility", 1), num_steps=4, window_size=0,
    shared_start_noise=False, groups_per_epoch=2,
    group_size=4, updates_per_epoch=2, epochs=2, lora_rank=4, lora_alpha=8, rollout_batch=8, train_batch=8,
    eval_prompts=7, eval_num_steps=2, eval_images=7, eval_every=100, save_every=1, dtype="float64", beta=0.1,
    guidance_scale=2, learning_rate_half_life=0)

# One group, one update, no guidance, for what does not depend on them.
CHEAP = dict(groups_per_epoch=1, updates_per_epoch=1, num_steps=3, guidance_scale=1, eval_prompts=2, eval_images=2)

GUARD = dict(guard=True, clip_range=1e-4, beta=0, advantage_std="group")
SHARED = dict(shared_start_noise=True, window_size=1, window_range=(0, 4), groups_per_epoch=3)


# ---- random inputs ---------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))


def fuzz(few: int, **strategies):
    """As many examples as FUZZ_EXAMPLES says, other ones every time; else a few, always the same."""
    settings = hypothesis.settings(max_examples=EXAMPLES or few, derandomize=not EXAMPLES, deadline=None, database=None,
                                   suppress_health_check=list(hypothesis.HealthCheck))
    return lambda test: settings(hypothesis.given(**strategies)(test))


# ---- processes ---------------------------------------------------------------------------------------------

def wait_until(condition: Callable[[], bool], seconds: float) -> None:
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


def launch_ranks(script: Path, folder: Path, ranks: int) -> subprocess.Popen:
    """Start `script folder` on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script,
               folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


# ---- models ------------------------------------------------------------------------------------------------

def save_small_sd3(directory: Path) -> None:
    """In the hub's format: a small StableDiffusion3Pipeline, all nine parts, with random weights."""
    torch.manual_seed(0)
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "embedder" in name and parameter.ndim == 2:      # so that prompt and time matter as in a trained model
                parameter *= 3
    pipe.save_pretrained(directory)


def policy_of(model: str, config: Config) -> Policy:
    return Policy(
        model, torch.device("cpu"), config.dtype, resolution=config.resolution,
        max_sequence_length=config.max_sequence_length, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha,
        lora_targets=config.lora_targets)


def replace_call(owner, name: str, around: Callable) -> None:
    """Replace `owner.name` of this one object: `around(original, *arguments, **options)` is called in its place."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: around(original, *arguments, **options))


# ---- runs --------------------------------------------------------------------------------------------------

def flags(**settings) -> list[str]:
    words = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [
            f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


class Stopped(Exception):
    """In place of the end of the process: its exit code, and in words the error that it ended with."""

    def __init__(self, code: int, error: BaseException | None):
        super().__init__(str(error))
        self.code = code


def run_here(arguments: list[str], before: Callable | None = None) -> None:
    """Start a run in this process, as one rank, and raise Stopped where it would end the process.

    before: called with the `Run` before it trains. What it holds can be replaced there.
    """
    def training(run: harness.run.Run) -> None:
        if before:
            before(run)
        train.train(run)

    def leave(code: int) -> None:
        raise Stopped(code, sys.exception())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.run, "leave", leave)
        try:
            harness.run.launch(arguments, training, train.evaluate)
        except BaseException as error:
            while error:                     # the lock, which the end of the process releases, but this one goes on
                traceback.clear_frames(error.__traceback__)
                error = error.__context__
            raise
        finally:
            if torch.distributed.is_initialized():
                distributed.shutdown()


def completed(result: tuple[int, str, str, Path]) -> Path:
    """The directory of a command that ended well."""
    code, _, err, directory = result
    assert code == 0, err[-3000:]
    return directory


def errors_in(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]


# ---- what a run leaves -------------------------------------------------------------------------------------

def metrics_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics: list[dict]) -> list[dict]:
    return [{name: value for name, value in m.items() if name not in TIMES} for m in metrics]


def weights_of(directory: Path, epoch: int) -> torch.Tensor:
    """All trained weights, flat."""
    state = torch.load(directory / "checkpoints" / f"epoch_{epoch:05d}" / "state.pt", weights_only=True)
    assert state["epoch"] == epoch
    return torch.cat([p.flatten() for p in state["trained"]])


def images_of(directory: Path, epoch: int) -> np.ndarray:
    files = sorted((directory / "images" / f"epoch_{epoch:05d}").glob("*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files])


def kept_with_images(directory: Path, epoch: int) -> dict:
    """Their prompts, and the scores of each."""
    return json.loads((directory / "images" / f"epoch_{epoch:05d}" / "images.json").read_text())


def equal(a, b) -> bool:
    """Whether two states are the same bits: tensors in nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(one: Path, other: Path, epochs: int = 2, before: int = 1) -> None:
    """Rewards of each epoch and trained weights to 1e-8 relative; and they did move."""
    for a, b in zip(metrics_of(one)[:epochs + 1], metrics_of(other)[:epochs + 1], strict=True):
        for name in ("reward/total", "reward_std", "eval/total", "kl", "grad_norm", "zero_variance_groups"):
            if name in a and name in b:                                       # a KL of 0 is rounding
                assert abs(a[name] - b[name]) <= 1e-8 * abs(a[name]) + 1e-25, (a["epoch"], name)
    a, b, before = weights_of(one, epochs), weights_of(other, epochs), weights_of(one, before)
    assert (a - b).norm() <= 1e-8 * a.norm()
    assert (a - b).norm() <= 1e-6 * (a - before).norm() and (a - before).norm() > 1e-3 * a.norm()
