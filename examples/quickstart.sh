#!/usr/bin/env bash
# From nothing to a GPT with memory layers that knows facts: sets up .venv, builds a corpus of real
# facts, trains through Megatron's own loop on two CPU ranks that share the value table, and asks
# the checkpoint what it knows. Run it again to go on where it stopped.
#
#   bash examples/quickstart.sh                        about ten minutes on two cores
#   bash examples/quickstart.sh --train-iters 3000     more; any flag of Megatron's may follow
#   MEGAMEM_RUN=elsewhere bash examples/quickstart.sh  keeps its files there
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
run=${MEGAMEM_RUN:-runs/quickstart}
log=$run/train.log

say() { printf '\n==> %s\n' "$*"; }

say "1/4 set up"
bash examples/setup.sh
export PATH=$root/.venv/bin:$PATH
# one thread for each of the two ranks
export OMP_NUM_THREADS=1

say "2/4 build the corpus of facts"
python examples/facts/build_corpus.py --output "$run/data" --facts 4000

model=(
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 176
    --seq-length 64 --max-position-embeddings 64 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
)
memory=(
    --memory-layers 1 2 --memory-num-keys 64 --memory-heads 2 --memory-topk 8 --memory-lr 2e-2
)
training=(
    --tensor-model-parallel-size 2 --sequence-parallel
    --micro-batch-size 32 --global-batch-size 32 --train-iters 1500
    --lr 4e-3 --min-lr 2e-4 --lr-warmup-iters 50 --lr-decay-style cosine
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
    --eval-interval 500 --eval-iters 10 --log-interval 25
    --save "$run/checkpoints" --load "$run/checkpoints" --save-interval 500
    --override-opt-param-scheduler  # a longer run decays over its own length
    --tensorboard-dir "$run/tensorboard"
)
data=(
    --train-data-path "$run/data/facts_train" --valid-data-path "$run/data/facts_valid"
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$run/data/tokenizer.model"
    --num-workers 0
)
flags=("${model[@]}" "${memory[@]}" "${training[@]}" "${data[@]}" "$@")
# a port of its own, so that two runs on one machine do not meet
ranks=(torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0)

say "3/4 train on two CPU ranks that share the value table (whole log: $log)"
mkdir -p "$run"
"${ranks[@]}" -m megamem.run --cpu examples/pretrain_gpt.py "${flags[@]}" 2>&1 |
    python examples/watch.py --log "$log"

say "4/4 ask the checkpoint, closed-book (whole log: $run/probe.log)"
"${ranks[@]}" -m megamem.run --cpu examples/facts/probe.py "${flags[@]}" \
    --facts "$run/data/facts.json" --probe-output "$run/probe.json" >"$run/probe.log" 2>&1 || {
    tail -n 40 "$run/probe.log"
    exit 1
}
sed -n '/closed-book exact match/,/^written to/p' "$run/probe.log"

say "done. To go on:"
cat <<EOF
    tensorboard --logdir $run/tensorboard          what the run looked like (.venv/bin has it)
    bash examples/quickstart.sh --train-iters 3000   train on from the checkpoint in $run
    torchrun --nproc-per-node 8 -m megamem.run pretrain_gpt.py <your flags> --memory-layers 4 12 20
                                                     your own model, on GPUs
EOF
