#!/usr/bin/env bash
# Runs the tests of lm-eval, EleutherAI's harness, on exported models and on Megatron's checkpoints.
#
#   bash tests/lm_eval.sh               makes the environment if there is none, and runs the tests
#   bash tests/lm_eval.sh -x            arguments are for pytest
#   bash tests/lm_eval.sh --no-tests    only makes the environment: .venv/lm_eval/bin/lm-eval and
#                                       .venv/lm_eval/bin/python -m megamem.eval_harness evaluate models
#
# The first run makes .venv/lm_eval on top of .venv. It is an environment of its own as it is large,
# and as pandas, which it needs, wants older releases of packages than .venv has.
set -euo pipefail

# setup.py's extra `eval` takes this release and later ones
LM_EVAL=0.4.13
PACKAGES=("lm-eval==$LM_EVAL" accelerate)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source-path=SCRIPTDIR source=on_top.sh
source tests/on_top.sh
bash examples/setup.sh
venv=$root/.venv/lm_eval
# the environment is made again when one of these changes, and when the checkout is moved
wanted=$(printf '%s\n' "$root ${PACKAGES[*]}" "$(cksum <setup.py)")

if [ "$(cat "$venv/.ready" 2>/dev/null)" != "$wanted" ]; then
    printf '\n==> making %s with lm-eval %s; this downloads 100 MB once\n' "$venv" "$LM_EVAL"
    make_on_top "$venv"
    install_into "$venv" "${PACKAGES[@]}"
    echo "$wanted" >"$venv/.ready"
fi

[ "${1:-}" != --no-tests ] || exit 0
PATH=$venv/bin:$PATH exec python -m pytest -p no:cacheprovider tests/tools/test_lm_eval.py "$@"
