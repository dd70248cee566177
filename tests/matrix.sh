#!/usr/bin/env bash
# Runs the tests against every supported release of Megatron-Core, each in an environment of its own
# over the usual one (nothing but Megatron is installed twice), and ends with a table.
#
#   bash tests/matrix.sh                               all releases, all that depends on Megatron
#   bash tests/matrix.sh 0.17.1 0.18.1                 these
#   bash tests/matrix.sh 0.18.1 -- tests/megatron -x    arguments for pytest behind --
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
# kernels, planner and sums on ranks are the same whatever Megatron is
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
        # what is installed here is found first, everything else in the usual environment
        echo "import site; site.addsitedir('$theirs')" >"$ours/usual.pth"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            "megatron-core==$release"
        echo "$release" >"$venv/.ready"
    fi
    "$venv/bin/python" - "$release" <<'EOF'
import sys
from megatron.core import __version__
# it adds the commit of the folder it is imported in
assert __version__.split("+")[0] == sys.argv[1], f"{__version__} is imported in place of {sys.argv[1]}"
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
