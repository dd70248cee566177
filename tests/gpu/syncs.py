"""Part: counts host synchronisations of a training step, a memory layer and its table's optimizer.

On one rank, forward and backward of a memory layer must not synchronise the host with the GPU. For
a step of Megatron's, with and without memory layers, the number is only reported.
"""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu import report
from tests.gpu.layer import Sizes, build
from tests.gpu.sync_sites import SyncSites
from tests.gpu.training_runs import Run, launch

COUNTED_STEP, STEPS = 4, 5
TIMEOUT = 100.0
SHOWN_SITES = 30
RESULT = "MEGAMEM_GPU_SYNCS"
"""Environment variable with the file to which a training run writes its counts."""


def run(found: report.Report) -> None:
    """Count host synchronisations, by line of code."""
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(_training, found)
        layer = _layer(found)
        problems = training.result()
    counts = {row["what"]: row["count"] for row in found.rows}
    summary = ", ".join(f"{what} {count}" for what, count in counts.items())
    # in a dry run plain torch runs, which may synchronise
    if layer and not found.dry_run:
        problems.append(
            f"a memory layer synchronises {layer} times with the GPU; the rows name the lines"
        )
    if found.dry_run:
        summary = f"{len(counts)} counts were made, of other ops than on a GPU"
    found.finish(not problems, "; ".join([summary, *problems]))


def _add(found: report.Report, what: str, count: int, sites: dict[str, int]) -> None:
    # most frequent first
    ordered = sorted(sites.items(), key=lambda site: -site[1])[:SHOWN_SITES]
    found.add(what=what, count=count, sites=dict(ordered))


def _layer(found: report.Report) -> int:
    """Count in a layer and its table's optimizer; return the number in the layer."""
    device = found.device
    sizes = Sizes(
        tokens=found.divided(2048, least=16),
        hidden=found.divided(512, least=64),
        num_keys=found.divided(256, least=16),
        heads=4,
        topk=found.divided(32, least=4),
    )
    trained = build(sizes, device, torch.bfloat16)
    trained.forward_backward()
    trained.optimizer.step()
    kept: list[Tensor] = []
    phases: list[tuple[str, Callable[[], Any]]] = [
        ("layer forward", lambda: kept.append(trained.forward())),
        ("layer backward", lambda: trained.backward(kept.pop())),
        ("gradient norm", trained.optimizer.squared_norm),
        ("table step", trained.optimizer.step),
        ("table zero_grad", trained.optimizer.zero_grad),
    ]
    total = 0
    for name, phase in phases:
        with SyncSites(device) as sites:
            phase()
        _add(found, name, sites.count, dict(sites.sites))
        total += sites.count * name.startswith("layer")
    return total


def _training(found: report.Report) -> list[str]:
    """Count in a step of Megatron's loop, dense and with two memory layers; return problems."""
    hidden, length = found.divided(256, least=64), found.divided(256, least=32)
    words = (
        *("--num-layers", 4, "--hidden-size", hidden, "--ffn-hidden-size", 4 * hidden),
        *("--num-attention-heads", 4, "--vocab-size", 1023),
        *("--seq-length", length, "--max-position-embeddings", length),
        *("--micro-batch-size", 4, "--global-batch-size", 8, "--bf16"),
        *("--train-iters", STEPS, "--lr-decay-iters", STEPS, "--lr", 1e-3, "--min-lr", 1e-4),
    )
    memory = ("--memory-layers", 1, 2, "--memory-num-keys", 64, "--memory-topk", 8)
    steps = {"dense step": words, "step with 2 memory layers": (*words, *memory)}
    with ThreadPoolExecutor(1 if found.dry_run else 2) as pool:
        runs = {name: pool.submit(_counted, found, name, flags) for name, flags in steps.items()}
    problems = []
    for name, done in runs.items():
        sites = done.result()
        if isinstance(sites, str):
            problems.append(sites)
        else:
            _add(found, name, sum(sites.values()), sites)
    return problems


def _counted(found: report.Report, name: str, flags: tuple[object, ...]) -> dict[str, int] | str:
    """Line of code -> synchronisations in one step of a training run; or a problem."""
    path = found.out / "syncs" / f"{name.replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    environment = {RESULT: str(path), "TORCHDYNAMO_DISABLE": "1"}
    wanted = Run(name, 1, flags, "tests.gpu.syncs", environment, cpu=found.dry_run)
    log = launch(wanted, path.parent, TIMEOUT * (8 if found.dry_run else 1))
    if log.failure or not path.exists():
        return log.failure or f"{name}: nothing was counted"
    return json.loads(path.read_text())


def _count_in_training() -> int:
    """Run in a rank: do what megamem.run does, and count in one step."""
    from megamem.megatron import launcher

    original = launcher.run_as_main

    def run_as_main(command: Any) -> None:
        from megatron.training import training

        train_step, calls = training.train_step, 0

        def counting(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != COUNTED_STEP:
                return train_step(*args, **more)
            device = torch.device(
                "cuda" if torch.cuda.is_available() and not command.cpu else "cpu"
            )
            with SyncSites(device) as sites:
                result = train_step(*args, **more)
            Path(os.environ[RESULT]).write_text(json.dumps(sites.sites))
            return result

        training.train_step = counting
        original(command)

    launcher.run_as_main = run_as_main
    return launcher.main()


if __name__ == "__main__":
    sys.exit(_count_in_training() if RESULT in os.environ else report.main("syncs", run))
