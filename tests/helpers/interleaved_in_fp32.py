"""Trains as examples/pretrain_gpt.py does, with microbatches interleaved as on a GPU, but in fp32.

Megatron accepts --overlap-moe-expert-parallel-comm only in bf16 and fp16, where sums in another
order have other digits, and --delay-wgrad-compute only with Transformer Engine, whose linear layers
leave their weight gradients out of the backward. Here both are set once the flags are checked;
Megatron's own linear layers have computed their gradients by then. One rank writes down when a
memory layer has its turn.
"""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megamem.megatron.compat import CONFIG_MODULE
from megamem.megatron.model.memory_mlp import MemoryMLP
from megamem.patching import replace, replace_everywhere

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def _say(what: str, layer: MemoryMLP) -> None:
    if dist.get_rank() == 0:
        sys.stdout.write(f"\n{what} of layer {layer.memory.layer}\n")


def _interleaved(original: Any) -> Any:
    def core_transformer_config_from_args(*args: Any, **more: Any) -> Any:
        config = original(*args, **more)
        config.overlap_moe_expert_parallel_comm = config.delay_wgrad_compute = True
        return config

    return core_transformer_config_from_args


def _say_backward(original: Any) -> Any:
    def forward(self: MemoryMLP, hidden_states: Tensor, **how: Any) -> Any:
        if hidden_states.requires_grad:
            hidden_states.register_hook(lambda gradient: _say("backward", self))
        return original(self, hidden_states, **how)

    return forward


def _say_weights(original: Any) -> Any:
    def backward_dw(self: MemoryMLP) -> None:
        _say("weights", self)
        original(self)

    return backward_dw


if __name__ == "__main__":
    replace_everywhere(CONFIG_MODULE, "core_transformer_config_from_args", _interleaved)
    replace(MemoryMLP, "forward", _say_backward)
    replace(MemoryMLP, "backward_dw", _say_weights)
    import pretrain_gpt

    pretrain_gpt.main()
