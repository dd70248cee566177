"""Several layers that read one table: their gradients, added layer by layer or in one pass."""

import pytest
import torch
from torch import Tensor

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.optimizer import TableOptimizer
from megamem.resolution import resolve

WIDTH, LAYERS, MICROBATCHES = 16, (0, 1, 2), 2


def _gradients(
    form: str, variant: str, backwards: int, dtype: torch.dtype, device: str, pieces: int = 1
):
    """Gradient of each table, and of each layer's weights, after some backward passes."""
    config = MemoryConfig(
        memory_layers=list(LAYERS),
        memory_num_keys=5,
        memory_topk=3,
        memory_variant=variant,
        memory_pieces=pieces,
    )
    spec = resolve(config, WIDTH, seed=1)
    pool = MemoryPool(spec, device=device, dtype=dtype)
    layers = [MemoryLayer(spec, pool, layer=n, device=device, dtype=dtype) for n in LAYERS]
    assert all(table.readers == len(LAYERS) for table in pool)
    optimizer = TableOptimizer(pool, spec, lr=0.1)
    generator = torch.Generator().manual_seed(7)
    for _ in range(MICROBATCHES):
        x = torch.randn(6, 1, WIDTH, generator=generator, dtype=torch.float64).to(device, dtype)
        hidden = x.requires_grad_()
        for layer in layers[:backwards]:
            hidden = hidden + layer(hidden)
        hidden.square().sum().backward()
    gradients: dict[str, Tensor] = {}
    for name, gradient in optimizer.gradients.items():
        touched = gradient.touched
        gradients[f"{name} touched"] = touched.clone()
        gradients[name] = gradient.buffer.where(touched.unsqueeze(1), 0)
    for layer in layers[:backwards]:
        gradients |= {f"{layer.layer} {n}": p.grad for n, p in layer.named_parameters()}
    return gradients, optimizer


@pytest.fixture
def select(monkeypatch):
    return lambda form: monkeypatch.setenv("MEGAMEM_FORMS", f"row_gradient={form}")


@pytest.mark.parametrize(
    "variant",
    ["memory+", "peer", pytest.param("ultramem", marks=pytest.mark.slow), "ultramem-v2"],
)
@pytest.mark.parametrize("backwards", [3, 2], ids=["every layer", "a layer without a backward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_pass_for_all_layers_adds_what_one_for_each_adds(
    variant, backwards, dtype, select, device
):
    found = {}
    for form in ("add", "first_touch", "merged"):
        select(form)
        found[form], _ = _gradients(form, variant, backwards, dtype, device)
    for form in ("first_touch", "merged"):
        assert found[form].keys() == found["add"].keys()
        for name, gradient in found[form].items():
            torch.testing.assert_close(gradient, found["add"][name], msg=f"{form} {name}")


def test_layers_wait_for_each_other_and_not_for_a_step(select, device):
    """Three layers hold their gradients back until the third; the step adds what is left."""
    select("merged")
    _, optimizer = _gradients("merged", "memory+", 3, torch.float64, device)
    (gradient,) = optimizer.gradients.values()
    assert gradient.rows.deferred.every == 3 and not gradient.rows.deferred.passes

    gradient.zero()
    assert not gradient.touched.any()
    _, optimizer = _gradients("merged", "memory+", 2, torch.float64, device)
    (gradient,) = optimizer.gradients.values()
    # of four passes, one was left for whoever reads the gradient
    assert gradient.touched.any() and not gradient.rows.deferred.passes


def test_pieces_of_all_layers_are_added_at_once(select, device):
    select("merged")
    found, optimizer = _gradients("merged", "memory+", 3, torch.float64, device, pieces=2)
    (gradient,) = optimizer.gradients.values()
    assert gradient.rows.deferred.every == 6 and not gradient.rows.deferred.passes
    whole, _ = _gradients("merged", "memory+", 3, torch.float64, device)
    for name, wanted in whole.items():
        torch.testing.assert_close(found[name], wanted, msg=name)


def test_a_batch_that_is_dropped_drops_what_was_held_back(select, device):
    select("merged")
    config = MemoryConfig(memory_layers=[0, 1], memory_num_keys=5, memory_topk=3)
    spec = resolve(config, WIDTH, seed=1)
    pool = MemoryPool(spec, device=device)
    first, _ = (MemoryLayer(spec, pool, layer=n, device=device) for n in (0, 1))
    optimizer = TableOptimizer(pool, spec, lr=0.1)
    first(torch.ones(4, 1, WIDTH, device=device)).sum().backward()
    (gradient,) = optimizer.gradients.values()
    assert len(gradient.rows.deferred.passes) == 1
    optimizer.zero_grad()
    assert not gradient.rows.deferred.passes and not gradient.touched.any()
