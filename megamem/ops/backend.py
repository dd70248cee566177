"""Chooses the backend of an op: the Triton kernel on a GPU, the torch reference elsewhere.

Tests run the kernels in Triton's interpreter, for which TRITON_INTERPRET=1 must be set before
triton is imported. A process that inherits the variable from a test runs every op in the
interpreter, thousands of times slower than the reference, so a test that starts a training run must
remove it from the environment.
"""

import torch
from torch import Tensor
from triton import knobs


def use_triton(x: Tensor) -> bool:
    """Return whether an op on x runs its Triton kernel.

    Kernels accumulate in fp32, so tensors in fp64 use the reference on every device.
    """
    return x.dtype != torch.float64 and (x.is_cuda or bool(knobs.runtime.interpret))
