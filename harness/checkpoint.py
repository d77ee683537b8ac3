"""What a run keeps on disk: one writer at a time, its settings, a line of metrics per epoch, and checkpoints.

    runs/<name>/lock, config.json, metrics.jsonl, checkpoints/epoch_00010/{adapter/ or transformer/, state.pt, SHA256SUMS}

Everything is written whole or not at all, and is on the disk before what relies on it. Only the main rank does any of it, except
`load_state`, which every rank calls.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch

from config import PRESETS, Config, changed_fields, to_dict


def open_run(config: Config) -> tuple[Path, IO, Config]:
    """Make or continue the run's directory, as its one writer: directory, lock (held while that file is open), and config.

    Batch sizes that a continued run chose for itself when it began are its choice still: others would be other bits.
    Raises ValueError where another process writes it, or where it was started with settings that this run may not change.
    """
    directory = Path(config.output_dir) / config.run_name
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / "lock", "a+")
    for _ in range(20):                          # a writer that was just killed takes a moment to be gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.1)
    else:
        lock.seek(0)
        raise ValueError(f"{directory} is being written by process {lock.read().strip()}: wait for it, stop it, "
                         "or choose another --run-name")
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()

    saved = directory / "config.json"
    if saved.exists() and (directory / "metrics.jsonl").exists():       # else it failed before it began
        changed = changed_fields(old := json.loads(saved.read_text()), config)
        if changed:
            field = changed[0]
            raise ValueError(f"--{field.replace('_', '-')} is {to_dict(config)[field]!r}, but run {config.run_name!r} was started "
                             f"with {old.get(field)!r}: give that, or choose another --run-name")
        chosen = {name: old[name] for name in ("rollout_batch", "train_batch") if not getattr(config, name) and old.get(name)}
        config = replace(config, **chosen)
    return directory, lock, config


def write_settings(directory: Path, config: Config, preset: str) -> None:
    """What the run does, and in what it differs from its preset; an evaluation of a run that is there leaves them alone."""
    saved = directory / "config.json"
    if config.eval_only and (directory / "metrics.jsonl").exists():
        return
    settings, published = to_dict(config), to_dict(PRESETS[preset])
    differs = {name: value for name, value in published.items() if settings[name] != value}       # the preset's own values
    write_whole(saved, json.dumps({**settings, "preset": preset, "differs_from_preset": differs}, indent=1))


# ----------------------------------------------------------------------------------------------------------- to the disk

def write_whole(path: Path, text: str) -> None:
    """The file has its old content or its new one, never a part, also after a loss of power."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """A file's content, or a directory's names, are on the disk when this returns."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def try_write(what: str, write: Callable, *arguments) -> bool:
    """Whether `write(*arguments)` went through. Where the disk is full or fails, that is a warning: a run does not end by it."""
    try:
        write(*arguments)
        return True
    except Exception as error:
        # Of the libraries that write tensors one replaces the system's error, the other quotes it.
        cause = error
        while not (isinstance(cause, OSError) or "os error" in str(cause)):
            cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
        print(f"warning: {what} could not be written ({cause}); the run goes on", file=sys.stderr, flush=True)
        return False


# ----------------------------------------------------------------------------------------------------------- checkpoints

