#!/usr/bin/env bash
# Runs the tests of memory layers in Megatron-Bridge, on a machine with or without a GPU, and those
# of local checkpoints, which need its nvidia-resiliency-ext, too.
#
#   bash tests/bridge.sh               makes the environment if there is none, and runs the tests
#   bash tests/bridge.sh -x            arguments are for pytest
#   bash tests/bridge.sh --no-tests    only makes the environment: .venv/bridge/bin/python runs
#                                      examples/bridge_recipe.py
#
# The first run makes .venv/bridge on top of .venv, with Megatron-Bridge and what it imports from
# PyPI. Transformer Engine is not among it: its torch extension takes 20 minutes to compile, and
# nothing of it computes without a GPU. megamem.cpu.bridge stands in for the names that
# Megatron-Bridge imports of it.
set -euo pipefail

BRIDGE=0.6.2
RESILIENCY=0.6.0

# the dependencies are listed here, as by its metadata it would install another Megatron-Core,
# GPU kernels that must be compiled, and everything that any of its models needs
PACKAGES=(
    "transformers>=5.8,<=5.12.1" "peft>=0.18.1" datasets accelerate "diffusers>=0.36" einops
    "omegaconf>=2.3" "hydra-core>=1.3.4,<1.4" "megatron-energon~=7.0" "nvidia-modelopt>=0.44"
    defusedxml
)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source-path=SCRIPTDIR source=on_top.sh
source tests/on_top.sh
bash examples/setup.sh
venv=$root/.venv/bridge
# the environment is made again when one of these changes, and when the checkout is moved
wanted=$(printf '%s\n' "$root $BRIDGE $RESILIENCY ${PACKAGES[*]}" "$(cksum <setup.py)")

install() {
    install_into "$venv" "$@"
}

if [ "$(cat "$venv/.ready" 2>/dev/null)" != "$wanted" ]; then
    printf '\n==> making %s with Megatron-Bridge %s; this downloads 300 MB once\n' "$venv" "$BRIDGE"
    make_on_top "$venv"
    install "${PACKAGES[@]}"
    install --no-deps "megatron-bridge==$BRIDGE"
    # its wheel asks for the C library of Ubuntu 24.04, which only its profiler of GPUs needs
    install --no-deps --only-binary :all: --platform "manylinux_2_39_$(uname -m)" --target "$ours" \
        "nvidia-resiliency-ext==$RESILIENCY"
    echo "$wanted" >"$venv/.ready"
fi

[ "${1:-}" != --no-tests ] || exit 0
PATH=$venv/bin:$PATH exec python -m pytest -p no:cacheprovider tests/megatron/test_bridge.py \
    tests/megatron/test_local_checkpoints.py "$@"
