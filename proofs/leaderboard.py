"""Which algorithm learns most for its price? All at equal network rows, all tuned in the same way.

    python -m proofs.leaderboard [--directory runs/leaderboard] [--at-once 1] [--hours 8] [--only NAME ...]

A row is one image in one call of the network. Forward and backward count as 3 rows, and guidance doubles rows.
The budget of a run is what a shared start with a late window takes in 30 epochs. An algorithm is tuned with seed 1 at
about a tenth of it: first its learning rate, then with the best one its weight of the KL. Best is the score, less
what the share of the spread lacks of 0.85. That setting runs out with three seeds; with seed 1 it goes on from
its tenth. The learning rate halves twice in a whole budget.

Each run is train.py in a process of its own with one thread, and is evaluated at each tenth of the budget.
Evaluations cost no rows here. A row counts also where the trainer leaves it out for its zero advantage.
This program may be killed and started again. It prints a setting or a run as soon as it is there, and keeps the
table and a picture, score against spread, as DIRECTORY/table.md and DIRECTORY/picture.png.
"""

import argparse
import functools
import itertools
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from config import Config, parse_config
from harness.batches import batch_plan
from proofs.experiments import is_whole, read_run, train

LEARNING_RATES = (3e-4, 6e-4, 1.2e-3)
SEEDS = (1, 2, 3)
# Weights of the KL. NONE where the spread stays without any. A tenth of SOME is known to change nothing, and
# three times SOME to hold the score down.
SOME, NONE = (0, 0.3), (0,)
LATE = "tiny_ocr --window-range 3 6"                    # the default's window begins at step 2
OWN_START = "tiny_ocr --noise-level 0.9 --no-shared-start-noise"
# Name -> command line of train.py, and weights of the KL. Settings that are not named are the default preset's.
ALGORITHMS = {
    "default": ("tiny_ocr", NONE),
    "shared start, late window": (f"{LATE} --noise-level 0.9", NONE),
    "early window": (f"{OWN_START} --window-size 3 --window-range 0 5", SOME),
    "full trajectory": (f"{OWN_START} --window-size 0", SOME),
    "late window": (f"{OWN_START} --window-range 3 6", NONE),
    "CPS": (f"{LATE} --rule cps --noise-level 0.8 --clip-range 1e-3", NONE),
    "dance": (f"{LATE} --rule dance_sde --noise-level 1.3", NONE),
    "Guard": (f"{LATE} --noise-level 0.9 --guard --advantage-std group --clip-range 1e-4", NONE),
    "AWM": ("tiny_ocr_awm", SOME),
    "full trajectory, no guidance": (f"{OWN_START} --window-size 0 --guidance-scale 1", SOME),
    "AWM, no guidance": ("tiny_ocr_awm --guidance-scale 1", SOME),
}
# One lock for each algorithm, because its seeds share the runs that tune it.
TUNING = {algorithm: threading.Lock() for algorithm in ALGORITHMS}


def rows_of_epoch(config: Config) -> int:
    """Network rows of an epoch, on average over where windows lie."""
    plan = batch_plan(config, 1, branches=1 if config.guidance_scale == 1 else 2)
    return plan.rollout_calls + 3 * plan.replay_calls + plan.reference_calls


@functools.cache
def rows_of_command(command: str) -> int:
    return rows_of_epoch(parse_config(command.split())[1])


BUDGET = 30 * rows_of_command(ALGORITHMS["shared start, late window"][0])


