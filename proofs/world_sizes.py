"""Law 6 in full: a run is a function of its seed, whatever ranks and micro-batches it is spread over.

    python -m proofs.world_sizes [settings ...]        # names of SETTINGS; none means all of them

Every run is train.py's own main, three epochs in as many torchrun processes as it says, on a small random
StableDiffusion3Pipeline. Each is compared to the same settings on one rank with everything in one batch: the rewards and
advantages of every sample in every epoch, the trained weights at the end, and what training changed of them. Samples lie on the
ranks as they do in training, in contiguous parts that split groups (from a shared start, groups are dealt out first), and also
"scattered" over them, so that nothing can depend on who holds what. It prints the relative differences, and ends with 1 where
one in float64 is above 1e-8; those in float32 are for information.
"""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ["CUDA_VISIBLE_DEVICES"] = ""               # more processes than there are GPUs
sys.path[:0] = [str(ROOT), str(ROOT / "assets"), str(ROOT / "tests"), str(ROOT / "proofs")]

import torch  # noqa: E402
from helpers import flags, save_small_sd3  # noqa: E402

import distributed  # noqa: E402
import draws  # noqa: E402
import train  # noqa: E402
from draws import epoch_prompt_indices  # noqa: E402
from grpo import group_advantages  # noqa: E402
from harness.run import launch  # noqa: E402
from prompts import load_prompts  # noqa: E402
from rewards import jpeg_incompressibility  # noqa: E402

TOLERANCE = 1e-8
COMPARED = ("rewards", "advantages", "weights", "their change")
RANKS, MICRO_BATCHES, PLACES = (1, 2, 3, 4), (1, 5, 16), ("contiguous", "scattered")
GROUPS, SIZE, EPOCHS = 3, 5, 3             # 15 samples: three ranks hold whole groups, two and four split them, unevenly

BASE = dict(resolution=(16, 32), rewards=("jpeg_incompressibility", 1), num_steps=3, window_size=0,
            shared_start_noise=False, groups_per_epoch=GROUPS,
            group_size=SIZE, updates_per_epoch=2, epochs=EPOCHS, lora_rank=4, lora_alpha=8, lora_targets=("attn.to_q", "attn.to_v"),
            learning_rate_half_life=0, beta=0.1, guidance_scale=1, eval_prompts=1, eval_num_steps=1, eval_images=1, eval_every=100,
            save_every=100, dtype="float64")
SETTINGS = {
    "base": {},
    "window, guidance": dict(window_size=2, window_range=(0, 3), guidance_scale=2, updates_per_epoch=4),
    "window, shared start noise": dict(window_size=1, window_range=(0, 3), shared_start_noise=True, beta=0, updates_per_epoch=1),
    "Guard": dict(guard=True, clip_range=1e-4, beta=0, advantage_std="group"),
    "one group equal": dict(rewards=("world_sizes:equal_in_first_group", 1), beta=0),
    "a rank's every group equal": dict(rewards=("world_sizes:equal_but_in_last_group", 1), beta=0),
    "all equal after epoch 1, KL": dict(rewards=("world_sizes:equal_after_first_epoch", 1)),
    "fewer samples than ranks": dict(groups_per_epoch=1, group_size=2, updates_per_epoch=1),
    "float32": dict(dtype="float32"),
    "float32, Guard": dict(dtype="float32", guard=True, clip_range=1e-4, beta=0, advantage_std="group"),
}


def cases(settings: str, ranks: int) -> list[tuple[int, str]]:
    """(micro-batch, place) of the runs: the whole matrix for the base, one run for each number of ranks for the others."""
    if settings == "base":
        return [(size, place) for size in MICRO_BATCHES for place in PLACES[:1 if ranks == 1 else 2]]
    return [{1: (16, "contiguous"), 2: (1, "contiguous"), 3: (5, "scattered"), 4: (5, "contiguous")}[ranks]]


# ------------------------------------------------------------------------------------ rewards that are equal in some groups

def drawn(groups: range, epochs: range) -> set[str]:
    """The prompts of these groups in these epochs, from 0 on; in the few epochs here, no prompt is drawn twice."""
    prompts = load_prompts("words", "train")
    return {prompts[epoch_prompt_indices(len(prompts), GROUPS, 1, epoch)[group]].text for group in groups for epoch in epochs}


def equal_but_for(unequal: set[str], images, prompts, metadata) -> list[float]:
    return [size if prompt in unequal else 0.1 for size, prompt in zip(jpeg_incompressibility(images, prompts, metadata), prompts)]


