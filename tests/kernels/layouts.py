"""Which thread of a program holds which element of a tensor, from the layout in its TTGIR type."""

import re

_BLOCKED = re.compile(
    r"#ttg\.blocked<\{sizePerThread = \[(.*?)\], threadsPerWarp = \[(.*?)\], "
    r"warpsPerCTA = \[(.*?)\]"
)
_LINEAR = re.compile(r"#ttg\.linear<\{register = (.*?), lane = (.*?), warp = (.*?), block = ")
_SLICE = re.compile(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>")

Bases = list[tuple[int, ...]]
"""What each bit of a number adds, without carry, to the coordinates of an element."""


def encoding_of(type_text: str) -> str | None:
    """The layout in the text of a type; None for a scalar."""
    match = re.match(r"tensor<.*?, (#.*)>$", type_text)
    return match[1] if match else None


def without_encodings(text: str) -> str:
    """A text without the layouts of the types in it."""
    while match := re.search(r", #[\w.]+", text):
        end = match.end()
        if text[end : end + 1] == "<":
            depth = 0
            while True:
                depth += (text[end] == "<") - (text[end] == ">")
                end += 1
                if depth == 0:
                    break
        text = text[: match.start()] + text[end:]
    return text


def is_owned(type_text: str, aliases: dict[str, str]) -> bool:
    """Whether no two threads provably hold one element; False for scalars and unknown layouts."""
    encoding = encoding_of(type_text)
    if encoding is None:
        return False
    shape = _shape(type_text)
    bases = _bases(encoding, shape, aliases)
    if bases is None:
        return False
    registers, threads = bases
    # the number of an element, and of a thread and its register, are vectors of bits
    numbers = [_number(basis, shape) for basis in registers]
    held = _rank(numbers)
    return _rank(numbers + [_number(basis, shape) for basis in threads]) == held + len(threads)


def long_axes(type_text: str) -> set[int]:
    """The axes of a tensor that have more than one element."""
    return {axis for axis, size in enumerate(_shape(type_text)) if size > 1}


def _shape(type_text: str) -> list[int]:
    return [int(size) for size in re.findall(r"(\d+)x", type_text.split(",")[0])]


def _bases(encoding: str, shape: list[int], aliases: dict[str, str]) -> tuple[Bases, Bases] | None:
    """Those of the bits of a register's number and of a thread's; None for other layouts."""
    encoding = aliases.get(encoding, encoding)
    if match := _SLICE.match(encoding):
        dim = int(match[1])
        parent = _bases(match[2], [*shape[:dim], 1, *shape[dim:]], aliases)
        if parent is None:
            return None
        registers, threads = ([b[:dim] + b[dim + 1 :] for b in bases] for bases in parent)
        return registers, threads
    if match := _BLOCKED.match(encoding):
        sizes = [[int(size) for size in text.split(",")] for text in match.groups()]
        registers, threads = [], []
        for dim in range(len(shape)):
            unit = 1
            for size, bases in zip(
                (row[dim] for row in sizes), (registers, threads, threads), strict=True
            ):
                while size > 1:
                    bases.append(tuple(unit * (d == dim) for d in range(len(shape))))
                    unit, size = unit * 2, size // 2
        return registers, threads
    if match := _LINEAR.match(encoding):
        registers, lanes, warps = (
            [
                tuple(int(x) for x in basis.split(","))
                for basis in re.findall(r"\[([\d, ]+)\]", text)
            ]
            for text in match.groups()
        )
        return registers, lanes + warps
    return None


def _number(basis: tuple[int, ...], shape: list[int]) -> int:
    """The element of a tensor of this shape, whose sizes are powers of two; outside, it wraps."""
    number = 0
    for coordinate, size in zip(basis, shape, strict=True):
        number = number * size + coordinate % size
    return number


def _rank(vectors: list[int]) -> int:
    """Of vectors of bits, over the field of two elements."""
    pivots: list[int] = []
    for vector in vectors:
        for pivot in pivots:
            vector = min(vector, vector ^ pivot)
        if vector:
            pivots.append(vector)
    return len(pivots)
