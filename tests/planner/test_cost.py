"""Bytes held and moved by a rank, compared with tables that were computed by hand.

Unless stated otherwise, rows are bf16, with 128 lookups per token and 8192 tokens per rank.
"""

import pytest
import torch

from megamem.kernels import product_topk, row_gradient
from megamem.kernels.sort_lookups import sort_by_torch
from megamem.parallel.traffic import (
    expected_unique,
    forward_bytes,
)
from megamem.planner import OPTIMIZERS, table_state
from megamem.planner.buffers import (
    kept_bytes,
    lookup_buffers,
    passing_bytes,
    scored_bytes,
    sorted_bytes,
)
from megamem.planner.cost import layout_cost, rank_bytes
from megamem.planner.hardware import HARDWARE
from megamem.planner.job import layout_wire
from megamem.planner.plan import gpus_for_bytes
from megamem.planner.stages import ROW_GRADIENT, ROWS, SORT, backward_bytes, rank_share
from megamem.spec import Grid, Layout
from tests.planner.jobs import LOOKUPS, MILLION_ROWS, TOKENS, WIDTH, job_of


def test_expected_unique_rows() -> None:
    picks = TOKENS * LOOKUPS
    printed = {1: "663k", 2: "825k", 16: "1016k", 64: "1040k"}
    for million_rows, thousands in printed.items():
        unique = expected_unique(million_rows * MILLION_ROWS, picks)
        assert abs(unique / 1e3 - float(thousands[:-1])) < 1, million_rows


@pytest.mark.parametrize(
    ("width", "gb", "h100", "h200"),
    [
        (1024, "2.17", "0.72", "0.50"),
        (2048, "4.33", "1.44", "1.01"),
        (4096, "8.66", "2.89", "2.01"),
    ],
)
def test_forward_floor(width: int, gb: str, h100: str, h200: str) -> None:
    moved = forward_bytes(width, LOOKUPS, TOKENS)
    assert moved / 1e9 == pytest.approx(float(gb), abs=0.006)
    for gpu, printed in (("h100", h100), ("h200", h200)):
        assert f"{moved / HARDWARE[gpu].copy * 1e3:.2f}" == printed


@pytest.mark.parametrize(
    ("adds", "printed"),
    [
        # adding to fp32 main_grad moves 10 bytes per number; writing sparse fp32 moves 6
        (True, [(4.5, 3.2), (5.7, 3.9), (7.0, 4.9)]),
        (False, [(2.7, 1.9), (3.4, 2.4), (4.2, 2.9)]),
    ],
)
def test_backward_floor(adds: bool, printed: list) -> None:
    """The printed times include about 50 MB of indices, hence the tolerance of 0.1 ms."""
    for million_rows, (h100, h200) in zip((1, 2, 16), printed, strict=True):
        unique = expected_unique(million_rows * MILLION_ROWS, TOKENS * LOOKUPS)
        moved = backward_bytes(unique, WIDTH, table_state("adamw"), adds=adds)
        for gpu, ms in (("h100", h100), ("h200", h200)):
            assert moved / HARDWARE[gpu].copy * 1e3 == pytest.approx(ms, abs=0.1)


def test_step_of_adamw() -> None:
    state = table_state("adamw")
    assert state.moved_by_step == 30
    for million_rows, printed in ((1, "21.5"), (2, "42.9"), (16, "343.6")):
        moved = state.moved_by_step * million_rows * MILLION_ROWS * WIDTH
        assert f"{moved / 3e12 * 1e3:.1f}" == printed


def test_rows_touched_by_a_step() -> None:
    printed = {
        (1, 2**16): "1.00",
        (16, 2**16): "0.39",
        (64, 2**16): "0.12",
        (16, 2**19): "0.98",
        (64, 2**19): "0.63",
        (64, 2**22): "1.00",
    }
    for (million_rows, tokens), share in printed.items():
        rows = million_rows * MILLION_ROWS
        assert f"{expected_unique(rows, tokens * LOOKUPS) / rows:.2f}" == share


