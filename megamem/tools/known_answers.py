"""Known answers: tests of every kernel at the size of a real run, on inputs with known results.

Races and out-of-bounds reads show in large runs on a GPU, but neither in small ones nor in Triton's
interpreter. `megamem doctor` and the GPU tests therefore run the ops that training calls on these
inputs, which takes a few seconds.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megamem.tools import known_reads as reads
from megamem.tools import known_steps as steps
from megamem.tools.known_steps import Form

BF16 = torch.bfloat16
NUMBERS = 2**28
"""Numbers in a table that an optimizer updates: half as many as in the runs in which a race lost
tens of millions of updates."""
KEPT_FREE = 0.9
"""Share of a GPU's free memory that an answer may take."""


@dataclass(frozen=True)
class KnownAnswer:
    """An op on inputs whose result is known."""

    name: str
    op: str
    """Its name in megamem.ops."""
    look: Callable[[torch.device, int], str | None]
    """Runs the op at a scale; returns what `check` does."""
    needs: Callable[[int], float]
    """Bytes of device memory at a scale."""

    def bytes(self, scale: int = 1) -> int:
        """Approximate peak of device memory, in bytes."""
        return int(self.needs(scale))

    def check(self, device: torch.device, scale: int = 1) -> str | None:
        """Run the op and compare its result.

        Args:
            device: where the op runs.
            scale: sizes are divided by this number; 1 is the size of a real run.

        Returns:
            None if the result is correct, else which numbers are wrong, and how many of how many.
        """
        return self.look(device, scale)


@dataclass(frozen=True)
class Outcome:
    """The result of one known answer."""

    answer: KnownAnswer
    wrong: str | None = None
    """What is wrong, or the exception that the op raised."""
    skipped: str | None = None
    """Why it was skipped: there is too little memory."""
    seconds: float = 0.0


