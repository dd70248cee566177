"""The time of memory layers, stage by stage, from what the stages took on an H100.

A stage is the work of one op: bytes that go through memory, bytes that are read again and again
from the cache, lookups, FLOPs, launches. RATES says how fast an H100 did such work, and which
record under tests/bench/results holds the measurement; tests/planner/test_stages.py compares the
two. Rates of memory and cache are shares of the copy rate, so that other GPUs are estimated by
their copy rates. The forms of ops are those that are the default. Rows are assumed to be read at
random, uniformly, which is the slowest case, as reads of frequent rows hit the cache.
"""

from dataclasses import astuple, dataclass
from typing import Literal

from megamem.layers.variants import variant_of
from megamem.parallel import exchange_cost
from megamem.parallel.exchange_cost import HOST_WAIT, PIECE_SECONDS, home_work
from megamem.parallel.traffic import (
    NARROWEST_SLICE_BYTES,
    expected_unique,
    forward_bytes,
    widest_slice,
)
from megamem.planner.buffers import arrived_lookups
from megamem.planner.hardware import HARDWARE, Hardware
from megamem.planner.job import Job, Layout, layout_wire
from megamem.planner.states import TableState

STAGES_RECORD = "h100-a4677c2-stages.json"
BENCH_RECORD = "h100-a4677c2.jsonl"

# what is gathered again and again fits in the cache up to about this size, half of an H100's
CACHE_BYTES = 25e6
# the columns of a bag's gradient that programs of one moment read; see kernels/row_gradient.py
GATHERED_COLUMNS = 256
# the most rows of a head for which product_topk takes the form two_looks
TWO_LOOKS_TOPK = 64

# estimates: bytes to sort a lookup of Tucker scores by block and to bring it there, beside its
# weights; and those of a pair and core in the backward of the scores
BLOCK_SORT_BYTES, PAIR_BYTES = 60, 16

