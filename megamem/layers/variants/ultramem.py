"""UltraMem (Huang et al. 2024, "Ultra-Sparse Memory Network", arXiv 2411.12364).

Small memory layers, each with a table of its own, stand beside the feed-forwards of some layers.
Rows are chosen and weighted by Tucker scores (megamem.layers.tucker_keys). Sub-keys are for E
virtual blocks of the R rows: a virtual row is row g % R as block g // R reads it (implicit value
expansion). The rows of each block are summed and projected by themselves.
"""

from torch import nn

from megamem.layers.init import WeightFactory
from megamem.layers.keys import Keys
from megamem.layers.output import Output, Projection
from megamem.layers.tucker_keys import TuckerKeys, TuckerQuery
from megamem.layers.variants.memory import Memory
from megamem.layers.variants.scales import mean_of_best
from megamem.layers.variants.variant import Tucker
from megamem.spec import MemorySpec, next_multiple

RELEASED_VALUE_STD = 0.02


class UltraMem(Memory):
    """The output is the sum over E blocks of W_e (sum of score * row)."""

    heads = 2
    topk = 42
    pool = "layer"
    keeps_ffn = True
    qk_norm = True
    projects = True
    silent_output = ("proj.weight",)
    kept_widths = 1
    tucker = Tucker(
        expansion=4,
        expansion_proj="block",
        rank_queries=False,
        core_aux_weight=0.001,
        lr_times=10,
        skips=True,
    )

    def key_dim(self, hidden_size: int, value_dim: int) -> int:
        """Return the hidden size, half of it for each side."""
        return hidden_size

    def value_dim(self, hidden_size: int, cores: int) -> int:
        """Return half of the hidden size, rounded up to a multiple of 8 for each core."""
        return next_multiple(-(-hidden_size // 2), 8 * cores)

    def initial_scales(self, spec: MemorySpec, num_layers: int, ffn_width: int) -> dict[str, float]:
        """Return the gains of both norms and the standard deviation of the values.

        Paper (appendix A): values have the variance E / (2 m H L), where m is the number of rows of
        a head and L that of the layers of the model. The gains are C**-0.5 for sub-keys of width C
        and E[Y]**-0.5 for queries, where Y is the mean of the best m of N normal numbers.
        """
        width = spec.key_dim // 2
        if spec.init == "released":
            gain = width**-0.33
            return {"value_init_std": RELEASED_VALUE_STD, "query_gain": gain, "key_gain": gain}
        best = min(spec.final_topk, spec.keys_per_side)
        variance = spec.expansion / (2 * spec.lookups_per_token * num_layers)
        return {
            "value_init_std": variance**0.5,
            "query_gain": mean_of_best(best, spec.keys_per_side) ** -0.5,
            "key_gain": width**-0.5,
        }

    def linear_std(self, spec: MemorySpec, inputs: int) -> float:
        """Return the standard deviation of the initial weights of a linear layer."""
        return inputs**-0.5

    def query(self, spec: MemorySpec, make: WeightFactory) -> nn.Module:
        """Return the linear layer and norm of queries."""
        return TuckerQuery(spec, make, std=self.linear_std(spec, spec.key_dim // 2))

    def keys(self, spec: MemorySpec, make: WeightFactory) -> Keys:
        """Return the sub-keys and cores."""
        return TuckerKeys(spec, make, std=(spec.key_dim // 2) ** -0.5)

    def output(self, spec: MemorySpec, make: WeightFactory) -> Output:
        """Return the projection of all blocks."""
        return Projection(spec, make, std=self.linear_std(spec, spec.read_width))
