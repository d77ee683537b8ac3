"""The whole of it, end to end: the command that users run, on a small random model."""

import json
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from helpers import (
    CHEAP, GUARD, ROOT, SHARED, SMALL, alive, assert_same_run, completed, flags, images_of, kept_with_images, metrics_of,
    policy_of, replace_call, wait_until, weights_of, without_times)
from peft import PeftModel

import distributed
import learner
import train
from config import parse_config
from draws import EVAL_NOISE, GROUP_NOISE, TRAIN_NOISE, draw_noise, draw_first_steps
from harness.batches import batch_plan
from harness.checkpoint import checkpoints
from harness.run import make_rewards
from harness.scoring import Scorer
from prompts import load_prompts
from sampler import replay, rollout, timestep_schedule

CPU = torch.device("cpu")


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


@pytest.mark.slow
def test_the_ratio_before_the_first_update_is_one_to_1e_5_at_any_batch_composition(train_here):
    directory = train_here("differ", dtype="float32", rollout_batch=3, train_batch=1, rule="dance_sde", clip_range=1e-9)
    for m in metrics_of(directory)[1:]:
        assert m["ratio_deviation_before"] < 1e-5 < m["ratio_deviation"]


def test_a_ratio_beyond_the_clip_range_before_the_first_update_is_a_warning_in_each_epoch(train_here, capsys):
    directory = train_here("warns", dtype="float32", rollout_batch=3, train_batch=1, clip_range=1e-9, **CHEAP)
    measured = [f"{m['ratio_deviation_before']:.1e}" for m in metrics_of(directory)[1:]]
    err = capsys.readouterr().err
    for epoch, deviation in enumerate(measured, 1):
        assert f"before the first update of epoch {epoch} a ratio is {deviation} from 1" in err
    assert all(cause in err for cause in ("batches of other sizes", "another dtype", "dropout"))


def test_the_ratio_before_a_runs_first_update_is_said_once_beside_the_clip_range(train_here, capsys):
    directory = train_here("says", **CHEAP)
    deviation = metrics_of(directory)[1]["ratio_deviation_before"]
    says = "before the first update, max |ratio - 1| is "
    out = capsys.readouterr().out
    assert out.count(says) == 1 and f"{says}{deviation:.1e}; clip_range is 0.002" in out


def count_velocities(policy) -> list[tuple[str, int]]:
    """A list that will hold what each call of a velocity was for, and how many images or rows it took."""
    calls, reference = [], []

    def counting(velocity, text, scale=1.0, **which):
        inner, kind = velocity(text, scale, **which), reference and "reference"

        def counted(latents, sigma):
            calls.append((kind or ("replay" if torch.is_grad_enabled() else "rollout"), len(latents)))
            return inner(latents, sigma)
        return counted

    def referring(velocity, *arguments):
        reference.append(True)
        inner = velocity(*arguments)
        reference.clear()
        return inner

    replace_call(policy, "velocity", counting)
    replace_call(policy, "reference_velocity", referring)
    return calls


@pytest.mark.parametrize("dtype, rollouts, replays", [("float64", [8] * 4, [6] * 4), ("bfloat16", [4] * 8, [4] * 6)])
def test_full_precision_fills_batches_and_half_precision_replays_the_rollouts(train_here, dtype, rollouts, replays):
    """Two updates of four samples, four steps of which three are trained, batches of up to eight."""
    calls = []
    train_here(f"calls-{dtype}", lambda run: calls.append(count_velocities(run.policy)), dtype=dtype, rollout_batch=8,
               train_batch=8, epochs=1, eval_prompts=1)
    sizes = {kind: [size for called, size in calls[0] if called == kind] for kind in ("rollout", "replay", "reference")}
    # One held-out prompt is drawn besides, and its drift takes a call of the policy and one of the reference.
    assert [size for size in sizes["rollout"] if size > 1] == rollouts
    assert sizes["replay"] == [size for size in sizes["reference"] if size > 1] == replays


# ----------------------------------------------------------------------------- law 6: a run is a function of its seed

@pytest.mark.slow
def test_micro_batch_sizes_do_not_change_a_run(train_here, one_rank):
    assert_same_run(one_rank, train_here("small-batches", rollout_batch=3, train_batch=1))


