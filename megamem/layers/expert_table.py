"""The two tables of PEER, whose row pairs are experts of one hidden unit each.

He 2024, "Mixture of a Million Experts": what a token x gets of its lookups is the sum of

    weight * gelu(u_row . x) * v_row

u and v are tables of R rows as wide as the token. The owner of a row holds both of its halves, so a
pass is that of a value table, but for the tokens, which travel to all owners beside their lookups:

    x_TD  --all_gather_tokens-->  x_GD    u_row . x    row_dot of u's rows with their bag's token
                                          bags         embedding_bag of v's rows by weight * gelu

and backward the gradient of x is summed home as bags are.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megamem.checkpoint import SHARED, layer_table
from megamem.config import MemoryConfig
from megamem.layers.init import WeightFactory
from megamem.layers.value_table import Lookups, ValueTable
from megamem.metrics import there_and_back
from megamem.ops import row_dot
from megamem.parallel.memory_group import MemoryGroup
from megamem.parallel.routing import all_gather_tokens, tokens_of_bags

U = "u"
"""Name of the table of u, in that of v."""


class ExpertTable(ValueTable):
    """R experts: a table of v, as any value table, and in it the table of u.

    Both start N(0, V**-0.5), as the values of the published memory layer do; u . x of a normalised
    token then has a variance of one. An own standard deviation (`--memory-value-init-std`) is that
    of v, so that 0 silences the experts without keeping them from learning.

    gelu is the exact one, by erf: the paper says GELU and names no approximation.

    Each of the two has gradients, optimizer state and a place in the checkpoint of its own.
    """

    def __init__(self, config: MemoryConfig, make: WeightFactory, group: MemoryGroup) -> None:
        super().__init__(config, make, group)
        assert group.columns is None, "an expert's dot product takes a whole row"
        own = replace(make, name=f"{make.name}.{U}")
        self.u = ValueTable(replace(config, memory_value_init_std=None), own, group)

    def launch(
        self,
        row_ids_TL: Tensor,
        weights_TL: Tensor,
        token_counts: list[int],
        x_TD: Tensor | None = None,
    ) -> Lookups:
        """Send lookups, and the tokens that they are for."""
        assert x_TD is not None
        lookups = super().launch(row_ids_TL, weights_TL, token_counts)
        return replace(lookups, gathered=all_gather_tokens(lookups.plan, x_TD))

    def _weights(self, rows_M: Tensor, lookups: Lookups) -> Tensor:
        """weight * gelu(u . x)"""
        assert lookups.gathered is not None
        x_GD = tokens_of_bags(lookups.plan, lookups.gathered)
        self.u._record(rows_M)
        dots_M = row_dot(
            self.u.weight,
            x_GD,
            rows_M,
            lookups.plan.offsets,
            check_row_ids=self.check_row_ids or None,
            add_value_grad_to=self.u._buffer(),
        )
        if self.u.metrics is not None and torch.is_grad_enabled():
            token_bytes = x_GD.shape[1] * x_GD.element_size()
            self.u.metrics.bytes_sent += there_and_back(lookups.plan, token_bytes)
        return lookups.weights_M * F.gelu(dots_M)


def make_table(config: MemoryConfig, make: WeightFactory, group: MemoryGroup) -> ValueTable:
    """What the memory layers of this variant read."""
    variant = ExpertTable if config.memory_variant == "peer" else ValueTable
    return variant(config, make, group)


def table_names(config: MemoryConfig) -> list[str]:
    """Every table of a model: of each pool the values, and of peer u beside them."""
    shared = config.memory_pool == "shared"
    pools = [SHARED] if shared else [layer_table(layer) for layer in config.memory_layers]
    if config.memory_variant != "peer":
        return pools
    return [name for pool in pools for name in (pool, f"{pool}.{U}")]
