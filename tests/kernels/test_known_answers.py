"""The known answers: every op gives them, and an op that is wrong as ops were on GPUs does not.

On a GPU they are asked for at the size of a real run (pytest -m gpu); here of plain torch at a
small fraction of it, and where that is cheap of the kernels in Triton's interpreter.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamem import ops
from megamem.tools import known_answers
from megamem.tools.known_answers import ANSWERS, KnownAnswer, run

CPU = torch.device("cpu")
SMALL, SMALLEST = 4096, 16384
INTERPRETED = (
    "product_topk, N=128, C=512, K=32, whole numbers",
    "product_topk, N=128, C=512, K=32, whole numbers, fused",
    "tucker_topk, N=1138, C=192, K=32, F=32, whole numbers, triton",
    "embedding_bag, R=1048576, V=2048, forward",
    "embedding_bag, R=262144, V=2048, backward into fp32",
    "embedding_bag, R=262144, V=2048, first touch of fp32",
    "embedding_bag, R=262144, V=2048, merged into fp32",
    "row_dot, R=262144, V=2048, forward and backward",
    "sort_lookups, R=1048576, V=2048, both forms",
    "adamw_, V=2048, fp32 master and bf16 copy, clearing",
    "rowwise_adamw_, V=512, bf16 rounded at random, clearing",
    "squared_norm, V=2048, whole numbers",
    "squared_norm, V=1000, whole numbers",
    "touched_adamw_, V=2048, fp32 master and bf16 copy",
    "touched_adamw_, V=2048, fp32 master and bf16 copy, by flags",
    "touched_sgd_, V=2048, fp32 master and bf16 copy",
    "touched_sgd_, V=2048, bf16, by flags",
    "place_rows, N=1000",
)
by_name = pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.name)


@pytest.fixture
def on_the_twins(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@by_name
def test_at_the_size_of_a_real_run(answer: KnownAnswer) -> None:
    device = torch.device("cuda")
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (outcome,) = run(device, answers=[answer])
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.wrong is None
    assert torch.cuda.max_memory_allocated() - held <= answer.bytes()


@pytest.mark.usefixtures("on_the_twins")
@by_name
def test_plain_torch_gives_it(answer: KnownAnswer) -> None:
    (outcome,) = run(CPU, SMALL, answers=[answer])
    assert outcome.wrong is None and outcome.skipped is None


@pytest.mark.parametrize("name", INTERPRETED)
def test_the_interpreted_kernel_gives_it(name: str) -> None:
    (answer,) = (a for a in ANSWERS if a.name == name)
    (outcome,) = run(CPU, SMALLEST, answers=[answer])
    assert outcome.wrong is None and outcome.skipped is None


def _some(rows: Tensor) -> Tensor:
    """Every seventh, and never none."""
    return rows[::7]


# what went wrong on a GPU, or would be as silent


def clears_before_it_has_read(right: Callable[..., None]) -> Callable[..., None]:
    def step(weights: Tensor, grads: Tensor, *rest: Any) -> None:
        *_, options = rest
        # four columns that one warp clears before another reads them
        grads[_some(options.touched_r.nonzero().squeeze(1)), 8:12] = 0
        right(weights, grads, *rest)

    return step


def forgets_to_clear(right: Callable[..., None]) -> Callable[..., None]:
    def step(weights: Tensor, grads: Tensor, *rest: Any) -> None:
        *_, options = rest
        right(weights, grads, *rest)
        grads[-1, -1] = 1.0 if options.touched_r[-1] else 0.0

    return step


def leaves_the_copy(right: Callable[..., None]) -> Callable[..., None]:
    def step(*arguments: Any) -> None:
        *state, options = arguments
        part = None if options.copy_rV is None else options.copy_rV.clone()
        right(*state, replace(options, copy_rV=part))
        if part is not None:
            options.copy_rV[:-1] = part[:-1]

    return step


def reads_counters_after_the_store(right: Callable[..., None]) -> Callable[..., None]:
    def step(weights, rows, grads, m, v, touches, last, options):  # type: ignore[no-untyped-def]
        late = _some(rows[rows >= 0])
        touches[late] += 1
        last[late] = options.step
        right(weights, rows, grads, m, v, touches, last, options)
        touches[late] -= 1

    return step


def reads_garbage_from_the_third_block_on(right: Callable[..., Any]) -> Callable[..., Any]:
    def topk(query: Tensor, sub_keys: Tensor, topk: int, **form: str) -> Any:
        spoiled = sub_keys.clone()
        spoiled[:, :, 128:] = torch.nan
        return right(query, spoiled, topk, **form)

    return topk


def prefers_the_larger_row_of_a_tie(right: Callable[..., Any]) -> Callable[..., Any]:
    def topk(query: Tensor, sub_keys: Tensor, topk: int, **form: str) -> Any:
        scores, rows = right(query, sub_keys.flip(2), topk, **form)
        return scores, sub_keys.shape[2] ** 2 - 1 - rows

    return topk


def puts_nan_last(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda query, keys, *rest, **form: right(
        query, keys.nan_to_num(nan=-99.0), *rest, **form
    )


def halves_a_gradient(right: Callable[..., Any]) -> Callable[..., Any]:
    def topk(query: Tensor, sub_keys: Tensor, topk: int, **form: str) -> Any:
        scores, rows = right(query, sub_keys, topk, **form)
        if scores.requires_grad:
            scores.register_hook(lambda grad: torch.cat((grad[:-1], grad[-1:] / 2)))
        return scores, rows

    return topk


def takes_the_other_sign(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda query, keys, cores, directions, *sizes, **form: right(
        query, keys, cores, -directions, *sizes, **form
    )


def gives_the_sum_of_cores(right: Callable[..., Any]) -> Callable[..., Any]:
    def topk(*given: Any, **form: str) -> Any:
        weights, rows = right(*given, **form)
        return weights.sum(-1, keepdim=True).expand_as(weights), rows

    return topk


def forgets_the_last_core(right: Callable[..., Any]) -> Callable[..., Any]:
    def topk(*given: Any, **form: str) -> Any:
        weights, rows = right(*given, **form)
        if weights.requires_grad:
            weights.register_hook(lambda grad: torch.cat((grad[..., :1], grad[..., 1:] * 0), -1))
        return weights, rows

    return topk


def keeps_no_sign(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda core, previous: right(core, previous * 0)


def is_off_by_a_little(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda core, previous: right(core, previous) + 1e-5


def misreads_the_last_lookup(right: Callable[..., Any]) -> Callable[..., Any]:
    def bag(*inputs: Tensor, **options: Any) -> Any:
        # the row ids come second or third, before the offsets
        place = next(n for n, x in enumerate(inputs) if not x.is_floating_point())
        fewer = inputs[place].clone()
        last = int((fewer >= 0).nonzero()[-1])
        fewer[last] = (fewer[last] + 1) % len(inputs[0])
        return right(*inputs[:place], fewer, *inputs[place + 1 :], **options)

    return bag


def overwrites_a_buffer(right: Callable[..., Any]) -> Callable[..., Any]:
    def bag(*inputs: Tensor, add_value_grad_to: Tensor | None = None, **options: Any) -> Any:
        if add_value_grad_to is not None:
            add_value_grad_to[0] = 0
        return right(*inputs, add_value_grad_to=add_value_grad_to, **options)

    return bag


def swaps_the_cores(right: Callable[..., Any]) -> Callable[..., Any]:
    def bag(table: Tensor, row_ids: Tensor, weights: Tensor, *sizes: Any, **options: Any) -> Any:
        if weights.dim() == 2:
            weights = weights.flip(1)
        return right(table, row_ids, weights, *sizes, **options)

    return bag


def forgets_the_gradient_of_a_piece(right: Callable[..., Any]) -> Callable[..., Any]:
    def bag(*inputs: Tensor, **options: Any) -> Any:
        bags = right(*inputs, **options)
        if bags.requires_grad and inputs[2].dim() == 2:
            bags.register_hook(lambda grad: torch.cat((grad[:, :-8], grad[:, -8:] * 0), 1))
        return bags

    return bag


def places_two_in_one_row(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda rows, num_keys, seed: right(rows // 2 * 2, num_keys, seed)


def leaves_out_the_last_row(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda grads, touched, **how: right(grads[:-1], touched[:-1], **how)


def forgets_the_order_of_equal_rows(right: Callable[..., Any]) -> Callable[..., Any]:
    def sort(row_ids: Tensor, weights: Tensor, *sizes: Any, **how: Any) -> Any:
        # positions from the last to the first
        by_row = right(row_ids.flip(0), weights.flip(0), *sizes, **how)
        return replace(by_row, order_M=len(row_ids) - 1 - by_row.order_M)

    return sort


WRONG = [
    ("adamw_", clears_before_it_has_read, "numbers of the weights"),
    ("rowwise_adamw_", clears_before_it_has_read, "numbers of the weights"),
    ("sgd_", clears_before_it_has_read, "numbers of the weights"),
    ("adamw_", forgets_to_clear, "numbers of the gradients after the step"),
    ("adamw_", leaves_the_copy, "numbers of the bf16 copy"),
    ("touched_adamw_", reads_counters_after_the_store, "numbers of the weights"),
    ("product_topk", reads_garbage_from_the_third_block_on, "row ids"),
    ("product_topk", prefers_the_larger_row_of_a_tie, "row ids of equal scores"),
    ("product_topk", puts_nan_last, "scores of a sub-key with a NaN are not NaN"),
    ("product_topk", halves_a_gradient, "numbers of the gradient of the queries"),
    ("tucker_topk", takes_the_other_sign, "row ids of pairs"),
    ("tucker_topk", gives_the_sum_of_cores, "weights"),
    ("tucker_topk", puts_nan_last, "weights of a key with a NaN"),
    ("tucker_topk", forgets_the_last_core, "numbers of the gradient of the queries"),
    ("leading_directions", keeps_no_sign, "signs of directions"),
    ("leading_directions", is_off_by_a_little, "leading directions"),
    ("embedding_bag", misreads_the_last_lookup, "numbers of the bags"),
    ("embedding_bag", overwrites_a_buffer, "numbers of the gradient buffer"),
    ("embedding_bag", swaps_the_cores, "numbers of the bags of cores by the form pieces"),
    ("embedding_bag", forgets_the_gradient_of_a_piece, "several weights a lookup, "),
    ("sparse_gradients", misreads_the_last_lookup, "touched rows are wrong"),
    ("row_dot", misreads_the_last_lookup, "dots"),
    ("row_dot", overwrites_a_buffer, "numbers of the gradient buffer"),
    ("sort_lookups", forgets_the_order_of_equal_rows, "positions of sorted lookups by the form"),
    ("squared_norm", leaves_out_the_last_row, "the sum of squares by the form torch is"),
    ("place_rows", places_two_in_one_row, "rows are not read by exactly one pair"),
]


@pytest.mark.usefixtures("on_the_twins")
@pytest.mark.parametrize(
    ("op", "fault", "says"), WRONG, ids=[f"{op} {fault.__name__}" for op, fault, _ in WRONG]
)
def test_a_wrong_kernel_is_found(
    op: str, fault: Callable[..., Any], says: str, monkeypatch
) -> None:
    monkeypatch.setattr(ops, op, fault(getattr(ops, op)))
    outcomes = run(CPU, SMALL, answers=[answer for answer in ANSWERS if answer.op == op])
    found = [outcome.wrong for outcome in outcomes if outcome.wrong]
    assert any(says in sentence for sentence in found), found


def _answer(name: str, look: Callable[..., str | None], size: float = 0) -> KnownAnswer:
    return KnownAnswer(name, "op", look, lambda scale: size)


def test_a_failure_is_a_wrong_answer_and_loses_no_other() -> None:
    def fail(device: torch.device, scale: int) -> None:
        raise RuntimeError("an illegal memory access\nand a page about it")

    def exhaust(device: torch.device, scale: int) -> None:
        raise torch.OutOfMemoryError("no room")

    tried: list[str] = []
    answers = [
        _answer("fails", fail),
        _answer("is too large", fail, 2 * 2**30),
        _answer("exhausts", exhaust),
        _answer("is wrong", lambda device, scale: f"wrong at {scale}"),
        _answer("is right", lambda device, scale: None),
    ]
    outcomes = run(CPU, 3, memory=2**30, progress=lambda a: tried.append(a.name), answers=answers)
    assert tried == [answer.name for answer in answers]
    assert [(outcome.wrong, outcome.skipped) for outcome in outcomes] == [
        ("it fails: RuntimeError: an illegal memory access", None),
        (None, "it needs 2.0 GiB, and 1.0 GiB are free"),
        (None, "it ran out of memory: no room"),
        ("wrong at 3", None),
        (None, None),
    ]


def test_every_op_has_one_and_no_two_have_one_name() -> None:
    """What optimizers and layers call; random_rows and unplace_rows are plain torch everywhere."""
    asked = {answer.op for answer in ANSWERS}
    # its kernel is the one of embedding_bag's backward into a buffer
    every = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert asked == every - {"random_rows", "unplace_rows", "add_value_gradient_"}
    assert len({answer.name for answer in ANSWERS}) == len(ANSWERS)
    assert all(0 < answer.bytes(64) <= answer.bytes() < 16 * 2**30 for answer in ANSWERS)
    assert known_answers.ANSWERS is ANSWERS
