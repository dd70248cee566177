"""The table at the end, in plain text without rich, which a machine may not have."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from tests.gpu.runner import Outcome

HEAD = ("part", "verdict", "s", "main numbers")


def table(outcomes: Sequence[Outcome], divided_by: int | None = None) -> str:
    """A line about machine and commit, a row for each part, and a line with the verdict.

    Args:
        outcomes: in the order of the rows.
        divided_by: the number by which a dry run divides sizes; None on a GPU.
    """
    rows = [(o.part.name, o.verdict, f"{o.seconds:.0f}", o.summary) for o in outcomes]
    widths = [max(len(row[n]) for row in (HEAD, *rows)) for n in range(3)]
    indent = sum(widths) + 6
    # long summaries are wrapped
    width = max(40, shutil.get_terminal_size((140, 24)).columns - indent)
    lines = [headline(outcomes)]
    if divided_by is not None:
        lines.append(
            f"DRY RUN ON CPU, sizes divided by {divided_by}: no number below is a measurement, and "
            "no verdict holds for a GPU"
        )
    for row in (HEAD, *rows):
        first, *more = textwrap.wrap(row[3], width) or [""]
        start = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {first}"
        lines += [start.rstrip(), *(" " * indent + line for line in more)]
    return "\n".join((*lines, verdict(outcomes)))


def headline(outcomes: Sequence[Outcome]) -> str:
    """Device, software and commit, from the first part that has them."""
    content: dict[str, Any] = next((o.content for o in outcomes if o.content.get("device")), {})
    if not content:
        return "no part wrote facts about its machine"
    software = ", ".join(
        f"{name} {content[name]}"
        for name in ("torch", "triton", "megatron-core", "nccl")
        if content.get(name)
    )
    return f"{content['device']}; {software}; commit {content['commit']}; {content['started']}"


def verdict(outcomes: Sequence[Outcome]) -> str:
    """The last line: how many parts passed, and which did not."""
    failed = [o.part.name for o in outcomes if o.failed]
    skipped = [o.part.name for o in outcomes if o.verdict == "skipped"]
    passed = len(outcomes) - len(failed) - len(skipped)
    words = [f"{passed} of {len(outcomes)} parts passed"]
    words += [f"skipped: {' '.join(skipped)}"] if skipped else []
    words += [f"NOT passed: {' '.join(failed)}"] if failed else []
    return "; ".join(words)
