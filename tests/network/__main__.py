"""The command behind `bash tests/network.sh`, which gives it namespaces of its own."""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from tests.network.cases import WORLD
from tests.network.hosts import ROOT, Host, NotAllowed, ended, host_of, make_hosts
from tests.network.report import plot, problems, rows_of, table
from tests.network.training import train

NOT_ALLOWED = 77
PATIENCE = 900.0


def main() -> int:
    """Return the exit status: 0 if all is as predicted, 1 if not, 77 if hosts are not allowed."""
    options = _parser().parse_args()
    # the first process of a namespace ignores signals that it does not ask for
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = (ROOT / options.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        hosts = make_hosts(options.mbit)
    except NotAllowed as why:
        _say(f"tests/network.sh: nothing was measured, as hosts cannot be made here: {why}")
        return NOT_ALLOWED
    _say(f"==> measuring; logs are in {folder}")
    failed = _measure(hosts, folder, options.repetitions, options.sizes)
    if failed:
        _say(failed)
        return 1
    trainings = []
    if not options.no_training:
        _say("==> training over the hosts")
        trainings = train(hosts, folder)
    content = json.loads((folder / "measured.json").read_text())
    rows = rows_of(content)
    text = table(content, rows, trainings, options.mbit)
    (folder / "table.txt").write_text(f"{text}\n")
    plot(rows, options.mbit, folder / "exchange.png")
    _say(f"\n{text}\n\nplot: {folder / 'exchange.png'}")
    found = list(problems(rows, trainings))
    for problem in found:
        _say(f"NOT AS PREDICTED: {problem}")
    if not found:
        equal = ", and training equals one process" if trainings else ""
        _say(f"bytes are within 10 % and ratios of times within 25 % of the prediction{equal}")
    return bool(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash tests/network.sh",
        description="Measures the exchange of memory layers between four hosts of two ranks on an "
        "emulated network, and compares it with a prediction.",
    )
    parser.add_argument("--mbit", type=int, default=100, help="rate of a host's link, in Mbit/s")
    parser.add_argument("--repetitions", type=int, default=5, help="repetitions of each case")
    parser.add_argument("--sizes", default="{}", help="JSON of other sizes, as in cases.Sizes")
    parser.add_argument("--no-training", action="store_true", help="only measure the exchange")
    parser.add_argument("--out", type=Path, default=Path("runs/network"), help="folder of results")
    return parser


def _measure(hosts: list[Host], folder: Path, repetitions: int, sizes: str) -> str:
    """Run the ranks; return the problem, or an empty text."""
    for old in ("store", "measured.json"):
        (folder / old).unlink(missing_ok=True)
    logs = [folder / f"rank{rank}.txt" for rank in range(WORLD)]
    processes = []
    with ended(processes):
        for rank, log in enumerate(logs):
            words = ("tests.network.ranks", rank, folder, repetitions, sizes)
            processes.append(hosts[host_of(rank)].start(words, log))
        deadline = time.monotonic() + PATIENCE
        while any(process.poll() is None for process in processes):
            # the others of a rank that failed would wait for it
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        done = all(process.poll() == 0 for process in processes)
    if done:
        return ""
    number = next((rank for rank, process in enumerate(processes) if process.returncode > 0), 0)
    return f"rank {number} did not finish:\n{logs[number].read_text()[-4000:]}"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
