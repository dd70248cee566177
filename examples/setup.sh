#!/usr/bin/env bash
# Creates .venv in this checkout, with megamem and everything that its examples and tests need. You
# can run it again at any time: it returns at once if nothing has changed.
#
#   bash examples/setup.sh            MEGAMEM_PYTHON=/path/to/python3.12 selects the interpreter
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/.megamem-setup
# the environment is made again when setup.py changes, and when the checkout is moved, as the
# scripts in an environment contain its path
wanted=$(printf '%s\n%s' "$root" "$(cksum <"$root/setup.py")")

say() { echo "setup: $*"; }

fail() {
    echo "setup: error: $*" >&2
    exit 1
}

is_python312() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${MEGAMEM_PYTHON:-}" ]; then
        is_python312 "$MEGAMEM_PYTHON" ||
            fail "MEGAMEM_PYTHON=$MEGAMEM_PYTHON is not a working Python 3.12"
        echo "$MEGAMEM_PYTHON"
        return
    fi
    local candidate
    # a shim of pyenv may be on PATH without working, hence also pyenv's versions themselves
    for candidate in python3.12 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        if is_python312 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.12 was not found. Any of these commands installs it:
    sudo apt install python3.12 python3.12-venv     (Ubuntu 24.04)
    pyenv install 3.12                              (https://github.com/pyenv/pyenv)
    uv python install 3.12                          (https://docs.astral.sh/uv)
  Then run this script again. If you have it elsewhere: MEGAMEM_PYTHON=/path/to/python3.12 bash $0"
}

works() {
    is_python312 "$venv/bin/python" &&
        { [ ! -f "$stamp" ] || [ "$(head -n 1 "$stamp")" = "$root" ]; }
}

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && works; then
    exit 0
fi

if works; then
    say "1/2 $venv exists and will be updated"
else
    # it would empty the folder that the link points to, which may be another checkout's
    [ ! -L "$venv" ] || fail "$venv is a symbolic link to an environment of another checkout, $(readlink "$venv"),
  and an environment belongs to one checkout; remove the link and run this script again"
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian and Ubuntu:
    sudo apt install python3.12-venv"
    say "1/2 creating $venv with $("$python" -c 'import sys; print(sys.executable)')"
    "$python" -m venv --clear "$venv"
fi

say "2/2 installing megamem, torch and Megatron-Core; the first time this downloads about 3 GB"
quiet=
[ -t 1 ] || quiet=--quiet
(cd "$root" && "$venv/bin/python" -m pip install $quiet --disable-pip-version-check -e '.[dev]') ||
    fail "pip failed; its message is above. Run this script again to continue."
echo "$wanted" >"$stamp"
say "done: $venv"
