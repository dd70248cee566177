"""W ranks equal one: outputs, every gradient, one optimizer step, in float64."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megamem.config import MemoryConfig
from megamem.layers.init import WeightFactory
from megamem.layers.memory import MemoryLayer
from megamem.layers.value_table import ValueTable
from megamem.parallel.row_shard import RowShard, even_counts
from tests.helpers.distributed import run_distributed

HIDDEN, SEED = 16, 1234


class Case(NamedTuple):
    config: MemoryConfig
    tokens_sharded: bool
    recompute: bool = False
    counts: tuple[int, ...] | None = None


def _config(**settings) -> MemoryConfig:
    base = {
        "memory_layers": [0, 1],
        "memory_num_keys": 9,  # 81 rows: even over 1 and 3 ranks only
        "memory_heads": 3,
        "memory_topk": 4,
        "memory_key_dim": 10,
        "memory_value_dim": 24,
    }
    return MemoryConfig(**{**base, **settings}).resolve(HIDDEN)


class Model(nn.Module):
    """Two memory layers on one table, with a residual and a non-linearity between."""

    def __init__(self, config: MemoryConfig, group, tokens_sharded: bool, recompute=False) -> None:
        super().__init__()
        make = WeightFactory(seed=SEED, name="table", dtype=torch.float64)
        self.table = ValueTable(config, make, group)
        self.layers = nn.ModuleList(
            MemoryLayer(
                config,
                HIDDEN,
                self.table,
                layer=n,
                group=group,
                tokens_sharded=tokens_sharded,
                seed=SEED,
                parks_gradient=n > 0,
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


def _matches_one_process(case: Case) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    batch = 2
    tokens = sum(case.counts) if case.counts else (3 * world if case.tokens_sharded else 5)
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(tokens, batch, HIDDEN, generator=generator, dtype=torch.float64)
    grad = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)

    alone = Model(case.config, None, tokens_sharded=True)
    whole = hidden.clone().requires_grad_()
    expected = alone(whole)
    expected.backward(grad)

    many = Model(case.config, dist.group.WORLD, case.tokens_sharded, case.recompute)
    counts = list(case.counts or even_counts(tokens, world))

    def mine(x: Tensor) -> Tensor:
        return x.split(counts)[rank] if case.tokens_sharded else x

    part = mine(hidden).clone().requires_grad_()
    out = many(part, [count * batch for count in counts] if case.tokens_sharded else None)
    out.backward(mine(grad))

    torch.testing.assert_close(out, mine(expected))
    torch.testing.assert_close(part.grad, mine(whole.grad))
    shard = RowShard(case.config.num_rows, rank, world)
    rows = slice(shard.start, shard.start + shard.num_local)
    theirs = dict(alone.named_parameters())
    for name, param in many.named_parameters():
        if name == "table.weight":
            assert torch.equal(
                param,
                ValueTable(
                    case.config, WeightFactory(seed=SEED, name="table", dtype=torch.float64), None
                ).weight[rows],
            ), "a shard starts with other numbers than the same rows of one table"
            torch.testing.assert_close(param.grad, theirs[name].grad[rows])
            continue
        if case.tokens_sharded:
            # what the host framework does for weights used on sharded tokens
            dist.all_reduce(param.grad)
        torch.testing.assert_close(param.grad, theirs[name].grad, msg=lambda m, n=name: f"{n}: {m}")
    assert not many.table._parked, "a parked gradient never reached the table"

    _step(alone), _step(many)
    for name, param in many.named_parameters():
        want = theirs[name][rows] if name == "table.weight" else theirs[name]
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
        Case(_config(memory_wire=wire, memory_qk_norm=norm), tokens_sharded, recompute)
        for wire, tokens_sharded, norm, recompute in product(
            wires, sharded, (False, True), (False, True)
        )
    ]
    # ranks with unequal tokens, one of them with none
    counts = tuple(range(world)) if world > 1 else (3,)
    cases += [Case(_config(memory_wire=wire), True, counts=counts) for wire in wires]
    # fewer tokens than ranks; plain memory; one head; k = N; a table smaller than the group
    cases += [
        Case(_config(memory_wire=wire, memory_variant="memory", memory_value_dim=None), s)
        for wire, s in product(wires, sharded)
    ]
    cases += [
        Case(_config(memory_wire=wire, memory_heads=1, memory_topk=9), True) for wire in wires
    ]
    cases += [
        Case(_config(memory_wire=wire, memory_num_keys=1, memory_topk=1), True) for wire in wires
    ]
    return cases


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_equal_one_process(world_size: int) -> None:
    run_distributed(_all_cases, world_size, _cases(world_size))
