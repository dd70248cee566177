"""Pretrain a hybrid model, the successor of GPTModel in Megatron, without a Megatron-LM checkout.

    torchrun --nproc-per-node 8 -m megamem.run examples/pretrain_hybrid.py \\
        <Megatron's usual flags> --hybrid-layer-pattern "*-*-*-*-" \\
        --spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec --memory-layers 3

A pattern gives every attention (*), feed-forward (-) and mixture of experts (E) a layer of its own.
Layers are counted from 0, here 3 is the second feed-forward; a memory takes the place of one.
"""

from megatron_releases import build_hybrid
from pretrain_gpt import main

if __name__ == "__main__":
    main(build_hybrid)
