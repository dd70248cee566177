"""Sends partial sums back to the ranks of their tokens, over the axes of a grid.

    1. local rows       sums over the ranks of the node, before anything crosses
    2. node rows        sums over the nodes that hold other rows
    3. node columns     columns from the nodes that hold others
    4. local columns    columns from the ranks of the node that hold others

Letters: G bags (the tokens of all ranks), T tokens on this rank, V row width, v on this rank.
"""

from collections.abc import Generator, Sequence

from torch import Tensor

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
        out_TV, the sums over all ranks.
    """
    grid, here, x = group.grid, plan.bags, bags_Gv
    places = group.coordinates
    local_columns = range(grid.local_columns)
    # the columns of the rank at each place of a node that columns were joined over
    by_node = [
        [widths[node * grid.local_columns + local] for node in range(grid.node_columns)]
        for local in local_columns
    ]
    for axis, axis_group in (
        (LOCAL_ROW, group.local_rows),
        (NODE_ROW, group.node_rows),
        (NODE_COLUMN, group.node_columns),
        (LOCAL_COLUMN, group.local_columns),
    ):
        if axis_group is None:
            continue
        order = here.order_by(axis)
        x, here = reorder(x, here.counts, order), here.ordered(order)
        ranks = (grid.node_rows, grid.node_columns, grid.local_rows, grid.local_columns)[axis]
        counts = [here.with_coordinate(axis, place).total for place in range(ranks)]
        hop: Hop
        if axis in (LOCAL_ROW, NODE_ROW):
            hop = Reduce(axis_group, counts)
        elif axis == NODE_COLUMN:
            hop = Join(axis_group, counts, [[width] for width in by_node[places[LOCAL_COLUMN]]])
        else:
            hop = Join(axis_group, counts, by_node)
        transfer = depart(x, hop)
        plan.sent.add(hop, x.shape[1], x.element_size(), x.element_size())
        yield
        x, here = transfer.arrive(), here.with_coordinate(axis, places[axis])
    return x
