"""Tells the losses of memory layers by what Megatron multiplies the gradient of the model's loss.

Megatron starts the backward of a microbatch with the loss scale, after it has divided the loss by
the number of microbatches. With --calculate-per-token-loss it takes the loss as a sum over tokens
in place of this, and divides the gradient of the batch by their number. It then averages over
data-parallel ranks, and so it does with the gradients of these losses.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules

from megamem.layers.losses import LossScale
from megamem.patching import replace_everywhere

_SCALE = LossScale()
"""The scale of the microbatch whose forward was the last. All of a step have the same."""


def megatrons_loss_scale() -> LossScale:
    """What Megatron's schedules set before every backward; 1 in a loop without them."""
    replace_everywhere(schedules, "forward_step_calc_loss", _setting_scale)
    return _SCALE


def _setting_scale(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def forward_step_calc_loss(*rest: Any, **more: Any) -> Any:
        given = signature.bind(*rest, **more).arguments
        config = given["config"]
        scale = torch.ones(1, device=torch.cuda.current_device())
        if config.grad_scale_func is not None:
            scale = config.grad_scale_func(scale)
        _SCALE.by_tokens = config.calculate_per_token_loss
        _SCALE.value = scale if _SCALE.by_tokens else scale / given["num_microbatches"]
        return original(*rest, **more)

    return forward_step_calc_loss
