"""What a run survives, on real processes: python -m proofs.kill_and_resume [--seed 0] [--kills 20] [--only kills signals ...]

    kills      SIGKILL at random moments, to a worker or to torchrun, and the same command again until the run is whole
    ranks      killed on two ranks, continued on three, then on one
    signals    SIGTERM and Ctrl-C in every phase, and a second signal
    restarts   torchrun --max-restarts, and ranks that die or fail while others wait for them
    disk       a file system that fills up, and one that takes no more
    children   rewards that make processes, in every way and for any time, and signals and kills meanwhile
    endings    SIGHUP and schedulers' notices, output that nobody reads, faults of the program and of user code

Every run is compared with one that nothing disturbed, bit by bit: the last checkpoint's weights, optimizer and average, all
images, and all lines of metrics but for the times in them. Prints a line for each fault, the counts, and a verdict.

Started by itself with `--at PHASE N RANK DEED`, it is train.py with that fault in it.
"""

import argparse
import contextlib
import importlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ["CUDA_VISIBLE_DEVICES"] = ""               # more processes than there are GPUs
sys.path[:0] = [str(ROOT), str(ROOT / "assets"), str(ROOT / "tests")]

# phase: (module, attribute, whether the fault comes after the call and not before, on the main rank alone, calls to choose from)
PHASES = {
    "loading a checkpoint": ("harness.checkpoint", "load_state", True, False, 1),
    "sampling": ("sampler", "rollout", False, False, 8),
    "scoring": ("rewards", "Rewards.__call__", False, False, 5),
    "training": ("grpo", "clipped_loss", False, False, 6),
    "summing gradients": ("distributed", "sum_gradients", False, False, 5),
    "between updates": ("learner", "WeightAverage.step", True, False, 3),
    "evaluation": ("train", "evaluate", True, False, 2),
    "half the images": ("harness.gallery", "save_images", False, True, 2),
    "images written": ("harness.gallery", "save_images", True, True, 2),
    "half a line of metrics": ("harness.checkpoint", "write_metrics", False, True, 3),
    "saving the adapter": ("policy", "Policy.save", True, True, 2),
    "half a state": ("harness.checkpoint", "torch.save", False, True, 2),
    "syncing a checkpoint": ("harness.checkpoint", "sync", True, True, 20),
    "before a rename": ("harness.checkpoint", "os.replace", False, True, 11),
    "after a rename": ("harness.checkpoint", "os.replace", True, True, 11),
    "pruning": ("harness.checkpoint", "Path.unlink", True, True, 2),
}


# --------------------------------------------------------------------------------------------------- train.py with a fault

def do(deed: str, phase: str, arguments: tuple) -> None:
    if phase == "half a line of metrics":
        with open(arguments[0] / "metrics.jsonl", "a") as file:
            file.write('{"epoch": ')
    if phase == "half a state":
        arguments[1].write(b"PK\3\4" + bytes(1000))
        arguments[1].flush()
    if phase == "half the images":
        partial = arguments[0] / "images" / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "000.png").write_bytes(b"\x89PNG")
    print(f"fault: {phase}", file=sys.stderr, flush=True)
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "kill-launcher":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)                                       # the kernel ends this process too
    elif deed == "raise":
        raise RuntimeError("injected")
    elif deed in ("SystemExit", "KeyboardInterrupt"):
        raise {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt}[deed]("injected")
    else:
        time.sleep(float(deed.removeprefix("sleep-")))


def train_with(phase: str, count: int, rank: int, deed: str) -> None:
    """The `count`-th call of a phase on a rank, in the launcher's first attempt, meets with the deed."""
    import distributed
    from harness import program
    leave = program.leave

    def leave_and_tell(code: int) -> None:
        print(f"rank {distributed.rank()} exits {code}", file=sys.stderr)
        leave(code)

    program.leave = leave_and_tell                           # before harness.run takes it, which train.py imports
    module, attribute, after, _, _ = PHASES[phase]
    owner = importlib.import_module(module)                  # before train.py takes the function from it
    *path, name = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def faulty(*arguments, **options):
        nonlocal calls
        calls += distributed.rank() == rank and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0
        if after:
            result = original(*arguments, **options)
        if calls == count:
            calls += 1                                       # once
            do(deed, phase, arguments)
        return result if after else original(*arguments, **options)

    setattr(owner, name, faulty)
    import train
    sys.argv[0] = str(ROOT / "train.py")
    program.run_as_program(train.main)


