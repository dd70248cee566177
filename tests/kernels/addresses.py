"""Where the pointers of a kernel come from, and what their addresses are functions of."""

import re
from typing import NamedTuple

from tests.kernels.layouts import without_encodings
from tests.kernels.ttgir import VALUE, Block, Op

COPIES = {"ttg.async_copy_global_to_local"}
LOADS = {"tt.load", *COPIES}
STORES = {"tt.store"}
ATOMICS = {"tt.atomic_rmw", "tt.atomic_cas"}
LOOPS = {"scf.for", "scf.while"}
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
# each element of their results is a function of the same element of their operands, as with the
# operations of the dialects arith and math
ELEMENTWISE = {
    "tt.approx_divf",
    "tt.bitcast",
    "tt.clampf",
    "tt.fp_to_fp",
    "tt.mulhiui",
    "tt.precise_divf",
    "tt.precise_sqrt",
    "ttg.convert_layout",
}
FUNCTIONS = POINTERS | ELEMENTWISE | {"tt.make_range", "tt.get_program_id", "tt.get_num_programs"}
# what grows with a loop variable still does so behind these
GROWING = POINTERS - {"arith.select"} | {
    "arith.addi",
    "arith.extsi",
    "arith.extui",
    "arith.index_cast",
    "arith.muli",
}


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


class Addresses:
    """The values of a function, by name."""

    def __init__(self, function: Op) -> None:
        self.parameters = function.blocks[0].arguments
        # where each value comes from: an operation and a result, or a block and an argument
        self.sources: dict[str, tuple[Op | Block, Op, int]] = {}
        # the loops around each operation and each value
        self.around: dict[Op | str, frozenset[Op]] = {}
        self._survey(function, frozenset())
        self.keys: dict[object, int] = {}
        self.expressions: dict[str, Expression] = {}
        self.stored = {
            root
            for op in function.walk()
            if op.name in STORES | ATOMICS
            for root in self.roots(op.operands[0])
        }

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

    def roots(self, pointer: str) -> set[str]:
        """The values that a pointer may have begun as: parameters, or what cannot be followed."""
        roots, seen, pending = set(), set(), [pointer]
        while pending:
            value = pending.pop()
            if value not in seen:
                seen.add(value)
                origins = self._origins(value)
                pending += origins
                if not origins:
                    roots.add(value)
        return roots

    def _origins(self, pointer: str) -> list[str]:
        """The pointers that a pointer is made of."""
        source, op, i = self.sources[pointer]
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

    def expression(self, value: str) -> Expression:
        if value not in self.expressions:
            self.expressions[value] = self._express(value)
        return self.expressions[value]

    def _express(self, value: str) -> Expression:
        source, op, i = self.sources[value]
        if value in self.parameters:
            return Expression(self._key("parameter", value))
        if isinstance(source, Block) and op.name == "scf.for" and i == 0:
            bounds = [self.expression(bound) for bound in op.operands[:3]]
            key = self._key("variable", *(bound.key for bound in bounds))
            changing = frozenset().union(*(bound.changing for bound in bounds))
            return Expression(key, changing, frozenset({op}))
        if isinstance(source, Block) or not self._is_function(op):
            return Expression(self._key("value", value), frozenset({value}))
        if op.name == "ttg.convert_layout":
            return self.expression(op.operands[0])
        operands = [self.expression(operand) for operand in op.operands]
        form = without_encodings(VALUE.sub("%", op.text))
        changing = frozenset().union(*(operand.changing for operand in operands))
        variables = frozenset().union(*(operand.variables for operand in operands))
        if variables and op.name not in GROWING:
            changing, variables = changing | {value}, frozenset()
        extent = max((operand.extent for operand in operands), default=0)
        axes = frozenset().union(*(operand.axes for operand in operands))
        if op.name == "tt.make_range":
            extent, axes = _number(op, "end") - _number(op, "start"), frozenset({0})
        elif op.name == "tt.expand_dims":
            axes = frozenset(axis + (axis >= _number(op, "axis")) for axis in axes)
        elif op.name in ("tt.reshape", "tt.trans"):
            # which axis becomes which is not followed
            axes = frozenset()
        key = self._key(form, i, *(operand.key for operand in operands))
        return Expression(key, changing, variables, extent, axes)

    def _key(self, *parts: object) -> int:
        return self.keys.setdefault(parts, len(self.keys))

    def _is_function(self, op: Op) -> bool:
        """Whether the results depend on the operands and nothing else."""
        if op.name == "tt.load":
            # of memory that does not change
            return not self.roots(op.operands[0]) & self.stored
        return not op.regions and (op.name in FUNCTIONS or _is_elementwise(op))

    def constant(self, value: str) -> int | None:
        source, op, _ = self.sources[value]
        match = re.match(r"arith\.constant (-?\d+) :", op.text)
        return int(match[1]) if match and source is op else None

    def is_computed_from(self, value: str, operand: str) -> bool:
        """Whether each element of the one is computed from the same element of the other."""
        seen, pending = set(), [value]
        while pending:
            value = pending.pop()
            if value == operand:
                return True
            source, op, _ = self.sources[value]
            if value not in seen and source is op and _is_elementwise(op):
                pending += op.operands
            seen.add(value)
        return False


def _is_elementwise(op: Op) -> bool:
    return op.name in ELEMENTWISE or op.name.partition(".")[0] in ("arith", "math")


def _number(op: Op, attribute: str) -> int:
    return int(re.search(rf"\b{attribute} = (\d+)", op.text)[1])


def _last(op: Op, region: int) -> Op:
    return op.regions[region][-1].ops[-1]
