"""python -m megamem.run SCRIPT ...: the script, unmodified, with memory layers at its disposal."""

import sys
from collections.abc import Sequence

from megamem.megatron import launcher


def main(argv: Sequence[str] | None = None) -> int:
    """What `megamem run` calls, as all that its process does."""
    return launcher.main(argv, ends_process=True)


if __name__ == "__main__":
    sys.exit(main())
