"""Where an epoch's time goes, against the floor: the bare network calls, VAE and rewards that it needs.

    python -m tools.bench [PRESET] [--field value ...] [-- [PRESET] [--field value ...] ...]
                          [--rounds 5] [--ranks N] [--json FILE]
    python -m tools.bench PRESET|all --estimate [--card H100] [--gpus N]     counts, and runs nothing

The epochs are the trainer's own: they sample, score and train for real, and are timed by phase. Timing by
phase waits for a GPU at each phase's end, so there every second epoch is timed as a whole instead. The floor
is measured in the same processes: forwards and backwards of the network, decoding and rewards, back to back
on as many rows as the epoch had, each at the batch size and number of threads that are fastest here.

    efficiency = floor / epoch

Several settings, with `--` between them, take turns in one run and are compared with the first: how many
times faster an epoch's image is, measured and by the ratio of floors. Under torchrun it runs on the ranks
given, else on one rank per GPU or CPU core.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch

import distributed
import train
from config import Config, refuse_repeated
from draws import rank_slice, training_batches
from grpo import weighted_advantages
from harness import signals
from harness.batches import choose_batches, describe
from harness.faults import DoesNotFit, TrainingError
from harness.program import run_as_program
from harness.run import end_with, make_policy, make_rewards, prepare
from harness.scoring import Scorer
from learner import Learner
from policy import Policy
from rewards import RewardError, Rewards
from tools import estimate
from tools.floor import NETWORK, PIECES, Floor, matrix_product_rate, synchronize, usable_cores

PHASES = ("text", "rollout", "decode", "reward_wait", "replay", "reference", "optimizer", "gather",
          "waiting", "other")
NEEDED = ("rollout", "decode", "reward_wait", "replay", "reference")         # network, VAE and rewards


# ---- phases ------------------------------------------------------------------------------------------------

class Clock:
    """Seconds and network rows of each phase. A phase within another stops the outer one's clock."""

    def __init__(self, device: torch.device):
        self.device, self.stack = device, ["other"]
        self.seconds, self.rows = defaultdict(float), defaultdict(int)
        self.collectives: list[float] = []       # seconds of each

    def _switch(self) -> None:
        """Give the time since the last switch to the phase that ran."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._switch()
        self.stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self.stack.pop()

    def timed(self, phase: str, function: Callable) -> Callable:
        def inside(*args, **kwargs):
            with self.phase(phase):
                return function(*args, **kwargs)
        return inside

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        with self.phase("gather"):
            started = self.since
            yield
        self.collectives.append(self.since - started)

    @contextlib.contextmanager
    def watching(self, policy: Policy, learner: Learner, scorer: Scorer) -> Iterator[None]:
        """Within, time the methods of these objects that an epoch is made of, and all collectives."""
        velocity = policy.velocity

        def counted_velocity(text, guidance_scale=1.0, reference=False, **more):
            call = velocity(text, guidance_scale, reference=reference, **more)
            branches = policy.branches(guidance_scale)

            def counted(latents, sigma):
                # The rollout runs without gradients and the replay with them.
                phase = "replay" if torch.is_grad_enabled() else "rollout"
                phase = "reference" if reference else phase
                self.rows[phase] += branches * len(latents)
                with self.phase(phase):
                    return call(latents, sigma)
            return counted

        with contextlib.ExitStack() as patches:
            for owner, name, phase in [
                    (policy, "cache_text", "text"), (policy, "encode", "text"), (policy, "decode", "decode"),
                    (scorer, "submit", "reward_wait"), (scorer, "collect", "reward_wait"),
                    (learner, "step", "optimizer")]:
                patches.enter_context(patch.object(owner, name, self.timed(phase, getattr(owner, name))))
            patches.enter_context(patch.object(policy, "velocity", counted_velocity))
            patches.enter_context(patch.object(distributed, "around_collective", self.collective))
            self.since = time.perf_counter()
            yield
            self._switch()

    def split_waiting(self) -> None:  # all ranks
        """Tell waiting for other ranks from the collectives' own time.

        The last rank to enter a collective waits for none. So what another rank spends there beyond the
        shortest time of all ranks, it spends waiting.
        """
        of_ranks = zip(*distributed.gather_objects(self.collectives), strict=True)
        waiting = sum(mine - min(of_all) for mine, of_all in zip(self.collectives, of_ranks))
        self.seconds["gather"] -= waiting
        self.seconds["waiting"] += waiting


# ---- settings ----------------------------------------------------------------------------------------------

class KeepingScorer(Scorer):
    """Keeps the last pictures, because the floor of the rewards is measured on pictures like these."""

    def submit(self, images: torch.Tensor, *rest, **columns: torch.Tensor) -> None:
        self.pictures = images                   # (B, H, W, 3) uint8
        super().submit(images, *rest, **columns)


class Setting:
    """One command line of the trainer, ready to run epochs, and what was measured of it."""

    def __init__(self, arguments: list[str], device: torch.device):
        _, config, self.prompts, _ = prepare(arguments)
        self.name, self.device, self.epoch = " ".join(arguments) or "tiny_ocr", device, 0
        built = make_rewards(config, device)
        self.rewards = Rewards(dict(config.rewards), built.components, built.start_thread)
        self.policy = make_policy(config, device)
        self.config = config = choose_batches(self.policy, self.prompts, config)
        self.learner = Learner(self.policy, config)
        self.scorer = KeepingScorer(self.rewards, self.policy, config)
        self.floor = Floor(self.policy, self.rewards, self.prompts, config)
        self.images = config.groups_per_epoch * config.group_size
        self.plan = describe(config, distributed.world_size(), self.floor.branches)
        self.peak_memory = 0                               # bytes
        self.seconds: list[float] = []                     # of each timed epoch
        self.phases = defaultdict(list)                    # phase -> seconds of each watched epoch

    def run_epoch(self, clock: Clock | None = None) -> float:  # all ranks
        """Run the next epoch as `train.train` does. Returns its seconds, until the last rank is done."""
        self.epoch += 1
        config, learner = self.config, self.learner
        # A backward pass cannot be told from outside, so replay is all of an update that is no other phase.
        update = clock.timed("replay", train.update) if clock else train.update
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        distributed.wait_for_all()
        started = time.perf_counter()
        samples = train.sample(self.policy, self.scorer, self.prompts, config, self.epoch)
        scores = distributed.gather_scores(samples.scores, samples.draw.indices, self.images)
        group_ids = torch.arange(config.groups_per_epoch).repeat_interleave(config.group_size)
        advantages = weighted_advantages(scores, dict(config.rewards), group_ids,
                                         of=config.advantage_of, std=config.advantage_std)
        update(learner, samples, advantages, config, self.epoch)
        learner.end_updates()
        synchronize(self.device)
        distributed.wait_for_all()
        seconds = time.perf_counter() - started
        self.peak_memory = max(self.peak_memory, peak_memory(self.device))
        self.filler_rows = filler_rows(samples, advantages, config)
        return seconds

    def watch(self) -> float:  # all ranks
        """Run the next epoch, timed by phase. Returns its seconds."""
        clock = Clock(self.device)
        distributed.wait_for_all()               # the last measurement is over on every rank
        with clock.watching(self.policy, self.learner, self.scorer):
            seconds = self.run_epoch(clock)
        clock.split_waiting()
        for phase in PHASES:
            self.phases[phase].append(clock.seconds[phase])
        mine = len(rank_slice(self.images, distributed.rank(), distributed.world_size()))
        self.floor.rows = {"rollout": clock.rows["rollout"], "reference": clock.rows["reference"],
                           "replay": clock.rows["replay"] - self.filler_rows * self.floor.branches,
                           "decode": mine, "reward": mine}
        self.floor.pictures = self.scorer.pictures
        return seconds

    def report(self) -> dict:  # all ranks
        """Everything measured: the slowest rank's floor, means of the ranks' phases, sums over ranks."""
        slowest = max(distributed.gather_objects(self.floor.seconds()), key=lambda floor: sum(floor.values()))
        rows, of_row = distributed.gather_objects(self.floor.rows), self.floor.flops()
        floor, epoch = sum(slowest.values()), statistics.median(self.seconds)
        flops = sum(rank[piece] * of_row[piece] for rank in rows for piece in NETWORK)
        medians = distributed.gather_objects(
            {phase: statistics.median(seconds) for phase, seconds in self.phases.items()})
        phases = {phase: statistics.mean(rank[phase] for rank in medians) for phase in PHASES}
        total, on_gpu = sum(phases.values()), self.device.type == "cuda"
        result = {
            "setting": self.name, "ranks": distributed.world_size(),
            "device": torch.cuda.get_device_name(self.device) if on_gpu else f"CPU, {usable_cores()} cores",
            "images": self.images, "plan": self.plan.splitlines(),
            "epoch_seconds": epoch, "epochs": self.seconds, "images_per_second": self.images / epoch,
            "floor_seconds": floor, "efficiency": floor / epoch,
            "floor": {piece: {"seconds": slowest[piece], "batch": batch, "threads": threads}
                      for piece, (batch, threads) in self.floor.fastest.items() if piece in slowest},
            "phases": phases, "phase_overhead": 1 - sum(phases[p] for p in (*NEEDED, "waiting")) / total,
            "phase_waiting": phases["waiting"] / total,
            "transformer_calls": {piece: sum(rank[piece] for rank in rows) for piece in NETWORK},
            "flops": flops,
            "peak_memory_bytes": max(distributed.gather_objects(self.peak_memory))}
        if on_gpu:
            rate = matrix_product_rate(self.device)
            in_network = sum(phases[phase] for phase in NETWORK)
            result |= {"matrix_product_rate": rate,
                       "transformer_share_of_rate": flops / distributed.world_size() / in_network / rate,
                       "replay_share_of_rate": (of_row["replay"] * self.floor.rows["replay"]
                                                / (phases["replay"] or math.inf) / rate)}
        return result


def filler_rows(samples: train.Samples, advantages: torch.Tensor, config: Config) -> int:
    """Count this rank's rows that train nothing and only fill a batch, which half precision keeps whole."""
    if config.beta:
        return 0
    return sum(int(advantages[samples.draw.indices[j]] == 0)
               for update in range(config.updates_per_epoch)
               for positions, _ in training_batches(samples.draw, update, advantages, config)
               for j in positions)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024             # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show(result: dict, first: dict) -> None:
    print(f"\n{result['setting']}: {result['ranks']} x {result['device']}", *result["plan"], sep="\n")
    for phase, seconds in result["phases"].items():
        if seconds:
            print(f"  {phase:<16}{seconds:9.3f} s {seconds / sum(result['phases'].values()):6.1%}")
    print("floor, of the slowest rank")
    for piece, entry in result["floor"].items():
        print(f"  {PIECES[piece]:<20}{entry['seconds']:9.3f} s   batch {entry['batch']}, "
              f"{entry['threads']} threads")
    calls, seconds = result["transformer_calls"], result["epochs"]
    print(f"network rows      {calls['rollout']:,} forward, {calls['replay']:,} forward + backward, "
          f"{calls['reference']:,} reference: {result['flops'] / 1e12:.3f} TFLOP, "
          f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB")
    print(f"epoch             {result['epoch_seconds']:.3f} s, median of {len(seconds)} "
          f"({min(seconds):.3f} to {max(seconds):.3f}): {result['images_per_second']:.2f} images/s, "
          f"{1000 / result['images_per_second']:.1f} ms an image")
    print(f"floor             {result['floor_seconds']:.3f} s")
    print(f"efficiency        {result['efficiency']:.3f}   (neither transformer, VAE nor reward: "
          f"{result['phase_overhead']:.1%}, and one rank waiting for another: {result['phase_waiting']:.1%})")
    if "matrix_product_rate" in result:
        print(f"bf16 products     {result['matrix_product_rate'] / 1e12:.0f} TFLOP/s; of that, replay "
              f"{result['replay_share_of_rate']:.1%}, all of the transformer "
              f"{result['transformer_share_of_rate']:.1%}")
    if first is not result:
        measured = result["images_per_second"] / first["images_per_second"]
        predicted = (first["floor_seconds"] / first["images"]) / (result["floor_seconds"] / result["images"])
        print(f"against the first {measured:.2f} times as fast; the floors say {predicted:.2f}: "
              f"{measured / predicted:.2f} of that")


# ---- program -----------------------------------------------------------------------------------------------

def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[list[str]]]:
    """The bench's own flags, which may stand anywhere, and a command line of the trainer for each setting.

    Raises ValueError in one line.
    """
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
        return int(text)

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser = argparse.ArgumentParser(
        prog="python -m tools.bench [PRESET] [--field value ...] [-- ...]", description=__doc__,
        epilog="The settings are the trainer's: python train.py [PRESET] --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--rounds", type=positive, default=5, help="timed epochs of each setting")
    parser.add_argument("--ranks", "--gpus", type=positive,
                        help="processes; without it one per GPU, or per CPU core, and 1 for an estimate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all that was measured is kept")
    parser.add_argument("--estimate", action="store_true", help="what the recipe costs, without running it")
    parser.add_argument("--card", default="H100", metavar="NAME", help="the card of an estimate")
    refuse_repeated(arguments, ["rounds", "ranks", "gpus", "json", "card"])
    settings, own = [[]], argparse.Namespace()
    for is_border, words in itertools.groupby(arguments, lambda word: word == "--"):
        if is_border:
            settings.append([])
        else:
            own, settings[-1] = parser.parse_known_args(list(words), own)
    own = parser.parse_args([], own)
    if own.json and not own.json.parent.is_dir():
        raise ValueError(f"--json {str(own.json)!r} cannot be written: {str(own.json.parent)!r} is no "
                         "directory")
    return own, settings


