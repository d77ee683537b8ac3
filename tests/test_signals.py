"""Workers end with their launcher, and processes of user code are as in any other program and end with their worker."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import alive, launch_ranks, wait_until

import distributed

SLEEPERS = """
import os, sys, time
from pathlib import Path
import distributed
from harness import signals
signals.end_with_launcher()
distributed.setup()
Path(sys.argv[1], str(os.getpid())).touch()
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_workers_end_within_seconds_when_their_launcher_is_killed(tmp_path):
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    folder = tmp_path / "pids"
    folder.mkdir()
    launcher = launch_ranks(tmp_path / "sleepers.py", folder, 2)
    try:
        wait_until(lambda: len(list(folder.iterdir())) == 2, 200)
        workers = [int(path.name) for path in folder.iterdir()]
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    wait_until(lambda: not any(map(alive, workers)), 5)


# A reward computes in a thread while the run goes on; what it starts must be as in any other program.
CHILDREN = """
import concurrent.futures, multiprocessing, os, signal, subprocess, sys, threading, time
from pathlib import Path
import distributed as d
from harness import signals
from harness.program import exit_within

def pool(method):
    with multiprocessing.get_context(method).Pool(2) as p:
        assert p.map(float, [1, 2, 3]) == [1, 2, 3]

def terminated():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join(10)
    assert child.exitcode == -signal.SIGTERM, child.exitcode

def executor():
    with concurrent.futures.ProcessPoolExecutor(2) as e:
        assert list(e.map(float, [1, 2, 3])) == [1, 2, 3]

def by_hand(number=signal.SIGTERM):
    if not (pid := os.fork()):
        time.sleep(600)
        os._exit(0)
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number

def program(**options):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], **options)
    child.terminate()
    assert child.wait(10) == -signal.SIGTERM

ways = [lambda: pool("fork"), lambda: pool("spawn"), lambda: pool("forkserver"), terminated, executor, by_hand,
        program, lambda: program(close_fds=False), lambda: program(preexec_fn=os.setpgrp),
        lambda: program(close_fds=False, preexec_fn=lambda: None)]
outlives = dict(forked=lambda: os.fork() or (time.sleep(600), os._exit(0)),
                process=lambda: multiprocessing.Process(target=time.sleep, args=(600,)).start(),
                daemon=lambda: multiprocessing.Process(target=time.sleep, args=(600,), daemon=True).start(),
                pool=lambda: keep.append(multiprocessing.Pool(2)), executor=lambda: keep.append(long_lived()))
keep, failed = [], []

def long_lived():
    executor = concurrent.futures.ProcessPoolExecutor(2)
    executor.submit(time.sleep, 600)
    return executor

def reward():
    try:
        for way in ways if sys.argv[2] == "ways" else [outlives[sys.argv[2]]]:
            way()
        assert not signals.stop_asked(), "taken for the run's own"
    except BaseException as error:
        failed.append(repr(error))
        raise

if __name__ == "__main__":
    signals.end_with_launcher()
    d.setup()
    with signals.stopping_on_signals():
        thread = threading.Thread(target=reward)
        thread.start()
        thread.join()
    assert not failed, failed
    with concurrent.futures.ProcessPoolExecutor(2) as e:          # and after it
        assert list(e.map(float, [1, 2])) == [1, 2]
    Path(sys.argv[1], "done").write_text(str(os.getpid()))
    d.shutdown()
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    exit_within(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what, end", [("ways", "ends"), *((kind, end) for kind in (
    "forked", "process", "daemon", "pool", "executor") for end in ("ends", "killed"))])
@pytest.mark.skipif(sys.platform != "linux", reason="that children end with a process that was killed is Linux's")
def test_processes_of_user_code_obey_signals_and_do_not_outlive_the_run(tmp_path, what, end):
    (tmp_path / "children.py").write_text(CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(Path(distributed.__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, tmp_path / "children.py", tmp_path, what, end], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        process.wait(100)
        assert process.returncode == (0 if end == "ends" else -signal.SIGKILL), process.stderr.read()
        _, errors = process.communicate(timeout=5)               # what still ran would hold these open
    finally:
        process.kill()
        process.wait()


ORPHAN = """
import sys, time
from pathlib import Path
import distributed
from harness import signals
Path(sys.argv[1], "imported").touch()
while not Path(sys.argv[1], "launcher is gone").exists():
    time.sleep(0.01)
signals.end_with_launcher()
distributed.setup()                              # would wait for others, for an hour
"""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are told by their parent's death")
def test_a_worker_whose_launcher_is_killed_before_it_sets_up_ends_too(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": str(Path(distributed.__file__).parent), "RANK": "0", "WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "none"}
    words = f"'{sys.executable}' '{tmp_path}/orphan.py' '{tmp_path}' & echo $! > '{tmp_path}/pid'; wait"
    launcher = subprocess.Popen(["sh", "-c", words], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "imported").exists, 200)
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    worker = int((tmp_path / "pid").read_text())
    assert alive(worker)
    (tmp_path / "launcher is gone").touch()
    wait_until(lambda: not alive(worker), 5)


def test_ranks_that_no_torchrun_started_name_their_own_command():
    """The parent is a shell or a scheduler then, and its command line starts no run."""
    script = "from harness.signals import command_line; print(command_line())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    said = subprocess.run([sys.executable, "-c", script], env={**environment, "RANK": "0"}, text=True, check=True,
                          cwd=Path(distributed.__file__).parent, capture_output=True).stdout
    assert said == shlex.join([sys.executable, "-c", script]) + "\n"
