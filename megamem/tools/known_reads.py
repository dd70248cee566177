"""The checks of known_answers for ops that read a table, correct to the last bit.

Inputs are small whole numbers and powers of two. Every sum of them is exact in fp32 in any order,
so a result must equal that of plain torch; a result in bf16 is rounded to nearest once. Only the
scores of normally distributed queries have an error bound.

Each check returns None, or a sentence that says how many of which numbers are wrong.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megamem import ops
from megamem.ops import tuning
from megamem.ops.backend import use_triton
from megamem.ops.forms import FORMS
from megamem.ops.row_buffer import Deferred, RowBuffer
from megamem.reference.product_topk import product_topk as topk_reference
from megamem.reference.sort_lookups import sort_lookups as sort_reference
from megamem.reference.tucker_topk import tucker_topk as tucker_reference

PERIOD = 1021
"""Number of rows after which a table repeats. It is prime, so that an offset that is wrong by a
power of two does not find the expected numbers in another row."""
CORES = "embedding_bag_cores"
SORTED = ("rows", "positions", "bags", "weights")
CHUNK = 2**26
"""Numbers that the plain-torch computation holds at once."""


def whole_numbers(
    shape: tuple[int, ...], largest: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Tensor:
    """Random whole numbers from -largest to largest, the same in every call."""
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"dtype": torch.int8, "generator": generator, "device": device}
    return torch.randint(-largest, largest + 1, shape, **options).to(dtype)


def unlike(ours: Tensor, truth: Tensor, what: str) -> str | None:
    """How many numbers differ from the truth, as a sentence; None if none do. NaN always differs.

    The truth is an exact sum. A bf16 result must be that sum rounded to nearest; ties may go either
    way, as Triton's interpreter rounds them down, and a GPU to even.
    """
    if ours.shape != truth.shape:
        return f"the {what} have shape {tuple(ours.shape)} instead of {tuple(truth.shape)}"
    share = 2.0**-8 if ours.dtype == torch.bfloat16 else 0.0
    wrong = 0
    for a, b in zip(ours.split(2**12), truth.split(2**12), strict=True):
        same = a == b if share == 0 else (a.float() - b).abs() <= share * b.abs()
        wrong += int((~same).sum())
    return f"{wrong:,} of {truth.numel():,} {what} are wrong" if wrong else None


# product_topk -------------------------------------------------------------------------------------


def topk_is_exact(
    device: torch.device,
    tokens: int,
    heads: int,
    num_keys: int,
    key_dim: int,
    topk: int,
    **form: str,
) -> str | None:
    """product_topk with scores that are whole numbers: row ids and their order are exact."""
    query = whole_numbers((tokens, heads, 2 * key_dim), 3, torch.bfloat16, device, 1)
    sub_keys = whole_numbers((2, heads, num_keys, key_dim), 3, torch.bfloat16, device, 2)
    scores, rows = ops.product_topk(query, sub_keys, topk, **form)
    true_scores, true_rows = _true_topk(query, sub_keys, topk)
    return unlike(rows, true_rows, "row ids") or unlike(scores, true_scores, "scores")


def topk_is_within_rounding(
    device: torch.device,
    tokens: int,
    heads: int,
    num_keys: int,
    key_dim: int,
    topk: int,
    **form: str,
) -> str | None:
    """product_topk of normally distributed queries and sub-keys, compared with float64."""
    generator = torch.Generator(device).manual_seed(3)
    options: dict[str, Any] = {"generator": generator, "device": device}
    query = torch.randn(tokens, heads, 2 * key_dim, **options).bfloat16()
    sub_keys = torch.randn(2, heads, num_keys, key_dim, **options).bfloat16()
    scores, rows = ops.product_topk(query, sub_keys, topk, **form)
    if problem := _impossible_rows(rows, num_keys):
        return problem
    keys = sub_keys.double()
    longest = keys.norm(dim=-1).amax(-1)
    wrong_scores = wrong_rows = 0
    for chunk in torch.arange(tokens).split(_tokens_at_once(num_keys)):
        halves = torch.stack(query[chunk].double().chunk(2, dim=-1))
        # error bound of a sum of C products in fp32, in any order; tensor cores truncate
        bound = key_dim * 2.0**-22 * (halves.norm(dim=-1) * longest.unsqueeze(1)).sum(0)
        bound = bound.unsqueeze(-1)
        left, right = torch.einsum("zthc,zhnc->zthn", halves, keys)
        i, j = rows[chunk] // num_keys, rows[chunk] % num_keys
        truth = left.gather(-1, i) + right.gather(-1, j)
        wrong_scores += int((~((scores[chunk] - truth).abs() <= bound)).sum())
        best, _ = topk_reference(query[chunk].double(), keys, topk)
        wrong_rows += int((~((truth - best).abs() <= 2 * bound)).sum())
    if wrong_rows:
        return f"{wrong_rows:,} of {rows.numel():,} row ids are not among the best"
    if wrong_scores:
        return f"{wrong_scores:,} of {scores.numel():,} scores are wrong"
    return None


def topk_breaks_ties(
    device: torch.device,
    tokens: int,
    heads: int,
    num_keys: int,
    key_dim: int,
    topk: int,
    **form: str,
) -> str | None:
    """product_topk of queries of zeros: all scores are equal, so the first rows are returned."""
    query = torch.zeros(tokens, heads, 2 * key_dim, dtype=torch.bfloat16, device=device)
    sub_keys = whole_numbers((2, heads, num_keys, key_dim), 3, torch.bfloat16, device, 2)
    scores, rows = ops.product_topk(query, sub_keys, topk, **form)
    true_rows = torch.arange(topk, device=device).expand_as(rows)
    wrong = unlike(rows, true_rows, "row ids of equal scores")
    return wrong or unlike(scores, torch.zeros_like(scores), "scores of queries of zeros")


def topk_shows_nan(
    device: torch.device,
    tokens: int,
    heads: int,
    num_keys: int,
    key_dim: int,
    topk: int,
    **form: str,
) -> str | None:
    """product_topk with a NaN in one sub-key: it is ranked first, in its head only."""
    broken = num_keys * 2 // 3
    query = whole_numbers((tokens, heads, 2 * key_dim), 3, torch.bfloat16, device, 1)
    sub_keys = whole_numbers((2, heads, num_keys, key_dim), 3, torch.bfloat16, device, 2)
    spoiled = sub_keys.clone()
    spoiled[0, 0, broken, -1] = torch.nan
    scores, rows = ops.product_topk(query, spoiled, topk, **form)
    missed = int((~scores[:, 0].isnan()).sum())
    if missed:
        count = scores[:, 0].numel()
        return f"{missed:,} of {count:,} scores of a sub-key with a NaN are not NaN"
    if problem := _impossible_rows(rows, num_keys):
        return problem
    elsewhere = int((rows[:, 0] // num_keys != broken).sum())
    if elsewhere:
        count = rows[:, 0].numel()
        return f"{elsewhere:,} of {count:,} row ids do not belong to the sub-key with a NaN"
    true_scores, true_rows = _true_topk(query[:, 1:], sub_keys[:, 1:], topk)
    wrong = unlike(rows[:, 1:], true_rows, "row ids beside a head with a NaN")
    return wrong or unlike(scores[:, 1:], true_scores, "scores beside a head with a NaN")


def topk_has_gradients(
    device: torch.device,
    tokens: int,
    heads: int,
    num_keys: int,
    key_dim: int,
    topk: int,
    **form: str,
) -> str | None:
    """Gradients of product_topk: exact sums for queries and sub-keys, rounded to bf16."""
    query = whole_numbers((tokens, heads, 2 * key_dim), 3, torch.bfloat16, device, 1)
    sub_keys = whole_numbers((2, heads, num_keys, key_dim), 3, torch.bfloat16, device, 2)
    leaves = (query.requires_grad_(), sub_keys.requires_grad_())
    scores, rows = ops.product_topk(leaves[0], leaves[1], topk, **form)
    grad = whole_numbers(tuple(scores.shape), 2, scores.dtype, device, 4)
    ours = torch.autograd.grad(scores, leaves, grad)
    true_keys = torch.zeros(sub_keys.shape, device=device).flatten(0, 2)
    parts = []
    sets = torch.arange(2 * heads, device=device).view(2, 1, heads, 1) * num_keys
    table = sub_keys.detach().flatten(0, 2)
    with torch.no_grad():
        for chunk in torch.arange(tokens).split(max(1, CHUNK // (2 * heads * topk * key_dim))):
            halves = torch.stack(query[chunk].float().chunk(2, dim=-1)).unsqueeze(-2)
            read = torch.stack((rows[chunk] // num_keys, rows[chunk] % num_keys)) + sets
            share = grad[chunk].unsqueeze(-1)
            parts.append(torch.cat((table[read].float() * share).sum(-2).unbind(), -1))
            true_keys.index_add_(0, read.flatten(), (halves * share).flatten(0, -2))
    wrong = unlike(ours[0], torch.cat(parts), "numbers of the gradient of the queries")
    true_keys = true_keys.view_as(sub_keys)
    return wrong or unlike(ours[1], true_keys, "numbers of the gradient of the sub-keys")


def _true_topk(query: Tensor, sub_keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Scores and row ids of the reference in float64, in which whole numbers are exact."""
    keys = sub_keys.double()
    chunks = query.split(_tokens_at_once(sub_keys.shape[2]))
    found = [topk_reference(chunk.double(), keys, topk) for chunk in chunks]
    scores, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores.float(), rows


