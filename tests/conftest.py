import time
from pathlib import Path

import pytest
import torch
from make_tiny_sd3 import make_pipeline

torch.set_num_threads(1)          # the tensors here are too small to share


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A directory in the hub's format: a small StableDiffusion3Pipeline, all nine parts, with random weights."""
    torch.manual_seed(0)
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "embedder" in name and parameter.ndim == 2:      # so that prompt and time matter as much as in a trained model
                parameter *= 3
    directory = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(directory)
    return str(directory)


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Running, and not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
