"""Plans for PEER: two tables, row mode only, and tokens that are sent to the rows."""

import pytest
import torch
import torch.distributed as dist

from megamem.config import MemoryConfig
from megamem.layers.memory import MemoryLayer
from megamem.layers.memory_pool import MemoryPool
from megamem.layers.variants import table_names
from megamem.metrics import Metrics, Watched
from megamem.parallel.memory_group import form, partition
from megamem.parallel.traffic import LEAST, sent_packing, traffic
from megamem.planner import make_plan, preset
from megamem.planner.buffers import kept_bytes, passing_bytes
from megamem.planner.cost import layout_cost, rank_bytes
from megamem.planner.job import layouts
from megamem.planner.sizes import (
    memory_flops_per_token,
    memory_layer_parameters,
    table_parameters,
    total_parameters,
)
from megamem.planner.stages import DOTS, ROW_GRADIENT, ROWS
from megamem.resolution import resolve
from megamem.spec import Grid, Layout, Wire
from tests.helpers.distributed import run_distributed
from tests.planner.jobs import LOOKUPS, TOKENS, WIDTH, job_of, spec_of
from tests.planner.test_sent import _sent

PEER = {"memory_variant": "peer", "memory_layers": [11]}


@pytest.mark.parametrize(("base", "millions"), [("134m", 1036.9), ("1.3b", 3645.7)])
def test_published_totals(base: str, millions: float) -> None:
    """One memory layer with 768 sub-keys per half."""
    memory = spec_of(base, 768, **PEER)
    total = total_parameters(preset(base)[0], memory)["total"]
    assert total / 1e6 == pytest.approx(millions, abs=0.051)


@pytest.mark.parametrize("pool", ["shared", "layer"])
def test_counts_are_those_of_the_modules(pool: str) -> None:
    config = MemoryConfig(
        memory_layers=[1, 2], memory_variant="peer", memory_pool=pool, memory_qk_norm=True
    )
    spec = resolve(config, 64)
    tables = MemoryPool(spec, device="meta")
    layer = MemoryLayer(spec, tables, layer=1, device="meta")
    assert memory_layer_parameters(spec) == sum(param.numel() for param in layer.parameters())
    pools = 2 if pool == "layer" else 1
    assert table_parameters(spec) == pools * sum(p.numel() for p in tables.tables.parameters())
    plain = resolve(MemoryConfig(memory_layers=[1, 2], memory_variant="memory"), 64)
    assert memory_flops_per_token(spec) == memory_flops_per_token(plain)


def test_a_rank_holds_two_tables_of_rows() -> None:
    plain, peer = (job_of(**PEER | {"memory_variant": variant}) for variant in ("memory", "peer"))
    layout = Layout("row", 8, 1)
    one, two = (rank_bytes(job, layout) for job in (plain, peer))
    assert two.table == 2 * one.table and two.dense == one.dense
    assert all(layout.mode == "row" for layout in layouts(peer)) and len(layouts(peer)) == 7
    assert job_of(**PEER, memory_mode="auto").spec.layout == Layout("row", 1, 1)
    assert make_plan(job_of(**PEER, world=512)).recommended.layout.mode == "row"
    replicas = [layout_cost(job, layout).replicas_per_step for job in (plain, peer)]
    assert replicas[1] == 2 * replicas[0]


def test_buffers_by_hand() -> None:
    """8192 tokens per rank over 8 ranks at fixed sizes: a rank holds the lookups of all ranks."""
    plain, peer = (job_of(**PEER | {"memory_variant": variant}) for variant in ("memory", "peer"))
    arrived, layout = 8 * TOKENS * LOOKUPS, Layout("row", 8, 1)
    # product, gelu and new weight per lookup; and the tokens of all ranks
    more = 3 * 4 * arrived + 8 * TOKENS * WIDTH * 2
    assert kept_bytes(peer, layout) == kept_bytes(plain, layout) + more
    alone = Layout("row", 1, 1)
    assert kept_bytes(peer, alone) == kept_bytes(plain, alone) + 3 * 4 * TOKENS * LOOKUPS
    assert passing_bytes(peer, layout) == passing_bytes(plain, layout)


