"""The plan of buffers of sorted lookups is what the form radix and the row gradient allocate."""

import pytest
import torch

from megamem.kernels import row_gradient, sort_lookups
from megamem.planner.buffers import kept_passes, passing_bytes, present_share, sorted_bytes
from megamem.planner.job import Layout
from tests.planner.jobs import LOOKUPS, TOKENS, job_of

KERNELS = {
    sort_lookups: ("_count_kernel", "_scatter_kernel"),
    row_gradient: ("_row_pass_kernel", "_merge_kernel", "_unsort_kernel", "_late_dots_kernel"),
}


class _Kernel:
    """Records the tensors of its launches and does nothing else."""

    def __init__(self, seen: list[torch.Tensor]) -> None:
        self.seen = seen

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.seen.extend(
            x for x in arguments if isinstance(x, torch.Tensor)
        )


@pytest.fixture
def launched(monkeypatch) -> list[torch.Tensor]:
    """Tensors that kernels get; the form radix is selected, and no kernel is launched."""
    monkeypatch.setenv("MEGAMEM_FORMS", "sort_lookups=radix")
    seen: list[torch.Tensor] = []
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, _Kernel(seen))
    return seen


@pytest.mark.parametrize("width", [8, 384, 1000, 2048])
@pytest.mark.parametrize("share", [None, 1 / 8])
@pytest.mark.parametrize("lookups", [1000, 32 * 8192 + 1, 2**23])
def test_buffers_are_what_is_allocated(lookups, share, width, launched) -> None:
    """Tensors are on the meta device."""
    row_ids = torch.empty(lookups, dtype=torch.int32, device="meta")
    weights = torch.empty(lookups, device="meta")
    offsets = torch.empty(2, dtype=torch.int64, device="meta")
    table = torch.empty(2**20, width, device="meta")
    expected = None if share is None else int(lookups * share)
    known = {"may_skip": share is not None, "expected": expected}
    ordered = sort_lookups.sort_by_radix(row_ids, weights, offsets, len(table), **known)
    of_lookups = {id(x): x for x in launched if x.numel() == lookups and x is not row_ids}
    sorting = sum(x.nbytes for x in of_lookups.values() if x is not weights)
    launched.clear()
    weight_grad = row_gradient.row_gradient(ordered, table[:1], table, table)
    *_, partials, dots = (x for x in launched[:8] if x is not ordered.count)
    held = [ordered.rows_M, ordered.order_M, ordered.bags_M, ordered.weights_M]
    held += [weight_grad, partials, dots]
    planned = sorted_bytes(lookups, width, weights=True, share=share)
    assert planned == max(sum(x.nbytes for x in held), sorting)


def test_one_of_eight_ranks_takes_half(monkeypatch) -> None:
    """Of what it took with torch, for a rank's lookups and those of seven others."""
    job = job_of(world=8, memory_value_dim=2048)
    layout = Layout("row", 8, 1)
    assert present_share(job, layout) == 1 / 8
    assert present_share(job, Layout("row", 1, 1)) is None
    exact = job_of(world=8, memory_wire="alltoall")
    assert present_share(exact, layout) is None
    arrived = 8 * TOKENS * LOOKUPS
    taken, planned = {}, {}
    for form in ("torch", "radix"):
        monkeypatch.setenv("MEGAMEM_FORMS", f"sort_lookups={form}")
        taken[form] = sorted_bytes(arrived, 2048, weights=True, share=1 / 8)
        planned[form] = passing_bytes(job, layout)
    assert arrived == 2**23
    # each lookup takes 20 bytes; one in four has room for 8 products; 8192 chunks have 2 sums
    assert taken["radix"] == 2**23 * (20 + 4 * 8 / 4) + 2**13 * 2 * 2048 * 4
    assert taken["radix"] == taken["torch"] / 2
    assert planned["radix"] < planned["torch"]


def test_virtual_stages_hold_more_passes() -> None:
    """Four microbatches, two stages: those of the first virtual stage, then of the second."""
    memories = {"memory_layers": [3, 19], "memory_pool": "layer"}
    places = ((tuple(range(5)), tuple(range(11, 16))), (tuple(range(5, 11)), tuple(range(16, 22))))
    batch = {"pipeline_model_parallel_size": 2, "global_batch_size": 4 * 4 * 4}
    job = job_of(world=8, cluster={**batch, "placement": places}, **memories)
    assert job.cluster.microbatches == 4 and job.stage_memories == [1, 1]
    # the first stage is five passes ahead, of which the third and the fourth are of its second
    # virtual stage, which has no memory
    assert kept_passes(job, 0) == 3
    # the second is three ahead, and its memory is on the second virtual stage
    assert kept_passes(job, 1) == 1
    plain = job_of(world=8, cluster=batch, **memories)
    assert [kept_passes(plain, stage) for stage in range(2)] == [2, 1]
