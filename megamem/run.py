"""python -m megamem.run SCRIPT ...: the script, unmodified, with memory layers at its disposal."""

import sys

from megamem.integration.launcher import main

if __name__ == "__main__":
    sys.exit(main())
