"""Processes: who holds what, and what all of them know."""

import concurrent.futures
import contextlib
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from helpers import CHEAP, ROOT, SMALL, completed, errors_in, flags, launch_ranks

import distributed
import rewards
from config import parse_config
from harness.run import make_policy, prepare

RANKS = 3

COLLECTIVES = """
import json, os, signal, sys, threading, time
from pathlib import Path
import numpy as np
import torch
import distributed as d
from draws import rank_slice
from harness import signals

signals.end_with_launcher()
d.setup()
r = d.rank()
with signals.stopping_on_signals():                    # rank 2 alone is told, while it waits for the others, who wait for the signal
    started = time.monotonic()
    if r == 2:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        d.wait_for_all()
    else:
        while not signals.stop_asked() and time.monotonic() < started + 20:
            time.sleep(0.01)
        d.wait_for_all()
    stopped = signals.stop_asked(), time.monotonic() - started
shared = torch.nn.Parameter(torch.full((2, 2), float(r)))
single = torch.nn.Parameter(torch.full((3,), float(r)))
starts = [torch.nn.Parameter(torch.full((2,), float(r + 5)))]
if r != 1:                                       # rank 1 trained nothing
    (shared.sum() * (r + 1)).backward()
if r == 2:                                       # one parameter was reached on one rank alone
    (single.sum() * 7).backward()
d.sum_gradients([shared, single])
d.broadcast_parameters(starts)
rows = list(rank_slice(5, r, 3))
found = {
    "stopped": stopped, "remembered": signals.remembered("name", f"of rank {r}"),
    "world": d.world_size(), "main": d.is_main(),
    "object": d.broadcast_object({"from": r}),
    "vectors": d.gather_vectors(torch.tensor([float(r), 1.0])).tolist(),
    "scores": {name: values.tolist() for name, values in d.gather_scores(
        {"total": np.float32(rows), **({"of_one": np.float32(rows) + 1} if r == 1 else {})}, rows, 5).items()},
    "shared": shared.grad.tolist(), "single": single.grad.tolist(), "starts": starts[0].tolist()}
Path(sys.argv[1], f"{r}.json").write_text(json.dumps(found))
d.shutdown()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of three ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "collectives.py").write_text(COLLECTIVES)
    process = launch_ranks(folder / "collectives.py", folder, RANKS)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_gradients_are_summed_on_every_rank_also_where_one_trained_nothing(found):
    for rank in found:
        assert rank["shared"] == [[4.0, 4.0], [4.0, 4.0]]                             # 1 + 0 + 3
        assert rank["single"] == [7.0, 7.0, 7.0]


def test_objects_and_parameters_are_those_of_the_main_rank(found):
    for index, rank in enumerate(found):
        assert rank["world"] == RANKS and rank["main"] == (index == 0)
        assert rank["object"] == {"from": 0} and rank["starts"] == [5.0, 5.0]


def test_every_rank_has_the_vectors_of_all_in_their_order(found):
    assert all(rank["vectors"] == [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]] for rank in found)


def test_scores_are_gathered_whole_and_a_metric_of_one_rank_is_nan_elsewhere(found):
    for rank in found:
        assert rank["scores"]["total"] == [0.0, 1.0, 2.0, 3.0, 4.0]
        of_one = rank["scores"]["of_one"]                                             # rank 1 holds 1 and 2
        assert of_one[1:3] == [2.0, 3.0] and all(map(math.isnan, [of_one[0], *of_one[3:]]))


def test_a_signal_to_a_rank_that_waits_in_a_collective_is_soon_known_to_all(found):
    for rank in found:
        asked, seconds = rank["stopped"]
        assert asked and seconds < 15


def test_what_was_said_first_is_remembered_by_all(found):
    (name,) = {rank["remembered"] for rank in found}
    assert name.startswith("of rank ")


def test_the_collectives_of_one_process_leave_values_as_they_are():
    distributed.setup()
    try:
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        values = torch.tensor([1.5, -2.0])
        assert torch.equal(distributed.gather_vectors(values), values[None])
        assert distributed.gather_objects("own") == ["own"]
        parameter = torch.nn.Parameter(values.clone())
        (parameter ** 2).sum().backward()
        distributed.sum_gradients([parameter])
        assert torch.equal(parameter.grad, 2 * values)
        untouched = torch.nn.Parameter(values.clone())
        distributed.sum_gradients([untouched])
        assert torch.equal(untouched.grad, torch.zeros(2))
    finally:
        distributed.shutdown()


# ---- how ranks find each other -----------------------------------------------------------------------------

FORKED = """
import os, signal, sys, time
import torch
import distributed as d
ranks, port = int(sys.argv[1]), sys.argv[2]
rank = next((r for r in range(1, ranks) if not os.fork()), 0)
os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
"""
GATHERS = """
d.setup(100)
sent, isend = [], torch.distributed.isend
torch.distributed.isend = lambda *arguments: (sent.append(arguments), isend(*arguments))[1]
assert d.gather_vectors(torch.tensor([rank, -rank])).tolist() == [[r, -r] for r in range(ranks)]
assert len(sent) == int(sys.argv[3]), sent
assert d.gather_objects("x" * rank * 1000) == ["x" * r * 1000 for r in range(ranks)]
d.wait_for_all()
d.shutdown()
if not rank:
    assert [os.wait()[1] for _ in range(1, ranks)] == [0] * (ranks - 1)
