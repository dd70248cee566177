"""The ops that layers call. Each chooses its Triton kernel or its torch reference."""

from megamem.ops.embedding_bag import embedding_bag
from megamem.ops.placement import place_rows, unplace_rows
from megamem.ops.product_topk import product_topk
from megamem.ops.row_adam import (
    AdamOptions,
    adamw_,
    rowwise_adamw_,
    sgd_,
    touched_adamw_,
    touched_sgd_,
)
from megamem.ops.row_dot import row_dot
from megamem.ops.sort_lookups import Known, sort_lookups
from megamem.ops.squared_norm import squared_norm
from megamem.ops.tucker_topk import leading_directions, tucker_topk
from megamem.ops.value_gradient import add_value_gradient_, sparse_gradients
from megamem.reference.philox import random_rows

__all__ = [
    "AdamOptions",
    "Known",
    "adamw_",
    "add_value_gradient_",
    "embedding_bag",
    "leading_directions",
    "place_rows",
    "product_topk",
    "random_rows",
    "row_dot",
    "rowwise_adamw_",
    "sgd_",
    "sort_lookups",
    "sparse_gradients",
    "squared_norm",
    "touched_adamw_",
    "touched_sgd_",
    "tucker_topk",
    "unplace_rows",
]
