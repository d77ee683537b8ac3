"""On a GPU that is not there: nothing mixes devices, and inside a step the host waits for no value."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fake_gpu.py"
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="the device that is not there needs a C++ compiler")
pytestmark = [pytest.mark.slow, needs_compiler]


def walk(*words):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("family", ["sd35m", "sd35l", "flux", "qwen_image", "flux2_klein_4b", "flux2_klein_9b", "flux2_dev", "z_image"])
def test_a_step_of_the_published_size_stays_on_the_gpu(family):
    done = walk(family)
    assert done.stdout == f"walked {family}\n", done.stderr[-2000:]


@pytest.mark.parametrize("fault, message", [("an index on the CPU", "index on the CPU"), ("a look at a value", "_local_scalar_dense"),
                                            ("a tensor on the wrong device", "device")])
def test_a_planted_fault_is_seen(fault, message):
    done = walk("sd35m", fault)
    assert done.returncode and message in done.stderr.splitlines()[-1], done.stderr[-2000:]
