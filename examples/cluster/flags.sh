# shellcheck shell=bash disable=SC2034,SC2154
# Makes the flags of one run of "Memory Layers at Scale" out of a file of models/ and the number of
# rows. Sourced by the scripts beside it with $here and $world set; leaves $script, $folder to start
# it in, $run for what it writes, and `flags`.
#
#   source flags.sh MODEL ROWS      MODEL: 134m 373m 1.3b 8b    ROWS: dense 1m 4m 16m 64m
#
# What the environment may say:
#   MEGATRON   a Megatron-LM checkout; without it, examples/pretrain_gpt.py and the wheel are used
#   DATA       prefix of a data set made by Megatron's tools/preprocess_data.py, or mock
#   TOKENIZER  folder or name of a Hugging Face tokenizer, as DATA was made with
#   RUN        folder for checkpoints and TensorBoard; default runs/MODEL-ROWS
#   GROUP      ranks that one table is spread over; default: the fewest that hold it, and at least
#              one node where there is one
#   LEAN=1     half of the GPUs: one second moment per row, and no fp32 copy of the table
#   CPU=1      no GPU: a dry run of a model that later flags make tiny
#   PLAN=1     start nothing; say what the table takes and where its time goes

fail() {
    echo "cluster: error: $*" >&2
    exit 2
}

# one word of a list; the list is said when the word is none of it
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
    # inside a node an exchange costs little, and replicas would have to be kept equal
    if [ -z "${GROUP:-}" ] && [ "$group" -lt 8 ]; then group=$((world < 8 ? world : 8)); fi
    if [ "${CPU:-0}${PLAN:-0}" = 00 ] && [ "$world" -lt "$fewest" ]; then
        fail "$model_name with $rows rows needs $fewest GPUs of 80 GB, not $world." \
            "LEAN=1 needs ${lean[$rows]}; PLAN=1 shows what takes the room"
    fi
    # a plan is for finding out
    if [ "${PLAN:-0}" = 1 ] && [ "$group" -gt "$world" ]; then group=$world; fi
    if [ $((world % group)) -ne 0 ] || [ "$group" -gt "$world" ]; then
        fail "a table over $group ranks does not divide $world; set GROUP or change GPUS and NODES"
    fi
    memory=(
        --memory-layers "${memory_layers[@]}" --memory-num-keys "${num_keys[$rows]}"
        --memory-heads 4 --memory-topk 32
        # ten times the model's rate, the same schedule, clipped apart
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
    fail "$model_name is cut over $tensor_parallel GPUs, which $world are no multiple of"
fi

case ${DATA:-} in
    '') fail "set DATA to the prefix of a data set, or to mock for random tokens" ;;
    # the null tokenizer adds a token of its own
    mock) data=(--mock-data --tokenizer-type NullTokenizer --vocab-size $((vocabulary - 1))) ;;
    *)
        [ -f "$DATA.idx" ] || fail "DATA=$DATA: there is no $DATA.idx"
        [ -n "${TOKENIZER:-}" ] || fail "set TOKENIZER to the tokenizer that $DATA was made with"
        DATA=$(realpath -s "$DATA")
        # a folder, or a name on Hugging Face's hub
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
    # a checkout that the image has
    folder=$MEGATRON
    script=$folder/pretrain_gpt.py
elif [ -n "${MEGATRON:-}" ]; then
    [ -f "$MEGATRON/pretrain_gpt.py" ] || fail "MEGATRON=$MEGATRON has no pretrain_gpt.py"
    # the checkout's own megatron is used, not an installed one
    cd "$MEGATRON" || exit
    folder=$PWD
    script=$folder/pretrain_gpt.py
fi
launcher=(megamem.run)
if [ "${CPU:-0}" = 1 ]; then launcher+=(--cpu); fi

# the environment that examples/setup.sh makes, where it did and no other is active
if [ -z "${CONTAINER:-}${VIRTUAL_ENV:-}" ] && [ -x "$home/.venv/bin/python" ]; then
    export PATH=$home/.venv/bin:$PATH
fi
# Megatron insists on it for tensor parallelism on GPUs of before 2024
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

if [ "${PLAN:-0}" = 1 ]; then
    exec python -m megamem plan --world-size "$world" "${flags[@]}" "${@:3}"
fi