def test_state_per_parameter() -> None:
    """Bytes per parameter with an fp32 copy, with stochastic rounding, and in fp32."""
    totals = {
        name: (
            table_state(name).total,
            table_state(name, stochastic_rounding=True).total,
            table_state(name, half_precision=False).total,
        )
        for name in OPTIMIZERS
    }
    assert totals == {
        "adamw": (18, 14, 16),
        "lazy_adamw": (18, 14, 16),
        "rowwise_adamw": (14, 10, 12),
        "sgd": (10, 6, 8),
    }
    assert [table_state(name).per_row for name in OPTIMIZERS] == [4, 12, 8, 4]


@pytest.mark.parametrize(
    ("per_parameter", "gb", "h100", "h200"),
    [(18, 2304, 48, 28), (12, 1536, 32, 19), (6, 768, 16, 10), (4, 512, 11, 7)],
)
def test_gpus_for_128b(per_parameter: int, gb: int, h100: int, h200: int) -> None:
    state = per_parameter * 128e9
    assert state / 1e9 == gb
    assert gpus_for_bytes(state, 0.6 * HARDWARE["h100"].memory) == h100
    assert gpus_for_bytes(state, 0.6 * HARDWARE["h200"].memory) == h200


@pytest.mark.parametrize(
    "layout", [Layout("row", 8, 1), Layout("column", 8, 8), Layout("2d", 8, 4)]
)
def test_table_bytes_are_the_shards(layout: Layout) -> None:
    job = job_of(num_keys=1024, world=8)
    ours = rank_bytes(job, layout)
    # every rank that holds a part of a row also counts the batches that read it
    read_counts = 4 * 2**20 / layout.row_ranks
    assert ours.table == 18 * 2**20 * 2048 / 8 + read_counts
    assert ours.weights == 2 * 2**20 * 2048 / 8
    rowwise = rank_bytes(job.with_optimizer("rowwise_adamw", True), layout)
    # the second moment takes 4 bytes per row, like the read count
    assert rowwise.table == 10 * 2**20 * 2048 / 8 + 2 * read_counts


def test_fsdp_divides_all_state_of_the_dense_model() -> None:
    layout = Layout("row", 8, 1)
    held = {"gradient_bytes": 2, "optimizer_bytes": 16.0}
    whole = job_of(world=8, cluster=held | {"use_distributed_optimizer": False})
    parts = job_of(world=8, cluster=held | {"use_torch_fsdp2": True})
    assert rank_bytes(parts, layout).dense == rank_bytes(whole, layout).dense / 8
    assert rank_bytes(parts, layout).table == rank_bytes(whole, layout).table
    halves = job_of(world=8, cluster={**held, "context_parallel_size": 2, "use_torch_fsdp2": True})
    assert rank_bytes(halves, layout).dense == rank_bytes(parts, layout).dense


def test_uneven_shards_count_as_the_largest() -> None:
    """33 x 33 rows over 2 ranks, 10 blocks of 8 columns over 4."""
    job = job_of(num_keys=33, world=8, memory_value_dim=80)
    assert rank_bytes(job, Layout("2d", 8, 4)).weights == 2 * 545 * 24


def test_every_row_has_a_place_in_the_gradient_buffer() -> None:
    for name in OPTIMIZERS:
        job = job_of(num_keys=8192, world=8).with_optimizer(name)
        assert rank_bytes(job, Layout("row", 8, 1)).gradients == 8192**2 / 8 * 2048 * 4


@pytest.mark.parametrize(
    "layout", [Layout("row", 8, 1), Layout("column", 8, 8), Layout("2d", 8, 4)]
)
def test_rows_touched_on_a_rank(layout: Layout) -> None:
    """The tokens of a rank and of its column ranks touch the rows of the rank."""
    share = rank_share(job_of(num_keys=8192, world=16), layout)
    picks, rows = TOKENS * LOOKUPS * layout.column_ranks, 8192**2 / layout.row_ranks
    assert share.touched == pytest.approx(expected_unique(rows, picks))
    # three layers read, in two memory groups
    assert share.touched_by_step == pytest.approx(expected_unique(rows, 3 * 2 * picks))


