"""Adds the output of a memory behind a later layer than the one where it reads (--memory-skip).

    layer a        launches the lookups of its memory, then computes its feed-forward alone
    layers between are computed while the lookups are on their way
    layer a + skip collects the read-outs and adds the memory to the output of its feed-forward

The later layer keeps its feed-forward, MLP or mixture of experts, under its own name: a hook of the
module adds the memory.
"""

from typing import Any

from torch import Tensor, nn

from megamem.layers.memory import MemoryLayer, SentLookups


class Flight:
    """Hands the lookups of one memory from the layer that sends them to the one that adds them.

    A chunk computes one microbatch after the other, and spans of memories do not overlap, so that
    there is one set of lookups at a time.
    """

    def __init__(self) -> None:
        self._memory: MemoryLayer | None = None
        self._sent: SentLookups | None = None

    def launch(self, memory: MemoryLayer, hidden_states: Tensor) -> None:
        """Send the lookups of a memory. What an interrupted pass has left is dropped."""
        self._memory, self._sent = memory, memory.launch(hidden_states)

    def collect(self) -> Tensor:
        """Return the output of the memory whose lookups were sent, [S, B, D]."""
        memory, sent = self._memory, self._sent
        self._memory = self._sent = None
        assert memory is not None and sent is not None, "the lookups were not sent in this pass"
        return memory.collect(sent)


class MLPWithMemory:
    """Builds the feed-forward of a layer behind which the memory of an earlier layer is added."""

    def __new__(cls, *args: Any, ffn: Any, flight: Flight, **slot: Any) -> Any:
        """Build the feed-forward.

        Args:
            args: what this release passes to an MLP by position.
            ffn: builds the feed-forward.
            flight: the lookups of the memory.
            slot: all keywords that this release passes to an MLP.
        """
        built: nn.Module = ffn(*args, **slot)

        def add_memory(module: nn.Module, given: Any, found: Any) -> tuple[Tensor, Tensor | None]:
            out, bias = found
            return out + flight.collect(), bias

        built.register_forward_hook(add_memory)
        return built
