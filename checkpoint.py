"""What a run keeps on disk: one writer at a time, its settings, a line of metrics per epoch, and checkpoints.

    runs/<name>/lock, config.json, metrics.jsonl, checkpoints/epoch_00010/{adapter/ or transformer/, state.pt}

Everything is written whole or not at all. All of it is the main rank's, but for `load_state`.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

from config import PRESETS, Config, changed_fields, to_dict


def open_run(config: Config, preset: str) -> tuple[Path, IO]:
    """Make or continue the run's directory, as its one writer: the directory, and its lock, held while that file is open.

    Raises ValueError where another process writes it, or where it was started with settings that this run may not change.
    """
    name = config.run_name or f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = Path(config.output_dir) / name
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / "lock", "a+")
    for attempt in range(20):                    # a writer that was just killed takes a moment to be gone
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
            raise ValueError(f"--{field.replace('_', '-')} is {to_dict(config)[field]!r}, but run {name!r} was started with "
                             f"{old.get(field)!r}: give that, or choose another --run-name")
        if config.eval_only:                     # looks at a run without changing it
            return directory, lock
    settings, published = to_dict(config), to_dict(PRESETS[preset])
    differs = {name: value for name, value in published.items() if settings[name] != value}       # the preset's own values
    write_whole(saved, json.dumps({**settings, "preset": preset, "differs_from_preset": differs}, indent=1))
    return directory, lock


def write_whole(path: Path, text: str) -> None:
    """The file has its old content or its new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (directory / "checkpoints").glob("epoch_*") if (p / "state.pt").exists())


def save_checkpoint(directory: Path, epoch: int, save_weights: Callable[[Path], None], state: dict) -> None:
    """Weights for use, which `save_weights` writes into a directory, and the state from which training goes on."""
    final = directory / "checkpoints" / f"epoch_{epoch:05d}"
    partial = final.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(partial)
    torch.save(state, partial / "state.pt")
    for path in (p for p in partial.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for older in checkpoints(directory)[:-2]:    # adapters are all kept; states and whole transformers of the newest two
        (older / "state.pt").unlink()
        shutil.rmtree(older / "transformer", ignore_errors=True)


def load_state(path: Path) -> dict:
    """The training state of a checkpoint, on the CPU; tensors and plain data only."""
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def write_metrics(directory: Path, metrics: dict) -> None:
    """Append an epoch's line."""
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics, allow_nan=False) + "\n")


def read_metrics(directory: Path, epochs: int) -> list[dict]:
    """The lines of the first `epochs` epochs; those of epochs that a resumed run does again are dropped from the file."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]                   # a killed writer may leave half a line
    metrics = [m for m in map(json.loads, whole) if m["epoch"] <= epochs]
    write_whole(path, "".join(json.dumps(m) + "\n" for m in metrics))
    return metrics
