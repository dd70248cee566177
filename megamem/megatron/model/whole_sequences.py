"""Refuses forwards in which a convolution before queries would not see the tokens before."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from megamem.config import ConfigurationError
from megamem.layers.memory_pool import MemoryPool

NEEDS_OTHERS = {
    "inference_context": "generation, as the tokens before a new one are not computed again",
    "inference_params": "generation, as the tokens before a new one are not computed again",
    "packed_seq_params": "packed sequences, whose tokens it would mix",
}
"""Argument of a model's forward -> what it means."""


def need_whole_sequences(model: nn.Module, pools: Mapping[str, MemoryPool]) -> None:
    """Let the forward of a model that has such convolutions raise a ConfigurationError there."""
    widths = {pool.spec.query_conv for pool in pools.values()} - {0}
    if not widths:
        return
    signature = inspect.signature(model.forward)

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind(*args, **kwargs).arguments
        for name, meaning in NEEDS_OTHERS.items():
            if given.get(name) is not None:
                raise ConfigurationError(
                    f"--memory-query-conv {max(widths)} does not work with {meaning}; use a model "
                    "that was trained without --memory-query-conv."
                )

    model.register_forward_pre_hook(check, with_kwargs=True)
