"""Reads what a Megatron checkpoint holds beside tensors, without executing code in it.

Megatron saves the arguments of a run by pickle, in which a file could name any function to call.
Here everything but plain values and the arguments' own class becomes an object that does nothing.
"""

import argparse
import io
import pickle
import zipfile
from typing import Any

from megamem.config import ConfigurationError
from megamem.tools.convert.torch_dist import TorchDist

COMMON_STATE = "common_state/shard_0_1"
"""Key of the common state in checkpoints of Megatron 0.19 and later; before, it was a file."""


class _Inert:
    """Stands in for an object of any other class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _ignore(self, *args: Any) -> "_Inert":
        return self

    # what a pickle does with objects: call them, set their state, add to them
    __call__ = __setstate__ = __setitem__ = append = extend = add = _ignore

    def __hash__(self) -> int:
        return id(self)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("argparse", "Namespace"):
            return argparse.Namespace
        return _Inert

    def persistent_load(self, pid: Any) -> None:
        """Tensors are left out."""


def read_common(source: TorchDist) -> dict[str, Any]:
    """The common state of a checkpoint; empty if it has none.

    Raises:
        ConfigurationError: it is damaged.
    """
    file = source.folder / "common.pt"
    if file.is_file():
        content = file.read_bytes()
    elif COMMON_STATE in source.objects:
        content = source.read_object(COMMON_STATE)
    else:
        return {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            found = _PlainUnpickler(io.BytesIO(archive.read(pickled))).load()
    except Exception as error:  # a damaged file may raise any exception
        raise ConfigurationError(
            f"the arguments in {source.folder} cannot be read ({type(error).__name__}: {error}); "
            "the checkpoint may be damaged, so use another iteration."
        ) from error
    # an object is in a list of the objects with its key
    found = found[0] if isinstance(found, list) else found
    return found if isinstance(found, dict) else {}
