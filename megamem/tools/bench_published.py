"""Runs the kernels that were published with the paper, from a checkout of the user's.

megamem contains none of that code; it imports the checkout and calls one of its functions.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MODULE, FUNCTION = "lingua/product_key/xformer_embeddingbag.py", "xformers_embedding_bag"


@dataclass(frozen=True)
class PublishedKernels:
    """The embedding bag of a checkout of facebookresearch/memory."""

    bag: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(row ids [T, L], table [R, V], weights [T, L] in the table's dtype) -> [T, V]"""

    @classmethod
    def load(cls, checkout: Path, device: torch.device) -> "PublishedKernels":
        """Import the kernels from a checkout.

        Raises:
            ValueError: the device is not a GPU, or the folder does not contain the kernels.
        """
        if device.type != "cuda":
            raise ValueError(
                f"--published {checkout} needs a GPU, and --device is {device}; leave it out."
            )
        path = checkout / MODULE
        if not path.is_file():
            raise ValueError(
                f"--published {checkout} has no {MODULE}; name a checkout of "
                "https://github.com/facebookresearch/memory."
            )
        spec = importlib.util.spec_from_file_location("published_embedding_bag", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, FUNCTION):
            raise ValueError(
                f"--published {checkout}: {MODULE} has no {FUNCTION}; check out another commit."
            )
        return cls(getattr(module, FUNCTION))
