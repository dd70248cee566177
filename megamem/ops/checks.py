"""Argument checks of the bag ops, made before a kernel could read outside of its tensors.

Letters: r rows on this rank, V row width, M lookups, G bags.
"""

import torch
from torch import Tensor

TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(values_rV: Tensor, row_ids_M: Tensor, weights: Tensor, offsets: Tensor) -> None:
    """Raise a ValueError where shapes, dtypes or devices do not fit."""
    if values_rV.dim() != 2 or values_rV.shape[1] % 8:
        raise ValueError(
            f"values have shape {tuple(values_rV.shape)}, but a table must be [rows, width] with a "
            "width that is a multiple of 8."
        )
    if values_rV.dtype not in TABLE_DTYPES:
        raise ValueError(f"values must be fp32, bf16, fp16 or fp64, not {values_rV.dtype}.")
    if not weights.is_floating_point():
        raise ValueError(f"weights must be floating point, not {weights.dtype}.")
    for name, ids in (("row_ids", row_ids_M), ("offsets", offsets)):
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} must be int64 or int32, not {ids.dtype}.")
    if weights.dim() not in (1, 2) or row_ids_M.shape != weights.shape[:1]:
        raise ValueError(
            f"row_ids have shape {tuple(row_ids_M.shape)} and weights have shape "
            f"{tuple(weights.shape)}, but both must be [lookups], or the weights [lookups, cores]."
        )
    if offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(f"offsets have shape {tuple(offsets.shape)}, but they must be [bags + 1].")
    devices = {x.device for x in (values_rV, row_ids_M, weights, offsets)}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"values, row_ids, weights and offsets are on {names}; use one device.")


def check_gradient(grad_GV: Tensor, table_rV: Tensor, offsets: Tensor) -> None:
    """Raise a ValueError where the gradient does not have the shape and device of the bags."""
    if grad_GV.shape != (len(offsets) - 1, table_rV.shape[1]):
        raise ValueError(
            f"the gradient has shape {tuple(grad_GV.shape)}, but there are {len(offsets) - 1} bags "
            f"of width {table_rV.shape[1]}."
        )
    if grad_GV.device != table_rV.device:
        raise ValueError(
            f"the gradient must be on {table_rV.device}, as the table is, not on {grad_GV.device}."
        )


def check_buffer(buffer_rV: Tensor, values_rV: Tensor) -> None:
    """Raise a ValueError where the value gradient cannot be added to the buffer."""
    if buffer_rV.shape != values_rV.shape or not buffer_rV.is_contiguous():
        raise ValueError(
            f"add_value_grad_to has shape {tuple(buffer_rV.shape)}, but it must be contiguous and "
            f"have the shape of the table, {tuple(values_rV.shape)}."
        )
    if buffer_rV.dtype not in TABLE_DTYPES:
        raise ValueError(f"add_value_grad_to must be fp32 or bf16, not {buffer_rV.dtype}.")
    if buffer_rV.device != values_rV.device:
        raise ValueError(
            f"add_value_grad_to must be on {values_rV.device}, as the table is, not on "
            f"{buffer_rV.device}."
        )


def check_contents(
    row_ids_M: Tensor, offsets: Tensor, num_rows: int, may_skip: bool, equal_bags: bool = False
) -> None:
    """Raise a ValueError for row ids out of range, and for offsets that do not delimit such bags.

    The host waits for the device.
    """
    num_lookups = len(row_ids_M)
    steps = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != num_lookups or (steps < 0).any():
        raise ValueError(
            f"offsets go from {int(offsets[0])} to {int(offsets[-1])} for {num_lookups} lookups, "
            "but they must rise from 0 to the number of lookups and never fall."
        )
    if equal_bags and (steps != steps[:1]).any():
        raise ValueError(
            f"bags have {int(steps.min())} to {int(steps.max())} lookups, but with equal_bags=True "
            "all of them must have the same number."
        )
    if num_lookups == 0:
        return
    low, high = (int(bound) for bound in row_ids_M.aminmax())
    if high >= num_rows:
        raise ValueError(f"row id {high} is out of range for a table of {num_rows} rows.")
    if low < -1:
        raise ValueError(
            f"row id {low} is out of range: rows are counted from 0, and -1 reads no row."
        )
    if low < 0 and not may_skip:
        raise ValueError(f"row id {low} is negative, which may_skip=False rules out.")