# ------------------------------------------------------------------------------------------------------------- the runs

class Bench:
    """Runs of one small configuration, what was done to them, and how they compare."""

    def __init__(self, folder: Path, seed: int):
        from helpers import save_small_sd3
        self.folder, self.random = folder, random.Random(seed)
        self.model, self.faults, self.compared, self.failures = folder / "model", 0, 0, []
        save_small_sd3(self.model)

    def start(self, name: str, ranks: int = 2, at: tuple = (), launcher: tuple = (), output_dir: Path | None = None,
              words: str = "", **changes) -> subprocess.Popen:
        """words: of a shell, after the command."""
        from helpers import SMALL, flags
        fault = ["--at", *map(str, at)] if at else ["--at", "sampling", "-1", "0", "kill"]               # a call that never comes
        settings = {**SMALL, "guidance_scale": 1, "epochs": 6, "eval_every": 2, "save_every": 2, "rollout_batch": 2,
                    "train_batch": 6, "model": self.model, "output_dir": output_dir or self.folder, **changes}
        if name:
            settings["run_name"] = name
        self.log = open(self.folder / "log", "w+")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launcher, __file__,
                   *fault, *flags(**settings)]
        if words:
            command = ["bash", "-c", f"{shlex.join(map(str, command))} {words}"]
        return subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)

    def text(self) -> str:
        return Path(self.log.name).read_text()

    def run(self, name: str, *args, **changes) -> int:
        """To its end; the launcher's exit code, and no process of the run left after five seconds."""
        process = self.start(name, *args, **changes)
        code = process.wait(600)
        self.check(f"{name}: no process is left behind", not self.left(5))
        return code

    def left(self, seconds: float) -> bool:
        """Whether a worker of this bench is alive after so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            lines = []
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    lines.append(path.read_bytes())
            if not any(str(self.folder).encode() in line and b"--at" in line for line in lines):
                return False
            time.sleep(0.1)
        return True

    def check(self, claim: str, holds: bool) -> None:
        if not holds:
            self.failures.append(claim)
            print(f"FAILS: {claim}\n{self.text()[-2000:]}", flush=True)

    def fault(self, what: str) -> None:
        self.faults += 1
        print(f"{self.faults:3}  {what}", flush=True)

    def same(self, directory: Path, tolerance: float = 0.0, lost: str = " ", undisturbed: str = "undisturbed") -> None:
        """The run is the undisturbed one: bit by bit, or rewards and weights to a tolerance; but for `lost` images."""
        import torch
        from helpers import equal, metrics_of, without_times
        if not (directory / "checkpoints" / "epoch_00006" / "state.pt").exists():
            return self.check(f"{directory.name} is whole", False)
        self.compared += 1
        ours, theirs = [torch.load(path / "checkpoints" / "epoch_00006" / "state.pt", weights_only=True)
                        for path in (self.folder / undisturbed, directory)]
        if tolerance:
            a, b = (torch.cat([p.flatten() for p in state["trained"]]) for state in (ours, theirs))
            self.check(f"{directory.name}: weights agree to {tolerance}", bool((a - b).norm() <= tolerance * a.norm()))
        else:
            for state in (ours, theirs):                     # with the epoch's line, if that was not yet in metrics.jsonl
                del state["metrics"]
            self.check(f"{directory.name}: weights, optimizer, average and scaler are the same bits", equal(ours, theirs))
        lines, expected = (without_times(metrics_of(path)) for path in (directory, self.folder / undisturbed))
        self.check(f"{directory.name}: each epoch has one line", [m["epoch"] for m in lines] == [m["epoch"] for m in expected])
        if not tolerance:
            self.check(f"{directory.name}: metrics are the same", lines == expected)
            self.check(f"{directory.name}: images are the same", images(directory) == {
                path: content for path, content in images(self.folder / undisturbed).items() if not path.startswith(lost)})
        else:
            self.check(f"{directory.name}: rewards agree to {tolerance}", all(
                abs(m["reward/total"] / e["reward/total"] - 1) <= tolerance for m, e in zip(lines[1:], expected[1:])))
        for checkpoint in sorted((directory / "checkpoints").glob("epoch_*[0-9]")):
            sums = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=checkpoint, capture_output=True)
            self.check(f"{checkpoint}: sha256sum --check", sums.returncode == 0)


def images(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted((directory / "images").glob("epoch_*/*.png"))}


# ------------------------------------------------------------------------------------------------------------- the faults

def kills(bench: Bench, count: int) -> None:
    """Whole runs, one after the other, until so many kills have hit."""
    phases, run = [], 0
    while bench.faults < count:
        run += 1
        name, done = f"killed-{run}", False
        while not done:
            phases = phases or bench.random.sample(list(PHASES), len(PHASES))                # each before one comes again
            phase = phases.pop()
            _, _, _, main_alone, most = PHASES[phase]
            rank, deed = 0 if main_alone else bench.random.randrange(2), bench.random.choice(["kill", "kill-launcher"])
            number = bench.random.randint(1, most)
            hit = bench.faults < count and bench.run(name, at=(phase, number, rank, deed)) != 0
            if hit:
                killed = f"fault: {phase}" in bench.text()
                bench.check(f"{name} was ended by its fault", killed)
                bench.fault(f"{name}: {'launcher' if 'launcher' in deed else f'rank {rank}'} killed, {phase} ({number})")
                if not killed:
                    return
            elif bench.faults >= count:
                code = bench.run(name)
                bench.check(f"{name} ends well", code == 0)
                done = True
            else:
                done = True                                  # the run ended before the phase came so often
        bench.same(bench.folder / name)


def ranks(bench: Bench) -> None:
    code = bench.run("ranks", at=("training", 5, 1, "kill-launcher"))
    bench.check("the fault hits", code != 0)
    bench.fault("two ranks killed in training, continued on three")
    code = bench.run("ranks", 3, at=("training", 5, 2, "kill-launcher"))
    bench.check("the fault hits", code != 0)
    bench.fault("three ranks killed in training, continued on one")
    bench.check("it ends on one rank", bench.run("ranks", 1) == 0)
    bench.same(bench.folder / "ranks", 1e-8)


def signals(bench: Bench) -> None:
    # A phase that takes two seconds, so that the signal meets it; scoring takes minutes, and must not hold up the end.
    cases = [("syncing a checkpoint", 18, 0, "sleep-2"), ("sampling", 3, 0, "sleep-2"), ("scoring", 4, 1, "sleep-120"),
             ("training", 3, 0, "sleep-2"), ("training", 4, 1, "sleep-2"), ("summing gradients", 3, 0, "sleep-2"),
             ("evaluation", 1, 1, "sleep-2")]
    run = 1
    for case, sent in zip(cases, [signal.SIGTERM, signal.SIGINT] * len(cases)):
        process = bench.start(f"signals-{run}", at=case)
        while not reached(bench, process, f"fault: {case[0]}"):                                          # it ended before
            bench.same(bench.folder / f"signals-{run}")
            run += 1
            process = bench.start(f"signals-{run}", at=case)
        told = time.monotonic()
        process.send_signal(sent)
        process.wait(60)
        took, text = time.monotonic() - told, bench.text()
        what = f"signals-{run}: {sent.name}, {case[0]} ({case[1]})"
        bench.fault(f"{what}: all gone after {took:.1f} s")
        bench.check(f"{what}: every worker exits 0", "rank 0 exits 0" in text and "rank 1 exits 0" in text)
        bench.check(f"{what}: it says how to go on", "stopped by a signal" in text and "to go on: " in text)
        bench.check(f"{what}: within 20 s", took < 20 and not bench.left(1))
    bench.check("it goes on to the end", bench.run(f"signals-{run}") == 0)
    bench.same(bench.folder / f"signals-{run}")

    from helpers import alive
    # Nothing but a second signal, or 20 seconds, ends a micro-batch that does.
    for second in (True, False):
        name = f"stuck-{second}"
        process = bench.start(name, at=("sampling", 6, 0, "sleep-120"))
        bench.check(f"{name}: the fault hits", reached(bench, process, "fault: sampling"))
        told, workers = time.monotonic(), children_of(process.pid)
        bench.check(f"{name}: two workers", len(workers) == 2)
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        if second:
            time.sleep(2)
            told = time.monotonic()
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        while any(map(alive, workers)):
            time.sleep(0.05)
        took = time.monotonic() - told
        process.wait(60)
        bench.check(f"{name}: within {2 if second else 25} s", took < (2 if second else 25) and not bench.left(1))
        bench.fault(f"a stuck micro-batch, {'a second signal' if second else 'one signal'}: all gone after {took:.1f} s")


def restarts(bench: Bench) -> None:
    faults = [("training", 7, "kill"), ("summing gradients", 8, "raise"), ("sampling", 11, "kill")]
    for number, (phase, count, deed) in enumerate(faults):
        output = bench.folder / f"restarts-{number}"
        code = bench.run("", at=(phase, count, number % 2, deed), launcher=("--max-restarts=3",), output_dir=output)
        (directory,) = output.iterdir()
        bench.fault(f"{phase}: rank {number % 2}, {deed}; torchrun --max-restarts=3 goes on, without --run-name")
        text = bench.text()
        bench.check("it ends well, having continued", code == 0 and f"fault: {phase}" in text and "continuing after epoch" in text)
        bench.same(directory)

    for deed, first in (("raise", "RuntimeError: injected"), ("kill", "fault: training")):
        name = f"dead-{deed}"
        process = bench.start(name, at=("training", 7, 1, deed))
        bench.check(f"{name}: the fault hits", reached(bench, process, "fault: training"))
        died = time.monotonic()
        code = process.wait(60)
        text, took = bench.text(), time.monotonic() - died
        gone = text.find("rank 0: stopped, another rank is gone")
        bench.check(f"{name}: the failing rank's error stands first", code != 0 and -1 < text.find(first) < gone)
        bench.check(f"{name}: all are gone within 30 s, and the last whole epoch is saved",
                    took < 30 and not bench.left(1) and (bench.folder / name / "checkpoints" / "epoch_00003").exists())
        bench.fault(f"rank 1 {deed}s while the other waits for it: all gone after {took:.1f} s")
        bench.check(f"{name}: it goes on", bench.run(name) == 0)
        bench.same(bench.folder / name)

    code = bench.run("slow", at=("scoring", 9, 1, "sleep-12"))
    bench.fault("a reward on one rank that takes 12 s")
    bench.check("a slow reward is no death", code == 0 and "fault: scoring" in bench.text())
    bench.same(bench.folder / "slow")
    code = bench.run("too-slow", at=("scoring", 9, 1, "sleep-120"), collective_timeout=6, reward_deadline=3)
    bench.fault("a reward on one rank that takes longer than --collective-timeout 6")
    bench.check("beyond --collective-timeout it is", code != 0 and "rank 0: stopped, another rank is gone" in bench.text())


def disk(bench: Bench) -> None:
    mounted = bench.folder / "small-disk"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", mounted], capture_output=True).returncode:
        return print("disk: left out, this user cannot mount a file system", flush=True)
    try:
        # Images that found no room are lost, with a warning; nothing else is.
        for name, room, lost in (("full-checkpoint", 1 << 17, " "), ("full-everything", 0, "images/epoch_00004")):
            process = bench.start(name, output_dir=mounted)
            directory = mounted / name
            while not (directory / "checkpoints" / "epoch_00002").exists():
                time.sleep(0.05)
            fill(mounted / "filler", room)
            warned = reached(bench, process, "could not be written")
            reached(bench, process, "epoch 5/6")
            (mounted / "filler").unlink()                    # what was refused until now is written by the end
            code = process.wait(300)
            bench.fault(f"{name}: the disk is full from epoch 2 to epoch 5")
            bench.check(f"{name}: it warns and ends well", code == 0 and warned)
            bench.same(directory, lost=lost)
            shutil.rmtree(directory)

        process = bench.start("full-to-the-end", output_dir=mounted)
        directory = mounted / "full-to-the-end"
        while not (directory / "checkpoints" / "epoch_00002").exists():
            time.sleep(0.05)
        fill(mounted / "filler", 0)
        code = process.wait(300)
        bench.fault("full-to-the-end: the disk is full until the end")
        bench.check("it says that the end is not saved", code != 0 and "epoch 6 is not saved: make room" in bench.text())
        (mounted / "filler").unlink()
        bench.check("with room it goes on from what was saved", bench.run("full-to-the-end", output_dir=mounted) == 0)
        bench.same(directory)
    finally:
        subprocess.run(["umount", "-l", mounted])


CHILDREN = """
import concurrent.futures, multiprocessing, os, subprocess, sys, time

