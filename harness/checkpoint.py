"""What a run keeps on disk: one writer at a time, its settings, a line of metrics per epoch, and checkpoints.

    runs/<name>/lock, config.json, metrics.jsonl
    runs/<name>/checkpoints/epoch_00010/{adapter/ or transformer/, state.pt, SHA256SUMS}

Everything is written whole or not at all, and is on the disk before what relies on it is written. Only the
main rank calls these functions, except `load_state`, which every rank calls.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch

from config import PLACES, PRESETS, Config, to_dict
from prompts import BUILT_IN
from rewards import without_user

# What a continued run may change: the machine, its length, what is looked at and what is kept.
MAY_CHANGE = set("""
    epochs rollout_batch train_batch gradient_checkpointing compile offload_text_encoders reward_threads
    reward_batch reward_models reward_urls reward_deadline max_unanswered trust_remote_code
    collective_timeout skip_nonfinite eval_rewards eval_every eval_images eval_only save_every
    keep_checkpoints output_dir wandb run_name""".split())
# What --eval-only may change besides. It changes scores, and those of one run are compared with each other.
EVAL_ONLY_MAY_CHANGE = {"eval_prompts", "eval_num_steps"}
# What a file system says that has no locks, or cannot sync a directory.
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def open_run(config: Config) -> tuple[Path, IO, Config]:
    """Make or continue the run's directory as its one writer. Returns directory, lock (open) and config.

    Raises ValueError if another process writes the run, or as `continued` does.
    """
    directory = Path(config.output_dir) / config.run_name
    directory.mkdir(parents=True, exist_ok=True)
    lock = take_lock(directory)
    try:
        return directory, lock, continued(directory, config)
    except BaseException:
        lock.close()
        raise


def continued(directory: Path, config: Config) -> Config:
    """The config with which a run goes on, if there is one in the directory.

    It keeps the batch sizes that it chose at its first start, because others would round differently.
    Raises ValueError if it was started with settings, or with prompts, that this run may not change.
    """
    saved = directory / "config.json"
    if not (saved.exists() and (directory / "metrics.jsonl").exists()):      # it failed before it began
        return config
    old = json.loads(saved.read_text())
    for name in changed_fields(old, config):
        if old.get("eval_only") and name in EVAL_ONLY_MAY_CHANGE:
            continue                             # the run begins now, and keeps no score of that evaluation
        present, before = to_dict(config)[name], old.get(name)
        if present == before:                    # a path that leads elsewhere from here
            present, before = os.path.realpath(present), old["places"][name]
        raise ValueError(f"--{name.replace('_', '-')} is {present!r}, but {config.run_name!r} was started "
                         f"with {before!r}: give that, or choose another --run-name")
    for name, _ in sorted(old.get("prompt_files", {}).items() - prompt_files(config).items()):
        raise ValueError(f"{name} in --prompts {config.prompts!r} has changed since run {config.run_name!r} "
                         "was started: put the old one back, or choose another --run-name")
    chosen = {} if old.get("eval_only") else old             # an evaluation did not try what training needs
    return replace(config, rollout_batch=config.rollout_batch or chosen.get("rollout_batch", 0),
                   train_batch=config.train_batch or chosen.get("train_batch", 0))


def changed_fields(saved: dict, config: Config) -> list[str]:
    """Fields that differ between saved settings and this config, and that a continued run may not change."""
    present, defaults, places = to_dict(config), to_dict(Config()), saved.get("places", {})

    def same(name: str) -> bool:
        # A run of an older version, which lacks a setting, did what its default says.
        old, new = saved.get(name, defaults[name]), present[name]
        if name in PLACES:
            # However the path is written, it must lead to the same place. Where nothing is left of that, a
            # run was moved together with what it names by a relative path.
            place = places.get(name, os.path.realpath(old or ""))
            moved = old == new and not os.path.isabs(new) and not os.path.exists(place)
            return moved or place == os.path.realpath(new)
        return old == new

    free = MAY_CHANGE | (EVAL_ONLY_MAY_CHANGE if config.eval_only else set())
    return [name for name in present if name not in free and not same(name)]


def take_lock(directory: Path) -> IO:
    """The open, locked file of a run's directory. Raises ValueError if another process has it locked."""
    lock = open(directory / "lock", "a+")
    os.register_at_fork(after_in_child=lock.close)       # a child that lives on would keep the run locked
    for _ in range(20):                          # a writer that was just killed takes a moment to be gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            print(f"warning: the file system of {directory} has no locks ({error}): start only one "
                  "process of this run", file=sys.stderr)
            break
    else:
        lock.seek(0)
        raise ValueError(f"{directory} is being written by process {lock.read().strip()}: wait for it, "
                         "stop it, or choose another --run-name")
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def prompt_files(config: Config) -> dict[str, str]:
    """Name -> checksum of the files that --prompts names, none for a built-in set."""
    if config.prompts in BUILT_IN:               # which wins over a directory of that name
        return {}
    place = Path(config.prompts)
    files = [place] if place.is_file() else [*place.glob("train*"), *place.glob("test*")]
    return {path.name: checksum(path) for path in files if path.is_file()}


