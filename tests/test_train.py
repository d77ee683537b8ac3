"""The whole of it, end to end: the command that users run, on a small random model."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import alive, wait_until
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel
from PIL import Image

import distributed
import train
from harness.checkpoint import checkpoints
from config import parse_config
from harness.batches import batch_plan
from policy import Policy

ROOT = Path(train.__file__).parent
TIMES = {"seconds", "images_per_second"}               # the metrics that are not a function of the seed

# Two groups of four, three of four steps trained, two updates; in float64, so that nothing hides behind rounding.
SMALL = dict(resolution=(16, 32), rewards=("jpeg_incompressibility", 1), num_steps=4, window_size=0,
             groups_per_epoch=2, group_size=4, updates_per_epoch=2, epochs=2, lora_rank=4, lora_alpha=8,
             rollout_batch=8, train_batch=8, eval_prompts=7, eval_num_steps=2, eval_images=7, eval_every=100, save_every=1,
             dtype="float64", beta=0.1, guidance_scale=2, learning_rate_half_life=0)


def flags(**settings) -> list[str]:
    words = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [
            f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


# One group, one update, no guidance, for what does not depend on them.
CHEAP = dict(groups_per_epoch=1, updates_per_epoch=1, num_steps=3, guidance_scale=1, eval_prompts=2, eval_images=2)


class Stopped(Exception):
    """In place of the end of the process."""


@pytest.fixture(scope="module")
def train_here(model, tmp_path_factory):
    """`train_here(name, **changes)`: train.py's main in this process, as one rank; the run's directory."""
    runs, open_run = tmp_path_factory.mktemp("runs"), train.open_run

    def run(name: str, **changes) -> Path:
        locks = []

        def stopped(error, everywhere):
            raise Stopped(str(error)) from error

        def opened(*arguments):
            directory, lock, config = open_run(*arguments)
            locks.append(lock)
            return directory, lock, config

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "stop", stopped)
            patch.setattr(train, "open_run", opened)
            patch.setattr(sys, "argv", ["train.py", *flags(**{
                "model": model, "output_dir": runs, "run_name": name, **SMALL, **changes})])
            try:
                train.main()
            finally:
                if torch.distributed.is_initialized():
                    distributed.shutdown()
                for lock in locks:               # the end of the process releases it, but this one goes on
                    lock.close()
        return runs / name

    return run


@pytest.fixture(scope="module")
def start(model, tmp_path_factory):
    """`start(name, ranks, **changes)`: the real command, on so many ranks (0: without torchrun), and the run's directory.

    In place of a number, `ranks` may be the launcher's own words.
    """
    runs = tmp_path_factory.mktemp("commands")
    processes = []

    def run(name: str, ranks: int | list[str], *words: str, cwd=ROOT, path=ROOT, **changes) -> tuple[subprocess.Popen, Path]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        if isinstance(ranks, list):
            launcher = ranks
        arguments = flags(**{"model": model, "output_dir": runs, "run_name": name, **SMALL, **changes})
        process = subprocess.Popen([sys.executable, *launcher, ROOT / "train.py", *arguments, *words], cwd=cwd,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path)}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        return process, runs / name

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def command(start):
    """`command(name, ranks, **changes)`: the real command to its end: (exit code, stdout, stderr, the run's directory)."""
    def run(*args, **changes) -> tuple[int, str, str, Path]:
        process, directory = start(*args, **changes)
        out, err = process.communicate(timeout=250)
        return process.returncode, out, err, directory

    return run


def completed(result: tuple[int, str, str, Path]) -> Path:
    code, _, err, directory = result
    assert code == 0, err[-3000:]
    return directory


def errors_in(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]


def metrics_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics: list[dict]) -> list[dict]:
    return [{name: value for name, value in m.items() if name not in TIMES} for m in metrics]


def weights_of(directory: Path, epoch: int) -> torch.Tensor:
    """All trained weights, flat."""
    state = torch.load(directory / "checkpoints" / f"epoch_{epoch:05d}" / "state.pt", weights_only=True)
    assert state["epoch"] == epoch
    return torch.cat([p.flatten() for p in state["trained"]])


def images_of(directory: Path, epoch: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted((directory / "images" / f"epoch_{epoch:05d}").glob("*.png"))])


def kept_with_images(directory: Path, epoch: int) -> dict:
    """Their prompts, and the scores of each."""
    return json.loads((directory / "images" / f"epoch_{epoch:05d}" / "images.json").read_text())


def policy_of(model: str, config) -> Policy:
    return Policy(model, torch.device("cpu"), config.dtype, resolution=config.resolution,
                  max_sequence_length=config.max_sequence_length, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha, lora_targets=config.lora_targets)


