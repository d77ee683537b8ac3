"""A program of this project: printing never raises, and its end waits for nobody."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from harness.program import Unfailing

ROOT = Path(__file__).parent.parent

PROGRAM = """
import atexit, multiprocessing, os, sys, threading, time
from pathlib import Path
from tqdm import tqdm
from harness.program import run_as_program

def main():
    for i in tqdm(range(20000), mininterval=0, desc="caf\u00e9"):        # more than a pipe or a buffer holds
        if i % 10 == 0:
            tqdm.write("word \u4f60\u597d \U0001f600 \\udcff", file=sys.stdout)
            print("warning: \u4f60", file=sys.stderr, flush=True)
    atexit.register(Path("atexit").touch)
    if sys.argv[1] == "thread":
        threading.Thread(target=time.sleep, args=(600,)).start()
    if sys.argv[1] == "child":
        multiprocessing.Process(target=time.sleep, args=(600,)).start()
    if sys.argv[1] == "fault":
        1 / 0
    Path("done").write_text("done")

run_as_program(main)
"""


@pytest.fixture
def run(tmp_path):
    """`run(shell words after the command, what happens)`: the exit code and standard error."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(words: str = "", what: str = "nothing", **environment) -> tuple[int, str]:
        command = f"trap '' PIPE; {{ '{sys.executable}' program.py {what}; echo $? > code; }} {words}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                              env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, errors="replace")
        for _ in range(200):                     # a reader that has gone does not wait for it
            if (tmp_path / "code").exists() and (text := (tmp_path / "code").read_text()):
                return int(text), done.stderr
            time.sleep(0.1)
        pytest.fail("it does not end")

    return run


ASCII = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")


@pytest.mark.parametrize("words, environment", [
    ("", {}), ("2>&1 | head -1", {}), *(pytest.param(words, environment, marks=pytest.mark.slow) for words, environment in [
        ("| head -1", {}), ("> /dev/full", {}), ("> /dev/full 2>&1", {}), (">&-", {}), ("2>&-", {}), (">&- 2>&- <&-", {}),
        ("| cat", ASCII), ("2>&1 | cat", {"PYTHONIOENCODING": "ascii:strict"}), ("| cat >&-", {})])])
def test_it_ends_well_wherever_its_output_goes(run, tmp_path, words, environment):
    code, err = run(words, **environment)
    assert code == 0 and (tmp_path / "done").read_text() == "done" and (tmp_path / "atexit").exists()
    assert "Traceback" not in err and "Exception ignored" not in err, err[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["thread", "child"])
def test_its_end_waits_for_no_thread_or_process_of_user_code(run, tmp_path, what):
    started = time.monotonic()
    assert run(what=what)[0] == 0 and (tmp_path / "done").exists() and time.monotonic() - started < 30


def test_a_fault_ends_it_with_its_traceback(run):
    code, err = run(what="fault")
    assert code == 1 and "ZeroDivisionError" in err


def test_text_goes_on_where_a_full_disk_has_room_again(tmp_path):
    class Full:
        full, encoding, text = True, "utf-8", ""

        def write(self, text):
            if self.full:
                raise OSError(28, "No space left on device")
            self.text += text

        flush = write_through = lambda self: None

    disk = Full()
    stream = Unfailing(disk)
    print("lost", file=stream, flush=True)
    disk.full = False
    tqdm.write("kept", file=stream)
    assert disk.text == "kept\n"


def test_ctrl_c_while_loading_ends_it_without_a_traceback(tmp_path):
    (tmp_path / "loads.py").write_text("import time\nfrom harness.program import run_as_program\ndef main():\n"
                                       "    print('loading', flush=True)\n    time.sleep(600)\nrun_as_program(main)\n")
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)         # a shell's background jobs ignore it
    process = subprocess.Popen([sys.executable, tmp_path / "loads.py"], env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == ""


# ----------------------------------------------------------------------------- a Python or a system that is not enough

OLDER = sorted(Path.home().glob(".pyenv/versions/3.*/bin/python"))
TRAINER = "error: nano-flow-grpo needs Python 3.11 or later on Linux or macOS"
PRETEND = "import runpy, sys; sys.{} = {}; sys.argv = ['{}']; sys.path.insert(0, '{}'); runpy.run_path(sys.argv[0], run_name='__main__')"


def one_line_of(command: list) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode and not done.stdout and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def older_than(minor: int) -> list[Path]:
    return [python for python in OLDER if int(python.parent.parent.name.split(".")[1]) < minor]


@pytest.mark.parametrize("words", [["train.py"], ["-m", "tools.bench"], ["-m", "harness.gallery"]], ids=" ".join)
@pytest.mark.parametrize("python", older_than(11) or [None], ids=lambda python: python and python.parent.parent.name)
def test_an_older_python_says_in_one_line_what_the_trainer_needs(python, words):
    if python is None:
        pytest.skip("no Python older than 3.11 is installed")
    line = one_line_of([python, *words])
    assert line.startswith(TRAINER) and str(python) in line


@pytest.mark.parametrize("name, value", [("version_info", (3, 10, 13)), ("platform", "'win32'")])
def test_what_the_trainer_needs_is_said_before_anything_else_is_imported(name, value):
    line = one_line_of([sys.executable, "-S", "-c", PRETEND.format(name, value, ROOT / "train.py", ROOT)])    # -S: no packages
    assert line.startswith(TRAINER) and ("3.10" if name == "version_info" else "on win32") in line


def test_an_older_python_says_in_one_line_what_the_server_needs():
    pythons = [python for python in older_than(10) if python not in older_than(8)]
    lines = [one_line_of([python, "rewards.py", "serve", "jpeg_compressibility"]) for python in pythons]
    lines += [one_line_of([sys.executable, "-S", "-c", PRETEND.format("version_info", (3, 9, 1), ROOT / "rewards.py", ROOT)])]
    assert all(line.startswith("error: rewards.py serve needs Python 3.10 or later, and this is 3.") for line in lines)
