"""Queries -> the rows a token reads, and their weights."""

from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.layers.linear import ReplicatedRMSNorm
from megamem.ops import product_topk
from megamem.parallel.collectives import reduce_gradient
from megamem.spec import MemorySpec


class ProductKeys(nn.Module):
    """Per head, the K product keys nearest the query, and a softmax over their scores alone.

    Every head of every layer has sub-keys of its own, U(-b, b) with b = Q**-0.5. With q/k norm the
    keys' gain starts at C**-0.5, so that scores start with a variance near one at any width.
    """

    def __init__(self, spec: MemorySpec, make: WeightFactory) -> None:
        super().__init__()
        self.topk, self.gradient_group = spec.topk, make.gradient_group
        half = spec.key_dim // 2
        self.sub_keys = make.uniform(
            "sub_keys", 2, spec.heads, spec.num_keys, half, bound=spec.key_dim**-0.5
        )
        self.norm = ReplicatedRMSNorm(half, make, gain=half**-0.5) if spec.qk_norm else None

    def forward(self, query_THQ: Tensor) -> tuple[Tensor, Tensor]:
        """The rows each token reads, and in fp32 (fp64 for fp64 queries) how much of each.

        Returns:
            row_ids_TL: int64.
            weights_TL: a head's K weights sum to one.
        """
        sub_keys_2HNC = reduce_gradient(self.sub_keys, self.gradient_group)
        if self.norm is not None:
            sub_keys_2HNC = self.norm(sub_keys_2HNC)
        scores_THK, row_ids_THK = product_topk(query_THQ, sub_keys_2HNC, self.topk)
        return row_ids_THK.flatten(1), scores_THK.softmax(dim=-1).flatten(1)

    def extra_repr(self) -> str:
        _, heads, num_keys, half = self.sub_keys.shape
        return f"heads={heads}, num_keys={num_keys}, half={half}, topk={self.topk}"
