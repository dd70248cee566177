#!/usr/bin/env bash
# The 134M base with memory, shrunk until two CPU ranks train it in a minute: the same scripts and
# flags, Megatron's own loop, gloo instead of NCCL. For trying an installation and flags of one's
# own before asking for GPUs.
#
#   bash examples/cluster/dry_run.sh                         flags may follow, and overrule
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CPU=1 GPUS=${GPUS:-2} DATA=${DATA:-mock} RUN=${RUN:-runs/dry-run} OMP_NUM_THREADS=1
tiny=(
    --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --vocab-size 1023
    --seq-length 64 --max-position-embeddings 64 --micro-batch-size 4 --global-batch-size 16
    --memory-num-keys 64 --memory-topk 8
    --train-iters 20 --lr-warmup-iters 2 --log-interval 5 --eval-interval 20 --eval-iters 2
    --save-interval 20 --num-workers 0
)
exec bash "$here/torchrun.sh" 134m 1m "${tiny[@]}" "$@"
