#!/usr/bin/env bash
# Runs the tests and measurements that need a GPU, in about four minutes, and ends with one table.
# There is a time limit for each part and for all parts together, so that a part that fails or hangs
# does not stop the others. Without a GPU it makes a dry run on the CPU.
#
#   bash tests/gpu.sh                     runs all parts
#   bash tests/gpu.sh warm answers        runs some parts; --list names them, --help lists the flags
#
#   MEGAMEM_WHEELS=DIR          folder with wheels, for a machine on which nothing can be installed:
#                               that of megatron-core, and those that the first line of output names
#   MEGAMEM_PYTHON=PYTHON       the interpreter (default: .venv of this checkout, or python3)
#   MEGAMEM_GPU_SECONDS=230     time limit of all parts together
#   MEGAMEM_COMMIT=COMMIT       the commit of this checkout, for a machine without git
#   PUBLISHED=DIR               checkout of facebookresearch/memory, whose kernels are timed, too
#   OUT=runs/gpu                folder for results.json, table.txt and logs.txt
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${MEGAMEM_PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ -x .venv/bin/python ] && [ -z "${MEGAMEM_WHEELS:-}" ] && python=.venv/bin/python
fi
exec "$python" -m tests.gpu "$@"
