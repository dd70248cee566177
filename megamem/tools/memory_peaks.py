"""Records the peak memory of tensors in each phase of a step."""

from typing import Any

import torch

PHASES = ("forward", "backward", "norm", "update")


class GpuPeaks:
    """Peak memory of each phase, from torch's CUDA allocator.

    A call with the name of a phase begins that phase.
    """

    def __init__(self) -> None:
        self._phase, self._peaks = "", dict[str, int]()

    def __enter__(self) -> "GpuPeaks":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, phase: str) -> None:
        torch.cuda.synchronize()
        if self._phase:
            self._peaks[self._phase] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._phase = phase

    def peaks(self) -> dict[str, int]:
        """Phase -> peak in bytes."""
        return self._peaks


class CpuPeaks:
    """Peak memory of each phase, from the allocations and releases since the context was entered.

    A call with the name of a phase begins that phase.
    """

    def __init__(self) -> None:
        cpu = torch.profiler.ProfilerActivity.CPU
        self._profiler = torch.profiler.profile(activities=[cpu], profile_memory=True)
        self._marks: list[Any] = []

    def __enter__(self) -> "CpuPeaks":
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)

    def __call__(self, phase: str) -> None:
        with torch.profiler.record_function(f"phase {phase}"):
            pass

    def peaks(self) -> dict[str, int]:
        """Phase -> peak in bytes."""
        profiler = self._profiler.profiler
        assert profiler is not None and profiler.kineto_results is not None
        found, phase, held = dict.fromkeys(PHASES, 0), "", 0
        for event in sorted(profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name().startswith("phase "):
                phase = event.name().removeprefix("phase ")
            elif event.name() == "[memory]":
                held += event.nbytes()  # type: ignore[attr-defined]
            if phase in found:
                found[phase] = max(found[phase], held)
        return found


class _NormOfGpu(torch.autograd.Function):
    """Saves what RMSNorm saves on a GPU, where it is one kernel; the result is meaningless."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, scale)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, weight, _ = ctx.saved_tensors
        return grad.clone(), torch.zeros_like(weight)


def norm_of_gpu(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return something of the shape of an RMSNorm, for which as much is saved as on a GPU."""
    normed = _NormOfGpu.apply(x, weight)
    assert isinstance(normed, torch.Tensor)
    return normed


def leave_kernels_out() -> None:
    """Make launches of kernels do nothing in this process; row ids become random numbers.

    RMSNorm, which on a CPU consists of several ops, becomes one.
    """
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        name, outputs = kernel.fn.__name__, dict(zip(kernel.arg_names, args, strict=False))
        if name == "_place_kernel":
            run(kernel, *args, **options)
        elif name == "_pair_kernel":
            outputs["row_ids"].random_(options["N"] ** 2)
            outputs["scores"].normal_()
        elif name == "_best_sides_kernel":
            outputs["kept"].random_(options["N"])
        elif name == "_best_pairs_kernel":
            outputs["row_ids"].random_(options["N"] ** 2)
            outputs["pairs"].random_(options["K"] ** 2)

    InterpretedFunction.run = launch
    torch.nn.functional.rms_norm = norm_of_gpu  # type: ignore[assignment]
