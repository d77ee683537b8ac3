"""What many ranks cost outside the neural network: python -m proofs.many_ranks [--ranks 8 16 32 64]

So many gloo processes of train.py's own main on this machine train two epochs of 64 images on a small random
StableDiffusion3Pipeline. A process that has imported everything and has no other thread forks the ranks, which share its pages
and start in the middle: their own start-up leaves out the imports. This script is the launcher and holds the store.

Collectives are counted where distributed.py calls torch.distributed, under the name of the function that the trainer called;
bytes are those that a rank hands over to be sent, the most of any rank; the processor's time is the median's. The store's traffic is what the kernel says of its
connections. The times are of processes that share the cores, far more of them than cores; they show how times grow, not what
they are on machines with a core a rank. The last table has no such times: it is arithmetic from the counts and published
speeds of links.

Ends with 1 if a count of rounds grows faster than the logarithm of the ranks, or the run directory differs.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(ROOT), str(ROOT / "assets"), str(ROOT / "tests")]

import torch.distributed as dist  # noqa: E402

IMAGES, EPOCHS, UPDATES = 64, 2, 2
SETTINGS = dict(
    resolution=(16, 32), rewards=("jpeg_incompressibility", 1), num_steps=2, window_size=0, shared_start_noise=False,
    groups_per_epoch=8, group_size=IMAGES // 8, updates_per_epoch=UPDATES, epochs=EPOCHS, lora_rank=4, lora_alpha=8,
    lora_targets=("attn.to_q", "attn.to_v"), learning_rate_half_life=0, beta=0, guidance_scale=1, eval_prompts=8, eval_num_steps=1,
    eval_images=8, eval_every=100, save_every=1, rollout_batch=8, train_batch=16, dtype="float32")
# What the trainer calls -> what it is for.
KINDS = {"gather_vectors": "statistics, stop flags", "gather_scores": "scores", "gather_objects": "pickled objects",
         "wait_for_all": "barriers", "broadcast_object": "broadcast objects", "broadcast_parameters": "broadcast weights",
         "sum_gradients": "gradients"}
PHASES = ("start-up", "an epoch", "evaluation, saving")


# ---------------------------------------------------------------------------------------------------------- on each rank

class Count:
    """Calls, rounds, sent bytes and processor seconds of each kind in each phase."""

    def __init__(self):
        import distributed
        self.phase, self.kind, self.of = PHASES[0], None, {phase: {} for phase in (*PHASES, "measuring")}
        for name in KINDS:
            setattr(distributed, name, self.labelled(getattr(distributed, name), KINDS[name]))
        dist.isend = self.counted(dist.isend, lambda size: 1)
        for place in (dist, dist.distributed_c10d):                       # the latter's by broadcast_object_list
            place.broadcast = self.counted(place.broadcast, lambda size: math.ceil(math.log2(size)))
        dist.all_reduce = self.counted(dist.all_reduce, lambda size: 2 * (size - 1))                       # gloo's is a ring

    def add(self, **numbers: float) -> None:
        self.of[self.phase].setdefault(self.kind, Counter()).update(numbers)

    def labelled(self, function, kind: str):
        def call(*arguments):
            if self.kind:                        # a part of another one
                return function(*arguments)
            self.kind, started = kind, time.thread_time()
            try:
                return function(*arguments)
            finally:
                self.add(calls=1, seconds=time.thread_time() - started)
                self.kind = None
        return call

    def counted(self, function, rounds):
        def call(tensor, *arguments, **options):
            size = dist.get_world_size()
            times = 2 * (size - 1) / size if function.__name__ == "all_reduce" else rounds(size)           # that it is sent
            self.add(rounds=rounds(size), bytes=times * tensor.numel() * tensor.element_size())
            return function(tensor, *arguments, **options)
        return call


def milliseconds(task, repeats: int = 20) -> float:
    task()
    started = time.perf_counter()
    for _ in range(repeats):
        task()
    return 1000 * (time.perf_counter() - started) / repeats


def be_rank(folder: Path, words: list[str], forked: float) -> None:
    """Train, and write what was counted. Called in a process of its own."""
    import torch
    from helpers import replace_call

    import distributed
    import train
    from harness.run import launch
    count, seconds = Count(), {}
    setup = distributed.setup

    def timed_setup(*arguments):
        started = time.perf_counter()
        device = setup(*arguments)
        seconds["connecting"] = time.perf_counter() - started
        return device

    def in_phase(original, *arguments):
        count.phase = PHASES[2]
        try:
            return original(*arguments)
        finally:
            count.phase = PHASES[1]

    def training(run) -> None:
        seconds["start-up"] = time.time() - forked
        replace_call(run, "conclude", in_phase)
        count.phase = PHASES[1]
        train.train(run)
        count.phase = "measuring"
        own = torch.zeros(8)
        parts = [torch.empty(8) for _ in range(distributed.world_size())]
        seconds["gather"] = milliseconds(lambda: distributed.gather_vectors(own))
        seconds["ring"] = milliseconds(lambda: dist.all_gather(parts, own))
        seconds["objects"] = milliseconds(lambda: distributed.gather_objects(None))
        seconds["torch's objects"] = milliseconds(lambda: dist.all_gather_object([None] * len(parts), None))
        (folder / f"at-the-end-{distributed.rank()}").touch()
        while not (folder / "looked").exists():                         # the launcher, at the store's connections
            time.sleep(0.05)

    distributed.setup = timed_setup
    counted = count.of
    launch(words, training, train.evaluate)
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps({"counts": counted, "seconds": seconds}))


def fork_ranks(ranks: int, port: int, folder: Path, model: Path) -> None:
    """Import everything, fork the ranks, and wait for them."""
    from helpers import flags                    # which imports the model's classes too

    from harness import signals
    importlib.import_module("train")
    words = flags(**SETTINGS, model=model, output_dir=folder / "runs", run_name="many")
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: no process with threads may fork"
    signals.LAUNCHER, forked, children = os.getpid(), time.time(), {}
    for rank in range(ranks):
        if not (pid := os.fork()):
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
                           "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            code = 1
            try:
                be_rank(folder, words, forked)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children[pid] = rank
    failed = [children[pid] for pid, status in (os.wait() for _ in range(ranks)) if status]
    sys.exit(f"ranks {failed} failed" if failed else 0)


# ---------------------------------------------------------------------------------------------------------- the launcher

def store_traffic(port: int) -> dict[str, int]:
    """Bytes and packets with data that went to and from a listening port, over the connections that are open."""
    text = subprocess.run(["ss", "-tinH", "sport", "=", f":{port}"], capture_output=True, text=True, check=True).stdout
    return {name: sum(map(int, re.findall(rf"\b{name}:(\d+)", text)))
            for name in ("bytes_sent", "bytes_received", "data_segs_in")}


def memory(pids: list[int]) -> float:
    """GiB that processes hold, shared pages counted once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1])
    return total / 2**20


