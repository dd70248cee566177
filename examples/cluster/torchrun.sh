#!/usr/bin/env bash
# Pretrains a model of "Memory Layers at Scale" with torchrun.
#
#   DATA=mock bash examples/cluster/torchrun.sh 373m 1m            one GPU
#   DATA=mock GPUS=8 bash examples/cluster/torchrun.sh 1.3b 4m     one node
#   DATA=... NODES=16 HEAD=node001 bash examples/cluster/torchrun.sh 1.3b 64m
#                                                                  on each of 16 nodes
#
# GPUS is the number of GPUs per node (default 1, or 8 with several NODES). HEAD is the node to
# which the others connect, and PORT (default 29500) its port. Flags after the two words override
# those of the script. flags.sh lists the other variables.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nodes=${NODES:-1}
gpus=${GPUS:-$((nodes > 1 ? 8 : 1))}
world=$((nodes * gpus))
# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$here/flags.sh" "$@"

meeting=(--standalone)
if [ "$nodes" -gt 1 ]; then
    [ -n "${HEAD:-}" ] || fail "NODES=$nodes needs HEAD; set it to the name of the first node"
    meeting=(
        --nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}"
        --rdzv-id "${JOB:-megamem}"
    )
fi
exec torchrun "${meeting[@]}" --nproc-per-node "$gpus" \
    -m "${launcher[@]}" "$script" "${flags[@]}" "${@:3}"
