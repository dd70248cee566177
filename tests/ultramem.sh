#!/usr/bin/env bash
# Compares the converter of UltraMem checkpoints with the released code, which it fetches; nothing of
# that code is part of this repository.
#
#   bash tests/ultramem.sh             makes the environment if there is none, and runs the tests
#   bash tests/ultramem.sh -x          arguments are for pytest
#
# The first run makes .venv/ultramem on top of .venv, with what the code imports, and fetches the
# code, unless MEGAMEM_ULTRAMEM_CHECKOUT names a checkout of it.
set -euo pipefail

CODE=https://github.com/ZihaoHuang-notabot/Ultra-Sparse-Memory-Network
COMMIT=041104bcf636a51845997fe80ec098e8b10a57e8
PACKAGES=(omegaconf boto3 datasets cached_path importlib_resources)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source-path=SCRIPTDIR source=on_top.sh
source tests/on_top.sh
bash examples/setup.sh
venv=$root/.venv/ultramem
wanted="$root ${PACKAGES[*]}"

if [ "$(cat "$venv/.ready" 2>/dev/null)" != "$wanted" ]; then
    printf '\n==> making %s\n' "$venv"
    make_on_top "$venv"
    install_into "$venv" "${PACKAGES[@]}"
    echo "$wanted" >"$venv/.ready"
fi
if [ -z "${MEGAMEM_ULTRAMEM_CHECKOUT:-}" ]; then
    export MEGAMEM_ULTRAMEM_CHECKOUT=$venv/checkout
    if [ ! -d "$MEGAMEM_ULTRAMEM_CHECKOUT/olmo" ]; then
        git clone --quiet --no-checkout --filter=blob:none "$CODE" "$MEGAMEM_ULTRAMEM_CHECKOUT"
        git -C "$MEGAMEM_ULTRAMEM_CHECKOUT" sparse-checkout set olmo
        git -C "$MEGAMEM_ULTRAMEM_CHECKOUT" checkout --quiet "$COMMIT"
    fi
fi
PATH=$venv/bin:$PATH exec python -m pytest -p no:cacheprovider tests/tools/test_released_code.py "$@"
