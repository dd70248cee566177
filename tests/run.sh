#!/usr/bin/env bash
# Sets up if needed, then runs every check. Arguments go to pytest:
#
#   bash tests/run.sh                         everything that needs no GPU
#   bash tests/run.sh tests/ops -x            some of it
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash examples/setup.sh
export PATH=$root/.venv/bin:$PATH

step() {
    echo "==> $*"
    "$@"
}

step ruff check .
step ruff format --check .
step mypy
# two files at a time: some keep one core busy, some wait for ranks
step pytest -n 2 --dist loadfile -m "not gpu and not slow" "$@"
echo "==> all checks passed"
