"""Buffers of every kind that can be sent, and what they hold in a form that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

DTYPES: Final = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.complex64,
)


def every_kind(start: float) -> dict[str, Tensor]:
    """Buffers of every type, layout and view, whose values depend on `start`."""
    row = torch.arange(6.0) + start
    phases = torch.complex(row, -2 * row)
    return {
        **{f"of {dtype}".replace(".", " "): row.to(dtype) for dtype in DTYPES},
        "expanded": torch.full((1,), start).expand(8),
        "mask over heads": torch.ones(4, 4).mul(start).tril()[None].expand(3, 4, 4),
        "transposed": row.view(2, 3).t(),
        "every other": row[::2],
        "overlapping": row.unfold(0, 3, 1),
        "scalar": torch.tensor(start),
        "empty": torch.empty(0, 3),
        "conjugated": phases.conj(),
        "negated": phases.conj().imag,
        "not a number": torch.tensor([torch.nan, start, torch.inf]),
        "inferred": _inferred(row),
    }


def contents(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What each holds, as text in which NaN equals NaN."""
    return {
        name: f"{tensor.dtype} {list(tensor.shape)} {tensor.detach().clone().tolist()}"
        for name, tensor in tensors.items()
    }


def _inferred(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()
