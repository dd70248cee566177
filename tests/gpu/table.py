"""The one table at the end, in plain text: it must not need a package that a machine may lack."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from tests.gpu.machine import DRY_RUN
from tests.gpu.runner import Outcome

HEAD = ("part", "verdict", "s", "main numbers")


def table(outcomes: Sequence[Outcome]) -> str:
    """The machine and the commit in a line, then a row for each part."""
    rows = [(o.part.name, o.verdict, f"{o.seconds:.0f}", o.summary) for o in outcomes]
    widths = [max(len(row[n]) for row in (HEAD, *rows)) for n in range(3)]
    indent = sum(widths) + 6
    # a part that says much continues below itself
    width = max(40, shutil.get_terminal_size((140, 24)).columns - indent)
    lines = [headline(outcomes)]
    for row in (HEAD, *rows):
        first, *more = textwrap.wrap(row[3], width) or [""]
        start = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {first}"
        lines += [start.rstrip(), *(" " * indent + line for line in more)]
    return "\n".join((*lines, verdict(outcomes)))


def headline(outcomes: Sequence[Outcome]) -> str:
    """What ran where, from the first part that said so."""
    content: dict[str, Any] = next((o.content for o in outcomes if o.content.get("device")), {})
    if not content:
        return "no part told of its machine"
    software = ", ".join(
        f"{name} {content[name]}"
        for name in ("torch", "triton", "megatron-core", "nccl")
        if content.get(name)
    )
    line = f"{content['device']}; {software}; commit {content['commit']}; {content['started']}"
    if content["device"] == DRY_RUN:
        line += f"\nDRY RUN ON CPU, sizes divided by {content['scale']}: "
        line += "no number below is a measurement, and no verdict is about a GPU"
    return line


def verdict(outcomes: Sequence[Outcome]) -> str:
    """The last line."""
    failed = [o.part.name for o in outcomes if o.failed]
    skipped = [o.part.name for o in outcomes if o.verdict == "skipped"]
    passed = len(outcomes) - len(failed) - len(skipped)
    words = [f"{passed} of {len(outcomes)} parts passed"]
    words += [f"skipped: {' '.join(skipped)}"] if skipped else []
    words += [f"NOT passed: {' '.join(failed)}"] if failed else []
    return "; ".join(words)
