"""plain.py computes what train.py computes, and runs as a copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

import plain
from config import parse_config
from draws import GROUP_NOISE, TRAIN_NOISE, draw_noise, draw_first_steps, epoch_prompt_indices
from prompts import load_prompts, words
from rewards import build_rewards

ROOT = Path(plain.__file__).parent
SEED, GROUPS, K, UPDATES = 1, 3, 4, 2

# What the trainer is told to do as plain.py does. Its preset has the same adapter.
FLAGS = dict(
    seed=SEED, dtype="float64", guidance_scale=1, shared_start_noise=True, num_steps=plain.T, noise_level=plain.NOISE_LEVEL,
    groups_per_epoch=GROUPS, group_size=K, updates_per_epoch=UPDATES, clip_range=plain.CLIP_RANGE,
    learning_rate=plain.LEARNING_RATE, learning_rate_half_life=0, weight_decay=plain.WEIGHT_DECAY,
    max_grad_norm=plain.MAX_GRAD_NORM, ema_decay=0, eval_prompts=1, eval_images=1, eval_num_steps=1)

# Name -> what the trainer is told besides, and what plain.py is told.
SETTINGS = {
    "window": (dict(window_size=3, window_range="2 7", beta=0), dict(WINDOW=3, BETA=0.0)),
    "all steps but the last with KL": (dict(window_size=7, window_range="0 7", beta=4.0, kl="exact"),
                                 dict(WINDOW=7, BETA=4.0)),
}


def words_of(flags: dict) -> list[str]:
    words = []
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else str(value).split())]
    return words


def train_with_command(arguments: list[str], epochs: int, output_dir: Path) -> dict[str, torch.Tensor]:
    """The adapter that the trainer's command saves; without an average, it is the weights."""
    command = [sys.executable, ROOT / "train.py", *arguments, "--epochs", str(epochs), "--run-name", "run"]
    done = subprocess.run([*command, "--output-dir", output_dir], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return load_file(output_dir / f"run/checkpoints/epoch_{epochs:05d}/adapter/adapter_model.safetensors")


def train_plainly(arguments: list[str], epochs: int) -> tuple[dict, dict]:
    """The adapter before and after epochs of plain.py, on the trainer's prompts, noise and windows."""
    _, config = parse_config(arguments)
    pipe, optimizer = plain.load(torch.float64)
    reward, known = build_rewards({"rapidocr_line": 1.0}), load_prompts("words", "train")
    groups, samples, shape = list(range(GROUPS)), list(range(GROUPS * K)), plain.LATENT[1:]
    before = {name: value.clone() for name, value in get_peft_model_state_dict(pipe.transformer).items()}
    for epoch in range(1, epochs + 1):
        prompts = [known[i].text for i in epoch_prompt_indices(len(known), GROUPS, SEED, epoch - 1)]
        first_steps = draw_first_steps(config, epoch).tolist()
        starts = draw_noise(SEED, GROUP_NOISE, epoch, groups, 1, shape)[0]                  # (G, C, H, W)
        # The trainer draws a start for each sample, which its group's replaces, and a noise for each step.
        drawn = draw_noise(SEED, TRAIN_NOISE, epoch, samples, 1 + plain.T, shape)[1:]      # (T, G K, C, H, W)
        noise = torch.stack([drawn[first_steps[g]:first_steps[g] + plain.WINDOW, g * K:(g + 1) * K] for g in groups])
        noise = noise.transpose(1, 2).unsqueeze(3)                              # (G, K, WINDOW, 1, C, H, W)
        plain.epoch(pipe, optimizer, reward, prompts, first_steps, starts[:, None].double(), noise.double())
    return before, get_peft_model_state_dict(pipe.transformer)


def flat(adapter: dict) -> torch.Tensor:
    return torch.cat([adapter[name].flatten() for name in sorted(adapter)])


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_plain_and_trainer_train_the_same_weights(setting, tmp_path, monkeypatch):
    """In float64, after two updates, the largest difference is below 1e-8 of the largest change."""
    told_trainer, told_plain = SETTINGS[setting]
    for name, value in dict(SEED=SEED, K=K, UPDATES=UPDATES, **told_plain).items():
        monkeypatch.setattr(plain, name, value)
    arguments = words_of(FLAGS | told_trainer)
    trained = train_with_command(arguments, 1, tmp_path)
    before, after = train_plainly(arguments, 1)
    assert trained.keys() == after.keys()
    changed = (flat(after) - flat(before)).abs().max()
    assert changed > plain.LEARNING_RATE                          # AdamW steps by about as much, twice
    difference = ((flat(after) - flat(trained)).abs().max() / changed).item()
    print(f"{setting}: {difference:.1e}")
    assert difference < 1e-8


def test_words_are_held_out_as_the_trainer_holds_them_out():
    assert set(plain.WORDS[:-32]) <= set(words("train")) and set(plain.WORDS[-32:]) <= set(words("test"))


# The smallest run of everything, in a process of its own.
SHORT = """
import plain
plain.EPOCHS = plain.GROUPS = plain.UPDATES = plain.WINDOW = 1
plain.K = 2
plain.main()
"""


@pytest.mark.slow
def test_a_copy_of_plain_rewards_and_model_runs_alone(tmp_path):
    for name in ("plain.py", "rewards.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("engines", "assets/tiny-sd3"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, tmp_path / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", SHORT], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert "reward" in done.stdout and "held-out score" in done.stdout
    assert (tmp_path / "plain.png").exists()
