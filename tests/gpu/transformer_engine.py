"""Part: trains memory layers with Transformer Engine: `bash tests/gpu.sh te`.

It starts runs of Megatron's loop, several at a time on one GPU, and compares most of them with a
run that must have the same losses. If Transformer Engine is not installed, the part is skipped.
Without a GPU nothing is trained: the model of every command line is built, after all checks of
Megatron and megamem (`bash tests/transformer_engine.sh` makes an environment for that).

Runs that multiply in another order differ by the rounding of bf16, or of the TF32 in which
Transformer Engine multiplies fp32, which may also decide lookups with nearly equal scores
differently. The tolerances allow for that; mistakes cause differences of a multiple of them.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.gpu.engine_run import LINEARS, MEMORIES
from tests.gpu.machine import ROOT
from tests.gpu.report import Report, main
from tests.gpu.training_runs import USUAL, Log, Run, launch

AT_ONCE = 4
LIMIT = 75.0
"""Time limit of one run in seconds, most of which is start-up."""

SAVED_AT = 4
MISSING = "Transformer Engine is not installed; it comes with NVIDIA's PyTorch image"
SCRIPT, HYBRID_SCRIPT = (ROOT / "examples" / f"pretrain_{kind}.py" for kind in ("gpt", "hybrid"))

ENGINE = (
    *("--transformer-impl", "transformer_engine", "--no-gradient-accumulation-fusion"),
    # this kernel is only for attention without cuDNN
    "--no-masked-softmax-fusion",
)
ENVIRONMENT = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # compiling Megatron's small functions takes longer than a run
    "TORCHDYNAMO_DISABLE": "1",
    "NVTE_TORCH_COMPILE": "0",
}
TRAINING = {
    "--num-layers": 4,
    "--num-attention-heads": 8,
    "--micro-batch-size": 4,
    "--global-batch-size": 8,
    "--train-iters": 8,
    "--lr": 1e-3,
    "--min-lr": 1e-4,
    "--lr-decay-iters": 8,
    "--vocab-size": 1023,
    # Megatron pads the vocabulary to 128 x TP, so that its size would depend on the layout
    "--make-vocab-size-divisible-by": 128,
}
READS = ("--memory-heads", 4, "--memory-topk", 16)
MEMORY = ("--memory-layers", 1, 3)
BF16 = ("--bf16",)
TP2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
# initial weights that do not depend on the tensor-parallel size
ALIKE = ("--use-cpu-initialization",)
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
FULL = (*FULL, "--recompute-num-layers", 1)
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules")
DELAYED = ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", "delayed")
CURRENT = ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise")
LLAMA = ("--normalization", "RMSNorm", "--swiglu")
HYBRID = (
    *("--hybrid-layer-pattern", "*-*-*-", "--num-layers", 6, "--memory-layers", 1, 5),
    *("--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
)


@dataclass(frozen=True)
class Case:
    """A run, and the case with which it is compared."""

    name: str
    flags: tuple[object, ...]
    like: str = ""
    """The case that must have the same losses; empty if the loss only has to fall."""

    tolerance: float = 0.0
    """Allowed relative difference of every loss."""

    ranks: int = 1
    precision: str = "torch.bfloat16"
    """Precision in which linears must compute; with fp8, memory layers must compute in bf16."""

    saves: bool = False
    loads: str = ""
    """The case from whose checkpoint it continues."""

    script: Path = SCRIPT
    environment: tuple[tuple[str, str], ...] = ()


ONE, PRECISE, SCALED = "bf16", "fp32", "fp8 with delayed scaling"
IN_FP8 = {"delayed": "fp8 DelayedScaling", "current": "fp8 Float8CurrentScaling"}
# first the cases that others need, then those with two ranks, which take longest
CASES = (
    Case(ONE, BF16, saves=True),
    Case(PRECISE, ALIKE, precision="torch.float32"),
    Case(
        "fp32, TP2 with sequence parallelism",
        (*ALIKE, *TP2),
        like=PRECISE,
        tolerance=5e-3,
        ranks=2,
        precision="torch.float32",
    ),
    Case(SCALED, DELAYED, like=ONE, tolerance=0.03, precision=IN_FP8["delayed"], saves=True),
    Case(
        "CP2",
        (*BF16, "--context-parallel-size", 2),
        like=ONE,
        tolerance=0.01,
        ranks=2,
        # only cuDNN's attention supports this, and not always deterministically
        environment=(("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),),
    ),
    Case(
        "fp8 with current scaling",
        CURRENT,
        like=ONE,
        tolerance=0.03,
        precision=IN_FP8["current"],
    ),
    Case("recompute full", (*BF16, *FULL), like=ONE, tolerance=1e-3),
    Case(
        "recompute mlp, core_attn, layernorm",
        (*BF16, *SELECTIVE, "mlp", "core_attn", "layernorm"),
        like=ONE,
        tolerance=1e-3,
    ),
    Case(
        "fp8 with current scaling, TP2 with sequence parallelism, feed-forward that stays",
        (*CURRENT, *TP2, *LLAMA, "--memory-keep-ffn"),
        ranks=2,
        precision=IN_FP8["current"],
    ),
    Case("resumed", BF16, like=ONE, tolerance=1e-4, loads=ONE),
    Case(
        "resumed by TP2 with sequence parallelism",
        (*BF16, *TP2),
        like=ONE,
        tolerance=0.01,
        ranks=2,
        loads=ONE,
    ),
    Case(
        "fp8 with delayed scaling, resumed",
        DELAYED,
        like=SCALED,
        tolerance=1e-3,
        precision=IN_FP8["delayed"],
        loads=SCALED,
        # scaling factors are pickled, and Transformer Engine 2.20 loads pickles only with this
        environment=(("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1"),),
    ),
    Case(
        "fp8 with delayed scaling, recompute full",
        (*DELAYED, *FULL),
        like=SCALED,
        tolerance=5e-3,
        precision=IN_FP8["delayed"],
    ),
    Case("hybrid", (*BF16, *HYBRID), script=HYBRID_SCRIPT),
    Case(
        "CUDA graphs of attention",
        (*BF16, "--cuda-graph-impl", "transformer_engine", "--cuda-graph-modules", "attn")
        + ("--te-rng-tracker", "--cuda-graph-warmup-steps", 1),
        like=ONE,
        tolerance=0.01,
    ),
)


def run(report: Report) -> None:
    """Train memory layers with Transformer Engine in Megatron's loop."""
    if find_spec("transformer_engine") is None:
        report.skip(MISSING)
        return
    rows = _built(report) if report.dry_run else _trained(report, report.out / "te")
    failed = [row["name"] for row in rows if row["verdict"] != "passed"]
    what = "models built; none is trained without a GPU" if report.dry_run else "runs passed"
    summary = f"{len(rows) - len(failed)} of {len(rows)} {what}"
    report.finish(not failed, summary + (f"; failed: {', '.join(failed)}" if failed else ""))