"""
# Rank 1 comes late, or never, or comes and does not connect.
LATE = """
d.MEETING_SECONDS = 1
if rank:
    time.sleep(3)
d.setup(100)
d.shutdown()
"""
NEVER = """
d.MEETING_SECONDS = 1
if rank == int(sys.argv[3]):
    os._exit(0)
d.setup(3)
"""
NO_WAY = """
d.MEETING_SECONDS = 2
if rank:
    d.meet(d.find_store(rank, 100), rank, ranks, 100)
    time.sleep(6)
    os._exit(0)
d.setup(1000)
"""


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def forked(script: str, ranks: int, *words) -> subprocess.CompletedProcess:
    """Run the script in so many processes, rank 0 the parent, without a launcher."""
    command = [sys.executable, "-c", FORKED + script, str(ranks), free_port(), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("ranks, rounds", [(2, 1), (6, 3), (9, 4)])
def test_a_gather_takes_rounds_as_the_logarithm_of_the_ranks(ranks, rounds):
    done = forked(GATHERS, ranks, rounds)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_rank_that_starts_late_is_named_and_waited_for():
    done = forked(LATE, 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: of 2 ranks, 1 has not started 1 s after rank 0 did: see what the other nodes say") == 1


@pytest.mark.slow
def test_a_rank_that_never_starts_is_a_lost_rank():
    done = forked(NEVER, 3, 1)
    # Two ranks write tracebacks at the same time. The warning before said this after 1 s.
    assert done.returncode and re.search("of 3 ranks, 1 has not started [2-9] s after rank 0", done.stderr)


@pytest.mark.slow
def test_ranks_without_rank_0_name_its_address_and_end():
    done = subprocess.run([sys.executable, "-c", "import distributed as d\nd.MEETING_SECONDS = 1\nd.setup(2)"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (port := free_port())})
    assert done.returncode and f"LostRank: no rank 0 yet at 127.0.0.1:{port}: MASTER_ADDR has to be" in done.stderr
    assert f"warning: rank 1: no rank 0 yet at 127.0.0.1:{port}" in done.stderr


@pytest.mark.slow
def test_ranks_that_cannot_connect_name_the_variables_long_before_the_timeout():
    started = time.monotonic()
    done = forked(NO_WAY, 2)
    (line,) = [line for line in done.stderr.splitlines() if "ValueError: all 2 processes have started" in line]
    assert "rank 0 cannot connect to the others: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in line
    assert time.monotonic() - started < 60


# After all have met, one rank is slower than the meeting's patience, in every kind of collective.
SLOW = """
d.MEETING_SECONDS = 1
d.setup(60)
parameter = torch.nn.Parameter(torch.zeros(3))
parameter.grad = torch.ones(3)
for wait in (d.wait_for_all, lambda: d.gather_objects(rank), lambda: d.sum_gradients([parameter]), lambda: d.broadcast_object(1)):
    if rank:
        time.sleep(2)
    wait()
d.shutdown()
"""
# Rank 1 publishes where it listens, and never answers there.
SILENT = """
d.MEETING_SECONDS = 2
if rank:
    d.wait_for_all = lambda: time.sleep(30)
