"""Claims about tools/bench.py: what it counts is what the plan says, and its phases are the whole epoch."""

import contextlib
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import distributed
from harness import run
from harness.batches import batch_plan
from tools import bench

FLAGS = """--rewards jpeg_incompressibility 1 --resolution 16 32 --num-steps 3 --window-size 0 --no-shared-start-noise
    --timestep-fraction 0.7 --guidance-scale 4.5 --beta 0.1 --groups-per-epoch 2 --group-size 3
    --updates-per-epoch 2 --rollout-batch 4 --train-batch 2""".split()


@pytest.fixture
def setting(model):
    device = distributed.setup()
    yield bench.Setting(["--model", model, *FLAGS], device)
    distributed.shutdown()


def test_the_rows_counted_are_the_plans_and_the_phases_add_up_to_the_epoch(setting):
    seconds = setting.watch()
    plan = batch_plan(setting.config, 1, branches=2)
    assert setting.floor.rows == {
        "rollout": plan.rollout_calls, "replay": plan.replay_calls, "reference": plan.reference_calls,
        "decode": plan.samples, "reward": plan.samples}
    phases = {phase: value for phase, (value,) in setting.phases.items()}
    assert 0.9 * seconds < sum(phases.values()) < 1.1 * seconds
    assert min(phases[phase] for phase in bench.PHASES if phase not in ("reward_wait", "waiting")) > 0
    assert distributed.around_collective is contextlib.nullcontext and "velocity" not in vars(setting.policy)

    measured = setting.floor.rate("replay", 2, 1, 0.0)
    assert 0 < measured < seconds and all(p.grad is None for p in setting.policy.parameters)
    flops = setting.floor.flops()
    assert flops["replay"] > 1.5 * flops["rollout"] > 1.5 * flops["reference"] > 0


def test_the_phase_reward_wait_is_the_metric_of_that_name(model, tmp_path, monkeypatch):
    """Rewards that sleep .2 s a batch hold up an epoch of two batches by that at least."""
    (tmp_path / "sleeps.py").write_text(
        "import time\ndef score(images, prompts, metadata):\n    time.sleep(0.2)\n    return [1] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    slow = bench.Setting(["--model", model, "--rewards", "sleeps:score", "1", *FLAGS[3:]], distributed.setup())
    slow.watch()
    distributed.shutdown()
    (phase,) = slow.phases["reward_wait"]
    assert 0.2 <= slow.scorer.waited <= phase < slow.scorer.waited + 0.1


def test_settings_whose_rows_cost_the_same_share_their_rates_and_others_do_not(setting, model):
    words = ["--model", model, *FLAGS]

    def changed_to(before: str, after: str) -> list[str]:
        return " ".join(words).replace(before, after).split()

    one_group = changed_to("--groups-per-epoch 2 --group-size 3", "--groups-per-epoch 1 --group-size 2")
    like = bench.Setting(changed_to("--num-steps 3", "--num-steps 4"), setting.device)
    unlike = [bench.Setting(changed, setting.device) for changed in ([*words, "--lora-rank", "2"], one_group)]
    for other in (like, *unlike):
        other.floor.share(setting.floor)
    assert like.floor.rates is setting.floor.rates
    assert all(other.floor.rates is not setting.floor.rates for other in unlike)


@pytest.mark.parametrize("words, said", [
    (["--rounds", "0"], "'0' is not a whole number of at least 1"),
    (["--ranks", "1.5"], "'1.5' is not a whole number"), (["--rounds"], "expected one argument"),
    (["--rounds", "1", "--", "--rounds=2"], "--rounds is given twice"),
    (["--", "--rewards", "a", "1", "--rewards", "b", "1"], "--rewards is given twice"),
    (["--json", "nowhere/bench.json"], "'nowhere' is no directory"),
    (["--", "--model", "nowhere"], "nowhere/model_index.json"),
    (["--guidance-scale", "0.5"], "--guidance-scale is 0.5"),
    (["--estimate", "--card", "H1000"], "--card 'H1000' is unknown: H100, H200, A100, RTX4090 are known"),
    (["--estimate", "--rollout-batch", "4000000"], "and --rollout-batch 4000000 needs"),
    (["--estimate", "--resolution", "24", "60"], "--resolution is (24, 60)"),
    (["--", "--windowsize", "2"], "did you mean '--window-size'")])
def test_what_is_wrong_is_said_before_anything_starts(monkeypatch, capsys, words, said):
    def leave(code: int):
        raise SystemExit(code)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(bench.sys, "argv", ["bench.py", *words])
    monkeypatch.setattr(bench.os, "execv", lambda *arguments: pytest.fail("started"))
    monkeypatch.setattr(run, "leave", leave)
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_there_are_no_more_ranks_than_cores_that_may_be_used(monkeypatch):
    commands, before = [], os.sched_getaffinity(0)
    monkeypatch.setattr(bench.os, "execv", lambda _, words: commands.append(words))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    os.sched_setaffinity(0, {min(before)})
    try:
        bench.launch([], None)
    finally:
        os.sched_setaffinity(0, before)
    assert "--nproc_per_node=1" in commands[0]


@pytest.mark.parametrize("platform, size", [("linux", 7 * 1024), ("darwin", 7)])
def test_the_memory_of_a_process_is_in_bytes(monkeypatch, platform, size):
    monkeypatch.setattr(bench.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=7))
    monkeypatch.setattr(bench.sys, "platform", platform)
    assert bench.peak_memory(torch.device("cpu")) == size


def test_what_ranks_spend_in_a_collective_beyond_the_last_to_come_is_waiting(monkeypatch):
    clock = bench.Clock(torch.device("cpu"))
    clock.collectives, clock.seconds["gather"] = [0.5, 0.25, 2.0], 3.0
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, [0.125, 0.5, 1.0]])
    clock.split_waiting()
    assert clock.seconds == {"gather": 3.0 - 0.375 - 1.0, "waiting": 0.375 + 1.0}
