"""Read the facts of a corpus as a data set of lm-eval, whose task files beside this one name it."""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

# every training document but the first follows the token between documents, which corpora of
# build_corpus.py call so; transformers and megamem.eval_harness make the token of it
BETWEEN = "</s>"


def load(facts: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The facts that training states, and those that it does not.

    Args:
        facts: the path of facts.json; lm-eval passes on what its --metadata says.

    Returns:
        `stated` and `held_out`, with a row for each fact: `question`, `unseen` (the question in the
        phrasing that training never used of it), both after the token between documents, `answer`
        and `relation`.
    """
    if not facts or not Path(facts).is_file():
        given = f"--metadata facts={facts}: no such file" if facts else "--metadata is missing"
        sys.exit(f"megamem_facts: error: {given}; give facts=FOLDER/facts.json of build_corpus.py")
    found: dict[str, list[dict[str, str]]] = {"stated": [], "held_out": []}
    for fact in json.loads(Path(facts).read_text())["facts"]:
        row = {name: BETWEEN + fact[name] for name in ("question", "unseen")}
        row |= {name: fact[name] for name in ("answer", "relation")}
        found["stated" if fact["held_in"] else "held_out"].append(row)
    return {name: Dataset.from_list(rows) for name, rows in found.items() if rows}