def words(report: Report, case: Case, work: Path) -> list[object]:
    """The flags of a case."""
    sizes = {
        "--hidden-size": report.divided(512, 128),
        "--ffn-hidden-size": report.divided(2048, 256),
        "--seq-length": report.divided(256, 32),
        "--max-position-embeddings": 256,
        "--memory-num-keys": report.divided(256, 16),
    }
    found = [word for pair in (TRAINING | sizes).items() for word in pair]
    found += [*READS, *MEMORY, *ENGINE, *case.flags]
    if case.saves:
        found += ["--save", work / case.name, "--save-interval", SAVED_AT]
    if case.loads:
        found += ["--load", work / case.loads, "--ckpt-step", SAVED_AT]
    return found


def _trained(report: Report, work: Path) -> list[dict[str, Any]]:
    """Train all cases; return a row for each, in their order."""
    futures: dict[str, Future[Log]] = {}

    def train(case: Case) -> Log:
        if case.loads:
            # no deadlock: that case is earlier in the list, so its run has been started
            futures[case.loads].result()
        what = Run(
            name=case.name,
            ranks=case.ranks,
            words=words(report, case, work),
            module="tests.gpu.engine_run",
            environment=ENVIRONMENT | dict(case.environment),
            script=case.script,
            engines=(),
        )
        return launch(what, work, LIMIT)

    rows = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for case in CASES:
            futures[case.name] = pool.submit(train, case)
        for case in CASES:
            like = futures[case.like].result() if case.like else None
            rows.append(verdict(case, futures[case.name].result(), like))
            report.add(**rows[-1])
    return rows