def assert_same_run(one: Path, other: Path, epochs: int = 2, before: int = 1) -> None:
    """Rewards of each epoch and trained weights to 1e-8 relative; and they did move."""
    for a, b in zip(metrics_of(one)[:epochs + 1], metrics_of(other)[:epochs + 1], strict=True):
        for name in ("reward/total", "reward_std", "eval/total", "kl", "grad_norm", "zero_variance_groups"):
            if name in a and name in b:
                assert abs(a[name] - b[name]) <= 1e-8 * abs(a[name]) + 1e-25, (a["epoch"], name)     # a KL of 0 is rounding
    a, b, before = weights_of(one, epochs), weights_of(other, epochs), weights_of(one, before)
    assert (a - b).norm() <= 1e-8 * a.norm()
    assert (a - b).norm() <= 1e-6 * (a - before).norm() and (a - before).norm() > 1e-3 * a.norm()


@pytest.fixture(scope="module")
def one_rank(train_here) -> Path:
    """SMALL, two epochs, one process, everything in one batch."""
    return train_here("one-rank")


@pytest.fixture(scope="module")
def three_ranks(command) -> Path:
    """SMALL, two epochs, on a number of ranks that divides nothing."""
    return completed(command("three-ranks", 3))


FIVE = dict(epochs=5, save_every=2, eval_every=2)


@pytest.fixture(scope="module")
def two_ranks(command) -> Path:
    """Five epochs on two ranks, never interrupted."""
    return completed(command("two-ranks", 2, **FIVE))


# ------------------------------------------------------------------------------- law 4: before an update the ratio is 1

def test_the_ratio_before_the_first_update_is_exactly_one_where_the_batches_coincide(train_here):
    directory = train_here("coincide", dtype="bfloat16", rollout_batch=8, train_batch=8)      # an update has four samples
    for m in metrics_of(directory)[1:]:
        assert m["ratio_deviation_before"] == 0
        assert m["ratio_deviation"] > 1e-6                                             # the second update's ratios have moved


def test_the_ratio_before_the_first_update_is_one_to_1e_5_at_any_batch_composition_and_beyond_the_clip_range_it_warns(
        train_here, capsys):
    directory = train_here("differ", dtype="float32", rollout_batch=3, train_batch=1, rule="dance_sde", clip_range=1e-9)
    out, err = capsys.readouterr()
    measured = [f"{m['ratio_deviation_before']:.1e}" for m in metrics_of(directory)[1:]]
    assert out.count("before the first update, max |ratio - 1| is ") == 1 and f"| is {measured[0]}; clip_range is 1e-09" in out
    for epoch, deviation in enumerate(measured, 1):
        assert f"before the first update of epoch {epoch} a ratio is {deviation} from 1" in err
    assert all(cause in err for cause in ("batches of other sizes", "another dtype", "dropout"))
    for m in metrics_of(directory)[1:]:
        assert m["ratio_deviation_before"] < 1e-5 < m["ratio_deviation"]


@pytest.mark.parametrize("dtype, forward, replayed", [("float64", 4, 8), ("bfloat16", 8, 10)])
def test_full_precision_fills_batches_and_half_precision_replays_those_of_the_rollout(train_here, monkeypatch, dtype, forward, replayed):
    """Two updates of four samples, four steps of which three are trained, batches of eight: two steps of an update go in one call."""
    sizes, replay, rollout = [], train.replay, train.rollout

    def counted(function, sampled: bool):
        def inside(velocity, *arguments, **options):
            def counting(latents, sigma):
                sizes.append((sampled, len(latents)))
                return velocity(latents, sigma)
            return function(counting, *arguments, **options)
        return inside

    monkeypatch.setattr(train, "rollout", counted(rollout, True))
    monkeypatch.setattr(train, "replay", counted(replay, False))
    train_here(f"calls-{dtype}", dtype=dtype, rollout_batch=8, train_batch=8, epochs=1, eval_prompts=1)
    rollouts = [size for sampled, size in sizes if sampled and size > 1]                   # one held-out prompt besides
    replays = [size for sampled, size in sizes if not sampled]
    assert len(rollouts) == forward and sum(rollouts) == 8 * 4
    assert len(replays) == replayed and sum(replays) == 8 * 3 * 2 and max(replays) == 8    # policy and reference


# ----------------------------------------------------------------------------- law 6: a run is a function of its seed

def test_micro_batch_sizes_do_not_change_a_run(train_here, one_rank):
    assert_same_run(one_rank, train_here("small-batches", rollout_batch=3, train_batch=1))


def test_three_ranks_a_number_that_divides_nothing_do_what_one_does(one_rank, three_ranks):
    assert_same_run(one_rank, three_ranks)