Phase = Literal["forward", "backward", "step"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage does in one pass; for stages of a step, in one step."""

    moved: float = 0.0
    """Bytes read from and written to memory."""
    cached: float = 0.0
    """Bytes that are gathered again and again, from something that fits in the cache."""
    gathered: float = 0.0
    """The same, where it does not fit."""
    lookups: float = 0.0
    """Lookups, where their number matters and not their bytes."""
    flops: float = 0.0
    """Matrix FLOPs."""
    launches: int = 0
    """How often the op is called."""

    def __add__(self, other: "Work") -> "Work":
        """The work of both."""
        names = self.__dataclass_fields__
        sums = (a + b for a, b in zip(astuple(self), astuple(other), strict=True))
        return Work(**dict(zip(names, sums, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast an H100 does the work of a stage."""

    phase: Phase
    moved: float = 1.0
    """Share of the copy rate."""
    cached: float = 1.67
    """Bytes from the cache, relative to the copy rate."""
    gathered: float = 0.63
    """Bytes gathered from memory, relative to the copy rate."""
    flops: float = 1.0
    """Share of the rate of large matrix multiplications."""
    per_lookup: float = 0.0
    """Seconds."""
    per_launch: float = 0.0
    """Seconds, on any GPU."""
    record: str = ""
    """The file with the measurement; empty if there is none, so that bytes alone are counted."""

    def seconds(self, work: Work, hardware: Hardware) -> float:
        """Return the seconds that the work takes on a GPU."""
        copy = hardware.copy
        seconds = work.moved / (self.moved * copy) + work.cached / (self.cached * copy)
        seconds += work.gathered / (self.gathered * copy)
        seconds += work.flops / (self.flops * hardware.flops)
        # indices go through memory, too
        seconds += work.lookups * self.per_lookup * HARDWARE["h100"].copy / copy
        return seconds + work.launches * self.per_launch


TOPK, TOPK_TORCH = "product keys: top-k", "product keys: top-k (form torch)"
TUCKER, PAIRS = "Tucker scores: sub-keys", "Tucker scores: pairs"
TUCKER_BACK = "Tucker scores, backward"
INDEX, ROWS, DOTS = "softmax, placement, marks", "rows: bags", "rows: dot products"
SUMS, GATE, GATE_BACK = "partial sums", "gate", "gate, backward"
SUMS_BACK, ROUTE = "partial sums, backward", "routing: lookups by owner"
WAIT, PIECES = "routing: the host waits", "further pieces"
TOPK_BACK, SORT, ROW_GRADIENT = "product keys, backward", "sort of the lookups", "row gradient"
NORM, UPDATE = "gradient norm", "update"

# what the pieces of a pass do one after the other, beside the exchange of other pieces
PIECED = (INDEX, ROWS, DOTS, SUMS, SUMS_BACK, SORT, ROW_GRADIENT)

RATES = {
    # 0.22 ms for the sorts and pairs of a million lookups, scores through memory, and their GEMM:
    # 0.25 ms at N = 128, 1.48 at 4096, 5.1 at 16384
    TOPK: Rate(phase="forward", moved=0.89, flops=0.435, per_lookup=0.21e-9, record=STAGES_RECORD),
    TOPK_TORCH: Rate(
        phase="forward", moved=0.33, flops=0.435, per_lookup=1.3e-9, record=STAGES_RECORD
    ),
    # estimates: as for one rank of sub-keys; and about 80 operations of a thread for each of
    # the K * K pairs, whose scores are formed four times in registers
    TUCKER: Rate(phase="forward", moved=0.89, flops=0.435, per_lookup=0.21e-9),
    PAIRS: Rate(phase="forward", per_lookup=0.003e-9),
    # the marks of touched rows took 0.24 ms for 8.4 million lookups; the rest was not measured
    INDEX: Rate(phase="forward", per_lookup=exchange_cost.MARK_LOOKUP),
    # a sort as that of the backward; the bytes are an estimate, and so is the wait
    ROUTE: Rate(
        phase="forward",
        per_launch=exchange_cost.SORT_LAUNCH,
        per_lookup=exchange_cost.SORT_LOOKUP,
    ),
    WAIT: Rate(phase="forward", per_launch=HOST_WAIT),
    ROWS: Rate(phase="forward", moved=0.98, record=BENCH_RECORD),
    # 1.08 ms for the gradients of the weights alone, which are the same dot products
    DOTS: Rate(phase="forward", moved=0.83),
    SUMS: Rate(phase="forward"),
    PIECES: Rate(phase="forward", per_launch=PIECE_SECONDS),
    GATE: Rate(phase="forward"),
    GATE_BACK: Rate(phase="backward"),
    SUMS_BACK: Rate(phase="backward"),
    # two gathers of sub-keys, or of queries, and a sort with keys of 16 bits
    TOPK_BACK: Rate(phase="backward", cached=1.4, per_lookup=0.072e-9, record=STAGES_RECORD),
    TUCKER_BACK: Rate(phase="backward", cached=1.4, per_lookup=0.072e-9),
    # 0.28 ms for 1.05 million lookups, 0.74 for 8.4 million
    SORT: Rate(
        phase="backward",
        per_launch=exchange_cost.SORT_LAUNCH,
        per_lookup=exchange_cost.SORT_LOOKUP,
        record=STAGES_RECORD,
    ),
    ROW_GRADIENT: Rate(phase="backward", record=STAGES_RECORD),
    # torch makes an fp64 copy
    NORM: Rate(phase="step", moved=0.82, record=STAGES_RECORD),
    UPDATE: Rate(phase="step", moved=0.98, record=BENCH_RECORD),
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a plan."""

    name: str
    phase: Phase
    seconds: float
    """Seconds of one pass through one memory layer; for stages of a step, of one step."""
    calls: int
    """Passes of a step: memory layers times microbatches; 1 for stages of a step."""
    record: str
    """The file with the H100's measurement; empty if there is none."""

    @property
    def per_step(self) -> float:
        """Seconds of a step."""
        return self.seconds * self.calls


@dataclass(frozen=True)
class Share:
    """The part of the tables and of the lookups that one rank has; counts are expected values."""

    pools: int
    rows: int
    """Rows of each table on the rank that holds most."""
    widths: tuple[int, ...]
    """Numbers per row of each table of a pool on that rank; the values come first."""
    picks: float
    """Lookups that the rank receives for one layer in one microbatch."""
    calls: int
    """Memory layers times microbatches."""
    touched: float
    """Rows of one table that one layer reads in one microbatch."""
    touched_by_step: float
    """Rows of one table that all layers, microbatches and replicas read in a step."""

    @property
    def tables(self) -> int:
        return self.pools * len(self.widths)

    @property
    def by_row(self) -> int:
        """Numbers of all tables for one row id."""
        return self.pools * sum(self.widths)

    @property
    def numbers(self) -> int:
        return self.by_row * self.rows


def rank_share(job: Job, layout: Layout) -> Share:
    """The share of one rank of the pipeline stage with the most memory layers."""
    spec, microbatches = job.spec, job.cluster.microbatches
    layers, own_tables = max(job.stage_memories), spec.pool == "layer"
    variant = variant_of(spec)
    rows = -(-spec.num_rows // layout.row_ranks)
    picks = spec.lookups_per_token * job.microbatch_tokens * layout.column_ranks
    # layers of all stages read a shared table
    readers = spec.share_layers if own_tables else len(spec.layers)
    readers *= job.cluster.stage_ranks // layout.group_size
    return Share(
        pools=max(1, *job.stage_pools),
        rows=rows,
        widths=tuple(
            widest_slice(variant.table_width(spec, use), layout.column_ranks)
            for use in variant.tables
        ),
        picks=picks,
        calls=layers * microbatches,
        touched=expected_unique(rows, picks),
        touched_by_step=expected_unique(rows, picks * readers * microbatches),
    )


def backward_bytes(
    touched: float, width: float, state: TableState, *, e: int = 2, adds: bool = True
) -> float:
    """Bytes that the sorted backward reads and writes: each touched row once, and its gradient.

    Args:
        touched: number of touched rows.
        width: numbers per row.
        state: bytes per parameter.
        e: bytes per number of a row; 0 where rows are not read.
        adds: the gradient is added to a buffer (read and written) instead of returned (written).
    """
    return touched * width * (e + state.gradient * (2 if adds else 1))


def stages(job: Job, layout: Layout, share: Share, hardware: Hardware) -> list[Stage]:
    """Return the stages of a plan in the order in which they run."""
    works = {**_layer_works(job, layout, share), **_step_works(job, share)}
    return [
        Stage(
            name=name,
            phase=rate.phase,
            seconds=rate.seconds(works[name], hardware),
            calls=1 if rate.phase == "step" else share.calls,
            record=rate.record,
        )
        for name, rate in RATES.items()
        if works.get(name, Work()) != Work()
    ]


def _layer_works(job: Job, layout: Layout, share: Share) -> dict[str, Work]:
    """The work of one pass of a microbatch through one memory layer."""
    spec, tokens, e = job.spec, job.microbatch_tokens, job.number_bytes
    variant = variant_of(spec)
    lookups, arrived = spec.lookups_per_token * tokens, arrived_lookups(job, layout)
    grid, wire = layout.grid, layout_wire(job, layout)
    routed = grid.routes(wire)
    fixed_sizes = grid.row_ranks > 1 and not routed

    # softmax in fp32; ids are placed as int32. At fixed sizes ids of other ranks' rows are found
    index = Work(moved=20 * lookups + (32 * arrived if fixed_sizes else 0), lookups=arrived)
    if spec.bags_per_token > 1:
        # lookups are sorted by block
        index += Work(moved=(BLOCK_SORT_BYTES + 8 * spec.cores) * lookups)
    # of the sums, a microbatch's own are counted with the bags that are written
    home, bags = home_work(grid, wire), spec.bags_per_token
    own = bags * tokens * layout.column_ranks * share.widths[0]
    sums = Work(moved=own * ((home.largest - 1) * e + home.forward_bytes(e)))
    sums_back = Work(moved=own * home.backward_bytes(e))
    if variant.reads_tokens:
        # where tokens are sent to the rows, the gradients of the tokens are summed, too
        sent = tokens * (job.exchange.token_width or spec.value_dim)
        sums_back += Work(moved=sent * ((home.largest - 1) * e + home.forward_bytes(e)))
    route, wait = Work(), Work()
    if routed:
        moved = exchange_cost.routed_bytes(grid, job.exchange)
        route = Work(moved=moved * lookups, lookups=lookups, launches=1)
        wait = Work(launches=1)

    gate = variant.kept_widths if variant.gradient_widths > 1 else 0
    sort = Work(lookups=arrived, launches=spec.pieces)
    found = {
        **_score_works(job),
        INDEX: index,
        GATE: Work(moved=gate * tokens * spec.value_dim * e),
        GATE_BACK: Work(moved=2 * gate * tokens * spec.value_dim * e),
        SUMS: sums,
        SUMS_BACK: sums_back,
        ROUTE: route,
        WAIT: wait,
        PIECES: Work(launches=spec.pieces - 1),
        **dict.fromkeys((ROWS, DOTS, SORT, ROW_GRADIENT), Work()),
    }
    for use, width in zip(variant.tables, share.widths, strict=True):
        # the sums of bags are written, and their gradients gathered; or tokens are
        of_token = bags if use.read == "bag" else 1
        whole = variant.table_width(spec, use)
        read = Work(moved=forward_bytes(whole, spec.lookups_per_token, tokens, e=e))
        read += Work(moved=(of_token - 1) * tokens * whole * e)
        if (slice_bytes := width * e) < NARROWEST_SLICE_BYTES:
            # memory is read in larger parts than the slice of a row
            read += Work(moved=share.picks * (NARROWEST_SLICE_BYTES - slice_bytes))
        if fixed_sizes:
            # lookups of other ranks' rows are left out first
            read += Work(moved=8 * arrived)
        if spec.cores > 1 and use.read == "bag":
            # the other weights of a lookup
            read += Work(moved=4 * (spec.cores - 1) * share.picks)
        found[ROWS] += read
        found[SORT] += sort
        if use.read == "dot":
            # rows are read, in their order, for the products, and as bags for the gradients of the
            # tokens; the gradient of a row needs only the tokens
            found[SORT] += sort
            found[DOTS] += Work(moved=share.touched * width * e)
        gathered = of_token * tokens * layout.group_size * min(GATHERED_COLUMNS, width) * e
        row_bytes = e if use.read == "bag" else 0
        found[ROW_GRADIENT] += _gathers(share.picks * width * e, gathered) + Work(
            moved=backward_bytes(share.touched, width, job.state, e=row_bytes)
        )
    return found


def _score_works(job: Job) -> dict[str, Work]:
    """The work of choosing rows, and of the gradients of queries and sub-keys."""
    spec, e = job.spec, job.number_bytes
    half, reads, ranks = spec.key_dim // 2, spec.heads * job.microbatch_tokens, spec.tucker_rank
    sets = spec.heads * max(1, ranks)
    scores = 2 * sets * job.microbatch_tokens * spec.keys_per_side
    kept = reads * spec.topk
    forward = Work(moved=8 * scores, flops=2 * half * scores, lookups=kept)
    # the gradients of queries gather sub-keys, those of sub-keys gather queries
    sub_keys = 2 * sets * spec.keys_per_side * half * e
    gathered = kept * max(1, ranks)
    backward = _gathers(2 * 2 * gathered * half * e, sub_keys) + Work(lookups=2 * gathered)
    if ranks:
        chosen = Work(lookups=reads * spec.topk**2)
        # the gradients of the weights of each core become those of rows and columns
        chosen_back = Work(moved=PAIR_BYTES * spec.cores * reads * spec.final_topk)
        return {TUCKER: forward, PAIRS: chosen, TUCKER_BACK: backward + chosen_back}
    two_looks = job.cluster.half_precision and spec.topk <= TWO_LOOKS_TOPK
    return {(TOPK if two_looks else TOPK_TORCH): forward, TOPK_BACK: backward}


def _step_works(job: Job, share: Share) -> dict[str, Work]:
    """The work of one step on the tables of a rank."""
    state, by_row = job.state, share.by_row
    moved = state.moved_by_step - state.gradient
    if state.touched_only:
        # gradients are copied out of the buffer and cleared in it, then read
        updated = share.touched_by_step * (moved + 4 * state.gradient)
    else:
        # gradients of touched rows alone are read, and cleared
        updated = share.rows * moved + 2 * share.touched_by_step * state.gradient
    # the fp64 copy is written and read
    norm = share.rows * (state.gradient + 2 * 8)
    return {NORM: Work(moved=by_row * norm), UPDATE: Work(moved=by_row * updated)}


def _gathers(amount: float, source: float) -> Work:
    """The work of gathering this many bytes from something that has `source` bytes."""
    return Work(cached=amount) if source <= CACHE_BYTES else Work(gathered=amount)
