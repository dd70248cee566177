"""Product keys: which rows each token reads, and with which weights.

Letters: T tokens on this rank, H heads, Q = 2C query width of a head, C sub-key width, N sub-keys
per half, K top-k, L = H * K lookups per token; 2 halves.
"""

from torch import Tensor

from megamem.layers.init import WeightFactory
from megamem.layers.keys import Keys
from megamem.layers.linear import ReplicatedRMSNorm
from megamem.ops import product_topk
from megamem.parallel.collectives import reduce_gradient
from megamem.spec import MemorySpec


class ProductKeys(Keys):
    """Product-key top-k of each head, with a softmax over the K best scores (Lample et al. 2019).

    Every head of every layer has its own sub-keys. They start as U(-b, b) with b = Q**-0.5. With
    q/k norm the gain of the keys starts at C**-0.5, so that scores start with a variance near one
    at any width.
    """

    def __init__(self, spec: MemorySpec, make: WeightFactory) -> None:
        super().__init__()
        self.topk, self.gradient_group = spec.topk, make.gradient_group
        half = spec.key_dim // 2
        self.sub_keys = make.uniform(
            "sub_keys", 2, spec.heads, spec.num_keys, half, bound=spec.key_dim**-0.5
        )
        self.norm = ReplicatedRMSNorm(half, make, gain=half**-0.5) if spec.qk_norm else None

    def forward(self, query: Tensor, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the rows that each token reads and their weights.

        Args:
            query: query_THQ.
            tokens: not used, as there are no losses.

        Returns:
            row_ids_TL: int64 pairs of sub-keys, i * N + j.
            weights_TL: fp32 (fp64 for fp64 queries); the K weights of a head sum to one.
        """
        sub_keys_2HNC = reduce_gradient(self.sub_keys, self.gradient_group)
        if self.norm is not None:
            sub_keys_2HNC = self.norm(sub_keys_2HNC)
        scores_THK, row_ids_THK = product_topk(query, sub_keys_2HNC, self.topk)
        return row_ids_THK.flatten(1), scores_THK.softmax(dim=-1).flatten(1)

    def extra_repr(self) -> str:
        _, heads, num_keys, half = self.sub_keys.shape
        return f"heads={heads}, num_keys={num_keys}, half={half}, topk={self.topk}"