def _tokens_at_once(num_keys: int) -> int:
    return max(1, 2**19 // num_keys)


def _impossible_rows(rows: Tensor, num_keys: int) -> str | None:
    """A sentence if row ids do not exist or occur twice in one read; else None."""
    outside = int(((rows < 0) | (rows >= num_keys**2)).sum())
    if outside:
        return f"{outside:,} of {rows.numel():,} row ids do not exist"
    twice = int((rows.sort(dim=-1).values.diff(dim=-1) == 0).sum())
    return f"{twice:,} of {rows.numel():,} row ids occur twice in one read" if twice else None


# tucker_topk --------------------------------------------------------------------------------------

TUCKER_TOKENS = 512
"""Tokens of which the reference computes gradients in float64 at once."""


def _tucker_inputs(
    device: torch.device, tokens: int, heads: int, num_keys: int, width: int, queries: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole numbers of rank 2 with two cores, so small that all scores are exact in fp32."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return (
        whole_numbers((tokens, 2, queries, width), 1, bf16, device, 11),
        whole_numbers((2, heads, num_keys, 2, width), 1, bf16, device, 12),
        whole_numbers((2, heads, 2, 2), 2, fp32, device, 13),
        whole_numbers((2, heads, 2), 2, fp32, device, 14),
    )


def tucker_is_exact(
    device: torch.device,
    tokens: int,
    sizes: tuple[int, int, int, int],
    topk: int,
    final_topk: int,
    **form: str,
) -> str | None:
    """tucker_topk with scores that are whole numbers: row ids and their order are exact.

    Args:
        sizes: heads, keys per side, their width, and queries of a side.
    """
    inputs = _tucker_inputs(device, tokens, *sizes)
    weights, rows = _tucker(inputs, topk, final_topk, form)
    true_weights, true_rows = _true_tucker(inputs, topk, final_topk)
    return unlike(rows, true_rows, "row ids of pairs") or unlike(weights, true_weights, "weights")


def tucker_breaks_ties(
    device: torch.device,
    tokens: int,
    sizes: tuple[int, int, int, int],
    topk: int,
    final_topk: int,
    **form: str,
) -> str | None:
    """tucker_topk of queries of zeros: the first pairs of the first rows and columns are returned.

    Args:
        sizes: as for tucker_is_exact.
    """
    query, *others = _tucker_inputs(device, tokens, *sizes)
    weights, rows = _tucker((query * 0, *others), topk, final_topk, form)
    pairs = torch.arange(final_topk, device=device)
    true_rows = (pairs // topk * sizes[1] + pairs % topk).expand_as(rows)
    wrong = unlike(rows, true_rows, "row ids of pairs of equal scores")
    return wrong or unlike(weights, torch.zeros_like(weights), "weights of queries of zeros")


def tucker_shows_nan(
    device: torch.device,
    tokens: int,
    sizes: tuple[int, int, int, int],
    topk: int,
    final_topk: int,
    **form: str,
) -> str | None:
    """tucker_topk with a NaN in one key of a row: its pairs are ranked first, by their ids.

    Args:
        sizes: as for tucker_is_exact.
    """
    inputs = _tucker_inputs(device, tokens, *sizes)
    inputs[1][0, 0, sizes[1] * 2 // 3, 1, -1] = torch.nan
    weights, rows = _tucker(inputs, topk, final_topk, form)
    true_weights, true_rows = _true_tucker(inputs, topk, final_topk)
    wrong = unlike(weights.isnan(), true_weights.isnan(), "weights of a key with a NaN")
    return wrong or unlike(rows, true_rows, "row ids of pairs beside a NaN")


def tucker_has_gradients(
    device: torch.device,
    tokens: int,
    sizes: tuple[int, int, int, int],
    topk: int,
    final_topk: int,
    **form: str,
) -> str | None:
    """Gradients of tucker_topk: exact sums for queries, keys and cores.

    Args:
        sizes: as for tucker_is_exact.
    """
    *inputs, directions = _tucker_inputs(device, tokens, *sizes)
    leaves = [x.requires_grad_() for x in inputs]
    weights, _ = _tucker((*leaves, directions), topk, final_topk, form)
    grad = whole_numbers(tuple(weights.shape), 1, weights.dtype, device, 15)
    found = torch.autograd.grad(weights, leaves, grad)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    parts = []
    for chunk in torch.arange(tokens, device=device).split(TUCKER_TOKENS):
        query, keys, cores = exact[0][chunk], exact[1], exact[2]
        weights, _ = tucker_reference(query, keys, cores, directions.double(), topk, final_topk)
        parts.append(torch.autograd.grad(weights, exact, grad[chunk].double()))
    for name, x, *true_parts in zip(("queries", "keys", "cores"), found, *parts, strict=True):
        truth = torch.stack(true_parts).sum(0).float()
        if wrong := unlike(x, truth, f"numbers of the gradient of the {name}"):
            return wrong
    return None


def _tucker(
    inputs: tuple[Tensor, ...], topk: int, final_topk: int, form: dict[str, str]
) -> tuple[Tensor, Tensor]:
    query, keys, cores, directions = inputs
    return ops.tucker_topk(query, keys, cores, directions, topk, final_topk, **form)


def _true_tucker(inputs: tuple[Tensor, ...], topk: int, final_topk: int) -> tuple[Tensor, Tensor]:
    """Weights and row ids of the reference in float64, in which whole numbers are exact."""
    query, keys, cores, directions = (x.double() for x in inputs)
    weights, rows = tucker_reference(query, keys, cores, directions, topk, final_topk)
    return weights.float(), rows


def directions_are_leading(device: torch.device, heads: int) -> str | None:
    """leading_directions against torch's singular value decomposition, for ranks 1 to 4."""
    for rank in range(1, 5):
        generator = torch.Generator(device).manual_seed(16)
        options: dict[str, Any] = {"generator": generator, "device": device}
        core = torch.randn(heads, rank, rank, **options, dtype=torch.float64)
        first = ops.leading_directions(core, torch.zeros(2, heads, rank, device=device).double())
        u, t = first
        reached = torch.einsum("ha,hab,hb->h", u, core, t)
        lost = (reached / torch.linalg.svdvals(core)[:, 0] - 1).abs() > 1e-12
        lost |= (first.norm(dim=-1) - 1).abs().amax(0) > 1e-12
        other = ops.leading_directions(core, -first)
        signs = ((other + first).abs() > 1e-12).flatten(2).any(2).any(0)
        signs |= first.sum((0, 2)) < 0
        for name, wrong in (("leading directions", lost), ("signs of directions", signs)):
            if count := int(wrong.sum()):
                return f"{count:,} of {heads:,} {name} of rank {rank} are wrong"
    return None


# embedding_bag and row_dot ------------------------------------------------------------------------


class Reads:
    """Random lookups in a table that repeats every PERIOD rows, and their results by plain torch.

    Half of the lookups read one of 16 rows, as a few rows of a trained table are far more popular
    than the others. Bags have random lengths, and some are empty. One lookup in 16 reads no row.
    """

    def __init__(self, device: torch.device, tokens: int, lookups: int, rows: int, width: int):
        self.shape = (rows, width)
        self.period = min(PERIOD, rows)
        self.block = whole_numbers((self.period, width), 4, torch.bfloat16, device, 5)
        generator = torch.Generator(device).manual_seed(6)
        options: dict[str, Any] = {"generator": generator, "device": device}
        count = tokens * lookups
        everywhere = torch.randint(rows, (count,), **options)
        popular = torch.randint(16, (count,), **options) * (rows // 16)
        is_popular, is_absent = torch.rand(2, count, **options)
        self.row_ids = everywhere.where(is_popular < 0.5, popular).where(is_absent > 1 / 16, -1)
        sizes = torch.tensor([0.5, 1.0, 2.0, -1.0], device=device)
        self.weights = sizes[torch.randint(4, (count,), **options)]
        cuts = torch.randint(count + 1, (tokens - 1,), **options).sort().values
        self.offsets = torch.nn.functional.pad(cuts, (1, 1))
        self.offsets[-1] = count
        self.grad = whole_numbers((tokens, width), 3, torch.bfloat16, device, 7)
        self.bag_ids = torch.repeat_interleave(
            torch.arange(tokens, device=device), self.offsets.diff(), output_size=count
        )

    def table(self) -> Tensor:
        """The table, [rows, width] in bf16."""
        rows, _ = self.shape
        return self.block.repeat(-(-rows // self.period), 1)[:rows]

    def bags(self) -> Tensor:
        """The weighted sum of the rows of each bag, [bags, width] in fp32."""
        sums = torch.zeros(self.grad.shape, device=self.grad.device)
        for m in self._chunks():
            sums.index_add_(0, self.bag_ids[m], self._read(m) * self._weights_of_columns(m))
        return sums

    def dots(self) -> Tensor:
        """The product of each lookup's row and its bag's gradient, fp32; 0 where no row is read."""
        products = (self._read(m).mul_(self.grad[self.bag_ids[m]]) for m in self._chunks())
        return torch.cat([self._sum_of_columns(product) for product in products])

    def add_row_gradient_(self, sums: Tensor) -> Tensor:
        """Add weight times gradient of the bag to the sum of each row that is read."""
        for m in self._chunks():
            present = self.row_ids[m] >= 0
            share = self.grad[self.bag_ids[m]] * self._weights_of_columns(m)
            sums.index_add_(0, self.row_ids[m][present], share[present])
        return sums

    def _weights_of_columns(self, m: slice) -> Tensor:
        return self.weights[m].unsqueeze(-1)

    def _sum_of_columns(self, product: Tensor) -> Tensor:
        return product.sum(-1)

    def _chunks(self) -> list[slice]:
        step = max(1, CHUNK // self.shape[1])
        return [slice(start, start + step) for start in range(0, len(self.row_ids), step)]

    def _read(self, m: slice) -> Tensor:
        present = (self.row_ids[m] >= 0).unsqueeze(-1)
        return self.block[self.row_ids[m] % self.period].float() * present


class ReadsOfCores(Reads):
    """The same with a weight for each core; the columns begin and end within a core, or with one.

    Args:
        sizes: what Reads takes.
        whole: whether the columns are those of two whole cores.
    """

    def __init__(self, *sizes: Any, whole: bool) -> None:
        super().__init__(*sizes)
        _, width = self.shape
        core_width = width // 2 if whole else 8 * (width // 24)
        self.split: Any = {"first_column": 0 if whole else 8, "core_width": core_width}
        columns = torch.arange(width, device=self.grad.device) + self.split["first_column"]
        self.core_of_column = columns // core_width
        num_cores = int(self.core_of_column[-1]) + 1
        factors = torch.tensor([1.0, -2.0, 0.5, -1.0], device=self.grad.device)[:num_cores]
        self.weights = self.weights.unsqueeze(-1) * factors

    def _weights_of_columns(self, m: slice) -> Tensor:
        return self.weights[m][:, self.core_of_column]

    def _sum_of_columns(self, product: Tensor) -> Tensor:
        sums = product.new_zeros(len(product), self.weights.shape[1])
        return sums.index_add_(1, self.core_of_column, product)


def bags_of_cores_are_exact(
    device: torch.device, tokens: int, lookups: int, rows: int, width: int
) -> str | None:
    """embedding_bag forward with several weights a lookup, by every form."""
    for whole in (True, False):
        reads = ReadsOfCores(device, tokens, lookups, rows, width, whole=whole)
        truth = reads.bags()
        for form in FORMS[CORES]:
            with using_form(CORES, form):
                bags = ops.embedding_bag(
                    reads.table(), reads.row_ids, reads.weights, reads.offsets, **reads.split
                )
            if wrong := unlike(bags, truth, f"numbers of the bags of cores by the form {form}"):
                return wrong
    return None


def gradients_of_cores_are_exact(
    device: torch.device, tokens: int, lookups: int, rows: int, width: int
) -> str | None:
    """embedding_bag backward with several weights a lookup, by every form, twice: the first
    gradient of each row overwrites an undefined buffer, and the second is added to it."""
    # the interpreter is slow
    splits = (True, False) if device.type == "cuda" else (False,)
    for form, whole in itertools.product(FORMS[CORES], splits):
        reads = ReadsOfCores(device, tokens, lookups, rows, width, whole=whole)
        with using_form(CORES, form):
            wrong = _gradients_of_two_passes(reads, at_once=1, **reads.split)
        if wrong:
            return f"by the form {form} of several weights a lookup, {wrong}"
    return None


@contextmanager
def using_form(op: str, form: str) -> Iterator[None]:
    """Let an op use a form, unless the environment selects one."""
    chosen = tuning.current()
    with tuning.using(replace(chosen, forms={**chosen.forms, op: form})):
        yield


def bags_are_exact(
    device: torch.device, tokens: int, lookups: int, rows: int, width: int
) -> str | None:
    """embedding_bag forward, with and without lookups that read no row."""
    reads = Reads(device, tokens, lookups, rows, width)
    table, truth = reads.table(), reads.bags()
    row_ids, weights = reads.row_ids, reads.weights
    bags = ops.embedding_bag(table, row_ids, weights, reads.offsets)
    if wrong := unlike(bags, truth, "numbers of the bags"):
        return wrong
    # a row with weight 0 adds nothing, like a lookup that reads no row
    present = row_ids.clamp(min=0), weights * (row_ids >= 0)
    bags = ops.embedding_bag(table, *present, reads.offsets, ops.Known(may_skip=False))
    return unlike(bags, truth, "numbers of the bags with may_skip=False")


def bag_gradients_are_exact(
    device: torch.device, tokens: int, lookups: int, rows: int, width: int
) -> str | None:
    """embedding_bag backward as in training: gradients of rows are added to an fp32 buffer that is
    not zero; gradients of weights are returned."""
    reads = Reads(device, tokens, lookups, rows, width)
    leaf = reads.weights.clone().requires_grad_()
    buffer = torch.full((rows, width), 5.0, device=device)
    bags = ops.embedding_bag(
        reads.table(), reads.row_ids, leaf, reads.offsets, add_value_grad_to=buffer
    )
    (weight_grad,) = torch.autograd.grad(bags, leaf, reads.grad)
    wrong = unlike(weight_grad, reads.dots(), "gradients of weights")
    truth = reads.add_row_gradient_(torch.full_like(buffer, 5.0))
    return wrong or unlike(buffer, truth, "numbers of the gradient buffer")


def first_gradients_are_exact(
    device: torch.device, tokens: int, lookups: int, rows: int, width: int
) -> str | None:
    """embedding_bag backward, twice: of a buffer that is undefined, the first gradient of each row
    overwrites the numbers, and the second is added to it."""
    return _gradients_of_two_passes(Reads(device, tokens, lookups, rows, width), at_once=1)


def merged_gradients_are_exact(
    device: torch.device, tokens: int, lookups: int, rows: int, width: int
) -> str | None:
    """The same where the gradients of both passes are added at once, after the second."""
    return _gradients_of_two_passes(Reads(device, tokens, lookups, rows, width), at_once=2)


def _gradients_of_two_passes(reads: Reads, at_once: int, **split: Any) -> str | None:
    (rows, width), device = reads.shape, reads.grad.device
    leaf = reads.weights.clone().requires_grad_()
    flags = torch.zeros(rows + 1, dtype=torch.bool, device=device)
    undefined = torch.full((rows, width), torch.nan, device=device)
    deferred = Deferred(at_once) if at_once > 1 else None
    buffer = RowBuffer(undefined, flags, overwrites=True, deferred=deferred)
    touched = torch.zeros(rows, dtype=torch.bool, device=device)
    touched[reads.row_ids[reads.row_ids >= 0]] = True
    truth = torch.zeros(rows, width, device=device)
    for n in (1, 2):
        bags = ops.embedding_bag(
            reads.table(), reads.row_ids, leaf, reads.offsets, add_value_grad_to=buffer, **split
        )
        (weight_grad,) = torch.autograd.grad(bags, leaf, reads.grad)
        if wrong := unlike(weight_grad, reads.dots(), "gradients of weights"):
            return wrong
        reads.add_row_gradient_(truth)
        if n % at_once:
            continue
        ours = buffer.buffer_rV.where(touched.unsqueeze(-1), 0)
        if wrong := unlike(ours, truth, f"numbers of the sum after pass {n}"):
            return wrong
        if wrong := unlike(flags[:-1], touched, f"marks of touched rows after pass {n}"):
            return wrong
    written = int((~buffer.buffer_rV[~touched].isnan()).any(-1).sum())
    return f"{written:,} rows that were not touched were written" if written else None


def sparse_gradients_are_exact(
    device: torch.device, tokens: int, lookups: int, rows: int, width: int
) -> str | None:
    """sparse_gradients: touched rows, their gradients, and those of the weights."""
    reads = Reads(device, tokens, lookups, rows, width)
    found, grads, weight_grad = ops.sparse_gradients(
        reads.table(), reads.grad, reads.row_ids, reads.weights, reads.offsets
    )
    true_rows = reads.row_ids[reads.row_ids >= 0].unique()
    present = found[: len(true_rows)]
    wrong = unlike(present, true_rows, "touched rows")
    wrong = wrong or unlike(weight_grad, reads.dots(), "gradients of weights")
    truth = reads.add_row_gradient_(torch.zeros(rows, width, device=device))
    found_grads, what = grads[: len(true_rows)], "numbers of the gradients of rows"
    return wrong or unlike(found_grads, truth[true_rows], what)


def row_dots_are_exact(
    device: torch.device, tokens: int, lookups: int, rows: int, width: int
) -> str | None:
    """row_dot forward and backward; the rows' gradients are added to a buffer that is not zero."""
    reads = Reads(device, tokens, lookups, rows, width)
    vectors = reads.grad.clone().requires_grad_()
    buffer = torch.full((rows, width), 5.0, device=device)
    dots = ops.row_dot(
        reads.table(), vectors, reads.row_ids, reads.offsets, add_value_grad_to=buffer
    )
    (vector_grad,) = torch.autograd.grad(dots, vectors, reads.weights)
    wrong = unlike(dots.detach(), reads.dots(), "dots")
    what = "numbers of the gradient of the vectors"
    wrong = wrong or unlike(vector_grad, reads.bags(), what)
    truth = reads.add_row_gradient_(torch.full_like(buffer, 5.0))
    return wrong or unlike(buffer, truth, "numbers of the gradient buffer")


# sort_lookups -------------------------------------------------------------------------------------


def sort_is_exact(
    device: torch.device, tokens: int, lookups: int, rows: int, width: int
) -> str | None:
    """sort_lookups by every form that runs on the device.

    One lookup in 16 reads no row, then nearly all, as where other ranks have the rows; then none.
    """
    reads = Reads(device, tokens, lookups, rows, width)
    seldom = torch.arange(len(reads.row_ids), device=device) % 16 == 5
    sizes = reads.offsets, ops.Known()
    alike = torch.arange(0, len(seldom) + 1, lookups, device=device)
    all_known = alike, ops.Known(may_skip=False, equal_bags=True)
    for row_ids, (offsets, known) in (
        (reads.row_ids, sizes),
        (reads.row_ids.where(seldom, -1), sizes),
        (reads.row_ids.clamp(min=0), all_known),
    ):
        truth = sort_reference(row_ids, reads.weights, offsets)
        count = len(truth[0])
        for form in FORMS["sort_lookups"]:
            if form != "torch" and not use_triton(reads.weights):
                continue
            ours = ops.sort_lookups(row_ids, reads.weights, offsets, rows, known, form=form)
            found = (ours.rows_or_none(), ours.order_M, ours.bags_M, ours.weights_M)
            for name, x, expected in zip(SORTED, found, truth, strict=True):
                what = f"{name} of sorted lookups by the form {form}"
                if wrong := unlike(x[:count].to(expected.dtype), expected, what):
                    return wrong
            if not bool((found[0][count:] == rows).all()):
                return f"lookups that read no row are sorted as if they did by the form {form}"
    return None


# placement ----------------------------------------------------------------------------------------


def placement_is_a_bijection(device: torch.device, num_keys: int) -> str | None:
    """place_rows gives each row to one pair of sub-keys, and unplace_rows returns that pair."""
    pairs = torch.arange(num_keys**2, device=device)
    rows = ops.place_rows(pairs, num_keys, seed=7)
    outside = int(((rows < 0) | (rows >= num_keys**2)).sum())
    if outside:
        return f"{outside:,} of {len(pairs):,} pairs of sub-keys read no row of the table"
    missed = int((rows.bincount(minlength=num_keys**2) != 1).sum())
    if missed:
        return f"{missed:,} of {len(pairs):,} rows are not read by exactly one pair of sub-keys"
    narrow = ops.place_rows(pairs, num_keys, seed=7, dtype=torch.int32)
    if wrong := unlike(narrow.long(), rows, "rows that are placed as int32"):
        return wrong
    again = ops.unplace_rows(rows, num_keys, seed=7)
    return unlike(again, pairs, "pairs that unplace_rows returns")
