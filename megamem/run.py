"""`python -m megamem.run SCRIPT ...` runs an unmodified training script with memory layers."""

import sys
from collections.abc import Sequence

from megamem.megatron import launcher


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher as the only work of this process; return the exit status."""
    return launcher.main(argv, ends_process=True)


if __name__ == "__main__":
    sys.exit(main())
