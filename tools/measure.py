"""One run of tools/gpu.py: its time and results, how it measures, and the trainers that it starts."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from config import ATTENTION
from harness.checkpoint import write_whole
from policy import Policy
from tools.floor import PIECES, network_calls, synchronize


class Check:
    """One run of the program: its time, its notes, its device, and the sizes that it checks."""

    def __init__(self, device: torch.device, out: Path, limit: float, smoke: bool):
        """out: the folder of the results. limit: seconds. smoke: whether all sizes are small, for a CPU.

        Raises ValueError or OSError, in one line, if `out` cannot be the folder of the results.
        """
        self.device, self.out, self.limit, self.smoke = device, out, limit, smoke
        self.started, self.failed = time.time(), False
        self.skipped: list[str] = []                       # sections for which there was no time
        self.runs, self.results = out / "trainers", out / "gpu.json"
        # Keep what other sections found in an earlier run.
        self.notes: dict[str, dict] = self.read_results()
        self.write_results()                               # first, because it marks the trainers as ours
        shutil.rmtree(self.runs, ignore_errors=True)
        self.runs.mkdir()
        self.to_here = ["--output-dir", str(self.runs)]
        short = ["--group-size", "4", "--epochs", "3", "--eval-prompts", "4", "--save-every", "1",
                 "--rewards", "jpeg_compressibility", "1", *self.to_here]
        if smoke:
            self.run_words = ["tiny_ocr", "--groups-per-epoch", "2", *short]
            self.sampling = dict(images=2, steps=3, trained=2, guidance=4.5)
            self.network = dict(model="assets/tiny-sd3", targets=ATTENTION, rank=4, resolution=(24, 64),
                                length=12)
        else:
            self.run_words = ["sd35m_ocr_1gpu", "--model", "random:sd35m", "--groups-per-epoch", "4",
                              "--eval-num-steps", "4", "--eval-images", "4", "--eval-every", "3", *short]
            self.sampling = dict(images=8, steps=10, trained=9, guidance=4.5)
            self.network = dict(model="random:sd35m", targets=ATTENTION, rank=32)

    def read_results(self) -> dict[str, dict]:
        """The notes of an earlier run, if there was one. Raises ValueError."""
        if not self.results.exists():
            if self.runs.exists():
                raise ValueError(f"{self.runs} is not from an earlier run, which would have left "
                                 f"{self.results.name} beside it: give another --out")
            return {}
        try:
            return dict(json.loads(self.results.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.results} is not whole ({error}): give another --out") from error

    def write_results(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.results, json.dumps(self.notes, indent=1, default=str) + "\n")

    def left(self) -> float:
        return self.limit - (time.time() - self.started)

    def note(self, name: str, **values) -> None:
        self.notes.setdefault(name, {}).update(values)
        print(f"[{time.time() - self.started:4.0f} s] {name}: {json.dumps(values, default=str)}", flush=True)
        self.write_results()

    def require(self, name: str, what: str, holds: bool) -> None:
        """Say that `what` does not hold, and let the program end with 1."""
        if not holds:
            self.failed = True
            self.note(name, refuted=what)

    def run(self, name: str, needs: float, function: Callable) -> None:
        """Run a section, or say that less than the seconds that it needs are left."""
        if self.left() < needs and not self.smoke:
            self.skipped.append(name)
            print(f"{name} is skipped: {self.left():.0f} s are left, {needs} needed", flush=True)
            return
        began = time.time()
        for note in [note for note in self.notes if note.partition(",")[0] == name]:   # of an earlier run
            del self.notes[note]
        # As `own_device` does, because an earlier section may have failed while it was on.
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            function(self, name)
        except Exception as error:
            self.failed = True
            self.note(name, error=f"{type(error).__name__}: {str(error)[:400]}",
                      where=traceback.format_exc().splitlines()[-6:-1])
        gc.collect()
        torch.cuda.empty_cache()
        self.note(name, seconds=round(time.time() - began, 1))

    # ---- measuring ---------------------------------------------------------------------------------------

    def timed(self, function: Callable, times: int = 1) -> tuple[float, object]:
        """Median seconds of a call, and what the last one returned. The smoke calls once."""
        seconds, times = [], 1 if self.smoke else times
        for _ in range(times):
            synchronize(self.device)
            began = time.perf_counter()
            value = function()
            synchronize(self.device)
            seconds.append(time.perf_counter() - began)
        return sorted(seconds)[times // 2], value

    def peak(self, function: Callable) -> tuple[float, object]:
        """The most memory that was allocated during the call, in GiB, and what it returned."""
        if not torch.cuda.is_available():
            return 0.0, function()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        value = function()
        synchronize(self.device)
        return round(torch.cuda.max_memory_allocated() / 2**30, 2), value

    # ---- trainers, in processes of their own -------------------------------------------------------------

    def start(self, name: str, words: list[str], program: str = "train.py",
              ranks: int = 1) -> subprocess.Popen:
        """Start a program under the launcher, or the bench, which starts its own. `name` is its log's."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", program]
        command = [sys.executable, *(["-m", program] if program == "tools.bench" else launcher), *words]
        with open(self.runs / f"{name}.log", "w") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                    env={**os.environ, "PYTHONUNBUFFERED": "1"})

    def said(self, name: str, *words: str) -> list[str]:
        """The lines of a trainer's log that hold one of the words."""
        text = (self.runs / f"{name}.log").read_text(errors="replace").replace("\r", "\n")
        return [line.strip()[:300] for line in text.splitlines()
                if not words or any(word in line for word in words)]

    def wait(self, name: str, process: subprocess.Popen, seconds: float) -> int:
        """Its exit code, below 0 if it had to be killed. The log joins the others."""
        try:
            process.wait(min(seconds, max(1.0, self.left() - 5)) if not self.smoke else 900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with open(self.out / "logs.txt", "a") as log:
            log.write("\n".join([f"===== {name}: {process.returncode}", *self.said(name)[-200:], ""]))
        return process.returncode

    def finish(self, name: str, log: str, process: subprocess.Popen, seconds: float, *words: str) -> None:
        """Wait for a process, note its exit code and what it said, and require that it ends with 0."""
        code = self.wait(log, process, seconds)
        self.note(name, **{log: {"code": code, "lines": self.said(log, *words)[-30:]}})
        self.require(name, f"{log} ends with 0", code == 0)

    def wait_for(self, process: subprocess.Popen, came: Callable, seconds: float) -> bool:
        """Wait until `came()` is true, but not beyond the end of the process; whether it is true then."""
        end = time.time() + seconds
        while time.time() < end and process.poll() is None and not came():
            time.sleep(0.2)
        return bool(came())


def make_policy(check: Check, dtype: str, *, model: str, targets, rank: int, resolution=(512, 512),
                length: int = 128, **more) -> Policy:
    """A policy whose adapter changes the network. more: other arguments of `Policy`."""
    policy = Policy(model, check.device, dtype, resolution=resolution, max_sequence_length=length,
                    lora_rank=rank, lora_alpha=2 * rank, lora_targets=targets, **more)
    for name, p in policy.network.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.02, generator=torch.Generator(check.device).manual_seed(len(name)))
    return policy


def network_speed(check: Check, name: str, policy: Policy, guidance: float, sizes: tuple[int, ...]) -> None:
    """Note milliseconds and memory of a call on so many images."""
    for size in sizes:
        calls, found = network_calls(policy, ["a"] * size, guidance), {}
        for piece in ("rollout", "replay"):
            what = PIECES[piece]
            try:
                memory, _ = check.peak(calls[piece])
                seconds, _ = check.timed(calls[piece], 2)
                found[what] = {"ms an image": round(1e3 * seconds / size, 1), "peak GiB": memory}
            except RuntimeError as error:
                found[what] = str(error)[:100]
        check.note(name, **{f"{size} images": found})
        policy.network.zero_grad()