@dataclass(frozen=True)
class Setting:
    """An algorithm with a learning rate and a weight of the KL, as the budget lets it run."""

    algorithm: str
    learning_rate: float
    beta: float

    @property
    def command(self) -> str:
        words = ALGORITHMS[self.algorithm][0]
        return f"{words} --learning-rate {self.learning_rate} --beta {self.beta}"

    @property
    def rows(self) -> int:
        return rows_of_command(self.command)

    @property
    def epochs(self) -> int:
        return BUDGET // self.rows

    @property
    def tenth(self) -> int:
        """Epochs in a tenth of the budget, the nearest whole number; at least 2, because 1 says nothing."""
        return max(2, round(BUDGET / self.rows / 10))

    def directory(self, place: Path, seed: int) -> Path:
        name = f"{self.algorithm}-{self.learning_rate:g}-{self.beta:g}-{seed}"
        return place / name.replace(",", "").replace(" ", "_")

    def run(self, place: Path, seed: int, epochs: int, end: float) -> bool:
        """Train until then, or go on, unless `end` has passed. Returns whether the run came to its epochs."""
        command = (f"{self.command} --seed {seed} --epochs {epochs} --eval-every {self.tenth} "
                   f"--save-every {self.tenth} --learning-rate-half-life {self.epochs / 2}")
        directory = self.directory(place, seed)
        if is_whole(directory, epochs):
            return True
        started = time.perf_counter()
        if time.monotonic() >= end or not train(directory, command):
            return False
        print(f"{directory.name}: {epochs} epochs, {time.perf_counter() - started:.0f} s", flush=True)
        return True

    def evaluations(self, place: Path, seed: int) -> list[tuple[int, float, float, float]]:
        """(epoch, score, share of the spread, seconds of training until then) of each evaluation so far."""
        seconds, found = 0.0, []
        for line in read_run(self.directory(place, seed)):
            seconds += line.get("seconds", 0.0)
            if "eval/total" in line:
                found.append((line["epoch"], line["eval/total"], line["spread/eval_share"], seconds))
        return found


def at_a_tenth(setting: Setting, place: Path) -> tuple[float, float] | None:
    """Score and share of the spread of the tuning run, None before it is there."""
    found = [e[1:3] for e in setting.evaluations(place, 1) if e[0] == setting.tenth]
    return found[0] if found else None


def tuned(algorithm: str, place: Path) -> Setting | None:
    """The best setting at a tenth of the budget, of those that are there."""
    settings = [Setting(algorithm, rate, beta) for beta in ALGORITHMS[algorithm][1] for rate in LEARNING_RATES]
    worth = {setting: score - max(0.0, 0.85 - share) for setting in settings
             for score, share in filter(None, [at_a_tenth(setting, place)])}
    return max(worth, key=worth.get, default=None)


def tune(settings: list[Setting], place: Path, end: float) -> None:
    """Run the settings that are missing to a tenth of the budget, and say what came of each."""
    for setting in settings:
        if not at_a_tenth(setting, place) and setting.run(place, 1, setting.tenth, end):
            score, share = at_a_tenth(setting, place)
            print(f"  {setting.algorithm}: learning rate {setting.learning_rate:g}, KL {setting.beta:g}, "
                  f"{setting.tenth} epochs: score {score:.3f}, share {share:.2f}", flush=True)


def race(algorithm: str, place: Path, seed: int, end: float) -> None:
    """Tune an algorithm unless it is, run it out with a seed, and show where all stand."""
    first, *others = ALGORITHMS[algorithm][1]
    with TUNING[algorithm]:
        tune([Setting(algorithm, rate, first) for rate in LEARNING_RATES], place, end)
        if best := tuned(algorithm, place):
            tune([Setting(algorithm, best.learning_rate, beta) for beta in others], place, end)
            best = tuned(algorithm, place)
    if best:
        best.run(place, seed, best.epochs, end)
    show(place)


# ------------------------------------------------------------------------------------------ what came of it

