"""What people look at: the page of a run, its pictures as they evolve, and its curves.

    python -m harness.gallery runs/<name> [more runs ...] [--output FILE]

writes the page of a run, or one page that compares several. A run keeps, beside `config.json` and
`metrics.jsonl`, which this file does not write:

    runs/<name>/images/epoch_00010/000.png ...   the evaluation's prompts, always with the same noise
    runs/<name>/images/epoch_00010/000.webp      a smaller copy of a picture larger than a thumbnail
    runs/<name>/images/epoch_00010/images.json   {"size": [w, h], "prompts": [...], "scores": {name: [...]}}
    runs/<name>/index.html                       all of it on one page, which opens offline, from the disk
    runs/<name>/tensorboard/                     the numbers of metrics.jsonl, under the same names

Page and pictures are written whole or not at all.
"""

import argparse
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape
from PIL import Image, ImageOps

from config import refuse_repeated
from harness.checkpoint import read_metrics, write_whole
from rewards import without_user

# Pages and cards are assets/*.html, *.md and *.css, filled in by jinja2.
ASSETS = Path(__file__).resolve().parent.parent / "assets"
TEMPLATES = Environment(loader=FileSystemLoader(ASSETS), autoescape=select_autoescape(), trim_blocks=True)
UPLOT = ASSETS / "vendor" / "uplot-1.6.32"
THUMBNAIL = 256          # pixels of the longer side


class Display:
    """What a run shows while it trains: pictures, page, TensorBoard's curves and W&B's.

    Only the main rank makes one. Nothing here stops a run. What fails, for a full disk or a missing package,
    is said once, in one line, and left out.
    first_epoch: the first epoch whose metrics this process will bring, or None for a process that only looks.
    Later pictures and curves, left by a process that was stopped after its last checkpoint, are dropped.
    """

    def __init__(self, directory: Path, first_epoch: int | None, wandb: bool = False):
        self.directory, self.failed, self.events, self.wandb_run = directory, set(), None, None
        if first_epoch is not None:
            self.attempt("removing old pictures", self._drop_pictures, first_epoch)
            self.events = self.attempt("TensorBoard", EventFile, directory / "tensorboard", first_epoch)
            self.wandb_run = self.attempt("W&B", self._start_wandb) if wandb else None

    def attempt(self, what: str, task: Callable, *arguments):
        """Return what `task` returns, or None if it fails, with a warning the first time."""
        try:
            return task(*arguments)
        except Exception as error:
            if what not in self.failed:
                self.failed.add(what)
                message = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"warning: {what}: {message}; training goes on without", file=sys.stderr)

    def pictures(self, epoch: int, images: np.ndarray, prompts: list[str],
                 scores: dict[str, list[float]]) -> None:
        """Keep an evaluation's pictures, as `save_images` does."""
        self.attempt("keeping pictures", save_images, self.directory, epoch, images, prompts, scores)

    def page(self) -> None:
        self.attempt("writing the page", write_page, [self.directory], self.directory / "index.html")

    def curves(self, metrics: dict[str, float]) -> None:
        """Add an epoch's numbers, under the names of metrics.jsonl."""
        if self.events:
            self.attempt("TensorBoard", self.events.add, metrics)
        if self.wandb_run:
            self.attempt("W&B", self.wandb_run.log, metrics, metrics["epoch"])

    def comparison(self, before: int, after: int) -> Path | None:
        return self.attempt("drawing before above after", save_comparison, self.directory, before, after)

    def close(self) -> None:
        if self.events:
            self.attempt("TensorBoard", self.events.file.close)
        if self.wandb_run:
            self.attempt("W&B", self.wandb_run.finish)

    def _drop_pictures(self, first_epoch: int) -> None:
        for epoch, folder in evaluation_folders(self.directory).items():
            if epoch >= first_epoch:
                shutil.rmtree(folder)

    def _start_wandb(self):
        """Start W&B under an id that the run keeps, so that W&B drops what a continued run brings again."""
        import wandb
        identity = self.directory / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(8))
        return wandb.init(
            project="nano-flow-grpo", name=self.directory.name, id=identity.read_text(), resume="allow",
            dir=str(self.directory), config=json.loads((self.directory / "config.json").read_text()))


