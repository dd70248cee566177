# shellcheck shell=bash disable=SC2034,SC2154
# Computes the flags of one run of "Memory Layers at Scale" from a file in models/ and the number of
# rows. The scripts beside it source it with $here and $world set. It sets $script, $folder (where
# the script is started), $run (where the run writes its files), and `flags`.
#
#   source flags.sh MODEL ROWS      MODEL: 134m 373m 1.3b 8b    ROWS: dense 1m 4m 16m 64m
#
# Variables that the environment may set:
#   MEGATRON   a Megatron-LM checkout; without it, examples/pretrain_gpt.py and the wheel are used
#   DATA       prefix of a data set made by Megatron's tools/preprocess_data.py, or mock
#   TOKENIZER  folder or name of the Hugging Face tokenizer with which DATA was made
#   RUN        folder for checkpoints and TensorBoard; default: runs/MODEL-ROWS
#   GROUP      number of ranks that share the table; default: the fewest that hold it, and at least
#              the GPUs of a node, if there are so many
#   LEAN=1     needs half of the GPUs: one second moment per row, and no fp32 copy of the table
#   CPU=1      a dry run without GPUs, for a model that later flags make small
#   PLAN=1     only print megamem plan for this run

fail() {
    echo "cluster: error: $*" >&2
    exit 2
}

# fails with the list of allowed words if the given word is not one of them
one_of() {
    local what=$1 word=$2 known
    shift 2
    for known in "$@"; do
        if [ "$known" = "$word" ]; then return; fi
    done
    fail "$what '$word' is not one of: $*"
}

model_name=${1:-} rows=${2:-}
models=()
for file in "$here"/models/*.sh; do
    file=${file##*/}
    models+=("${file%.sh}")
done
one_of MODEL "$model_name" "${models[@]}"
declare -A least=() lean=()
model=() memory_layers=()
vocabulary='' tensor_parallel='' micro_batch=''
# shellcheck source-path=SCRIPTDIR source=models/1.3b.sh
source "$here/models/$model_name.sh"
sizes=()
for size in 1m 4m 16m 64m; do
    if [ -n "${least[$size]:-}" ]; then sizes+=("$size"); fi
done
one_of "ROWS of $model_name" "$rows" dense "${sizes[@]}"

declare -A num_keys=([1m]=1024 [4m]=2048 [16m]=4096 [64m]=8192)
memory=()
if [ "$rows" != dense ]; then
    fewest=${least[$rows]} optimizer=(--memory-optimizer adamw)
    if [ "${LEAN:-0}" = 1 ]; then
        fewest=${lean[$rows]}
        optimizer=(--memory-optimizer rowwise_adamw --memory-stochastic-rounding)
    fi
    group=${GROUP:-$fewest}
    # sending lookups inside of a node is cheap, and replicas would need an all-reduce
    if [ -z "${GROUP:-}" ] && [ "$group" -lt 8 ]; then group=$((world < 8 ? world : 8)); fi
    if [ "${CPU:-0}${PLAN:-0}" = 00 ] && [ "$world" -lt "$fewest" ]; then
        fail "$model_name with $rows rows needs $fewest GPUs of 80 GB, but there are $world." \
            "With LEAN=1 it needs ${lean[$rows]}; PLAN=1 shows what needs the memory"
    fi
    # a plan can be made for any number of GPUs
    if [ "${PLAN:-0}" = 1 ] && [ "$group" -gt "$world" ]; then group=$world; fi
    if [ $((world % group)) -ne 0 ] || [ "$group" -gt "$world" ]; then
        fail "the $group ranks of a table do not divide $world; set GROUP, or change GPUS and NODES"
    fi
    memory=(
        --memory-layers "${memory_layers[@]}" --memory-num-keys "${num_keys[$rows]}"
        --memory-heads 4 --memory-topk 32
        # ten times the model's learning rate, with the same schedule; clipped separately
        --memory-lr 1e-3 --memory-weight-decay 0.1 --memory-clip-grad 1.0 "${optimizer[@]}"
        --memory-mode auto --memory-group-size "$group"
    )
fi

parallel=(
    --tensor-model-parallel-size "$tensor_parallel"
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
if [ "$tensor_parallel" -gt 1 ]; then parallel+=(--sequence-parallel); fi
if [ $((world % tensor_parallel)) -ne 0 ]; then
    fail "$model_name has tensor-parallel size $tensor_parallel, of which $world GPUs are not a" \
        "multiple; change GPUS and NODES"
fi

case ${DATA:-} in
    '') fail "DATA is not set; set it to the prefix of a data set, or to mock for random tokens" ;;
    # the null tokenizer adds one token
    mock) data=(--mock-data --tokenizer-type NullTokenizer --vocab-size $((vocabulary - 1))) ;;
    *)
        [ -f "$DATA.idx" ] || fail "DATA=$DATA is not the prefix of a data set: no $DATA.idx exists"
        [ -n "${TOKENIZER:-}" ] ||
            fail "TOKENIZER is not set; set it to the tokenizer with which DATA=$DATA was made"
        DATA=$(realpath -s "$DATA")
        # it is a folder, or a name on Hugging Face's hub
        if [ -e "$TOKENIZER" ]; then TOKENIZER=$(realpath -s "$TOKENIZER"); fi
        data=(
            --data-path "$DATA"
            --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
        )
        ;;
esac
data+=(--split "99,1,0" --make-vocab-size-divisible-by $((128 / tensor_parallel)))

run=$(realpath -m "${RUN:-runs/$model_name-$rows}")
training=(
    --seq-length 4096 --max-position-embeddings 4096
    --micro-batch-size "$micro_batch" --global-batch-size 2048 --train-iters 128000
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 0.1
    --lr 1e-4 --min-lr 1e-6 --lr-decay-style linear --lr-warmup-iters 4000
    --clip-grad 1.0 --bf16
    --log-interval 10 --eval-interval 1000 --eval-iters 10
    --save "$run/checkpoints" --load "$run/checkpoints" --save-interval 1000
    --ckpt-format torch_dist --tensorboard-dir "$run/tensorboard"
)
llama=(
    --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
)
flags=(
    "${model[@]}" "${llama[@]}" "${training[@]}" "${parallel[@]}" "${data[@]}" "${memory[@]}"
)

home=$(cd "$here/../.." && pwd)
script=$home/examples/pretrain_gpt.py
folder=$PWD
if [ -n "${CONTAINER:-}" ] && [ -n "${MEGATRON:-}" ] && [ ! -e "$MEGATRON" ]; then
    # a checkout inside of the image
    folder=$MEGATRON
    script=$folder/pretrain_gpt.py
elif [ -n "${MEGATRON:-}" ]; then
    [ -f "$MEGATRON/pretrain_gpt.py" ] ||
        fail "MEGATRON=$MEGATRON has no pretrain_gpt.py; name a Megatron-LM checkout"
    # so that the checkout's megatron is imported, not an installed one
    cd "$MEGATRON" || exit
    folder=$PWD
    script=$folder/pretrain_gpt.py
fi
launcher=(megamem.run)
if [ "${CPU:-0}" = 1 ]; then launcher+=(--cpu); fi

# use the environment of examples/setup.sh if it exists and no other is active
if [ -z "${CONTAINER:-}${VIRTUAL_ENV:-}" ] && [ -x "$home/.venv/bin/python" ]; then
    export PATH=$home/.venv/bin:$PATH
fi
# Megatron requires it for tensor parallelism on GPUs from before 2024
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

if [ "${PLAN:-0}" = 1 ]; then
    exec python -m megamem plan --world-size "$world" "${flags[@]}" "${@:3}"
fi
