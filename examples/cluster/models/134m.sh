# The 134M base model: 12 layers of 768. ../flags.sh sources this file.
# shellcheck shell=bash disable=SC2034
model=(
    --num-layers 12 --hidden-size 768 --ffn-hidden-size 2048 --num-attention-heads 12
    --rotary-base 10000
)
vocabulary=32000
tensor_parallel=1
micro_batch=8
memory_layers=(2 6 10)
# rows -> the fewest GPUs of 80 GB, as a power of two, that hold model and table
least=([1m]=1 [4m]=2 [16m]=8 [64m]=32)
lean=([1m]=1 [4m]=1 [16m]=4 [64m]=16)
