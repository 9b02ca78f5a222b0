"""Names of tensors in models that torch has wrapped, whole or in part."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from ps_core.names import plain_name


class Named(nn.Module):
    """With names of its own that look like those of wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self._orig_mod = nn.BatchNorm1d(2)


def compiled(module: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(module, backend="eager"))


def wrapped_inside() -> nn.Module:
    model = Named()
    model.module = compiled(DataParallel(model.module))  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    "wrapped",
    [
        Named(),
        compiled(Named()),
        DataParallel(Named()),
        DataParallel(compiled(DataParallel(Named()))),
        wrapped_inside(),
    ],
    ids=["plain", "compiled", "parallel", "both", "inside"],
)
def test_a_wrapper_adds_nothing_to_a_name(wrapped: nn.Module) -> None:
    names = [plain_name(wrapped, name) for name in wrapped.state_dict()]
    assert names == list(Named().state_dict())
