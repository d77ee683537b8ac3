"""Claims about tools/gpu.py that need no GPU. `python -m tools.gpu --smoke` runs the rest on a CPU, in minutes."""

import json
import sys

import pytest
import torch

import distributed
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
    (tmp_path / "runs").mkdir()
    for _ in range(2):
        check = Check(torch.device("cpu"), tmp_path, limit=60, smoke=True)
        assert not list(check.runs.iterdir()) and (tmp_path / "runs").exists()
        (check.runs / "of an earlier run").write_text("")
    check.results.unlink()
    with pytest.raises(ValueError, match="trainers is not from an earlier run.*: give another --out$"):
        Check(torch.device("cpu"), tmp_path, limit=60, smoke=True)
    assert list(check.runs.iterdir())


def test_a_section_that_fails_leaves_no_attention_of_cudnn_on(tmp_path):
    def fails(*_):
        torch.backends.cuda.enable_cudnn_sdp(True)
        raise RuntimeError("out of memory")

    check = Check(torch.device("cpu"), tmp_path, limit=60, smoke=True)
    check.run("levers", 1, fails)
    check.run("next", 1, lambda check, name: check.note(name, on=torch.backends.cuda.cudnn_sdp_enabled()))
    assert check.notes["next"]["on"] is False


def test_what_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys):
    def refusal() -> str:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match="2"):
            gpu.main()
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "gpu.json").write_text('{"machine": {')
    assert f"error: {tmp_path}/gpu.json is not whole (Expecting" in refusal()

    def refused():
        raise ValueError("2 processes but 1 GPUs here")

    monkeypatch.setattr(distributed, "own_device", refused)
    assert refusal().endswith("error: 2 processes but 1 GPUs here")
