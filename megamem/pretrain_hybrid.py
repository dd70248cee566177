"""`python -m megamem.pretrain_hybrid FLAGS...` pretrains a hybrid model without a checkout.

It runs examples/pretrain_hybrid.py, as megamem.pretrain_gpt runs examples/pretrain_gpt.py.
"""

import sys
from collections.abc import Sequence

from megamem.megatron import launcher


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the only work of this process; return the exit status."""
    return launcher.run_own("pretrain_hybrid.py", argv)


if __name__ == "__main__":
    sys.exit(main())
