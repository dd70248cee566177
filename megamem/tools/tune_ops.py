"""The ops that `megamem tune` measures: sizes, candidates, known answers, and the calls it times.

A candidate changes numbers of megamem.kernels.choices, or the form of an op, or both. The known
answers have the sizes of the run, so that they test the very kernels that are timed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megamem import ops
from megamem.config import MemoryConfig
from megamem.layers.memory_pool import MemoryPool
from megamem.ops.forms import FORMS
from megamem.ops.tuning import OPS, Choices
from megamem.optimizer import StepOptions, TableOptimizer
from megamem.parallel.traffic import widest_slice
from megamem.planner.job import Job, layout_wire
from megamem.resolution import resolve
from megamem.tools import known_reads as reads
from megamem.tools import known_steps as steps
from megamem.tools.bench_cases import draw_rows
from megamem.tools.known_answers import KnownAnswer
from megamem.tools.known_steps import Form

DISTRIBUTIONS = ("uniform", "zipf 1.0")
"""How the timed lookups are distributed over rows; those of a trained model are skewed."""
BF16 = torch.bfloat16
STATE_BYTES = 30
"""Bytes per number of a table with all that a step of its optimizer holds."""
CHECKED_TOKENS, CHECKED_ROWS = 1024, 2**16
"""The most tokens and rows of a known answer."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What one rank of a run computes."""

    tokens: int
    """Tokens of a microbatch for which the rank makes lookups."""
    heads: int
    topk: int
    num_keys: int
    key_dim: int
    """Width of a head's query."""
    value_dim: int
    """Width of the rows on this rank."""
    rows: int
    """Rows on this rank."""
    bags: int
    """Bags of a microbatch that this rank sums."""
    lookups: int
    """Lookups of a bag that this rank receives."""
    senders: int
    """One lookup in so many reads a row of this rank; the others read none."""
    readers: int
    """Layers on this rank that read one table."""
    optimizer: str
    stochastic_rounding: bool
    dtype: str = "bfloat16"
    tucker_rank: int = 0
    """Numbers per sub-key of Tucker scores; 0 where scores are sums, which product_topk finds."""

    @classmethod
    def of(cls, job: Job) -> "Sizes":
        """The sizes of a job with the layout that its flags select."""
        spec, layout = job.spec, job.spec.layout
        tokens = max(1, math.ceil(job.microbatch_tokens))
        # a token has a bag for each virtual block
        blocks, senders = spec.bags_per_token, layout.row_ranks
        lookups = max(1, spec.lookups_per_token // blocks)
        if layout_wire(job, layout) == "alltoall":
            # only the lookups of its rows arrive
            lookups, senders = max(1, lookups // senders), 1
        return cls(
            tokens=tokens,
            heads=spec.heads,
            topk=spec.topk,
            num_keys=spec.keys_per_side,
            key_dim=spec.key_dim,
            value_dim=widest_slice(spec.value_dim, layout.column_ranks),
            rows=math.ceil(spec.num_rows / layout.row_ranks),
            bags=tokens * layout.group_size * blocks,
            lookups=lookups,
            senders=senders,
            readers=max(job.stage_memories) if spec.pool == "shared" else spec.share_layers,
            optimizer=spec.optimizer,
            stochastic_rounding=spec.stochastic_rounding,
            tucker_rank=spec.tucker_rank,
        )

    def that_fit(self, memory: float) -> "Sizes":
        """The same with as many rows and bags as fit into so many bytes."""
        rows = min(self.rows, int(0.7 * memory / (STATE_BYTES * self.value_dim)))
        bags = min(self.bags, int(0.1 * memory / (16 * self.value_dim * self.readers)))
        # the table of an optimizer has a square number of rows
        return replace(self, rows=max(16, math.isqrt(rows) ** 2), bags=max(1, bags))

    def of_interpreter(self) -> "Sizes":
        """Sizes that take Triton's interpreter less than a second."""
        return replace(
            self,
            tokens=min(8, self.tokens),
            heads=min(2, self.heads),
            topk=min(8, self.topk),
            num_keys=min(16, self.num_keys),
            key_dim=min(16, self.key_dim),
            value_dim=min(32, self.value_dim),
            rows=min(256, math.isqrt(self.rows) ** 2),
            bags=min(8, self.bags),
            lookups=min(16, self.lookups),
            readers=min(2, self.readers),
        )


@dataclass(frozen=True)
class Candidate:
    """Numbers and form of an op."""

    op: str
    form: str
    numbers: Mapping[str, int]
    """Those that differ from the choices for this card."""

    @property
    def name(self) -> str:
        """A short text, such as "triton tile=512"."""
        return " ".join((self.form, *(f"{name}={n}" for name, n in self.numbers.items())))

    def choose(self, among: Choices) -> Choices:
        """Choices with those of the candidate in place of others."""
        # a default form need not be chosen, and gives way where megamem.ops.forms says so
        default = next(iter(FORMS[self.op]))
        return among.changed(
            self.op, form=None if self.form == default else self.form, **self.numbers
        )


@dataclass(frozen=True)
class TunedOp:
    """An op, its candidates, its known answers and its timed calls."""

    name: str
    numbers: Callable[[Sizes], Mapping[str, list[Mapping[str, int]]]]
    """Form -> the numbers to try beside the present ones; forms that are not named are not tried.
    """
    answers: Callable[[Sizes, str], list[KnownAnswer]]
    """Those that a form has to give, and that do not depend on other forms."""
    runs: Callable[[Sizes, torch.device], Iterator[tuple[str, Run]]]
    """Makes the inputs of the timed calls, one call after the other; a candidate's time is their
    mean."""

    def candidates(self, sizes: Sizes, present: Choices) -> list[Candidate]:
        """The default, which is the first, and what may be faster than with the present choices."""
        tried, found = self.numbers(sizes), []
        kept = vars(getattr(present, self.name)) if self.name in OPS else {}
        for form in FORMS[self.name]:
            for numbers in ({}, *tried[form]) if form in tried else ():
                changed = {name: n for name, n in numbers.items() if n != kept[name]}
                candidate = Candidate(self.name, form, changed)
                if candidate not in found:
                    found.append(candidate)
        return found


def _answer(
    op: str, look: Callable[..., str | None], sizes: Mapping[str, Any], needs: float
) -> KnownAnswer:
    def checked(device: torch.device, scale: int) -> str | None:
        # the scale is that of a process that only compiles the kernels
        divided = {n: x // scale // 16 * 16 for n, x in sizes.items() if n in ("tokens", "rows")}
        few = {n: max(min(16, sizes[n]), x) for n, x in divided.items()}
        return look(device, **{**sizes, **(few if scale > 1 else {})})

    return KnownAnswer(look.__name__.replace("_", " "), op, checked, lambda scale: needs / scale)


# product_topk -------------------------------------------------------------------------------------


def _topk_sizes(sizes: Sizes) -> dict[str, Any]:
    return {
        "tokens": min(sizes.tokens, CHECKED_TOKENS),
        "heads": sizes.heads,
        "num_keys": sizes.num_keys,
        "key_dim": sizes.key_dim // 2,
        "topk": sizes.topk,
    }


def _topk_answers(sizes: Sizes, form: str) -> list[KnownAnswer]:
    given = _topk_sizes(sizes)
    needs = 3e9 + 60 * sizes.heads * sizes.num_keys * sizes.key_dim
    looks = [reads.topk_is_exact, reads.topk_is_within_rounding, reads.topk_breaks_ties]
    # the answer with a NaN looks at a head beside the one that has it
    looks += [reads.topk_shows_nan] if sizes.heads > 1 else []
    return [_answer("product_topk", look, given, needs) for look in looks]


def _queries(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    query = torch.randn(sizes.tokens, sizes.heads, sizes.key_dim, device=device).to(BF16)
    shape = (2, sizes.heads, sizes.num_keys, sizes.key_dim // 2)
    return query, torch.randn(shape, device=device).to(BF16)


def _topk_numbers(sizes: Sizes) -> dict[str, list[Mapping[str, int]]]:
    if sizes.tucker_rank:
        return {}
    numbers: dict[str, list[Mapping[str, int]]] = {
        "two_looks": [{"tile": 256}, {"tile": 1024}, {"score_bytes": 2**28}],
        "fused": [
            # two programs of 64 tokens on a multiprocessor
            {"fused_tile": 2**13, "fused_warps": 4},
            {"fused_stages": 2},
            {"fused_block_c": 32, "fused_stages": 4},
            {"fused_full_look": 1024},
            {"fused_full_look": 4096},
        ],
    }
    return {form: numbers.get(form, []) for form in FORMS["product_topk"]}


def _topk_backward_numbers(sizes: Sizes) -> dict[str, list[Mapping[str, int]]]:
    if sizes.tucker_rank:
        return {}
    numbers: list[Mapping[str, int]] = [
        {"tile": 256},
        {"tile": 1024, "num_warps": 8},
        {"dense_bytes": 2**28},
    ]
    return {"bags": [], "dense": numbers}


def _topk_backward_answers(sizes: Sizes, form: str) -> list[KnownAnswer]:
    given = _topk_sizes(sizes)
    needs = 3e9 + 60 * sizes.heads * sizes.num_keys * sizes.key_dim
    return [_answer("product_topk_backward", reads.topk_has_gradients, given, needs)]


def _topk_backward_runs(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Run]]:
    query, sub_keys = leaves = tuple(x.requires_grad_() for x in _queries(sizes, device))
    scores, _ = ops.product_topk(query, sub_keys, sizes.topk)
    grad = torch.randn(scores.shape, device=device)
    yield "backward", lambda: torch.autograd.grad(scores, leaves, grad, retain_graph=True)


def _topk_runs(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Run]]:
    query, sub_keys = _queries(sizes, device)
    yield "forward", lambda: ops.product_topk(query, sub_keys, sizes.topk)


# embedding_bag and its backward -------------------------------------------------------------------


def _read_sizes(sizes: Sizes) -> dict[str, int]:
    return {
        "tokens": min(sizes.bags, CHECKED_TOKENS),
        "lookups": sizes.lookups,
        "rows": min(sizes.rows, CHECKED_ROWS),
        "width": sizes.value_dim,
    }


def _read_answers(
    op: str, looks: Mapping[str, list[Callable[..., str | None]]], sizes: Sizes, form: str
) -> list[KnownAnswer]:
    given = _read_sizes(sizes)
    needs = 24 * given["rows"] * given["width"] + 24 * reads.CHUNK
    return [_answer(op, look, given, needs) for look in looks[form]]


@dataclass(frozen=True)
class _Batch:
    """Lookups of a batch."""

    row_ids: Tensor
    weights: Tensor
    offsets: Tensor

    @classmethod
    def drawn(
        cls, sizes: Sizes, distribution: str, device: torch.device, layer: int = 0
    ) -> "_Batch":
        count = sizes.bags * sizes.lookups
        rows = draw_rows(count, sizes.rows, distribution, device)
        # the rows that are popular in one layer are not in another
        rows = ((rows + layer * sizes.rows // sizes.readers) % sizes.rows).int()
        if sizes.senders > 1:
            rows = rows.where(torch.randint(sizes.senders, (count,), device=device) == 0, -1)
        offsets = torch.arange(0, count + 1, sizes.lookups, device=device)
        return cls(rows, torch.rand(count, device=device), offsets)

    @property
    def lookups(self) -> tuple[Tensor, Tensor, Tensor]:
        """The lookups as arguments of an op."""
        return self.row_ids, self.weights, self.offsets


def _bag_numbers(sizes: Sizes) -> dict[str, list[Mapping[str, int]]]:
    blocks = [(256, 8), (512, 8), (1024, 4), (1024, 16), (2048, 8)]
    return {"triton": [{"max_block_v": block, "unroll": unroll} for block, unroll in blocks]}


def _known(sizes: Sizes) -> dict[str, Any]:
    """What training tells the ops about these lookups."""
    return {"check_row_ids": False, "known": ops.Known(sizes.senders > 1, equal_bags=True)}


def _bag_runs(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Run]]:
    table = torch.empty(sizes.rows, sizes.value_dim, dtype=BF16, device=device).normal_()
    for distribution in DISTRIBUTIONS:
        batch = _Batch.drawn(sizes, distribution, device)
        yield (
            f"forward, {distribution}",
            partial(ops.embedding_bag, table, *batch.lookups, **_known(sizes)),
        )


def _optimizer(sizes: Sizes, device: torch.device, kind: str | None = None) -> TableOptimizer:
    """An optimizer of one table; `kind` replaces that of the run."""
    config = MemoryConfig(
        memory_layers=[0],
        memory_num_keys=math.isqrt(sizes.rows),
        memory_topk=1,
        memory_optimizer=kind or sizes.optimizer,  # type: ignore[arg-type]
        memory_stochastic_rounding=sizes.stochastic_rounding,
    )
    spec = resolve(config, sizes.value_dim, seed=1)
    pool = MemoryPool(spec, "tune", device=device, dtype=BF16)
    for table in pool:
        table.readers = sizes.readers
    return TableOptimizer(pool, spec, StepOptions(), lr=1e-3, weight_decay=0.1)


def _gradient_runs(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Run]]:
    """The first microbatch of a step, in which no row has been touched before."""
    optimizer = _optimizer(sizes, device, "sgd")
    (table,), (gradient,) = optimizer.tables.values(), optimizer.gradients.values()
    grad = torch.randn(sizes.bags, sizes.value_dim, device=device).to(BF16)
    for distribution in DISTRIBUTIONS:
        passes = []
        for layer in range(sizes.readers):
            batch = _Batch.drawn(sizes, distribution, device, layer)
            leaf = batch.weights.requires_grad_()
            lookups, known = batch.lookups, _known(sizes)
            bags = ops.embedding_bag(
                table.weight.detach(), *lookups, **known, add_value_grad_to=gradient.rows
            )
            passes.append((bags, leaf))

        def backward(passes: list[tuple[Tensor, Tensor]] = passes) -> None:
            gradient.forget()
            for bags, leaf in passes:
                torch.autograd.grad(bags, leaf, grad, retain_graph=True)

        yield f"backward, {distribution}", backward


GRADIENTS = [reads.bag_gradients_are_exact, reads.sparse_gradients_are_exact]
"""Checks of the sort and of the sums over sorted lookups."""


def _gradient_numbers(sizes: Sizes) -> dict[str, list[Mapping[str, int]]]:
    names = ("max_block_v", "unroll", "max_chunk")
    tried = [(128, 4, 512), (128, 8, 512), (256, 8, 512), (512, 2, 512), (512, 4, 512)]
    tried += [(256, 4, 128), (512, 4, 128)]
    numbers = [dict(zip(names, each, strict=True)) for each in tried]
    # with one reader there is nothing to merge
    forms = [form for form in FORMS["row_gradient"] if form != "merged" or sizes.readers > 1]
    return {form: list(numbers) for form in forms}


def _sort_numbers(sizes: Sizes) -> dict[str, list[Mapping[str, int]]]:
    names = ("radix", "tile", "max_programs", "num_warps")
    tried = [(256, 2048, 512, 8), (2048, 2048, 512, 8), (1024, 1024, 512, 4), (1024, 1024, 1024, 4)]
    return {"torch": [], "radix": [dict(zip(names, each, strict=True)) for each in tried]}


# steps of the tables' optimizers ------------------------------------------------------------------


def _step_answers(sizes: Sizes, form: str) -> list[KnownAnswer]:
    state = Form(BF16) if sizes.stochastic_rounding else Form(copy=True)
    by_list = form == "list"
    dense, lazy = (
        steps.dense_step_is_right,
        steps.touched_step_is_right if by_list else steps.marked_step_is_right,
    )
    look, op, state = {
        "adamw": (dense, "adamw_", state),
        "rowwise_adamw": (dense, "rowwise_adamw_", replace(state, second="row")),
        "sgd": (dense, "sgd_", replace(state, first=False, second="")),
        "lazy_adamw": (lazy, "touched_adamw_", state),
    }[sizes.optimizer]
    given = _step_sizes(sizes)
    needs = 60 * given["rows"] * given["width"]
    return [_answer("row_adam", look, {**given, "op": op, "form": state}, needs)]


def _step_sizes(sizes: Sizes) -> dict[str, int]:
    rows = max(1, min(sizes.rows, CHECKED_ROWS) // steps.BLOCK) * steps.BLOCK
    return {"rows": rows, "width": sizes.value_dim}


def _step_numbers(sizes: Sizes) -> dict[str, list[Mapping[str, int]]]:
    tiles = [(512, 512), (1024, 512), (1024, 1024), (2048, 1024), (2048, 2048), (4096, 2048)]
    tile, block = "tile", "max_block_v"
    if sizes.optimizer == "rowwise_adamw":
        tile, block = "row_moment_tile", "row_moment_block_v"
    numbers: list[Mapping[str, int]] = [{tile: t, block: b} for t, b in tiles]
    # only steps on touched rows alone have forms
    lazy = sizes.optimizer == "lazy_adamw"
    return {form: numbers for form in FORMS["row_adam"] if lazy or form == "list"}


def _touched_rows(sizes: Sizes, distribution: str, device: torch.device) -> Tensor:
    """Flags of the rows that a microbatch reads."""
    # the last flag is for lookups that read no row
    flags = torch.zeros(sizes.rows + 1, dtype=torch.bool, device=device)
    rows = _Batch.drawn(sizes, distribution, device).row_ids.long().remainder(len(flags))
    return flags.index_fill_(0, rows, True)[:-1]


def _step_runs(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Run]]:
    optimizer = _optimizer(sizes, device)
    (gradient,) = optimizer.gradients.values()
    for distribution in DISTRIBUTIONS:
        touched = _touched_rows(sizes, distribution, device)

        def step(touched: Tensor = touched) -> None:
            gradient.touched.copy_(touched)
            optimizer.step()

        yield f"step, {distribution}", step


def _norm_answers(sizes: Sizes, form: str) -> list[KnownAnswer]:
    given: dict[str, Any] = _step_sizes(sizes)
    needs = 24 * given["rows"] * given["width"]
    given |= {"op": "squared_norm", "form": Form()}
    return [_answer("squared_norm", steps.selected_norm_is_right, given, needs)]


def _norm_runs(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Run]]:
    grads = torch.randn(sizes.rows, sizes.value_dim, device=device)
    for distribution in DISTRIBUTIONS:
        touched = _touched_rows(sizes, distribution, device)
        yield f"norm, {distribution}", partial(ops.squared_norm, grads, touched)


def _norm_numbers(sizes: Sizes) -> dict[str, list[Mapping[str, int]]]:
    keys = ("rows", "tile", "max_block_v", "num_warps")
    tried = [(64, 1024, 1024, 4), (64, 4096, 1024, 4), (64, 4096, 2048, 8), (16, 2048, 1024, 4)]
    numbers = [dict(zip(keys, values, strict=True)) for values in tried]
    return {"torch": [], "triton": list(numbers)}


TUNED = (
    TunedOp("product_topk", _topk_numbers, _topk_answers, _topk_runs),
    TunedOp(
        "product_topk_backward",
        _topk_backward_numbers,
        _topk_backward_answers,
        _topk_backward_runs,
    ),
    TunedOp(
        "row_gradient",
        _gradient_numbers,
        partial(
            _read_answers,
            "row_gradient",
            {
                "add": GRADIENTS,
                "first_touch": [*GRADIENTS, reads.first_gradients_are_exact],
                "merged": [*GRADIENTS, reads.merged_gradients_are_exact],
            },
        ),
        _gradient_runs,
    ),
    # the sort decides how much the sums after it have to read, so both are timed together
    TunedOp(
        "sort_lookups",
        _sort_numbers,
        partial(_read_answers, "sort_lookups", {"torch": GRADIENTS, "radix": GRADIENTS}),
        _gradient_runs,
    ),
    TunedOp("row_adam", _step_numbers, _step_answers, _step_runs),
    TunedOp(
        "embedding_bag",
        _bag_numbers,
        partial(_read_answers, "embedding_bag", {"triton": [reads.bags_are_exact]}),
        _bag_runs,
    ),
    TunedOp("squared_norm", _norm_numbers, _norm_answers, _norm_runs),
)
"""Most promising first, in case that the time does not suffice for all."""