def files_of(directory: Path) -> dict[str, int]:
    """Name -> bytes; TensorBoard puts the time into a name."""
    return {re.sub(r"tfevents\..*", "tfevents", str(path.relative_to(directory))): path.stat().st_size
            for path in directory.rglob("*") if path.is_file()}


def measure(ranks: int, folder: Path, model: Path) -> dict:
    """A run on so many ranks: what they counted, the most of any rank, and what the store and the directory saw."""
    folder.mkdir()
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, __file__, "--fork", str(ranks), str(store.port), folder, model],
                                   stdout=log, stderr=log, cwd=ROOT)
    while len(list(folder.glob("at-the-end-*"))) < ranks:
        if process.poll() is not None:
            sys.exit(f"{ranks} ranks: {(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    result = {"store": store_traffic(store.port), "GiB": memory([process.pid, *map(int, children)]),
              "sockets": max(len([f for f in Path(f"/proc/{pid}/fd").iterdir() if "socket" in os.readlink(f)]) for pid in children)}
    (folder / "looked").touch()
    if process.wait(600):
        sys.exit(f"{ranks} ranks: {(folder / 'log').read_text()[-3000:]}")
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    result["seconds"] = {name: max(f["seconds"][name] for f in found) for name in found[0]["seconds"]}
    result["counts"] = {
        phase: {kind: {name: of_ranks([f["counts"][phase][kind].get(name, 0) for f in found])
                       for name, of_ranks in (("calls", max), ("rounds", max), ("bytes", max), ("seconds", statistics.median))}
                for kind in found[0]["counts"][phase]} for phase in PHASES}
    result["files"] = files_of(folder / "runs" / "many")
    return result


# ---------------------------------------------------------------------------------------------------------- the tables

def row(name: str, values) -> None:
    print(f"{name:<44}" + "".join(f"  {value:>20}" for value in values), flush=True)


def report(of: dict[int, dict]) -> bool:
    """Print what grows; whether all is as promised."""
    row("ranks", of)
    row("start-up after the imports, s", (f"{r['seconds']['start-up']:.1f}" for r in of.values()))
    row("  of it meeting and connecting, s", (f"{r['seconds']['connecting']:.2f}" for r in of.values()))
    row("memory of all ranks, GiB", (f"{r['GiB']:.1f}" for r in of.values()))
    row("sockets of a rank", (r["sockets"] for r in of.values()))
    row("the store: MB to ranks, from ranks", (f"{r['store']['bytes_sent'] / 1e6:.2f}, {r['store']['bytes_received'] / 1e6:.2f}"
                                               for r in of.values()))
    row("the store: packets from ranks", (f"{r['store']['data_segs_in']:,}" for r in of.values()))
    row("files in the run directory", (len(r["files"]) for r in of.values()))
    row("  their kB", (f"{sum(r['files'].values()) / 1e3:,.0f}" for r in of.values()))
    print("\nms on this machine, its cores shared by all ranks")
    for name, key in (("gather_vectors", "gather"), ("  gloo's all-gather, a ring", "ring"), ("gather_objects(None)", "objects"),
                      ("  torch's all_gather_object", "torch's objects")):
        row(name, (f"{r['seconds'][key]:.1f}" for r in of.values()))
    logarithmic = True
    for phase in PHASES:
        share = EPOCHS if phase == PHASES[1] else 1
        print(f"\n{phase}: calls / rounds / bytes that a rank sends / its processor's ms")
        for kind in dict.fromkeys(kind for r in of.values() for kind in r["counts"][phase]):
            cells = [r["counts"][phase].get(kind, {}) for r in of.values()]
            row(f"  {kind}", (f"{c.get('calls', 0) / share:g}/{c.get('rounds', 0) / share:g}/{size(c.get('bytes', 0) / share)}/"
                              f"{1000 * c.get('seconds', 0) / share:.1f}" for c in cells))
            if kind != "gradients":              # a ring by gloo, on a CPU; NCCL's own choice on GPUs
                per_round = [c.get("rounds", 0) / math.ceil(math.log2(ranks)) for ranks, c in zip(of, cells)]
                logarithmic &= max(per_round) <= min(per_round) + 1e-9
    same = len({frozenset(r["files"]) for r in of.values()}) == 1
    print(f"\nrounds of all but the gradients grow as ceil(log2(ranks)): {logarithmic}; the same files at all widths: {same}")
    return logarithmic and same