def verdict(case: Case, log: Log, like: Log | None) -> dict[str, Any]:
    """The row of a run: its losses, their difference from those of another case, and problems."""
    problems = [log.failure] if log.failure else []
    losses = settled(log.losses)
    found: dict[str, Any] = {"losses": log.losses, "seconds": round(log.seconds, 1)}
    if not problems:
        problems += _precision_problems(case, log.stdout)
        if not losses:
            problems.append("it logged no loss")
        elif not case.loads and not losses[max(losses)] < losses[min(losses)]:
            problems.append("its loss did not fall")
    if like is not None and not problems:
        expected = settled(like.losses)
        apart = [abs(loss / expected[n] - 1) for n, loss in losses.items() if n in expected]
        found |= {"like": case.like, "tolerance": case.tolerance, "apart": max(apart, default=None)}
        # this form of the comparison also finds NaN
        if not apart or not all(part <= case.tolerance for part in apart):
            problems.append(f"its losses are not those of {case.like}")
    return {
        "name": case.name,
        "verdict": "; ".join(problems) or "passed",
        "ranks": case.ranks,
        **found,
    }


def settled(losses: dict[int, float]) -> dict[int, float]:
    """The losses without the second one that a run logs, which is the mean of its first two."""
    second = sorted(losses)[1:2]
    return {iteration: loss for iteration, loss in losses.items() if iteration not in second}


def _precision_problems(case: Case, stdout: str) -> list[str]:
    """Problems with the precision in which linears and memory layers computed."""
    linears = set(re.findall(rf"{LINEARS}: (.*)", stdout))
    memories = set(re.findall(rf"{MEMORIES}: (.*)", stdout))
    plain = "torch.bfloat16" if case.precision.startswith("fp8") else case.precision
    expected = f"{plain}, table {plain}, read-out {plain}"
    problems = []
    if linears != {case.precision}:
        problems.append(f"linears computed in {sorted(linears)}, not in {case.precision}")
    if memories != {expected}:
        problems.append(f"memories computed in {sorted(memories)}, not in {expected}")
    return problems


def _built(report: Report) -> list[dict[str, Any]]:
    """Build the model of each rank from every command line, after all checks; return the rows."""
    jobs, cases = [], []
    for case in CASES:
        flags = [str(word) for word in (*USUAL, *words(report, case, report.out / "te"))]
        for rank in range(case.ranks):
            hybrid = case.script == HYBRID_SCRIPT
            job = {"flags": flags, "world": case.ranks, "rank": rank, "hybrid": hybrid}
            jobs.append(json.dumps(job))
            cases.append(case)
    done = subprocess.run(
        [sys.executable, "-m", "tests.megatron.engine_models"],
        input="\n".join(jobs),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    rows = []
    for case, line in zip(cases, done.stdout.splitlines(), strict=False):
        found = json.loads(line)
        memories = list(found.get("model", {}).get("modules", {}).values()).count("MemoryMLP")
        said = found.get("error") or ("" if memories == 2 else f"{memories} memories were built")
        rows.append({"name": case.name, "verdict": said or "passed", "ranks": case.ranks})
        report.add(**rows[-1])
    rows += [{"name": case.name, "verdict": "was not reached"} for case in cases[len(rows) :]]
    return rows


if __name__ == "__main__":
    sys.exit(main("te", run))
