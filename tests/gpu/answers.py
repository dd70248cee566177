"""Part: test every kernel on inputs with known results, at the size of a real run."""

import sys

from megamem.tools import known_answers
from tests.gpu import report


def run(found: report.Report) -> None:
    """Run every kernel on inputs with known results."""
    wrong = skipped = 0
    for answer in known_answers.ANSWERS:
        (outcome,) = known_answers.run(found.device, found.scale, answers=[answer])
        wrong += outcome.wrong is not None
        skipped += outcome.skipped is not None
        found.add(
            answer=answer.name,
            wrong=outcome.wrong,
            skipped=outcome.skipped,
            seconds=round(outcome.seconds, 3),
        )
    count = len(known_answers.ANSWERS)
    first = next((row for row in found.rows if row["wrong"] or row["skipped"]), None)
    summary = f"{count - wrong - skipped} of {count} correct"
    if skipped:
        summary += f", {skipped} skipped"
    if first:
        summary += f"; {first['answer']}: {first['wrong'] or first['skipped']}"
    # a skipped answer does not count as correct
    found.finish(not wrong and not skipped, summary)


if __name__ == "__main__":
    sys.exit(report.main("answers", run))