def test_stages_that_share_a_table_are_replicas_of_it() -> None:
    """Each copy is spread over its own stage, and all copies sum their gradients."""
    stages = {"cluster": {"pipeline_model_parallel_size": 2}}
    both = job_of(world=8, memory_layers=[3, 20], **stages)
    one = job_of(world=8, memory_layers=[3, 4], **stages)
    own = job_of(world=8, memory_layers=[3, 20], memory_pool="layer", **stages)
    wide = Layout("row", 4)
    costs = [layout_cost(job, wide) for job in (both, one, own)]
    assert [cost.replicas for cost in costs] == [2, 1, 1]
    assert [cost.replicas_per_step > 0 for cost in costs] == [True, False, False]
    # no rank holds more than with all layers on one stage
    assert costs[0].bytes.table == costs[1].bytes.table
    assert rank_share(both, wide).touched_by_step == rank_share(one, wide).touched_by_step


def test_pieces_hide_all_but_the_longest() -> None:
    """The links and the reads of a piece follow each other; of four, three hide the rest."""
    job, layout = job_of(world=16, memory_layers=[3]), Layout.of_grid(Grid(1, 2, 8, 1))
    one, four = (layout_cost(job.in_pieces(pieces), layout) for pieces in (1, 4))
    assert one.sent == four.sent and (one.pieces, four.pieces) == (1, 4)
    alone, cut = one.seconds["h100"], four.seconds["h100"]
    assert alone.hidden == 0 and alone.exchange == alone.inside + alone.across
    assert (cut.inside, cut.across) == (alone.inside, alone.across)
    hidden, read = 0.0, {"softmax, placement, marks", ROWS, SORT, ROW_GRADIENT}
    read |= {"partial sums", "partial sums, backward"}
    for phase in ("forward", "backward"):
        inside = getattr(four.sent, f"{phase}_inside") * TOKENS / 350e9
        across = getattr(four.sent, f"{phase}_across") * TOKENS / 45e9
        work = sum(s.seconds for s in cut.stages if s.phase == phase and s.name in read)
        hidden += (inside + across + work - max(inside, across, work)) * 3 / 4
    assert cut.hidden == pytest.approx(hidden)
    # each further piece is sorted and launched
    assert cut.lookup - alone.lookup == pytest.approx(3 * (0.21e-3 + 0.1e-3))


def test_routing_is_priced_where_lookups_are_routed() -> None:
    def found(grid: Grid, wire: str = "alltoall") -> dict[str, float]:
        job = job_of(world=64, memory_wire=wire)
        stages = layout_cost(job, Layout.of_grid(grid)).seconds["h100"].stages
        return {stage.name: stage.seconds for stage in stages}

    lookups = TOKENS * LOOKUPS
    routed = found(Grid(1, 8, 8, 1))
    source = 0.21e-3 + lookups * (0.063e-9 + 200 / 3e12)
    assert routed["routing: lookups by owner"] == pytest.approx(source)
    assert routed["routing: the host waits"] == 0.25e-3
    # the lookups of eight ranks are sorted, and not those of 64
    assert routed[SORT] == pytest.approx(0.21e-3 + 8 * lookups * 0.063e-9)
    assert found(Grid(1, 8, 8, 1), "allgather")[SORT] > 6 * routed[SORT]
    # where rows are divided twice, lookups are put in the order of nodes
    twice = found(Grid(2, 4, 4, 2))["routing: lookups by owner"]
    assert twice == pytest.approx(source + lookups * 24 / 3e12)
    for grid, wire in ((Grid(1, 8, 1, 8), "alltoall"), (Grid(1, 8, 8, 1), "allgather")):
        assert not {name for name in found(grid, wire) if name.startswith("routing")}


