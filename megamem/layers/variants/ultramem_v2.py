"""UltraMemV2 (arXiv 2508.18756): UltraMem whose rows are experts of one hidden unit.

The output for a token x is

    W sum of score * (p_row . W_pre x) * v_row

over its lookups, where p and v are rows of two tables, the pre-values and the values. The product
has no activation: which rows are read is what is not linear. The virtual blocks of an expanded set
of sub-keys are summed and projected once.

Letters: M lookups received here, O cores.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from megamem.layers.init import WeightFactory
from megamem.layers.linear import ReplicatedLinear
from megamem.layers.value_table import ReceivedLookups, ValueTable
from megamem.layers.variants.scales import score_moments
from megamem.layers.variants.ultramem import RELEASED_VALUE_STD, UltraMem
from megamem.layers.variants.variant import VALUES, TableUse, Tucker
from megamem.spec import MemorySpec, next_multiple

PRE_VALUES = "p"


class UltraMemV2(UltraMem):
    """The output is W sum of score * (p . W_pre x) * v over the rows of a token."""

    tables = (TableUse(), TableUse(PRE_VALUES, "dot"))
    heads = 1
    topk = 32
    # the product of a row with its token needs all columns of the row
    cuts_rows = False
    tucker = Tucker(
        expansion=1,
        expansion_proj="single",
        rank_queries=True,
        core_aux_weight=0,
        lr_times=1,
        pre_values=True,
    )

    def kept_per_lookup(self, cores: int) -> int:
        """Return those of the product, and of the weights of all cores times this."""
        return 1 + cores

    def value_dim(self, hidden_size: int, cores: int) -> int:
        """Return three eighths of the hidden size, rounded up to a multiple of 8 for each core."""
        return next_multiple(-(-3 * hidden_size // 8), 8 * cores)

    def table_width(self, spec: MemorySpec, use: TableUse) -> int:
        """Return the width of the rows of a table."""
        return spec.pre_value_dim if use.name == PRE_VALUES else spec.value_dim

    def initial_scales(self, spec: MemorySpec, num_layers: int, ffn_width: int) -> dict[str, float]:
        """Return the gains of both norms and the standard deviation of both tables.

        Paper (appendix A): the gains are such that the weights of lookups have the mean 1. Values
        and pre-values of widths V and P have a standard deviation s with

            s**4 = 0.2 k D / (F H (1 + variance of the weights) P V L)

        for layers with a feed-forward of inner width k D, so that a memory adds as much variance to
        the residual stream as the feed-forward does.
        """
        width = spec.key_dim // 2
        if spec.init == "released":
            gain = width**-0.4
            return {"value_init_std": RELEASED_VALUE_STD, "query_gain": gain, "key_gain": gain}
        mean, variance = score_moments(
            spec.keys_per_side, spec.topk, spec.final_topk, spec.tucker_rank, spec.cores
        )
        fourth = 0.2 * ffn_width / (spec.lookups_per_token * (1 + variance))
        fourth /= spec.pre_value_dim * spec.value_dim * num_layers
        return {
            "value_init_std": fourth**0.25,
            "query_gain": mean**-0.5,
            "key_gain": width**-0.5,
        }

    def linear_std(self, spec: MemorySpec, inputs: int) -> float:
        """Return (2 / 5D)**0.5, or what the released code has."""
        if spec.init == "released":
            return inputs**-0.5
        return (2 / (5 * spec.hidden_size)) ** 0.5

    def token(self, spec: MemorySpec, make: WeightFactory) -> nn.Module:
        """Return W_pre."""
        std = self.linear_std(spec, spec.hidden_size)
        weight = make.normal("pre", spec.pre_value_dim, spec.hidden_size, std=std)
        return ReplicatedLinear(weight, make, bias=False)

    def read_out(self, tables: Mapping[str, ValueTable], received: ReceivedLookups) -> Tensor:
        """Return the sum of the experts' outputs for each bag."""
        hidden_M, weights = tables[PRE_VALUES].dot(received), received.weights_M
        if weights.dim() > 1:
            hidden_M = hidden_M.unsqueeze(-1)
        return tables[VALUES].bag(received, weights * hidden_M)
