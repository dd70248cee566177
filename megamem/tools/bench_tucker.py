"""The benchmark's cases of tucker_topk: its forms, and those of its backward."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from megamem import ops
from megamem.ops.forms import FORMS
from megamem.tools.bench_cases import CHECKED_BAGS, Case, Rival, Work, relative_error

# keys per side, rows and columns kept, pairs returned
SIZES = ((1138, 32, 32), (808, 42, 80), (1138, 128, 256), (964, 128, 768))
RANK, CORES = 2, 2


def tucker_cases(
    tokens: int, width: int, dtype: torch.dtype, device: torch.device, quick: bool
) -> Iterator[Case]:
    """tucker_topk of rank 2 with two cores, at the sizes of the two papers.

    Args:
        tokens: how many, with one head.
        width: of a key of one side.
        dtype: of queries and keys.
        device: where they are.
        quick: the first size only.
    """
    kinds = [f"{way}, {form}" for way, op in WAYS.items() for form in FORMS[op]]
    for num_keys, topk, final_topk in SIZES[: 1 if quick else None]:
        shape = {"T": tokens, "N": num_keys, "C": width, "K": topk, "F": final_topk}
        memory = tokens * (20 * width + 100 * (final_topk + topk)) + 2**29
        # the rival forms all pairs of all tokens, and sorts them
        memory += tokens * (80 * num_keys + 24 * topk**2)
        for kind in kinds:
            build = partial(_tucker, kind, shape, dtype, device)
            yield Case(f"tucker_topk {kind}", shape, dtype, "normal", build, memory)


WAYS = {"forward": "tucker_topk", "backward": "tucker_topk_backward"}


def _by_torch(
    query: Tensor, keys: Tensor, cores: Tensor, directions: Tensor, topk: int, final_topk: int
) -> tuple[Tensor, Tensor]:
    """The usual way in torch: a topk per side, the scores of all pairs, and a topk of these."""
    scores = torch.einsum("tzc,znac->ztna", query[:, :, 0], keys[:, 0]).to(cores.dtype)
    kept = (scores.detach() @ directions.transpose(1, 2)[:, None]).squeeze(-1).topk(topk).indices
    row, column = scores.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, RANK))
    with torch.no_grad():
        pairs = (row @ cores.sum((0, 1)) @ column.transpose(1, 2)).flatten(1)
        best = pairs.topk(final_topk).indices
    i, j = best // topk, best % topk
    row, column = (
        x.gather(1, at.unsqueeze(-1).expand(-1, -1, RANK)) for x, at in ((row, i), (column, j))
    )
    weights = torch.einsum("tfa,oab,tfb->tfo", row, cores[:, 0], column)
    return weights.unsqueeze(1), kept[0].gather(1, i) * keys.shape[2] + kept[1].gather(1, j)


def _tucker(kind: str, shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Work:
    tokens, num_keys, width, topk, final_topk = shape.values()
    query = torch.randn(tokens, 2, 1, width, device=device).to(dtype)
    keys = (torch.randn(2, 1, num_keys, RANK, width, device=device) / width**0.5).to(dtype)
    cores = torch.rand(CORES, 1, RANK, RANK, device=device)
    directions = ops.leading_directions(cores.sum(0), torch.zeros(2, 1, RANK, device=device))
    sizes = (topk, final_topk)
    # queries and keys are read; weights and 8 bytes of a row id are written
    moved = (query.numel() + keys.numel()) * dtype.itemsize
    moved += tokens * final_topk * (4 * CORES + 8)
    way, _, form = kind.partition(", ")
    few = query[:CHECKED_BAGS]
    if way == "forward":

        def check() -> float:
            weights, _ = ops.tucker_topk(few, keys, cores, directions, *sizes, form=form)
            exact = few.double(), keys.double(), cores.double(), directions.double()
            truth, _ = ops.tucker_topk(*exact, *sizes)
            # in the order of the sums, where those that all but tie may have changed places
            return relative_error(weights.sum(-1), truth.sum(-1))

        inputs = (query, keys, cores, directions)
        return Work(
            lambda: ops.tucker_topk(*inputs, *sizes, form=form),
            moved,
            check,
            (Rival("torch topk", lambda: lambda: _by_torch(*inputs, *sizes)),),
        )
    leaves = (query.requires_grad_(), keys.requires_grad_(), cores.requires_grad_())
    grad = torch.randn(tokens, 1, final_topk, CORES, device=device)

    def check_gradients() -> float:
        a, b, c = given = [x.detach().clone().requires_grad_() for x in (few, keys, cores)]
        weights, row_ids = ops.tucker_topk(a, b, c, directions, *sizes, backward_form=form)
        found = torch.autograd.grad(weights, given, grad[:CHECKED_BAGS])
        a, b, c = exact = [x.detach().double().requires_grad_() for x in given]
        truth = _weights_of(a, b, c, row_ids[:, 0])
        gradients = torch.autograd.grad(truth, exact, grad[:CHECKED_BAGS, 0].double())
        return max(relative_error(a, b) for a, b in zip(found, gradients, strict=True))

    weights, _ = ops.tucker_topk(*leaves, directions, *sizes, backward_form=form)

    def torchs() -> Callable[[], object]:
        weights, _ = _by_torch(*leaves, directions, *sizes)
        return lambda: torch.autograd.grad(weights, leaves, grad, retain_graph=True)

    return Work(
        lambda: torch.autograd.grad(weights, leaves, grad, retain_graph=True),
        2 * moved,
        check_gradients,
        (Rival("torch topk", torchs),),
    )


def _weights_of(query: Tensor, keys: Tensor, cores: Tensor, row_ids: Tensor) -> Tensor:
    """The weights of some pairs of each token."""
    num_keys = keys.shape[2]
    row, column = (
        torch.einsum("tc,tfac->tfa", query[:, z, 0], keys[z, 0][at])
        for z, at in enumerate((row_ids // num_keys, row_ids % num_keys))
    )
    return torch.einsum("tfa,oab,tfb->tfo", row, cores[:, 0], column)
