# The 373M base model: 24 layers of 1024. ../flags.sh sources this file.
# shellcheck shell=bash disable=SC2034
model=(
    --num-layers 24 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16
    --rotary-base 10000
)
vocabulary=32000
tensor_parallel=1
micro_batch=2
memory_layers=(4 12 20)
# rows -> the fewest GPUs of 80 GB, as a power of two, that hold model and table
least=([1m]=1 [4m]=2 [16m]=8 [64m]=32)
lean=([1m]=1 [4m]=2 [16m]=4 [64m]=16)
