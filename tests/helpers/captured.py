"""What a CUDA graph does, without a GPU: device work is recorded once, and replayed without Python.

    graph = capture(work, monkeypatch)      runs it, and records every op of torch and every kernel
    graph.replay()                          repeats them on the same memory, with what it holds now

An op that has its numbers read by the host, or whose result has a size that depends on numbers, can
be in no graph, and is refused.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select")
"""Ops for which the host would wait for a GPU."""


class Graph(TorchDispatchMode):
    """The recorded work, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor)]
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in masks[:1])
        assert name not in WAITS and not by_mask, f"the host would wait for {func}"
        out = func(*args, **kwargs)
        is_new = all(result.alias_info is None for result in func._schema.returns)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)] if is_new else []
        self.work.append((func, args, kwargs, results))
        return out

    def launch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(kernel: Any, *args: Any, **options: Any) -> None:
            def again(*args: Any, **options: Any) -> None:
                original(kernel, *args, **options)

            self.kernels.append(kernel.fn.__name__)
            self.work.append((again, args, options, []))
            with _disable_current_modes():
                again(*args, **options)

        return run

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat the work; what it makes goes to the memory that it went to before."""
        for call, args, kwargs, results in self.work:
            made = call(*args, **kwargs)
            for old, new in zip(results, tree_leaves(made), strict=bool(results)):
                assert old.shape == new.shape
                old.copy_(new)


def capture(work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Graph:
    """Run work as on a GPU, by Triton's kernels, and record it."""
    graph = Graph()
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(InterpretedFunction, "run", graph.launch(InterpretedFunction.run))
        # row ids are checked on a CPU only
        for op in ("embedding_bag", "row_dot"):
            # the package has functions of the same names
            patch.setattr(sys.modules[f"megamem.ops.{op}"], "check_contents", lambda *_: None)
        with graph:
            work()
    return graph
