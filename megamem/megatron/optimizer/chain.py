"""The optimizer of the tables as a member of Megatron's chained optimizer.

Megatron asks every member whether its gradients are finite, what their norm is and what to save,
and tells it to step. It never gets the gradients of the tables, as each operation on them would be
a pass over complete tables.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor, nn

from megamem.checkpoint import sharded_piece, state_key
from megamem.layers.tucker_keys import TuckerKeys
from megamem.layers.value_table import ValueTable
from megamem.megatron.optimizer.layer_gradients import LayerGradients
from megamem.optimizer import TableOptimizer
from megamem.parallel.collectives import HostCopy
from megamem.spec import OfModel

logger = logging.getLogger("megamem")

STATE = "memory_tables"
"""Key of the tables in the state dict of the optimizer."""

CLIP_EPS = 1e-6
"""Megatron adds this number to a norm before it divides by it."""


def find_tables(chunks: Iterable[nn.Module]) -> dict[str, ValueTable]:
    """All tables in these model chunks, by name."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return {module.name: module for module in modules if isinstance(module, ValueTable)}


class TableMember(MegatronOptimizer):
    """Updates the tables when Megatron updates the model.

    All ranks skip a batch if the gradient of a table is not finite on any rank.

    In sparse memory finetuning the gradients of rows that are not chosen must be finite, too, but
    they are not part of the norm.
    """

    optimizer: TableOptimizer

    def __init__(
        self,
        optimizer: TableOptimizer,
        config: OptimizerConfig,
        *,
        data_ranks: int,
        separate_clip: float | OfModel,
        loss_scale: Callable[[], Tensor],
        timeout: timedelta | None = None,
    ) -> None:
        """Wrap the optimizer of the tables.

        Args:
            optimizer: the optimizer of the tables on this rank.
            config: Megatron's settings of the model's optimizer.
            data_ranks: divisor of the summed gradients: the number of data-parallel and
                context-parallel ranks, or 1 if the sum is divided by tokens instead.
            separate_clip: norm to which the gradient of the tables is clipped separately; "model":
                it is clipped with the gradient of the model.
            loss_scale: returns the loss scale of the model.
            timeout: time-out of collectives of all ranks; None for that of the backend.
        """
        super().__init__(optimizer, config)
        self.is_stub_optimizer = False
        self.data_ranks, self.separate_clip = data_ranks, separate_clip
        self.loss_scale = loss_scale
        self.squares: dict[str, Tensor] = {}
        self._squares_by_table: dict[str, Tensor] = {}
        self._numbers: HostCopy | None = None
        self._norm, self._scale, self._found_inf = 0.0, 1.0, False
        self.lowers_loss_scale, self._told_of_overflow = False, False
        # a separate group, because the chain computes one norm for all members that share a group
        self.grad_stats_parallel_group: Any = dist.new_group(timeout=timeout)

    def get_parameters(self) -> list[nn.Parameter]:
        """An empty list, because step_with_ready_grads() clips the gradients of the tables."""
        return []

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad()

    def get_loss_scale(self) -> Tensor:
        return self.loss_scale()

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Sum gradients over replicas and compute their norm; returns False.

        On a GPU all of this is only queued. The host gets the numbers, and whether the batch must
        be skipped, when it asks for the norm: after it has waited for that of the model.
        """
        self.optimizer.reduce()
        self.squares = self._squares_by_table = self.optimizer.squared_norm()
        if self.optimizer.finetunes:
            self.optimizer.choose()
            self.squares = self.optimizer.squared_norm()
        zero = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
        parts = (self._squares_by_table, self.squares)
        totals = torch.stack([sum(part.values(), zero) for part in parts])
        dist.all_reduce(totals, group=self.grad_stats_parallel_group)
        # read now, because the members of the model change the loss scale before any member steps
        scale = 1.0 / (self.data_ranks * self.loss_scale().to(totals).reshape(1))
        self._numbers = HostCopy(torch.cat((totals.sqrt() * scale, scale)))
        return False

    @property
    def norm(self) -> float:
        """Norm of the gradients of all tables; infinite if one is not finite."""
        self._receive()
        return self._norm

    @property
    def scale(self) -> float:
        """What the summed gradients are multiplied by, before clipping."""
        self._receive()
        return self._scale

    @property
    def found_inf(self) -> bool:
        """Whether all ranks must skip this batch."""
        self._receive()
        return self._found_inf

    def _receive(self) -> None:
        """Wait for the numbers of prepare_grads()."""
        if self._numbers is None:
            return
        (of_all, norm, self._scale), self._numbers = self._numbers.numbers(), None
        self._norm = norm if math.isfinite(of_all) else math.inf
        self._found_inf = not math.isfinite(self._norm)
        if not self._found_inf:
            return
        if self.lowers_loss_scale and 1.0 / (self.data_ranks * self._scale) > 1.0:
            self._tell_of_overflow()
        else:
            for name, squares in self._squares_by_table.items():
                if not squares.isfinite():
                    logger.warning(
                        "rank %d: the gradient of value table %s is not finite; "
                        "all ranks skip this batch",
                        dist.get_rank(),
                        name,
                    )

    def _tell_of_overflow(self) -> None:
        """Log, once and on one rank, what a run in fp16 does in its first iterations."""
        if not self._told_of_overflow and dist.get_rank() == 0:
            logger.warning(
                "the gradient of a value table is not finite at a loss scale of %g; all ranks skip "
                "such batches while Megatron lowers the scale, as they do at the start of a run in "
                "fp16. This is logged once",
                1.0 / (self.data_ranks * self._scale),
            )
        self._told_of_overflow = True

    def get_grad_norm(self) -> float:
        """Norm of the gradients of all tables; 0 if these are clipped separately."""
        return self.norm if self.separate_clip == "model" else 0.0

    def has_grad_norm_group(self, grad_norm_group: str) -> bool:
        return False

    def get_grads_for_grad_norm(self, grad_norm_group: str | None = None) -> list[Tensor]:
        """An empty list, because get_grad_norm() returns the norm of the tables."""
        return []

    def count_zeros(self) -> float:
        zeros = self.optimizer.count_zeros().to(torch.cuda.current_device())
        dist.all_reduce(zeros, group=self.grad_stats_parallel_group)
        return float(zeros)

    def step_with_ready_grads(self, model_norm: float | None = None) -> bool:
        """Update the tables; returns True.

        Args:
            model_norm: norm of all gradients that are clipped together.
        """
        norm, limit = model_norm, self.config.clip_grad
        if self.optimizer.finetunes:
            # nothing else is trained, so the gradient of the tables is clipped alone
            norm = self.norm
        if self.separate_clip != "model":
            norm, limit = self.norm, self.separate_clip
        clip = min(1.0, limit / (norm + CLIP_EPS)) if limit > 0 and norm is not None else 1.0
        self.optimizer.step(self.scale * clip)
        return True

    def step(self) -> tuple[bool, float | None, float | None]:
        """Prepare the gradients and update the tables -> (updated, norm, None).

        A chain calls the two parts separately.
        """
        self.prepare_grads()
        if self.found_inf:
            return False, None, None
        return self.step_with_ready_grads(self.norm), self.norm, None

    def reload_model_params(self, state_dict: Any = None) -> None:
        self.optimizer.reload_masters()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the parameter group without its parameters."""
        (group,) = self.optimizer.param_groups
        kept = {key: value for key, value in group.items() if key != "params"}
        return {"steps": self.optimizer.table_steps, "group": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what state_dict() returned; tensors have been loaded in place."""
        self.optimizer.table_steps = state_dict["steps"]
        (group,) = self.optimizer.param_groups
        # all other entries are those of this run, as in the groups of the model
        group |= {key: state_dict["group"][key] for key in ("lr", "weight_decay")}

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **how: Any
    ) -> dict[str, Any]:
        """state_dict(), and each state tensor as a shard of that of the complete table."""
        shards = {}
        for name, table in self.optimizer.tables.items():
            state = self.optimizer.state[table.weight]
            for slot_name, slot in self.optimizer.slots_of(table).items():
                key = state_key(name, slot_name)
                shards[key] = sharded_piece(
                    key, state[slot_name], table.shard, table.group.replica, slot.per_row
                )
        return {**self.state_dict(), "pieces": shards}


class ChainWithTables(ChainedOptimizer):
    """The optimizer of the model and that of the tables as one optimizer of Megatron.

    In a checkpoint the state of the model's optimizer is the same as without tables.

    In sparse memory finetuning the model's optimizer never steps, so weights, their fp32 copies and
    moments are saved as they were loaded. Its gradients still decide whether a batch is skipped,
    and are part of the logged norm.
    """

    def __init__(
        self,
        tables: TableMember,
        model: MegatronOptimizer,
        layer_gradients: Sequence[LayerGradients] = (),
        *,
        keys: Iterable[TuckerKeys] = (),
        loads_in_place: bool = False,
    ) -> None:
        """Join the two.

        Args:
            tables: the optimizer of the tables.
            model: the optimizer of the model.
            layer_gradients: gradients of the model that must be complete before a step.
            keys: keys whose directions follow from cores that the model's optimizer changes; from
                now on they are computed once a step.
            loads_in_place: the state of the model's optimizer is loaded in place, because it is in
                DTensors, as with FSDP2.
        """
        members = _members(model)
        # the tables come first, because they must read the loss scale before a member changes it
        super().__init__([tables, *members])
        self.tables, self.model, self.layer_gradients = tables, model, layer_gradients
        self.loads_in_place, self.keys = loads_in_place, list(keys)
        for each in self.keys:
            each.watched = True
        # Megatron's optimizers of nothing, where all but the tables is frozen, cannot be saved
        self.model_is_frozen = all(getattr(m, "is_stub_optimizer", False) for m in members)
        scalers = [getattr(member, "grad_scaler", None) for member in members]
        self._scalers = [scaler for scaler in scalers if scaler is not None]
        tables.lowers_loss_scale = any(isinstance(s, DynamicGradScaler) for s in self._scalers)
        for scaler in self._scalers:
            scaler.update = _also_when(tables, scaler.update)
        self._norm: float | None = None

    def prepare_grads(self) -> bool:
        self._norm = None
        for gradients in self.layer_gradients:
            gradients.before_step()
        found_inf = super().prepare_grads()
        # with a loss scale Megatron has waited for the device, so the numbers of the tables are
        # there; without one they are read after the norm of the model
        return found_inf or (bool(self._scalers) and self.tables.found_inf)

    def get_grad_norm(self) -> float:
        """Norm of all gradients that are clipped together; the host waits for the device once."""
        tables, *members = self.chained_optimizers
        norms = [member.get_grad_norm() or 0.0 for member in members]
        self._norm = math.sqrt(sum(norm**2 for norm in (tables.get_grad_norm(), *norms)))
        return self._norm

    def step(self) -> tuple[bool, float | None, int | None]:
        """Update everything -> (updated, norm, zeros); (False, None, None) for a skipped batch.

        Unlike Megatron's, it also skips batches in runs without a loss scale.
        """
        result = super().step()
        return (False, None, None) if self.tables.found_inf else result

    def step_with_ready_grads(self) -> bool:
        """Update the model and then the tables; in sparse memory finetuning only the tables.

        Returns:
            Whether anything was updated; False if the gradient of a table is not finite.
        """
        if self.tables.found_inf:
            return False
        if self.tables.optimizer.finetunes:
            return self.tables.step_with_ready_grads()
        updated = self.model.step_with_ready_grads()
        for keys in self.keys:
            keys.stale = True
        return self.tables.step_with_ready_grads(self._norm) and updated

    def state_dict(self) -> Any:
        model = {} if self.model_is_frozen else self.model.state_dict()
        return {"model": model, STATE: self.tables.state_dict()}

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **how: Any
    ) -> dict[Any, Any]:
        if self.tables.optimizer.finetunes and not is_loading:
            self._begin_moments()
        found: dict[Any, Any] = {}
        if not self.model_is_frozen:
            found = self.model.sharded_state_dict(model_sharded_state_dict, is_loading, **how)
        found[STATE] = self.tables.sharded_state_dict(model_sharded_state_dict, is_loading)
        return found

    def _begin_moments(self) -> None:
        """Make the state of Megatron's optimizers, which they expect in a checkpoint."""
        for member in _without_chains(self.model):
            begin = getattr(member, "init_state_fn", None)
            if begin is not None and member.optimizer is not None:
                begin(member.optimizer, member.config)

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        state_dict = dict(state_dict)
        self.tables.load_state_dict(state_dict.pop(STATE))
        if self.model_is_frozen:
            return
        if self.loads_in_place:
            _restore_steps(self.model, state_dict)
        else:
            self.model.load_state_dict(state_dict)


def _members(model: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers whose squared norms add up to that of the model.

    A LayerWiseDistributedOptimizer is a chain, too, but it is not taken apart: its members hold
    only the weights that this rank updates, and know only the norm of their gradients.
    """
    return model.chained_optimizers if type(model) is ChainedOptimizer else [model]


def _without_chains(model: MegatronOptimizer) -> list[MegatronOptimizer]:
    """All optimizers of a chain, of chains in it as well, that are not chains themselves."""
    if not isinstance(model, ChainedOptimizer):
        return [model]
    return [each for member in model.chained_optimizers for each in _without_chains(member)]


def _restore_steps(model: MegatronOptimizer, saved: dict[Any, Any]) -> None:
    """Restore the number of steps, the only state that is not in tensors.

    Optimizers have it in their groups, as fused ones do, or for each parameter, all of the same.
    """
    members = _without_chains(model)
    parts = [saved] if len(members) == 1 else [part for _, part in sorted(saved.items())]
    for member, part in zip(members, parts, strict=True):
        # in half precision there are master weights beside it
        part = part.get("optimizer", part)
        of_groups = [group["step"] for group in part["param_groups"] if "step" in group]
        for group in member.optimizer.param_groups if of_groups else ():
            group["step"] = copy.deepcopy(of_groups[0])
        if (of_weights := part["state"].get("common_step")) is not None:
            for state in member.optimizer.state.values():
                state["step"] = copy.deepcopy(of_weights)


def _also_when(tables: TableMember, update: Callable[[bool], None]) -> Callable[[bool], None]:
    """The update of a loss scaler that also lowers the scale if a table's gradient overflows."""

    def update_scale(found_inf: bool) -> None:
        update(bool(found_inf) or tables.found_inf)

    return update_scale
