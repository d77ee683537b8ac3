"""What goes wrong at the start of a run or in the middle ends in one line, and what was saved goes on."""

import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    CHEAP, ROOT, Stopped, equal, errors_in, metrics_of, replace_call, run_here, wait_until, weights_of, without_times)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import distributed
import harness.run
from config import Config, parse_config
from harness import signals
from harness.checkpoint import checkpoint_path, checkpoints, load_state, open_run
from learner import FIRST_SCALE


# ------------------------------------------------------------------------------------------------ small and odd settings

@pytest.mark.parametrize("changes", [dict(epochs=0), dict(epochs=1, eval_images=0), dict(epochs=1, eval_images=100)])
def test_a_run_without_epochs_or_pictures_or_with_more_than_there_are_ends_well(train_here, changes, capsys):
    directory = train_here("-".join(f"{k}-{v}" for k, v in changes.items()), **{**CHEAP, **changes})
    out = capsys.readouterr().out
    assert "before training" in out and ("the best and last weights, of epoch 1: " in out) == bool(changes["epochs"])
    assert len(metrics_of(directory)) == 1 + changes["epochs"]


# ------------------------------------------------------------------------------------------------------------ one writer

def test_a_second_writer_is_refused_with_the_pid_of_the_first(command, tmp_path):
    _, config = parse_config(["--run-name", "held", "--output-dir", str(tmp_path)])
    directory, lock, _ = open_run(config)                                             # this process is the first
    try:
        code, out, err, _ = command("held", 0, output_dir=tmp_path)
    finally:
        lock.close()
    (line,) = errors_in(err)
    assert code != 0 and str(directory) in line and f"process {os.getpid()}:" in line and "--run-name" in line
    assert "Traceback" not in err and not (directory / "metrics.jsonl").exists()


# --------------------------------------------------------------------------------------------------------------- bad input

@pytest.fixture
def no_model(tmp_path) -> str:
    """The index of a pipeline without its parts: whatever loads it fails."""
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (tmp_path / "index" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / Config.model / name, tmp_path / "index" / name)
    return str(tmp_path / "index")


