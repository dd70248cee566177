#!/usr/bin/env bash
# Trains a small GPT with memory layers to know facts: sets up .venv, builds a corpus of real facts,
# trains in Megatron's own loop on two CPU ranks that share the value table, and tests what the
# checkpoint knows. Run it again to continue from its last checkpoint.
#
#   bash examples/quickstart.sh                        takes about ten minutes on two cores
#   bash examples/quickstart.sh --train-iters 3000     trains longer; takes all flags of Megatron
#   MEGAMEM_RUN=elsewhere bash examples/quickstart.sh  writes its files to another folder
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
    --override-opt-param-scheduler  # so that a longer run has a longer learning-rate decay
    --tensorboard-dir "$run/tensorboard"
)
data=(
    --train-data-path "$run/data/facts_train" --valid-data-path "$run/data/facts_valid"
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$run/data/tokenizer.model"
    --num-workers 0
)
flags=("${model[@]}" "${memory[@]}" "${training[@]}" "${data[@]}" "$@")
# port 0 is any free port, so that two runs on one machine do not conflict
ranks=(torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0)

say "3/4 train on two CPU ranks that share the value table (complete log: $log)"
mkdir -p "$run"
"${ranks[@]}" -m megamem.run --cpu examples/pretrain_gpt.py "${flags[@]}" 2>&1 |
    python examples/watch.py --log "$log"

say "4/4 test what the checkpoint knows (complete log: $run/probe.log)"
"${ranks[@]}" -m megamem.run --cpu examples/facts/probe.py "${flags[@]}" \
    --facts "$run/data/facts.json" --probe-output "$run/probe.json" >"$run/probe.log" 2>&1 || {
    tail -n 40 "$run/probe.log"
    exit 1
}
python examples/facts/show_probe.py "$run/probe.json"

again="bash examples/quickstart.sh --train-iters 3000"
[ -z "${MEGAMEM_RUN:-}" ] || again="MEGAMEM_RUN=$(printf %q "$run") $again"

say "done. What you can do next:"
cat <<EOF
    .venv/bin/tensorboard --logdir $(printf %q "$run/tensorboard")
        look at the losses and, under Custom Scalars, at how the memory is used
    .venv/bin/megamem convert export $(printf %q "$run/checkpoints") --to $(printf %q "$run/hf") --format hf
        write the model as a folder that transformers loads; then ask it the same questions with
        .venv/bin/python examples/facts/probe_exported.py $(printf %q "$run/hf") --facts $(printf %q "$run/data/facts.json")
    $again
        continue training from the checkpoint in $run
    torchrun --nproc-per-node 8 -m megamem.run pretrain_gpt.py <your flags> --memory-layers 4 12 20
        train your own model on GPUs
EOF