def test_two_ranks_do_what_one_does_that_was_interrupted(train_here, one_rank, two_ranks, capsys):
    shutil.copytree(one_rank, one_rank.with_name("interrupted"))
    directory = train_here("interrupted", **{**FIVE, "save_every": 1})
    assert "continuing after epoch 2" in capsys.readouterr().out
    assert_same_run(two_ranks, directory, epochs=5, before=4)


def test_two_nodes_do_what_one_does(start, one_rank):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rendezvous = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-id=two-nodes", "--rdzv-backend=c10d",
                  f"--rdzv-endpoint=localhost:{port}"]
    nodes = [start("two-nodes", rendezvous) for _ in range(2)]
    for process, directory in nodes:
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, err[-3000:]
    assert_same_run(one_rank, directory)


GUARD = dict(guard=True, clip_range=1e-4, beta=0, advantage_std="group")
SHARED = dict(shared_start_noise=True, window_size=1, window_range=(0, 4), groups_per_epoch=3)
METRIC_REWARD = """
from rewards import jpeg_incompressibility

def score(images, prompts, metadata):
    size = jpeg_incompressibility(images, prompts, metadata)
    short = [len(prompt) < 15 for prompt in prompts]                     # some micro-batches have none of these
    metrics = {"twice": 2 * size}
    if any(short):
        metrics["of_short"] = [s if is_short else float("nan") for s, is_short in zip(size, short)]
    return size, metrics

def other(images, prompts, metadata):
    return images.mean((1, 2, 3))
"""
ODD = dict(**GUARD, **SHARED, rewards=("with_metrics:score", 1), eval_rewards=("with_metrics:other",), rollout_batch=2)


