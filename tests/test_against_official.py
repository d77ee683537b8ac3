"""The comparison with the authors' code, on made-up checkouts: theirs is not part of this project."""

import sys
from pathlib import Path

import pytest

from proofs import against_official
from proofs.authors_code import levenshtein, open_checkout
from proofs.comparison import Line
from proofs.official_training import advantages

TRACKER = """
import numpy as np

class PerPromptStatTracker:
    def __init__(self, global_std):
        self.global_std = global_std

    def update(self, prompts, rewards):
        prompts, rewards = np.array(prompts), np.array(rewards, np.float64)
        found = np.zeros_like(rewards)
        for prompt in set(prompts.tolist()):
            mine = rewards[prompts == prompt]
            std = (rewards if self.global_std else mine).std() + {eps}
            found[prompts == prompt] = (mine - mine.mean()) / std
        return found
"""
MAIN = """
def main():
    target_modules = ["attn.to_q", name]
    for epoch in range(3):
        total_batch_size, num_timesteps = shape
        for inner_epoch in range(2):
            seen.append((epoch, inner_epoch, num_timesteps))
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A function that writes a checkout with the given tracker's eps, and opens it."""
    for name in ("path", "meta_path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))

    def make(eps: str = "1e-4"):
        for path, text in {"flow_grpo/diffusers_patch/sd3_sde_with_logprob.py": "",
                           "flow_grpo/stat_tracking.py": TRACKER.replace("{eps}", eps),
                           "scripts/train.py": MAIN}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return open_checkout(str(tmp_path), None)

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "flow_grpo"]:
        del sys.modules[name]


@pytest.mark.parametrize("eps, holds", [("1e-4", True), ("1e-3", False)])
def test_a_comparison_holds_only_if_the_authors_compute_the_same(checkout, eps, holds):
    lines = advantages(checkout(eps), trials=20)
    assert len(lines) == 4 and all(line.holds == holds for line in lines)


def test_code_inside_main_runs_as_it_stands(checkout):
    names = dict(shape=(4, 9), seen=[], epoch=7)
    exec(checkout().update_phase("scripts/train.py"), names)
    assert names["seen"] == [(7, 0, 9), (7, 1, 9)]
    assert checkout().call_in_main("scripts/train.py", "target_modules", {"name": "x"}) == ["attn.to_q", "x"]


@pytest.mark.parametrize("option", ["--flow-grpo", "--reward-server"])
def test_a_directory_that_is_no_checkout_is_refused_in_one_line(checkout, monkeypatch, capsys, option):
    arguments = {"--flow-grpo": str(checkout().root), option: str(Path(__file__).parent)}
    words = [word for pair in arguments.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["against_official", *words])
    assert against_official.main() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and option in said and "git clone https://github.com/yifan123/" in said


def test_a_comparison_that_does_not_run_is_out_of_tolerance(checkout):
    def broken(checkout, trials):
        raise ImportError("cannot import name 'x'\nfrom 'y'")

    line, = against_official.run("Topic", broken, checkout(), 1)
    assert not line.holds and line.note == "ImportError: cannot import name 'x' from 'y'"


@pytest.mark.parametrize("difference, holds", [(1.0, True), (1.1, False), (float("nan"), False)])
def test_a_line_holds_up_to_its_tolerance(difference, holds):
    assert Line("", "", 1, difference, 1.0).holds == holds


@pytest.mark.parametrize("a, b, distance", [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3),
                                            ("ab", "ba", 2)])
def test_the_stand_in_for_levenshtein(a, b, distance):
    assert levenshtein(a, b) == levenshtein(b, a) == distance
