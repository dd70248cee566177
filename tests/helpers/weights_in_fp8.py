"""Trains as examples/pretrain_gpt.py does, with --fp8-param-gather as far as a CPU can.

Transformer Engine stores the weights of its own linear layers in fp8, and Megatron asks it which
ones these are and to quantize them after a step. What stands in for it here answers for Megatron's
linear layers, whose weights it rounds to fp8. One rank writes down which buffer of Megatron's
DistributedDataParallel each parameter is in.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import fp8_utils
from megatron.core.distributed import DistributedDataParallel, param_and_grad_buffer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.training.global_vars import get_args
from torch import Tensor

from megamem.megatron.compat import CONFIG_MODULE
from megamem.patching import replace, replace_everywhere

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

STANDS_FOR_FP8 = "stands_for_fp8"
SCALE = 2**8


def _in_fp8(numbers: Tensor) -> Tensor:
    return (numbers * SCALE).to(torch.float8_e4m3fn).to(torch.bfloat16) / SCALE


def _with_gather(original: Any) -> Any:
    def core_transformer_config_from_args(*given: Any, **more: Any) -> Any:
        config = original(*given, **more)
        # after the flags were checked, which needs Transformer Engine
        get_args().fp8_param_gather = True
        return config

    return core_transformer_config_from_args


def _with_weight_in_fp8(original: Any) -> Any:
    def __init__(self: Any, *given: Any, **more: Any) -> None:
        original(self, *given, **more)
        # the output layer has the weight of the embedding
        if self.weight is not None:
            self.weight.data.copy_(_in_fp8(self.weight.data))
            setattr(self.weight, STANDS_FOR_FP8, True)

    return __init__


def _says_buffers(original: Any) -> Any:
    def __init__(self: Any, *given: Any, **more: Any) -> None:
        original(self, *given, **more)
        if dist.get_rank() == 0:
            parameters = self.module.module.named_parameters()
            names = {parameter: name for name, parameter in parameters}
            for buffer in self.buffers:
                for parameter in buffer.params:
                    found = names.pop(parameter)
                    sys.stdout.write(f"\n{found} is in the buffer {buffer.param_dtype}\n")
            for name in names.values():
                sys.stdout.write(f"\n{name} is in no buffer\n")

    return __init__


def quantize(
    weights: list[Tensor], masters: list[Tensor | None], offsets: list[int | None], *_: Any
) -> None:
    """Round what this rank has stepped into the weights; other ranks get it by a gather."""
    for weight, master, offset in zip(weights, masters, offsets, strict=True):
        if master is not None and offset is not None:
            weight.data.view(-1)[offset : offset + master.numel()] = _in_fp8(master)


@contextlib.contextmanager
def _one_by_one(*_: Any, **__: Any) -> Iterator[Any]:
    """In place of coalesced collectives, which gloo joins to one tensor of one dtype."""
    yield SimpleNamespace(wait=lambda: None)


def _waiting(collective: Any) -> Any:
    def now(*given: Any, async_op: bool = False, **more: Any) -> Any:
        return collective(*given, **more)

    return now


if __name__ == "__main__":
    replace(param_and_grad_buffer, "_coalescing_manager", lambda _: _one_by_one)
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        replace(param_and_grad_buffer, name, _waiting)
    answers = {
        "is_float8tensor": lambda tensor: getattr(tensor, STANDS_FOR_FP8, False),
        # the bytes of fp8 would move into the buffer here
        "modify_underlying_storage": lambda weight, storage: None,
        "quantize_param_shard": quantize,
    }
    for name, answer in answers.items():
        replace_everywhere(fp8_utils, name, lambda _, answer=answer: answer)
    replace_everywhere(CONFIG_MODULE, "core_transformer_config_from_args", _with_gather)
    for linear in (ColumnParallelLinear, RowParallelLinear):
        replace(linear, "__init__", _with_weight_in_fp8)
    replace(DistributedDataParallel, "__init__", _says_buffers)
    import pretrain_gpt

    pretrain_gpt.main()
