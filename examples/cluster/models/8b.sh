# The 8B base model: 32 layers of 4096, the shape of Llama 3. ../flags.sh sources this file.
# shellcheck shell=bash disable=SC2034
model=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --rotary-base 500000
)
vocabulary=128256
tensor_parallel=8
micro_batch=2
memory_layers=(8 16 24)
# rows -> the fewest GPUs of 80 GB, as a power of two, that hold model and table
least=([16m]=64)
lean=([16m]=32)
