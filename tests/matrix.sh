#!/usr/bin/env bash
# Runs the tests against every supported release of Megatron-Core, and ends with a table. Each
# release has its own environment on top of .venv, in which only Megatron is installed.
#
#   bash tests/matrix.sh                               all releases, all tests that need Megatron
#   bash tests/matrix.sh 0.17.1 0.18.1                 only these releases
#   bash tests/matrix.sh 0.18.1 -- tests/megatron -x    arguments after -- are for pytest
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash examples/setup.sh

releases=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    releases+=("$1")
    shift
done
[ $# -eq 0 ] || shift
[ ${#releases[@]} -gt 0 ] || releases=(0.17.1 0.18.1 0.19.2)
# kernels, planner and parallel do not depend on Megatron
[ $# -gt 0 ] || set -- tests/megatron tests/cpu tests/examples tests/patches tests/tools tests/optimizer \
    tests/checkpoint tests/test_metrics.py tests/test_main.py

say() { printf '\n==> %s\n' "$*"; }

prepare() {
    local release=$1 venv=$root/.venv/releases/$1
    if [ "$(cat "$venv/.ready" 2>/dev/null)" != "$release" ]; then
        "$root/.venv/bin/python" -m venv --clear "$venv"
        local ours theirs
        ours=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        theirs=$("$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        # packages of this environment come first, all others are those of .venv
        echo "import site; site.addsitedir('$theirs')" >"$ours/usual.pth"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            "megatron-core==$release"
        echo "$release" >"$venv/.ready"
    fi
    "$venv/bin/python" - "$release" <<'EOF'
import sys
from megatron.core import __version__
# Megatron appends the commit of the folder in which it is imported
assert __version__.split("+")[0] == sys.argv[1], f"{__version__} is imported instead of {sys.argv[1]}"
EOF
}

failed=0
results=()
for release in "${releases[@]}"; do
    say "Megatron-Core $release"
    prepare "$release"
    log=$root/.venv/releases/$release.log
    if PATH=$root/.venv/releases/$release/bin:$PATH python -m pytest -n 2 --dist loadfile \
        -p no:cacheprovider -m "not gpu and not slow" "$@" 2>&1 | tee "$log"; then
        verdict=passed
    else
        verdict=FAILED
        failed=1
    fi
    results+=("$(printf '%-8s %-7s %s' "$release" "$verdict" "$(tail -n 1 "$log" | tr -d '=')")")
done
say "releases of Megatron-Core"
printf '%s\n' "${results[@]}"
exit $failed