def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints from which a run can go on, oldest first; whether they are sound, `defect` tells."""
    return sorted(p for p in (directory / "checkpoints").glob("epoch_*[0-9]") if (p / "state.pt").exists())


def checkpoint_path(directory: Path, epoch: int) -> Path:
    return directory / "checkpoints" / f"epoch_{epoch:05d}"


def save_checkpoint(directory: Path, epoch: int, save_weights: Callable[[Path], None], state: dict) -> None:
    """Weights for use, which `save_weights` writes into a directory, the state from which training goes on, and checksums."""
    final = checkpoint_path(directory, epoch)
    partial = final.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_weights(partial)
        with open(partial / "state.pt", "wb") as file:
            torch.save(state, file)
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        sums = "".join(f"{checksum(p)}  {p.relative_to(partial)}\n" for p in files)
        (partial / "SHA256SUMS").write_text(sums)                             # `sha256sum --check` reads it there
        for path in (*partial.rglob("*"), partial):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)                            # it may be what fills the disk
        raise


def prune_checkpoints(directory: Path, newest: int, best: int | None) -> None:
    """Of checkpoints before the `newest` ones, and other than that of epoch `best`, keep the adapter alone."""
    kept = {*checkpoints(directory)[-newest:], checkpoint_path(directory, best or 0)}
    for older in directory.glob("checkpoints/epoch_*[0-9]"):                  # also what a killed run began to prune
        if older not in kept and (older / "SHA256SUMS").exists():
            (older / "state.pt").unlink(missing_ok=True)                      # first: a full disk then has room for the rest
            shutil.rmtree(older / "transformer", ignore_errors=True)
            lines = (older / "SHA256SUMS").read_text().splitlines(keepends=True)
            of_adapter = [line for line in lines if "  adapter/" in line]
            if of_adapter != lines:
                write_whole(older / "SHA256SUMS", "".join(of_adapter))


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def defect(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files; "" where nothing is."""
    try:
        expected = dict(line.split("  ", 1)[::-1] for line in (checkpoint / "SHA256SUMS").read_text().splitlines())
        for name in dict.fromkeys([*expected, "state.pt"]):
            if checksum(checkpoint / name) != expected.get(name):
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def newest_whole(directory: Path, set_aside: bool) -> Path | None:
    """The newest checkpoint without a defect, None for a run that has none yet. `set_aside` renames those with one.

    Raises ValueError where every one has a defect: to begin anew, over what is there, is not for a program to decide.
    """
    found, defects = checkpoints(directory), []
    for checkpoint in reversed(found):
        what = defect(checkpoint)
        if not what:
            break
        defects.append((checkpoint, what))
    else:
        if found:
            raise ValueError(f"no checkpoint in {directory / 'checkpoints'} is whole ({defects[0][0].name}: {defects[0][1]}): "
                             "restore one from a copy, or choose another --run-name to begin anew")
        return None
    for broken, what in defects:
        print(f"warning: {broken} is corrupt ({what}); the one before is used", file=sys.stderr, flush=True)
        if set_aside:
            aside = broken.with_name(broken.name + ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(broken, aside)
    return checkpoint


def load_state(path: Path) -> dict:
    """The training state of a checkpoint, on the CPU; tensors and plain data only: nothing in it can run."""
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


# --------------------------------------------------------------------------------------------------------------- metrics

def write_metrics(directory: Path, metrics: dict) -> None:
    """Append an epoch's line. Where the disk takes only a part of it, none of it stays, and OSError is raised."""
    line = (json.dumps(metrics, allow_nan=False) + "\n").encode()
    with open(directory / "metrics.jsonl", "ab", buffering=0) as file:
        before = file.tell()
        try:
            while line:
                line = line[file.write(line):]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; one that holds no metrics, as a crash may leave it, is left out with a warning."""
    metrics = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []         # the last one may be half written
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if isinstance(values, dict) and "epoch" in values:
            metrics.append(values)
        else:
            print(f"warning: line {number} of {path} holds no metrics: {line[:50]!r}", file=sys.stderr, flush=True)
    return metrics


def cut_metrics(directory: Path, epochs: int) -> list[dict]:
    """The lines of the first `epochs` epochs; all others, which a resumed run writes again, are dropped from the file."""
    metrics = [m for m in read_metrics(directory / "metrics.jsonl") if m["epoch"] <= epochs]
    write_whole(directory / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))
    return metrics


# --------------------------------------------------------------------------------------------------- the record of a run

class Record:
    """A run's metrics and checkpoints as they stand on the disk, and what a full disk has not taken yet."""

    def __init__(self, directory: Path, saved: int, history: list[dict], kept: int):
        """saved: the epoch of the newest checkpoint; history: all lines of metrics; kept: how many checkpoints stay whole."""
        self.directory, self.saved, self.history, self.kept = directory, saved, history, kept
        self._waiting: list[dict] = []

    def add(self, metrics: dict) -> None:
        """An epoch's line, written as soon as there is room for it."""
        self.history.append(metrics)
        self._waiting.append(metrics)
        self._write_lines()

    def _write_lines(self) -> bool:
        while self._waiting and try_write("a line of metrics.jsonl", write_metrics, self.directory, self._waiting[0]):
            self._waiting.pop(0)
        return not self._waiting

    def save(self, epoch: int, save_weights: Callable[[Path], None], state: dict) -> None:
        """A checkpoint, but not before its line of metrics; of older ones, all but the best are reduced."""
        if self._write_lines() and try_write(f"the checkpoint of epoch {epoch}", save_checkpoint, self.directory, epoch,
                                           save_weights, state):
            self.saved = epoch
            self.reduce_older()

    def reduce_older(self) -> None:
        """Also at a run's start, to end what a killed one began."""
        try_write("what old checkpoints are reduced to", prune_checkpoints, self.directory, self.kept, self.best())

    def best(self) -> int | None:
        """The epoch that evaluation liked best, of those with a checkpoint."""
        scores = {m["epoch"]: m["eval/total"] for m in self.history if "eval/total" in m}
        return max((e for e in scores if checkpoint_path(self.directory, e).exists()), key=scores.get, default=None)
