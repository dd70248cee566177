"""What the bag ops refuse: one clear error, before a kernel reads what is not there."""

import torch
from torch import Tensor

TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(values_rV: Tensor, row_ids_M: Tensor, weights_M: Tensor, offsets: Tensor) -> None:
    """Raise a ValueError where a kernel would read what is not there or misread what is."""
    if values_rV.dim() != 2 or values_rV.shape[1] % 8:
        raise ValueError(
            f"values of shape {tuple(values_rV.shape)}: a table is [rows, width], the width a "
            "multiple of 8."
        )
    if values_rV.dtype not in TABLE_DTYPES:
        raise ValueError(f"values of {values_rV.dtype}: a table is fp32, bf16, fp16 or fp64.")
    if not weights_M.is_floating_point():
        raise ValueError(f"weights of {weights_M.dtype}: they must be floating point.")
    for name, ids in (("row_ids", row_ids_M), ("offsets", offsets)):
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} of {ids.dtype}: they must be int64 or int32.")
    if row_ids_M.dim() != 1 or row_ids_M.shape != weights_M.shape:
        raise ValueError(
            f"row_ids of shape {tuple(row_ids_M.shape)} and weights of shape "
            f"{tuple(weights_M.shape)}: both must be [lookups]."
        )
    if offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(f"offsets of shape {tuple(offsets.shape)}: they must be [bags + 1].")
    devices = {x.device for x in (values_rV, row_ids_M, weights_M, offsets)}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"values, row_ids, weights and offsets lie on {names}: use one device.")


def check_gradient(grad_GV: Tensor, table_rV: Tensor, offsets: Tensor) -> None:
    """Raise a ValueError where the gradient is not that of the bags."""
    if grad_GV.shape != (len(offsets) - 1, table_rV.shape[1]):
        raise ValueError(
            f"gradient of shape {tuple(grad_GV.shape)} for {len(offsets) - 1} bags of width "
            f"{table_rV.shape[1]}."
        )
    if grad_GV.device != table_rV.device:
        raise ValueError(
            f"gradient on {grad_GV.device}, the table on {table_rV.device}: use one device."
        )


def check_buffer(buffer_rV: Tensor, values_rV: Tensor) -> None:
    """Raise a ValueError where a value gradient cannot be added to the buffer."""
    if buffer_rV.shape != values_rV.shape or not buffer_rV.is_contiguous():
        raise ValueError(
            f"add_value_grad_to of shape {tuple(buffer_rV.shape)}: a contiguous buffer of "
            f"the shape of the table, {tuple(values_rV.shape)}, is needed."
        )
    if buffer_rV.dtype not in TABLE_DTYPES:
        raise ValueError(f"add_value_grad_to of {buffer_rV.dtype}: use fp32 or bf16.")
    if buffer_rV.device != values_rV.device:
        raise ValueError(
            f"add_value_grad_to on {buffer_rV.device}, the table on {values_rV.device}: use one "
            "device."
        )


def check_contents(row_ids_M: Tensor, offsets: Tensor, num_rows: int, may_skip: bool) -> None:
    """Raise a ValueError for ids that the table lacks, or offsets that are none; waits for them."""
    num_lookups = len(row_ids_M)
    steps = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != num_lookups or (steps < 0).any():
        raise ValueError(
            f"offsets from {int(offsets[0])} to {int(offsets[-1])} for {num_lookups} lookups: they "
            "must rise from 0 to the number of lookups."
        )
    if num_lookups == 0:
        return
    low, high = (int(bound) for bound in row_ids_M.aminmax())
    if high >= num_rows:
        raise ValueError(f"row id {high} in a table of {num_rows} rows.")
    if low < -1:
        raise ValueError(f"row id {low}: rows are counted from 0, and -1 reads none.")
    if low < 0 and not may_skip:
        raise ValueError(f"row id {low}, though may_skip=False promised none below 0.")
