"""Makes the README's tables of stages and of forms of ops from the records of runs on GPUs.

python -m tests.bench.stage_table megamem/kernels/README.md     rewrites the tables in this file

Records are JSON files under results/: the `results.json` of `bash tests/gpu.sh` under any name,
which is a list with an entry per part, or one written by hand. The tables show entries whose `rows`
have a stage and its milliseconds. Those written by hand also have the lower bound that the bytes
set, notes, and forms.
"""

import json
import sys
from pathlib import Path
from typing import Any

from megamem.tools import markers
from megamem.tools.bench_table import numbers

RESULTS = Path(__file__).parent / "results"
MARKER = "stages"


def records(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The entries of all files that have stages, the newest run first, without dry runs."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [
        part
        for content in contents
        for part in (content if isinstance(content, list) else [content])
    ]
    staged = [
        record
        for record in found
        if any("stage" in row for row in record.get("rows", ())) and not record.get("dry_run")
    ]
    return sorted(staged, key=lambda record: record["started"], reverse=True)


def tables(found: list[dict[str, Any]]) -> str:
    """Markdown: for each run a line with its machine, its stages, and its forms if it has some."""
    return "\n\n".join(
        part for record in found for part in (_stages(record), _forms(record)) if part
    )


def _stages(record: dict[str, Any]) -> str:
    sizes = numbers(record["sizes"]) + "; " if "sizes" in record else ""
    lines = [
        f"{record['device']}, torch {record['torch']}, Triton {record['triton']}; {sizes}commit "
        f"{record['commit']}; {record['command']}",
        "",
        "| stage | ms | floor by bytes, ms | |",
        "|---|---:|---:|---|",
    ]
    for row in record["rows"]:
        if "ms" in row and "stage" in row:
            floor = row.get("floor_ms")
            cells = (row["stage"], f"{row['ms']:g}", "" if floor is None else f"{floor:g}")
            lines.append(f"| {' | '.join(cells)} | {row.get('note', '')} |")
    return "\n".join(lines)


def _forms(record: dict[str, Any]) -> str:
    """A Markdown table per op, with a row per shape and a column per form; "" without forms."""
    forms = record.get("forms", [])
    ops = dict.fromkeys(form["op"] for form in forms)
    return "\n\n".join(_forms_of([form for form in forms if form["op"] == op]) for op in ops)


def _forms_of(forms: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(form["form"] for form in forms))
    shapes = dict.fromkeys((form["dtype"], numbers(form["shape"])) for form in forms)
    lines = [
        "| op | shape | " + " | ".join(f"{name}, ms" for name in names) + " |",
        "|---|---|" + "---:|" * len(names),
    ]
    for dtype, shape in shapes:
        of = {
            form["form"]: f"{form['ms']:g}"
            for form in forms
            if (form["dtype"], numbers(form["shape"])) == (dtype, shape)
        }
        times = " | ".join(of.get(name, "") for name in names)
        lines.append(f"| `{forms[0]['op']}` {dtype} | {shape} | {times} |")
    return "\n".join(lines)


def rewrite(readme: str) -> str:
    """The same text with the current tables between its markers."""
    return markers.rewrite(readme, MARKER, tables(records()))


def main() -> None:
    """Rewrite the tables in the file named on the command line."""
    path = Path(sys.argv[1])
    path.write_text(rewrite(path.read_text()))


if __name__ == "__main__":
    main()
