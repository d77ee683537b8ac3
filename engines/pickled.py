"""The client of the reward-servers that Flow-GRPO's authors train with, for GenEval and DeQA, in pickle.

`urls={"geneval": "pickle+http://host:port"}` asks one. A pickle may name any function to call, so
`read_plain_pickle` reads plain data alone and calls nothing that a server names.
"""
import io
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from rewards import Columns, one_line_errors, picture_file, read_answer, without_user


def ask_pickle_server(name: str, url: str, send: Callable, images: np.ndarray, prompts: list[str],
                      metadata: list[dict]) -> tuple[np.ndarray, Columns]:
    """Ask the server of `name`, "geneval" or "deqa", for scores and metrics. `images`: (B, H, W, 3) uint8.

    send: `rewards.post`, or what works like it.
    """
    request = {"images": [picture_file(image, "JPEG") for image in images]}  # quality 75, as its own client's
    if name == "geneval":
        # The server's rules read the prompt in the metadata. only_strict would leave the accuracy out.
        request["meta_datas"] = [{"prompt": prompt, **entry} for prompt, entry in zip(prompts, metadata)]
        request["only_strict"] = False
    how_to_start = f'gunicorn "app_{name}:create_app()" in its checkout'
    response = send(url, content=pickle.dumps(request, 4), how_to_start=how_to_start)
    with one_line_errors(f"{without_user(url)} answered something else than scores of each picture"):
        answer = read_plain_pickle(response.content)
        if name == "deqa":
            return read_answer(len(images), answer["outputs"], {})
        metrics = {"strict_accuracy": answer["strict_rewards"], "accuracy": answer["rewards"]}
        for kind, key in (("strict_accuracy", "group_strict_rewards"), ("accuracy", "group_rewards")):
            for tag, values in answer[key].items():  # -10 marks a picture of another tag
                metrics[f"{kind}/{tag}"] = [None if value == -10 else value for value in values]
        return read_answer(len(images), answer["scores"], metrics)


class Dtype:
    """Stands for numpy.dtype in a pickle: its kind and size, as in "f8", and its byte order."""

    def __init__(self, kind: str, *_: Any) -> None:
        self.kind, self.order = kind, "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def read_scalar(dtype: Dtype, content: bytes) -> Any:
    """Return a numpy scalar of a pickle as a plain number or string."""
    name = f"{dtype.order}{dtype.kind}"
    if not re.fullmatch(r"[<>|]([biu][1248]|f[248]|U\d{1,4})", name):
        raise ValueError(f"the pickle holds a numpy scalar of type {name!r}: refused")
    return np.frombuffer(content, name, count=1)[0].item()


ADMITTED = {
    ("numpy", "dtype"): Dtype,
    ("numpy.core.multiarray", "scalar"): read_scalar,  # numpy 1
    ("numpy._core.multiarray", "scalar"): read_scalar,  # numpy 2
    ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),  # bytes, as protocols 0 to 2 write them
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
}


class PlainUnpickler(pickle.Unpickler):
    """Unpickles what ADMITTED names, and refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            asked = f"{module}.{name}"
            raise ValueError(f"the pickle asks for {asked}, which is no plain data: refused, and not run")
        return ADMITTED[module, name]


def read_plain_pickle(data: bytes) -> Any:
    """Return what a pickle holds: plain containers, numbers and strings; numpy scalars become plain ones.

    Raises ValueError for a pickle that names anything else, and calls nothing that it names.
    """
    # Even a pickle of plain data can crash us: hashing a deeply nested tuple overflows the C stack, and a PUT
    # opcode with a huge index allocates a huge memo.
    tuples, large = 0, len(data) > 1 << 20
    for opcode, argument, _ in [] if large else pickletools.genops(data):
        tuples += opcode.name.startswith("TUPLE")
        large |= tuples > 10_000 or "PUT" in opcode.name and argument > len(data)
    if large:
        raise ValueError("the pickle is larger, or wants more memory, than scores need: refused")
    return PlainUnpickler(io.BytesIO(data)).load()
