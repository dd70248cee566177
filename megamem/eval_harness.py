"""`python -m megamem.eval_harness FLAGS...` is lm-eval with checkpoints as the model `megamem`.

    torchrun --nproc-per-node 8 -m megamem.eval_harness --model megamem \\
        --model_args load=CHECKPOINTS,tensor_model_parallel_size=8 --tasks nq_open triviaqa

It runs examples/eval_harness.py, as megamem.pretrain_gpt runs examples/pretrain_gpt.py. With --cpu
it evaluates on CPUs.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from megamem.errors import stop
from megamem.megatron import launcher


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the only work of this process; return the exit status."""
    if find_spec("lm_eval") is None:
        stop("lm-eval is not installed; install it with pip install 'megamem[eval]'.")
    return launcher.run_own("eval_harness.py", argv)


if __name__ == "__main__":
    sys.exit(main())
