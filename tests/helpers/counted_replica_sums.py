"""Runs a script as megamem.run does, and counts the collectives that sum over replicas.

replica sums: NUMBER of all-reduces, NUMBER of reduce-scatters   of this rank in all steps
"""

import sys
from collections import Counter
from typing import Any

from megamem.megatron import launcher

calls: Counter[str] = Counter()


def count(name: str) -> None:
    """Replace a collective by one that counts the calls for replicas."""
    import torch.distributed as dist

    original = getattr(dist, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls[name] += sys._getframe(1).f_code.co_filename.endswith("parallel/row_reduction.py")
        return original(*args, **options)

    setattr(dist, name, counted)


def main() -> int:
    run = launcher.run_as_main

    def run_as_main(command: Any) -> None:
        for name in ("all_reduce", "reduce_scatter_tensor"):
            count(name)
        try:
            run(command)
        finally:
            both = f"{calls['all_reduce']} all-reduces, {calls['reduce_scatter_tensor']}"
            sys.stdout.write(f"replica sums: {both} reduce-scatters\n")

    launcher.run_as_main = run_as_main
    return launcher.main()


if __name__ == "__main__":
    sys.exit(main())