def brightness(images, prompts=None, metadata=None):
    return images.mean((1, 2, 3)).tolist()

def mapped(make):
    def score(images, prompts, metadata):
        with make() as workers:
            return list(workers.map(float, brightness(images)))
    return score

pool = mapped(lambda: multiprocessing.Pool(2))
spawned = mapped(lambda: multiprocessing.get_context("spawn").Pool(1))
served = mapped(lambda: multiprocessing.get_context("forkserver").Pool(1))
executor = mapped(lambda: concurrent.futures.ProcessPoolExecutor(2))

def program(images, prompts, metadata):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    child.terminate()
    assert child.wait(30) == -15
    return brightness(images)

kept = []

def lasting(images, prompts, metadata):
    if not kept:                                 # made once, and never closed
        kept.append(concurrent.futures.ProcessPoolExecutor(2))
        kept.append(multiprocessing.Pool(2))
        for daemon in (True, False):
            kept.append(multiprocessing.Process(target=time.sleep, args=(600,), daemon=daemon))
            kept[-1].start()
        if not os.fork():
            time.sleep(600)
            os._exit(0)
    return kept[1].map(float, kept[0].map(float, brightness(images)))

def slow(images, prompts, metadata):
    with multiprocessing.Pool(2) as workers:
        print("fault: waits for its processes", file=sys.stderr, flush=True)
        workers.apply(time.sleep, (600,))
        return list(workers.map(float, brightness(images)))
