"""Claims about tools/gpu.py that need no GPU. `python -m tools.gpu --smoke` runs the rest on a CPU, in minutes."""

import json
import sys

import pytest
import torch

from tools import gpu
from tools.measure import Check


@pytest.mark.parametrize("words, said", [
    ([], "no GPU here: --smoke runs on a CPU"), (["--only", "machines"], "invalid choice: 'machines'"),
    (["--limit", "long"], "invalid float value: 'long'")])
def test_a_bad_command_line_ends_before_anything_starts(monkeypatch, capsys, tmp_path, words, said):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_section_that_fails_is_noted_and_the_next_one_runs(tmp_path, capsys):
    check = Check(torch.device("cpu"), tmp_path, limit=60, smoke=False)
    check.run("slow", 100, lambda *_: pytest.fail("there is no time for it"))
    assert not check.failed and check.skipped == ["slow"]
    assert "slow is skipped: 60 s are left, 100 needed" in capsys.readouterr().out
    check.run("broken", 1, lambda check, name: 1 / 0)
    check.run("sound", 1, lambda check, name: check.note(name, answer=42))
    check.run("untrue", 1, lambda check, name: check.require(name, "one is two", 1 == 2))
    notes = json.loads((tmp_path / "gpu.json").read_text())
    assert check.failed and "slow" not in notes
    assert "ZeroDivisionError" in notes["broken"]["error"] and notes["sound"]["answer"] == 42
    assert notes["untrue"]["refuted"] == "one is two"


def test_sections_that_run_later_keep_what_others_found(tmp_path):
    first = Check(torch.device("cpu"), tmp_path, limit=60, smoke=False)
    first.run("machine", 1, lambda check, name: check.note(name, seen=1))
    first.run("bench", 1, lambda check, name: 1 / 0)
    first.note("bench, checkpointed", seen=1)
    second = Check(torch.device("cpu"), tmp_path, limit=60, smoke=False)
    second.run("bench", 1, lambda check, name: check.note(name, seen=2))
    notes = json.loads((tmp_path / "gpu.json").read_text())
    assert notes["machine"]["seen"] == 1 and notes["bench"]["seen"] == 2
    assert "error" not in notes["bench"] and "bench, checkpointed" not in notes


def test_the_check_deletes_nothing_but_its_own_trainers(tmp_path):
    for name in ("runs", "trainers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("")
    Check(torch.device("cpu"), tmp_path, limit=60, smoke=True)
    assert (tmp_path / "runs" / "kept").exists() and not (tmp_path / "trainers" / "kept").exists()
