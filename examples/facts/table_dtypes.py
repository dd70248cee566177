"""What a memory model still knows when the rows of its table are held in fewer bits.

    python examples/facts/table_dtypes.py RUN/checkpoints --data RUN/data

The checkpoint is exported once for each dtype of the table, into a temporary folder. For each, this
prints the bytes of the table, scales included, the perplexity of the validation text, which states
every fact in words that training never used of it, and the accuracy of the answers of probe.py. All
other weights are rounded to bf16; it is computed in fp32, which a CPU does faster.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from asking import score
from megatron.core.datasets.indexed_dataset import IndexedDataset
from probe_exported import Exported
from safetensors import safe_open
from tables import Sheet, make_console

from megamem.__main__ import main as megamem

DTYPES = ("bf16", "int8", "fp8", "int4")
TABLES = "model.tables."


def export(checkpoint: Path, folder: Path, dtype: str) -> int:
    """Export a model in bf16 with its table in a dtype; return the bytes of the table."""
    words = ["convert", "export", str(checkpoint), "--to", str(folder), "--format", "hf"]
    words += ["--dtype", "bf16"] + ([] if dtype == "bf16" else ["--table-dtype", dtype])
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if status := megamem(words):
            sys.exit(status)
    held = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(TABLES)]  # noqa: SIM118
            held += sum(file.get_tensor(name).nbytes for name in names)
    return held


@torch.no_grad()
def perplexity(model: Exported, text: Path, batch_size: int) -> float:
    """Of each token of the documents, given those before it in its document and an end token."""
    documents = IndexedDataset(str(text))
    end = model.tokenizer.eos_token_id
    loss, count = 0.0, 0
    for start in range(0, len(documents), batch_size):
        batch = [
            torch.from_numpy(ids.astype("int64")) for ids in documents[start : start + batch_size]
        ]
        lines = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        # every training document but the first follows an end token
        before = torch.cat((torch.full((len(lines), 1), end), lines[:, :-1]), dim=1)
        logits = model.model(before.where(before >= 0, end)).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), lines.flatten(), reduction="sum"
        )
        loss, count = loss + losses.item(), count + int((lines >= 0).sum())
    return math.exp(loss / count)


def accuracy(model: Exported, facts: list[dict[str, Any]], batch_size: int) -> float:
    """The share of the questions on facts that training states which are answered."""
    questions = [model.read(fact, "question") for fact in facts]
    right: list[bool] = []
    for start in range(0, len(questions), batch_size):
        right += model.right_answers(questions[start : start + batch_size])
    found: float = score(questions, right, len(questions))["totals"][0]["accuracy"]
    return found


def main() -> None:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", type=Path, help="the folder of --save")
    add("--data", type=Path, required=True, help="what build_corpus.py has written")
    add("--batch-size", type=int, default=64, help="questions or documents per forward")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the model")
    add("--output", type=Path, help="a file for the numbers as JSON")
    args = parser.parse_args()
    facts = json.loads((args.data / "facts.json").read_text())["facts"]
    stated = [fact for fact in facts if fact["held_in"]]
    found = []
    with tempfile.TemporaryDirectory() as where:
        for dtype in DTYPES:
            folder = Path(where, dtype)
            held = export(args.checkpoint, folder, dtype)
            model = Exported(folder, args.device, "float32")
            loss = perplexity(model, args.data / "facts_valid", args.batch_size)
            right = accuracy(model, stated, args.batch_size)
            found.append({"dtype": dtype, "bytes": held, "perplexity": loss, "accuracy": right})
    rows = [
        (
            one["dtype"],
            f"{one['bytes']:,}",
            f"{one['bytes'] / found[0]['bytes']:.2f}",
            f"{one['perplexity']:.3f}",
            f"{one['accuracy']:.1%}",
        )
        for one in found
    ]
    columns = ("table in", "bytes", "bf16 = 1", "perplexity", "facts known")
    sheet = Sheet("", columns, rows)
    make_console().print(sheet.table())
    print(sheet.markdown())
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
