#!/usr/bin/env bash
# Runs the tests against releases of Megatron-Core and against Megatron-LM's main, and ends with a
# table. Each has its own environment on top of .venv, in which only Megatron is installed.
#
#   bash tests/matrix.sh                               all releases and main; tests that need Megatron
#   bash tests/matrix.sh 0.17.1 main                   only these
#   bash tests/matrix.sh path/to/Megatron-LM           a checkout, which is only read
#   bash tests/matrix.sh d98e8a64ddf3...               a commit of Megatron-LM, with all its 40 digits
#   bash tests/matrix.sh 0.18.1 -- tests/megatron -x   arguments after -- are for pytest
#
# Releases come from PyPI. main is the pinned commit below; it and other commits are fetched from
# GitHub, or from the repository that MEGATRON_LM_URL names. From a checkout or commit pip builds the
# package, which needs a C++ compiler, and tests/patches also patches its own scripts.
set -euo pipefail

MAIN=d98e8a64ddf34856e74b24714e3bedb2f5a39553 # 2026-08-22, to become 0.20
URL=${MEGATRON_LM_URL:-https://github.com/NVIDIA/Megatron-LM.git}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# paths are relative to where the script was started
here=$PWD
cd "$root"
# shellcheck source-path=SCRIPTDIR source=on_top.sh
source tests/on_top.sh
bash examples/setup.sh
home=$root/.venv/releases

versions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    versions+=("$1")
    shift
done
[ $# -eq 0 ] || shift
[ ${#versions[@]} -gt 0 ] || versions=(0.17.1 0.18.1 0.19.2 main)
# kernels, planner and parallel do not depend on Megatron
[ $# -gt 0 ] || set -- tests/megatron tests/cpu tests/examples tests/patches tests/tools tests/optimizer \
    tests/checkpoint tests/test_metrics.py tests/test_main.py

say() { printf '\n==> %s\n' "$*"; }

fail() {
    printf 'tests/matrix.sh: error: %s\n' "$*" >&2
    exit 1
}

# sets name, that of the environment, and tree, the folder of the checkout, which releases lack
locate() {
    local version=$1
    [ "$version" != main ] || version=$MAIN
    name=$version tree=
    if [[ $version =~ ^[0-9a-f]{40}$ ]]; then
        name=${version:0:12}
        tree=$home/$name.tree
        fetch "$version" "$tree"
    elif [ -d "$here/$version" ] || [[ $version == /* ]]; then
        tree=$(cd "$here" && cd "$version" 2>/dev/null && pwd) || fail "there is no folder $version"
        [ -f "$tree/megatron/core/package_info.py" ] ||
            fail "$tree is not a checkout of Megatron-LM: it has no megatron/core/package_info.py"
        # two checkouts may have folders of the same name
        name=$(basename "$tree")-$(printf '%s' "$tree" | cksum | cut -d ' ' -f 1)
        # its files may have changed since the last time
        rm -f "$home/$name/.ready"
    elif ! [[ $version =~ ^[0-9]+(\.[0-9]+)+ ]]; then
        fail "$version is neither a release such as 0.19.2, nor main, a commit's 40 digits or a folder"
    fi
}

fetch() {
    local commit=$1 into=$2
    [ "$(git -C "$into" rev-parse HEAD 2>/dev/null)" != "$commit" ] || return 0
    rm -rf "$into"
    git init --quiet "$into"
    git -C "$into" fetch --quiet --depth 1 "$URL" "$commit" ||
        fail "$commit cannot be fetched from $URL; set MEGATRON_LM_URL to another repository, or
  give the folder of a checkout instead of main or the commit"
    git -C "$into" -c advice.detachedHead=false checkout --quiet FETCH_HEAD
}

# pip builds in the folder of the sources, so it gets a copy of them
build() {
    local scratch
    scratch=$(mktemp -d)
    tar -C "$tree" -c --exclude=__pycache__ --exclude='*.so' \
        megatron pyproject.toml setup.py README.md MANIFEST.in LICENSE | tar -C "$scratch" -x
    install_into "$1" "$scratch"
    rm -rf "$scratch"
}

# makes the environment if there is none, and sets release, the version that is imported in it
prepare() {
    local venv=$home/$name
    if [ "$(cat "$venv/.ready" 2>/dev/null)" != "$name" ]; then
        make_on_top "$venv"
        if [ -n "$tree" ]; then
            build "$venv"
        else
            install_into "$venv" "megatron-core==$name"
        fi
        echo "$name" >"$venv/.ready"
    fi
    # Megatron appends the commit of the folder in which it is imported
    release=$("$venv/bin/python" -W ignore - "$name" "$tree" <<'PYTHON'
import sys
from pathlib import Path

import megatron.core
# the build goes on without it if it cannot be compiled
import megatron.core.datasets.helpers_cpp

name, tree = sys.argv[1:]
version = megatron.core.__version__.split("+")[0]
assert Path(megatron.core.__file__).is_relative_to(sys.prefix), megatron.core.__file__
assert tree or version == name, f"{version} is imported instead of {name}"
print(version)
PYTHON
    )
}

failed=0
results=()
for version in "${versions[@]}"; do
    locate "$version"
    say "Megatron-Core $name"
    prepare
    log=$home/$name.log
    if PATH=$home/$name/bin:$PATH MEGATRON_LM_PATH=${tree:-${MEGATRON_LM_PATH:-}} \
        python -m pytest -n 2 --dist loadfile -p no:cacheprovider -m "not gpu and not slow" "$@" \
        2>&1 | tee "$log"; then
        verdict=passed
    else
        verdict=FAILED
        failed=1
    fi
    [ -z "$tree" ] || name="$release ($name)"
    results+=("$(printf '%-21s %-7s %s' "$name" "$verdict" "$(tail -n 1 "$log" | tr -d '=')")")
done
say "versions of Megatron-Core"
printf '%s\n' "${results[@]}"
exit $failed
