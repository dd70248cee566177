"""Memory+ of "Memory Layers at Scale", section 3.1: the read-out is gated, then projected."""

from megamem.layers.init import WeightFactory
from megamem.layers.output import GatedOutput, Output
from megamem.layers.variants.memory import Memory
from megamem.spec import MemorySpec


class MemoryPlus(Memory):
    """The output is W2 ((sum of weight * row) * silu(W1 x))."""

    projects = True
    silent_output = ("proj.weight", "proj.bias")
    # the read-out, the gate before and after silu, and their product
    kept_widths = 4
    # the gradients of the read-out and of the gate
    gradient_widths = 2

    def key_dim(self, hidden_size: int, value_dim: int) -> int:
        """Return half of the value width."""
        return value_dim // 2

    def output(self, spec: MemorySpec, make: WeightFactory) -> Output:
        """Return the gate and the projection."""
        return GatedOutput(spec, make)
