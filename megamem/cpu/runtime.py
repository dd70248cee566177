"""Megatron's own training loop on a CPU and gloo, without a GPU and without a change to Megatron.

This is for dry runs, tests and learning: the same schedule, collectives, optimizer and checkpoint
code runs, at a CPU's speed, on one or many ranks. Nothing measured here says anything about a GPU.
Transformer Engine, context parallelism, CUDA graphs and fp8 are out of its reach.

install() replaces names in torch and Megatron for the whole process. It must run before Megatron is
imported, because Megatron copies many of those names when it is.
"""

import functools
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from megamem.config import ConfigurationError
from megamem.cpu import flags as cpu_flags
from megamem.cpu import hybrid as cpu_hybrid
from megamem.cpu import torch_calls as cpu_torch
from megamem.cpu.optimizer import FusedAdam
from megamem.patching import MARKER, replace, require

ENVIRONMENT = {
    # Megatron compiles small functions; a compiler costs more than it gives at these sizes
    "TORCHDYNAMO_DISABLE": "1",
    # Megatron insists on it for tensor parallelism on GPUs of before 2024
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
# kernels for a GPU, which Megatron prefers to torch's own wherever they are installed
GPU_PACKAGES = ("transformer_engine", "apex", "amp_C")


def install(force: bool = False) -> None:
    """Make this process a CPU-only one in which Megatron trains.

    Args:
        force: also where there is a GPU, which is then not used.
    """
    if _installed():
        return
    _check(force)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for package in GPU_PACKAGES:
        sys.modules[package] = None  # type: ignore[assignment]
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|transformer-engine|Apex)")
    cpu_torch.redirect_tensors()
    cpu_torch.stand_in_for_cuda()
    cpu_torch.accept_tensor_splits()
    _adapt_core()
    _adapt_training()


def _installed() -> bool:
    return hasattr(torch.Tensor.to, MARKER)


def _check(force: bool) -> None:
    if not force and torch.cuda.is_available():
        raise ConfigurationError(
            "--cpu was given on a machine with a GPU. Drop --cpu to train on the GPU, or write "
            "--cpu=force to leave the GPU idle."
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError("the CPU runtime must be installed before megatron is imported")


def _adapt_core() -> None:
    """What megatron.core takes from Transformer Engine or Apex is supplied in plain torch."""
    norm = importlib.import_module("megatron.core.transformer.torch_norm")
    replace(norm.WrappedTorchNorm, "__new__", _norm_under_sequence_parallelism)
    cpu_hybrid.supply_local_stack()

    optimizer = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    answers: list[tuple[Any, str, Any]] = [
        (optimizer, "Adam", FusedAdam),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distributed, "Adam", FusedAdam),
        (distributed, "HAVE_APEX_OR_TE", True),
        (distributed, "USING_APEX_OPTIMIZER", True),
    ]
    for module, name, value in answers:
        require(module, name)
        setattr(module, name, value)

    # the tracker of random states forks the only generator there is, and puts it back
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _norm_under_sequence_parallelism(new: Callable) -> Any:
    """torch's norms know nothing of sequence parallelism, so Megatron refuses the pair.

    All it takes is the mark on the parameters by which Megatron sums their gradients over the
    tensor-parallel ranks.
    """

    @functools.wraps(new)
    def with_mark(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        asked, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = new(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = asked
        for param in norm.parameters():
            param.sequence_parallel = asked
        return norm

    return with_mark


def _adapt_training() -> None:
    """Flags, and a start without the warm-up of fused kernels."""
    cpu_flags.adapt_flags()
    training = importlib.import_module("megatron.training.training")
    # the warm-up draws random numbers, on a GPU from a generator of its own; here it would make
    # the first weights depend on the tensor-parallel size
    replace(training, "set_jit_fusion_options", lambda _: lambda *args, **kwargs: None)
