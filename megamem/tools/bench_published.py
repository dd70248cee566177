"""Runs the kernels that were published with the paper, from a checkout that the user has.

None of that code is in megamem. One function of it is called, by its name and arguments.
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
        """Import them.

        Raises:
            ValueError: there is no GPU to run them on, or the folder does not hold them.
        """
        if device.type != "cuda":
            raise ValueError("--published needs a GPU: the published kernels run nowhere else.")
        path = checkout / MODULE
        if not path.is_file():
            raise ValueError(
                f"--published {checkout}: there is no {MODULE}; name a checkout of "
                "https://github.com/facebookresearch/memory."
            )
        spec = importlib.util.spec_from_file_location("published_embedding_bag", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, FUNCTION):
            raise ValueError(f"--published {checkout}: {MODULE} has no {FUNCTION}.")
        return cls(getattr(module, FUNCTION))
