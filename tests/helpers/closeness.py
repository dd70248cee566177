"""How close is close: a kernel may err at most twice as much as torch in the same dtype."""

import torch
from torch import Tensor


def assert_as_good_as_torch(
    name: str, ours: Tensor, torch_same_dtype: Tensor, truth: Tensor
) -> None:
    """Compare both with float64; one unit in the last place is free (the interpreter truncates)."""
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64, not {truth.dtype}"
    assert ours.dtype == torch_same_dtype.dtype, f"{name}: {ours.dtype}, {torch_same_dtype.dtype}"
    assert ours.shape == truth.shape, f"{name}: {tuple(ours.shape)} for {tuple(truth.shape)}"
    if not truth.numel():
        return
    error = (ours.double() - truth).abs().max()
    torch_error = (torch_same_dtype.double() - truth).abs().max()
    last_place = torch.finfo(ours.dtype).eps * truth.abs().max()
    assert error <= 2 * torch_error + last_place, f"{name}: {error} against torch's {torch_error}"
