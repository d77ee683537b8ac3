"""The model card of a checkpoint: the hub's library reads it, it tells what the run had, and its lines load the weights."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import CHEAP, metrics_of
from huggingface_hub import ModelCard
from test_adapters import of_pipeline
from test_families import load_pipeline, start_noise, untrained_policy

import adapters
from config import Config
from families import FAMILIES, Family
from harness.card import find_license, write_card

HISTORY = [{"epoch": 0, "eval/total": 0.25, "eval/ocr": 0.5, "spread/eval": 70.0}, {"epoch": 1},
           {"epoch": 2, "eval/total": 0.75, "eval/ocr": 1.5, "spread/eval": None}, {"epoch": 4, "eval/total": 9.0}]


def card_of(folder: Path, kind: str = "adapter", history=(), license=None, command="train.py", pipeline="FluxPipeline",
            **settings) -> ModelCard:
    (folder / kind).mkdir(exist_ok=True)
    config = Config(**{"rewards": (("ocr", 0.5),), "model": "someone/model", **settings})
    write_card(folder / kind, Path("/runs/a") / kind, config, pipeline, command=command, license=license or {},
               history=list(history), epoch=3)
    return ModelCard.load(folder / kind / "README.md")


def test_the_front_matter_names_what_the_hub_sorts_by(tmp_path):
    card = card_of(tmp_path, license={"license": "other", "license_name": "own", "license_link": "https://x/y"})
    assert card.data.to_dict() == {
        "base_model": "someone/model", "library_name": "diffusers", "pipeline_tag": "text-to-image", "license": "other",
        "license_name": "own", "license_link": "https://x/y", "tags": ["lora", "flow-grpo", "text-to-image"]}
    assert "To fill in" not in card.text
    assert "lora" not in card_of(tmp_path, "transformer").data.tags


def test_what_is_not_known_is_left_out_with_a_line_to_fill_in(tmp_path):
    card = card_of(tmp_path, model="/models/own")          # the hub refuses a base_model that is no id
    assert card.data.base_model is None and card.data.license is None
    assert "To fill in above before this is published: `base_model` and `license`." in card.text
    assert "published: `license`." in card_of(tmp_path).text


def test_scores_are_those_before_training_and_the_last_up_to_the_checkpoint(tmp_path):
    text = card_of(tmp_path, history=HISTORY, eval_rewards=("ocr", "pickscore")).text
    assert "| prompts of the evaluation | weight | epoch 0 | epoch 2 |" in text and "9.0" not in text
    assert "| ocr | 0.5 | 0.5000 | 1.5000 |" in text and "| total |  | 0.2500 | 0.7500 |" in text
    assert "| pickscore | 0 | - | - |" in text and "| spread of mean colours, of 255 |  | 70.0000 | - |" in text


def test_a_pipeline_of_ones_own_is_imported_from_its_own_module(tmp_path, monkeypatch):
    own = type("OwnPipeline", (), {"__module__": "my_models"})
    monkeypatch.setitem(FAMILIES, "OwnPipeline", type("Own", (Family,), {"pipeline": own}))
    assert "from my_models import OwnPipeline" in card_of(tmp_path, pipeline="OwnPipeline").text
    assert "from diffusers import FluxPipeline" in card_of(tmp_path).text


def test_a_run_without_evaluation_has_no_scores_and_says_so(tmp_path):
    text = card_of(tmp_path, history=[{"epoch": 1, "reward/total": 0.5}]).text
    assert "No scores: this run was not evaluated." in text and "| ocr | 0.5 |" in text and "epoch 0" not in text.lower()


def test_a_password_in_the_command_stays_out_of_the_card(tmp_path):
    text = card_of(tmp_path, command="train.py --reward-urls ocr http://me:secret@host:1/x --run-name a").text
    assert "train.py --reward-urls ocr http://host:1/x --run-name a" in text and "secret" not in text
    text = card_of(tmp_path, command="/home/me/bin/python3 /home/me/bin/torchrun --nproc_per_node=2 train.py --lr 1").text
    assert "\ntorchrun --nproc_per_node=2 train.py --lr 1\n" in text and "/home" not in text


def test_a_command_with_bytes_that_are_no_text_still_gets_a_card(tmp_path):
    assert r"--prompts caf\udce9" in card_of(tmp_path, command="train.py --prompts caf\udce9").text


def test_a_card_that_cannot_be_made_costs_no_checkpoint(model, train_here, monkeypatch, capfd):
    def fail(*_, **__):
        raise KeyError("no such pipeline")

    monkeypatch.setattr("harness.run.write_card", fail)
    run = train_here("no-card", model=model, **CHEAP, epochs=1)
    checkpoint = run / "checkpoints" / "epoch_00001"
    assert (checkpoint / "state.pt").exists() and (checkpoint / "adapter" / adapters.PEFT_FILES[1]).exists()
    assert "warning: epoch 1 is saved without a model card (KeyError" in capfd.readouterr().err


@pytest.mark.parametrize("content, expected", [
    ("---\nlicense: mit\n---\n", {"license": "mit"}),
    ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE.md\n---\n",
     {"license": "other", "license_name": "own", "license_link": "https://huggingface.co/someone/model/blob/main/LICENSE.md"}),
    ("no front matter", {}), ("---\n[\n---\n", {}), ("---\nlicense_link: 5\n---\n", {}), (None, {})])
def test_the_license_is_the_one_that_the_base_models_card_states(tmp_path, monkeypatch, content, expected):
    if content:
        (tmp_path / "README.md").write_text(content)

    def download(repository, name):
        if not content:
            raise OSError("off line")
        return str(tmp_path / name)

    monkeypatch.setattr(adapters, "hf_hub_download", download)
    assert find_license("someone/model") == expected


@pytest.mark.parametrize("full", [False, True])
def test_a_run_leaves_a_card_whose_lines_load_its_weights(model, train_here, tmp_path, full):
    here = tmp_path / "model"
    shutil.copytree(model, here)
    (here / "README.md").write_text("---\nlicense: mit\n---\n")
    run = train_here(f"card{full}", model=str(here), **CHEAP, epochs=1, eval_every=1, full_finetune=full, learning_rate=1e-2,
                     dtype="float32")
    checkpoint, kind = run / "checkpoints" / "epoch_00001", "transformer" if full else "adapter"
    card = ModelCard.load(checkpoint / kind / "README.md")
    assert card.data.license == "mit"
    before, after = metrics_of(run)
    assert f"| total |  | {before['eval/total']:.4f} | {after['eval/total']:.4f} |" in card.text
    assert f"  {kind}/README.md\n" in (checkpoint / "SHA256SUMS").read_text()
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=checkpoint, check=True, capture_output=True)

    (code,) = re.findall(r"```python\n(.+?)```", card.text, re.DOTALL)
    loaded = {}
    exec(code.replace('"cuda"', '"cpu"'), loaded)
    assert loaded["image"].size == (32, 16)
    loaded["pipe"].set_progress_bar_config(disable=True)
    noise = start_noise(untrained_policy(model))
    found, untrained = of_pipeline(loaded["pipe"], noise), of_pipeline(load_pipeline(model), noise)
    assert (found - untrained).abs().max() > 1e-4 and torch.isfinite(found).all()