def test_three_ranks_a_number_that_divides_nothing_do_what_one_does(one_rank, three_ranks):
    assert_same_run(one_rank, three_ranks)


def test_more_ranks_than_samples_do_what_one_does(train_here, command):
    """Some ranks have nothing to sample, to train and to evaluate."""
    settings = {**CHEAP, "group_size": 2, "eval_prompts": 1, "eval_images": 1}
    assert_same_run(train_here("two-samples", **settings), completed(command("two-samples-on-three", 3, **settings)))


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
    directory = nodes[0][1]
    for process, _ in nodes:
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, err[-3000:]
    assert_same_run(one_rank, directory)


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


def test_with_guard_and_shared_noise_three_ranks_that_split_groups_do_what_one_does(odd_run, command):
    folder, one = odd_run
    three = completed(command("odd-3", 3, cwd=folder, **ODD, train_batch=3))
    assert_same_run(one, three)
    for a, b in zip(metrics_of(one), metrics_of(three), strict=True):
        assert set(a) == set(b)
        assert all(abs(a[key] - b[key]) <= 1e-6 * abs(a[key]) for key in a if key.startswith(("reward/", "eval/")))


@pytest.mark.slow
def test_on_policy_a_guarded_ratio_is_one(train_here):
    assert all(m["ratio_deviation_before"] < 1e-12 < 1e-6 < m["ratio_deviation"] for m in metrics_of(train_here("guard", **GUARD))[1:])


@pytest.mark.slow
def test_metrics_and_rewards_for_evaluation_alone_are_logged_and_not_trained_on(odd_run, train_here):
    _, one = odd_run
    name = "with_metrics:score"
    before, first, last = metrics_of(one)
    for m, prefix in ((before, "eval"), (first, "reward"), (last, "reward"), (last, "eval")):
        assert m[f"{prefix}/{name}/twice"] == pytest.approx(2 * m[f"{prefix}/{name}"], rel=1e-6)
        assert m[f"{prefix}/total"] == m[f"{prefix}/{name}"]
    texts = [p.text for p in load_prompts("words", "test")[:7]]
    assert 0 < sum(len(text) < 15 for text in texts) < 7 and "eval/with_metrics:score/of_short" in before
    assert "eval/with_metrics:other" in last and "reward/with_metrics:other" not in last
    plain = train_here("odd-plain", **{**ODD, "rewards": ("jpeg_incompressibility", 1), "eval_rewards": ()})
    assert torch.equal(weights_of(plain, 2), weights_of(one, 2))                           # neither changed the training


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_stopped_before_its_first_checkpoint_starts_again(train_here, one_rank):
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


@pytest.mark.slow
def test_the_learning_rate_halves_however_long_the_run_will_be(train_here):
    rates = {epochs: [m["learning_rate"] for m in metrics_of(train_here(f"rate-{epochs}", **{
        **CHEAP, "epochs": epochs, "learning_rate": 0.01, "learning_rate_half_life": 2})) if m["epoch"]] for epochs in (2, 4)}
    assert np.allclose(rates[4], [0.01 * 2 ** (-epoch / 2) for epoch in range(4)], rtol=1e-12) and rates[2] == rates[4][:2]


# ------------------------------------------------------------------------------------- law 7, and what an epoch computes

THREE_UPDATES = dict(rollout_batch=3, train_batch=1, updates_per_epoch=3, epochs=1)


@pytest.mark.slow
def test_gradients_meet_once_per_update(train_here, monkeypatch):
    reduced, all_reduce = [], torch.distributed.all_reduce

    def counted_all_reduce(tensor, *args, **kwargs):
        reduced.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.distributed, "all_reduce", counted_all_reduce)
    directory = train_here("reduced", lambda run: reduced.clear(), **THREE_UPDATES)
    assert reduced == [weights_of(directory, 1).numel()] * 3                               # whole, and nothing else is summed