@pytest.mark.parametrize("arguments, names", [
    ("--group-sise 4", ["--group-sise", "--group-size"]),
    ("tiny_orc", ["tiny_orc", "tiny_ocr"]),
    ("--epochs many", ["many", "--epochs"]),
    ("--group-size 1", ["--group-size is 1", "at least 2"]),
    ("--model nothing/at/all", ["nothing/at/all"]),
    ("--rewards rapidorc 1", ["rapidorc", "rapidocr"]),
    ("--rewards rapidocr_line nan", ["rapidocr_line", "nan"]),
    ("--rewards rapidocr_line inf", ["rapidocr_line", "inf"]),
    ("--rewards rapidocr_line 0", ["rapidocr_line", "0"]),
    ("--rewards no_such_file:score 1", ["no_such_file"]),
    ("--prompts unquoted", ["rapidocr_line", "a cat on a mat"]),
    ("--prompts empty", ["train.txt", "no prompts"]),
    ("--prompts nowhere", ["nowhere"]),
])
def test_bad_input_is_named_in_one_line_before_the_model_loads(arguments, names, no_model, tmp_path, monkeypatch, capsys):
    for folder, text in {"unquoted": 'the word "cat"\na cat on a mat\n', "empty": "\n"}.items():
        (tmp_path / folder).mkdir()
        for split in ("train", "test"):
            (tmp_path / folder / f"{split}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(harness.run, "make_policy", lambda *_: pytest.fail("the model loads"))
    monkeypatch.setattr(harness.run, "make_rewards", lambda *_: pytest.fail("the rewards load"))
    words = arguments.split()
    with pytest.raises(Stopped) as stop:
        run_here([*words, *([] if "--model" in words else ["--model", no_model])])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ") and all(name in line for name in names), line
    assert out == "" and not (tmp_path / "runs").exists()


def test_an_unknown_flag_on_two_ranks_is_one_line_even_if_the_main_rank_is_slower(command, no_model, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os, time\ntime.sleep(4 * (os.environ.get('RANK') == '0'))\n")
    code, out, err, directory = command("flag", 2, "--group-sise", "4", model=no_model, path=tmp_path)
    assert code != 0 and len(errors_in(err)) == 1, err
    assert "--group-sise" in errors_in(err)[0] and "--group-size" in errors_in(err)[0]
    assert out == "" and not directory.exists()


def test_a_continued_run_whose_seed_differs_is_refused_with_both_values(command, train_here):
    directory = train_here("seed-held", **CHEAP, epochs=1)
    before = (directory / "metrics.jsonl").read_text()
    code, _, err, _ = command("seed-held", 2, output_dir=directory.parent, **CHEAP, epochs=1, seed=3)
    assert code != 0 and len(errors_in(err)) == 1, err
    line = errors_in(err)[0]
    assert "--seed is 3" in line and "with 1:" in line and "--run-name" in line
    assert (directory / "metrics.jsonl").read_text() == before
    assert json.loads((directory / "config.json").read_text())["seed"] == 1


# ----------------------------------------------------------------------------------------------- nodes that hold other files

@pytest.fixture
def start_nodes(start, model, tmp_path, monkeypatch):
    """`start_nodes(name, change)`: two nodes of one rank; `change(rank, directory)` makes what differs. Code, stderr of each."""
    def run(name: str, change) -> list[tuple[int, str]]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        processes = []
        for rank in range(2):
            node = tmp_path / str(rank)
            shutil.copytree(model, node / "model")
            (node / "own.py").write_text("def score(images, prompts, metadata):\n"
                                         "    open('seen', 'a').write(''.join(f'{p}\\n' for p in prompts))\n"
                                         "    return images.mean((1, 2, 3))\n")
            change(rank, node)
            for variable, value in dict(RANK=rank, LOCAL_RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=1,
                                        MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
                monkeypatch.setenv(variable, str(value))
            processes.append(start(name, [], cwd=node, path=node, rewards=("own:score", 1), **{
                **CHEAP, "model": "model", "groups_per_epoch": 3, "epochs": 1, "prompts": "p"})[0])
        errors = [process.communicate(timeout=200)[1] for process in processes]
        return [(process.returncode, error) for process, error in zip(processes, errors)]
    return run


def write_prompts(directory, *words: str) -> None:
    directory.mkdir()
    for split in ("train", "test"):
        (directory / f"{split}.txt").write_text("".join(f'the word "{word}"\n' for word in words))


def test_all_ranks_train_on_the_main_ranks_prompts(start_nodes, tmp_path):
    """Otherwise a group that is split between nodes would have two prompts under one baseline."""
    ended = start_nodes("prompts-differ", lambda rank, node: write_prompts(node / "p", *(("lamp", "ring"), ("coin", "wolf"))[rank]))
    assert [code for code, _ in ended] == [0, 0], ended
    seen = [(tmp_path / str(rank) / "seen").read_text().split("\n") for rank in range(2)]
    assert not any("coin" in line or "wolf" in line for line in seen[0] + seen[1]) and len(seen[1]) > 6


def test_a_node_that_holds_other_weights_is_told_in_one_line(start_nodes):
    def change(rank, node):
        write_prompts(node / "p", "lamp", "ring")
        path = next((node / "model" / "text_encoder").glob("*.safetensors"))
        tensors = load_file(path)
        name = next(iter(tensors))
        tensors[name] = tensors[name] * (1 + rank)
        save_file(tensors, path, {"format": "pt"})

    ended = start_nodes("weights-differ", change)
    for code, error in ended:
        assert code == 2 and "rank 1 has other weights of model than rank 0" in errors_in(error)[0], ended


# ---------------------------------------------------------------------------------------------------- rewards that fail

FAILING_REWARD = """
from rewards import jpeg_incompressibility
calls = 0

def score(images, prompts, metadata):
    global calls
    calls += 1
    good = jpeg_incompressibility(images, prompts, metadata)
    return good if calls < 4 else {outcome}      # the probe, the evaluation and the first epoch go well
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, outcome, says", [
    ("raises", "1 / 0", "ZeroDivisionError"), ("nan", "good * float('nan')", "nan"), ("shape", "good[:3]", "(3,)")])
def test_a_failing_reward_stops_the_run_with_its_name_and_what_was_saved_goes_on(
        train_here, name, outcome, says, tmp_path, monkeypatch):
    module, changes = f"failing_{name}", dict(rewards=(f"failing_{name}:score", 1), **CHEAP)
    (tmp_path / f"{module}.py").write_text(FAILING_REWARD.format(outcome=outcome))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(Stopped) as stop:
        train_here(module, **changes)
    assert f"{module}:score" in str(stop.value) and says in str(stop.value) and "the word " in str(stop.value)
    assert "\n" not in str(stop.value)

    monkeypatch.setattr(sys.modules[module], "calls", -100)                                # the reward has been mended
    directory = train_here(module, **changes)
    assert [m["epoch"] for m in metrics_of(directory)] == [0, 1, 2]


def test_a_reward_that_fails_on_one_rank_ends_all_after_a_checkpoint(command, tmp_path):
    (tmp_path / "failing.py").write_text("import os\n" + FAILING_REWARD.format(
        outcome="good * float('nan') if os.environ['RANK'] == '1' else good"))
    code, _, err, directory = command("failing", 2, cwd=tmp_path, rewards=("failing:score", 1), dtype="float32",
                                      updates_per_epoch=1, save_every=100)
    (line,) = errors_in(err.replace("\r", "\n"))
    assert code != 0 and "failing:score" in line and "nan" in line and 'the word "' in line
    assert [p.name for p in checkpoints(directory)] == ["epoch_00001"]


def at_call(owner, name: str, number: int, deed) -> None:
    """The `number`-th call of a method meets with the deed, which gets what it returns, and may replace it."""
    calls = itertools.count(1)

    def around(original, *arguments, **options):
        result = original(*arguments, **options)
        return deed(result) if next(calls) == number else result

    replace_call(owner, name, around)


def at_batch(policy, training: bool, number: int, deed) -> None:
    """The network's `number`-th call meets with the deed, which gets its velocity: in training, or in sampling."""
    calls = itertools.count(1)

    def watching(velocity, *arguments, **which):
        inner = velocity(*arguments, **which)

        def watched(latents, sigma):
            v = inner(latents, sigma)
            return deed(v) if torch.is_grad_enabled() == training and next(calls) == number else v
        return watched

    replace_call(policy, "velocity", watching)


def test_out_of_memory_ends_in_one_line_with_the_plan_and_the_flag_to_lower(train_here, capsys):
    with pytest.raises(Stopped) as stop:
        train_here("too-large", lambda run: at_batch(run.policy, True, 1, lambda _: torch.empty(2**55, dtype=torch.uint8)),
                   **CHEAP, epochs=1)
    (line,) = errors_in(capsys.readouterr().err)
    assert stop.value.code == 2 and "out of memory on rank 0" in line and "lower --train-batch" in line
    assert "; the plan was: epoch: 1 groups x 4 = 4 images" in line and "training batches: 1 of up to 8 rows" in line


@pytest.mark.slow
def test_out_of_memory_leaves_a_checkpoint_of_the_last_whole_epoch(train_here, unbroken):
    def out_of_memory(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(Stopped):
        train_here("too-large-later", lambda run: at_batch(run.policy, True, 2, out_of_memory), **CHEAP, epochs=2, save_every=100)
    assert [p.name for p in checkpoints(unbroken.with_name("too-large-later"))] == ["epoch_00001"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), MemoryError("std::bad_alloc")])
def test_a_model_that_does_not_fit_ends_in_one_line_too(train_here, monkeypatch, error):
    monkeypatch.setattr(harness.run, "Policy", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(Stopped) as stop:
        train_here("too-large-a-model", **CHEAP)
    assert "out of memory on rank 0" in str(stop.value) and "--offload-text-encoders" in str(stop.value)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_its_epoch_and_leaves_the_weights(train_here):
    changes = dict(CHEAP, dtype="float16", learning_rate=3.0, updates_per_epoch=2, epochs=9)
    with pytest.raises(Stopped) as stop:
        train_here("blown-up", **changes)
    assert "not finite" in str(stop.value) and "epoch " in str(stop.value) and "--learning-rate" in str(stop.value)


def test_samples_without_advantage_are_not_replayed_but_stay_in_the_mean(train_here, tmp_path, monkeypatch):
    """Of three groups one has rewards that differ: four samples of twelve, three steps each, in batches of up to six."""
    (tmp_path / "some_equal.py").write_text(
        "import numpy as np\nfrom rewards import jpeg_incompressibility\n"
        "def score(images, prompts, metadata):\n"
        "    return jpeg_incompressibility(images, prompts, metadata) * (np.array(prompts) == min(prompts))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rows = []

    def counting(velocity, *arguments, **reference):
        inner = velocity(*arguments, **reference)
        return lambda x, sigma: (torch.is_grad_enabled() and rows.append(len(x)), inner(x, sigma))[1]

    directory = train_here(
        "some-equal", lambda run: replace_call(run.policy, "velocity", counting), rewards=("some_equal:score", 1),
        groups_per_epoch=3, group_size=4, updates_per_epoch=1, beta=0, rollout_batch=12, train_batch=6, epochs=1)
    assert rows == [6, 6] and metrics_of(directory)[1]["zero_variance_groups"] == 2
    assert abs(metrics_of(directory)[1]["ratio"] - 1) < 1e-12                                # 36 rows, 24 of them with ratio 1


# ------------------------------------------------------------------------------------------------------------- signals

THREE_EPOCHS = dict(CHEAP, updates_per_epoch=2, epochs=3, eval_every=2, save_every=2, rollout_batch=2, train_batch=2)


@pytest.fixture(scope="module")
def unbroken(train_here) -> Path:
    return train_here("unbroken", **THREE_EPOCHS)


def assert_same_bits(one: Path, other: Path) -> None:
    assert without_times(metrics_of(one)) == without_times(metrics_of(other))
    states = [load_state(checkpoints(directory)[-1]) for directory in (one, other)]
    assert [state.pop("metrics")["epoch"] for state in states] == [3, 3] and equal(*states)


def signalled(value):
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(signals.stop_asked, 5)
    return value


def slow_reward(value):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(2)
    return value


# What a signal meets, one after the other in one run -> which epoch is saved then.
PHASES = [
    ("the evaluation before training", lambda run: at_batch(run.policy, False, 2, signalled), 0),
    ("after an update, which is undone", lambda run: at_batch(run.policy, True, 3, signalled), 0),
    ("scores of epoch 2", lambda run: at_call(run.scorer, "rewards", 3, slow_reward), 1),
    ("after an update of epoch 2", lambda run: at_batch(run.policy, True, 3, signalled), 1),
    ("the evaluation of epoch 2, which is made up for", lambda run: at_call(run.eval_scorer, "rewards", 1, signalled), 2),
    ("the evaluation of epoch 3", lambda run: at_call(run.eval_scorer, "rewards", 2, signalled), 3)]


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bits_after_a_signal_in_any_phase(train_here, unbroken, capsys):
    for phase, before, saved in PHASES:
        with pytest.raises(Stopped) as stop:
            train_here("signalled", before, **THREE_EPOCHS)
        out = capsys.readouterr().out
        says = f"epoch {saved} is saved" if saved else "before the first epoch was whole"
        assert stop.value.code == 0 and "stopped by a signal" in out and says in out and "to go on: " in out, (phase, out)
        newest = [p.name for p in checkpoints(unbroken.with_name("signalled"))][-1:]
        assert newest == ([f"epoch_0000{saved}"] if saved else []), phase
    assert_same_bits(train_here("signalled", **THREE_EPOCHS), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_a_closed_terminal_and_a_schedulers_notice_save_the_last_whole_epoch(
        train_here, unbroken, capsys, request, number):
    before = signal.signal(number, signal.SIG_DFL)      # because nohup, which may have started the tests, ignores SIGHUP
    request.addfinalizer(lambda: signal.signal(number, before))

    def noticed(value):
        os.kill(os.getpid(), number)
        time.sleep(1.2)
        os.kill(os.getpid(), number)
        wait_until(signals.stop_asked, 5)
        return value

    name = f"noticed-{number.name}"
    with pytest.raises(Stopped) as stop:
        train_here(name, lambda run: at_batch(run.policy, True, 5, noticed), **THREE_EPOCHS)                # of epoch 2
    assert "stopped by a signal; epoch 1 is saved; to go on: " in capsys.readouterr().out and stop.value.code == 0
    assert_same_bits(train_here(name, **THREE_EPOCHS), unbroken)


PLACES = {
    "update": lambda run, deed: at_batch(run.policy, True, 7, deed),                     # the second of epoch 2
    "score": lambda run, deed: at_call(run.scorer, "rewards", 3, deed),                  # of epoch 2
    "conclude": lambda run, deed: replace_call(run, "conclude", lambda conclude, metrics: (
        deed(None) if metrics["epoch"] == 2 else conclude(metrics)))}


@pytest.mark.slow
@pytest.mark.parametrize("fault, raised", [(ZeroDivisionError, ZeroDivisionError), (KeyboardInterrupt, KeyboardInterrupt),
                                           (SystemExit, RuntimeError), (GeneratorExit, GeneratorExit)])
@pytest.mark.parametrize("place", PLACES)
def test_whatever_ends_a_run_the_last_whole_epoch_is_saved_and_goes_on(
        train_here, unbroken, capsys, fault, raised, place):
    def fails(_):
        raise fault("injected")

    name = f"fault-{place}-{fault.__name__}"
    with pytest.raises(raised, match="injected"):
        train_here(name, lambda run: PLACES[place](run, fails), **THREE_EPOCHS)
    saved = 2 if place == "conclude" else 1
    assert f"epoch {saved} is saved; to go on: " in capsys.readouterr().out
    assert [p.name for p in checkpoints(unbroken.with_name(name))] == [f"epoch_0000{saved}"]
    assert_same_bits(train_here(name, **THREE_EPOCHS), unbroken)


def test_a_rank_that_is_gone_after_an_epochs_only_update_costs_no_epoch(train_here, monkeypatch):
    """What ranks tell each other then is how long they waited."""
    def gather(vector):
        if sys._getframe(1).f_code.co_name == "all_or_nothing":
            told.append(vector)
            if len(told) == 2:
                raise distributed.LostRank("gone")
        return original(vector)

    original, told = distributed.gather_vectors, []
    monkeypatch.setattr(distributed, "gather_vectors", gather)
    with pytest.raises(Stopped):
        train_here("gone", **CHEAP, epochs=3, save_every=100)
    monkeypatch.undo()
    directory = train_here("gone", **CHEAP, epochs=3, save_every=100)
    assert [c.name for c in checkpoints(directory)] == ["epoch_00002", "epoch_00003"] and [m["epoch"] for m in metrics_of(directory)] == [0, 1, 2, 3]
    undisturbed = train_here("not-gone", **CHEAP, epochs=3, save_every=100)
    assert torch.equal(weights_of(directory, 3), weights_of(undisturbed, 3))


def test_a_checkpoint_that_a_rank_cannot_read_is_one_line(train_here, monkeypatch, capsys):
    """As on a node that does not see the output directory."""
    def load_state(path):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    train_here("unseen", **CHEAP, epochs=1)
    monkeypatch.setattr(harness.run, "load_state", load_state)
    with pytest.raises(Stopped) as stopped:
        train_here("unseen", **CHEAP, epochs=2)
    assert stopped.value.code == 2
    (line,) = errors_in(capsys.readouterr().err)
    assert "rank 0 cannot read" in line and "--output-dir must be storage that all nodes see" in line


@pytest.mark.parametrize("field", ["num_steps", "eval_num_steps"])
def test_a_schedule_that_needs_more_steps_is_one_line_before_training(train_here, monkeypatch, capsys, field):
    """Qwen-Image's is stretched so that its last step does not begin at 1."""
    monkeypatch.setattr(harness.run.Policy, "schedule_arguments", lambda policy, steps: dict(shift_terminal=0.02))
    with pytest.raises(Stopped) as stopped:
        train_here(f"one-{field}", **{**CHEAP, "timestep_fraction": 1, field: 1})
    (line,) = errors_in(capsys.readouterr().err)
    assert stopped.value.code == 2 and f"--{field.replace('_', '-')} does not fit" in line
    assert "num_steps is 1: at least 2 is needed" in line


def test_a_run_whose_output_nobody_reads_goes_on(start):
    process, directory = start("unread", 0, **{**CHEAP, "epochs": 2})
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(100) == 0 and [m["epoch"] for m in metrics_of(directory)] == [0, 1, 2]


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_corrupt_goes_on_from_the_one_before(train_here, unbroken, capsys):
    directory = unbroken.with_name("corrupt")
    shutil.copytree(unbroken, directory)
    with open(checkpoint_path(directory, 3) / "state.pt", "r+b") as file:
        file.seek(1000)
        file.write(b"not what was written")
    train_here("corrupt", **THREE_EPOCHS)
    out, err = capsys.readouterr()
    assert "epoch_00003 is corrupt (state.pt is not what was written)" in err and "continuing after epoch 2" in out
    assert_same_bits(directory, unbroken)


FORKING_REWARD = """
import multiprocessing, os, time

def score(images, prompts, metadata):
    with multiprocessing.Pool(2) as pool:
        return pool.map(float, images.mean((1, 2, 3)).tolist())

def leaves_one(images, prompts, metadata):
    multiprocessing.Process(target=time.sleep, args=(600,)).start()
    return images.mean((1, 2, 3)).tolist()

def waits_for_one(images, prompts, metadata):
    with multiprocessing.Pool(1) as pool:
        if os.path.exists("stop"):
            open("reached", "w").close()
            pool.apply(time.sleep, (600,))
        return images.mean((1, 2, 3)).tolist()
"""


@pytest.mark.parametrize("function, ranks", [("score", 0), ("leaves_one", 2)])
def test_a_run_whose_reward_makes_processes_ends_well_and_so_do_they(command, tmp_path, function, ranks):
    (tmp_path / "forking.py").write_text(FORKING_REWARD)
    code, out, err, directory = command(f"forking-{function}", ranks, cwd=tmp_path, rewards=(f"forking:{function}", 1), **{
        **CHEAP, "epochs": 1})
    assert code == 0 and "stopped" not in out, err
    assert [m["epoch"] for m in metrics_of(directory)] == [0, 1]


def test_a_signal_ends_a_run_whose_reward_waits_for_its_processes(start, tmp_path):
    (tmp_path / "forking.py").write_text(FORKING_REWARD)
    process, directory = start("forking-stopped", 2, cwd=tmp_path, rewards=("forking:waits_for_one", 1), **{
        **CHEAP, "epochs": 1000, "save_every": 1000})
    wait_until(lambda: (directory / "metrics.jsonl").exists() and len(metrics_of(directory)) > 1, 100)
    (tmp_path / "stop").touch()
    wait_until((tmp_path / "reached").exists, 60)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=25)
    assert "stopped by a signal; epoch " in out and "to go on: " in out, err


# --------------------------------------------------------------------------------------------------- what is not finite

def spoil(policy, quantity: str) -> None:
    """Make something not finite: a row's log-prob, the gradient, or an image's latents; of CHEAP, with four images."""
    seen = []                                    # the latents of image 2, before each step

    def spoiling(velocity, *arguments, **reference):
        inner = velocity(*arguments, **reference)

        def spoilt(latents, sigma):
            v = inner(latents, sigma)
            if quantity == "gradient" and v.requires_grad:
                v.register_hook(lambda gradient: gradient * float("nan"))
            if len(latents) == 4:                                          # sampling; an evaluation has 2 images, training 8 rows
                seen.append(latents[2].clone())
                if quantity == "latents":
                    v[1, 0, 0, 0] = float("inf")
            elif quantity == "loss":
                bad = torch.tensor([any(torch.equal(x, y) for y in seen) for x in latents])
                v = torch.where(bad.view(-1, 1, 1, 1), float("nan"), v)
            return v
        return spoilt

    replace_call(policy, "velocity", spoiling)


SOMETIMES_NAN = """
calls = 0

def score(images, prompts, metadata):
    global calls
    calls += 1
    return images.mean((1, 2, 3)) * (float("nan") if calls > 2 else 1)     # the probe and the evaluation go well
"""


@pytest.mark.parametrize("quantity, dtype", [
    ("loss", "float64"), ("gradient", "float64"), ("latents", "float64"), ("reward", "float64"),
    pytest.param("gradient", "float16", marks=pytest.mark.slow)])
def test_what_is_not_finite_is_skipped_as_often_as_allowed_then_ends_the_run(
        train_here, monkeypatch, tmp_path, capsys, quantity, dtype):
    """In float16 a gradient that no loss scale makes finite is left out too, and the next update has the first scale again."""
    changes = dict(CHEAP, beta=0, epochs=3, skip_nonfinite=2, dtype=dtype)
    if quantity == "reward":
        (tmp_path / "sometimes_nan.py").write_text(SOMETIMES_NAN)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        changes["rewards"] = ("sometimes_nan:score", 1)
    with pytest.raises(Stopped) as stop:
        train_here(f"bad-{quantity}-{dtype}", lambda run: spoil(run.policy, quantity), **changes)
    says, err = str(stop.value), capsys.readouterr().err
    assert quantity in says and "epoch 3" in says and "rank 0" in says and 'the word "' in says and "\n" not in says
    assert "skipped, 1 of 2 updates" in err and "skipped, 2 of 2 updates" in err
    (evidence,) = [word.strip(";") for word in says.split() if word.strip(";").endswith(".safetensors")]
    with safe_open(evidence, "pt") as file:
        prompts, names = json.loads(file.metadata()["prompts"]), set(file.keys())
        if quantity == "loss":
            assert torch.equal(file.get_tensor("log_prob_again").isnan(), file.get_tensor("samples") == 2)
    kept = {"latents": {"samples", "latents", "log_probs"}, "reward": {"images"}}
    assert kept.get(quantity, {"samples", "steps", "advantages", "latents", "log_prob", "log_prob_again"}) <= names
    assert len(prompts) == (4 if quantity in kept or dtype == "float16" else 8)     # images or a step of each, or two steps
    directory = Path(evidence).parent.parent
    assert [m.get("skipped_updates") for m in metrics_of(directory)] == [None, 1, 1]
    state = load_state(checkpoints(directory)[-1])
    assert state["epoch"] == 2 and state["skipped"] == 2
    assert all(moments["step"] == 0 for moments in state["optimizer"]["state"].values())
    assert dtype != "float16" or state["scaler"]["scale"] == FIRST_SCALE
    assert all(p.isfinite().all() for p in state["trained"])


def test_a_number_that_is_finite_when_computed_again_is_blamed_on_the_machine(train_here):
    with pytest.raises(Stopped) as stop:
        train_here("flipped-bit", lambda run: at_batch(run.policy, True, 1, lambda v: v * float("nan")), **CHEAP)
    assert "suspect memory" in str(stop.value) and "the loss of epoch 1, update 0" in str(stop.value)
