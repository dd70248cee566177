"""Hides the tables of a model from what Megatron does with all of its parameters.

Megatron takes a parameter for the same on all data-parallel ranks, which is true of a table only if
its memory group is the tensor-parallel group. What it does with all parameters of a model is done
here with its tables hidden, and for the tables by their own groups.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamem.checkpoint import TABLES
from megamem.layers.value_table import ValueTable
from megamem.megatron.optimizer.chain import find_tables
from megamem.ops.squared_norm import rows_of_a_block

logger = logging.getLogger("megamem")


@contextlib.contextmanager
def hidden_tables(chunks: Iterable[nn.Module]) -> Iterator[dict[str, ValueTable]]:
    """Take the tables out of these model chunks for a while; yields the tables by name."""
    chunks = list(chunks)
    tables = find_tables(chunks)
    modules = [module for chunk in chunks for module in chunk.modules()]
    owners = {module: dict(module._modules) for module in modules if TABLES in module._modules}
    try:
        for owner in owners:
            del owner._modules[TABLES]
        yield tables
    finally:
        for owner, children in owners.items():
            # in the order in which they were, which is that of parameters
            owner._modules.clear()
            owner._modules.update(children)


def _as_list(model: Any) -> list[nn.Module]:
    return model if isinstance(model, list) else [model]


def norm_of_all(original: Callable[..., float]) -> Callable[..., float]:
    """calc_params_l2_norm() of Megatron that counts each row of a table once.

    Megatron would sum tables over the tensor-parallel ranks alone, count a table that several
    pipeline stages share on each of them, and make fp32 copies of tables in bf16.
    """

    def calc_params_l2_norm(model: Any, *rest: Any, **more: Any) -> float:
        with hidden_tables(_as_list(model)) as tables:
            of_model = original(model, *rest, **more)
        squares = sum_of_squares(tables.values())
        dist.all_reduce(squares)
        return math.sqrt(of_model**2 + float(squares))

    return calc_params_l2_norm


def sum_of_squares(tables: Iterable[ValueTable]) -> Tensor:
    """This rank's part of the sum of squares of all rows, [] in fp64; replicas are counted once."""
    total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    for table in tables:
        if table.group.replica == 0:
            dtype = torch.promote_types(table.weight.dtype, torch.float32)
            # a norm over one dimension makes no copy of the table in another dtype
            norms = torch.linalg.vector_norm(table.weight.detach(), dim=1, dtype=dtype)
            total += norms.double().square().sum()
    return total


def without_tables(original: Callable[..., Any]) -> Callable[..., Any]:
    """broadcast_params() of Megatron's DistributedDataParallel that leaves the tables alone.

    Initial rows depend on seed and row alone, so they are the same on all replicas already.
    """

    def broadcast_params(self: nn.Module, *rest: Any, **more: Any) -> Any:
        with hidden_tables([self]):
            return original(self, *rest, **more)

    return broadcast_params


def compares_replicas(original: Callable[..., bool]) -> Callable[..., bool]:
    """check_param_hashes_across_dp_replicas() that compares a table with its own replicas."""

    def check_param_hashes_across_dp_replicas(model: Any, *rest: Any, **more: Any) -> bool:
        with hidden_tables(_as_list(model)) as tables:
            same = original(model, *rest, **more)
        # every table is compared, because the ranks of a group must make the same calls
        for table in tables.values():
            same = replicas_are_equal(table) and same
        return same

    return check_param_hashes_across_dp_replicas


def replicas_are_equal(table: ValueTable) -> bool:
    """Whether all replicas of this shard have the same bits; each of them must call it."""
    group = table.group.replicas
    if group is None:
        return True
    digest = hashlib.sha1()
    rows = rows_of_a_block(*table.weight.shape)
    for block in table.weight.detach().split(rows):
        digest.update(block.cpu().view(torch.uint8).numpy().tobytes())
    own = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=table.weight.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    differ = [replica for replica, other in enumerate(found) if not torch.equal(own, other)]
    if differ:
        logger.error(
            "rank %d: value table %s differs from that of replicas %s of its shard",
            dist.get_rank(),
            table.name,
            ", ".join(map(str, differ)),
        )
    return not differ
