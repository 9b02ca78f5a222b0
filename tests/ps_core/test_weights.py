from __future__ import annotations

import numpy as np
import pytest
import torch

from ps_core.errors import UsageError
from ps_core.weights import MAX_WEIGHT, MIN_WEIGHT, checked_weight, is_weight


@pytest.mark.parametrize("value", [0, 1, 2.5, torch.tensor(3), np.float32(4), MIN_WEIGHT])
def test_numbers_are_weights(value: float | torch.Tensor) -> None:
    assert checked_weight("step", value) == float(value)


@pytest.mark.parametrize(
    "value", [-1, 1e-44, 1e308, float("nan"), float("inf"), "x", None, [1], torch.ones(2)]
)
def test_what_others_cannot_be_averaged_with_is_refused_with_its_call(value: object) -> None:
    with pytest.raises(UsageError, match=r"^optimizer\.step\(samples=…\) got "):
        checked_weight("optimizer.step(samples=…)", value)  # type: ignore[arg-type]  # the point


def test_the_ratio_of_two_weights_times_a_large_gradient_is_a_float32() -> None:
    assert is_weight(MAX_WEIGHT)
    largest = torch.tensor(1e10) * (MAX_WEIGHT / MIN_WEIGHT)
    assert largest.isfinite()
