"""The tables' optimizer as one member of Megatron's chained optimizer.

Megatron then asks it, with the rest, whether gradients are finite, what their norm is, to step, and
what to save; it never sees the gradients themselves, which would cost passes over all of a table.
"""

import logging
import math
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor, nn

from megamem.checkpoint import sharded_piece, state_key
from megamem.layers.value_table import ValueTable
from megamem.optimizer import TableOptimizer
from megamem.spec import OfModel

logger = logging.getLogger("megamem")

STATE = "memory_tables"
"""Key of the tables' part in the optimizer's state dict."""

CLIP_EPS = 1e-6
"""What Megatron adds to a norm before it divides by it."""


def find_tables(chunks: Iterable[nn.Module]) -> dict[str, ValueTable]:
    """Name -> table, of all tables in these model chunks."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return {module.name: module for module in modules if isinstance(module, ValueTable)}


class TableMember(MegatronOptimizer):
    """Steps the tables when Megatron steps the model, and skips when Megatron must.

    A batch whose table gradients are not finite on any one rank is skipped on all.

    Where the tables are finetuned sparsely, the gradient of a row that is not chosen must be
    finite, too, but is in no norm.
    """

    optimizer: TableOptimizer

    def __init__(
        self,
        optimizer: TableOptimizer,
        config: OptimizerConfig,
        *,
        data_ranks: int,
        clip_apart: float | OfModel,
        loss_scale: Callable[[], Tensor],
        timeout: timedelta | None = None,
    ) -> None:
        """Join the tables' optimizer to a run.

        Args:
            optimizer: of this rank's tables.
            config: Megatron's.
            data_ranks: what the sum of gradients is divided by, as the mean over data-parallel and
                context-parallel ranks is wanted; 1 where it is divided by tokens instead.
            clip_apart: norm at which the tables' gradient is clipped by itself; "model": with the
                model's.
            loss_scale: that of the model.
            timeout: of the collectives of all ranks; None is that of the backend.
        """
        super().__init__(optimizer, config)
        self.is_stub_optimizer = False
        self.data_ranks, self.clip_apart = data_ranks, clip_apart
        self.loss_scale = loss_scale
        self.norm, self.scale = 0.0, 1.0
        self.squares: dict[str, Tensor] = {}
        self.found_inf = False
        # a group of its own: the chain takes members with one group for members with one gradient
        self.grad_stats_parallel_group: Any = dist.new_group(timeout=timeout)

    def get_parameters(self) -> list[nn.Parameter]:
        """None that Megatron should clip: the tables' gradients are scaled as they are read."""
        return []

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad()

    def get_loss_scale(self) -> Tensor:
        return self.loss_scale()

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Sum replicas' gradients and take the norm; True if the batch must be skipped."""
        # the model's members change their loss scale before anything steps
        self.scale = 1.0 / (self.data_ranks * float(self.loss_scale()))
        self.optimizer.reduce()
        self.squares = by_table = self.optimizer.squared_norm()
        if self.optimizer.finetunes:
            self.optimizer.choose()
            self.squares = self.optimizer.squared_norm()
        zero = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
        totals = torch.stack([sum(part.values(), zero) for part in (by_table, self.squares)])
        dist.all_reduce(totals, group=self.grad_stats_parallel_group)
        norms = [math.sqrt(total) * self.scale for total in totals.tolist()]
        self.norm = norms[1] if math.isfinite(norms[0]) else math.inf
        self.found_inf = not math.isfinite(self.norm)
        if self.found_inf:
            for name, squares in by_table.items():
                if not squares.isfinite():
                    logger.warning(
                        "rank %d: the gradient of value table %s is not finite; "
                        "all ranks skip this batch",
                        dist.get_rank(),
                        name,
                    )
        return self.found_inf

    def get_grad_norm(self) -> float:
        """Norm of all tables' gradients; 0 where they are clipped apart."""
        return self.norm if self.clip_apart == "model" else 0.0

    def has_grad_norm_group(self, grad_norm_group: str) -> bool:
        return False

    def get_grads_for_grad_norm(self, grad_norm_group: str | None = None) -> list[Tensor]:
        """None: their norm is taken here."""
        return []

    def count_zeros(self) -> float:
        zeros = self.optimizer.count_zeros().to(torch.cuda.current_device())
        dist.all_reduce(zeros, group=self.grad_stats_parallel_group)
        return float(zeros)

    def step_with_ready_grads(self, model_norm: float | None = None) -> bool:
        """Update the tables.

        Args:
            model_norm: of all gradients that are clipped together.
        """
        norm, limit = model_norm, self.config.clip_grad
        if self.optimizer.finetunes:
            # nothing else is trained, so there is nothing else to be clipped with
            norm = self.norm
        if self.clip_apart != "model":
            norm, limit = self.norm, self.clip_apart
        clip = min(1.0, limit / (norm + CLIP_EPS)) if limit > 0 and norm is not None else 1.0
        self.optimizer.step(self.scale * clip)
        return True

    def step(self) -> tuple[bool, float | None, float | None]:
        """Step alone, as a chain of nothing else would."""
        if self.prepare_grads():
            return False, None, None
        return self.step_with_ready_grads(self.norm), self.norm, None

    def reload_model_params(self, state_dict: Any = None) -> None:
        self.optimizer.reload_masters()

    def state_dict(self) -> dict[str, Any]:
        """Steps made, and the learning rate and decay of the next."""
        (group,) = self.optimizer.param_groups
        kept = {key: value for key, value in group.items() if key != "params"}
        return {"steps": self.optimizer.table_steps, "group": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state_dict()'s; tensors were loaded in place."""
        self.optimizer.table_steps = state_dict["steps"]
        (group,) = self.optimizer.param_groups
        # the schedule of this run stays, as it does for the model's groups
        group |= {key: state_dict["group"][key] for key in ("lr", "weight_decay")}

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **how: Any
    ) -> dict[str, Any]:
        """state_dict() and every state tensor as a piece of its table."""
        pieces = {}
        for name, table in self.optimizer.tables.items():
            state = self.optimizer.state[table.weight]
            for slot_name, slot in self.optimizer.slots_of(table).items():
                key = state_key(name, slot_name)
                pieces[key] = sharded_piece(
                    key, state[slot_name], table.shard, table.group.replica, slot.per_row
                )
        return {**self.state_dict(), "pieces": pieces}


