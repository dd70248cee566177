"""Sends partial sums back to the ranks of their tokens, over the axes of a grid.

    1. local rows       sums over the ranks of the node, before anything crosses
    2. node rows        sums over the nodes that hold other rows
    3. node columns     columns from the nodes that hold others
    4. local columns    columns from the ranks of the node that hold others

Letters: G bags (of the tokens of all ranks), T tokens on this rank, V row width, v on this rank.
"""

from collections.abc import Generator, Sequence
from functools import lru_cache

from torch import Tensor

from megamem.parallel.blocks import Blocks
from megamem.parallel.hops import Hop, Join, Reduce, depart, reorder
from megamem.parallel.memory_group import (
    LOCAL_COLUMN,
    LOCAL_ROW,
    NODE_COLUMN,
    NODE_ROW,
    MemoryGroup,
)
from megamem.parallel.routing import RoutingPlan


def send_home(
    plan: RoutingPlan, bags_Gv: Tensor, group: MemoryGroup, widths: Sequence[int]
) -> Generator[None, None, Tensor]:
    """Send the partial bags of a piece to the ranks of their tokens; yield while they are on the
    way.

    Args:
        plan: the plan of the piece.
        bags_Gv: this rank's part of the sum of each bag.
        group: the ranks that share the table.
        widths: number of columns of every column rank; their sum is V.

    Returns:
        out_TV, the sums over all ranks; [T * Y, V], if a token has Y bags.
    """
    x = bags_Gv
    for counts, order, hop in _steps(plan.bags, group, tuple(widths)):
        x = reorder(x, counts, order)
        transfer = depart(x, hop)
        plan.sent.add(hop, x.shape[1], x.element_size(), x.element_size())
        yield
        x = transfer.arrive()
    return x


@lru_cache(maxsize=256)
def _steps(
    bags: Blocks, group: MemoryGroup, widths: tuple[int, ...]
) -> list[tuple[list[int], list[int], Hop]]:
    """Return rows of blocks, the order to bring them into, and the hop that follows, for each hop.

    They depend on the numbers of tokens alone, which are mostly the same in every pass.
    """
    grid, here, places = group.grid, bags, group.coordinates
    # the columns of the rank at each place of a node that columns were joined over
    by_node = [
        [widths[node * grid.local_columns + local] for node in range(grid.node_columns)]
        for local in range(grid.local_columns)
    ]
    found: list[tuple[list[int], list[int], Hop]] = []
    for axis, axis_group in (
        (LOCAL_ROW, group.local_rows),
        (NODE_ROW, group.node_rows),
        (NODE_COLUMN, group.node_columns),
        (LOCAL_COLUMN, group.local_columns),
    ):
        if axis_group is None:
            continue
        counts, order = here.counts, here.order_by(axis)
        by_rank = here.by_coordinate(axis)
        sent = [blocks.total for blocks in by_rank]
        hop: Hop
        if axis in (LOCAL_ROW, NODE_ROW):
            hop = Reduce(axis_group, sent)
        elif axis == NODE_COLUMN:
            hop = Join(axis_group, sent, [[width] for width in by_node[places[LOCAL_COLUMN]]])
        else:
            hop = Join(axis_group, sent, by_node)
        found.append((counts, order, hop))
        here = by_rank[places[axis]]
    return found
