"""Processes: who holds what, and what all of them know."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distributed

RANKS = 3

COLLECTIVES = """
import json, os, signal, sys, threading, time
from pathlib import Path
import torch
import distributed as d
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
    agreed = [d.any_rank(r == 2), d.any_rank(False)]
shared = torch.nn.Parameter(torch.full((2, 2), float(r)))
single = torch.nn.Parameter(torch.full((3,), float(r)))
starts = [torch.nn.Parameter(torch.full((2,), float(r + 5)))]
if r != 1:                                       # rank 1 trained nothing
    (shared.sum() * (r + 1)).backward()
if r == 2:                                       # one parameter was reached on one rank alone
    (single.sum() * 7).backward()
d.sum_gradients([shared, single])
d.broadcast_parameters(starts)
rows = list(d.share(5, r, 3))
found = {
    "stopped": stopped, "agreed": agreed, "remembered": signals.remembered("name", f"of rank {r}"),
    "world": d.world_size(), "main": d.is_main(),
    "object": d.broadcast_object({"from": r}),
    "rows": d.gather_rows(torch.tensor([[10.0 * i, 1.0] for i in rows]).reshape(-1, 2), rows, 5).tolist(),
    "one": d.gather_rows(torch.full((len(range(r, 1)), 2), 3, dtype=torch.uint8), list(range(r, 1)), 1).tolist(),
    "sum": d.sum_over_ranks(torch.tensor([float(r), 1.0])).tolist(),
    "max": d.max_over_ranks(torch.tensor(float(r if r < 2 else -r))).item(),
    "shared": shared.grad.tolist(), "single": single.grad.tolist(), "starts": starts[0].tolist()}
Path(sys.argv[1], f"{r}.json").write_text(json.dumps(found))
d.shutdown()
"""

def launch(script: Path, folder: Path, ranks: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script, folder]
    environment = {**os.environ, "PYTHONPATH": str(Path(distributed.__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of three ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "collectives.py").write_text(COLLECTIVES)
    process = launch(folder / "collectives.py", folder, RANKS)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("total, ranks", [(0, 3), (1, 1), (2, 3), (7, 3), (8, 8), (192, 5), (1152, 48)])
def test_shares_are_a_partition_in_order_that_differs_by_one_at_most(total, ranks):
    parts = [distributed.share(total, rank, ranks) for rank in range(ranks)]
    assert [i for part in parts for i in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_gradients_become_the_sum_over_ranks_on_every_rank_also_where_one_trained_nothing(found):
    for rank in found:
        assert rank["shared"] == [[4.0, 4.0], [4.0, 4.0]]                             # 1 + 0 + 3
        assert rank["single"] == [7.0, 7.0, 7.0]


def test_gathered_rows_are_whole_and_in_order_on_every_rank(found):
    for rank in found:
        assert rank["rows"] == [[0.0, 1.0], [10.0, 1.0], [20.0, 1.0], [30.0, 1.0], [40.0, 1.0]]
        assert rank["one"] == [[3, 3]]                                                # held by rank 0; the others hold none


def test_sums_maxima_objects_and_parameters_agree_on_every_rank(found):
    for index, rank in enumerate(found):
        assert rank["world"] == RANKS and rank["main"] == (index == 0)
        assert rank["object"] == {"from": 0}
        assert rank["sum"] == [3.0, 3.0] and rank["max"] == 1.0
        assert rank["starts"] == [5.0, 5.0]


def test_a_signal_to_one_rank_that_waits_in_a_collective_is_known_to_all_ranks_within_seconds(found):
    for rank in found:
        asked, seconds = rank["stopped"]
        assert asked and seconds < 15 and rank["agreed"] == [True, False]


def test_what_was_said_first_is_remembered_by_all(found):
    (name,) = {rank["remembered"] for rank in found}
    assert name.startswith("of rank ")


def test_one_process_is_world_size_one_and_its_collectives_leave_values_as_they_are():
    distributed.setup()
    try:
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        values = torch.tensor([1.5, -2.0])
        assert torch.equal(distributed.sum_over_ranks(values), values)
        assert torch.equal(distributed.max_over_ranks(values), values)
        assert torch.equal(distributed.gather_rows(values, [1, 0], 2), values.flip(0))
        parameter = torch.nn.Parameter(values.clone())
        (parameter ** 2).sum().backward()
        distributed.sum_gradients([parameter])
        assert torch.equal(parameter.grad, 2 * values)
        untouched = torch.nn.Parameter(values.clone())
        distributed.sum_gradients([untouched])
        assert torch.equal(untouched.grad, torch.zeros(2))
    finally:
        distributed.shutdown()


@pytest.mark.parametrize("granted, ranks, cores", [(2, None, 2), (2, 1, 2), (2, 2, 1), (3, 2, 1), (2, 8, 0), (64, 8, 8)])
def test_the_cores_of_a_rank_are_its_share_of_those_that_are_granted(monkeypatch, granted, ranks, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(granted)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert distributed.cores() == cores
