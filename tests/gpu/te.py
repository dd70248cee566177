"""Part: what needs Transformer Engine, on machines that have it; see transformer_engine.py."""

import importlib
import importlib.util
import json
import sys

from tests.gpu import report

MODULE = "tests.gpu.transformer_engine"


def run(found: report.Report) -> None:
    """Run memory layers in models of Transformer Engine's classes."""
    if found.dry_run:
        found.skip("a dry run: Transformer Engine computes on a GPU alone")
        return
    if importlib.util.find_spec("transformer_engine") is None:
        found.skip("Transformer Engine is not installed here")
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        # it is there, so that somebody meant to run with it
        found.finish(False, f"Transformer Engine does not import: {type(error).__name__}: {first}")
        return
    # it may write its own findings where this part's belong
    path = found.out / f"{found.part}.json"
    before = path.read_text()
    status = importlib.import_module(MODULE).main(found.out, found.scale)
    summary = f"{MODULE} ended with {status}"
    if path.read_text() != before:
        written = json.loads(path.read_text())
        found.rows = written.get("rows", [])
        summary = written.get("summary") or summary
        if why := written.get("skipped"):
            found.skip(why)
            return
    found.finish(status == 0, summary)


if __name__ == "__main__":
    sys.exit(report.main("te", run))
