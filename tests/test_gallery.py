"""The page of a run, its pictures and curves: what is on them, and that they never stop a run."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from helpers import CHEAP, ROOT, images_of, metrics_of
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.gallery import Display, save_images, write_page
from harness.run import prepare

HOSTILE = ["</script><script>document.title = 'run'</script>", "<img src=x onerror=\"document.title = 'run'\">", "<!--", "{{data}}",
           "a sign that says \"it's\" & 'that's it' \\ \u2028 \u202e", "日本語 😀", ""]


class Parts(HTMLParser):
    """The page as a browser's parser cuts it: what each script and the title hold."""

    def __init__(self, page: Path):
        super().__init__()
        self.inside, self.scripts, self.title, self.tags = None, [], "", []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside == "title":
            self.title += data


def runs_on(page: Path) -> list[dict]:
    data, _, _ = Parts(page).scripts                       # and the charts' library, and the page's own
    return json.loads(data)["runs"]


def make_run(directory: Path, evaluations=(0, 10), prompts=("a", "b"), size=(24, 64), metrics=None, **config) -> Path:
    """What train.py leaves of a run, with pictures of noise."""
    generator = np.random.default_rng(0)
    metrics = metrics or [{"epoch": 0, "eval/total": 0.25}, *({
        "epoch": e, "reward/total": e / 10, "grad_norm": 1 / e} | ({"eval/total": 0.5} if e in evaluations else {}) for e in range(1, 11))]
    directory.mkdir(parents=True)
    for epoch in evaluations:
        images = generator.integers(0, 256, (len(prompts), *size, 3), np.uint8)
        save_images(directory, epoch, images, prompts, {"total": generator.random(len(prompts)).tolist()})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (directory / "config.json").write_text(json.dumps({"model": "m", "seed": 1, **config}))
    return directory


def page_of(run: Path) -> Path:
    write_page([run], run / "index.html")
    return run / "index.html"


# ---------------------------------------------------------------------------------------------------------- the page

def test_what_others_wrote_is_text_on_the_page_whatever_it_holds(tmp_path):
    run = make_run(tmp_path / "<script>&{{data}}", prompts=HOSTILE, model=HOSTILE[0])
    plain = make_run(tmp_path / "plain", prompts=["a"] * len(HOSTILE))
    page, parts = page_of(run), Parts(page_of(run))
    assert parts.tags == Parts(page_of(plain)).tags                               # nothing of it became an element
    assert parts.title == run.name
    (shown,) = runs_on(page)
    assert shown["evaluations"][0]["prompts"] == HOSTILE and shown["config"]["model"] == HOSTILE[0] and shown["name"] == run.name


def test_every_number_of_the_metrics_is_on_the_page_and_text_and_half_a_line_are_not(tmp_path):
    run = make_run(tmp_path / "run")
    metrics = metrics_of(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 11, "grad_norm": 1 / 3, "said": "text", "overflows": 0}) + "\n" + '{"epoch": 12, "gr')
    (shown,) = runs_on(page_of(run))
    assert shown["epochs"] == [*range(12)]
    assert set(shown["metrics"]) == {"eval/total", "reward/total", "grad_norm", "overflows"}
    for i, line in enumerate(metrics):
        for name, values in shown["metrics"].items():
            assert values[i] == (pytest.approx(line[name], rel=1e-7) if name in line else None)
    assert shown["metrics"]["overflows"][11] == 0


def test_every_picture_that_the_page_names_is_there_from_wherever_the_page_lies(tmp_path):
    small, large = make_run(tmp_path / "100% #1? a b"), make_run(tmp_path / "large" / "run", size=(300, 200))
    (tmp_path / "pages").mkdir()
    for runs, page in ([small], small / "index.html"), ([small, large], tmp_path / "pages" / "both.html"):
        write_page(runs, page)
        for shown in runs_on(page):
            assert [e["epoch"] for e in shown["evaluations"]] == [0, 10]
            for e in shown["evaluations"]:
                names = [f"{i:03d}.{kind}" for i in range(len(e["prompts"])) for kind in ["png"] + ["webp"] * e["thumbnails"]]
                assert len(e["prompts"]) == 2 and all((page.parent / unquote(e["folder"]) / name).is_file() for name in names)
    assert [e["thumbnails"] for shown in runs_on(page) for e in shown["evaluations"]] == [False, False, True, True]
    assert [shown["evaluations"][0]["size"] for shown in runs_on(page)] == [[64, 24], [200, 300]]
    with Image.open(large / "images" / "epoch_00000" / "000.webp") as thumbnail:
        assert thumbnail.size == (171, 256)


def test_a_page_of_64_prompts_and_50_evaluations_over_1000_epochs_weighs_under_a_megabyte(tmp_path):
    run = make_run(tmp_path / "wide", evaluations=(0,), prompts=[f"a photograph of {i} things on a table, in the rain" for i in range(64)],
                   metrics=[{"epoch": e, **{f"metric_{i}": 1 / (e + i + 3) for i in range(20)}} for e in range(1000)])
    for i in range(1, 50):
        os.symlink("epoch_00000", run / "images" / f"epoch_{20 * i:05d}")
    page = page_of(run)
    assert len(runs_on(page)[0]["evaluations"]) == 50
    assert page.stat().st_size < 1e6


