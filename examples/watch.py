"""Shows the log of a training run as a progress bar and a table of losses, and writes it to a file.

    torchrun ... -m megamem.run SCRIPT ... 2>&1 | python examples/watch.py --log runs/x/train.log

The exit status is 1 if the log contains an error, or neither a training nor a validation loss.
"""

import argparse
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) .*? lm loss: (\S+)")
VALIDATION = re.compile(
    r"validation loss at iteration (\d+) on (validation) set \| lm loss value: (\S+)"
)
SAID = re.compile(r"megamem: |saved checkpoint from iteration")
TROUBLE = re.compile(r"megamem: error: |Error: |Traceback")


def main() -> int:
    """Show the log on standard input until it ends; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--log", type=Path, required=True, help="file for the complete log")
    options = parser.parse_args()
    options.log.parent.mkdir(parents=True, exist_ok=True)

    console = Console()
    losses: list[tuple[int, float]] = []
    validations: list[tuple[int, float]] = []
    trouble = False
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with options.log.open("w") as log, Progress(*columns, console=console) as progress:
        task = None
        for line in sys.stdin:
            log.write(line)
            if found := ITERATION.search(line):
                done, total, loss = int(found[1]), int(found[2]), float(found[3])
                losses.append((done, loss))
                if task is None:
                    task = progress.add_task("", total=total, loss="", completed=done)
                progress.update(task, completed=done, loss=f"{loss:.3f}")
                # rich draws the bar only in a terminal
                if not console.is_terminal:
                    console.print(f"iteration {done} of {total}: loss {loss:.3f}")
            elif found := VALIDATION.search(line):
                validations.append((int(found[1]), float(found[3])))
                progress.console.print(
                    f"iteration {found[1]}: validation loss {float(found[3]):.3f}"
                )
            elif SAID.search(line):
                progress.console.print(line.strip(" >\n"), highlight=False)
            trouble = trouble or bool(TROUBLE.search(line))
            if trouble:
                progress.console.print(line.rstrip("\n"), highlight=False, markup=False)
    if losses:
        console.print(_reached(losses, validations))
    elif not validations:
        console.print(
            f"The run logged no training iteration; see its log in {options.log}", style="red"
        )
    return 1 if trouble or not (losses or validations) else 0


def _reached(losses: list[tuple[int, float]], validations: list[tuple[int, float]]) -> Table:
    table = Table(title="Losses of the run")
    for name in ("", "iteration", "loss"):
        table.add_column(name, justify="left" if not name else "right")
    for name, rows in (("training", losses), ("validation", validations)):
        for which, (iteration, loss) in zip(
            ("first", "last"), (*rows[:1], *rows[1:][-1:]), strict=False
        ):
            table.add_row(f"{name}, {which}", str(iteration), f"{loss:.3f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
