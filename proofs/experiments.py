"""The tables of docs/experiments.md: train what is missing, and print what is there.

    python -m proofs.experiments TABLE [--seeds 1 2 3] [--at-once 2] [--directory runs/experiments]

    half_precision    a late window in float32, bfloat16 and float16
    windows           place of the window x shared start or not x noise level
    kl                the early window, with more and more KL to the reference
    steps             denoising steps in training, evaluated at the same 16 steps

A cell is a run of train.py in a process of its own with one thread. It goes on where it was stopped, so this
program may be killed and started again. The table is printed anew whenever a run ends. TABLE.png gets the first
held-out images of each row's first seed.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from config import parse_config

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"0-1": "0 2", "2-3": "2 4", "4-5": "4 6", "6-7": "6 8"}      # trained steps -> --window-range
TABLES = {                                                             # table -> row -> command line of train.py
    "half_precision": {dtype: f"tiny_ocr --window-range 3 6 --noise-level 0.9 --epochs 30 --dtype {dtype}"
                       for dtype in ("float32", "bfloat16", "float16")},
    "windows": {
        f"steps {place}, {'shared' if shared else 'own'} start, noise {noise}":
            f"tiny_ocr --epochs 10 --window-range {PLACES[place]} --noise-level {noise}"
            f" --{'' if shared else 'no-'}shared-start-noise"
        for place, shared, noise in itertools.product(PLACES, (True, False), (0.9, 1.2))},
    "kl": {f"beta {beta}": f"tiny_ocr_collapse --epochs 30 --beta {beta}" for beta in (0, 0.1, 0.3, 1)},
    "steps": {f"{steps} steps": f"tiny_ocr_collapse --epochs 30 --window-size 0 --timestep-fraction 1 "
                                f"--num-steps {steps} --eval-num-steps 16" for steps in (4, 8, 16)},
}


def read_run(directory: Path) -> list[dict]:
    """The lines of a run's metrics; none if it has not begun."""
    file = directory / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def is_whole(directory: Path, epochs: int) -> bool:
    lines = read_run(directory)
    return bool(lines) and lines[-1]["epoch"] >= epochs


def train(directory: Path, command: str) -> bool:
    """Run train.py until its last epoch. Returns whether that went well; if not, the run's log says why."""
    directory.mkdir(parents=True, exist_ok=True)
    arguments = [*command.split(), "--output-dir", str(directory.parent), "--run-name", directory.name]
    cores = ["-m", "proofs.tensor_cores"] if "float16" in arguments else []
    with open(f"{directory}.log", "a") as log:
        code = subprocess.run([sys.executable, *cores, ROOT / "train.py", *arguments], stdout=log, stderr=log,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code:
        print(f"{directory.name} failed with exit code {code}: see {directory}.log", flush=True)
    return not code


def summary(directories: list[Path]) -> str:
    """A row's cells: for each seed score and share, then what half precision left out, and time."""
    runs = [lines for d in directories if len(lines := read_run(d)) > 1]
    evaluated = [[line for line in lines if "eval/total" in line][-1] for lines in runs]
    count = lambda name: sum(int(line.get(name, 0)) for lines in runs for line in lines)
    scores = ", ".join(f"{line['eval/total']:.3f}" for line in evaluated)
    shares = ", ".join(f"{line['spread/eval_share']:.2f}" for line in evaluated)
    groups = ", ".join(f"{lines[-1].get('spread/group_share', np.nan):.2f}" for lines in runs)
    epochs = ", ".join(str(line["epoch"]) for line in evaluated)
    return " | ".join([epochs, scores, shares, groups, str(count("overflows")), str(count("skipped_updates"))])


def table(name: str, rows: dict[str, list[Path]]) -> str:
    heads = ("", "epochs", "score", "share, held out", "share, in groups", "overflows", "skipped")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join(lines + [f"| {row} | {summary(directories)} |" for row, directories in rows.items()])


def sheet(rows: dict[str, list[Path]], columns: int = 8) -> Image.Image | None:
    """The last images of each row's first seed, one row of `columns` each; above them the untrained model's."""
    strips = []
    for directory in (directories[0] for directories in rows.values()):
        epochs = sorted((directory / "images").glob("epoch_*"))
        for epoch in epochs[:0 if strips else 1] + epochs[-1:]:
            images = [np.array(Image.open(file).convert("RGB")) for file in sorted(epoch.glob("*.png"))[:columns]]
            padded = [np.pad(image, ((0, 3), (0, 3), (0, 0)), constant_values=255) for image in images]
            strips.append(np.concatenate(padded, 1))
    return Image.fromarray(np.concatenate(strips)) if strips else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, one core each")
    parser.add_argument("--directory", type=Path, default=Path("runs/experiments"))
    options = parser.parse_args()
    if options.at_once < 1:
        parser.error(f"--at-once is {options.at_once}: it must be at least 1")
    place = options.directory / options.table
    rows = {row: [place / f"{row.replace(' ', '_')}-{seed}" for seed in options.seeds]
            for row in TABLES[options.table]}
    # The first seed of all rows comes first, so that a table that was cut short says something.
    cells = [(rows[row][k], f"{command} --seed {seed}") for k, seed in enumerate(options.seeds)
             for row, command in TABLES[options.table].items()]
    # Parse before threads start, because parsing turns the stdout of all threads aside.
    epochs = {command: parse_config(command.split())[1].epochs for _, command in cells}

    def work(cell: tuple[Path, str]) -> bool:
        directory, command = cell
        start = time.perf_counter()
        if is_whole(directory, epochs[command]):
            return True
        if whole := train(directory, command):
            print(f"\n{directory.name}: {time.perf_counter() - start:.0f} s\n{table(options.table, rows)}",
                  flush=True)
        return whole

    with ThreadPoolExecutor(options.at_once) as threads:
        done = list(threads.map(work, cells))
    print(f"\n{table(options.table, rows)}")
    if picture := sheet(rows):
        picture.save(place / f"{options.table}.png")
    return int(not all(done))


if __name__ == "__main__":
    sys.exit(main())