def measure(settings: list[Setting], rounds: int) -> None:  # all ranks
    """Measure everything, the settings taking turns."""
    for setting in settings:
        setting.run_epoch()                      # warm
        setting.watch()
        setting.floor.choose_fastest()
    for _, setting in itertools.product(range(rounds), settings):
        if setting.device.type == "cuda":        # an epoch is faster if nothing in it waits for the device
            setting.seconds.append(setting.run_epoch())
            setting.watch()
        else:
            setting.seconds.append(setting.watch())
        setting.floor.measure()
        if distributed.is_main():
            print(f"{setting.name}: epoch {setting.epoch}, {setting.seconds[-1]:.2f} s", file=sys.stderr)


def launch(settings: list[list[str]], ranks: int | None) -> None:
    """Replace this process by torchrun and its ranks. Mistakes are found first, and said in one line."""
    for words in settings:
        prepare(words)
    ranks = ranks or torch.cuda.device_count() or usable_cores()
    if ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")            # as the launcher would, at greater length
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              f"--nproc_per_node={ranks}", "--module", "tools.bench", *sys.argv[1:]])


def main() -> None:
    os.environ["TQDM_DISABLE"] = "1"
    try:
        own, words_of_settings = parse(sys.argv[1:])
        if own.estimate:
            return estimate.main(words_of_settings, own.card, own.ranks or 1)
        if "RANK" not in os.environ:
            launch(words_of_settings, own.ranks)
        signals.end_with_launcher()
        device = distributed.setup()
        settings = [Setting(words, device) for words in words_of_settings]
    except (RewardError, ValueError, OSError, ImportError, DoesNotFit, distributed.LostRank) as error:
        end_with(error, "", "")
    for setting in settings[1:]:
        setting.floor.share(settings[0].floor)
    plan = "; ".join(setting.plan for setting in settings)
    try:
        measure(settings, own.rounds)
        results = [setting.report() for setting in settings]
    except (RewardError, TrainingError, DoesNotFit, distributed.LostRank) as error:
        end_with(error, plan, "")
    if distributed.is_main():
        for result in results:
            show(result, results[0])
        if own.json:
            own.json.write_text(json.dumps(results, indent=1) + "\n")
    distributed.shutdown()


if __name__ == "__main__":
    run_as_program(main)
