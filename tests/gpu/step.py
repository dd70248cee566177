"""Part: times a training step of Megatron's with and without memory layers.

The model has 16 layers of width 2048 and makes steps of 16k tokens; three memory layers share a
table of 2.1 G numbers, once with the default forms of their ops and once with forms that no GPU has
run. The results are milliseconds per step, their ratio to those without memory layers, and peak
memory. The runs import Megatron at the same time, but each uses the GPU only after the one before
it has ended.
"""

import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megamem.ops.forms import ENVIRONMENT
from tests.gpu import report
from tests.gpu.training_runs import UNTRIED, Log, Run, launch

STEPS, WARM_UP = 7, 3
TIMEOUT = 115.0
# sequences per micro-batch: torch's attention scores need much memory, so one is tried where two do
# not fit
SEQUENCES = (2, 1)
GATE = "MEGAMEM_GPU_GATE"
"""Environment variable with a file; a run uses the GPU only when the file exists."""


def run(found: report.Report) -> None:
    """Time a training step with and without memory layers."""
    for sequences in SEQUENCES:
        logs = _all(found, sequences)
        # all runs must have the same micro-batch
        if not any("OutOfMemoryError" in log.stdout for log in logs):
            break
    problems, medians = [], []
    for log in logs:
        times = log.milliseconds[WARM_UP:]
        failure = log.failure or ("" if times else f"{log.run.name}: too few steps were logged")
        found.add(
            run=log.run.name,
            ms=statistics.median(times) if times else None,
            all_ms=log.milliseconds,
            losses=list(log.losses.values()),
            peak_gib=log.peak_gib,
            sequences=sequences,
            failure=failure,
        )
        problems += [failure] if failure else []
        medians += [statistics.median(times)] if times else []
    if problems:
        found.finish(False, "; ".join(problems))
        return
    ratios = [median / medians[0] for median in medians]
    found.add(ratio=round(ratios[1], 4), ratio_of_untried_forms=round(ratios[2], 4))
    summary = ", ".join(
        f"{log.run.name} {median:.1f} ms ({ratio:.3f}x, peak {log.peak_gib} GiB)"
        for log, median, ratio in zip(logs, medians, ratios, strict=True)
    )
    summary += f"; {sequences} sequences per micro-batch"
    found.finish(True, "all runs made their steps" if found.dry_run else summary)


def _all(found: report.Report, sequences: int) -> list[Log]:
    folder = found.out / "step"
    folder.mkdir(parents=True, exist_ok=True)
    words = _words(found, sequences)
    memory_words = (
        *words,
        *("--memory-layers", *_memory_layers(found), "--memory-heads", 4),
        *("--memory-num-keys", found.divided(1024, least=16)),
        *("--memory-topk", found.divided(32, least=4)),
    )

    def go(name: str, gate: Path, flags: tuple[object, ...], forms: str = "") -> Log:
        environment = {
            GATE: str(gate),
            ENVIRONMENT: forms,
            "OMP_NUM_THREADS": "4",
            # the table needs half of the GPU's memory, so the rest must not be fragmented
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        }
        wanted = Run(name, 1, flags, "tests.gpu.step", environment, cpu=found.dry_run)
        return launch(wanted, folder, TIMEOUT * (8 if found.dry_run else 1))

    runs = (
        ("dense", words),
        ("3 memory layers", memory_words),
        ("3 memory layers, untried forms", memory_words, UNTRIED),
    )
    gates = [folder / f"open {name}" for name, *_ in runs]
    for gate in gates:
        gate.unlink(missing_ok=True)
    with ThreadPoolExecutor(len(runs)) as pool:
        begun = [
            pool.submit(go, name, gate, *rest)
            for gate, (name, *rest) in zip(gates, runs, strict=True)
        ]
        logs = []
        for gate, done in zip(gates, begun, strict=True):
            gate.touch()
            logs.append(done.result())
        return logs


def _memory_layers(found: report.Report) -> tuple[int, int, int]:
    return (0, 1, 2) if found.dry_run else (3, 8, 13)


def _words(found: report.Report, sequences: int) -> tuple[object, ...]:
    """The flags of both runs: bf16, 16,384 tokens per step."""
    hidden = found.divided(2048, least=64)
    length = found.divided(2048, least=32)
    return (
        *("--num-layers", found.divided(16, least=4), "--hidden-size", hidden),
        *("--num-attention-heads", found.divided(16, least=4), "--ffn-hidden-size", 4 * hidden),
        *("--seq-length", length, "--max-position-embeddings", length),
        *("--micro-batch-size", sequences, "--global-batch-size", 8),
        *("--vocab-size", found.divided(32000, least=127), "--bf16"),
        *("--train-iters", STEPS, "--lr-decay-iters", STEPS, "--lr", 3e-4, "--min-lr", 3e-5),
    )


def _wait_then_run() -> int:
    """Run in a rank: import slow modules, wait for the gate, then do what megamem.run does."""
    from megamem.megatron import launcher

    command = launcher.parse(sys.argv[1:])
    if command.cpu:
        from megamem.cpu import runtime as cpu_runtime

        # it must be installed before Megatron is imported
        cpu_runtime.install(force=command.force_cpu)
    import time

    from megatron.training import training  # noqa: F401

    while not Path(os.environ[GATE]).exists():
        time.sleep(0.05)
    return launcher.main()


if __name__ == "__main__":
    sys.exit(_wait_then_run() if GATE in os.environ else report.main("step", run))