d.setup(1000)
"""


@pytest.mark.slow
def test_a_rank_may_take_longer_than_the_meeting_once_all_have_met():
    done = forked(SLOW, 2)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_address_that_does_not_answer_is_told_of_before_gloo_gives_up():
    done = forked(SILENT, 2)
    assert "warning: all 2 processes have started, but rank 0 cannot connect to the others: set GLOO" in done.stderr
    assert "ValueError: all 2 processes have started, but rank 0 cannot connect" in done.stderr


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_variables_of_torchrun_that_are_not_whole_are_named(monkeypatch, missing):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"RANK is set, and {missing} not: start with torchrun, or unset RANK"):
        distributed.setup(1)


def test_a_port_that_is_taken_is_named_by_rank_0(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="rank 0 cannot listen at 127.0.0.1:.*: choose another MASTER_PORT"):
            distributed.setup(1)


def test_a_start_does_not_take_an_earlier_ones_ranks_for_its_own():
    """torchrun's store outlives its workers: another start finds in it what an earlier one wrote, whole or not."""
    store = torch.distributed.HashStore()
    store.set("start", "broken off")
    with concurrent.futures.ThreadPoolExecutor() as threads:
        names = set()
        for _ in range(3):
            early = threads.submit(distributed.meet, store, 1, 2, 60.0)
            time.sleep(0.3)
            assert not early.done()
            name = distributed.meet(store, 0, 2, 60.0)
            assert early.result(10) == name
            names.add(name)
    assert len(names) == 3


DIES = """
import os, sys, time
from pathlib import Path
import distributed as d
d.setup(60)
died = Path(sys.argv[1], "died")
if d.rank() == 1 and not died.exists():
    died.touch()
    os.kill(os.getpid(), 9)
try:
    d.wait_for_all()
except d.LostRank:
    sys.exit(1)
Path(sys.argv[1], f"met-{d.rank()}").touch()
d.shutdown()
"""


@pytest.mark.slow
def test_two_launchers_start_their_ranks_again_after_one_died(tmp_path):
    """Without an agreed name for a start, a rank reads the addresses of the start before, and waits for the timeout."""
    (tmp_path / "dies.py").write_text(DIES)
    port, environment = free_port(), {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launchers = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=1", "--rdzv-id=dies",
         "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", tmp_path / "dies.py", tmp_path],
        env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for launcher in launchers:
        _, err = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, err[-3000:]
    assert {path.name for path in tmp_path.glob("met-*")} == {"met-0", "met-1"}


