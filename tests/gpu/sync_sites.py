"""Counts host synchronisations, by the line of megamem or Megatron that causes them."""

import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.machine import ROOT

SAYS = "called a synchronizing"
# ops that make the host wait for a GPU; a dry run on a CPU counts calls of these
WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive")


class SyncSites:
    """Context manager that counts host synchronisations.

    On a GPU these are the ones about which torch.cuda.set_sync_debug_mode("warn") warns: those of
    torch itself, not those inside of NCCL. Synchronisations of a backward pass are attributed to
    the line that called backward.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sites: Counter[str] = Counter()
        self._warnings = warnings.catch_warnings()
        self._calls = _Calls(self)

    @property
    def count(self) -> int:
        """The number of synchronisations."""
        return self.sites.total()

    def __enter__(self) -> "SyncSites":
        if self.device.type != "cuda":
            self._calls.__enter__()
            return self
        torch.cuda.synchronize()
        self._warnings.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._note
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type != "cuda":
            self._calls.__exit__(kind, error, trace)
            return
        torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(kind, error, trace)

    def _note(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if SAYS in str(message):
            self.add()

    def add(self) -> None:
        """Count one synchronisation, caused by the line that is running."""
        self.sites[site_of(sys._getframe(1))] += 1


class _Calls(TorchDispatchMode):
    def __init__(self, sites: SyncSites) -> None:
        super().__init__()
        self._sites = sites

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in WAITS:
            self._sites.add()
        return func(*args, **(kwargs or {}))


def site_of(frame: FrameType) -> str:
    """The innermost line of megamem or Megatron, as "file:line function"; else "elsewhere"."""
    for entry in reversed(traceback.extract_stack(frame)):
        path = Path(entry.filename)
        if path.is_relative_to(ROOT / "megamem") or path.is_relative_to(ROOT / "examples"):
            return f"{path.relative_to(ROOT)}:{entry.lineno} {entry.name}"
        if "megatron" in path.parts:
            inside = Path(*path.parts[path.parts.index("megatron") :])
            return f"{inside}:{entry.lineno} {entry.name}"
    return "elsewhere"
