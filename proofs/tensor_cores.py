"""Run a program whose float16 matrix products are those of a GPU's tensor cores, on a CPU: linear layers and their
gradients. Attention and convolutions remain the CPU's own.

    python -m proofs.tensor_cores train.py tiny_ocr --dtype float16

A tensor core multiplies halves exactly, sums in float32, and rounds once. A CPU without float16 arithmetic takes
ten times as long for a product, and so for an epoch of the bundled model.
"""

import runpy
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
            torch.ops.aten.baddbmm.default)


class TensorCores(TorchDispatchMode):
    """Within, products of float16 matrices are computed in float32 and rounded to float16."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function in PRODUCTS and arguments[-1].dtype == torch.float16:
            return function(*(matrix.float() for matrix in arguments), **keywords).half()
        return function(*arguments, **keywords)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with TensorCores():
        runpy.run_path(sys.argv[0], run_name="__main__")