def write_settings(directory: Path, config: Config, preset: str) -> None:
    """Keep the settings and what they name on this machine. An evaluation of a begun run changes neither."""
    if config.eval_only and (directory / "metrics.jsonl").exists():
        return
    # Leave out passwords, because the page and other trackers show the settings.
    config = replace(config, reward_urls=tuple((name, without_user(url)) for name, url in config.reward_urls))
    settings, published = to_dict(config), to_dict(PRESETS[preset])
    differs = {name: value for name, value in published.items() if settings[name] != value}
    places = {name: os.path.realpath(settings[name]) for name in PLACES
              if os.path.exists(settings[name]) and settings[name] not in BUILT_IN}
    more = dict(preset=preset, differs_from_preset=differs, places=places, prompt_files=prompt_files(config))
    write_whole(directory / "config.json", json.dumps({**settings, **more}, indent=1))


# ----------------------------------------------------------------------------- to the disk

def write_whole(path: Path, text: str) -> None:
    """Replace a file's content so that it is never found half written, also after a loss of power."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)          # it may be what fills the disk
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk, if its file system can tell."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(file)


def try_write(what: str, write: Callable, *arguments) -> bool:
    """Call `write(*arguments)` and return whether it went through.

    A full or failing disk is a warning, because a run must not end by it. Other errors are raised.
    """
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
        print(f"warning: {what} could not be written ({cause}); the run goes on", file=sys.stderr)
        return False


# ----------------------------------------------------------------------------- checkpoints

def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints from which a run can go on, oldest first. `defect` tells whether one is sound."""
    there = [p for p in of_epochs(directory) if (p / "state.pt").exists()]
    return sorted(there, key=lambda p: int(p.name.removeprefix("epoch_")))


def of_epochs(directory: Path) -> list[Path]:
    """Directories of checkpoints, reduced ones too, and no copies of another name."""
    return [p for p in (directory / "checkpoints").glob("epoch_*") if re.fullmatch(r"epoch_\d+", p.name)]


def checkpoint_path(directory: Path, epoch: int) -> Path:
    return directory / "checkpoints" / f"epoch_{epoch:05d}"


def save_checkpoint(directory: Path, epoch: int, save_weights: Callable[[Path], None], state: dict) -> None:
    """Write what `save_weights` writes into a directory, the training state, and checksums of both."""
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
        (partial / "SHA256SUMS").write_text(sums)        # in the format of `sha256sum --check`
        for path in (*partial.rglob("*"), partial):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)       # it may be what fills the disk


