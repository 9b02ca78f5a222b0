"""Hyperparameters as numbers, so that every worker can apply an update with the same. Pure."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from ps_core.optim_spec import Hyperparameters, HyperparameterValue

_KERNELS = frozenset({"foreach", "fused"})
"""How a step is computed is each worker's own choice."""


def to_numbers(groups: Sequence[Hyperparameters]) -> list[float]:
    """All values, in the order of groups and sorted keywords."""
    return [
        float(number)
        for group in groups
        for key in sorted(group.keys() - _KERNELS)
        for number in _flat(group[key])
    ]


def from_numbers(
    like: Sequence[Hyperparameters], numbers: Sequence[float]
) -> list[Hyperparameters]:
    """The inverse; `like` has the keywords and types."""
    row = iter(numbers)

    def value(before: HyperparameterValue) -> HyperparameterValue:
        if isinstance(before, tuple):
            return tuple(next(row) for _ in before)
        return bool(next(row)) if isinstance(before, bool) else next(row)

    return [
        {key: group[key] if key in _KERNELS else value(group[key]) for key in sorted(group)}
        for group in like
    ]


def checksum(numbers: Sequence[float]) -> int:
    """Different for different numbers, but for one in four billion."""
    return zlib.crc32(struct.pack(f"<{len(numbers)}d", *numbers))


def _flat(value: HyperparameterValue) -> Sequence[float]:
    return value if isinstance(value, tuple) else (value,)
