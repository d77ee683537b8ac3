"""Models and adapters from a hub: the real libraries, over HTTP, from a hub on this machine into an empty cache."""

import contextlib
import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, errors_in, flags, metrics_of, save_small_sd3
from hub import serve_hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub")
    save_small_sd3(place / "someone/small")
    shutil.copytree(place / "someone/small", place / "someone/gated")
    with serve_hub(place, gated=("someone/gated",)) as (address, fetched):
        yield place, address, fetched


def start(ranks: int, cache: Path, address: str, *words: str, stderr: int = subprocess.PIPE, **environment: str):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, "train.py", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=stderr,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(cache), "HF_ENDPOINT": address, **environment})


@pytest.mark.slow
def test_a_model_and_an_adapter_come_from_the_hub_once_and_then_from_the_cache(hub, tmp_path):
    (place, address, fetched), cache = hub, tmp_path / "cache"
    small = flags(**SMALL, model="someone/small", output_dir=tmp_path)
    first = start(2, cache, address, *small, "--run-name", "first")
    assert first.returncode == 0, first.stderr
    assert "loading someone/small" in first.stdout
    assert "transformer/diffusion_pytorch_model.safetensors" in fetched and len(fetched) == len(set(fetched))
    # The adapter that was trained is put on the hub, and a run goes on from it: it begins where the first one ended.
    shutil.copytree(tmp_path / "first/checkpoints/epoch_00002/adapter", place / "someone/adapter")
    lora = ["--lora-path", "someone/adapter"]
    second = start(1, cache, address, *small, *lora, "--run-name", "second")
    assert second.returncode == 0, second.stderr
    last, begin = metrics_of(tmp_path / "first")[-1], metrics_of(tmp_path / "second")[0]
    assert begin["eval/total"] == pytest.approx(last["eval/total"], abs=1e-6)
    assert "adapter_model.safetensors" in fetched and len(fetched) == len(set(fetched))
    # Nothing more is fetched, and the hub is not needed.
    third = start(1, cache, address, *small, *lora, "--run-name", "third", HF_HUB_OFFLINE="1")
    assert third.returncode == 0, third.stderr
    assert metrics_of(tmp_path / "third")[-1]["eval/total"] == metrics_of(tmp_path / "second")[-1]["eval/total"]


@pytest.mark.slow
def test_a_terminal_shows_how_far_the_download_is(hub, tmp_path):
    _, address, _ = hub
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))                  # rows and columns
    chunks = []

    def read() -> None:                          # beside the run, because a terminal holds 4 KiB and then makes it wait
        with contextlib.suppress(OSError):       # at the end of all that write to it
            while True:
                chunks.append(os.read(ours, 4096))

    (reader := threading.Thread(target=read)).start()
    small = flags(**SMALL | dict(epochs=0), model="someone/small", output_dir=tmp_path)
    done = start(1, tmp_path / "cache", address, *small, stderr=theirs)
    os.close(theirs)
    reader.join(timeout=10)
    shown = b"".join(chunks).decode(errors="replace")
    assert done.returncode == 0, shown
    assert "Fetching" in shown


@pytest.mark.slow
@pytest.mark.parametrize("name, says", [("someone/gated", "is gated: accept its licence"),
                                        ("someone/unknown", "is neither here nor on the hub")])
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, name, says):
    _, address, _ = hub
    refused = start(1, tmp_path / "cache", address, "--model", name)
    assert refused.returncode == 2
    [line] = errors_in(refused.stderr)
    assert name in line and says in line