def mean_and_range(values: list[float | None], digits: int) -> str:
    """Their mean, the least and the most. None is a seed that did not get there."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    text = f"{sum(there) / len(there):.{digits}f}"
    if len(there) > 1:
        text += f" ({min(there):.{digits}f} to {max(there):.{digits}f})"
    return text if len(there) == len(values) else f"{text}, {len(there)} of {len(values)} seeds"


def table_row(algorithm: str, place: Path) -> str | None:
    """A line of the table, from the seeds whose run has come to its end. None if there is none."""
    best = tuned(algorithm, place)
    runs = [best.evaluations(place, seed) for seed in SEEDS] if best else []
    runs = [run for run in runs if run and run[-1][0] == best.epochs]
    if not runs:
        return None
    first = [next((e for e in run if e[1] >= 0.9), None) for run in runs]
    return "| " + " | ".join([
        algorithm, f"{best.learning_rate:g}, {best.beta:g}", f"{best.epochs}", f"{len(runs)}",
        mean_and_range([run[-1][1] for run in runs], 3), mean_and_range([run[-1][2] for run in runs], 2),
        mean_and_range([e and e[0] * best.rows / 1000 for e in first], 0),
        mean_and_range([e and e[3] for e in first], 0),
        *(mean_and_range([max(e[1] for e in run if e[2] >= share) for run in runs], 3)
          for share in (0.85, 0.5))]) + " |"


def show(place: Path) -> None:
    """Print the table, and keep it and the picture."""
    heads = ("", "learning rate, KL", "epochs", "seeds", "score", "share of the spread", "1,000 rows to .90",
             "seconds to .90", "best score at a share of .85", "of .5")
    rows = [row for row in (table_row(algorithm, place) for algorithm in ALGORITHMS) if row]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *rows]
    (place / "table.md").write_text("\n".join(lines) + "\n")
    print(f"\nbudget: {BUDGET:,} network rows\n" + "\n".join(lines) + "\n", flush=True)
    picture(place).save(place / "picture.png")


COLOURS = ("black", "red", "blue", "green", "orange", "purple", "deepskyblue", "magenta", "olive", "brown",
           "teal", "gray")


def picture(place: Path, width: int = 560, height: int = 440) -> Image.Image:
    """Score against share of the spread: a line a run through its evaluations, a disc where it ends."""
    image = Image.new("RGB", (width + 310, height + 50), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)

    def at(share: float, score: float) -> tuple[float, float]:
        return 50 + width * share / 1.2, 10 + height * (1 - score) / 0.7             # scores from 0.3 on

    for tick in (0.2, 0.4, 0.6, 0.8, 1.0):
        if tick > 0.3:
            draw.line([at(0, tick), at(1.2, tick)], "lightgray")
            draw.text((15, at(0, tick)[1] - 8), f"{tick:.1f}", "black", font)
        draw.line([at(tick, 0.3), at(tick, 1)], "lightgray")
        draw.text((at(tick, 0.3)[0] - 8, height + 13), f"{tick:.1f}", "black", font)
    draw.text((50, height + 30), "right: share of the spread before training; up: held-out score", "black", font)
    there = [(algorithm, best) for algorithm in ALGORITHMS if (best := tuned(algorithm, place))]
    for k, ((algorithm, best), colour) in enumerate(zip(there, COLOURS)):
        draw.text((width + 60, 10 + 18 * k), algorithm, colour, font)
        for run in (best.evaluations(place, seed) for seed in SEEDS):
            points = [at(share, score) for _, score, share, _ in run]
            draw.line(points, colour, 2)
            for x, y in points[-1:]:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
    return image


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, one core each")
    parser.add_argument("--hours", type=float, default=8.0, help="no run begins after so many")
    parser.add_argument("--only", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), metavar="NAME")
    options = parser.parse_args()
    if options.at_once < 1:
        parser.error(f"--at-once is {options.at_once}: it must be at least 1")
    options.directory.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 3600 * options.hours
    for algorithm in ALGORITHMS:         # before threads start, because parsing turns stdout aside for all
        for rate, beta in itertools.product(LEARNING_RATES, ALGORITHMS[algorithm][1]):
            rows_of_command(Setting(algorithm, rate, beta).command)

    def work(task: tuple[int, str]) -> None:
        if time.monotonic() < end:
            race(task[1], options.directory, task[0], end)

    # The first seed of all algorithms comes first, so that a leaderboard that was cut short says something.
    with ThreadPoolExecutor(options.at_once) as threads:
        list(threads.map(work, [(seed, algorithm) for seed in SEEDS for algorithm in options.only]))
    show(options.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
