"""What makes the host wait for a GPU, counted without one.

The code runs as it does on a GPU, on tensors of the meta device. These have no numbers, so that
every op fails that would wait for one (item, nonzero, unique, indexing by a mask). Kernels are not
launched, and copies between the host and the device are counted.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.optimizer import TableOptimizer
from megamem.resolution import resolve
from tests.optimizer.test_table_optimizer import KINDS

DEVICE = "meta"


class Copies(TorchDispatchMode):
    """Counts copies between the host and the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "copy" in func._schema.name:
            devices = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor)}
            self.count += len(devices) > 1
        # a tensor made of numbers of the host
        self.count += func is torch.ops.aten.lift_fresh.default and out.device.type == DEVICE
        return out


@contextmanager
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Run kernels' host code on the meta device; yields the names of the kernels launched."""
    launched: list[str] = []

    def run(self: Any, *args: Any, **options: Any) -> None:
        launched.append(self.fn.__name__)

    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for kind in (JITFunction, InterpretedFunction):
            patch.setattr(kind, "run", run)
        # row ids are checked on a CPU only
        for op in ("embedding_bag", "row_dot"):
            # the package has functions of the same names
            module = sys.modules[f"megamem.ops.{op}"]
            patch.setattr(module, "check_contents", lambda *_: None)
        yield launched


def _trained(**settings: Any) -> tuple[MemoryLayer, TableOptimizer]:
    config = MemoryConfig(
        memory_layers=[0], memory_num_keys=64, memory_topk=8, memory_heads=2, **settings
    )
    spec = resolve(config, 64, seed=1)
    pool = MemoryPool(spec, "t", device=DEVICE, dtype=torch.bfloat16)
    layer = MemoryLayer(spec, pool, device=DEVICE, dtype=torch.bfloat16)
    return layer, TableOptimizer(pool, spec, lr=0.1)


def _step(optimizer: TableOptimizer) -> None:
    optimizer.reduce()
    optimizer.squared_norm()
    optimizer.step(0.5)
    optimizer.zero_grad()


def _waits(phase: Callable[[], object]) -> int:
    """Number of copies between host and device; fails where an op would wait for a number."""
    with Copies() as copies:
        phase()
    return copies.count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["memory", "memory+", "peer", "ultramem", "ultramem-v2"])
def test_neither_layer_nor_step_makes_the_host_wait(kind, variant, forms, monkeypatch) -> None:
    with on_a_gpu(monkeypatch) as launched:
        layer, optimizer = _trained(memory_optimizer=kind, memory_variant=variant)
        x = torch.zeros(16, 2, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        # constants go to the device once
        layer(x).sum().backward()
        for _ in range(2):
            assert _waits(lambda: layer(x).sum().backward()) == 0
            if kind == "lazy_adamw" and not forms:
                # the form `list` needs the number of rows
                with pytest.raises(NotImplementedError, match="nonzero"):
                    _step(optimizer)
                return
            assert _waits(lambda: _step(optimizer)) == 0
    assert {"_row_pass_kernel", "_update_kernel"} <= set(launched)


def test_a_scale_on_the_device_is_not_waited_for(monkeypatch) -> None:
    with on_a_gpu(monkeypatch):
        layer, optimizer = _trained()
        x = torch.zeros(4, 1, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
        for gradient in optimizer.gradients.values():
            gradient.scale(torch.ones((), device=DEVICE))
        assert _waits(lambda: optimizer.step(torch.ones(1, device=DEVICE))) == 0


def test_a_skipped_batch_is_cleared_without_a_wait(monkeypatch) -> None:
    with on_a_gpu(monkeypatch):
        layer, optimizer = _trained()
        x = torch.zeros(4, 1, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
        assert _waits(optimizer.zero_grad) == 0


def test_waits_are_found(monkeypatch) -> None:
    with on_a_gpu(monkeypatch):
        x = torch.zeros(3, device=DEVICE)
        assert _waits(lambda: torch.tensor(0.5).to(DEVICE)) == 1
        assert _waits(lambda: torch.as_tensor(0.5, device=DEVICE)) == 1
        for wait in (x.nonzero, x.sum().item, lambda: x[x > 0], lambda: float(x.sum())):
            with pytest.raises((NotImplementedError, RuntimeError)):
                wait()