"""


def children(bench: Bench) -> None:
    source = bench.folder / "user_code.py"
    source.write_text(CHILDREN)
    bench.check("the undisturbed run ends well", bench.run("bright", rewards=("user_code:brightness", 1)) == 0)
    settings = {"rewards": ("user_code:brightness", 1)}
    for kind in ("pool", "spawned", "served", "executor", "program", "lasting"):
        # The name of the reward stands in the metrics, so each run has its reward under the same one.
        source.write_text(f"{CHILDREN}\nbrightness_ = brightness\ndef brightness(images, *rest):\n"
                          f"    return {kind}(images, *rest) if rest and rest[0] is not None else brightness_(images)\n")
        code = bench.run(f"children-{kind}", **settings)
        bench.fault(f"a reward that makes processes: {kind}")
        bench.check(f"children-{kind}: it ends well", code == 0 and "stopped by" not in bench.text())
        bench.same(bench.folder / f"children-{kind}", undisturbed="bright")

    for deed in ("kill", "kill-launcher"):
        code = bench.run(f"lasting-{deed}", at=("training", 5, 1, deed), **settings)             # that none is left, `run` checks
        bench.fault(f"rank 1, {deed}: its reward's processes end too")
        bench.check(f"lasting-{deed}: it goes on", code != 0 and bench.run(f"lasting-{deed}", **settings) == 0)
        bench.same(bench.folder / f"lasting-{deed}", undisturbed="bright")

    source.write_text(f"{CHILDREN}\nbrightness_ = brightness\ncalls = 0\ndef brightness(images, *rest):\n    global calls\n"
                      "    calls += bool(rest)\n    return slow(images, *rest) if rest and calls > 10 else brightness_(images)\n")
    process = bench.start("children-stopped", **settings)
    bench.check("a reward waits", reached(bench, process, "fault: waits for its processes"))
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    took = time.monotonic() - told
    bench.fault(f"SIGTERM while a reward waits for its processes, which end by it: all gone after {took:.1f} s")
    bench.check("it is stopped, saved, and ends within 20 s", took < 20 and not bench.left(1) and "; to go on: " in bench.text())
    source.write_text(CHILDREN)
    bench.check("it goes on to the end", bench.run("children-stopped", **settings) == 0)
    bench.same(bench.folder / "children-stopped", undisturbed="bright")


def endings(bench: Bench) -> None:
    for number, to_worker in ((signal.SIGHUP, False), (signal.SIGHUP, True), (signal.SIGUSR1, True), (signal.SIGUSR2, True),
                              (signal.SIGXCPU, True)):
        name = f"ending-{number.name}-{'worker' if to_worker else 'launcher'}"
        process = bench.start(name, at=("training", 7, 0, "sleep-2"))
        bench.check(f"{name}: the fault hits", reached(bench, process, "fault: training"))
        os.kill(children_of(process.pid)[0] if to_worker else process.pid, number)
        process.wait(60)
        text = bench.text()
        bench.fault(f"{number.name} to {'a worker' if to_worker else 'the launcher'}")
        bench.check(f"{name}: saved, and it says how to go on", "stopped by a signal; epoch 3 is saved; to go on: " in text and all(
            f"rank {rank} exits 0" in text for rank in (0, 1)) and not bench.left(1))
        bench.check(f"{name}: it goes on", bench.run(name) == 0)
        bench.same(bench.folder / name)

    for name, words in (("head", "2>/dev/null | head -1"), ("both", "2>&1 | head -1"), ("full", "> /dev/full 2>&1"),
                        ("closed", ">&- 2>&-"), ("ascii", "2>&1 | cat")):
        process = bench.start(f"output-{name}", words=words)
        bench.fault(f"output goes to: {words}")
        process.wait(300)
        bench.check(f"output-{name}: it ends", not bench.left(100))                              # `head` ends before the run does
        bench.same(bench.folder / f"output-{name}")

    for deed, rank, phase in (("raise", 0, "training"), ("raise", 1, "between updates"), ("SystemExit", 0, "summing gradients"),
                              ("KeyboardInterrupt", 1, "sampling"), ("SystemExit", 1, "scoring")):
        name = f"ending-{deed}-{rank}"
        code = bench.run(name, at=(phase, 9 if phase == "sampling" else 7, rank, deed))
        text = bench.text()
        bench.fault(f"{deed} on rank {rank}, {phase}")
        bench.check(f"{name}: saved, and it says how to go on", code != 0 and f"fault: {phase}" in text
                    and re.search("epoch [123] is saved; to go on: ", text) is not None)
        bench.check(f"{name}: it goes on", bench.run(name) == 0)
        bench.same(bench.folder / name)


def fill(path: Path, leave: int) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with open(path, "r+b") as file:
        file.truncate(max(0, path.stat().st_size - leave))


def reached(bench: Bench, process: subprocess.Popen, line: str) -> bool:
    """Wait until the run says so; whether it did before its end."""
    while line not in bench.text():
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    return True


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    scenarios = {"kills": kills, "ranks": ranks, "signals": signals, "restarts": restarts, "disk": disk,
                 "children": children, "endings": endings}
    parser.add_argument("--only", nargs="+", choices=scenarios, default=list(scenarios))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.seed)
        bench.check("the undisturbed run ends well", bench.run("undisturbed") == 0)
        for name in given.only:
            scenarios[name](*(bench, given.kills) if name == "kills" else (bench,))
    print(f"{bench.faults} faults, {bench.compared} runs compared with the undisturbed one (seed {given.seed}): "
          f"{f'{len(bench.failures)} FAILURES' if bench.failures else 'all as promised'}")
    sys.exit(bool(bench.failures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--at"]:
        fault, sys.argv[1:] = sys.argv[2:6], sys.argv[6:]
        train_with(fault[0], int(fault[1]), int(fault[2]), fault[3])
    else:
        main()