def test_narrow_slices_are_read_as_128_bytes() -> None:
    """Slices of 32 numbers are 64 bytes wide, so twice as many bytes are read."""
    job = job_of(world=32)
    seconds = {}
    for ranks in (16, 32):
        grid = Grid(32 // ranks, 1, 1, ranks)
        stages = layout_cost(job, Layout.of_grid(grid)).seconds["h100"].stages
        seconds[ranks] = sum(stage.seconds for stage in stages if stage.name == ROWS)
    assert seconds[16] == seconds[32]
    narrow = layout_cost(job_of(world=64), Layout.of_grid(Grid(1, 8, 1, 8))).seconds["h100"].stages
    (rows,) = (stage.seconds for stage in narrow if stage.name == ROWS)
    assert rows / seconds[32] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(
    ("size", "inside", "across"),
    [
        # each replica sends a part of B bytes to the other nodes: B / 8, B / 4, and all of it
        pytest.param(1, 2 * 7 / 8, 2 / 8 * 3 / 4, id="eight on each of four nodes"),
        pytest.param(2, 2 * 3 / 4, 2 / 4 * 3 / 4, id="four on each of four nodes"),
        pytest.param(8, 0, 2 * 3 / 4, id="one on each of four nodes"),
        pytest.param(16, 0, 2 * 1 / 2, id="two, of two nodes each"),
        pytest.param(32, 0, 0, id="one"),
    ],
)
def test_replicas_send_inside_nodes_and_across(size: int, inside: float, across: float) -> None:
    job = job_of(world=32, memory_layers=[3], memory_reduce_rows="all")
    layout = Layout("row", size)
    cost, share = layout_cost(job, layout), rank_share(job, layout)
    held = share.rows * (share.by_row * job.state.gradient + 1)
    assert cost.replicas_inside == pytest.approx(inside * held)
    assert cost.replicas_across == pytest.approx(across * held)
    h100 = HARDWARE["h100"]
    times = inside * held / h100.link, across * held / h100.network
    assert cost.seconds["h100"].replicas == pytest.approx(max(times))


def test_buffers_of_one_layer() -> None:
    """Bytes saved for 8192 tokens, computed by hand; per token 128 lookups and 2048 numbers."""
    job = job_of(world=8, memory_layers=[3])
    lookups, width = TOKENS * LOOKUPS, TOKENS * WIDTH * 2
    # input, queries (4 heads of 1024), read-out, gate twice, product; ids, weights; bag offsets
    kept = 7 * width + lookups * (12 + 4) + 8 * TOKENS
    assert kept_bytes(job, Layout("row", 1, 1)) == kept
    # at fixed sizes every rank holds the lookups of all ranks, with their weights
    assert kept_bytes(job, Layout("row", 8, 1)) == kept + lookups * (7 * 8 + 4) + 7 * 8 * TOKENS
    assert kept_bytes(job, Layout("column", 8, 8)) == kept_bytes(job, Layout("row", 8, 1))
    # alltoall sends lookups only to the owners of their rows, and saves the order of the results
    exact = job_of(world=8, memory_layers=[3], memory_wire="alltoall")
    ours = kept_bytes(exact, Layout("row", 8, 1))
    assert ours == kept + lookups * (4 + 4) + 7 * 8 * TOKENS


def test_temporary_peak_of_one_exchange() -> None:
    """In backward: gradients of read-out and gate, of the sums of 8 ranks, sorted lookups, and the
    projection's input and gradient, which wait until the read-outs' gradients have left."""
    job, arrived = job_of(world=8), 8 * TOKENS * LOOKUPS
    sums = 8 * TOKENS * WIDTH * 2
    partials = arrived / 512 * 2 * WIDTH * 4
    peak = 4 * TOKENS * WIDTH * 2 + sums + arrived * (24 + 4 * 8) + partials
    assert passing_bytes(job, Layout("row", 8, 1)) == peak
    # of four pieces one is sorted at a time, in chunks of 256, and the sums of two are held
    piece = arrived / 4
    cut = 4 * TOKENS * WIDTH * 2 + sums / 2 + piece * (24 + 4 * 8) + piece / 256 * 2 * WIDTH * 4
    assert passing_bytes(job.in_pieces(4), Layout("row", 8, 1)) == cut
    assert lookup_buffers(job, Layout("row", 8, 1)) == peak + 3 * kept_bytes(
        job, Layout("row", 8, 1)
    )


def test_buffers_of_two_nodes() -> None:
    """Columns between two nodes, rows inside: bags are brought into the order of the sources."""
    job, layout = job_of(world=16), Layout.of_grid(Grid(1, 2, 8, 1))
    assert layout_wire(job, layout) == "alltoall"
    lookups, half = TOKENS * LOOKUPS, WIDTH // 2
    bags, sums = 16 * TOKENS * half * 2, 2 * TOKENS * half * (4 + 2)
    # the backward holds the gradient of the bags, and the lookups of two ranks sorted
    partials = 2 * lookups / 512 * 2 * half * 4
    back = 4 * TOKENS * WIDTH * 2 + bags + 2 * lookups * (24 + 4 * 4) + partials
    assert passing_bytes(job, layout) == max(3 * bags + sums, back)
    # of four pieces, the sums of two are held, and one is sorted
    four = job.in_pieces(4)
    assert passing_bytes(four, layout) == (3 * bags + sums) / 2
    assert kept_bytes(four, layout) == kept_bytes(job, layout)
    # ids and weights of two ranks' lookups, and the order of the rank's own
    one = kept_bytes(job, Layout())
    assert kept_bytes(job, layout) == one + lookups * (2 * 8 - 4 + 4) + 15 * 8 * TOKENS


def test_scores_are_computed_in_chunks_of_tokens() -> None:
    """With 16384 sub-keys 128 tokens have 64 MB of scores; the sub-keys are copied, too."""
    job = job_of(num_keys=16384, world=8)
    copied = 4 * 16384 * 1024 * 2
    assert scored_bytes(job) == 2**26 + 128 * 4 * 2 * 64 * 8 + copied
    # with few tokens the scores are the largest part
    job = job_of(num_keys=16384, world=8, cluster={"micro_batch_size": 1})
    assert passing_bytes(job, Layout("row", 1, 1)) == scored_bytes(job)


def test_buffers_shrink_with_the_columns() -> None:
    job = job_of(world=8)
    row, column = (passing_bytes(job, Layout(*of)) for of in (("row", 8, 1), ("column", 8, 8)))
    # an eighth of each sum, of the blocks of the weights' gradients, and of the partial rows
    arrived = 8 * TOKENS * LOOKUPS
    partials = arrived / 512 * 2 * 4 * (WIDTH - WIDTH / 8)
    assert row - column == 7 * TOKENS * WIDTH * 2 + arrived * 4 * 7 + partials


class _Kernel:
    """Records the arguments of its launches and does nothing else."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append(arguments)


@pytest.mark.parametrize("width", [8, 384, 1000, 1024])
@pytest.mark.parametrize("lookups", [1, 1000, 32 * 8192 + 1, 100 * 8192, 2**23])
def test_sorted_lookups_take_what_the_backward_allocates(lookups, width, monkeypatch) -> None:
    """Tensors are on the meta device, and no kernel is launched."""
    row_ids = torch.empty(lookups, dtype=torch.int64, device="meta")
    weights = torch.empty(lookups, device="meta")
    offsets = torch.empty(2, dtype=torch.int64, device="meta")
    table = torch.empty(2**20, width, device="meta")
    kernels = {name: _Kernel() for name in ("_row_pass_kernel", "_merge_kernel", "_unsort_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(row_gradient, name, kernel)
    ordered = sort_by_torch(row_ids, weights, offsets, len(table))
    weight_grad = row_gradient.row_gradient(ordered, table[:1], table, table)
    ((*_, partials, dots),) = kernels["_row_pass_kernel"].launches
    held = [ordered.rows_M, ordered.order_M, ordered.bags_M, ordered.weights_M]
    held += [weight_grad, partials, dots]
    assert sum(x.nbytes for x in held) == sorted_bytes(lookups, width, weights=True)


@pytest.mark.parametrize(("num_keys", "topk"), [(512, 1), (512, 12), (8192, 32), (16384, 100)])
def test_scores_take_what_the_search_allocates(num_keys, topk, monkeypatch) -> None:
    """Tensors are on the meta device, and no kernel is launched."""
    job = job_of(num_keys=num_keys, world=8, memory_topk=topk)
    spec = job.spec
    query = torch.empty(TOKENS, spec.heads, spec.key_dim, dtype=torch.bfloat16, device="meta")
    sub_keys = query.new_empty(2, spec.heads, num_keys, spec.key_dim // 2)
    monkeypatch.setattr(product_topk, "_two_looks_kernel", kernel := _Kernel())
    product_topk.product_topk(query, sub_keys, topk)
    scores, _, candidates, *_ = kernel.launches[0]
    # the kernel's copy of the sub-keys is as large as they are
    assert scores.nbytes + candidates.nbytes + sub_keys.nbytes == scored_bytes(job)
