"""Runs a script as megamem.run does, with a fault that FAULT names.

kill-while-saving 2     the second checkpoint's data is written, then this rank is gone
kill 1 3                rank 1 is gone in its third step
nan 1 3                 on rank 1, a table's gradient has a NaN in the third step
nan-table 1 3           on rank 1, a row of a table has a NaN after the third step
flag 1 --memory-topk 2  rank 1 was started with this flag
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from megamem.megatron.launcher import main


def _kill_while_saving(count: str) -> None:
    from megatron.core.dist_checkpointing.strategies import state_dict_saver
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    saves = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def save_state_dict_async_finalize(*args: Any, **more: Any) -> Any:
            nonlocal saves
            saves += 1
            if saves == int(count):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **more)

        return save_state_dict_async_finalize

    name = "save_state_dict_async_finalize"
    replaced = dying(getattr(state_dict_saver, name))
    for module in (state_dict_saver, strategies):
        if hasattr(module, name):
            setattr(module, name, replaced)


def _in_step(rank: str, step: str, fault: Callable[[Any], None]) -> None:
    """fault(table optimizer) on this rank, when it reduces gradients for the step-th time."""
    import torch.distributed as dist

    from megamem.optimizer import TableOptimizer

    original = TableOptimizer.reduce
    calls = 0

    def reduce(self: TableOptimizer) -> None:
        nonlocal calls
        calls += 1
        if dist.get_rank() == int(rank) and calls == int(step):
            fault(self)
        original(self)

    TableOptimizer.reduce = reduce  # type: ignore[method-assign]


def _nan(rank: str, step: str) -> None:
    def spoil(optimizer: Any) -> None:
        for table in optimizer.tables.values():
            table.gradient.buffer[0, 0] = float("nan")
            table.gradient.touched[0] = True

    _in_step(rank, step, spoil)


def _nan_table(rank: str, step: str) -> None:
    def spoil(optimizer: Any) -> None:
        for table in optimizer.tables.values():
            # a row that is read, so that it will be again
            row = table.gradient.touched.nonzero()[0]
            table.weight.data[row, 0] = float("nan")

    _in_step(rank, step, spoil)


def _kill(rank: str, step: str) -> None:
    _in_step(rank, step, lambda _: os.kill(os.getpid(), signal.SIGKILL))


FAULTS = {
    "kill-while-saving": _kill_while_saving,
    "kill": _kill,
    "nan": _nan,
    "nan-table": _nan_table,
}


def _install_after_hooks() -> None:
    """The fault goes in when the hooks do: not before the CPU runtime, nor after the script."""
    from megamem.megatron import launcher

    run = launcher.run_as_main

    def run_as_main(command: Any) -> None:
        name, *values = os.environ["FAULT"].split()
        if name == "flag":
            rank, *words = values
            added = words if os.environ["RANK"] == rank else []
            command = dataclasses.replace(command, arguments=[*command.arguments, *added])
        else:
            FAULTS[name](*values)
        run(command)

    launcher.run_as_main = run_as_main


if __name__ == "__main__":
    _install_after_hooks()
    sys.exit(main())