def prune_checkpoints(directory: Path, newest: int, best: int | None) -> None:
    """Keep the `newest` checkpoints and that of epoch `best` whole, and only the adapter of the others."""
    kept = {*checkpoints(directory)[-newest:], checkpoint_path(directory, best or 0)}
    for older in of_epochs(directory):           # also what a killed run began to prune
        if older not in kept and (older / "SHA256SUMS").exists():
            (older / "state.pt").unlink(missing_ok=True)         # first, to make room on a full disk
            shutil.rmtree(older / "transformer", ignore_errors=True)
            lines = (older / "SHA256SUMS").read_text().splitlines(keepends=True)
            of_adapter = [line for line in lines if "  adapter/" in line]
            if of_adapter != lines:
                write_whole(older / "SHA256SUMS", "".join(of_adapter))


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def defect(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, or an empty string."""
    try:
        lines = (checkpoint / "SHA256SUMS").read_text().splitlines()
        expected = dict(line.split("  ", 1)[::-1] for line in lines)
        for name in dict.fromkeys([*expected, "state.pt"]):
            if checksum(checkpoint / name) != expected.get(name):
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def newest_whole(directory: Path, set_aside: bool) -> Path | None:
    """The newest sound checkpoint, or None if a run has none yet. `set_aside` renames defective ones.

    Raises ValueError if all have a defect or no state.pt, because beginning anew over them is not for a
    program to decide.
    """
    defects = {}
    for checkpoint in reversed(checkpoints(directory)):
        if not (what := defect(checkpoint)):
            break
        defects[checkpoint] = what
    else:
        if not defects:
            if of_epochs(directory):
                raise ValueError(f"no checkpoint in {directory / 'checkpoints'} has its state.pt: copy one "
                                 "back, or choose another --run-name to begin anew")
            return None
        newest, what = next(iter(defects.items()))
        raise ValueError(f"no checkpoint in {newest.parent} is whole ({newest.name}: {what}): restore one "
                         "from a copy, or choose another --run-name to begin anew")
    for broken, what in defects.items():
        print(f"warning: {broken} is corrupt ({what}); the one before is used", file=sys.stderr)
        if set_aside:
            aside = broken.with_name(broken.name + ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(broken, aside)
    return checkpoint


def load_state(path: Path) -> dict:
    """The training state of a checkpoint, on the CPU: tensors and plain data, so nothing in it can run."""
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


# ----------------------------------------------------------------------------- metrics

def write_metrics(directory: Path, metrics: dict) -> None:
    """Append an epoch's line. If the disk takes only a part of it, remove that part and raise OSError."""
    # JSON knows no infinity, and a number that is not finite must not keep a run from being saved.
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
              for name, value in metrics.items()}
    line = (json.dumps(finite, allow_nan=False) + "\n").encode()
    with open(directory / "metrics.jsonl", "ab", buffering=0) as file:
        before = file.tell()
        try:
            while line:
                line = line[file.write(line):]
            sync(directory / "metrics.jsonl")
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl. Leaves out, with a warning, a line that a crash has spoilt."""
    metrics = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []     # the last may be half written
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if isinstance(values, dict) and "epoch" in values:
            metrics.append(values)
        else:
            print(f"warning: line {number} of {path} holds no metrics: {line[:50]!r}", file=sys.stderr)
    return metrics


def cut_metrics(directory: Path, epochs: int) -> list[dict]:
    """Drop the lines after `epochs` epochs, which a resumed run writes again. Returns the others."""
    metrics = [m for m in read_metrics(directory / "metrics.jsonl") if m["epoch"] <= epochs]
    write_whole(directory / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))
    return metrics


# ----------------------------------------------------------------------------- the record of a run

class Record:
    """A run's metrics and checkpoints on the disk, and what a full disk has not taken yet."""

    def __init__(self, directory: Path, saved: int, history: list[dict], kept: int):
        """saved: epoch of the newest checkpoint; history: all metrics; kept: how many stay whole."""
        self.directory, self.saved, self.history, self.kept = directory, saved, history, kept
        self._waiting: list[dict] = []

    def add(self, metrics: dict) -> None:
        """Write an epoch's line as soon as there is room for it."""
        self.history.append(metrics)
        self._waiting.append(metrics)
        self._write_lines()

    def _write_lines(self) -> bool:
        what = "a line of metrics.jsonl"
        while self._waiting and try_write(what, write_metrics, self.directory, self._waiting[0]):
            self._waiting.pop(0)
        return not self._waiting

    def save(self, epoch: int, save_weights: Callable[[Path], None], state: dict) -> None:
        """Write a checkpoint, but not before its line of metrics, and reduce older ones."""
        if self._write_lines() and try_write(f"the checkpoint of epoch {epoch}", save_checkpoint,
                                             self.directory, epoch, save_weights, state):
            self.saved = epoch
            self.reduce_older()

    def reduce_older(self) -> None:
        """Reduce older checkpoints. A run's start calls it too, to end what a killed run began."""
        try_write("the rest of old checkpoints", prune_checkpoints, self.directory, self.kept, self.best())

    def best(self) -> int | None:
        """The epoch with the best evaluation, of those with a checkpoint."""
        scores = {m["epoch"]: m["eval/total"] for m in self.history if "eval/total" in m}
        kept = [epoch for epoch in scores if checkpoint_path(self.directory, epoch).exists()]
        return max(kept, key=scores.get, default=None)
