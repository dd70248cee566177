"""The factor of the tables' learning rate that decays during the training (--memory-lr-times)."""

from collections.abc import Callable
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megamem.patching import replace
from megamem.spec import MemorySpec

TIMES, UNTIL = "lr_times", "lr_times_until"
"""Entries of a parameter group that has such a factor."""


def decaying_factor(spec: MemorySpec) -> dict[str, float]:
    """The entries for the parameter group of the tables; none if their factor is always 1.

    Megatron's scheduler then multiplies the rate of such groups, however it decays otherwise. It
    does so from its number of steps, which checkpoints hold.
    """
    if spec.lr_times == 1:
        return {}
    replace(OptimizerParamScheduler, "get_lr", _multiplied)
    return {TIMES: spec.lr_times, UNTIL: spec.lr_times_until}


def factor(progress: float, times: float, until: float) -> float:
    """The factor at a part of the training: `times` at its start, and 1 from `until` on."""
    if progress >= until:
        return 1.0
    return 1 + (times - 1) * (1 - progress / until)


def _multiplied(original: Callable[..., float]) -> Callable[..., float]:
    def get_lr(self: Any, param_group: dict[str, Any], *rest: Any, **more: Any) -> float:
        rate = original(self, param_group, *rest, **more)
        if TIMES not in param_group:
            return rate
        # Megatron counts samples here, and weight decay increases over all of the training, also
        # where the learning rate decays over another part of it
        progress = self.num_steps / max(1, self.wd_incr_steps)
        return rate * factor(progress, param_group[TIMES], param_group[UNTIL])

    return get_lr
