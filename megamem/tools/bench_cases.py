"""The cases of the benchmark: an op on inputs of one shape, the bytes it moves, and its rivals.

Forward passes count the bytes of a row once per lookup. Rows that many lookups share come from the
cache, so skewed lookups may exceed the bandwidth of the memory; this is why the table names the
distribution. Gradients count each distinct row once, as every one has to be written.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from megamem import ops
from megamem.ops.forms import FORMS
from megamem.ops.row_buffer import RowBuffer
from megamem.reference.embedding_bag import embedding_bag as bag_reference
from megamem.reference.product_topk import product_topk as topk_reference
from megamem.reference.row_dot import row_dot as dot_reference
from megamem.tools.bench_published import PublishedKernels

CHECKED_BAGS = 64
TO_BUFFER = ("backward += fp32", "backward first touch fp32")
# far more than rounding to bf16 causes, and far less than the error of a wrong result
MAX_RELATIVE_ERROR = 2e-2


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    distribution: str
    build: Callable[[], "Work"]
    """Makes the inputs; called just before the case is measured, so that one case is in memory."""
    memory: int
    """Approximate bytes of device memory that the case needs; its rivals may need more."""


@dataclass(frozen=True)
class Rival:
    """Another implementation of the same op."""

    name: str
    build: Callable[[], Callable[[], object]]
    """Makes the tensors that it needs beside the case's inputs; returns the call to be timed."""


@dataclass(frozen=True)
class Work:
    """A case whose inputs are in memory."""

    run: Callable[[], object]
    """The call to be timed."""
    bytes: int
    """Bytes that it has to read and write."""
    check: Callable[[], float]
    """Returns the relative error of its result, compared with the reference."""
    rivals: tuple[Rival, ...] = ()
    """Torch's implementations; the first that runs is timed."""
    published: Rival | None = None
    """The paper's kernels, where --published names them."""


def draw_rows(count: int, num_rows: int, distribution: str, device: torch.device) -> Tensor:
    """Random row ids [count], int64.

    They are uniform, or, as "zipf 1.0", the k-th most popular row is read about 1 / k as often.
    """
    if distribution == "uniform":
        return torch.randint(num_rows, (count,), device=device)
    draws = torch.rand(count, dtype=torch.float64, device=device)
    ranks = (draws * torch.log(torch.tensor(float(num_rows)))).exp().long() - 1
    # multiplying by an odd factor permutes a power of two, so that popular rows are not neighbours
    return ranks.clamp(0, num_rows - 1) * 2654435761 % num_rows


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Norm of the difference, divided by the norm of the truth, in float64."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def bag_cases(
    widths: list[int],
    rows: list[int],
    tokens: int,
    lookups: int,
    dtype: torch.dtype,
    device: torch.device,
    published: PublishedKernels | None = None,
) -> Iterator[Case]:
    """embedding_bag for each width and number of rows, with uniform and skewed lookups."""
    size = dtype.itemsize
    kinds = ("forward", "forward + backward", "sparse backward", *TO_BUFFER)
    for width in widths:
        for num_rows in rows:
            for distribution in ("uniform", "zipf 1.0"):
                for kind in kinds:
                    # torch's dense gradient and ours, or a buffer in fp32
                    tables = {"forward": 1, "sparse backward": 1, "forward + backward": 3}
                    touched = min(num_rows, tokens * lookups)
                    memory = num_rows * width * (tables.get(kind, 1) * size)
                    memory += num_rows * width * 4 * (kind in TO_BUFFER)
                    memory += 2 * touched * width * size + tokens * width * 16
                    shape = {"T": tokens, "L": lookups, "R": num_rows, "V": width}
                    build = partial(_bag, kind, shape, dtype, distribution, device, published)
                    yield Case(f"embedding_bag {kind}", shape, dtype, distribution, build, memory)


