"""The leaderboard gives every algorithm the same network rows, and picks and shows what its runs say."""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from helpers import SMALL, flags

from config import parse_config
from proofs import experiments, leaderboard
from proofs.leaderboard import ALGORITHMS, BUDGET, Setting, mean_and_range, rows_of_epoch, table_row, tuned

LATE = "shared start, late window"


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_rows_of_an_algorithm_are_those_that_its_epoch_computes(train_here, monkeypatch, algorithm):
    """On few and small images, and with one place for a window, because the plan is an average over places."""
    rows, forward = [0], SD3Transformer2DModel.forward

    def counted_forward(self, hidden_states, *args, **kwargs):
        rows[0] += (3 if torch.is_grad_enabled() else 1) * len(hidden_states)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counted_forward)
    _, config = parse_config(Setting(algorithm, 6e-4, ALGORITHMS[algorithm][1][-1]).command.split())
    names = ("num_steps", "guidance_scale", "window_size", "shared_start_noise", "guard", "rule", "noise_level",
             "updates_per_epoch", "timestep_fraction", "beta", "objective")
    changes = {name: getattr(config, name) for name in names}
    changes |= dict(epochs=1, window_range=(3, 3 + config.window_size))
    train_here(f"rows-{algorithm}", **changes)
    evaluation = 7 * (SMALL["eval_num_steps"] + 2) * (1 if config.guidance_scale == 1 else 2)           # 2 calls for drift
    assert rows[0] - 2 * evaluation == rows_of_epoch(parse_config(flags(**{**SMALL, **changes}))[1])


def test_the_budget_is_that_of_the_shared_start_with_a_late_window():
    """24 groups of 8, with guidance: steps before a window once for each group, and 2 steps trained."""
    before_window = (3 + 4) / 2
    assert BUDGET == 30 * 2 * (24 * before_window + 192 * (8 - before_window) + 3 * 192 * 2)
    assert Setting(LATE, 6e-4, 0).epochs == 30


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_run_costs_more_than_the_budget_or_an_epoch_less(algorithm):
    for beta in ALGORITHMS[algorithm][1]:
        setting = Setting(algorithm, 6e-4, beta)
        assert BUDGET - setting.rows < setting.epochs * setting.rows <= BUDGET and 2 <= setting.tenth < setting.epochs / 4


# ---- what runs say -------------------------------------------------------------------------------------------

def write_run(setting: Setting, place: Path, seed: int, evaluations: list[tuple[int, float, float]]) -> None:
    """Metrics of a run that took 10 seconds an epoch. evaluations: (epoch, score, share)."""
    known = {epoch: {"eval/total": score, "spread/eval_share": share} for epoch, score, share in evaluations}
    lines = [{"epoch": n, **({"seconds": 10.0} if n else {}), **known.get(n, {})} for n in range(max(known) + 1)]
    directory = setting.directory(place, seed)
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_setting_that_loses_the_spread_is_not_the_best(tmp_path):
    for rate, score, share in ((3e-4, 0.70, 1.0), (6e-4, 0.75, 0.9), (1.2e-3, 0.85, 0.6)):
        write_run(Setting(LATE, rate, 0), tmp_path, 1, [(0, 0.66, 1.0), (3, score, share)])
    assert tuned(LATE, tmp_path) == Setting(LATE, 6e-4, 0)


def test_a_line_of_the_table_is_of_the_runs_that_came_to_their_end(tmp_path):
    setting = Setting(LATE, 6e-4, 0)
    write_run(setting, tmp_path, 1, [(0, 0.66, 1.0), (3, 0.7, 0.99), (15, 0.91, 0.9), (30, 0.95, 0.8)])
    write_run(setting, tmp_path, 2, [(0, 0.66, 1.0), (15, 0.89, 0.4)])
    assert table_row(LATE, tmp_path).split(" | ")[1:] == [
        "0.0006, 0", "30", "1", "0.950", "0.80", "63", "150", "0.910", "0.950 |"]
    assert table_row("early window", tmp_path) is None


def test_a_seed_that_does_not_get_there_is_said():
    assert mean_and_range([1.0, 3.0], 1) == "2.0 (1.0 to 3.0)"
    assert mean_and_range([1.0, None], 1) == "1.0, 1 of 2 seeds" and mean_and_range([None], 1) == "-"


