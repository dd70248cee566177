"""Sum of the squares of a table's gradient: the specification of the op.

Letters: r rows on this rank, V row width, E touched rows.
"""

from torch import Tensor


def squared_norm(grads_rV: Tensor, touched_r: Tensor | None = None) -> Tensor:
    """Return the sum of the squares of all gradients, in fp64.

    It is not finite where a gradient that is read is not. Squares of bf16, fp16 and fp32 numbers
    are exact in fp64, so only the additions round.

    Args:
        grads_rV: gradients.
        touched_r: whether each row has a gradient; the others are not read. Default: all have.

    Returns:
        a scalar, fp64.
    """
    rows_EV = grads_rV if touched_r is None else grads_rV[touched_r.bool()]
    return rows_EV.double().square().sum()
