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

from tests.kernels.addresses import (
    ATOMICS,
    COPIES,
    LOADS,
    LOOPS,
    POINTERS,
    STORES,
    Addresses,
    Expression,
)
from tests.kernels.layouts import encoding_of, is_owned, long_axes
from tests.kernels.ttgir import Block, Op, parse

ACCESSES = LOADS | STORES | ATOMICS
CONTROL = LOOPS | {"scf.if", "scf.yield", "scf.condition", "cf.br", "cf.cond_br", "tt.func"}


class Race(NamedTuple):
    argument: str
    """Of the kernel; empty where the kernel as a whole is at fault."""
    message: str


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
        self.values = Addresses(self.function)
        self.arguments = dict(zip(self.values.parameters, arguments, strict=True))
        self.accesses: dict[Op, Access] = {}

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
            self._check_access(op)
        elif op.name in ("tt.reduce", "tt.scan"):
            if any(inner.name in ACCESSES for inner in op.walk()):
                self._report(f"{op.name} at {op.where} uses memory")
        elif op.name not in CONTROL | POINTERS and (
            op.regions or "!tt.ptr" in op.text or "tensordesc" in op.text
        ):
            self._report(f"{op.name} at {op.where} is not known to this check")

    def _check_access(self, op: Op) -> None:
        roots = self.values.roots(op.operands[0])
        if not roots <= self.arguments.keys():
            self._report(f"the pointer used at {op.where} comes from no argument")
        type_text, address = op.first_type, self.values.expression(op.operands[0])
        access = Access(
            op,
            frozenset(self.arguments[root] for root in roots & self.arguments.keys()),
            address,
            encoding_of(type_text),
            is_owned(type_text, self.aliases) and address.axes >= long_axes(type_text),
        )
        self.accesses[op] = access
        if op.name in COPIES and roots & self.values.stored:
            self._report(f"copied at {op.where} while the program goes on", access.arguments)

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
                pending._replace(repeated=pending.repeated | self._around(pending, loop))
                for pending in again
            }
        if loop.name == "scf.for" and not self._runs_once(loop):
            after |= before
        return frozenset(
            pending._replace(left=pending.left | self._around(pending, loop)) for pending in after
        )

    def _around(self, pending: Pending, loop: Op) -> frozenset[Op]:
        """The loop, if it is one around the access."""
        return self.values.around[pending.access.op] & {loop}

    def _runs_once(self, loop: Op) -> bool:
        lower, upper = (self.values.constant(bound) for bound in loop.operands[:2])
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

    def _shared(self, pending: Pending, later: Access) -> str:
        """Why two accesses may meet at an address of two threads; nothing if they cannot."""
        earlier, address = pending.access, later.address
        gone = pending.repeated | pending.left
        if earlier.address.key != address.key:
            return "the addresses differ"
        if any(self.values.around[value] & gone for value in earlier.address.changing):
            return "the addresses change"
        moved = earlier.address.variables & gone
        if moved:
            step = self.values.constant(next(iter(moved)).operands[2])
            if len(moved) > 1 or step is None or step < address.extent:
                return "the addresses move"
            if moved <= pending.repeated - pending.left:
                return ""
        waits = not later.reads and any(
            self.values.is_computed_from(later.op.operands[1], loaded)
            for loaded in earlier.op.results
        )
        if waits and earlier.owned and not gone:
            return ""
        if earlier.encoding != later.encoding:
            return "the layouts differ"
        # where several threads hold an element, the same one of them stores it each time
        if not earlier.owned and (earlier.reads or later.reads):
            return "several threads hold an element"
        return ""


def _ends(block: Block) -> bool:
    return all(op.name == "tt.return" for op in block.ops)
