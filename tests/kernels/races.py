"""Finds races between the threads of one program in the TTGIR of a compiled kernel.

Triton's interpreter runs a program as one thread, so it cannot see that a GPU spreads it over warps
which wait for each other only at barriers. TTGIR, the last form in which loads and stores still
name their tensors, says which thread holds which element. The rules are:

    race   A barrier is needed between a load and a later store of one argument, between a store and
           a later load, and between two stores, unless each address provably belongs to one thread:
           both have the same address for the same element, one layout, and no element is held by
           two threads. A tensor smaller than the program is held by several; a scalar is loaded by
           all and stored by one. No barrier is needed either where what is stored to an element
           was computed from what was loaded from it, as the store waits for that, whichever
           thread it is in. In a program of one warp only a load after a store needs a barrier.
    call   A function that was not inlined may lay its shared memory over that of its caller.

Different arguments are assumed not to overlap: the host functions never pass a tensor twice where a
kernel writes to it. An address that grows with the variable of a loop is assumed to differ from one
iteration to the next if the step is at least as long as every range in it: a walk over tiles, in
contrast to a sliding window.

Only tl.debug_barrier counts as a barrier (`gpu.barrier` in Triton 3.6, `ttg.barrier all` in 3.9).
Reductions and changes of layout may go through shared memory and wait there, but whether they do
depends on the layouts. What the check cannot follow, it reports: a pointer that comes from no
argument, an operation it does not know, a copy that runs on while the program goes on.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tests.kernels.layouts import encoding_of, is_owned, long_axes, without_encodings
from tests.kernels.ttgir import VALUE, Block, Op, parse

COPIES = {"ttg.async_copy_global_to_local"}
LOADS = {"tt.load", *COPIES}
STORES = {"tt.store"}
ATOMICS = {"tt.atomic_rmw", "tt.atomic_cas"}
ACCESSES = LOADS | STORES | ATOMICS
LOOPS = {"scf.for", "scf.while"}
CONTROL = LOOPS | {"scf.if", "scf.yield", "scf.condition", "cf.br", "cf.cond_br", "tt.func"}
# the pointers they give are their first operand's, moved, or either of two
POINTERS = {
    "arith.select",
    "tt.addptr",
    "tt.bitcast",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.splat",
    "tt.trans",
    "tt.unsplat",
    "ttg.convert_layout",
}
# functions of their operands and nothing else, beside those of the dialects arith and math
FUNCTIONS = POINTERS | {"tt.make_range", "tt.get_program_id", "tt.get_num_programs", "tt.mulhiui"}
# each element of their results is a function of the same element of their operands
ELEMENTWISE = {
    "tt.bitcast",
    "tt.fp_to_fp",
    "tt.precise_divf",
    "tt.precise_sqrt",
    "tt.approx_divf",
} | {
    "tt.clampf",
    "tt.mulhiui",
    "ttg.convert_layout",
}
# what grows with a loop variable still does so behind these
GROWING = POINTERS - {"arith.select"} | {
    "arith.addi",
    "arith.extsi",
    "arith.extui",
    "arith.index_cast",
    "arith.muli",
}


class Race(NamedTuple):
    argument: str
    """Of the kernel; empty where the kernel as a whole is at fault."""
    message: str


class Expression(NamedTuple):
    """A value as a function of others; those of one key are the same, whatever their layouts."""

    key: int
    changing: frozenset[str] = frozenset()
    """The values in it that may differ each time the program comes by, loop variables apart."""
    variables: frozenset[Op] = frozenset()
    """The loops whose variables it grows with."""
    extent: int = 0
    """Length of the longest range in it."""
    axes: frozenset[int] = frozenset()
    """The axes of a tensor along which it changes."""


@dataclass(frozen=True)
class Access:
    op: Op
    arguments: frozenset[str]
    address: Expression
    encoding: str | None
    owned: bool
    """Whether no two threads hold one element."""

    @property
    def reads(self) -> bool:
        return self.op.name not in STORES

    @property
    def writes(self) -> bool:
        return self.op.name not in LOADS

    def __str__(self) -> str:
        verb = "updated" if self.reads and self.writes else "loaded" if self.reads else "stored"
        return f"{verb} at {self.op.where}"


class Pending(NamedTuple):
    """An access that no barrier has followed yet."""

    access: Access
    repeated: frozenset[Op] = frozenset()
    """Loops around it that have come to a later iteration since."""
    left: frozenset[Op] = frozenset()
    """Loops around it that have ended since."""


State = frozenset[Pending]


def find_races(ttgir: str, arguments: list[str]) -> list[Race]:
    """What the rules of this module find in a kernel, each once.

    Args:
        arguments: names of the arguments, as the text has those of the last variable they went to.

    Raises:
        ValueError: the kernel has another number of arguments, or the text is not TTGIR.
    """
    return sorted(_Kernel(ttgir, arguments).check())


class _Kernel:
    def __init__(self, ttgir: str, arguments: list[str]) -> None:
        module = parse(ttgir)
        self.num_warps, self.aliases = module.num_warps, module.aliases
        self.races: set[Race] = set()
        # the one that is launched comes first
        self.function, *self.others = sorted(
            module.functions, key=lambda function: " public " not in function.text
        )
        values = self.function.blocks[0].arguments
        self.parameters = dict(zip(values, arguments, strict=True))
        # where each value comes from: an operation and a result, or a block and an argument
        self.sources: dict[str, tuple[Op | Block, Op, int]] = {}
        self.around: dict[Op | str, frozenset[Op]] = {}
        self._survey(self.function, frozenset())
        self.keys: dict[object, int] = {}
        self.expressions: dict[str, Expression] = {}
        self.stored = self._arguments_of(STORES | ATOMICS)
        self.accesses: dict[Op, Access] = {}

    def _survey(self, op: Op, around: frozenset[Op]) -> None:
        if op.name in LOOPS:
            around |= {op}
        for block in op.blocks:
            for i, name in enumerate(block.arguments):
                self.sources[name], self.around[name] = (block, op, i), around
            for inner in block.ops:
                self.around[inner] = around
                for i, name in enumerate(inner.results):
                    self.sources[name], self.around[name] = (inner, inner, i), around
                self._survey(inner, around)

    def _report(self, message: str, arguments: Iterable[str] = ("",)) -> None:
        self.races |= {Race(argument, message) for argument in arguments}

    def check(self) -> set[Race]:
        for function in self.others:
            name = re.search(r'@"?([^"(]+)', function.text)[1]
            self._report(f"{name} is a function that was not inlined")
        for op in self.function.walk():
            self._check_op(op)
        self._run_function()
        return self.races

    def _check_op(self, op: Op) -> None:
        if op.name == "tt.call":
            self._report(f"a function that was not inlined is called at {op.where}")
        elif op.name in ACCESSES:
            roots = self._roots(op.operands[0])
            if not roots or not roots <= self.parameters.keys():
                self._report(f"the pointer used at {op.where} comes from no argument")
            type_text, address = op.first_type, self._expression(op.operands[0])
            self.accesses[op] = Access(
                op,
                frozenset(self.parameters[root] for root in roots & self.parameters.keys()),
                address,
                encoding_of(type_text),
                is_owned(type_text, self.aliases) and address.axes >= long_axes(type_text),
            )
            if op.name in COPIES and roots & self.stored:
                self._report(
                    f"copied at {op.where} while the program goes on", self.accesses[op].arguments
                )
        elif op.name in ("tt.reduce", "tt.scan"):
            if any(inner.name in ACCESSES for inner in op.walk()):
                self._report(f"{op.name} at {op.where} uses memory")
        elif op.name not in CONTROL | POINTERS and (
            op.regions or "!tt.ptr" in op.text or "tensordesc" in op.text
        ):
            self._report(f"{op.name} at {op.where} is not known to this check")

    # ---- where a pointer comes from

    def _arguments_of(self, names: set[str]) -> set[str]:
        ops = [op for op in self.function.walk() if op.name in names]
        return {root for op in ops for root in self._roots(op.operands[0])}

    def _roots(self, value: str) -> set[str]:
        """The values that a pointer may have begun as."""
        roots, seen, pending = set(), set(), [value]
        while pending:
            value = pending.pop()
            if value not in seen:
                seen.add(value)
                origins = self._origins(value)
                pending += origins
                if not origins:
                    roots.add(value)
        return roots

    def _origins(self, value: str) -> list[str]:
        """The pointers that a pointer is made of."""
        source, op, i = self.sources[value]
        if isinstance(source, Block):
            if op.name == "scf.for" and i > 0:
                return [op.operands[2 + i], _last(op, 0).operands[i - 1]]
            if op.name == "scf.while" and source is op.regions[0][0]:
                return [op.operands[i], _last(op, 1).operands[i]]
            if op.name == "scf.while":
                return [_last(op, 0).operands[1 + i]]
            return []
        if op.name == "scf.for":
            return [op.operands[3 + i], _last(op, 0).operands[i]]
        if op.name == "scf.while":
            return [_last(op, 0).operands[1 + i]]
        if op.name == "scf.if":
            return [_last(op, region).operands[i] for region in range(len(op.regions))]
        if op.name == "arith.select":
            return op.operands[1:]
        return op.operands[:1] if op.name in POINTERS else []

    # ---- what an address is a function of

    def _expression(self, value: str) -> Expression:
        if value not in self.expressions:
            self.expressions[value] = self._express(value)
        return self.expressions[value]

    def _key(self, *parts: object) -> int:
        return self.keys.setdefault(parts, len(self.keys))

    def _express(self, value: str) -> Expression:
        source, op, i = self.sources[value]
        if value in self.parameters:
            return Expression(self._key("argument", value))
        if isinstance(source, Block) and op.name == "scf.for" and i == 0:
            bounds = [self._expression(bound) for bound in op.operands[:3]]
            key = self._key("variable", *(bound.key for bound in bounds))
            changing = frozenset().union(*(bound.changing for bound in bounds))
            return Expression(key, changing, frozenset({op}))
        if isinstance(source, Block) or not self._is_function(op):
            return Expression(self._key("value", value), frozenset({value}))
        if op.name == "ttg.convert_layout":
            return self._expression(op.operands[0])
        operands = [self._expression(operand) for operand in op.operands]
        form = without_encodings(VALUE.sub("%", op.text))
        key = self._key(form, i, *(operand.key for operand in operands))
        changing = frozenset().union(*(operand.changing for operand in operands))
        variables = frozenset().union(*(operand.variables for operand in operands))
        if variables and op.name not in GROWING:
            changing, variables = changing | {value}, frozenset()
        extent = max((operand.extent for operand in operands), default=0)
        axes = frozenset().union(*(operand.axes for operand in operands))
        if op.name == "tt.make_range":
            end, start = (
                int(re.search(rf"{name} = (\d+)", op.text)[1]) for name in ("end", "start")
            )
            extent, axes = end - start, frozenset({0})
        elif op.name == "tt.expand_dims":
            new = int(re.search(r"axis = (\d+)", op.text)[1])
            axes = frozenset(axis + (axis >= new) for axis in axes)
        elif op.name in ("tt.reshape", "tt.trans"):
            # which axis becomes which is not followed
            axes = frozenset()
        return Expression(key, changing, variables, extent, axes)

    def _is_function(self, op: Op) -> bool:
        if op.name == "tt.load":
            # of memory that does not change
            return not self._roots(op.operands[0]) & self.stored
        return not op.regions and (
            op.name in FUNCTIONS or op.name.partition(".")[0] in ("arith", "math")
        )

    def _constant(self, value: str) -> int | None:
        source, op, _ = self.sources[value]
        match = re.match(r"arith\.constant (-?\d+) :", op.text)
        return int(match[1]) if match and source is op else None

    # ---- the order of things

    def _run_function(self) -> None:
        blocks = {block.label: block for block in self.function.blocks}
        order = list(blocks)
        states: dict[str, State] = {label: frozenset() for label in order}
        for label, block in blocks.items():
            state = self._run(block, states[label])
            for target in re.findall(r"\^\w+", block.ops[-1].text):
                states[target] |= state
                if order.index(target) <= order.index(label) and not _ends(blocks[target]):
                    self._report(
                        f"{block.ops[-1].where} goes back, which this check does not follow"
                    )

    def _run(self, block: Block, state: State) -> State:
        """The accesses that no barrier has followed when the block ends."""
        for op in block.ops:
            if op.name == "gpu.barrier" or re.match(r"ttg\.barrier all\b", op.text):
                state = frozenset()
            elif op in self.accesses:
                access = self.accesses[op]
                for pending in state:
                    self._meet(pending, access)
                state |= {Pending(access)}
            elif op.name == "scf.if":
                without_else = state if len(op.regions) == 1 else frozenset()
                state = without_else.union(*(self._run(block, state) for block in op.blocks))
            elif op.name in LOOPS:
                state = self._run_loop(op, state)
        return state

    def _run_loop(self, loop: Op, before: State) -> State:
        inside, after, reached = before, before, None
        while reached != inside:
            reached = inside
            # a while loop leaves from its first region, a for loop from its only one
            after = self._run(loop.regions[0][0], inside)
            again = self._run(loop.regions[1][0], after) if len(loop.regions) > 1 else after
            inside |= {
                pending._replace(repeated=pending.repeated | {loop})
                if loop in self.around[pending.access.op]
                else pending
                for pending in again
            }
        if loop.name == "scf.for" and not self._runs_once(loop):
            after |= before
        return frozenset(
            pending._replace(left=pending.left | {loop})
            if loop in self.around[pending.access.op]
            else pending
            for pending in after
        )

    def _runs_once(self, loop: Op) -> bool:
        lower, upper = (self._constant(bound) for bound in loop.operands[:2])
        return lower is not None and upper is not None and lower < upper

    def _meet(self, pending: Pending, later: Access) -> None:
        earlier = pending.access
        both = earlier.arguments & later.arguments
        reads_back = earlier.writes and later.reads
        if not both or not (earlier.writes or later.writes):
            return
        if {earlier.op.name, later.op.name} <= ATOMICS or (self.num_warps == 1 and not reads_back):
            return
        if reason := self._shared(pending, later):
            self._report(f"{earlier}, {later} with no barrier between: {reason}", both)

    def _needs(self, store: Op, load: Op) -> bool:
        """Whether each element stored is computed from the same element loaded."""
        seen, pending = set(), [store.operands[1]]
        while pending:
            value = pending.pop()
            if value in load.results:
                return True
            source, op, _ = self.sources[value]
            if value not in seen and source is op and _elementwise(op):
                pending += op.operands
            seen.add(value)
        return False

    def _shared(self, pending: Pending, later: Access) -> str:
        """Why two accesses may meet at an address of two threads; nothing if they cannot."""
        earlier, address = pending.access, later.address
        gone = pending.repeated | pending.left
        if earlier.address.key != address.key:
            return "the addresses differ"
        if any(self.around[value] & gone for value in earlier.address.changing):
            return "the addresses change"
        moved = earlier.address.variables & gone
        if moved:
            step = self._constant(next(iter(moved)).operands[2])
            if len(moved) > 1 or step is None or step < address.extent:
                return "the addresses move"
            if moved <= pending.repeated - pending.left:
                return ""
        if not gone and not later.reads and earlier.owned and self._needs(later.op, earlier.op):
            return ""
        if earlier.encoding != later.encoding:
            return "the layouts differ"
        # where several threads hold an element, the same one of them stores it each time
        if not earlier.owned and (earlier.reads or later.reads):
            return "several threads hold an element"
        return ""


def _elementwise(op: Op) -> bool:
    return op.name in ELEMENTWISE or op.name.partition(".")[0] in ("arith", "math")


def _last(op: Op, region: int) -> Op:
    return op.regions[region][-1].ops[-1]


def _ends(block: Block) -> bool:
    return all(op.name == "tt.return" for op in block.ops)