@pytest.mark.slow
def test_the_command_writes_the_page_of_a_run_and_one_that_compares_several_beside_them(tmp_path):
    runs = [make_run(tmp_path / name / "same") for name in "ab"] + [make_run(tmp_path / "a" / "third")]

    def gallery(*arguments) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, "-m", "harness.gallery", *arguments], capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        return done.returncode, done.stdout.strip(), done.stderr

    own = page_of(runs[0]).read_bytes()
    assert gallery("a/same") == (0, str(runs[0] / "index.html"), "")
    assert (runs[0] / "index.html").read_bytes() == own
    assert gallery("a/same", "b/same", runs[2]) == (0, str(tmp_path / "a" / "compare.html"), "")
    assert (runs[0] / "index.html").read_bytes() == own
    assert [shown["name"] for shown in runs_on(tmp_path / "a" / "compare.html")] == ["a/same", "b/same", "third"]
    assert "--output is given twice" in gallery("a/same", "--output", "x.html", "--output=y.html")[2]
    code, out, err = gallery("a", "--output", "x.html")
    assert code == 1 and out == "" and err == "error: a holds no run: neither metrics.jsonl nor images/epoch_*/\n"


# ---------------------------------------------------------------------------------------------------------- pictures

def test_an_evaluation_is_kept_whole_in_place_of_the_earlier_one_or_not_at_all(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 64, 3), np.uint8)
    save_images(tmp_path, 7, images, ["a", "b", "c"], {"total": [0.1, float("nan"), 0.3]})
    kept = json.loads((tmp_path / "images" / "epoch_00007" / "images.json").read_text())
    assert kept == {"size": [64, 24], "prompts": ["a", "b", "c"], "scores": {"total": [0.1, None, 0.3]}}
    assert np.array_equal(images_of(tmp_path, 7), images)
    with pytest.raises(ValueError, match="2 images, but prompts or scores of"):
        save_images(tmp_path, 7, images[:2], ["a", "b", "c"], {})
    assert np.array_equal(images_of(tmp_path, 7), images)
    save_images(tmp_path, 7, images[:1], ["a"], {})
    assert np.array_equal(images_of(tmp_path, 7), images[:1]) and [p.name for p in (tmp_path / "images").iterdir()] == ["epoch_00007"]


# ------------------------------------------------------------------------------------------------------ beside training

def points_of(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run: name -> epoch -> value."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert all(len(dict(pairs)) == len(pairs) for pairs in points.values())                 # no epoch twice
    return {name: dict(pairs) for name, pairs in points.items()}


def assert_tensorboard_agrees(run: Path) -> None:
    points, metrics = points_of(run), metrics_of(run)
    assert {name: {m["epoch"]: pytest.approx(m[name], rel=1e-6) for m in metrics if name in m}
            for name in {name for m in metrics for name in m} - {"epoch"}} == points


def test_a_run_shows_itself_and_goes_on_though_it_was_begun_before_it_could(train_here):  # noqa: F811
    run = train_here("shown", **CHEAP, epochs=1, eval_every=1, learning_rate=1e-2)
    (shown,) = runs_on(run / "index.html")
    assert [e["epoch"] for e in shown["evaluations"]] == [0, 1] == shown["epochs"]
    assert set(shown["evaluations"][0]["scores"]) == {"total", "jpeg_incompressibility"}
    assert shown["config"]["preset"] == "tiny_ocr" and shown["config"]["differs_from_preset"]["epochs"] == 10
    assert "seed" not in shown["config"]["differs_from_preset"]
    assert_tensorboard_agrees(run)

    before = json.loads((run / "config.json").read_text())
    del before["preset"], before["differs_from_preset"], before["wandb"]
    (run / "config.json").write_text(json.dumps(before))
    save_images(run, 3, images_of(run, 1), ["of a process", "that was stopped"], {})        # after the last checkpoint
    train_here("shown", **CHEAP, epochs=2, eval_every=2, learning_rate=1e-2)
    (shown,) = runs_on(run / "index.html")
    assert [e["epoch"] for e in shown["evaluations"]] == [0, 1, 2] == shown["epochs"]
    assert_tensorboard_agrees(run)


def test_an_evaluation_alone_has_a_page_and_what_cannot_be_shown_is_said_once_and_training_goes_on(train_here, monkeypatch, capsys):  # noqa: F811
    run = train_here("broken", **CHEAP, eval_only=True)
    (shown,) = runs_on(run / "index.html")                                                  # one evaluation has its page
    assert [e["epoch"] for e in shown["evaluations"]] == [0] and len(shown["evaluations"][0]["prompts"]) == 2
    assert not (run / "tensorboard").exists()
    (run / "metrics.jsonl").unlink()
    (run / "index.html.partial").symlink_to("/dev/full")                                    # a disk without space
    shutil.rmtree(run / "images")
    (run / "images").write_text("a file where a directory should be")
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)      # a package that is missing
    capsys.readouterr()
    train_here("broken", **CHEAP, epochs=1, eval_every=1)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert [line.split(": ")[1] for line in warnings] == ["TensorBoard", "keeping pictures", "writing the page"]
    assert "No space left on device" in warnings[2]
    assert [m["epoch"] for m in metrics_of(run) if "eval/total" in m] == [0, 1]
    assert (run / "checkpoints" / "epoch_00001" / "state.pt").exists()