@pytest.fixture(scope="module")
def odd_run(train_here, tmp_path_factory):
    """GRPO-Guard, shared start noise, a reward with metrics, another for evaluation alone: the module's folder, and one rank's run."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "with_metrics.py").write_text(METRIC_REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        return folder, train_here("odd-1", **ODD)


def test_with_guard_and_shared_noise_three_ranks_that_split_groups_do_what_one_does_and_log_the_same(odd_run, command):
    folder, one = odd_run
    three = completed(command("odd-3", 3, cwd=folder, **ODD, train_batch=3))
    assert_same_run(one, three)
    for a, b in zip(metrics_of(one), metrics_of(three), strict=True):
        assert set(a) == set(b)
        assert all(abs(a[key] - b[key]) <= 1e-6 * abs(a[key]) for key in a if key.startswith(("reward/", "eval/")))


def test_on_policy_a_guarded_ratio_is_one(train_here):
    assert all(m["ratio_deviation_before"] < 1e-12 < 1e-6 < m["ratio_deviation"] for m in metrics_of(train_here("guard", **GUARD))[1:])


def test_metrics_of_rewards_and_rewards_for_evaluation_alone_are_logged_and_not_trained_on(odd_run, train_here):
    _, one = odd_run
    name = "with_metrics:score"
    before, first, last = metrics_of(one)
    for m, prefix in ((before, "eval"), (first, "reward"), (last, "reward"), (last, "eval")):
        assert m[f"{prefix}/{name}/twice"] == pytest.approx(2 * m[f"{prefix}/{name}"], rel=1e-6)
        assert m[f"{prefix}/total"] == m[f"{prefix}/{name}"]
    texts = [p.text for p in train.load_prompts("words", "test")[:7]]
    assert 0 < sum(len(text) < 15 for text in texts) < 7 and "eval/with_metrics:score/of_short" in before
    assert "eval/with_metrics:other" in last and "reward/with_metrics:other" not in last
    plain = train_here("odd-plain", **{**ODD, "rewards": ("jpeg_incompressibility", 1), "eval_rewards": ()})
    assert torch.equal(weights_of(plain, 2), weights_of(one, 2))                           # neither changed the training


def test_another_seed_is_another_run_with_the_same_evaluation_before_training(train_here, one_rank):
    other = train_here("seed", seed=2)
    assert abs(metrics_of(other)[0]["eval/total"] - metrics_of(one_rank)[0]["eval/total"]) < 1e-12
    assert np.array_equal(images_of(other, 0), images_of(one_rank, 0))
    assert metrics_of(other)[1]["reward/total"] != metrics_of(one_rank)[1]["reward/total"]
    assert (weights_of(other, 1) - weights_of(one_rank, 1)).norm() > 0.1 * weights_of(other, 1).norm()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(start, command, two_ranks):
    launcher, directory = start("killed", 2, **FIVE)
    wait_until(lambda: (directory / "checkpoints" / "epoch_00002").exists(), 200)
    workers = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and parent(int(p.name)) == launcher.pid]
    assert len(workers) == 2 and int((directory / "lock").read_text()) in workers
    time.sleep(random.uniform(0, 1.5 * metrics_of(directory)[2]["seconds"]))
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    wait_until(lambda: not any(map(alive, workers)), 5)
    assert not (directory / "checkpoints" / "epoch_00005").exists(), "it had ended before it was killed"

    code, out, err, _ = command("killed", 2, **FIVE)
    assert code == 0, err[-3000:]
    assert "continuing after epoch 2" in out or "continuing after epoch 4" in out
    assert torch.equal(weights_of(directory, 5), weights_of(two_ranks, 5))
    assert [m["epoch"] for m in metrics_of(directory)] == [0, 1, 2, 3, 4, 5]
    assert without_times(metrics_of(directory)) == without_times(metrics_of(two_ranks))
    assert np.array_equal(images_of(directory, 5), images_of(two_ranks, 5))


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def test_a_run_stopped_before_its_first_checkpoint_starts_again_and_has_each_epoch_once(train_here, one_rank):
    train_here("early", eval_only=True)                                   # what a run leaves that is killed in its first epoch
    assert [m["epoch"] for m in metrics_of(one_rank.with_name("early"))] == [0]
    directory = train_here("early")
    assert without_times(metrics_of(directory)) == without_times(metrics_of(one_rank))


def test_a_checkpoint_is_whole_or_is_not_there(one_rank, tmp_path):
    shutil.copytree(one_rank / "checkpoints", tmp_path / "checkpoints")
    for unfinished in ("partial", "epoch_00003"):
        (tmp_path / "checkpoints" / unfinished / "adapter").mkdir(parents=True)
    assert [p.name for p in checkpoints(tmp_path)] == ["epoch_00001", "epoch_00002"]


def test_every_adapter_is_kept_and_the_state_of_the_newest_two_and_of_the_best(two_ranks):
    best = max((m for m in metrics_of(two_ranks)[1:] if "eval/total" in m), key=lambda m: m["eval/total"])["epoch"]
    names = lambda pattern: sorted(p.relative_to(two_ranks / "checkpoints").parts[0] for p in two_ranks.glob(pattern))
    assert names("checkpoints/*/adapter/adapter_model.safetensors") == ["epoch_00002", "epoch_00004", "epoch_00005"]
    assert names("checkpoints/*/state.pt") == [f"epoch_{epoch:05d}" for epoch in sorted({best, 4, 5})]


def test_noise_belongs_to_its_sample_alone_and_no_two_share_any():
    draw = lambda *key: train.draw_noise(*key, 2, (3, 4))                                        # (2, B, 3, 4)
    together = draw(1, train.TRAIN_NOISE, 5, [0, 7, 2])
    assert torch.equal(together[:, 1:2], draw(1, train.TRAIN_NOISE, 5, [7]))
    others = [together.flatten(), *(draw(*key).flatten() for key in [
        (1, train.TRAIN_NOISE, 5, [1]), (1, train.TRAIN_NOISE, 6, [0]), (2, train.TRAIN_NOISE, 5, [0]),
        (1, train.EVAL_NOISE, 5, [0])])]
    values = torch.cat(others)
    assert len(values.unique()) == len(values)


def test_windows_are_drawn_for_each_group_and_epoch_within_their_range():
    _, config = parse_config("--window-size 2 --window-range 1 6 --groups-per-epoch 50".split())
    first, second = train.draw_windows(config, 1), train.draw_windows(config, 2)
    assert set(first.tolist()) == {1, 2, 3, 4} and not torch.equal(first, second)
    assert torch.equal(first, train.draw_windows(config, 1))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("group_size", [6, 5])                               # which the two updates divide, or do not
def test_ranks_hold_each_sample_once_and_shared_starts_even_out_their_work(world_size, group_size):
    _, config = parse_config(["--groups-per-epoch", "48", "--group-size", f"{group_size}", "--updates-per-epoch", "2", "--num-steps", "10",
                              "--window-size", "2", "--shared-start-noise"])
    longest = {}
    for dealt in (replace(config, shared_start_noise=False), config):
        for epoch in range(20):
            windows = train.draw_windows(config, epoch)
            shares = [train.share_of_samples(windows, dealt, rank, world_size) for rank in range(world_size)]
            assert sorted(i for share in shares for i in share) == list(range(48 * group_size))
            for update in range(2):
                assert max(counts := [sum(i % 2 == update for i in share) for share in shares]) - min(counts) <= 1
            work = max(sum(10 - int(windows[i // group_size]) for i in share) for share in shares)
            longest[dealt.shared_start_noise] = longest.get(dealt.shared_start_noise, 0) + work
    if group_size == 5 or world_size in (1, 50):
        assert longest[True] <= longest[False]
    else:
        assert longest[True] < 0.99 * longest[False]


def test_the_learning_rate_halves_and_does_not_depend_on_how_long_the_run_will_be(train_here):
    rates = {epochs: [m["learning_rate"] for m in metrics_of(train_here(f"rate-{epochs}", **{
        **CHEAP, "epochs": epochs, "learning_rate": 0.01, "learning_rate_half_life": 2})) if m["epoch"]] for epochs in (2, 4)}
    assert np.allclose(rates[4], [0.01 * 2 ** (-epoch / 2) for epoch in range(4)], rtol=1e-12) and rates[2] == rates[4][:2]


# ------------------------------------------------------------------------------------- law 7, and what an epoch computes

def test_gradients_meet_once_per_update_and_the_network_is_called_as_often_as_planned(train_here, monkeypatch):
    reduced, rows = [], [0]
    all_reduce, forward = torch.distributed.all_reduce, SD3Transformer2DModel.forward

    def counted_all_reduce(tensor, *args, **kwargs):
        reduced.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    def counted_forward(self, hidden_states, *args, **kwargs):
        rows[0] += len(hidden_states)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(torch.distributed, "all_reduce", counted_all_reduce)
    monkeypatch.setattr(SD3Transformer2DModel, "forward", counted_forward)
    directory = train_here("counted", rollout_batch=3, train_batch=1, updates_per_epoch=3, epochs=1)
    weights = weights_of(directory, 1).numel()
    assert [n for n in reduced if n >= weights] == [weights] * 3                           # updates
    assert not [n for n in reduced if 1000 < n < weights and n != 7 * 16 * 32 * 3]         # nor in pieces; the images apart

    _, config = parse_config(flags(**{**SMALL, "updates_per_epoch": 3}))
    plan = batch_plan(config, 1, branches=2)
    evaluation = 7 * config.eval_num_steps * 2                                             # both branches
    assert rows[0] == plan.rollout_calls + plan.replay_calls + plan.reference_calls + 2 * evaluation


def test_a_shared_prefix_changes_no_latents_and_saves_the_calls_that_arithmetic_says(model, monkeypatch):
    _, config = parse_config(flags(**{**SMALL, **SHARED, "model": model, "num_steps": 6, "window_range": (0, 6)}))
    policy, rewards = policy_of(model, config), train.build_rewards(dict(config.rewards))
    sigmas = train.timestep_schedule(config.num_steps, **policy.schedule_arguments(config.num_steps), dtype=torch.float64)
    prompts, rows, forward, epoch = train.load_prompts(config.prompts, "train"), [0], SD3Transformer2DModel.forward, 2

    def counted_forward(self, hidden_states, *args, **kwargs):
        rows[0] += len(hidden_states)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counted_forward)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    with train.ThreadPoolExecutor(1) as scorer:
        samples = train.sample_epoch(policy, rewards, prompts, sigmas, config, epoch, scorer)
    K, T, windows = config.group_size, config.num_steps, train.draw_windows(config, epoch)
    assert len(windows.unique()) > 1
    saved = (K - 1) * int(windows.sum())
    assert rows[0] == 2 * (len(samples.indices) * T - saved)                               # 2: guidance

    # Without sharing: each image all the way from its group's start noise, alone.
    for j, i in enumerate(samples.indices):
        first = int(windows[i // K])
        start = train.draw_noise(config.seed, train.GROUP_NOISE, epoch, [i // K], 1, policy.latent_shape)[0].double()
        noise = train.draw_noise(config.seed, train.TRAIN_NOISE, epoch, [i], T + 1, policy.latent_shape)[1:].double()
        levels = torch.zeros(T, dtype=torch.float64)
        levels[first] = config.noise_level
        velocity = policy.velocity(policy.encode([samples.prompts[j].text]), config.guidance_scale)
        alone = train.rollout(velocity, start, sigmas, levels, noise, config.rule, first, 1)
        assert (alone.final[0] - samples.trajectory.final[j]).abs().max() < 1e-8
        assert (alone.log_probs[0, 0] - samples.trajectory.log_probs[0, j]).abs() < 1e-8


def test_the_plan_of_a_shared_prefix_is_its_average_over_windows():
    _, config = parse_config("--window-size 2 --window-range 0 5 --shared-start-noise --groups-per-epoch 4 --group-size 6".split())
    calls = [4 * 6 * config.num_steps - 4 * 5 * first for first in range(4)]                 # by where a window may start
    assert batch_plan(config, 1).rollout_calls == np.mean(calls)


def test_the_guarded_gradient_is_reinforce_weighted_by_std_over_the_length_of_the_step(train_here, model):
    settings = {**SMALL, **GUARD, "updates_per_epoch": 1, "max_grad_norm": 1e-12}
    metrics = metrics_of(train_here("guarded-gradient", **{**settings, "epochs": 1}))[1]
    _, config = parse_config(flags(**settings))
    torch.manual_seed(config.seed)
    distributed.setup()
    try:
        policy = policy_of(model, config)
        sigmas = train.timestep_schedule(config.num_steps, **policy.schedule_arguments(config.num_steps), dtype=torch.float64)
        with train.ThreadPoolExecutor(1) as scorer:
            samples = train.sample_epoch(policy, train.build_rewards(dict(config.rewards)),
                                         train.load_prompts(config.prompts, "train"), sigmas, config, 1, scorer)
    finally:
        distributed.shutdown()
    r = torch.from_numpy(samples.scores["total"]).double().view(2, 4)
    A = ((r - r.mean(1, keepdim=True)) / (r.std(1, correction=0, keepdim=True) + 1e-4)).flatten()      # (N,)
    velocity, loss = policy.velocity(policy.encode([p.text for p in samples.prompts]), config.guidance_scale), 0
    for k in range(3):
        log_prob, _, std = train.replay(velocity, samples.trajectory, k)
        loss = loss - (A * std.flatten() / (sigmas[k] - sigmas[k + 1]) * log_prob).mean() / 3
    gradients = torch.autograd.grad(loss, policy.parameters, allow_unused=True, materialize_grads=True)
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert abs(metrics["grad_norm"] - norm) < 1e-6 * norm


def test_the_gradient_is_that_of_the_mean_over_all_samples_and_trained_steps(train_here, model):
    settings = {**SMALL, "updates_per_epoch": 1, "beta": 0, "max_grad_norm": 1e-12}         # metrics: the norm before clipping
    metrics = metrics_of(train_here("gradient", **{**settings, "epochs": 1, "train_batch": 3}))[1]
    _, config = parse_config(flags(**settings))
    torch.manual_seed(config.seed)
    distributed.setup()
    try:
        policy = policy_of(model, config)
        rewards = train.build_rewards(dict(config.rewards))
        sigmas = train.timestep_schedule(config.num_steps, **policy.schedule_arguments(config.num_steps), dtype=torch.float64)
        with train.ThreadPoolExecutor(1) as scorer:
            samples = train.sample_epoch(policy, rewards, train.load_prompts(config.prompts, "train"), sigmas, config, 1, scorer)
    finally:
        distributed.shutdown()
    r = torch.from_numpy(samples.scores["total"]).double().view(2, 4)
    A = ((r - r.mean(1, keepdim=True)) / (r.std(correction=0) + 1e-4)).flatten()                       # (N,)
    velocity = policy.velocity(policy.encode([p.text for p in samples.prompts]), config.guidance_scale)
    # At rho = 1, REINFORCE: -mean over N samples and S steps of A grad log pi.
    loss = -torch.stack([A * train.replay(velocity, samples.trajectory, k)[0] for k in range(3)]).mean()
    gradients = torch.autograd.grad(loss, policy.parameters, allow_unused=True, materialize_grads=True)
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert abs(metrics["grad_norm"] - norm) < 1e-6 * norm                                   # advantages are stored in float32
    assert abs(metrics["reward/total"] - r.mean().item()) < 1e-6


def test_the_exact_kl_is_the_per_time_kl_over_the_length_of_the_step(train_here):
    settings = dict(CHEAP, epochs=1, updates_per_epoch=2, window_size=1, window_range=(1, 2), beta=1e-12, dtype="float64")
    kl = {form: metrics_of(train_here(f"kl-{form}", kl=form, **settings))[1]["kl"] for form in ("exact", "per_time")}
    sigmas = train.timestep_schedule(3, 3.0, dtype=torch.float64)
    assert abs(kl["exact"] * (sigmas[1] - sigmas[2]).item() / kl["per_time"] - 1) < 1e-6 and kl["exact"] > 0


def test_equal_rewards_without_kl_leave_the_weights_to_the_weight_decay(train_here, tmp_path, monkeypatch):
    (tmp_path / "constant_reward.py").write_text("def score(images, prompts, metadata):\n    return [0.1] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    directory = train_here("constant", rewards=("constant_reward:score", 1), beta=0, weight_decay=0.5, learning_rate=1e-2)
    before, after = weights_of(directory, 1), weights_of(directory, 2)
    assert (after - before * (1 - 0.5 * 1e-2) ** 2).abs().max() < 1e-14 and before.norm() > 0.1
    for m in metrics_of(directory)[1:]:
        assert m["zero_variance_groups"] == 2 and m["grad_norm"] == 0 and m["ratio"] == 1 and m["policy_loss"] == 0


def test_the_kl_moves_weights_where_rewards_are_equal_and_pulls_them_to_the_reference(train_here, tmp_path, monkeypatch):
    (tmp_path / "first_epoch_reward.py").write_text(
        "from rewards import jpeg_incompressibility\ncalls = 0\n"
        "def score(images, prompts, metadata):\n    global calls\n    calls += 1\n"
        "    return jpeg_incompressibility(images, prompts, metadata) * (calls == 3)\n")    # after the probe and the evaluation
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    settings = dict(rewards=("first_epoch_reward:score", 1), epochs=4, learning_rate=3e-3, max_grad_norm=100, **CHEAP)
    kl = {}
    for beta in (1e-9, 10.0):
        sys.modules.pop("first_epoch_reward", None)
        metrics = metrics_of(train_here(f"beta-{beta}", beta=beta, **settings))
        assert all(m["zero_variance_groups"] == 1 for m in metrics[2:])
        kl[beta] = metrics[-1]["kl"]
    assert kl[10.0] < 0.5 * kl[1e-9]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_in_half_precision_trains_and_continues(train_here, dtype):
    train_here(dtype, dtype=dtype, epochs=1, **CHEAP)
    directory = train_here(dtype, dtype=dtype, epochs=2, **CHEAP)
    assert [m["epoch"] for m in metrics_of(directory)] == [0, 1, 2]
    assert all(m["ratio_deviation_before"] < 0.02 for m in metrics_of(directory)[1:])
    assert metrics_of(directory)[-1]["overflows"] == 0 and metrics_of(directory)[-1]["grad_norm"] > 0
    assert weights_of(directory, 2).dtype == torch.float32 and weights_of(directory, 2).isfinite().all()
    assert not torch.equal(weights_of(directory, 2), weights_of(directory, 1))


def test_a_fully_fine_tuned_run_saves_its_averaged_transformer_for_diffusers(train_here, model):
    directory = train_here("full", dtype="float32", full_finetune=True, epochs=1, ema_decay=0.5)
    checkpoint = directory / "checkpoints" / "epoch_00001"
    loaded = SD3Transformer2DModel.from_pretrained(checkpoint / "transformer")
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    base = SD3Transformer2DModel.from_pretrained(model, subfolder="transformer")
    for p, averaged, trained in zip(loaded.parameters(), state["average"], state["trained"], strict=True):
        assert torch.equal(p, averaged) and p.shape == trained.shape
    distance = lambda weights: sum((p - q).square().sum() for p, q in zip(base.parameters(), weights)).sqrt()
    assert 0 < distance(state["average"]) < distance(state["trained"])


# ------------------------------------------------------------------------------- law 8: every evaluation prompt counts once

@pytest.mark.parametrize("epoch", [0, 2])
def test_the_evaluation_is_the_mean_over_prompts_each_drawn_alone_with_noise_of_its_own_by_averaged_weights(model, one_rank, epoch):
    _, config = parse_config(flags(**SMALL))
    policy = policy_of(model, config)
    if epoch:
        state = torch.load(one_rank / "checkpoints" / f"epoch_{epoch:05d}" / "state.pt", weights_only=True)
        with torch.no_grad():
            for p, averaged in zip(policy.parameters, state["average"], strict=True):
                p.copy_(averaged)
        assert any(not torch.equal(*pair) for pair in zip(state["average"], state["trained"]))
    schedule = policy.schedule_arguments(config.eval_num_steps)
    sigmas = train.timestep_schedule(config.eval_num_steps, **schedule, dtype=torch.float64)
    images, prompts = [], train.load_prompts(config.prompts, "test")[:7]
    for i, prompt in enumerate(prompts):
        noise = train.draw_noise(0, train.EVAL_NOISE, 0, [i], 1, policy.latent_shape)[0].double()
        velocity = policy.velocity(policy.encode([prompt.text]), config.guidance_scale)
        images.append(policy.decode(train.rollout(velocity, noise, sigmas, 0.0, None).final)[0].numpy())
    assert np.array_equal(np.stack(images), images_of(one_rank, epoch))
    assert len({image.tobytes() for image in images}) == 7
    scores = train.build_rewards(dict(config.rewards))(np.stack(images), [""] * 7, [{}] * 7)["total"]
    assert abs(scores.astype(float).mean() - metrics_of(one_rank)[epoch]["eval/total"]) < 1e-12
    kept = kept_with_images(one_rank, epoch)
    assert kept["prompts"] == [prompt.text for prompt in prompts]
    assert np.allclose(kept["scores"]["total"], scores, rtol=1e-5, atol=0) and len(set(kept["scores"]["total"])) > 3


def test_the_evaluation_depends_neither_on_the_ranks_nor_on_the_batch(train_here, one_rank, three_ranks):
    in_threes = train_here("in-threes", rollout_batch=3)
    for epoch, line in ((0, 0), (2, -1)):
        expected = metrics_of(one_rank)[line]
        for other in (three_ranks, in_threes):
            assert abs(metrics_of(other)[line]["eval/total"] - expected["eval/total"]) < 1e-12
            assert np.array_equal(images_of(other, epoch), images_of(one_rank, epoch))
            assert kept_with_images(other, epoch) == kept_with_images(one_rank, epoch)
    assert not np.array_equal(images_of(one_rank, 0), images_of(one_rank, 2))


def test_eval_only_evaluates_the_averaged_weights_of_the_last_checkpoint_and_changes_nothing_else(train_here, one_rank, capsys):
    directory = one_rank.with_name("eval-only")
    shutil.copytree(one_rank, directory)
    shutil.rmtree(directory / "images")
    later = json.dumps({**metrics_of(one_rank)[-1], "epoch": 3}) + "\n"                     # of a run that goes on elsewhere
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(later)
    train_here("eval-only", eval_only=True)
    assert metrics_of(directory)[-1] == json.loads(later)
    last = metrics_of(one_rank)[-1]
    assert f"epoch 2: eval/jpeg_incompressibility {last['eval/jpeg_incompressibility']:.4f}" in capsys.readouterr().out
    assert np.array_equal(images_of(directory, 2), images_of(one_rank, 2))
    assert metrics_of(directory)[:-1] == metrics_of(one_rank)
    assert torch.equal(weights_of(directory, 2), weights_of(one_rank, 2))


# -------------------------------------------------------------------------------------------------------- bundled model

def test_the_bundled_model_draws_with_diffusers_alone_and_takes_a_trained_adapter_from_peft(train_here):
    bundled = str(ROOT / "assets" / "tiny-sd3")
    pipe = StableDiffusion3Pipeline.from_pretrained(bundled)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        return np.asarray(pipe('the word "lamp"', height=24, width=64, num_inference_steps=8, guidance_scale=2,
                               max_sequence_length=12, generator=torch.Generator().manual_seed(0)).images[0])

    base = draw()
    assert base.shape == (24, 64, 3) and base.std() > 5
    directory = train_here("bundled", model=bundled, resolution=(24, 64), rewards=("rapidocr_line", 1), dtype="float32",
                           epochs=1, learning_rate=1e-2)
    checkpoint = directory / "checkpoints" / "epoch_00001"
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, checkpoint / "adapter")
    adapter = [p for name, p in pipe.transformer.named_parameters() if "lora_" in name]
    averaged = torch.load(checkpoint / "state.pt", weights_only=True)["average"]
    assert all(torch.equal(p, q) for p, q in zip(adapter, averaged, strict=True))
    assert not np.array_equal(draw(), base)
    with pipe.transformer.disable_adapter():
        assert np.array_equal(draw(), base)


@pytest.mark.parametrize("cores, order", [(1, "sample score sample score"), (2, "sample sample score score")])
def test_scores_are_computed_beside_the_next_batch_but_by_a_rank_of_one_core_before_it(train_here, monkeypatch, cores, order):
    order, events, rollout, score = 3 * order.split(), [], train.rollout, train.score                    # evaluation, epoch, evaluation

    def sampled(*arguments, **options):
        events.append("sample")
        return rollout(*arguments, **options)

    def scored(*arguments):
        wait_until(lambda: order[:len(events) + 1] == [*events, "score"], 20)
        time.sleep(0.3)                          # for who does not wait to go on
        events.append("score")
        return score(*arguments)

    monkeypatch.setattr(train, "rollout", sampled)
    monkeypatch.setattr(train, "score", scored)
    monkeypatch.setattr(distributed, "cores", lambda: cores)
    train_here(f"cores-{cores}", **{**CHEAP, "epochs": 1, "rollout_batch": 2, "eval_prompts": 4})
    assert events == order


# ------------------------------------------------------------------------------------------------------------ batch sizes

def test_batches_that_are_not_given_are_chosen_and_change_no_more_than_rounding(train_here, one_rank, capsys):
    directory = train_here("chosen", rollout_batch=0, train_batch=0)
    assert "any number" not in capsys.readouterr().out
    chosen, given = weights_of(directory, 2), weights_of(one_rank, 2)
    assert (chosen - given).abs().max() < 1e-8 * given.abs().max()
