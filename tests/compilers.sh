#!/usr/bin/env bash
# Compiles every kernel for every architecture, with the checks of tests/kernels, under the oldest
# Triton that setup.py allows and under the newest release. Also runs the tests of the ops in the
# interpreter of the oldest Triton, with its torch. Each pair has its own environment on top of
# .venv, which needs about 5 GB. The script ends with a table.
#
#   bash tests/compilers.sh                       the oldest pair, and the newest Triton
#   bash tests/compilers.sh 2.12.1/3.7.0          torch 2.12.1 and Triton 3.7.0
#   bash tests/compilers.sh /3.8.0                Triton 3.8.0 with the torch of .venv
#   bash tests/compilers.sh 2.11.0/3.6.0 -- tests/ops -x    arguments after -- are for pytest
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source-path=SCRIPTDIR source=on_top.sh
source tests/on_top.sh
bash examples/setup.sh

pairs=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    pairs+=("$1")
    shift
done
[ $# -eq 0 ] || shift
# the tests of the kernels also compile all cases, and check the list of known exceptions
[ $# -gt 0 ] || set -- tests/kernels tests/ops tests/reference
if [ ${#pairs[@]} -eq 0 ]; then
    newest=$("$root/.venv/bin/python" -m pip index versions triton 2>/dev/null |
        sed -n '1s/.*(\(.*\)).*/\1/p')
    pairs=(2.11.0/3.6.0 "/${newest:?is empty, as pip lists no release of Triton}")
fi

say() { printf '\n==> %s\n' "$*"; }

# makes the environment of a pair, with the packages that differ from those of .venv
prepare() {
    local torch=${1%/*} triton=${1#*/} venv=$root/.venv/compilers/$2
    [ "$(cat "$venv/.ready" 2>/dev/null)" != "$1" ] || return 0
    "$root/.venv/bin/python" -m venv --clear "$venv"
    local packages=("triton==$triton")
    # all dependencies of torch are installed again, as its libraries must be in the same folder;
    # the interpreter of Triton 3.6 converts arrays of one element to numbers, which numpy 2.4
    # forbids
    [ -z "$torch" ] || packages+=("torch==$torch" "numpy<2.4")
    install_into "$venv" "${packages[@]}"
    # only now, so that pip did not find these packages in .venv
    put_on_top "$venv"
    echo "$1" >"$venv/.ready"
}

failed=0
results=()
for pair in "${pairs[@]}"; do
    torch=${pair%/*}
    name=${torch:+torch-$torch-}triton-${pair#*/}
    say "$name"
    prepare "$pair" "$name"
    log=$root/.venv/compilers/$name.log
    python=$root/.venv/compilers/$name/bin/python
    versions=$("$python" - "$pair" <<'PYTHON'
import sys

import torch
import triton

wanted = sys.argv[1].split("/")
found = [torch.__version__.partition("+")[0], triton.__version__]
assert all(w in ("", f) for w, f in zip(wanted, found)), f"{found} are imported instead of {wanted}"
print("torch {} triton {}".format(*found))
PYTHON
    )
    verdict=passed
    "$python" -m tests.kernels.aot --all 2>&1 | tee "$log" || verdict=FAILED
    # tests/run.sh tests the torch of .venv
    if [ -n "$torch" ]; then
        "$python" -m pytest -p no:cacheprovider -n 2 --dist loadfile -m "not gpu" "$@" 2>&1 |
            tee -a "$log" || verdict=FAILED
    fi
    [ $verdict = passed ] || failed=1
    results+=("$(printf '%-30s %-7s %s' "$versions" "$verdict" "$(tail -n 1 "$log" | sed 's/^=* *//; s/ *=*$//')")")
done
say "compilers"
printf '%s\n' "${results[@]}"
exit $failed
