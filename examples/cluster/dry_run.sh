#!/usr/bin/env bash
# Trains a smaller version of the 134M base model with memory layers on two CPU ranks, in about a
# minute. It uses the same scripts and flags, and Megatron's own loop over gloo instead of NCCL, to
# test an installation and your flags before you ask for GPUs.
#
#   bash examples/cluster/dry_run.sh [FLAGS...]              the flags override those of the script
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
