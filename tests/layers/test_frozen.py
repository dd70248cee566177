"""Parts of a model that do not train: everything but the tables, or the tables alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.optimizer import TableOptimizer
from megamem.resolution import resolve

WIDTH, LAYERS, LR = 16, (0, 1), 0.1


def _build(**settings) -> tuple[MemoryPool, nn.ModuleList]:
    config = MemoryConfig(
        memory_layers=list(LAYERS), memory_num_keys=5, memory_topk=3, memory_heads=2, **settings
    )
    spec = resolve(config, WIDTH, seed=1)
    pool = MemoryPool(spec)
    return pool, nn.ModuleList(MemoryLayer(spec, pool, layer=n) for n in LAYERS)


def _backward(layers: nn.ModuleList) -> None:
    hidden = torch.randn(6, 1, WIDTH, generator=torch.Generator().manual_seed(7))
    for layer in layers:
        hidden = hidden + layer(hidden)
    hidden.square().sum().backward()


def _gradients(variant: str, freeze: bool) -> dict[str, Tensor]:
    pool, layers = _build(memory_variant=variant)
    layers.requires_grad_(not freeze)
    optimizer = TableOptimizer(pool, pool.spec, lr=LR)
    for _ in range(2):
        _backward(layers)
    assert all((weight.grad is None) == freeze for weight in layers.parameters())
    found = {}
    for name, gradient in optimizer.gradients.items():
        touched = gradient.touched
        assert touched.any()
        found[name] = gradient.buffer.where(touched.unsqueeze(1), 0)
    return found


CASES = [
    (variant, form, False)
    for variant in ("memory", "memory+", "peer", "ultramem", "ultramem-v2")
    for form in ("add", "first_touch", "merged")
]
# the kernels, which take seconds each in the interpreter
CASES += [("memory+", "add", True), ("memory+", "merged", True), ("peer", "first_touch", True)]


@pytest.mark.parametrize(("variant", "form", "interpreted"), CASES)
def test_tables_train_where_nothing_else_does(variant, form, interpreted, monkeypatch) -> None:
    if not interpreted:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("MEGAMEM_FORMS", f"row_gradient={form}")
    alone, together = (_gradients(variant, freeze) for freeze in (True, False))
    for name, gradient in together.items():
        assert gradient.any() and torch.equal(alone[name], gradient)


def test_a_weight_that_an_optimizer_owns_remembers_whether_it_is_frozen() -> None:
    pool, _ = _build()
    table = pool.values
    drawn = table.weight.detach().clone()
    table.leave_to_optimizer()
    weight = table.weight
    assert isinstance(weight, nn.Parameter) and weight is dict(table.named_parameters())["weight"]
    assert torch.equal(weight, drawn) and not weight.requires_grad and not table.frozen
    table.requires_grad_(False)
    assert table.frozen
    # code that freezes all but the tables sets this, and autograd still leaves them alone
    weight.requires_grad = True
    assert not table.frozen and not weight.requires_grad and not (weight * 2).requires_grad
    weight.requires_grad = False
    assert table.bfloat16().frozen and table.weight.dtype == torch.bfloat16
    copied = copy.deepcopy(weight)
    assert type(copied) is type(weight) and torch.equal(copied, weight)
    table.requires_grad_(True)
    assert not table.frozen


@pytest.mark.parametrize("owned", [True, False])
def test_a_frozen_table_is_not_trained(owned: bool) -> None:
    pool, layers = _build()
    if owned:
        pool.values.leave_to_optimizer()
    pool.tables.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad is False for value table shared.*lr=0"):
        TableOptimizer(pool, pool.spec, lr=LR)
    TableOptimizer(pool, pool.spec, lr=0.0, weight_decay=0.1)
    _backward(layers)
    # a second optimizer of a table is as free as the first was
    pool.tables.requires_grad_()
    TableOptimizer(pool, pool.spec, lr=LR)
    TableOptimizer(pool, pool.spec, lr=LR)


@pytest.mark.parametrize("kind", ["adamw", "lazy_adamw", "rowwise_adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounds", [True, False])
def test_a_learning_rate_of_zero_leaves_a_table_bit_for_bit(kind, dtype, rounds) -> None:
    pool, layers = _build(memory_optimizer=kind, memory_stochastic_rounding=rounds)
    pool.tables.to(dtype)
    layers.to(dtype)
    optimizer = TableOptimizer(pool, pool.spec, lr=0.0, weight_decay=0.1)
    before = pool.values.weight.clone()
    for _ in range(3):
        hidden = torch.randn(6, 1, WIDTH, dtype=dtype)
        for layer in layers:
            hidden = hidden + layer(hidden)
        hidden.square().sum().backward()
        assert optimizer.gradients["shared"].touched.any()
        optimizer.step()
    assert torch.equal(pool.values.weight.view(torch.uint8), before.view(torch.uint8))
