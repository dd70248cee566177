"""Makes the table of all --memory-* flags in megamem/FLAGS.md from MemoryConfig.

python -m megamem.tools.flag_table megamem/FLAGS.md     rewrites the table in this file
"""

import ast
import inspect
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megamem.config import MemoryConfig, flag
from megamem.tools import markers


def field_docs() -> dict[str, str]:
    """Field -> the docstring under it, which is also its --help text."""
    body = ast.parse(inspect.getsource(MemoryConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), (
                node.target
            )
            docs[node.target.id] = " ".join(str(after.value.value).split())
    return docs


def flag_table() -> str:
    """A Markdown table with a row for every field of MemoryConfig, in their order."""
    docs, hints = field_docs(), get_type_hints(MemoryConfig)
    rows = ["| flag | values | default | what it sets |", "|---|---|---|---|"]
    for field in fields(MemoryConfig):
        default = field.default if field.default is not MISSING else None
        cells = (
            f"`{flag(field.name)}`",
            _values(hints[field.name]),
            _default(default),
            docs[field.name].replace("|", "\\|"),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _values(hint: Any) -> str:
    members = [member for member in get_args(hint) if member is not type(None)]
    # a choice that may be None: the only member of the union is the Literal
    if members and get_origin(members[0]) is Literal:
        return _values(members[0])
    if get_origin(hint) is Literal:
        return ", ".join(f"`{member}`" for member in members)
    if hint is bool:
        return "switch"
    if get_origin(hint) is list:
        return "whole numbers"
    kind = members[0] if members else hint
    return {int: "whole number", float: "number", str: "path"}[kind]


def _default(value: Any) -> str:
    return "" if value is None else "off" if value is False else f"`{value}`"


def rewrite(readme: str) -> str:
    """The same text with the current table between its markers."""
    return markers.rewrite(readme, "flags", flag_table())


def main() -> None:
    """Rewrite the table in the file named on the command line."""
    path = Path(sys.argv[1])
    path.write_text(rewrite(path.read_text()))


if __name__ == "__main__":
    main()