def size(number: float) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:g}"


# Bytes a second in each direction, of a node of eight. An H100's NVLink has 900 GB/s in both directions together; a DGX H100 has
# eight ports of 400 Gbit/s, a DGX A100 eight of 200 (NVIDIA's data sheets). Slower Ethernet is taken as one port.
NVLINK = 450e9
LINKS = {"8 x 400 Gbit/s": 400e9, "8 x 200 Gbit/s": 200e9, "25 Gbit/s": 25e9 / 8}
TCP = 25e9 / 8          # the most that gloo, which speaks TCP, is taken to move
ROUND = 100e-6          # seconds of a small message by gloo between two nodes, taken high
GRADIENT, RECIPE_IMAGES, RECIPE_UPDATES = 4 * 18.8e6, 48 * 24, 2                                # of sd35m_ocr; docs/scaling.md
IMAGE_SECONDS = 1 / 0.875                                                                       # of an H100; the same place


def estimate(of: dict[int, dict]) -> None:
    """Print how long an epoch of sd35m_ocr is outside the neural network, for other numbers of GPUs."""
    least, widest = min(of), max(of)
    epoch = of[widest]["counts"]["an epoch"]
    small = sum(c["rounds"] for kind, c in epoch.items() if kind != "gradients") / EPOCHS / math.ceil(math.log2(widest))
    scores = epoch["scores"]["bytes"] / EPOCHS / IMAGES * widest / (widest - 1)            # of an image; a rank has its own
    busy = {ranks: sum(c["seconds"] for c in of[ranks]["counts"]["an epoch"].values()) / EPOCHS for ranks in (least, widest)}
    growth = (busy[widest] - busy[least]) / max(1, widest - least)                         # of each rank, by unpickling
    assert epoch["gradients"]["calls"] / EPOCHS == UPDATES == RECIPE_UPDATES
    print(f"\nsd35m_ocr: {RECIPE_IMAGES} images, {RECIPE_UPDATES} gradients of {GRADIENT / 1e6:.0f} MB an epoch; {small:g} small "
          f"collectives, {scores:.0f} bytes of scores an image\n\n| GPUs | between nodes | gradients, ms | small collectives | "
          "scores | processor | sum, ms | epoch of the network, s | sum's share | idle by uneven shares |\n" + "|---" * 10 + "|")
    for link, speed in LINKS.items():
        for gpus in (8, 64, 512) if link == next(iter(LINKS)) else (64, 512):                           # a node has 8
            nodes, alone = gpus // 8, gpus == 8
            # A ring of all GPUs sends twice the gradient through each of them, and through each node's ports.
            parts = (RECIPE_UPDATES * 2 * GRADIENT * (gpus - 1) / gpus / (NVLINK if alone else min(speed, NVLINK)),
                     small * math.ceil(math.log2(gpus)) * ROUND,
                     RECIPE_IMAGES * scores * (nodes - 1) / nodes / min(speed, TCP), busy[least] + growth * (gpus - least))
            busiest = math.ceil(RECIPE_IMAGES / gpus)
            network = busiest * IMAGE_SECONDS
            print(f"| {gpus} | {'one node' if alone else link} | " + "".join(f"{1e3 * part:.1f} | " for part in (*parts, sum(parts)))
                  + f"{network:.1f} | {sum(parts) / (sum(parts) + network):.2%} | {1 - RECIPE_IMAGES / gpus / busiest:.0%} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32, 64])
    widths = parser.parse_args().ranks
    if min(widths) < 2:
        sys.exit("--ranks: at least 2, because one rank sends nothing")
    from helpers import save_small_sd3
    of = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_small_sd3(folder / "model")
        for ranks in widths:
            of[ranks] = measure(ranks, folder / str(ranks), folder / "model")
            print(f"{ranks} ranks: done", file=sys.stderr, flush=True)
    fine = report(of)
    estimate(of)
    return not fine


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fork"]:
        fork_ranks(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
    else:
        sys.exit(main())
