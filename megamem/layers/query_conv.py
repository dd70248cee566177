"""The convolution before the query of UltraMem (arXiv 2411.12364, its "query conv").

Letters: T tokens on this rank, D hidden size, W tokens that an output sees, E entries of a list.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megamem.layers.init import WeightFactory
from megamem.parallel.collectives import previous_tokens, reduce_gradient
from megamem.spec import MemorySpec


class QueryConv(nn.Module):
    """A causal depth-wise convolution: the output for a token is the sum over the W tokens of its
    sequence up to it, each times a weight of its own for each of the D numbers.

    It starts as the identity, with a weight of one for the token itself and zero for those before
    it, so that initial queries, for which the gains of the norms are made, are those of a model
    without it. Before the first token of a sequence are zeros. There is no bias.
    """

    def __init__(self, spec: MemorySpec, make: WeightFactory, group: ProcessGroup | None) -> None:
        """Allocate the weight.

        Args:
            spec: the memory layers of the run.
            make: makes the weight.
            group: ranks among which the tokens are divided.
        """
        super().__init__()
        self.group, self.gradient_group = group, make.gradient_group
        self.weight = make.constant(spec.query_conv, spec.hidden_size, value=0)
        """weight_WD; the last entry is for the token itself."""
        with torch.no_grad():
            self.weight[-1] = 1

    def forward(self, x_TD: Tensor, batch: int, counts: Sequence[int]) -> Tensor:
        """Return the outputs, [T, D].

        Args:
            x_TD: this rank's part of the tokens of [S, B, D], which may end within a position.
            batch: B, the sequences, whose tokens of one position are neighbours.
            counts: number of tokens of every rank of the group.
        """
        weight_WD = reduce_gradient(self.weight, self.gradient_group)
        before = (len(weight_WD) - 1) * batch
        padded_ED = torch.cat((previous_tokens(x_TD, before, counts, self.group), x_TD))
        out_TD = weight_WD[-1] * x_TD
        for tap in range(len(weight_WD) - 1):
            first = tap * batch
            out_TD = out_TD + weight_WD[tap] * padded_ED[first : first + len(x_TD)]
        return out_TD

    def extra_repr(self) -> str:
        return f"{len(self.weight)} tokens of {self.weight.shape[1]} numbers"
