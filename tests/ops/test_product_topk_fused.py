"""product_topk without a tensor of scores: its threshold, its exact way out, and its pairs."""

import pytest
import torch
from torch import Tensor

from megamem.kernels import choices
from megamem.kernels import product_topk_fused as fused
from megamem.ops import forms, product_topk
from megamem.reference.product_topk import product_topk as reference


def _assert_is_the_twin(query: Tensor, sub_keys: Tensor, topk: int, **options: int) -> None:
    ours, truth = fused.product_topk(query, sub_keys, topk, **options), None
    truth = reference(query.float(), sub_keys.float(), topk)
    assert torch.equal(ours[1], truth[1])
    assert torch.equal(ours[0].nan_to_num(nan=7e30), truth[0].nan_to_num(nan=7e30))


def _with_scores(left: Tensor, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A query and sub-keys of width 1 whose scores are these."""
    halves = torch.stack((left, left if right is None else right))
    return torch.ones(1, 1, 2, device=left.device), halves.view(2, 1, -1, 1)


def _integers(
    tokens: int, heads: int, num_keys: int, key_dim: int, spread: int, device: str
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(num_keys)
    low, high = -spread, spread + 1
    query = torch.randint(low, high, (tokens, heads, 2 * key_dim), device=device).float()
    return query, torch.randint(low, high, (2, heads, num_keys, key_dim), device=device).float()


@pytest.fixture
def redone(monkeypatch) -> list[int]:
    """How many halves of reads the exact kernel has found to be done again, per launch."""
    found: list[int] = []
    kernel = fused._exact_kernel

    class Counting:
        def __getitem__(self, grid):  # type: ignore[no-untyped-def]
            def launch(*args, **kwargs):  # type: ignore[no-untyped-def]
                counts = args[3]
                found.append(int(((counts > kwargs["KB"]) | (counts < kwargs["K"])).sum()))
                kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(fused, "_exact_kernel", Counting())
    return found


@pytest.fixture
def sampled(monkeypatch) -> None:
    """The threshold comes from a third of the sub-keys, as with more than 2048 of them."""
    chosen = choices.current().changed("product_topk", fused_full_look=0)
    monkeypatch.setattr(choices, "current", lambda: chosen)


@pytest.mark.parametrize("equal", [31, 32, 33, 100])
@pytest.mark.parametrize("above", [0, 1, 7])
def test_more_equal_scores_than_slots(equal, above, redone, device, poisoned_memory):
    """A half has 32 slots; the K-th best score stands among `equal` equals, anywhere."""
    torch.manual_seed(equal)
    scores = -1 - torch.rand(200, device=device)
    places = torch.randperm(200, device=device)
    scores[places[:equal]] = 2.0
    scores[places[equal : equal + above]] = 3 + torch.rand(above, device=device)
    # the other half has no equals: each half is decided apart
    _assert_is_the_twin(*_with_scores(scores, torch.randn(200, device=device)), 8)
    assert redone == [int(equal + above > 32)]


def test_all_scores_equal(redone, device, poisoned_memory):
    """Padding: the queries are zero, so the first rows are returned."""
    query, sub_keys = _integers(3, 2, 300, 4, 3, device)
    query[1] = 0
    _assert_is_the_twin(query, sub_keys, 8)
    assert redone[0] >= 4
    assert fused.product_topk(query, sub_keys, 8)[1][1].tolist() == [list(range(8))] * 2


def test_blocks_of_equal_scores(redone, device, poisoned_memory):
    """The best 70 are equal, and lie side by side across two blocks of sub-keys."""
    scores = (torch.arange(350, device=device) // 70 * 2 % 5).float()
    for topk in (5, 16):
        _assert_is_the_twin(*_with_scores(scores, scores.flip(0)), topk)
    assert redone == [2, 2]


def test_neighbouring_scores(device, poisoned_memory):
    """More scores than slots that differ in their last bits: bisection over bits ends rightly."""
    bits = torch.tensor(1.0, device=device).view(torch.int32) + torch.arange(300, device=device)
    scores = bits.int().view(torch.float32)[torch.randperm(300, device=device)]
    for sign in (1, -1):
        _assert_is_the_twin(*_with_scores(sign * scores), 8)


@pytest.mark.parametrize("count", [1, 5, 60])
def test_infinities_nan_and_both_zeros(count, device, poisoned_memory):
    torch.manual_seed(count)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0, 3e38], device=device)
    for value in special:
        scores = torch.randn(180, device=device)
        scores[torch.randperm(180, device=device)[:count]] = value
        _assert_is_the_twin(*_with_scores(scores, torch.randn(180, device=device)), 8)
    mixed = special.repeat(30)
    _assert_is_the_twin(*_with_scores(mixed[torch.randperm(180, device=device)]), 8)
    _assert_is_the_twin(*_with_scores(torch.full_like(mixed, torch.nan)), 8)
    _assert_is_the_twin(*_with_scores(torch.full_like(mixed, -torch.inf)), 8)


def test_equal_sums_of_pairs(device, poisoned_memory):
    """All 119 sums of 32 pairs are equal, or whole levels of them: smaller row ids come first."""
    for divisor in (1000, 4, 2):
        scores = -(torch.arange(100, device=device) // divisor).float()
        _assert_is_the_twin(*_with_scores(scores, scores.roll(17)), 32)


@pytest.mark.parametrize(
    ("tokens", "heads", "num_keys", "key_dim", "topk", "spread"),
    [
        (3, 2, 700, 5, 8, 3),
        (2, 1, 129, 4, 5, 9),
        (1, 1, 90, 3, 33, 1),
        (1, 1, 1100, 70, 64, 2),
    ],
)
def test_a_threshold_of_some_sub_keys(
    tokens, heads, num_keys, key_dim, topk, spread, sampled, device, poisoned_memory
):
    _assert_is_the_twin(*_integers(tokens, heads, num_keys, key_dim, spread, device), topk)


def test_sub_keys_in_the_worst_order(sampled, redone, device, poisoned_memory):
    """The best come last, so the threshold of the first look holds for none of them."""
    _assert_is_the_twin(*_with_scores(torch.arange(900.0, device=device)), 8)
    assert redone == [2]


def test_thresholds_are_low_enough_and_not_too_low(redone, device):
    """At the sizes of real runs no read of random scores is done again."""
    torch.manual_seed(5)
    query, sub_keys = (
        torch.randn(shape, device=device) for shape in ((40, 1, 32), (2, 1, 1024, 16))
    )
    fused.product_topk(query, sub_keys, 32)
    assert redone == [0]
    assert fused.slots_of_a_half(1024, 32) == 64 and fused.slots_of_a_half(4096, 32) == 256
    assert fused.keys_of_first_look(1024, 128) == 1024
    assert fused.keys_of_first_look(4096, 128) == 11 * 128


def test_a_second_look_that_misses_scores_is_made_good(
    monkeypatch, redone, device, poisoned_memory
):
    """Fewer than K candidates: never, as long as both looks compute the same, but not wrong."""

    class Missing:
        def __getitem__(self, grid):  # type: ignore[no-untyped-def]
            return lambda *args, **kwargs: None

    monkeypatch.setattr(fused, "_candidates_kernel", Missing())
    _assert_is_the_twin(*_integers(2, 1, 200, 4, 3, device), 8)
    assert redone == [4]


@pytest.mark.parametrize("spread", [0, 1, 50], ids=["all equal", "many ties", "few ties"])
def test_one_read_a_program(spread, device, poisoned_memory):
    """As on a GPU; the interpreter computes sixteen."""
    _assert_is_the_twin(*_integers(3, 2, 100, 3, spread, device), 9, reads=1)


def test_pieces_of_tokens_are_the_whole(monkeypatch, redone, device, poisoned_memory):
    """Two tiles of tokens, then a part of one."""
    few = {"fused_block_t": 16, "fused_bytes": 2 * 16 * 16 * 32}
    chosen = choices.current().changed("product_topk", **few)
    monkeypatch.setattr(choices, "current", lambda: chosen)
    assert fused.tokens_of_a_piece(20, 1, 4) == 32
    _assert_is_the_twin(*_integers(37, 1, 20, 2, 2, device), 4)
    assert len(redone) == 2


def test_candidates_take_at_most_64_mb():
    for num_keys in (128, 1024, 16384, 46340):
        for heads in (1, 4, 16):
            tokens = fused.tokens_of_a_piece(num_keys, heads, 32)
            slots = 2 * heads * fused.slots_of_a_half(num_keys, 32) * 8
            assert tokens % 128 == 0 and tokens * slots <= 2**26


@pytest.mark.parametrize(("topk", "dtype"), [(4, torch.float64), (65, torch.float32)], ids=str)
def test_what_it_cannot_compute_goes_to_the_reference(topk, dtype, monkeypatch, device):
    monkeypatch.setenv(forms.ENVIRONMENT, "product_topk=fused")
    monkeypatch.setattr(fused, "product_topk", None)
    query, sub_keys = (x.to(dtype) for x in _integers(2, 1, 130, 3, 5, device))
    scores, rows = product_topk(query / 3, sub_keys, topk)
    true_scores, true_rows = reference(query / 3, sub_keys, topk)
    assert scores.dtype == dtype
    assert torch.equal(scores, true_scores) and torch.equal(rows, true_rows)
