"""Shows what probe.py has written: a table of scores, and a few questions with their answers.

python examples/facts/show_probe.py runs/quickstart/probe.json
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tables import Sheet, make_console


def sheet(probe: Mapping[str, Any]) -> Sheet:
    """The scores of each relation, and the totals."""
    rows = [
        (name, f"{asked:,}", f"{right:,}", f"{accuracy:.1%}", f"{chance:.1%}")
        for name, asked, right, accuracy, chance in map(
            dict.values, probe["scores"] + probe["totals"]
        )
    ]
    return Sheet("", ("relation", "asked", "right", "accuracy", "commonest answer"), rows)


def main() -> None:
    """Print the result in a file."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("probe", type=Path, help="what probe.py has written")
    path = parser.parse_args().probe
    probe, console = json.loads(path.read_text()), make_console()
    title = f"{probe['load']}, iteration {probe['iteration']}: closed-book exact match"
    console.print(title, markup=False, soft_wrap=True)
    console.print(sheet(probe).table())
    for sample in probe["samples"]:
        verdict = "right" if sample["model"] == sample["answer"] else "wrong"
        line = f"{sample['question']} [{sample['answer']}] model: {sample['model']} ({verdict})"
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"from {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
