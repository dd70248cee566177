# The 1.3B base model: 22 layers of 2048. ../flags.sh sources this file.
# shellcheck shell=bash disable=SC2034
model=(
    --num-layers 22 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16
    --rotary-base 10000
)
vocabulary=32000
tensor_parallel=1
micro_batch=2
memory_layers=(3 11 19)
# rows -> the fewest GPUs of 80 GB, as a power of two, that hold model and table
least=([1m]=2 [4m]=8 [16m]=32 [64m]=128)
lean=([1m]=1 [4m]=4 [16m]=16 [64m]=64)
