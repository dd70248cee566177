"""Runs megamem.run, and prints the precision in which Transformer Engine and a memory computed.

python -m tests.gpu.engine_run SCRIPT ARGUMENTS...

precision of linears: fp8 DelayedScaling
precision of memories: torch.bfloat16, table torch.bfloat16, read-out torch.bfloat16
"""

import sys
from typing import Any

from megamem.megatron.launcher import main

LINEARS = "precision of linears"
MEMORIES = "precision of memories"


def watch() -> None:
    """Make the first linear and the first memory layer print their precision; imports Megatron."""
    from megatron.core.extensions.transformer_engine import TERowParallelLinear
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megamem.megatron.model.memory_mlp import MemoryMLP

    said: set[str] = set()

    def say(what: str, how: str) -> None:
        if what not in said:
            said.add(what)
            sys.stdout.write(f"{what}: {how}\n")

    linear, memory = TERowParallelLinear.forward, MemoryMLP.forward

    def linear_forward(self: Any, *rest: Any, **more: Any) -> Any:
        out = linear(self, *rest, **more)
        # the state of the module in this forward, not the flags
        recipe = type(FP8GlobalStateManager.get_fp8_recipe()).__name__ if self.fp8 else ""
        say(LINEARS, f"fp8 {recipe}" if self.fp8 else str(self.weight.dtype))
        return out

    def memory_forward(self: Any, *rest: Any, **more: Any) -> Any:
        out = memory(self, *rest, **more)
        dtypes = " ".join(sorted({str(p.dtype) for p in self.memory.parameters()}))
        tables = {str(p.dtype) for p in self.memory.pool.tables.parameters()}
        say(MEMORIES, f"{dtypes}, table {' '.join(sorted(tables))}, read-out {out[0].dtype}")
        return out

    TERowParallelLinear.forward = linear_forward
    MemoryMLP.forward = memory_forward


if __name__ == "__main__":
    watch()
    sys.exit(main())
