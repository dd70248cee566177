"""Every test of the tables' optimizer holds for the default forms and for the new ones."""

import pytest
import torch

from megamem.ops.forms import ENVIRONMENT

NEW = "row_gradient=first_touch,row_adam=flags,squared_norm=triton"


@pytest.fixture(autouse=True, params=["", NEW], ids=["defaults", "new forms"])
def forms(request, monkeypatch) -> str:
    """Select the forms, and fill with NaN what torch leaves undefined."""
    monkeypatch.setenv(ENVIRONMENT, request.param)
    empty_like = torch.empty_like

    def poisoned(x: torch.Tensor, **options) -> torch.Tensor:
        found = empty_like(x, **options)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty_like", poisoned)
    return request.param
