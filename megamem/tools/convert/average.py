"""The mean of several checkpoints of a run, weight by weight and region by region."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megamem.checkpoint import TABLES
from megamem.config import ConfigurationError
from megamem.tools.convert import layout
from megamem.tools.convert.lazy import LazyTensor, Region, Tensors


def average(
    sources: Sequence[Tensors],
    settings: Sequence[dict[str, Any] | None],
    names: Sequence[str],
) -> dict[str, LazyTensor]:
    """The weights of the mean, which is summed in fp32 (fp64 for fp64) and rounded once.

    Args:
        sources: key -> tensor of each checkpoint, optimizer state included, which is left out.
        settings: the memory settings in each, None where there are none.
        names: how the user names each, for messages.

    Raises:
        ConfigurationError: there is only one checkpoint, or two differ in settings, weights, sizes,
            dtypes or the placement of rows.
    """
    if len(sources) < 2:
        raise ConfigurationError(
            "megamem convert average needs at least two checkpoints; name several iterations."
        )
    weights = [layout.weights_only(source) for source in sources]
    first = weights[0]
    for other, said, name in zip(weights[1:], settings[1:], names[1:], strict=True):
        if problem := _difference(first, other) or _setting(settings[0], said):
            raise ConfigurationError(
                f"{name} and {names[0]} cannot be averaged: {problem}; name checkpoints of one run."
            )
    return {key: _mean([source[key] for source in weights]) for key in first}


def _setting(a: dict[str, Any] | None, b: dict[str, Any] | None) -> str | None:
    if a is None or b is None:
        return None
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            return f"{name} is {b.get(name)} in one and {a.get(name)} in the other"
    return None


def _difference(a: Tensors, b: Tensors) -> str | None:
    if lacking := sorted(a.keys() ^ b.keys()):
        return f"only one has {lacking[0]}"
    for key, tensor in a.items():
        for what in ("shape", "dtype"):
            one, other = getattr(tensor, what), getattr(b[key], what)
            if one != other:
                return (
                    f"the {what} of {key} is {_words(other)} in one and {_words(one)} in the other"
                )
        if _is_placement(key) and not tensor.whole().equal(b[key].whole()):
            return f"the rows of tables have other places ({key})"
    return None


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return str(value).removeprefix("torch.")


def _is_placement(key: str) -> bool:
    return key.startswith(f"{TABLES}.") and key.endswith(".placement")


def _mean(tensors: list[LazyTensor]) -> LazyTensor:
    """The mean, read by the regions of the first; of integers, as placements, the first itself."""
    first = tensors[0]
    if not first.dtype.is_floating_point:
        return first
    wide = torch.promote_types(first.dtype, torch.float32)

    def read(region: Region) -> Tensor:
        total = first.read(region).to(wide)
        if first.dtype == wide:
            total = total.clone()
        for tensor in tensors[1:]:
            total += tensor.read(region)
        return (total / len(tensors)).to(first.dtype)

    return LazyTensor(first.shape, first.dtype, first.regions, read)
