"""Runs a script as megamem.run does, and says at the end what of megamem ran once flags were known.

    calls: FUNCTION of megamem, FILE and name, but the CPU runtime
    collectives: NUMBER of calls into torch.distributed of this rank, from anywhere

COUNTED=bare runs the script without megamem's hooks, to compare.
"""

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from megamem.megatron import launcher

HOME = str(Path(launcher.__file__).parents[1])
COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "barrier"),
    *("broadcast", "broadcast_object_list", "reduce_scatter_tensor", "gather_object"),
    *("all_to_all_single", "new_group"),
)
calls: set[str] = set()
collectives = 0


def watch(frame: FrameType, event: str, _: Any) -> None:
    """Note every call into a file of megamem's."""
    path = frame.f_code.co_filename
    if event == "call" and path.startswith(HOME) and "/cpu/" not in path:
        calls.add(f"{Path(path).stem}.{frame.f_code.co_name}")


def count_collectives() -> None:
    """Replace the functions by ones that count."""
    import torch.distributed as dist

    def counting(original: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            global collectives
            collectives += 1
            return original(*args, **kwargs)

        return counted

    for name in COLLECTIVES:
        setattr(dist, name, counting(getattr(dist, name)))


def count_from_initialization() -> None:
    """Begin to watch where Megatron, its arguments validated, sets its ranks up."""
    from megatron.training import initialize

    distribute = initialize._initialize_distributed

    def _initialize_distributed(*args: Any, **kwargs: Any) -> Any:
        sys.setprofile(watch)
        return distribute(*args, **kwargs)

    initialize._initialize_distributed = _initialize_distributed


def main() -> int:
    run = launcher.run_as_main

    def run_as_main(command: Any) -> None:
        count_collectives()
        count_from_initialization()
        try:
            run(command)
        finally:
            sys.setprofile(None)
            sys.stdout.write(f"calls: {' '.join(sorted(calls))}\ncollectives: {collectives}\n")

    launcher.run_as_main = run_as_main
    if os.environ["COUNTED"] == "bare":
        from tests.helpers import without_hooks

        without_hooks.main(run_as_main)
        return 0
    return launcher.main()


if __name__ == "__main__":
    sys.exit(main())
