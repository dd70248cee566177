#!/usr/bin/env bash
# Sets up .venv if needed, then runs all checks. Arguments are passed to pytest:
#
#   bash tests/run.sh                         runs all tests that need no GPU and are not slow
#   bash tests/run.sh tests/ops -x            runs some of them
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
# two files at a time, as some tests only wait for ranks
step pytest -n 2 --dist loadfile -m "not gpu and not slow" "$@"
echo "==> all checks passed"