def _bag(
    kind: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    distribution: str,
    device: torch.device,
    published: PublishedKernels | None,
) -> Work:
    tokens, lookups, num_rows, width = shape.values()
    values = torch.empty(num_rows, width, dtype=dtype, device=device).normal_()
    row_ids = draw_rows(tokens * lookups, num_rows, distribution, device)
    weights = torch.rand(tokens * lookups, device=device)
    offsets = torch.arange(0, tokens * lookups + 1, lookups, device=device)
    grad = torch.randn(tokens, width, device=device).to(dtype)
    size, distinct = dtype.itemsize, len(row_ids.unique())
    lookup_bytes = len(row_ids) * 12
    forward_bytes = len(row_ids) * width * size + tokens * width * size + lookup_bytes
    # rows are read and their gradients written; the gradients of the bags are read
    backward_bytes = 2 * distinct * width * size + tokens * width * size + lookup_bytes

    def check() -> float:
        return _bag_error(values, row_ids, weights, offsets, grad)

    def torch_forward(table: Tensor, per_sample: Tensor) -> Tensor:
        # torch needs per_sample_weights in the dtype of the table
        return F.embedding_bag(
            row_ids, table, offsets[:-1], mode="sum", per_sample_weights=per_sample
        )

    def published_forward(table: Tensor, per_sample: Tensor) -> Tensor:
        assert published is not None
        return published.bag(row_ids.view(tokens, -1), table, per_sample.view(tokens, -1))

    def rival(name: str, forward: Callable[[Tensor, Tensor], Tensor], wide: bool = False) -> Rival:
        """A rival in the dtype of the table, or in fp32, with backward if the case has one."""

        def build() -> Callable[[], object]:
            per_sample = weights.to(torch.float32 if wide else dtype, copy=True)
            table = values.detach()
            table = table.float() if wide else table
            if kind == "forward":
                return lambda: forward(table, per_sample)
            leaves = (table.requires_grad_(), per_sample.requires_grad_())
            out_grad = grad.to(table.dtype)
            return lambda: torch.autograd.grad(forward(*leaves), leaves, out_grad)

        return Rival(f"{name} in fp32" if wide else name, build)

    theirs = None if published is None else rival("published", published_forward)
    torchs = [rival("F.embedding_bag", torch_forward)]
    if dtype != torch.float32:
        # torch has no bf16 backward with per_sample_weights, so fp32 is tried next
        torchs.append(rival("F.embedding_bag", torch_forward, wide=True))

    if kind == "forward":
        return Work(
            lambda: ops.embedding_bag(values, row_ids, weights, offsets, check_row_ids=False),
            forward_bytes,
            check,
            tuple(torchs),
            theirs,
        )
    if kind == "forward + backward":
        leaves = (values.requires_grad_(), weights.clone().requires_grad_())

        def ours() -> object:
            bags = ops.embedding_bag(leaves[0], row_ids, leaves[1], offsets, check_row_ids=False)
            return torch.autograd.grad(bags, leaves, grad)

        # autograd returns a dense gradient, of which every row is zeroed first
        dense_bytes = forward_bytes + backward_bytes + num_rows * width * size
        return Work(ours, dense_bytes, check, tuple(torchs), theirs)
    if kind == "sparse backward":
        return Work(
            lambda: ops.sparse_gradients(values, grad, row_ids, weights, offsets),
            backward_bytes,
            check,
        )
    # as in training: the rows' gradient goes to the optimizer's buffer
    overwrites = kind == "backward first touch fp32"
    flags = torch.zeros(num_rows + 1, dtype=torch.bool, device=device)
    buffer = RowBuffer(torch.zeros(num_rows, width, device=device), flags, overwrites)
    leaf = weights.clone().requires_grad_()
    out = ops.embedding_bag(
        values,
        row_ids,
        leaf,
        offsets,
        check_row_ids=False,
        add_value_grad_to=buffer,
    )
    # touched rows are read, and the buffer's touched rows are written, and read if added to
    accesses = 1 if overwrites else 2
    buffer_bytes = backward_bytes - distinct * width * size + accesses * distinct * width * 4

    def first_backward() -> object:
        flags.zero_()
        return torch.autograd.grad(out, leaf, grad, retain_graph=True)

    return Work(first_backward, buffer_bytes, check)


def _bag_error(
    values: Tensor, row_ids: Tensor, weights: Tensor, offsets: Tensor, grad: Tensor
) -> float:
    """Largest relative error of output and gradients of the first bags, compared with float64."""
    bags = min(CHECKED_BAGS, len(grad))
    count = int(offsets[bags])
    row_ids, weights, offsets = row_ids[:count], weights[:count], offsets[: bags + 1]
    grad = grad[:bags].contiguous()
    rows, slots = row_ids.unique(return_inverse=True)
    table = values.detach()[rows].double().requires_grad_()
    true_weights = weights.double().requires_grad_()
    truth = bag_reference(table, slots, true_weights, offsets)
    true_gradients = torch.autograd.grad(truth, (table, true_weights), grad.double())

    ours = ops.embedding_bag(values.detach(), row_ids, weights, offsets)
    _, grads, weight_grad = ops.sparse_gradients(values.detach(), grad, row_ids, weights, offsets)
    compact = values.detach()[rows]
    buffer = torch.zeros(len(rows), values.shape[1], device=values.device)
    leaf = weights.clone().requires_grad_()
    ops.embedding_bag(compact, slots, leaf, offsets, add_value_grad_to=buffer).backward(grad)
    assert leaf.grad is not None
    pairs = (
        (ours, truth.detach()),
        (buffer, true_gradients[0]),
        (leaf.grad, true_gradients[1]),
        (grads[: len(rows)], true_gradients[0]),
        (weight_grad, true_gradients[1]),
    )
    return max(relative_error(a, b) for a, b in pairs)


