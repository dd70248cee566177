"""Where an op runs: the Triton kernel on a GPU (or interpreted), its torch twin elsewhere.

Triton's interpreter is for tests. TRITON_INTERPRET=1 must be set before triton is imported, and a
process that inherits it from a test runs every op in the interpreter, thousands of times slower
than the twin: whoever starts a training run from a test strips it from the environment.
"""

import torch
from torch import Tensor
from triton import knobs


def use_triton(x: Tensor) -> bool:
    """Kernels accumulate in fp32, so fp64 stays with the twin on every device."""
    return x.dtype != torch.float64 and (x.is_cuda or bool(knobs.runtime.interpret))
