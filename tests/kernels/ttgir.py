"""Reads the text of TTGIR, which Triton 3.6 and 3.9 print alike, into operations and regions.

Triton's own bindings do not reach the blocks of a region or the layouts of a type. MLIR prints one
operation a line, and what lies between braces belongs to the operation before; no more than that
is taken for granted of operations that the reader does not know.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")


@dataclass(eq=False)
class Block:
    label: str
    arguments: list[str]
    ops: list["Op"] = field(default_factory=list)


@dataclass(eq=False)
class Op:
    """An operation. Its values have names that no other value of the module has."""

    name: str
    results: list[str]
    operands: list[str]
    """In the order of the text."""
    text: str
    """Without results and location; values have the names that they have in the text."""
    where: str
    """File and line."""
    regions: list[list[Block]] = field(default_factory=list)

    @property
    def blocks(self) -> list[Block]:
        return [block for region in self.regions for block in region]

    def walk(self) -> Iterator["Op"]:
        """All operations inside, in the order of the text."""
        for block in self.blocks:
            for op in block.ops:
                yield op
                yield from op.walk()

    @property
    def first_type(self) -> str:
        """The first of the types after the colon, which is that of the first operand."""
        types = self.text.rpartition(" : ")[2].removeprefix("(")
        depth = 0
        for i, letter in enumerate(types):
            # an arrow closes nothing
            depth += (letter in "<({") - (letter in ">)}" and types[i - 1] != "-")
            if depth < 0 or (depth == 0 and re.match(r", | -> ", types[i:])):
                return types[:i]
        return types


@dataclass(eq=False)
class Module:
    functions: list[Op]
    aliases: dict[str, str]
    """Layouts and locations, which are written once and named."""
    num_warps: int


def parse(text: str) -> Module:
    """The functions of a module.

    Raises:
        ValueError: this is not the text of TTGIR, or not as it is known here.
    """
    return _Reader(text).module


class _Reader:
    def __init__(self, text: str) -> None:
        warps = re.search(r'"ttg\.num-warps" = (\d+)', text)
        if warps is None:
            raise ValueError("this is not TTGIR: it does not say how many warps a program has")
        self.aliases = dict(re.findall(r"^(#\w+) = (.*)$", text, flags=re.MULTILINE))
        self.stack: list[Op] = []
        # the names that are known in each region around, and what they are made unique with
        self.scopes: list[dict[str, str]] = [{}]
        self.num_values = 0
        root = Op("", [], [], "", "", [[Block("", [])]])
        self.stack.append(root)
        for line in text.splitlines():
            if line.startswith("{-#"):
                break
            if line.strip() and not line.startswith("#"):
                self._read(*_split_location(line.strip()))
        if self.stack != [root]:
            raise ValueError(f"the braces of {self.stack[-1].text} do not match")
        functions = [op for op in root.walk() if op.name == "tt.func"]
        self.module = Module(functions, self.aliases, int(warps[1]))

    def _read(self, line: str, location: str) -> None:
        op = self.stack[-1]
        if line.startswith("^"):
            label, arguments = re.match(r"(\^\w+)(.*?):(?:\s*//.*)?$", line).groups()
            if label == "^bb0":
                # loops named these before, the second region of a while loop does not
                op.regions[-1].clear()
            block = Block(label, [self._define(name) for name in VALUE.findall(arguments)])
            op.regions[-1].append(block)
        elif line.startswith("}"):
            self.scopes.pop()
            if line.endswith("{"):
                self._open(op, [])
            else:
                op.text += line[1:].removeprefix(")")
                op.where = op.where or self._where(location)
                self.stack.pop()
        else:
            self._read_op(line, location)

    def _read_op(self, line: str, location: str) -> None:
        names: list[str] = []
        if match := re.match(r"((?:%[\w$.-]+(?::\d+)?(?:, )?)+) = ", line):
            line = line[match.end() :]
            for result in match[1].split(", "):
                name, _, count = result.partition(":")
                names += [f"{name}#{i}" for i in range(int(count))] if count else [name]
        kind = re.match(r'"?([\w.]+)', line)[1]
        values = VALUE.findall(line)
        inside: list[str] = []
        if kind == "tt.func":
            inside, values = values, []
        elif kind == "scf.for":
            # the variable, its bounds and step; then each argument with its first value
            inside, values = [values[0], *values[4::2]], [*values[1:4], *values[5::2]]
        elif kind == "scf.while":
            inside, values = values[::2], values[1::2]
        op = Op(kind, [], [self._resolve(name) for name in values], line, self._where(location))
        self.stack[-1].regions[-1][-1].ops.append(op)
        op.results = [self._define(name) for name in names]
        if line.endswith("{"):
            self.stack.append(op)
            self._open(op, inside)

    def _open(self, op: Op, arguments: list[str]) -> None:
        self.scopes.append({})
        op.regions.append([Block("^bb0", [self._define(name) for name in arguments])])

    def _define(self, name: str) -> str:
        # the text calls values of different regions by the same name
        self.num_values += 1
        self.scopes[-1][name] = f"{name}/{self.num_values}"
        return self.scopes[-1][name]

    def _resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise ValueError(f"{name} is used before it is defined")

    def _where(self, location: str) -> str:
        """The first line that a location names outside of Triton's own library, or else in it."""
        places: list[str] = []
        pending = [location]
        while pending:
            text = pending.pop(0)
            for path, line in re.findall(r'"([^"]+)":(\d+)', text):
                places.append(f"{path.rpartition('/')[2]}:{line}")
                if "/triton/language/" not in path:
                    return places[-1]
            pending = [self.aliases[name] for name in re.findall(r"#loc\w*", text)] + pending
        return places[0] if places else ""


def _split_location(line: str) -> tuple[str, str]:
    """The line without any location, and the last of those that it had."""
    location = ""
    while (start := line.find(" loc(")) >= 0:
        depth, quoted = 0, False
        for end in range(start + 4, len(line)):
            quoted ^= line[end] == '"'
            depth += (not quoted) * ((line[end] == "(") - (line[end] == ")"))
            if depth == 0:
                break
        location, line = line[start + 1 : end + 1], line[:start] + line[end + 1 :]
    return line, location
