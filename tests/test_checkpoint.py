"""What is on the disk: whole, checked, as many as asked for, and without harm when the disk is full."""

import errno
import json
import math
import os
import pickle
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from config import Config, parse_config
from harness.checkpoint import (
    Record, checkpoints, cut_metrics, defect, load_state, newest_whole, open_run, prune_checkpoints, read_metrics,
    save_checkpoint, try_write, write_metrics, write_settings)


def save(directory: Path, epoch: int, newest: int = 2, best: int | None = None, numbers: int = 100) -> None:
    def weights(partial: Path) -> None:
        for part in ("adapter", "transformer"):
            (partial / part).mkdir()
            save_file({"weight": torch.full((numbers,), float(epoch))}, partial / part / "model.safetensors")

    save_checkpoint(directory, epoch, weights, {"epoch": epoch, "trained": [torch.full((numbers,), float(epoch))]})
    prune_checkpoints(directory, newest, best)


def epochs(paths) -> list[int]:
    return [int(path.name.removeprefix("epoch_")) for path in paths]


# ---------------------------------------------------------------------------------------------------------- which are kept

def test_the_newest_and_the_best_keep_all_and_the_others_their_adapter_with_checksums_that_sha256sum_confirms(tmp_path):
    for epoch, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6), (7, 6), (8, 6)):
        save(tmp_path, epoch, newest=2, best=best)
    assert epochs(checkpoints(tmp_path)) == [6, 7, 8]
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert epochs(folders) == list(range(1, 9))
    for folder in folders:
        assert (folder / "adapter").exists() and (folder / "transformer").exists() == (folder in checkpoints(tmp_path))
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


# ------------------------------------------------------------------------------------------------------------- corruption

def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm, name", [
    (flip, "state.pt"), (flip, "adapter/model.safetensors"), (Path.unlink, "adapter/model.safetensors"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "state.pt"),
    (Path.unlink, "SHA256SUMS"), (lambda path: path.write_text(""), "SHA256SUMS")])
def test_a_corrupt_newest_checkpoint_is_named_and_set_aside_and_the_one_before_is_used(tmp_path, capsys, harm, name):
    for epoch in (1, 2):
        save(tmp_path, epoch)
    assert epochs([newest_whole(tmp_path, set_aside=True)]) == [2] and not capsys.readouterr().err
    harm(tmp_path / "checkpoints" / "epoch_00002" / name)
    assert epochs([newest_whole(tmp_path, set_aside=False)]) == [1]
    assert epochs(checkpoints(tmp_path)) == [1, 2]                                             # a look changes nothing
    capsys.readouterr()
    found = newest_whole(tmp_path, set_aside=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert epochs([found]) == [1] and load_state(found)["epoch"] == 1
    assert "epoch_00002 is corrupt" in line and (name in line or "state.pt" in line)
    assert epochs(checkpoints(tmp_path)) == [1] and (tmp_path / "checkpoints" / "epoch_00002.corrupt").exists()
    save(tmp_path, 2)                                                                          # the run has come there again
    assert epochs([newest_whole(tmp_path, set_aside=True)]) == [2]


def test_where_no_checkpoint_is_whole_it_is_an_error_and_all_stays_as_it_is(tmp_path):
    assert newest_whole(tmp_path, set_aside=True) is None                                      # a run that has none begins
    for epoch in (1, 2):
        save(tmp_path, epoch)
        flip(tmp_path / "checkpoints" / f"epoch_{epoch:05d}" / "state.pt")
    with pytest.raises(ValueError, match="no checkpoint .* is whole .*epoch_00002: state.pt is not what was written.*--run-name"):
        newest_whole(tmp_path, set_aside=True)
    assert epochs(checkpoints(tmp_path)) == [1, 2]


def test_checkpoints_without_a_state_are_an_error_and_nothing_is_begun_anew(tmp_path):
    """As a copy has them that left out the large files."""
    for epoch in (1, 2):
        save(tmp_path, epoch)
        (tmp_path / "checkpoints" / f"epoch_{epoch:05d}" / "state.pt").unlink()
    with pytest.raises(ValueError, match="no checkpoint in .*checkpoints has its state.pt: .*--run-name"):
        newest_whole(tmp_path, set_aside=True)
    assert epochs(sorted((tmp_path / "checkpoints").iterdir())) == [1, 2]


def test_the_newest_checkpoint_is_that_of_the_highest_epoch_however_long_its_name(tmp_path):
    for epoch in (99_999, 100_000):
        save(tmp_path, epoch, newest=1)
        (tmp_path / "checkpoints" / "epoch_00001_copy2").mkdir(exist_ok=True)      # a user's, which is left alone
    assert epochs(checkpoints(tmp_path)) == [100_000] and newest_whole(tmp_path, set_aside=True).name == "epoch_100000"


def test_settings_that_are_kept_hold_no_password_of_a_reward_server(tmp_path):
    urls = (("geneval", "http://user:secret@host:1"), ("geneval", "https://other:2"))
    write_settings(tmp_path, Config(rewards=(("geneval", 1.0),), reward_urls=urls), "tiny_ocr")
    text = (tmp_path / "config.json").read_text()
    assert "secret" not in text
    assert json.loads(text)["reward_urls"] == [["geneval", "http://host:1"], ["geneval", "https://other:2"]]


def test_batches_that_an_evaluation_chose_are_not_those_of_training(tmp_path):
    config = Config(output_dir=str(tmp_path), run_name="run", rollout_batch=0, train_batch=0)
    for eval_only, expected in ((True, (0, 0)), (False, (9, 5))):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)
        write_settings(tmp_path / "run", replace(config, rollout_batch=9, train_batch=5, eval_only=eval_only), "tiny_ocr")
        (tmp_path / "run" / "metrics.jsonl").touch()
        _, lock, continued = open_run(config)
        lock.close()
        assert (continued.rollout_batch, continued.train_batch) == expected


