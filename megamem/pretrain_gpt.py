"""`python -m megamem.pretrain_gpt FLAGS...` pretrains a GPT without a Megatron-LM checkout.

    torchrun --nproc-per-node 8 -m megamem.pretrain_gpt <Megatron's flags> --memory-layers 4 12 20

It runs examples/pretrain_gpt.py, which megamem's wheel holds, as `-m megamem.run` would. With --cpu
it trains on CPUs.
"""

import sys
from collections.abc import Sequence

from megamem.megatron import launcher


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the only work of this process; return the exit status."""
    return launcher.run_own("pretrain_gpt.py", argv)


if __name__ == "__main__":
    sys.exit(main())