@pytest.mark.slow
def test_the_network_is_called_as_often_as_planned(train_here, monkeypatch):
    rows, forward = [0], SD3Transformer2DModel.forward

    def counted_forward(self, hidden_states, *args, **kwargs):
        rows[0] += len(hidden_states)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counted_forward)
    train_here("counted", **THREE_UPDATES)
    _, config = parse_config(flags(**{**SMALL, **THREE_UPDATES}))
    plan = batch_plan(config, 1, branches=2)
    evaluation = 7 * (config.eval_num_steps + 2) * 2                                       # 2 calls for drift; both branches
    assert rows[0] == plan.rollout_calls + plan.replay_calls + plan.reference_calls + 2 * evaluation


def sample_here(model: str, epoch: int = 1, **settings):
    """(config, policy, samples) of an epoch, as a run with these settings draws them before its first update."""
    _, config = parse_config(flags(**{**SMALL, "model": model, **settings}))
    torch.manual_seed(config.seed)
    policy, prompts = policy_of(model, config), load_prompts(config.prompts, "train")
    distributed.setup()
    try:
        scorer = Scorer(make_rewards(config, CPU), policy, config)
        samples = train.sample(policy, scorer, prompts, config, epoch)
        scorer.thread.shutdown()
    finally:
        distributed.shutdown()
    return config, policy, samples


def schedule_of(policy, num_steps: int):
    return timestep_schedule(num_steps, **policy.schedule_arguments(num_steps), dtype=torch.float64)


FROM_ONE_START = {**SHARED, "num_steps": 6, "window_range": (0, 6)}


def test_a_shared_prefix_saves_the_calls_that_arithmetic_says(model, monkeypatch):
    rows, forward = [0], SD3Transformer2DModel.forward

    def counted_forward(self, hidden_states, *args, **kwargs):
        rows[0] += len(hidden_states)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counted_forward)
    config, _, samples = sample_here(model, 2, **FROM_ONE_START)
    first_steps = draw_first_steps(config, 2)
    assert len(first_steps.unique()) > 1
    saved = (config.group_size - 1) * int(first_steps.sum())
    assert rows[0] == 2 * (len(samples.draw.indices) * config.num_steps - saved)                # 2: guidance