def test_a_run_that_an_evaluation_began_trains_with_other_evaluations(tmp_path):
    looked_at = Config(output_dir=str(tmp_path), run_name="run", eval_only=True, eval_prompts=500)
    (tmp_path / "run").mkdir()
    write_settings(tmp_path / "run", looked_at, "tiny_ocr")
    (tmp_path / "run" / "metrics.jsonl").touch()
    _, lock, config = open_run(replace(looked_at, eval_only=False, eval_prompts=128))
    lock.close()
    assert config.eval_prompts == 128


def test_a_state_that_would_run_code_is_refused_before_it_does(tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it ran",))

    torch.save({"epoch": 1, "trained": Code()}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_state(tmp_path)
    assert not (tmp_path / "it ran").exists()


# -------------------------------------------------------------------------------------------------------------- full disk

@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"it takes the right to mount a file system: {mount.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("numbers, who", [(90_000, "the library that saves the state"), (140_000, "the one that saves weights")])
def test_a_disk_that_fills_up_during_a_checkpoint_is_a_warning_and_the_old_one_stays(small_disk, capsys, numbers, who):
    save(small_disk, 1)
    assert not try_write("the checkpoint", save, small_disk, 2, 2, None, numbers)              # 360 or 560 kB, three times
    (line,) = capsys.readouterr().err.splitlines()
    assert "the checkpoint could not be written" in line and "No space left" in line
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["epoch_00001"]          # what filled the disk is gone
    assert not defect(small_disk / "checkpoints" / "epoch_00001")
    assert try_write("the checkpoint", save, small_disk, 2) and epochs(checkpoints(small_disk)) == [1, 2]


def test_a_line_of_metrics_is_written_whole_or_not_at_all_when_the_disk_is_full(small_disk):
    write_metrics(small_disk, {"epoch": 0})
    (small_disk / "filler").write_bytes(bytes((1 << 20) - 2 * 4096))                   # a page is left besides the line's
    with pytest.raises(OSError, match="No space left"):
        write_metrics(small_disk, {"epoch": 1, "long": "x" * 20_000})                          # of which a part still fits
    assert (small_disk / "metrics.jsonl").read_text() == '{"epoch": 0}\n'
    (small_disk / "filler").unlink()
    write_metrics(small_disk, {"epoch": 1})
    assert [json.loads(line)["epoch"] for line in (small_disk / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_only_the_disk_is_forgiven():
    with pytest.raises(ZeroDivisionError):
        try_write("a checkpoint", lambda: 1 / 0)


# ---------------------------------------------------------------------------------------------------------------- metrics

@pytest.mark.parametrize("tail, warns", [(b'{"epoch": 4, "rew', False), (b"", False), (b"\0\0\0\n", True), (b"\xff\xfe\n", True),
                                         (b"5\n", True), (b"{}\n", True)])
def test_what_a_crash_left_and_epochs_that_will_be_done_again_are_dropped_from_the_metrics(tmp_path, capsys, tail, warns):
    for epoch in range(4):
        write_metrics(tmp_path, {"epoch": epoch})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert cut_metrics(tmp_path, 2) == [{"epoch": 0}, {"epoch": 1}, {"epoch": 2}]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == cut_metrics(tmp_path, 3)
    assert ("line 5" in capsys.readouterr().err) == warns


def test_lines_that_found_no_room_are_written_in_their_order_before_the_next_checkpoint_and_the_best_is_kept(tmp_path, monkeypatch):
    record, room = Record(tmp_path, 0, [], 1), [True]

    def write(directory: Path, metrics: dict) -> None:
        if not room[0]:
            raise OSError(28, "No space left on device")
        write_metrics(directory, metrics)

    def add_and_save(epoch: int, score: float) -> list[int]:
        """The epochs whose lines are there."""
        record.add({"epoch": epoch, "eval/total": score})
        record.save(epoch, lambda partial: (partial / "adapter").mkdir(), {"epoch": epoch})
        return [m["epoch"] for m in read_metrics(tmp_path / "metrics.jsonl")]

    monkeypatch.setattr("harness.checkpoint.write_metrics", write)
    record.add({"epoch": 0, "eval/total": 1.0})                              # never a checkpoint, hence never the best one
    assert add_and_save(1, 0.9) == [0, 1] and record.saved == record.best() == 1
    room[0] = False
    assert add_and_save(2, 0.95) == [0, 1] and record.saved == 1 and epochs(checkpoints(tmp_path)) == [1]
    room[0] = True
    assert add_and_save(3, 0.6) == [0, 1, 2, 3] and record.saved == 3 and epochs(checkpoints(tmp_path)) == [1, 3]
    assert add_and_save(4, 0.7) == [0, 1, 2, 3, 4] and epochs(checkpoints(tmp_path)) == [1, 4]        # the best, and the newest


def test_what_was_killed_while_pruning_is_pruned_at_the_next_start_and_its_sums_are_true(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, **_: exit() if path.name == "transformer" else None)
        with pytest.raises(SystemExit):
            save(tmp_path, 3)
    Record(tmp_path, 3, [], 2).reduce_older()
    older = tmp_path / "checkpoints" / "epoch_00001"
    assert sorted(path.name for path in older.iterdir()) == ["SHA256SUMS", "adapter"]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=older, check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------------------- the run's directory

def started(place: Path, *words: str, begun: bool = True) -> Config:
    """As a run's start does, by its command line: the config with which it goes on."""
    preset, config = parse_config(["--run-name", "run", "--output-dir", str(place / "runs"), *words])
    directory, lock, config = open_run(config)
    write_settings(directory, config, preset)
    if begun:
        write_metrics(directory, {"epoch": 0})
    lock.close()
    return config


def test_a_path_that_is_written_otherwise_is_the_same_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "elsewhere").mkdir()
    started(tmp_path, "--model", "model")
    for path in ("model/", "./model", str(tmp_path / "model"), "~/model", "link"):
        started(tmp_path, "--model", path)
    monkeypatch.chdir("elsewhere")
    started(tmp_path, "--model", "../model")
    with pytest.raises(ValueError, match="--model is 'model', but"):
        started(tmp_path, "--model", "model")


def test_a_prompt_file_that_was_edited_is_refused_by_name_and_is_taken_again_when_it_is_put_back(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f'the word "{split}"\n')
    started(tmp_path, "--prompts", str(tmp_path))
    for split in ("train", "test"):
        before = (tmp_path / f"{split}.txt").read_text()
        (tmp_path / f"{split}.txt").write_text('the word "other"\n')
        with pytest.raises(ValueError, match=rf"{split}.txt in --prompts .* has changed since run 'run'.*--run-name"):
            started(tmp_path, "--prompts", str(tmp_path))
        (tmp_path / f"{split}.txt").write_text(before)
    started(tmp_path, "--prompts", f"{tmp_path}/")


def test_home_is_expanded_and_what_comes_with_the_project_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    _, config = parse_config(["--output-dir=~/runs"])
    assert config.output_dir == f"{tmp_path}/runs" and (Path(config.model) / "model_index.json").exists()
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert parse_config([])[1].model == "assets/tiny-sd3"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_and_without_directory_sync_allows_a_run_with_a_warning(
        tmp_path, monkeypatch, capsys, number):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", unsupported)
    monkeypatch.setattr("os.fsync", unsupported)
    started(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "has no locks" in line and "start only one" in line
    save(tmp_path, 1)
    assert epochs([newest_whole(tmp_path, set_aside=True)]) == [1]


def test_a_disk_that_fails_is_no_file_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        started(tmp_path)


def test_a_metric_that_is_not_finite_is_null_and_keeps_nothing_from_being_written(tmp_path):
    write_metrics(tmp_path, {"epoch": 1, "ratio": math.inf, "reward/total": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"epoch": 1, "ratio": None, "reward/total": 0.5}]