class ChainWithTables(ChainedOptimizer):
    """Megatron's optimizer of the model, and the tables'.

    In a checkpoint the model's part is as it would be without tables.

    Where the tables are finetuned sparsely, the model's part never steps: its weights, their fp32
    copies and their moments are saved as they were loaded. Its gradients still decide which batch
    is skipped, and are in the norm that is logged.
    """

    def __init__(self, tables: TableMember, model: MegatronOptimizer) -> None:
        members = model.chained_optimizers if isinstance(model, ChainedOptimizer) else [model]
        # the tables come first: a loss scale must not change before they have read it
        super().__init__([tables, *members])
        self.tables, self.model = tables, model
        for member in members:
            scaler = getattr(member, "grad_scaler", None)
            if scaler is not None:
                scaler.update = _also_when(tables, scaler.update)
        self._norm: float | None = None

    def prepare_grads(self) -> bool:
        self._norm = None
        return super().prepare_grads()

    def get_grad_norm(self) -> float:
        self._norm = super().get_grad_norm()
        return self._norm

    def step_with_ready_grads(self) -> bool:
        """Update the model, then the tables; only the tables where these are finetuned sparsely."""
        if self.tables.optimizer.finetunes:
            return self.tables.step_with_ready_grads()
        updated = self.model.step_with_ready_grads()
        return self.tables.step_with_ready_grads(self._norm) and updated

    def state_dict(self) -> Any:
        return {"model": self.model.state_dict(), STATE: self.tables.state_dict()}

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **how: Any
    ) -> dict[Any, Any]:
        if self.tables.optimizer.finetunes and not is_loading:
            self._begin_moments()
        found = self.model.sharded_state_dict(model_sharded_state_dict, is_loading, **how)
        found[STATE] = self.tables.sharded_state_dict(model_sharded_state_dict, is_loading)
        return found

    def _begin_moments(self) -> None:
        """Megatron's Adam has moments from its first step on, and looks for them when it loads."""
        for member in self.chained_optimizers:
            begin = getattr(member, "init_state_fn", None)
            if member is not self.tables and begin is not None and member.optimizer is not None:
                begin(member.optimizer, member.config)

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        state_dict = dict(state_dict)
        self.tables.load_state_dict(state_dict.pop(STATE))
        self.model.load_state_dict(state_dict)


def _also_when(tables: TableMember, update: Callable[[bool], None]) -> Callable[[bool], None]:
    """A loss scaler's update that lowers the scale when the tables overflowed, too."""

    def update_scale(found_inf: bool) -> None:
        update(bool(found_inf) or tables.found_inf)

    return update_scale