class EventFile:
    """TensorBoard's scalars of a run.

    It writes at once, without torch's SummaryWriter, because the thread of that ends on a full disk and loses
    what it holds. Here a write fails where it is made, and the next one brings the lost bytes too.
    Earlier points from `first_epoch` on no longer count. Raises ImportError, OSError.
    """

    def __init__(self, directory: Path, first_epoch: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
        self.Event, self.Summary = Event, Summary
        directory.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        self.file = open(directory / f"events.out.tfevents.{time.time_ns()}", "wb")
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        self._write(step=first_epoch, session_log=SessionLog(status=SessionLog.START))

    def add(self, metrics: dict[str, float]) -> None:
        values = [self.Summary.Value(tag=name, simple_value=value)
                  for name, value in metrics.items() if name != "epoch"]
        self._write(step=metrics["epoch"], summary=self.Summary(value=values))

    def _write(self, **event) -> None:
        self.records.write(self.Event(wall_time=time.time(), **event).SerializeToString())
        self.file.flush()                        # a killed process has written what is in metrics.jsonl


# ----------------------------------------------------------------------------- pictures

def save_images(directory: Path, epoch: int, images: np.ndarray, prompts: Sequence[str],
                scores: dict[str, list[float]]) -> None:
    """Keep an evaluation's pictures in place of the epoch's earlier ones, whole or not at all.

    images: uint8 (B, H, W, 3); prompts: B; scores: reward or metric -> B numbers, NaN if it says nothing.
    Raises ValueError if these do not agree in number, OSError.
    """
    if counts := {len(values) for values in (prompts, *scores.values())} - {len(images)}:
        raise ValueError(f"{len(images)} images, but prompts or scores of {counts}")
    final = directory / "images" / f"epoch_{epoch:05d}"
    partial = final.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for i, image in enumerate(map(Image.fromarray, images)):
        image.save(partial / f"{i:03d}.png")
        if max(image.size) > THUMBNAIL:
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            image.save(partial / f"{i:03d}.webp", quality=80)
    kept = {"size": list(images.shape[2:0:-1]), "prompts": list(prompts),
            "scores": {name: [plain(value) for value in values] for name, values in scores.items()}}
    (partial / "images.json").write_text(json.dumps(kept, allow_nan=False))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)


def save_comparison(directory: Path, before: int, after: int, columns: int = 8) -> Path | None:
    """Draw images of two epochs, the earlier above the later. None if an epoch kept no images."""
    folders = [directory / "images" / f"epoch_{epoch:05d}" for epoch in (before, after)]
    pairs = [[np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))] for folder in folders]
    if not all(pairs):
        return None
    scale, rim = max(1, 64 // len(pairs[0][0])), ((0, 4), (0, 4), (0, 0))
    tiles = [np.pad(np.concatenate(pair), rim, constant_values=255) for pair in zip(*pairs)]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)        # (2H + 4, W + 4, 3) each
    rows = [np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)]
    path = directory / "before_after.png"
    ImageOps.scale(Image.fromarray(np.concatenate(rows)), scale, Image.Resampling.NEAREST).save(path)
    return path


# ----------------------------------------------------------------------------- page

def write_page(runs: list[Path], output: Path) -> None:
    """Write one page of one or several runs. Raises ValueError if a directory holds no run, OSError."""
    names = [run.absolute().name for run in runs]
    names = [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names)]
    data = {"runs": [read_run(run, name, output.absolute().parent) for run, name in zip(runs, names)]}
    write_whole(output, TEMPLATES.get_template("gallery.html").render(
        title=" and ".join(names),
        chart_style=(UPLOT / "uPlot.min.css").read_text(encoding="utf-8"),
        chart_script=(UPLOT / "uPlot.iife.min.js").read_text(encoding="utf-8"),
        # No prompt may end the script.
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")))


def read_run(directory: Path, name: str, page_folder: Path) -> dict:
    """What the page shows of a run, by columns. Paths are relative to the page's folder."""
    metrics = read_metrics(directory / "metrics.jsonl")
    evaluations = [{"epoch": epoch, "folder": quote(os.path.relpath(folder.absolute(), page_folder)),
                    "thumbnails": (folder / "000.webp").exists(),
                    **json.loads((folder / "images.json").read_text())}
                   for epoch, folder in evaluation_folders(directory).items()]
    if not metrics and not evaluations:
        raise ValueError(f"{directory} holds no run: neither metrics.jsonl nor images/epoch_*/")
    names = dict.fromkeys(key for m in metrics for key, value in m.items()
                          if key != "epoch" and isinstance(value, (int, float)))
    config = json.loads((directory / "config.json").read_text())
    for pair in config.get("reward_urls", []):               # older runs kept passwords
        pair[1] = without_user(pair[1])
    return {"name": name, "epochs": [m["epoch"] for m in metrics],
            "metrics": {key: [plain(m.get(key)) for m in metrics] for key in names},
            "evaluations": evaluations, "config": config}


def evaluation_folders(directory: Path) -> dict[int, Path]:
    """Epoch -> folder of each evaluation that kept pictures, oldest first."""
    folders = [picture.parent for picture in directory.glob("images/epoch_*[0-9]/000.png")]
    return dict(sorted((int(folder.name.removeprefix("epoch_")), folder) for folder in folders))


def plain(value: float | None) -> float | None:
    """A number of eight digits, as json has it. None if it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.8g}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the page of a run, or one that compares several.")
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs: runs/<name> ...")
    parser.add_argument("--output", type=Path, help="file of the page; index.html in the run's directory, or "
                                                    "compare.html beside the first of several")
    arguments = parser.parse_args()
    first, *others = [run.absolute() for run in arguments.runs]
    output = arguments.output or (first.parent / "compare.html" if others else first / "index.html")
    try:
        refuse_repeated(sys.argv[1:], ["output"])
        write_page(arguments.runs, output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(output)


if __name__ == "__main__":
    main()
