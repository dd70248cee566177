"""What layers call. Each op picks its Triton kernel or its torch twin, and owns the backward."""

from megamem.reference.embedding_bag import embedding_bag
from megamem.reference.philox import random_rows
from megamem.reference.product_topk import product_topk

__all__ = ["embedding_bag", "product_topk", "random_rows"]