# ---- two nodes ---------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_nodes_that_offer_their_loopbacks_say_which_variables_to_set():
    """As gloo does where the name of a host is 127.0.1.1."""
    from proofs.node_lost import ADDRESSES, two_nodes
    script = "import distributed as d\nd.MEETING_SECONDS = 5\nd.setup()"
    with contextlib.ExitStack() as held:
        try:
            nodes = held.enter_context(two_nodes())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces can be made here ({getattr(error, 'stderr', None) or error})")
        ranks = [subprocess.Popen(
            nodes.command(rank, [sys.executable, "-c", script]), cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500",
                 "GLOO_SOCKET_IFNAME": "lo"}) for rank in range(2)]
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert all("cannot connect to the others: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in error for error in errors), errors


# ---- the device --------------------------------------------------------------------------------------------

def test_a_driver_without_cuda_is_refused_in_one_line_with_the_way_out(monkeypatch, tmp_path):
    (tmp_path / "version").touch()
    monkeypatch.setattr(distributed, "DRIVER", str(tmp_path / "version"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ValueError, match="NVIDIA driver.*install the build of PyTorch.*CUDA_VISIBLE_DEVICES= ") as caught:
        distributed.own_device()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("driver, visible", [("version", ""), ("nothing", None), ("nothing", "0")])
def test_without_a_driver_or_with_no_gpu_wanted_the_device_is_the_cpu(monkeypatch, tmp_path, driver, visible):
    (tmp_path / "version").touch()
    monkeypatch.setattr(distributed, "DRIVER", str(tmp_path / driver))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert distributed.own_device() == torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [True, False])
def test_without_a_network_interface_a_run_ends_in_one_line_with_the_way_out(tmp_path, isolated):
    """In a network of its own a process has a loopback that is down."""
    launcher = ["unshare", "--map-root-user", "--net"] if isolated else []
    if isolated and subprocess.run([*launcher, "true"], capture_output=True).returncode:
        pytest.skip("no network of its own may be made here")
    environment = {**os.environ, **({} if isolated else {"GLOO_SOCKET_IFNAME": "none_such"})}
    words = ["--rewards", "jpeg_incompressibility", "1", "--output-dir", tmp_path]
    done = subprocess.run([*launcher, sys.executable, ROOT / "train.py", *words], env=environment, capture_output=True,
                          text=True, timeout=120)
    (line,) = errors_in(done.stderr)
    assert done.returncode == 2 and line.startswith("error: gloo finds no network interface") and "Traceback" not in done.stderr
    assert "ip link set lo up" in line and line.endswith("is None" if isolated else "is 'none_such'")


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(count, local_rank, local_ranks)`: as on a machine with so many GPUs; the list of those made current."""
    def pretend(count: int, local_rank: int, local_ranks: int) -> list:
        current = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
        return current
    return pretend


@pytest.mark.parametrize("count, local_rank, local_ranks, number", [(8, 5, 8, 5), (8, 0, 1, 0), (1, 3, 1, 0), (2, 3, 2, 1)])
def test_a_rank_has_the_gpu_of_its_local_rank_modulo_their_number(gpus, count, local_rank, local_ranks, number):
    """A launcher may show each process one GPU alone, which is number 0 there."""
    current = gpus(count, local_rank, local_ranks)
    assert distributed.own_device() == torch.device("cuda", number) == current[0]


def test_attention_on_a_gpu_is_not_cudnns(gpus, monkeypatch):
    gpus(1, 0, 1)
    said = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", said.append)
    distributed.own_device()
    assert said == [False]


def test_a_rewards_file_is_imported_when_the_ranks_gpu_is_the_current_one(monkeypatch, tmp_path):
    """It may put a model on "cuda" as it is imported."""
    (tmp_path / "at_import.py").write_text("open('log', 'a').write('imported ')\ndef score(*batch): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "own_device", lambda: open("log", "a").write("set ") and torch.device("cpu"))
    prepare(["--rewards", "at_import:score", "1"])
    assert (tmp_path / "log").read_text() == "set imported "


def test_a_policy_is_made_with_its_gradient_sum_tried_and_forgotten(monkeypatch, model):
    """NCCL takes its memory at the first sum, so that batches are chosen by what is left."""
    summed, all_reduce = [], torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: (summed.append(tensor.numel()), all_reduce(tensor)))
    device = distributed.setup()
    try:
        policy = make_policy(parse_config(flags(model=model, **SMALL))[1], device)
    finally:
        distributed.shutdown()
    assert summed == [sum(p.numel() for p in policy.parameters)] and all(p.grad is None for p in policy.parameters)


def test_more_processes_than_gpus_are_refused_with_both_numbers(gpus):
    gpus(1, 0, 2)
    with pytest.raises(ValueError, match="2 processes but 1 GPUs here: lower --nproc_per_node"):
        distributed.own_device()


def test_each_thread_of_the_rewards_starts_with_what_start_thread_does():
    """A trainer sets the current GPU there, which is per thread."""
    here, started, ran = threading.local(), [], []

    def score(images, prompts, metadata):
        ran.append(here.device)
        return [1.0] * len(images)

    built = rewards.Rewards({"a": 1.0, "b": 1.0}, {"a": score, "b": score},
                            functools.partial(lambda device: (started.append(device), setattr(here, "device", device)), "cuda:1"))
    for scored in (built, rewards.Rewards({"a": 1.0}, built.components, built.start_thread)):
        scored(np.zeros((1, 8, 8, 3), np.uint8), [""], [{}])
    assert set(started) == {"cuda:1"} and ran == ["cuda:1"] * 3


FETCHES_A_MODEL = """
import os, time
def say(what):
    with open("log", "a") as log:
        log.write(f"rank {os.environ['RANK']} {what}\\n")
def build(*, device):
    say("fetches")
    time.sleep(1)
    say("has it")
    return lambda images, prompts, metadata: say("scores") or [0.5] * len(images)
"""


def test_one_rank_of_a_machine_builds_and_tries_its_rewards_before_the_others(command, tmp_path):
    """Engines may fetch a model into one directory without a lock."""
    (tmp_path / "fetches.py").write_text(FETCHES_A_MODEL)
    completed(command("fetches", 2, cwd=tmp_path, rewards=("fetches:build", 1), epochs=1, **CHEAP))
    said = (tmp_path / "log").read_text().splitlines()
    assert said[:6] == [f"rank {rank} {what}" for rank in (0, 1) for what in ("fetches", "has it", "scores")]


# ---- what a collective's error is --------------------------------------------------------------------------

def fail_with(error: Exception):
    @distributed.collective
    def fails():
        raise error
    return fails


@pytest.mark.parametrize("error", [RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"),
                                   torch.distributed.DistNetworkError("recv failed")])
def test_an_error_of_the_backend_is_a_lost_rank(error):
    with pytest.raises(distributed.LostRank):
        fail_with(error)()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes differ"),
                                   torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'")])
def test_out_of_memory_and_faults_of_the_program_pass_a_collective_as_they_are(error):
    with pytest.raises(type(error)) as caught:
        fail_with(error)()
    assert caught.value is error
