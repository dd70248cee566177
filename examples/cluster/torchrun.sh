#!/usr/bin/env bash
# Pretrains a model of "Memory Layers at Scale" on GPUs that torchrun starts.
#
#   DATA=mock bash examples/cluster/torchrun.sh 373m 1m            one GPU
#   DATA=mock GPUS=8 bash examples/cluster/torchrun.sh 1.3b 4m     one node
#   DATA=... NODES=16 HEAD=node001 bash examples/cluster/torchrun.sh 1.3b 64m
#                                                                  on each of 16 nodes
#
# GPUS are those of a node (default 1; with several NODES 8); HEAD is the node that the others meet
# at, PORT (29500) where. Megatron's flags may follow, and overrule. flags.sh has what else can be
# set.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nodes=${NODES:-1}
gpus=${GPUS:-$((nodes > 1 ? 8 : 1))}
world=$((nodes * gpus))
# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$here/flags.sh" "$@"

meeting=(--standalone)
if [ "$nodes" -gt 1 ]; then
    [ -n "${HEAD:-}" ] || fail "NODES=$nodes: set HEAD to the name of the first node"
    meeting=(
        --nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}"
        --rdzv-id "${JOB:-megamem}"
    )
fi
exec torchrun "${meeting[@]}" --nproc-per-node "$gpus" \
    -m "${launcher[@]}" "$script" "${flags[@]}" "${@:3}"
