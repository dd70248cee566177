"""PEER (He 2024, "Mixture of a Million Experts"): R experts of one hidden unit each.

The output for a token x is the sum over its lookups of

    weight * gelu(u_row . x) * v_row

u and v are tables of R rows as wide as the token. The owner of a row holds the row of both tables.
The data path is that of the other variants, except that the tokens are sent to all owners with
their lookups, and in the backward the gradients of the tokens are summed over the owners, as the
bags are in the forward.

Letters: M lookups received here.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from megamem.layers.init import WeightFactory
from megamem.layers.output import Output
from megamem.layers.value_table import ReceivedLookups, ValueTable
from megamem.layers.variants.variant import VALUES, TableUse, Variant
from megamem.spec import MemorySpec

U = "u"


class Peer(Variant):
    """The output is the sum of weight * gelu(u . x) * v over the experts of a token.

    u and v start with a standard deviation of V**-0.5, as the values of the published memory layer
    do, so that u . x of a normalized token has a variance of one. `--memory-value-init-std` sets
    the standard deviation of v alone: at 0 the experts output nothing at first, and still train.

    The activation is the exact GELU, x * Phi(x): the paper names no approximation.
    """

    tables = (TableUse(), TableUse(U, "dot"))
    # the dot product of an expert needs all columns of its row
    cuts_rows = False

    def kept_per_lookup(self, cores: int) -> int:
        """Return 3: u . x, its gelu, and the product with the weight."""
        return 3

    def init_std(self, spec: MemorySpec, use: TableUse) -> float:
        """Return V**-0.5 for u, and the configured value for v."""
        return spec.value_dim**-0.5 if use.name == U else spec.value_init_std

    def read_out(self, tables: Mapping[str, ValueTable], received: ReceivedLookups) -> Tensor:
        """Return the sum of the experts' outputs for each bag."""
        hidden_M = F.gelu(tables[U].dot(received))
        return tables[VALUES].bag(received, received.weights_M * hidden_M)

    def output(self, spec: MemorySpec, make: WeightFactory) -> Output:
        """Return a module that outputs the read-out itself."""
        return Output()
