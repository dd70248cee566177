"""W ranks equal one: outputs, every gradient, one optimizer step, in float64."""

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.parallel.memory_group import MemoryGroup, form, partition
from megamem.parallel.row_shard import even_counts
from megamem.resolution import resolve
from megamem.row_gradient import RowGradient
from megamem.spec import Layout, MemorySpec
from tests.helpers.distributed import run_distributed

HIDDEN, SEED = 16, 1234


class Case(NamedTuple):
    spec: MemorySpec
    tokens_sharded: bool
    recompute: bool = False
    counts: tuple[int, ...] | None = None
    group_size: int | None = None
    column_ranks: int = 1
    buffer: bool = False
    vary: bool = False


def _spec(**settings) -> MemorySpec:
    base = {
        "memory_layers": [0, 1],
        "memory_num_keys": 9,  # 81 rows: even over 1 and 3 ranks only
        "memory_heads": 3,
        "memory_topk": 4,
        "memory_key_dim": 10,
        "memory_value_dim": 40,  # five blocks of columns: uneven over 2, 3 and 4 ranks
    }
    return resolve(MemoryConfig(**{**base, **settings}), HIDDEN, seed=SEED)


class Model(nn.Module):
    """Two memory layers on one table, with a residual and a non-linearity between."""

    def __init__(
        self,
        spec: MemorySpec,
        tokens_sharded: bool = True,
        recompute: bool = False,
        *,
        group=None,
        memory_group: MemoryGroup | None = None,
    ) -> None:
        super().__init__()
        group_of_table = memory_group or MemoryGroup()
        layout = Layout.of_grid(group_of_table.grid)
        spec = replace(spec, layout=layout)
        self.pool = MemoryPool(spec, "table", group_of_table, dtype=torch.float64)
        self.table = self.pool.tables
        self.layers = nn.ModuleList(
            MemoryLayer(
                spec,
                self.pool,
                layer=n,
                group=group,
                tokens_sharded=tokens_sharded,
                dtype=torch.float64,
            )
            for n in range(2)
        )
        self.recompute = recompute

    def forward(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        for layer in self.layers:
            step = (
                checkpoint(layer, x, counts, use_reentrant=True)
                if self.recompute
                else layer(x, counts)
            )
            x = x + torch.tanh(step)
        return x


def _step(model: nn.Module) -> None:
    torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1).step()


def _memory_group(case: Case) -> MemoryGroup:
    world = dist.get_world_size()
    size = case.group_size or world
    ranks = list(range(world))
    # every rank of the world splits replicated tokens
    return form(partition([ranks], Layout("2d", size, case.column_ranks).grid), token_ranks=ranks)


def _matches_one_process(case: Case) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    batch = 2
    tokens = sum(case.counts) if case.counts else (3 * world if case.tokens_sharded else 5)
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(tokens, batch, HIDDEN, generator=generator, dtype=torch.float64)
    grad = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)

    alone = Model(case.spec)
    start = {name: weight.detach().clone() for name, weight in alone.table.named_parameters()}
    whole = hidden.clone().requires_grad_()
    expected = alone(whole)
    expected.backward(grad)

    memory_group = _memory_group(case)
    many = Model(
        replace(case.spec, tokens_vary=case.vary),
        case.tokens_sharded,
        case.recompute,
        group=dist.group.WORLD if world > 1 else None,
        memory_group=memory_group,
    )
    shard = many.pool.values.shard
    piece = (shard.rows.local, shard.columns)
    for name, weight in many.table.named_parameters():
        assert torch.equal(weight, start[name][piece]), (
            f"a shard of {name} has other initial values"
        )
    for table in many.pool if case.buffer else []:
        table.weight.requires_grad_(False)
        table.accumulate_into(RowGradient(table.weight, table.weight.dtype))
    counts = list(case.counts or even_counts(tokens, world))

    def mine(x: Tensor) -> Tensor:
        return x.split(counts)[rank] if case.tokens_sharded else x

    part = mine(hidden).clone().requires_grad_()
    known = None
    if case.tokens_sharded and not case.vary:
        members = dist.get_process_group_ranks(memory_group.members) if world > 1 else [0]
        known = [counts[p] * batch for p in (members if memory_group.members else [rank])]
    out = many(part, known)
    out.backward(mine(grad))

    torch.testing.assert_close(out, mine(expected))
    torch.testing.assert_close(part.grad, mine(whole.grad))
    for table in many.pool:
        if case.buffer:
            table.weight.grad = table.gradient.buffer
        if memory_group.replicas is not None:
            dist.all_reduce(table.weight.grad, group=memory_group.replicas)
    theirs = dict(alone.named_parameters())
    for name, param in many.named_parameters():
        if name.startswith("table."):
            torch.testing.assert_close(param.grad, theirs[name].grad[piece])
            continue
        if case.tokens_sharded and world > 1:
            # what the host framework does for weights used on sharded tokens
            dist.all_reduce(param.grad)
        torch.testing.assert_close(param.grad, theirs[name].grad, msg=lambda m, n=name: f"{n}: {m}")

    _step(alone), _step(many)
    for name, param in many.named_parameters():
        want = theirs[name][piece] if name.startswith("table.") else theirs[name]
        torch.testing.assert_close(param, want)


def _all_cases(cases: list[Case]) -> None:
    for case in cases:
        try:
            _matches_one_process(case)
        except Exception as error:
            raise AssertionError(f"{case} on rank {dist.get_rank()}") from error


def _cases(world: int) -> list[Case]:
    wires, sharded = ("alltoall", "allgather"), (False, True)
    cases = [
        Case(_spec(memory_wire=wire, memory_qk_norm=norm), tokens_sharded, recompute)
        for wire, tokens_sharded, norm, recompute in product(
            wires, sharded, (False, True), (False, True)
        )
    ]
    # ranks with unequal tokens, one of them with none
    counts = tuple(range(world)) if world > 1 else (3,)
    cases += [Case(_spec(memory_wire=wire), True, counts=counts) for wire in wires]
    # fewer tokens than ranks; plain memory; one head; k = N; a table smaller than the group
    cases += [
        Case(_spec(memory_wire=wire, memory_variant="memory", memory_value_dim=None), s)
        for wire, s in product(wires, sharded)
    ]
    cases += [Case(_spec(memory_wire=wire, memory_heads=1, memory_topk=9), True) for wire in wires]
    cases += [
        Case(_spec(memory_wire=wire, memory_num_keys=1, memory_topk=1), True) for wire in wires
    ]
    # a gradient buffer in autograd's place; lengths that only the ranks themselves know
    cases += [
        Case(_spec(memory_wire=wire), s, recompute, buffer=True)
        for wire, s, recompute in product(wires, sharded, (False, True))
    ]
    cases += [Case(_spec(memory_wire=wire), True, counts=counts, vary=True) for wire in wires]
    # columns, both, and groups that leave replicas
    shapes = [
        (size, columns)
        for size in range(1, world + 1)
        for columns in range(1, size + 1)
        if world % size == 0 and size % columns == 0 and (size, columns) != (world, 1)
    ]
    for size, columns in shapes:
        for wire, s in product(wires, sharded):
            cases.append(Case(_spec(memory_wire=wire), s, group_size=size, column_ranks=columns))
        cases.append(
            Case(_spec(), True, True, counts, size, columns, buffer=True, vary=size == world)
        )
    return cases


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_equal_one_process(world_size: int) -> None:
    run_distributed(_all_cases, world_size, _cases(world_size))
