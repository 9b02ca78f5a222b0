"""What gradients may weigh in a mean."""

from __future__ import annotations

import torch

from ps_core.errors import UsageError

MIN_WEIGHT, MAX_WEIGHT = 1e-12, 1e15
"""Of two such weights the ratio, times a gradient, is far from where float32 ends."""


def is_weight(value: float) -> bool:
    """0, which abstains, or a number that others can be averaged with."""
    return value == 0 or MIN_WEIGHT <= value <= MAX_WEIGHT


def checked_weight(call: str, value: float | torch.Tensor) -> float:
    """The weight that a script gives in `call`. Raises UsageError for what cannot be one."""
    try:
        weight = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{call} got {value!r}: give one number") from error
    if not is_weight(weight):
        raise UsageError(
            f"{call} got {weight}: give 0, or a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g} "
            "(the weights of all workers may be scaled alike)"
        )
    return weight