def run(
    device: torch.device,
    scale: int = 1,
    memory: float | None = None,
    progress: Callable[[KnownAnswer], None] | None = None,
    answers: Sequence[KnownAnswer] | None = None,
) -> list[Outcome]:
    """Check known answers one after the other; an exception in one does not stop the others.

    Args:
        device: where the ops run.
        scale: sizes are divided by this number.
        memory: bytes that an answer may use. Default: the free memory of a GPU; no limit on a CPU.
        progress: called with each answer before it is checked.
        answers: the answers to check. Default: ANSWERS.

    Returns:
        The outcomes, in the order of the answers.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        # for such small tensors several threads are slower than one
        torch.set_num_threads(1)
    try:
        return [_outcome(a, device, scale, memory, progress) for a in answers or ANSWERS]
    finally:
        torch.set_num_threads(threads)


def _outcome(
    answer: KnownAnswer,
    device: torch.device,
    scale: int,
    memory: float | None,
    progress: Callable[[KnownAnswer], None] | None,
) -> Outcome:
    if progress is not None:
        progress(answer)
    started = time.perf_counter()
    try:
        available = _free_bytes(device) if memory is None else memory
        if answer.bytes(scale) > available:
            needed, free = f"{answer.bytes(scale) / 2**30:.1f} GiB", f"{available / 2**30:.1f} GiB"
            return Outcome(answer, skipped=f"it needs {needed}, and {free} are free")
        wrong = answer.check(device, scale)
        if device.type == "cuda":
            # so that an error of a kernel is raised here and not in the next answer
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        return Outcome(answer, skipped=f"it ran out of memory: {_first_line(error)}")
    except Exception as error:
        wrong = f"it fails: {type(error).__name__}: {_first_line(error)}"
    return Outcome(answer, wrong, seconds=time.perf_counter() - started)


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    torch.cuda.empty_cache()
    return KEPT_FREE * torch.cuda.mem_get_info(device)[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _topk(
    case: str,
    look: Callable[..., str | None],
    num_keys: int = 1024,
    tokens: int = 8192,
    heads: int = 4,
    topk: int = 32,
    **form: str,
) -> KnownAnswer:
    """A check of product_topk in bf16. The scale divides the tokens, not the sub-keys.

    Args:
        form: `form` or `backward_form`, where it is not the one in use.
    """
    key_dim = 512

    def checked(device: torch.device, scale: int) -> str | None:
        return look(device, max(4, tokens // scale), heads, num_keys, key_dim, topk, **form)

    def needs(scale: int) -> float:
        # queries and sub-keys, their gradients, and the reference's chunk in float64
        count = max(4, tokens // scale) * heads
        return 24 * count * (key_dim + topk) + 60 * heads * num_keys * key_dim + 3e9 / scale**0.5

    name = ", ".join((f"product_topk, N={num_keys}, C={key_dim}, K={topk}, {case}", *form.values()))
    return KnownAnswer(name, "product_topk", checked, needs)


def _tucker(
    case: str,
    look: Callable[..., str | None],
    num_keys: int = 1138,
    tokens: int = 4096,
    heads: int = 1,
    topk: int = 32,
    final_topk: int = 32,
    queries: int = 1,
    **form: str,
) -> KnownAnswer:
    """A check of tucker_topk in bf16, of rank 2. The scale divides the tokens, not the keys.

    Args:
        form: `form` or `backward_form`, where it is not the one in use.
    """
    width = 192
    sizes = (heads, num_keys, width, queries)

    def checked(device: torch.device, scale: int) -> str | None:
        return look(device, max(4, tokens // scale), sizes, topk, final_topk, **form)

    def needs(scale: int) -> float:
        # what each read keeps, keys and their gradients, and chunks in float64 with theirs
        reads_here = max(4, tokens // scale) * heads
        kept = 200 * (final_topk + 2 * topk) + 64 * width
        chunk = min(reads_here, reads.TUCKER_TOKENS * heads)
        dense = 24 * 4 * num_keys + 32 * min(topk**2, 2**14)
        return reads_here * kept + 160 * heads * num_keys * width + chunk * dense + 1e9 / scale

    shape = f"N={num_keys}, C={width}, K={topk}, F={final_topk}"
    name = ", ".join((f"tucker_topk, {shape}, {case}", *form.values()))
    return KnownAnswer(name, "tucker_topk", checked, needs)


def _bag(
    op: str, case: str, look: Callable[..., str | None], rows: int, per_number: int
) -> KnownAnswer:
    """A check with 8192 bags of 128 lookups of a bf16 table of width 2048.

    The scale divides bags and rows.

    Args:
        op: its name in megamem.ops.
        case: words for the name of the answer.
        look: the check.
        rows: rows of the table.
        per_number: bytes held for each number of the table, including the table's own 2.
    """
    tokens, lookups, width = 8192, 128, 2048

    def sizes(scale: int) -> tuple[int, int, int, int]:
        each = max(8, lookups // max(1, scale // 1024))
        return max(4, tokens // scale), each, max(64, rows // scale), width

    def checked(device: torch.device, scale: int) -> str | None:
        return look(device, *sizes(scale))

    def needs(scale: int) -> float:
        bags, each, held, width = sizes(scale)
        chunk = min(reads.CHUNK, bags * each * width)
        return held * width * per_number + bags * width * 16 + bags * each * 80 + 24 * chunk

    return KnownAnswer(f"{op}, R={rows}, V={width}, {case}", op, checked, needs)


def _step(
    op: str, case: str, look: Callable[..., str | None], form: Form, width: int = 2048
) -> KnownAnswer:
    """A check of an optimizer step on a table of NUMBERS numbers. The scale divides its rows."""

    def rows(scale: int) -> int:
        return max(1, NUMBERS // width // scale // steps.BLOCK) * steps.BLOCK

    def checked(device: torch.device, scale: int) -> str | None:
        return look(device, rows(scale), width, op, form)

    def needs(scale: int) -> float:
        return rows(scale) * width * 24 + 32 * min(steps.CHUNK, rows(scale) * width)

    return KnownAnswer(f"{op}, V={width}, {case}", op, checked, needs)


def _placement(num_keys: int) -> KnownAnswer:
    """A check of place_rows and unplace_rows. The scale divides the rows."""

    def keys(scale: int) -> int:
        return max(8, int(num_keys / scale**0.5))

    return KnownAnswer(
        f"place_rows, N={num_keys}",
        "place_rows",
        lambda device, scale: reads.placement_is_a_bijection(device, keys(scale)),
        lambda scale: 80 * keys(scale) ** 2,
    )


_dense = partial(_step, look=steps.dense_step_is_right)
_lazy = partial(_step, look=steps.touched_step_is_right)
_marked = partial(_step, look=steps.marked_step_is_right)
_norm = partial(_step, look=steps.norm_is_right)
RANDOM = Form(BF16)
ROW = Form(BF16, second="row")
NONE = Form(first=False, second="")

ANSWERS: tuple[KnownAnswer, ...] = (
    _topk("whole numbers", reads.topk_is_exact),
    _topk("whole numbers", reads.topk_is_exact, num_keys=128),
    _topk("whole numbers", reads.topk_is_exact, num_keys=4096, tokens=2048),
    _topk("whole numbers", reads.topk_is_exact, num_keys=16384, tokens=1024, heads=1),
    _topk("whole numbers", reads.topk_is_exact, tokens=1024, topk=64),
    _topk("whole numbers", reads.topk_is_exact, tokens=1024, topk=128),
    _topk("normal", reads.topk_is_within_rounding, tokens=2048),
    _topk("all scores equal", reads.topk_breaks_ties, tokens=1024),
    _topk("one sub-key NaN", reads.topk_shows_nan, tokens=1024),
    _topk("gradients", reads.topk_has_gradients),
    _topk("whole numbers", reads.topk_is_exact, form="fused"),
    _topk("whole numbers", reads.topk_is_exact, num_keys=128, form="fused"),
    _topk("whole numbers", reads.topk_is_exact, num_keys=4096, tokens=2048, form="fused"),
    _topk("whole numbers", reads.topk_is_exact, tokens=1024, topk=64, form="fused"),
    _topk("normal", reads.topk_is_within_rounding, tokens=2048, form="fused"),
    _topk("all scores equal", reads.topk_breaks_ties, tokens=1024, form="fused"),
    _topk("one sub-key NaN", reads.topk_shows_nan, tokens=1024, form="fused"),
    _topk("gradients", reads.topk_has_gradients, backward_form="dense"),
    *(
        answer
        for form in ("torch", "triton")
        for answer in (
            _tucker("whole numbers", reads.tucker_is_exact, form=form),
            _tucker("heads", reads.tucker_is_exact, 808, 2048, 2, 42, 80, form=form),
            _tucker("whole numbers", reads.tucker_is_exact, 960, 1024, 1, 128, 768, 2, form=form),
            _tucker("all scores equal", reads.tucker_breaks_ties, tokens=512, form=form),
            _tucker("one key NaN", reads.tucker_shows_nan, tokens=512, form=form),
            _tucker("gradients", reads.tucker_has_gradients, tokens=2048, backward_form=form),
            _tucker(
                "gradients", reads.tucker_has_gradients, 808, 512, 2, 64, 256, 2, backward_form=form
            ),
        )
    ),
    KnownAnswer(
        "leading_directions, ranks 1 to 4",
        "leading_directions",
        lambda device, scale: reads.directions_are_leading(device, max(8, 1024 // scale)),
        lambda scale: 2**20,
    ),
    _bag("embedding_bag", "forward", reads.bags_are_exact, 2**20, 3),
    _bag("embedding_bag", "backward into fp32", reads.bag_gradients_are_exact, 2**18, 14),
    _bag("embedding_bag", "first touch of fp32", reads.first_gradients_are_exact, 2**18, 22),
    _bag("embedding_bag", "merged into fp32", reads.merged_gradients_are_exact, 2**18, 22),
    _bag("embedding_bag", "several weights, forward", reads.bags_of_cores_are_exact, 2**20, 4),
    _bag(
        "embedding_bag", "several weights, backward", reads.gradients_of_cores_are_exact, 2**18, 24
    ),
    _bag("sparse_gradients", "touched rows", reads.sparse_gradients_are_exact, 2**18, 14),
    _bag("sort_lookups", "both forms", reads.sort_is_exact, 2**20, 0),
    _bag("row_dot", "forward and backward", reads.row_dots_are_exact, 2**18, 14),
    _dense("adamw_", "fp32 master and bf16 copy, clearing", form=Form(copy=True)),
    _dense("adamw_", "fp32 master and bf16 copy, clearing", form=Form(copy=True), width=1024),
    _norm("squared_norm", "whole numbers", form=Form()),
    _norm("squared_norm", "whole numbers", form=Form(BF16), width=1000),
    _dense("adamw_", "fp32 alone, clearing", form=Form()),
    _dense("adamw_", "bf16 rounded at random, clearing", form=RANDOM),
    _dense(
        "rowwise_adamw_", "fp32 master and bf16 copy, clearing", form=Form(copy=True, second="row")
    ),
    _dense("rowwise_adamw_", "bf16 rounded at random, clearing", form=ROW),
    _dense("rowwise_adamw_", "bf16 rounded at random, clearing", form=ROW, width=512),
    _dense(
        "sgd_", "fp32 master and bf16 copy, clearing", form=Form(copy=True, first=False, second="")
    ),
    _dense("sgd_", "bf16 rounded at random, clearing", form=Form(BF16, first=False, second="")),
    _lazy("touched_adamw_", "fp32 master and bf16 copy", form=Form(copy=True)),
    _lazy("touched_adamw_", "fp32 alone", form=Form(), width=1024),
    _lazy("touched_adamw_", "bf16 rounded at random, a moment per row", form=ROW),
    _marked("touched_adamw_", "fp32 master and bf16 copy, by flags", form=Form(copy=True)),
    _marked("touched_adamw_", "bf16 rounded at random, a moment per row, by flags", form=ROW),
    _lazy(
        "touched_sgd_", "fp32 master and bf16 copy", form=Form(copy=True, first=False, second="")
    ),
    _marked("touched_sgd_", "bf16, by flags", form=Form(BF16, first=False, second="")),
    _placement(1024),
    _placement(4096),
    _placement(1000),
)