def test_rows_are_read_three_times() -> None:
    """v is read in forward, u in forward and backward; each gradient is summed once."""

    def seconds(variant: str) -> float:
        job = job_of(**PEER | {"memory_variant": variant})
        stages = layout_cost(job, Layout("row", 1, 1)).seconds["h100"].stages
        return sum(s.per_step for s in stages if s.name in (ROWS, DOTS, ROW_GRADIENT))

    assert 2 * seconds("memory") < seconds("peer") < 3 * seconds("memory")


def test_minimal_traffic_goes_to_owners_only() -> None:
    grid = Grid(local_rows=16)
    plain, peer = (traffic(grid, 64, 4, tokens=tokens, packing=LEAST) for tokens in (False, True))
    owners = 16 * (1 - (15 / 16) ** 4)
    assert peer.forward - plain.forward == pytest.approx(owners * 15 / 16 * 64 * 2)
    assert peer.backward - plain.backward == peer.forward - plain.forward


NUM_KEYS, HIDDEN, LOCAL, READS = 32, 64, 64, 16


def _as_planned(wire: Wire, dtype: torch.dtype) -> None:
    size = dist.get_world_size()
    config = MemoryConfig(
        memory_layers=[0],
        memory_variant="peer",
        memory_num_keys=NUM_KEYS,
        memory_heads=1,
        memory_topk=READS,
        memory_wire=wire,
        memory_group_size=size,
    )
    spec = resolve(config, HIDDEN)
    group = form(partition([list(range(size))], Grid(local_rows=size)))
    pool = MemoryPool(spec, group=group, dtype=dtype)
    watched = Watched(layers=[0], tables=table_names(spec), num_keys=NUM_KEYS, heads=1, topk=READS)
    metrics = Metrics(watched, "cpu")
    for table in pool:
        table.metrics = metrics.tables[table.name]
    # every row is read once, so that each rank owns the same share of lookups as of rows
    generator = torch.Generator().manual_seed(dist.get_rank())
    pairs = torch.randperm(NUM_KEYS**2, generator=generator).view(LOCAL, READS)
    weights = torch.rand(LOCAL, READS, requires_grad=True)
    x = torch.rand(LOCAL, HIDDEN, requires_grad=True, dtype=dtype)
    grid, packing = pool.group.grid, sent_packing(NUM_KEYS**2, READS, size, wire)
    options = {"wire": wire, "tokens": True, "e": dtype.itemsize, "packing": packing}
    planned = traffic(grid, HIDDEN, READS, **options)
    with _sent(size) as sent:
        out = pool.read(pairs, weights, [LOCAL] * size, x)
    assert sent["inside"] / LOCAL == pytest.approx(planned.forward), (wire, "forward")
    with _sent(size) as back:
        out.sum().backward()
    assert back["inside"] / LOCAL == pytest.approx(planned.backward), (wire, "backward")
    shown = sum(float(table.metrics.bytes_sent) for table in pool)
    total = torch.tensor([shown - sent["inside"] - back["inside"]])
    dist.all_reduce(total)
    # single ranks may differ, by the owners of their lookups
    assert abs(total.item()) < 1e-6 * shown
    _, u = pool
    metrics.tables["shared.u"].fill(u.weight, u.shard)
    report = metrics.report(1)
    assert report is not None
    tokens = 2 * (size - 1) * LOCAL * HIDDEN * dtype.itemsize / 1e6
    assert report.scalars["memory/sent_megabytes/shared.u"] == pytest.approx(tokens)


def _all_as_planned() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for wire in ("alltoall", "allgather"):
            _as_planned(wire, dtype)


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_send_what_is_planned(world_size: int) -> None:
    run_distributed(_all_as_planned, world_size)