def equal_in_first_group(*batch):
    return equal_but_for(drawn(range(1, GROUPS), range(EPOCHS)), *batch)


def equal_but_in_last_group(*batch):
    return equal_but_for(drawn(range(GROUPS - 1, GROUPS), range(EPOCHS)), *batch)


def equal_after_first_epoch(*batch):
    return equal_but_for(drawn(range(GROUPS), range(1)), *batch)


# ---------------------------------------------------------------------------------------------------- on each rank

def scattered(first_steps, config, rank: int, world_size: int) -> list[int]:
    """In place of `draws.deal_samples`."""
    return list(range(rank, config.groups_per_epoch * config.group_size, world_size))


def run_here(model: str, folder: Path, names: list[str]) -> None:
    """All runs of this number of ranks, one after the other in the same processes; the main rank keeps what they came to."""
    device, end, ranks = distributed.setup(), distributed.shutdown, distributed.world_size()
    gather_scores, deal_samples = distributed.gather_scores, draws.deal_samples
    seen, made = [], {}

    def weights():
        return torch.cat([p.detach().flatten() for p in made["run"].policy.parameters]).double()

    def kept_scores(*args):
        scores = gather_scores(*args)
        if len(scores["total"]) > BASE["eval_prompts"]:                                      # an epoch's
            config = made["run"].config
            group_ids = torch.arange(config.groups_per_epoch).repeat_interleave(config.group_size)
            seen.append((scores["total"], group_advantages(scores["total"], group_ids, config.advantage_std)))
        return scores

    def training(run):
        made["run"] = run
        made["before"] = weights()
        train.train(run)

    distributed.setup, distributed.shutdown = lambda *_: device, lambda: None            # one process group for all runs
    distributed.gather_scores = kept_scores
    for name in names:
        for size, place in cases(name, ranks):
            draws.deal_samples = deal_samples if place == "contiguous" else scattered
            run = f"{name}, {ranks} x {size}, {place}"
            words = flags(**{**BASE, **SETTINGS[name], "model": model, "output_dir": folder / "runs", "run_name": run,
                             "rollout_batch": size, "train_batch": size})
            seen.clear()
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                launch(words, training, train.evaluate)
            rewards, advantages = (torch.stack(part) for part in zip(*seen))                                   # (epochs, N)
            if distributed.is_main():
                torch.save({"rewards": rewards, "advantages": advantages, "weights": weights(),
                            "their change": weights() - made["before"], "seconds": time.perf_counter() - started},
                           folder / f"{run}.pt")
    end()


# -------------------------------------------------------------------------------------------------------- the table

def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||a||; 0 where both are zero."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / a.norm()).item() if a.any() else float(b.any())


def main(names: list[str]) -> int:
    worst, started, compared = {}, time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_small_sd3(folder / "model")
        for ranks in RANKS:
            result = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__, "--here",
                 folder / "model", folder, *names], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            if result.returncode:
                print(result.stdout[-3000:], result.stderr[-6000:])
                return 1
            print(f"{f'settings, {ranks} rank' + 's' * (ranks > 1):<34}{'micro-batch':>12}  {'samples':<12}"
                  + "".join(f"{key:>14}" for key in (*COMPARED, "seconds")))
            for name in names:
                reference = torch.load(folder / f"{name}, 1 x 16, contiguous.pt")
                for size, place in cases(name, ranks):
                    found = torch.load(folder / f"{name}, {ranks} x {size}, {place}.pt")
                    off = [difference(reference[key], found[key]) for key in COMPARED]
                    print(f"{name:<34}{size:>12}  {place:<12}" + "".join(f"{value:>14.1e}" for value in off)
                          + f"{found['seconds']:>14.1f}", flush=True)
                    worst.setdefault(name.startswith("float32"), []).append(off)
                    compared += (ranks, size, place) != (1, 16, "contiguous")
    for in_float32, rows in sorted(worst.items()):
        print(f"{'float32' if in_float32 else 'float64'}: largest relative differences: "
              + ", ".join(f"{key} {max(column):.1e}" for key, column in zip(COMPARED, zip(*rows))))
    print(f"{compared} runs compared in {time.perf_counter() - started:.0f} s")
    return int(any(max(row) > TOLERANCE for row in worst.get(False, [])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        run_here(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        names = sys.argv[1:] or list(SETTINGS)
        unknown = set(names) - set(SETTINGS)
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(SETTINGS)}" if unknown else main(names))