def test_a_run_that_is_killed_and_goes_on_has_each_epoch_once_in_tensorboard(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    killed = Display(tmp_path, 0)
    for epoch in range(5):
        killed.curves({"epoch": epoch, "grad_norm": float(epoch)})                          # and it never closes
    again = Display(tmp_path, 3)
    for epoch in range(3, 6):
        again.curves({"epoch": epoch, "grad_norm": 10.0 + epoch})
    assert points_of(tmp_path) == {"grad_norm": {0: 0, 1: 1, 2: 2, 3: 13, 4: 14, 5: 15}}
    again.close()
    killed.close()


def test_a_disk_that_is_full_for_a_while_costs_tensorboard_nothing_once_there_is_space(tmp_path, capsys):
    display = Display(tmp_path, 0)
    space = os.dup(display.events.file.fileno())
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), display.events.file.fileno())
    for epoch in 0, 1:
        display.curves({"epoch": epoch, "grad_norm": 1.0})
    os.dup2(space, display.events.file.fileno())
    display.curves({"epoch": 2, "grad_norm": 1.0})
    assert capsys.readouterr().err == "warning: TensorBoard: OSError: [Errno 28] No space left on device; training goes on without\n"
    assert points_of(tmp_path) == {"grad_norm": {0: 1, 1: 1, 2: 1}}
    display.close()
    os.close(space)


def test_a_default_run_spends_less_than_two_percent_on_being_looked_at(tmp_path):
    """60 epochs, 7 evaluations of 32 pictures, in 320 seconds."""
    images = np.random.default_rng(0).integers(0, 256, (32, 24, 64, 3), np.uint8)
    (tmp_path / "config.json").write_text("{}")
    started = time.perf_counter()
    display = Display(tmp_path, 0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        for epoch in range(61):
            metrics = {"epoch": epoch, **{f"metric_{i}": 1 / (epoch + i + 3) for i in range(20)}}
            print(json.dumps(metrics), file=file, flush=True)
            display.curves(metrics)
            if epoch % 10 == 0:
                display.pictures(epoch, images, ["the word"] * 32, {"total": [0.1] * 32})
                display.page()
    display.comparison(0, 60)
    display.close()
    assert time.perf_counter() - started < 0.02 * 320 and not display.failed
    assert (tmp_path / "before_after.png").exists()


def test_wandb_without_its_package_ends_before_a_model_loads(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        prepare(["--wandb"])


@pytest.mark.skipif("WANDB" in os.environ, reason="here the package wandb is installed")
def test_a_directory_wandb_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)                                     # as an earlier run leaves it
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=f"pip install wandb .the directory {tmp_path / 'wandb'} is not it"):
        prepare(["--wandb"])


def test_a_package_wandb_is_used_though_a_directory_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "stray" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").touch()
    for place in ("packages", "stray"):
        monkeypatch.syspath_prepend(tmp_path / place)
    assert prepare(["--wandb"])[1].wandb


def records_of(path: Path) -> Iterator[bytes]:
    """Of a file that W&B keeps offline: LevelDB's log format after seven bytes, blocks of 32 KiB."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:
            at += left
        length, kind = struct.unpack("<HB", data[at + 4:at + 7])
        record += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):                                                                  # whole, or the last part
            yield record
            record = b""


@pytest.mark.skipif("WANDB" not in os.environ, reason="WANDB=1: needs the package wandb; offline")
def test_wandb_gets_the_numbers_under_the_same_names_and_the_run_keeps_its_id(tmp_path, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.json").write_text('{"seed": 1}')
    for first in 0, 2:
        display = Display(tmp_path, first, wandb=True)
        for epoch in range(first, first + 2):
            display.curves({"epoch": epoch, "eval/total": epoch / 4})
        display.close()
        assert not display.failed
        time.sleep(1.1)                                                                     # directories are told apart by the second
    (one, other), seen = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")), {}
    assert one.name == other.name == f"run-{(tmp_path / 'wandb_id').read_text()}.wandb"
    for record in map(Record.FromString, [*records_of(one), *records_of(other)]):
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            seen[items["_step"]] = items["eval/total"]
    assert seen == {0: 0, 1: 0.25, 2: 0.5, 3: 0.75}
