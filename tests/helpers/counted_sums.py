"""Runs a script as megamem.run does, and counts what sums gradients of memory layers' own weights.

    layer sums: NUMBER of all-reduces of this rank in all steps together
    digest: VALUE, the sum of the absolute values of all weights of this rank after the last step

SUMS=each_backward leaves the sums where a layer without Megatron makes them, in every backward.
"""

import os
import sys
from typing import Any

from megamem.megatron import launcher

SUMMING = ("parallel/collectives.py", "optimizer/layer_gradients.py")
sums = 0


def count_sums() -> None:
    """Replace all_reduce by one that counts the calls from the files that sum these gradients."""
    import torch.distributed as dist

    original = dist.all_reduce

    def all_reduce(*args: Any, **options: Any) -> Any:
        global sums
        sums += sys._getframe(1).f_code.co_filename.endswith(SUMMING)
        return original(*args, **options)

    dist.all_reduce = all_reduce


def keep_sums_in_backward() -> None:
    """Let the layers sum in every backward, as they do in other training loops."""
    from megamem.megatron.optimizer import with_memory

    with_memory.sum_once_a_step = lambda chunks: []


def watch_weights() -> list[Any]:
    """Keep the model that is trained, and return the list that will hold its chunks."""
    from megatron.training import training

    chunks: list[Any] = []
    original = training.get_megatron_optimizer

    def get_megatron_optimizer(config: Any, model: Any, *args: Any, **options: Any) -> Any:
        chunks.extend(model)
        return original(config, model, *args, **options)

    training.get_megatron_optimizer = get_megatron_optimizer
    return chunks


def main() -> int:
    run = launcher.run_as_main

    def run_as_main(command: Any) -> None:
        count_sums()
        if os.environ.get("SUMS") == "each_backward":
            keep_sums_in_backward()
        chunks = watch_weights()
        try:
            run(command)
        finally:
            weights = [weight for chunk in chunks for weight in chunk.parameters()]
            digest = sum(float(weight.detach().double().abs().sum()) for weight in weights)
            sys.stdout.write(f"layer sums: {sums}\ndigest: {digest!r}\n")

    launcher.run_as_main = run_as_main
    return launcher.main()


if __name__ == "__main__":
    sys.exit(main())