def test_a_shared_prefix_changes_no_sample(model):
    """Each image all the way from its group's start noise, alone."""
    config, policy, samples = sample_here(model, 2, **FROM_ONE_START)
    T, K, first_steps, sigmas = config.num_steps, config.group_size, draw_first_steps(config, 2), schedule_of(policy, config.num_steps)
    for j, i in enumerate(samples.draw.indices):
        first = int(first_steps[i // K])
        start = draw_noise(config.seed, GROUP_NOISE, 2, [i // K], 1, policy.latent_shape)[0].double()
        noise = draw_noise(config.seed, TRAIN_NOISE, 2, [i], T + 1, policy.latent_shape)[1:].double()
        levels = torch.zeros(T, dtype=torch.float64)
        levels[first] = config.noise_level
        velocity = policy.velocity(policy.encode([samples.prompts[j].text]), config.guidance_scale)
        alone = rollout(velocity, start, sigmas, levels, noise, rule=config.rule, first_step=first, num_trained=1)
        assert (alone.final[0] - samples.trajectory.final[j]).abs().max() < 1e-8
        assert (alone.log_probs[0, 0] - samples.trajectory.log_probs[0, j]).abs() < 1e-8


def gradient_norm(policy, loss) -> float:
    gradients = torch.autograd.grad(loss, policy.parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients]).norm().item()


@pytest.mark.slow
def test_the_guarded_gradient_is_reinforce_weighted_by_std_over_the_step(train_here, model):
    settings = {**GUARD, "updates_per_epoch": 1, "max_grad_norm": 1e-12}
    metrics = metrics_of(train_here("guarded-gradient", **{**settings, "epochs": 1}))[1]
    config, policy, samples = sample_here(model, **settings)
    sigmas = schedule_of(policy, config.num_steps)
    r = torch.from_numpy(samples.scores["total"]).double().view(2, 4)
    A = ((r - r.mean(1, keepdim=True)) / (r.std(1, correction=0, keepdim=True) + 1e-4)).flatten()      # (N,)
    velocity, loss = policy.velocity(policy.encode([p.text for p in samples.prompts]), config.guidance_scale), 0
    for k in range(3):
        log_prob, _, std = replay(velocity, samples.trajectory.rows(k))
        loss = loss - (A * std.flatten() / (sigmas[k] - sigmas[k + 1]) * log_prob).mean() / 3
    norm = gradient_norm(policy, loss)
    assert abs(metrics["grad_norm"] - norm) < 1e-6 * norm


def test_the_gradient_is_that_of_the_mean_over_all_samples_and_trained_steps(train_here, model):
    settings = {"updates_per_epoch": 1, "beta": 0, "max_grad_norm": 1e-12}                  # metrics: the norm before clipping
    metrics = metrics_of(train_here("gradient", **{**settings, "epochs": 1, "train_batch": 3}))[1]
    config, policy, samples = sample_here(model, **settings)
    r = torch.from_numpy(samples.scores["total"]).double().view(2, 4)
    A = ((r - r.mean(1, keepdim=True)) / (r.std(correction=0) + 1e-4)).flatten()                       # (N,)
    velocity = policy.velocity(policy.encode([p.text for p in samples.prompts]), config.guidance_scale)
    # At rho = 1, REINFORCE: -mean over N samples and S steps of A grad log pi.
    norm = gradient_norm(policy, -torch.stack([A * replay(velocity, samples.trajectory.rows(k))[0] for k in range(3)]).mean())
    assert abs(metrics["grad_norm"] - norm) < 1e-6 * norm                                   # advantages are stored in float32
    assert abs(metrics["reward/total"] - r.mean().item()) < 1e-6


def test_the_exact_kl_is_the_per_time_kl_over_the_length_of_the_step(train_here):
    settings = dict(CHEAP, epochs=1, updates_per_epoch=2, window_size=1, window_range=(1, 2), beta=1e-12, dtype="float64")
    kl = {form: metrics_of(train_here(f"kl-{form}", kl=form, **settings))[1]["kl"] for form in ("exact", "per_time")}
    sigmas = timestep_schedule(3, 3.0, dtype=torch.float64)
    assert abs(kl["exact"] * (sigmas[1] - sigmas[2]).item() / kl["per_time"] - 1) < 1e-6 and kl["exact"] > 0


@pytest.mark.slow
def test_equal_rewards_without_kl_leave_the_weights_to_the_weight_decay(train_here, tmp_path, monkeypatch):
    (tmp_path / "constant_reward.py").write_text("def score(images, prompts, metadata):\n    return [0.1] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    directory = train_here("constant", rewards=("constant_reward:score", 1), beta=0, weight_decay=0.5, learning_rate=1e-2)
    before, after = weights_of(directory, 1), weights_of(directory, 2)
    assert (after - before * (1 - 0.5 * 1e-2) ** 2).abs().max() < 1e-14 and before.norm() > 0.1
    for m in metrics_of(directory)[1:]:
        assert m["zero_variance_groups"] == 2 and m["grad_norm"] == 0 and m["ratio"] == 1 and m["policy_loss"] == 0


def test_a_run_moves_no_global_random_stream_and_a_reward_that_does_changes_none(train_here, tmp_path, monkeypatch):
    (tmp_path / "seeding_reward.py").write_text(
        "import random, numpy, torch\n"
        "def score(images, prompts, metadata):\n"
        "    random.seed(len(images)), numpy.random.seed(0), torch.manual_seed(0)\n"
        "    return images.mean((1, 2, 3)) + random.random() + numpy.random.rand() + torch.rand(1).item()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.get_rng_state().tolist()

    before = []
    train_here("streams", before=lambda run: before.append(states()), rewards=("seeding_reward:score", 1), **CHEAP)
    assert before == [states()]


@pytest.mark.slow
def test_where_rewards_are_equal_the_kl_pulls_weights_to_the_reference(train_here, tmp_path, monkeypatch):
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype, epochs", [("bfloat16", 2), ("float16", 2)])
def test_a_run_in_half_precision_trains_and_continues(train_here, dtype, epochs):
    """In float16 the first update of so few samples overflows, until the loss scale has come down."""
    train_here(dtype, dtype=dtype, epochs=epochs // 2, **CHEAP)
    directory = train_here(dtype, dtype=dtype, epochs=epochs, **CHEAP)
    assert [m["epoch"] for m in metrics_of(directory)] == list(range(epochs + 1))
    assert all(m["ratio_deviation_before"] < 0.02 for m in metrics_of(directory)[1:])
    assert (metrics_of(directory)[1]["overflows"] > 0) == (dtype == "float16")
    assert metrics_of(directory)[-1]["overflows"] == 0 and all(m["grad_norm"] > 0 for m in metrics_of(directory)[1:])
    assert weights_of(directory, epochs).dtype == torch.float32 and weights_of(directory, epochs).isfinite().all()
    assert not torch.equal(weights_of(directory, epochs), weights_of(directory, epochs - 1))


@pytest.mark.slow
def test_a_loss_scale_that_is_too_large_costs_no_update(train_here, monkeypatch):
    """The update is computed again at half the scale. So the run is the one that began at the scale that fits."""
    settings = dict(dtype="float16", epochs=1, **CHEAP | dict(updates_per_epoch=2))
    (overflows,) = (m["overflows"] for m in metrics_of(train_here("too-large", **settings))[1:])
    assert overflows > 3
    monkeypatch.setattr(learner, "FIRST_SCALE", learner.FIRST_SCALE / 2**overflows)
    fits = train_here("fits", **settings)
    assert metrics_of(fits)[1]["overflows"] == 0
    assert torch.equal(weights_of(fits, 1), weights_of(fits.parent / "too-large", 1))


@pytest.mark.slow
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
def test_the_evaluation_is_the_mean_over_prompts_drawn_alone_by_averaged_weights(model, one_rank, epoch):
    _, config = parse_config(flags(**SMALL))
    policy = policy_of(model, config)
    if epoch:
        state = torch.load(one_rank / "checkpoints" / f"epoch_{epoch:05d}" / "state.pt", weights_only=True)
        with torch.no_grad():
            for p, averaged in zip(policy.parameters, state["average"], strict=True):
                p.copy_(averaged)
        assert any(not torch.equal(*pair) for pair in zip(state["average"], state["trained"]))
    sigmas = schedule_of(policy, config.eval_num_steps)
    images, prompts = [], load_prompts(config.prompts, "test")[:7]
    for i, prompt in enumerate(prompts):
        noise = draw_noise(0, EVAL_NOISE, 0, [i], 1, policy.latent_shape)[0].double()
        velocity = policy.velocity(policy.encode([prompt.text]), config.guidance_scale)
        images.append(policy.decode(rollout(velocity, noise, sigmas, 0.0, None).final)[0].numpy())
    assert np.array_equal(np.stack(images), images_of(one_rank, epoch))
    assert len({image.tobytes() for image in images}) == 7
    scores = make_rewards(config, CPU)(np.stack(images), [""] * 7, [{}] * 7)["total"]
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


@pytest.mark.slow
def test_eval_only_evaluates_the_last_checkpoint_and_changes_nothing_else(train_here, one_rank, capsys):
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

@pytest.mark.slow
def test_the_bundled_model_draws_with_diffusers_and_takes_an_adapter_from_peft(train_here):
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


@pytest.mark.slow
def test_scores_are_computed_beside_the_next_batch(train_here):
    order, events = 3 * ["sample", "sample", "score", "score"], []         # evaluation, epoch, evaluation

    def sampled(decode, latents):
        events.append("sample")
        return decode(latents)

    def scored(rewards, *batch):
        wait_until(lambda: order[:len(events) + 1] == [*events, "score"], 20)
        time.sleep(0.3)                          # for who does not wait to go on
        events.append("score")
        return rewards(*batch)

    def before(run):
        replace_call(run.policy, "decode", sampled)
        for scorer in (run.scorer, run.eval_scorer):
            replace_call(scorer, "rewards", scored)

    train_here("beside", before, **{**CHEAP, "epochs": 1, "rollout_batch": 2, "eval_prompts": 4})
    assert events == order


# ------------------------------------------------------------------------------------------------------------ batch sizes

@pytest.mark.slow
def test_batches_that_are_chosen_change_no_more_than_rounding(train_here, one_rank, capsys):
    directory = train_here("chosen", rollout_batch=0, train_batch=0)
    assert "any number" not in capsys.readouterr().out
    chosen, given = weights_of(directory, 2), weights_of(one_rank, 2)
    assert (chosen - given).abs().max() < 1e-8 * given.abs().max()
