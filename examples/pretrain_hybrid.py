"""Pretrain a hybrid model, Megatron's successor of GPTModel, without a Megatron-LM checkout.

    torchrun --nproc-per-node 8 -m megamem.pretrain_hybrid \\
        <Megatron's usual flags> --hybrid-layer-pattern "*-*-*-*-" \\
        --spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec --memory-layers 3

Each attention (*), feed-forward (-) and mixture of experts (E) in the pattern is a layer. Layers
are counted from 0: here, --memory-layers 3 replaces the second feed-forward by a memory layer.
"""

from megatron_releases import build_hybrid
from pretrain_gpt import main

if __name__ == "__main__":
    main(build_hybrid)