def dot_cases(
    widths: list[int],
    rows: list[int],
    tokens: int,
    lookups: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Case]:
    """row_dot, the products of rows with tokens that the peer variant needs, for each size."""
    for width in widths:
        for num_rows in rows:
            for kind in ("forward", "backward += fp32"):
                buffer = 4 * (kind != "forward")
                memory = num_rows * width * (dtype.itemsize + buffer)
                memory += tokens * width * 16 + tokens * lookups * 64
                shape = {"T": tokens, "L": lookups, "R": num_rows, "V": width}
                build = partial(_dot, kind, shape, dtype, device)
                yield Case(f"row_dot {kind}", shape, dtype, "uniform", build, memory)


def _dot(kind: str, shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Work:
    tokens, lookups, num_rows, width = shape.values()
    values = torch.empty(num_rows, width, dtype=dtype, device=device).normal_()
    vectors = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    row_ids = draw_rows(tokens * lookups, num_rows, "uniform", device)
    offsets = torch.arange(0, tokens * lookups + 1, lookups, device=device)
    grad = torch.randn(tokens * lookups, device=device)
    size, distinct = dtype.itemsize, len(row_ids.unique())
    moved = (len(row_ids) + tokens) * width * size + len(row_ids) * 12

    def check() -> float:
        bags = min(CHECKED_BAGS, tokens)
        count = bags * lookups
        rows, slots = row_ids[:count].unique(return_inverse=True)
        table = values[rows].double().requires_grad_()
        few = vectors.detach()[:bags].double().requires_grad_()
        truth = dot_reference(table, few, slots, offsets[: bags + 1])
        table_grad, few_grad = torch.autograd.grad(truth, (table, few), grad[:count].double())
        leaf = vectors.detach()[:bags].clone().requires_grad_()
        buffer = torch.zeros(len(rows), width, device=device)
        compact = values[rows]
        ours = ops.row_dot(compact, leaf, slots, offsets[: bags + 1], add_value_grad_to=buffer)
        (leaf_grad,) = torch.autograd.grad(ours, leaf, grad[:count])
        pairs = ((ours, truth), (leaf_grad, few_grad), (buffer, table_grad))
        return max(relative_error(a.detach(), b.detach()) for a, b in pairs)

    def torchs() -> Callable[[], object]:
        ids = row_ids.view(tokens, lookups)
        x = vectors.detach()
        return lambda: torch.einsum("tlv,tv->tl", values[ids], x)

    if kind == "forward":
        x = vectors.detach()
        return Work(
            lambda: ops.row_dot(values, x, row_ids, offsets, check_row_ids=False),
            moved,
            check,
            (Rival("gather and einsum", torchs),),
        )
    buffer = torch.zeros(num_rows, width, device=device)
    dots = ops.row_dot(
        values, vectors, row_ids, offsets, check_row_ids=False, add_value_grad_to=buffer
    )
    # rows are read for the gradient of the vectors; touched rows of the buffer are read and written
    return Work(
        lambda: torch.autograd.grad(dots, vectors, grad, retain_graph=True),
        moved + 2 * distinct * width * 4 + tokens * width * size,
        check,
    )


def topk_cases(
    sizes: list[int],
    tokens: int,
    heads: int,
    key_dim: int,
    topk: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Case]:
    """product_topk for each number of sub-keys: its forms, those of its backward, and both."""
    forward, backward = ([*FORMS[op]] for op in ("product_topk", "product_topk_backward"))
    forward.remove("torch")
    kinds = [f"forward, {form}" for form in forward] + [f"backward, {form}" for form in backward]
    for num_keys in sizes:
        for kind in (*kinds, "forward + backward"):
            shape = {"T": tokens, "H": heads, "N": num_keys, "C": key_dim, "K": min(topk, num_keys)}
            # torch's scores of both halves, and the memory of its sort
            memory = 2 * tokens * heads * num_keys * 40
            build = partial(_topk, kind, shape, dtype, device)
            yield Case(f"product_topk {kind}", shape, dtype, "normal", build, memory)


def _torch_topk(query: Tensor, sub_keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The usual way in torch: scores, a topk per half, all K * K sums, and a topk of these."""
    num_keys = sub_keys.shape[2]
    halves = torch.stack(query.chunk(2, dim=-1))
    (left, right), (i, j) = torch.einsum("zthc,zhnc->zthn", halves, sub_keys).topk(topk, dim=-1)
    sums = (left.unsqueeze(-1) + right.unsqueeze(-2)).flatten(-2)
    rows = (i.unsqueeze(-1) * num_keys + j.unsqueeze(-2)).flatten(-2)
    scores, best = sums.topk(topk, dim=-1)
    return scores, rows.gather(-1, best)


def _topk(kind: str, shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Work:
    tokens, heads, num_keys, key_dim, topk = shape.values()
    query = torch.randn(tokens, heads, 2 * key_dim, device=device).to(dtype)
    sub_keys = torch.randn(2, heads, num_keys, key_dim, device=device).to(dtype)
    grad = torch.randn(tokens, heads, topk, device=device)
    moved = (query.numel() + sub_keys.numel()) * dtype.itemsize + grad.numel() * 12
    direction, _, form = kind.partition(", ")
    ours = partial(ops.product_topk, form=form if direction == "forward" else None)

    def check() -> float:
        scores, _ = ours(query[:CHECKED_BAGS], sub_keys, topk)
        few = (query[:CHECKED_BAGS].double().cpu(), sub_keys.double().cpu())
        return relative_error(scores.cpu(), topk_reference(*few, topk)[0])

    if direction == "forward":
        return Work(
            lambda: ours(query, sub_keys, topk),
            moved,
            check,
            (Rival("torch topk", lambda: lambda: _torch_topk(query, sub_keys, topk)),),
        )
    inputs = (query.requires_grad_(), sub_keys.requires_grad_())
    if direction == "backward":
        return _topk_backward(form, inputs, grad, moved)

    def both(op: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> None:
        scores, _ = op(*inputs, topk)
        torch.autograd.grad(scores, inputs, grad.to(scores.dtype))

    def check_detached() -> float:
        with torch.no_grad():
            return check()

    return Work(
        lambda: both(ours),
        3 * moved,
        check_detached,
        (Rival("torch topk", lambda: lambda: both(_torch_topk)),),
    )


def _topk_backward(form: str, inputs: tuple[Tensor, Tensor], grad: Tensor, moved: int) -> Work:
    """The backward alone; it reads what the forward does, and writes two gradients."""
    topk = grad.shape[-1]

    ours = partial(ops.product_topk, backward_form=form)

    def check() -> float:
        query, sub_keys = inputs[0].detach()[:CHECKED_BAGS], inputs[1].detach()
        leaves = query.clone().requires_grad_(), sub_keys.clone().requires_grad_()
        scores, rows = ours(leaves[0], leaves[1], topk)
        found = torch.autograd.grad(scores, leaves, grad[:CHECKED_BAGS].to(scores))
        # of the scores of the rows that were found, as the order of close scores may differ
        leaves = query.double().cpu().requires_grad_(), sub_keys.double().cpu().requires_grad_()
        scores = _scores_of(leaves[0], leaves[1], rows.cpu())
        truth = torch.autograd.grad(scores, leaves, grad[:CHECKED_BAGS].cpu().to(scores))
        return max(relative_error(a.cpu(), b) for a, b in zip(found, truth, strict=True))

    scores, _ = ours(*inputs, topk)

    def torchs() -> Callable[[], object]:
        scores, _ = _torch_topk(*inputs, topk)
        return lambda: torch.autograd.grad(scores, inputs, grad.to(scores), retain_graph=True)

    return Work(
        lambda: torch.autograd.grad(scores, inputs, grad.to(scores), retain_graph=True),
        2 * moved,
        check,
        (Rival("torch topk", torchs),),
    )


def _scores_of(query: Tensor, sub_keys: Tensor, rows: Tensor) -> Tensor:
    """Scores of some rows of each token and head."""
    num_keys = sub_keys.shape[2]
    heads = torch.arange(query.shape[1]).unsqueeze(-1)
    halves = zip(query.chunk(2, dim=-1), sub_keys, (rows // num_keys, rows % num_keys), strict=True)
    parts = [torch.einsum("thc,thkc->thk", half, keys[heads, ids]) for half, keys, ids in halves]
    return parts[0] + parts[1]
