"""PEER, whose row pairs are experts of one hidden unit each.

He 2024, "Mixture of a Million Experts": what a token x gets of its lookups is the sum of

    weight * gelu(u_row . x) * v_row

u and v are tables of R rows as wide as the token. The owner of a row holds both of its halves, so a
pass is that of any memory, but for the tokens, which travel to all owners beside their lookups; and
backward the gradient of x is summed home as bags are.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from megamem.layers.init import WeightFactory
from megamem.layers.output import Output
from megamem.layers.value_table import Arrived, ValueTable
from megamem.layers.variants.variant import VALUES, TableUse, Variant
from megamem.spec import MemorySpec

U = "u"


class Peer(Variant):
    """R experts.

    u and v start N(0, V**-0.5), as the values of the published memory layer do; u . x of a
    normalised token then has a variance of one. An own standard deviation
    (`--memory-value-init-std`) is that of v, so that 0 silences the experts without keeping them
    from learning.

    gelu is the exact one, by erf: the paper says GELU and names no approximation.
    """

    tables = (TableUse(), TableUse(U, "dot"))
    # an expert's dot product takes a whole row
    cuts_rows = False
    # the product with u, its gelu, and that times the weight
    kept_per_lookup = 3

    def init_std(self, spec: MemorySpec, use: TableUse) -> float:
        """u always starts at V**-0.5."""
        return spec.value_dim**-0.5 if use.name == U else spec.value_init_std

    def read_out(self, tables: Mapping[str, ValueTable], arrived: Arrived) -> Tensor:
        """The experts' outputs, summed for every bag."""
        hidden_M = F.gelu(tables[U].dot(arrived))
        return tables[VALUES].bag(arrived, arrived.weights_M * hidden_M)

    def output(self, spec: MemorySpec, make: WeightFactory) -> Output:
        """The read-out itself."""
        return Output()
