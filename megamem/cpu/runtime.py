"""Runs Megatron's unmodified training loop on CPUs over gloo.

This is for dry runs, tests and learning. The same schedule, collectives, optimizer and checkpoint
code runs as on GPUs, on one or many ranks, but its speed says nothing about that of a GPU.
Transformer Engine, context parallelism, CUDA graphs and fp8 do not work.

install() replaces names in torch and Megatron for the complete process. It must be called before
Megatron is imported, because Megatron copies many of these names when it is imported.
"""

import functools
import importlib
import inspect
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
    # Megatron compiles small functions, which takes longer than it saves at the sizes of a CPU run
    "TORCHDYNAMO_DISABLE": "1",
    # Megatron requires this for tensor parallelism on GPUs older than Blackwell
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
# packages of GPU kernels, which Megatron uses in place of torch if they are installed
GPU_PACKAGES = ("transformer_engine", "apex", "amp_C")


def install(force: bool = False) -> None:
    """Let Megatron train on the CPU in this process; a second call changes nothing.

    Args:
        force: whether to do so also on a machine with a GPU, which is then not used.

    Raises:
        ConfigurationError: the machine has a GPU and `force` is not set.
        RuntimeError: Megatron has already been imported.
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
    cpu_torch.redirect_generators()
    cpu_torch.redirect_meshes()
    cpu_torch.stand_in_for_cuda()
    cpu_torch.accept_tensor_splits()
    _adapt_core()
    _adapt_training()


def _installed() -> bool:
    return hasattr(torch.Tensor.to, MARKER)


def _check(force: bool) -> None:
    if not force and torch.cuda.is_available():
        raise ConfigurationError(
            "--cpu was given on a machine with a GPU; drop --cpu to train on the GPU, or use "
            "--cpu=force to train on the CPU and leave the GPU idle."
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError("the CPU runtime must be installed before megatron is imported")


def _adapt_core() -> None:
    """Supply in plain torch what megatron.core takes from Transformer Engine or Apex."""
    norm = importlib.import_module("megatron.core.transformer.torch_norm")
    replace(norm.WrappedTorchNorm, "__new__", _norm_under_sequence_parallelism)
    cpu_hybrid.supply_local_stack()

    optimizer = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    replacements: list[tuple[Any, str, Any]] = [
        (optimizer, "Adam", FusedAdam),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distributed, "Adam", FusedAdam),
        (distributed, "HAVE_APEX_OR_TE", True),
        (distributed, "USING_APEX_OPTIMIZER", True),
    ]
    for module, name, value in replacements:
        require(module, name)
        setattr(module, name, value)

    # since 0.20 this compares a layer with classes that need Transformer Engine
    name = "megatron.core.transformer.multi_token_prediction"
    prediction: Any = importlib.import_module(name)
    if hasattr(prediction, "is_inference_column_parallel_linear"):
        prediction.is_inference_column_parallel_linear = lambda module: False

    _adapt_inference()

    # not worth a warning: the tracker of random states changes the only generator and restores it
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _adapt_inference() -> None:
    """Let Megatron's static inference engine generate on a CPU; the dynamic one needs kernels."""
    communication: Any = importlib.import_module("megatron.core.inference.communication_utils")
    # an assertion that the tensor is one of a GPU
    require(communication, "_is_cuda")
    communication._is_cuda = lambda tensor: None
    static = importlib.import_module("megatron.core.inference.engines.static_engine")
    replace(static.StaticInferenceEngine, "__init__", _static_alone)


def _static_alone(original: Callable[..., None]) -> Callable[..., None]:
    """__init__ of StaticInferenceEngine that does not make a dynamic engine, which it would use."""
    signature = inspect.signature(original)

    def __init__(*rest: Any, **more: Any) -> None:
        given = signature.bind(*rest, **more)
        given.arguments["legacy"] = True
        original(*given.args, **given.kwargs)

    return __init__


def _norm_under_sequence_parallelism(new: Callable) -> Any:
    """Let torch's norms be used with sequence parallelism, which Megatron refuses.

    They only need the attribute on their parameters with which Megatron sums the gradients over the
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
    """Adapt the flags, and turn off the warm-up of fused kernels at start."""
    cpu_flags.adapt_flags()
    training = importlib.import_module("megatron.training.training")
    # the warm-up draws random numbers, on a GPU from a separate generator; on a CPU it would make
    # the initial weights depend on the tensor-parallel size
    replace(training, "set_jit_fusion_options", lambda _: lambda *args, **kwargs: None)