def test_the_picture_has_a_line_of_each_run(tmp_path):
    setting = Setting(LATE, 6e-4, 0)
    write_run(setting, tmp_path, 1, [(0, 0.66, 1.0), (3, 0.7, 0.99), (30, 0.95, 0.8)])
    leaderboard.show(tmp_path)
    drawn, empty = (leaderboard.picture(place) for place in (tmp_path, tmp_path / "nothing"))
    assert drawn.size == empty.size and drawn.tobytes() != empty.tobytes() and (tmp_path / "picture.png").exists()


@pytest.fixture
def begun(monkeypatch):
    """The directories of runs in the order in which they begin. Each takes an hour, and is evaluated every epoch."""
    begun, running, hours = [], set(), [0]

    def train(directory: Path, command: str) -> bool:
        assert directory not in running
        begun.append(directory.name)
        running.add(directory)
        time.sleep(0.05)
        words, evaluation = command.split(), {"eval/total": 0.8, "spread/eval_share": 0.9}
        epochs = int(words[words.index("--epochs") + 1])
        directory.mkdir(exist_ok=True)
        (directory / "new").write_text("".join(json.dumps({"epoch": n, **evaluation}) + "\n" for n in range(epochs + 1)))
        os.replace(directory / "new", directory / "metrics.jsonl")
        running.remove(directory)
        hours[0] += 1
        return True

    monkeypatch.setattr(leaderboard, "train", train)
    monkeypatch.setattr(leaderboard, "time", SimpleNamespace(monotonic=lambda: 3600 * hours[0], perf_counter=lambda: 0))
    return begun


def test_seeds_of_one_algorithm_side_by_side_tune_it_once(tmp_path, monkeypatch, begun):
    monkeypatch.setattr(sys, "argv", ["leaderboard", "--only", "default", "--at-once", "3", "--directory", str(tmp_path)])
    assert leaderboard.main() == 0
    assert len(begun) == 3 + 3 and begun[:3] == [f"default-{rate:g}-0-1" for rate in leaderboard.LEARNING_RATES]


def test_no_run_begins_after_the_last_hour(tmp_path, monkeypatch, begun):
    monkeypatch.setattr(sys, "argv", ["leaderboard", "--only", "default", "--hours", "2", "--directory", str(tmp_path)])
    assert leaderboard.main() == 0 and len(begun) == 2


# ---- proofs.experiments --------------------------------------------------------------------------------------

def test_a_table_whose_runs_are_whole_is_printed_and_not_run_again(tmp_path, monkeypatch, capsys):
    """Also by several threads, whose parsing of command lines would take stdout from each other."""
    monkeypatch.setattr(sys, "argv", ["experiments", "windows", "--at-once", "8", "--directory", str(tmp_path)])
    monkeypatch.setattr(experiments, "train", lambda *cell: pytest.fail("it trains"))
    lines = [{"epoch": 0, "eval/total": 0.66, "spread/eval_share": 1.0}, {"epoch": 10, "eval/total": 0.8, "spread/eval_share": 0.9}]
    for row, seed in itertools.product(experiments.TABLES["windows"], (1, 2, 3)):
        directory = tmp_path / "windows" / f"{row.replace(' ', '_')}-{seed}"
        directory.mkdir(parents=True)
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert experiments.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("| 10, 10, 10 | 0.800, 0.800, 0.800 | 0.90, 0.90, 0.90 |") == len(experiments.TABLES["windows"])


def test_a_run_that_fails_is_named_with_its_log_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiments", "kl", "--seeds", "1", "--directory", str(tmp_path)])
    assert experiments.main() == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert len(said) == len(experiments.TABLES["kl"])
    assert said[0] == f"beta_0-1 failed with exit code 3: see {tmp_path}/kl/beta_0-1.log"


@pytest.mark.parametrize("program, words", [(leaderboard, []), (experiments, ["kl"])])
def test_no_run_at_once_is_refused_in_one_line(monkeypatch, capsys, program, words):
    monkeypatch.setattr(sys, "argv", ["program", *words, "--at-once", "0"])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert "error: --at-once is 0: it must be at least 1\n" in capsys.readouterr().err
