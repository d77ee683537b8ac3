"""A node whose network is cut, and comes back: python -m proofs.node_lost

Two torchrun agents in two network namespaces of this machine, joined by a virtual cable, train one run with `--nnodes 1:2`. The
cable is pulled in the middle of it: the first node has to go on alone from the last whole epoch. Then the second node's launcher
is killed, the cable is put back, and the command given again, as after a reboot: the run has to go on on both. The weights at the end
are compared with those of a run on one rank that nothing disturbed (law 6: 1e-8 in float64). It also prints after how long ranks
that cannot meet say so.

Needs root and Linux, for `ip netns`. Ends with 1 if something is not as promised.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(ROOT), str(ROOT / "assets"), str(ROOT / "tests")]

TOLERANCE = 1e-8
ADDRESSES = ("10.77.0.1", "10.77.0.2")
EPOCHS = 8
# A reward that takes as many seconds as a file says, so that the run lasts until the other node is back.
PACED = """
import time
from pathlib import Path
from rewards import jpeg_incompressibility

def size(images, prompts, metadata):
    time.sleep(float(Path(__file__).with_name("pace").read_text()) * len(images))
    return jpeg_incompressibility(images, prompts, metadata)
"""
# torchrun takes 15 s to give up a silent node, and waits for more nodes for 30 s; here 5 s.
RENDEZVOUS = "last_call_timeout=5,read_timeout=20"


class Nodes:
    """Two network namespaces and the cable between them."""

    def __init__(self):
        self.names = [f"nfg-{os.getpid()}-{node}" for node in (1, 2)]

    def command(self, node: int, words: list) -> list[str]:
        return ["ip", "netns", "exec", self.names[node], *map(str, words)]

    def plug(self, state: str) -> None:
        """Put the second node's end of the cable "up" or "down"."""
        ip("-n", self.names[1], "link", "set", "net0", state)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Raises OSError or CalledProcessError where network namespaces cannot be made."""
    nodes = Nodes()
    try:
        for name in nodes.names:
            ip("netns", "add", name)
        ip("link", "add", "net0", "netns", nodes.names[0], "type", "veth", "peer", "name", "net0", "netns", nodes.names[1])
        for name, address in zip(nodes.names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "net0")
            for link in ("lo", "net0"):
                ip("-n", name, "link", "set", link, "up")
        yield nodes
    finally:
        for name in nodes.names:                                         # the cable goes with them
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


class Run:
    """One run's agents, and what they said."""

    def __init__(self, nodes: Nodes, folder: Path, settings: list[str]):
        self.nodes, self.folder, self.settings, self.agents = nodes, folder, settings, {}

    def start(self, node: int, name: str, interface: str = "net0", timeout: float = 20) -> None:
        """The same command on each node. `TORCH_DISABLE_SHARE_RDZV_TCP_STORE`: a node that comes later must find the store."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=5",
                   "--rdzv-id=lost", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400",
                   f"--rdzv-conf={RENDEZVOUS},is_host={'false' if node else 'true'}", f"--local-addr={ADDRESSES[node]}",
                   ROOT / "train.py", *self.settings, "--run-name", name, "--collective-timeout", timeout]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "GLOO_SOCKET_IFNAME": interface,
                       "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(self.log(node), "a") as log:
            self.agents[node] = subprocess.Popen(self.nodes.command(node, command), stdout=log, stderr=log, env=environment,
                                                 cwd=ROOT, start_new_session=True)

    def pace(self, seconds: float) -> None:
        (self.folder / "pace").write_text(str(seconds))

    def log(self, node: int) -> Path:
        return self.folder / f"node-{node}"

    def said(self, line: str, times: int = 1, node: int = 0, seconds: float = 240) -> bool:
        """Wait until a node has said so often a line with this in it, or its agent has ended."""
        end = time.monotonic() + seconds
        while (count := self.log(node).read_text().count(line)) < times and time.monotonic() < end:
            if self.agents[node].poll() is not None:
                break
            time.sleep(0.2)
        return count >= times

    def check(self, claim: str, holds: bool) -> None:
        print(f"{'   ok' if holds else 'FAILS'}  {claim}", flush=True)
        if not holds:
            lines = [self.log(node).read_text().splitlines()[-25:] for node in self.agents]
            sys.exit("\n".join(f"--- node {node + 1}: {line}" for node in self.agents for line in lines[node]))

    def stop(self, node: int) -> None:
        if self.agents[node].poll() is None:
            os.killpg(self.agents[node].pid, signal.SIGKILL)             # workers end with their agent
        self.agents[node].wait()


def lose_and_return(run: Run) -> None:
    """Pull the cable, wait for the first node alone, put it back, wait for both, and for the end."""
    run.pace(0.5)
    for node in (0, 1):
        run.start(node, "disturbed")
    run.check("the run starts on two nodes", run.said("on 2 x cpu") and run.said("epoch 2/"))
    run.nodes.plug("down")
    cut = time.monotonic()
    run.check("the cut is a lost rank within --collective-timeout 20", run.said("another rank is gone", seconds=60))
    noticed = time.monotonic() - cut
    run.check(f"the first node goes on alone: the loss was noticed after {noticed:.0f} s",
              run.said("on 1 x cpu") and run.said("continuing after epoch"))
    alone = time.monotonic() - cut
    lines = run.log(0).read_text().count("images/s")
    run.check(f"and trains: it went on {alone:.0f} s after the cut", run.said("images/s", lines + 1))
    run.pace(5)
    # Cut off, torchrun waits as long as TCP tries, a quarter of an hour. If the network is back before, it
    # ends, and closes the meeting of the launchers for all nodes. So end it first, as a reboot does.
    run.check("the worker that was cut off has ended by itself", run.said("rank 1: stopped, another rank is gone", node=1))
    run.stop(1)
    run.nodes.plug("up")
    back = time.monotonic()
    run.start(1, "disturbed")
    run.check("both go on when it is back", run.said("on 2 x cpu", 2))
    print(f"       {time.monotonic() - back:.0f} s after the cable was back", flush=True)
    run.pace(0)
    codes = [run.agents[node].wait(300) for node in (0, 1)]
    run.check("the run ends well", codes[0] == 0 and run.said(f"epoch {EPOCHS}/{EPOCHS}"))


def compare(run: Run, undisturbed: Path, disturbed: Path) -> None:
    from helpers import metrics_of, weights_of
    a, b, before = (weights_of(undisturbed, EPOCHS), weights_of(disturbed, EPOCHS), weights_of(undisturbed, 1))
    off, moved = ((a - b).norm() / a.norm()).item(), ((a - before).norm() / a.norm()).item()
    run.check(f"weights differ from an undisturbed run's by {off:.1e} (relative; training moved them by {moved:.1e})",
              off <= TOLERANCE < moved)
    epochs = [m["epoch"] for m in metrics_of(disturbed)]
    run.check("each epoch has one line of metrics", epochs == list(range(EPOCHS + 1)))


def cannot_meet(run: Run) -> None:
    """The nodes offer their loopbacks, as gloo does where a host's name is 127.0.1.1."""
    for node in (0, 1):
        run.start(node, "never", interface="lo", timeout=3600)
    line = "cannot connect to the others: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    started = time.monotonic()
    run.check("ranks that cannot meet say so in one line that names the variables", run.said(line, seconds=120))
    print(f"       {time.monotonic() - started:.0f} s after the start, imports included", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from helpers import SMALL, flags, save_small_sd3
    with tempfile.TemporaryDirectory() as folder, two_nodes() as nodes:
        folder = Path(folder)
        save_small_sd3(folder / "model")
        (folder / "paced.py").write_text(PACED)
        (folder / "pace").write_text("0")
        settings = flags(**{**SMALL, "rewards": ("paced:size", 1), "guidance_scale": 1, "epochs": EPOCHS, "beta": 0,
                            "keep_checkpoints": EPOCHS, "rollout_batch": 1, "reward_deadline": 8, "model": folder / "model", "output_dir": folder / "runs"})
        undisturbed = subprocess.run([sys.executable, ROOT / "train.py", *settings, "--run-name", "undisturbed"], cwd=ROOT,
                                     env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True)
        if undisturbed.returncode:
            sys.exit(undisturbed.stderr[-3000:])
        for scenario in (lose_and_return, cannot_meet):
            for node in (0, 1):
                (folder / f"node-{node}").unlink(missing_ok=True)
            run = Run(nodes, folder, settings)
            try:
                scenario(run)
                if scenario is lose_and_return:
                    compare(run, folder / "runs" / "undisturbed", folder / "runs" / "disturbed")
            finally:
                for node in run.agents:
                    run.stop(node)
    print("all as promised")


if __name__ == "__main__":
    main()
