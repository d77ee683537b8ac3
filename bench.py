"""Where an epoch's time goes, against the floor: the bare transformer calls, VAE and rewards that the algorithm needs.

    python bench.py [PRESET] [--field value ...] [-- [PRESET] [--field value ...] ...] [--rounds 5] [--ranks N] [--json FILE]

The epochs are those of train.py, sampling, scoring and training for real, timed by phase; on a GPU, where that means waiting for the
device, every second one is timed as it is instead. The floor is measured in the same processes: forwards and backwards of the
network, decoding and rewards, back to back on as many rows as the epoch had, each at the batch size and number of threads that are
fastest here.

    efficiency = floor / epoch

Several settings, with `--` between them, take turns in one run, and are compared with the first: how many times faster an epoch's
image is, measured and by the ratio of floors. Under torchrun it runs on the ranks given; else on one per GPU or CPU core.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import distributed
import train
from config import refuse_repeated
from draws import rank_slice
from harness import signals
from harness.faults import DoesNotFit, is_out_of_memory
from harness.program import run_as_program
from rewards import RewardError

PHASES = ("text", "rollout", "decode", "reward exposed", "replay", "reference", "optimizer", "gather", "waiting", "other")
NEEDED = ("rollout", "decode", "reward exposed", "replay", "reference")            # transformer, VAE and rewards
PIECES = {"rollout": "forward", "replay": "forward + backward", "reference": "reference forward", "decode": "VAE decode",
          "reward": "reward"}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds and network rows by phase, of what runs while `watching`. The innermost phase has the time."""

    def __init__(self, setting: "Setting"):
        self.setting, self.stack = setting, ["other"]
        self.seconds, self.rows = defaultdict(float), defaultdict(int)
        self.collectives: list[float] = []       # seconds of each

    def switch(self) -> None:
        synchronize(self.setting.device)
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def timed(self, phase: str, function: Callable, durations: list[float] | None = None) -> Callable:
        def inside(*args, **kwargs):
            self.switch()
            started = self.since
            self.stack.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.stack.pop()
                if durations is not None:
                    durations.append(self.since - started)
        return inside

    def tell_waiting(self) -> None:  # all ranks
        """In a collective, the last rank to come waits for none: what the others spend there beyond its time is waiting for it."""
        waiting = sum(mine - min(all_ranks) for mine, all_ranks in zip(
            self.collectives, zip(*distributed.gather_objects(self.collectives), strict=True)))
        self.seconds["gather"] -= waiting
        self.seconds["waiting"] += waiting

    @contextlib.contextmanager
    def watching(self):
        """The functions that an epoch is made of, timed; the rows that the network is given, counted."""
        policy = self.setting.policy
        accumulate, reference, decode = train.accumulate_gradients, policy.reference_velocity, policy.decode

        def accumulate_gradients(learner, samples, batch, advantages, *rest):
            if not self.setting.config.beta:     # rows that only fill the batch are not needed
                self.rows["filler"] += int((advantages[[samples.indices[j] for j in batch]] == 0).sum())
            accumulate(learner, samples, batch, advantages, *rest)

        def decode_and_keep(latents):
            images = decode(latents)
            self.setting.pictures = images.cpu().numpy()
            return images

        functions = [
            (train, "rollout", "rollout", train.rollout), (train, "accumulate_gradients", "replay", accumulate_gradients),
            (train, "wait_for_scores", "reward exposed", train.wait_for_scores),
            (self.setting.learner, "update", "optimizer", self.setting.learner.update),
            (policy, "cache_text", "text", policy.cache_text), (policy, "encode", "text", policy.encode),
            (policy, "decode", "decode", decode_and_keep)]
        collectives = ("sum_gradients", "gather_rows", "gather_objects", "gather_vectors")
        hooks = [network.register_forward_pre_hook(self.count, with_kwargs=True)
                 for network in (policy.pipe.transformer, policy.reference) if network is not None]
        with contextlib.ExitStack() as stack:
            for place, name, phase, function in functions:
                stack.enter_context(mock.patch.object(place, name, self.timed(phase, function)))
            for name in collectives:
                stack.enter_context(mock.patch.object(
                    distributed, name, self.timed("gather", getattr(distributed, name), self.collectives)))
            stack.enter_context(mock.patch.object(
                policy, "reference_velocity", lambda *args: self.timed("reference", reference(*args))))
            for hook in hooks:
                stack.callback(hook.remove)
            self.since = time.perf_counter()
            yield
            self.switch()

    def count(self, network, args: tuple, kwargs: dict) -> None:
        self.rows[self.stack[-1]] += len(args[0] if args else kwargs["hidden_states"])


