#!/usr/bin/env bash
# Runs the tests that need NVIDIA's Transformer Engine, on a machine with or without a GPU, against
# every supported release of Megatron-Core, and ends with a table.
#
#   bash tests/transformer_engine.sh                    all releases
#   bash tests/transformer_engine.sh 0.18.1             only this release
#   bash tests/transformer_engine.sh 0.19.2 -- -x       arguments after -- are for pytest
#
# The first run makes an environment under .venv/transformer_engine with torch and Transformer
# Engine from PyPI. The torch extension of Transformer Engine is a source package, and is compiled
# for this torch. That takes 20 minutes on two cores (MAX_JOBS sets the number of compiler
# processes), a C++ compiler and 6 GB, but neither a GPU nor nvcc, as all headers are in packages.
# The wheel is kept. Without a GPU, models are built and inspected, and torch computes in place of
# their layers.
set -euo pipefail

TORCH=2.11.0
ENGINE=2.20.2
RELEASES=(0.17.1 0.18.1 0.19.2)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash examples/setup.sh
home=$root/.venv/transformer_engine
base=$home/env
wheels=$home/wheels
log=$home/build.log
# the environment is made again when one of these changes, and when the checkout is moved, as its
# scripts contain its path
wanted=$(printf '%s\n%s' "$root torch $TORCH Transformer Engine $ENGINE" "$(cksum <setup.py)")

releases=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    releases+=("$1")
    shift
done
[ $# -eq 0 ] || shift
[ ${#releases[@]} -gt 0 ] || releases=("${RELEASES[@]}")

say() { printf '\n==> %s\n' "$*"; }

fail() {
    printf 'tests/transformer_engine.sh: error: %s\n' "$*" >&2
    exit 1
}

install() {
    "$base/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# the torch extension as a wheel; it fits one torch, one Python and one kind of processor
build_extension() {
    command -v c++ >/dev/null ||
        fail "no C++ compiler was found, which the torch extension of Transformer Engine needs.
  On Debian and Ubuntu: sudo apt install g++"
    say "compiling the torch extension of Transformer Engine $ENGINE for torch $TORCH:" \
        "this takes 20 minutes on two cores; the compiler's output is in $log"
    local started=$SECONDS
    # the headers come from packages, so the machine needs no CUDA toolkit
    MAX_JOBS=${MAX_JOBS:-$(nproc)} PATH=$base/bin:$PATH CUDA_HOME=$base/no-toolkit \
        NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 \
        "$base/bin/python" -m pip wheel --verbose --disable-pip-version-check \
        --no-deps --no-build-isolation --no-binary transformer_engine_torch \
        --wheel-dir "$wheels.new" "transformer_engine_torch==$ENGINE" >"$log" 2>&1 ||
        fail "compiling failed after $((SECONDS - started)) s; the end of $log:
$(tail -n 15 "$log")"
    mkdir -p "$wheels"
    mv "$wheels.new"/*.whl "$wheels/"
    rm -r "$wheels.new"
    say "compiled in $((SECONDS - started)) s"
}

prepare_base() {
    if [ "$(cat "$home/.ready" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    # remove what an interrupted attempt left behind
    rm -rf "$wheels.new" "$home/.ready"
    say "making $base with torch $TORCH; this downloads 3 GB once"
    "$root/.venv/bin/python" -m venv --clear "$base"
    rm -rf "$home/releases"
    # the dependencies are listed here, as by its metadata it would install a second Megatron and
    # another torch
    install "torch==$TORCH" --editable "$root" pytest pytest-xdist hypothesis safetensors \
        sentencepiece setuptools ninja packaging pybind11 einops onnx onnxscript pydantic \
        importlib-metadata
    local cuda
    cuda=$("$base/bin/python" -c 'import torch; print(torch.version.cuda)')
    [ "${cuda%%.*}" = 13 ] ||
        fail "torch $TORCH of your package index is built for CUDA ${cuda:-none}, not for CUDA 13"
    install --no-deps "transformer_engine==$ENGINE" "transformer_engine_cu13==$ENGINE" \
        "nvidia-cudnn-frontend>=1.29" nvdlfw-inspect \
        "nvidia-cuda-crt==$cuda.*" "nvidia-cuda-cccl==$cuda.*" "nvidia-cuda-profiler-api==$cuda.*"
    local wheel=(
        "$wheels"/transformer_engine_torch-"$ENGINE"-cp312-cp312-linux_"$(uname -m)".whl
    )
    [ -f "${wheel[0]}" ] || build_extension
    install --no-deps --force-reinstall "${wheel[0]}"
    if ! engine_imports "$base/bin/python"; then
        fail "Transformer Engine is installed but cannot be imported; its message is above"
    fi
    echo "$wanted" >"$home/.ready"
}

engine_imports() {
    "$1" - <<'PYTHON'
import torch  # loads the libraries that Transformer Engine needs
import transformer_engine
import transformer_engine.pytorch

print(f"Transformer Engine {transformer_engine.__version__} with torch {torch.__version__}")
PYTHON
}

# installs a release into a folder for PYTHONPATH; everything else is in the environment
prepare() {
    local release=$1 folder=$home/releases/$1
    if [ "$(cat "$folder/.ready" 2>/dev/null)" != "$release" ]; then
        rm -rf "$folder"
        install --no-deps --target "$folder" "megatron-core==$release"
        echo "$release" >"$folder/.ready"
    fi
    PYTHONPATH=$folder "$base/bin/python" - "$release" <<'PYTHON'
import sys
import warnings

warnings.simplefilter("ignore")
from megatron.core import __version__
from megatron.core.extensions.transformer_engine import HAVE_TE

# Megatron appends the commit of the folder in which it is imported
assert __version__.split("+")[0] == sys.argv[1], f"{__version__} is imported, not {sys.argv[1]}"
assert HAVE_TE, f"Megatron-Core {sys.argv[1]} does not support this Transformer Engine"
PYTHON
}

prepare_base
failed=0
results=()
for release in "${releases[@]}"; do
    say "Megatron-Core $release"
    if ! prepare "$release"; then
        results+=("$(printf '%-8s does not support Transformer Engine %s' "$release" "$ENGINE")")
        failed=1
        continue
    fi
    record=$home/releases/$release.log
    if PYTHONPATH=$home/releases/$release PATH=$base/bin:$PATH \
        python -m pytest -p no:cacheprovider tests/megatron/test_transformer_engine.py \
        "$@" 2>&1 | tee "$record"; then
        verdict=passed
    else
        verdict=FAILED
        failed=1
    fi
    results+=("$(printf '%-8s %-7s %s' "$release" "$verdict" "$(tail -n 1 "$record" | tr -d '=')")")
done
say "Transformer Engine $ENGINE, torch $TORCH, releases of Megatron-Core"
printf '%s\n' "${results[@]}"
exit $failed
