#!/usr/bin/env bash
# For whoever has one GPU for a few minutes: checks and measures what only a GPU can show, and ends
# with one table. Each part has its time limit and all of them together have one, so that a part
# that fails or hangs does not cost the others. Without a GPU it is a dry run on the CPU.
#
#   bash tests/gpu.sh                     every part
#   bash tests/gpu.sh warm answers        some parts; --list names them, --help the options
#
#   MEGAMEM_WHEELS=DIR          wheels to run with, for a machine where nothing can be installed:
#                               megatron-core's, and those that the first line of output asks for
#   MEGAMEM_PYTHON=PYTHON       the interpreter; default: .venv of this checkout, or python3
#   MEGAMEM_GPU_SECONDS=230     for all parts together
#   MEGAMEM_COMMIT=COMMIT       what runs, where there is no git to ask
#   PUBLISHED=DIR               checkout of facebookresearch/memory, whose kernels are timed, too
#   OUT=runs/gpu                gets results.json, table.txt and logs.txt
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${MEGAMEM_PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ -x .venv/bin/python ] && [ -z "${MEGAMEM_WHEELS:-}" ] && python=.venv/bin/python
fi
exec "$python" -m tests.gpu "$@"