class Setting:
    """One command line of train.py, ready to run epochs, and what was measured of it."""

    def __init__(self, arguments: list[str], device: torch.device):
        _, self.config, self.prompts, _ = train.prepare(arguments)
        self.name, self.device, self.epoch = " ".join(arguments) or "tiny_ocr", device, 0
        self.rewards = train.make_rewards(self.config, device).subset(dict(self.config.rewards))
        self.policy = train.make_policy(self.config, device)
        self.config = train.choose_batches(self.policy, self.prompts, self.config)
        self.learner = train.Learner(self.policy, self.config)
        self.images = self.config.groups_per_epoch * self.config.group_size
        self.peak_memory = 0                                             # bytes
        self.seconds: list[float] = []                                   # of each timed epoch
        self.phases = defaultdict(list)                                  # phase -> seconds of each watched epoch
        self.fastest: dict[str, tuple[int, int]] = {}                    # piece -> batch of images, threads
        self.rates = defaultdict(list)                                   # piece -> seconds of a row

    def run_epoch(self, scorer: ThreadPoolExecutor) -> float:  # all ranks
        """The next epoch; its seconds, until the last rank is done."""
        self.epoch += 1
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        distributed.wait_for_all()
        started = time.perf_counter()
        train.run_epoch(self.learner, self.rewards, self.prompts, self.config, self.epoch, scorer)
        synchronize(self.device)
        distributed.wait_for_all()
        seconds, self.peak_memory = time.perf_counter() - started, max(self.peak_memory, peak_memory(self.device))
        return seconds

    def watch(self, scorer: ThreadPoolExecutor) -> float:  # all ranks
        """The next epoch, by phase; its seconds."""
        clock = Clock(self)
        distributed.wait_for_all()               # the last measurement is over on every rank
        with clock.watching():
            seconds = self.run_epoch(scorer)
        clock.tell_waiting()
        for phase in PHASES:
            self.phases[phase].append(clock.seconds[phase])
        branches = self.policy.branches(self.config.guidance_scale)
        mine = len(rank_slice(self.images, distributed.rank(), distributed.world_size()))
        self.rows = {"rollout": clock.rows["rollout"], "reference": clock.rows["reference"], "decode": mine, "reward": mine,
                     "replay": clock.rows["replay"] - clock.rows["filler"] * branches * self.config.trained_steps}
        return seconds

    # ------------------------------------------------------------------------------------------------------- the floor

    def pieces(self) -> dict[str, Callable[[int], Callable[[], None]]]:
        """What the algorithm cannot do without: piece -> batch of images -> one call of it on that many."""
        policy, config = self.policy, self.config

        def inputs(batch: int) -> tuple:
            latents = torch.randn(batch, *policy.latent_shape, dtype=policy.compute_dtype, device=self.device)
            return latents, torch.full((batch,), 0.5, dtype=policy.compute_dtype, device=self.device)

        def text(batch: int):
            return policy.encode([self.prompts[i % len(self.prompts)].text for i in range(batch)])

        def rollout(batch: int):
            velocity, x = policy.velocity(text(batch), config.guidance_scale), inputs(batch)
            return torch.no_grad()(lambda: velocity(*x))

        def replay(batch: int):
            velocity, x = policy.velocity(text(batch), config.guidance_scale), inputs(batch)
            ones = torch.full_like(x[0], 1e-6)
            return lambda: torch.autograd.backward(velocity(*x), ones)

        def reference(batch: int):
            velocity, x = policy.reference_velocity(text(batch), config.guidance_scale), inputs(batch)
            return lambda: velocity(*x)

        def decode(batch: int):
            latents = inputs(batch)[0]
            return lambda: policy.decode(latents)

        def reward(batch: int):
            pictures = np.take(self.pictures, range(batch), axis=0, mode="wrap")
            drawn = [self.prompts[i % len(self.prompts)] for i in range(batch)]
            return lambda: self.rewards(pictures, [p.text for p in drawn], [p.metadata for p in drawn])

        return {"rollout": rollout, "replay": replay, "reference": reference, "decode": decode, "reward": reward}

    def rate(self, piece: str, batch: int, threads: int, seconds: float) -> float:  # all ranks
        """Seconds of a row, when so many go in one call on so many threads; all ranks at once, as in an epoch."""
        before, rows = torch.get_num_threads(), batch
        if piece in ("rollout", "replay", "reference"):
            rows *= self.policy.branches(self.config.guidance_scale)
        torch.set_num_threads(threads)
        distributed.wait_for_all()
        try:
            call = self.pieces()[piece](batch)
            call()                               # warm
            return seconds_per_call(call, self.device, seconds) / rows
        except RuntimeError as error:            # larger than what the trainer was given
            if not is_out_of_memory(error):
                raise
            return math.inf
        finally:
            torch.set_num_threads(before)
            self.learner.optimizer.zero_grad(set_to_none=True)

    def share_rates(self, other: "Setting") -> None:
        """Where a row costs the same, it is measured once for both: what their floors differ in is counted."""
        same = ("model", "rewards", "resolution", "max_sequence_length", "dtype", "lora_rank", "lora_targets", "lora_path",
                "full_finetune", "gradient_checkpointing", "compile", "rollout_batch", "train_batch")
        if self.images == other.images and all(getattr(self.config, name) == getattr(other.config, name) for name in same):
            self.rates, self.fastest = other.rates, other.fastest

    def choose_fastest(self) -> None:  # all ranks
        """Batch size and threads of each piece; measured anew later, since the best of several looks better than it is."""
        threads = {torch.get_num_threads()}
        if self.device.type == "cpu":
            threads |= {1, max(1, os.cpu_count() // distributed.world_size())}
        for piece in PIECES:
            own = self.config.train_batch if piece == "replay" else self.config.rollout_batch
            most = -(-self.images // distributed.world_size())               # a rank has no more to put into a batch,
            if piece in ("replay", "reference") and not self.config.half_precision:
                most *= self.config.trained_steps             # or where several steps go in one
            batches = {min(most, batch) for batch in (-(-own // 4), -(-own // 2), own, 2 * own)}
            candidates = [(batch, n) for batch in sorted(batches) for n in sorted(threads)]
            if distributed.any_rank(self.rows[piece] > 0) and piece not in self.fastest:
                rates = {candidate: min(self.rate(piece, *candidate, 0.3) for _ in range(2)) for candidate in candidates}
                self.fastest[piece] = min(rates, key=rates.get)

    def measure_floor(self) -> None:  # all ranks
        for piece, chosen in self.fastest.items():
            self.rates[piece].append(self.rate(piece, *chosen, 1.0))

    def floor(self) -> dict[str, float]:
        """Piece -> this rank's seconds of an epoch."""
        return {piece: statistics.median(rates) * self.rows[piece] for piece, rates in self.rates.items() if self.rows[piece]}

    def flops(self) -> dict[str, float]:
        """Of one row, by piece: those of matrix products and attention, a multiplication and an addition being two."""
        counts = dict.fromkeys(("rollout", "replay", "reference"), 0.0)
        for piece in counts:
            if self.rows[piece]:
                call = self.pieces()[piece](1)
                with FlopCounterMode(display=False) as counter:
                    call()
                counts[piece] = counter.get_total_flops() / self.policy.branches(self.config.guidance_scale)
        self.learner.optimizer.zero_grad(set_to_none=True)
        return counts

    def report(self) -> dict:  # all ranks
        """Everything measured, on every rank: the slowest rank's floor, means of the ranks' phases, sums over the ranks."""
        floors, ranks = distributed.gather_objects(self.floor()), distributed.world_size()
        rows = distributed.gather_objects(self.rows)
        total = {piece: sum(r[piece] for r in rows) for piece in PIECES}
        of_row = self.flops()
        flops = sum(distributed.gather_objects(sum(self.rows[piece] * count for piece, count in of_row.items())))
        epoch, slowest = statistics.median(self.seconds), max(floors, key=lambda f: sum(f.values()))
        medians = distributed.gather_objects({phase: statistics.median(seconds) for phase, seconds in self.phases.items()})
        phases = {phase: statistics.mean(of_rank[phase] for of_rank in medians) for phase in PHASES}
        result = {
            "setting": self.name, "ranks": ranks, "device": device_name(self.device), "images": self.images,
            "plan": train.in_words(self.config, self.policy).splitlines(),
            "epoch_seconds": epoch, "epochs": self.seconds, "images_per_second": self.images / epoch,
            "floor_seconds": sum(slowest.values()), "efficiency": sum(slowest.values()) / epoch,
            "floor": {piece: {"seconds": slowest[piece], "batch": batch, "threads": threads}
                      for piece, (batch, threads) in self.fastest.items() if piece in slowest},
            "phases": phases, "phase_overhead": 1 - sum(phases[p] for p in (*NEEDED, "waiting")) / sum(phases.values()),
            "phase_waiting": phases["waiting"] / sum(phases.values()),
            "transformer_calls": {piece: total[piece] for piece in ("rollout", "replay", "reference")}, "flops": flops,
            "peak_memory_bytes": max(distributed.gather_objects(self.peak_memory))}
        if self.device.type == "cuda":
            rate = matrix_product_rate(self.device)
            needed = sum(phases[phase] for phase in ("rollout", "replay", "reference"))
            result |= {"matrix_product_rate": rate, "transformer_share_of_rate": flops / ranks / needed / rate,
                       "replay_share_of_rate": of_row["replay"] * self.rows["replay"] / (phases["replay"] or math.inf) / rate}
        return result


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds_per_call(call: Callable[[], None], device: torch.device, seconds: float) -> float:
    """Mean over as many calls as fit into `seconds`."""
    synchronize(device)
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < seconds:
        call()
        synchronize(device)
        calls += 1
    return (time.perf_counter() - started) / calls


def matrix_product_rate(device: torch.device, size: int = 8192) -> float:
    """FLOPs a second of bf16 matrix products, large enough to be at the device's best."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * size**3 / seconds_per_call(lambda: [a @ b for _ in range(10)], device, 1.0) * 10


def show(result: dict, first: dict | None) -> None:
    print(f"\n{result['setting']}: {result['ranks']} x {result['device']}", *result["plan"], sep="\n")
    for phase, seconds in result["phases"].items():
        if seconds:
            print(f"  {phase:<16}{seconds:9.3f} s {seconds / sum(result['phases'].values()):6.1%}")
    print("floor, of the slowest rank")
    for piece, entry in result["floor"].items():
        print(f"  {PIECES[piece]:<20}{entry['seconds']:9.3f} s   batch {entry['batch']}, {entry['threads']} threads")
    calls = result["transformer_calls"]
    print(f"network rows      {calls['rollout']:,} forward, {calls['replay']:,} forward + backward, {calls['reference']:,} "
          f"reference: {result['flops'] / 1e12:.3f} TFLOP, peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB")
    print(f"epoch             {result['epoch_seconds']:.3f} s, median of {len(result['epochs'])} ({min(result['epochs']):.3f} to "
          f"{max(result['epochs']):.3f}): "
          f"{result['images_per_second']:.2f} images/s, {1000 / result['images_per_second']:.1f} ms an image")
    print(f"floor             {result['floor_seconds']:.3f} s")
    print(f"efficiency        {result['efficiency']:.3f}   (neither transformer, VAE nor reward: {result['phase_overhead']:.1%}, and "
          f"one rank waiting for another: {result['phase_waiting']:.1%})")
    if "matrix_product_rate" in result:
        print(f"bf16 products     {result['matrix_product_rate'] / 1e12:.0f} TFLOP/s; of that, replay "
              f"{result['replay_share_of_rate']:.1%}, all of the transformer {result['transformer_share_of_rate']:.1%}")
    if first and first is not result:
        measured = result["images_per_second"] / first["images_per_second"]
        predicted = (first["floor_seconds"] / first["images"]) / (result["floor_seconds"] / result["images"])
        print(f"against the first {measured:.2f} times as fast; the floors say {predicted:.2f}: {measured / predicted:.2f} of that")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[list[str]]]:
    """The bench's own flags, which may stand anywhere, and a command line of train.py for each setting. Raises ValueError."""
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
        return int(text)

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, epilog="The settings are train.py's: python train.py [PRESET] --help.",
                                     usage="bench.py [PRESET] [--field value ...] [-- ...] [--rounds 5] [--ranks N] [--json FILE]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--rounds", type=positive, default=5, help="timed epochs of each setting")
    parser.add_argument("--ranks", type=positive, help="processes; one per GPU, or CPU core, where it is not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all that was measured is kept")
    refuse_repeated(arguments, ["rounds", "ranks", "json"])
    settings, own = [[]], argparse.Namespace()
    for is_border, words in itertools.groupby(arguments, lambda word: word == "--"):
        if is_border:
            settings.append([])
        else:
            own, settings[-1] = parser.parse_known_args(list(words), own)
    own = parser.parse_args([], own)
    if own.json and not own.json.parent.is_dir():
        raise ValueError(f"--json {str(own.json)!r} cannot be written: {str(own.json.parent)!r} is no directory")
    return own, settings


def measure(settings: list[Setting], rounds: int) -> None:  # all ranks
    """Everything, the settings taking turns."""
    with train.scoring_thread(settings[0].device) as scorer:
        for setting in settings:
            setting.run_epoch(scorer)            # warm
            setting.watch(scorer)
            setting.choose_fastest()
        for _, setting in itertools.product(range(rounds), settings):
            if setting.device.type == "cuda":    # watching waits for the device, and an epoch without that is faster
                setting.seconds.append(setting.run_epoch(scorer))
                setting.watch(scorer)
            else:
                setting.seconds.append(setting.watch(scorer))
            setting.measure_floor()
            if distributed.is_main():
                print(f"{setting.name}: epoch {setting.epoch}, {setting.seconds[-1]:.2f} s", file=sys.stderr)


def main() -> None:
    os.environ["TQDM_DISABLE"] = "1"
    try:
        own, settings = parse(sys.argv[1:])
        if "RANK" not in os.environ:
            for words in settings:
                train.prepare(words)             # what is wrong ends here, without the launcher's own words
            ranks = own.ranks or torch.cuda.device_count() or os.cpu_count()
            if ranks > 1:
                os.environ.setdefault("OMP_NUM_THREADS", "1")            # as the launcher would, at greater length
            os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                                      *sys.argv])
        signals.end_with_launcher()
        device = distributed.setup()
        settings = [Setting(words, device) for words in settings]
    except (ValueError, OSError, ImportError) as error:
        train.stop(error, everywhere=False)
    except DoesNotFit as error:
        train.stop(error, everywhere=True)
    for setting in settings[1:]:
        setting.share_rates(settings[0])
    try:
        measure(settings, own.rounds)
        results = [setting.report() for setting in settings]
    except (RewardError, train.NonFinite) as error:
        train.stop(error, everywhere=False)
    except DoesNotFit as error:
        train.stop(error, everywhere=True)
    except distributed.LostRank as error:
        train.stop_without(error)
    if distributed.is_main():
        for result in results:
            show(result, results[0])
        if own.json:
            own.json.write_text(json.dumps(results, indent=1) + "\n")
    distributed.shutdown()


if __name__ == "__main__":
    run_as_program(main)
