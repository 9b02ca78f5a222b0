import math

import pytest
import torch

from ps_core.errors import ProtocolError
from ps_server.clip import Clip


def test_the_factor_is_known_once_every_shard_that_holds_parts_has_told() -> None:
    clip = Clip(2.0, frozenset({0, 2}))
    assert clip.factor(2, 0, 9.0) is None
    assert clip.factor(0, 0, 16.0) == pytest.approx(2 / (5 + 1e-6))


def test_it_is_that_of_clip_grad_norm() -> None:
    gradients = [torch.tensor([3.0, -1.0]), torch.tensor([2.0])]
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.5)
    clip = Clip(1.5, frozenset({0, 1}))
    clip.factor(0, 0, 10.0)
    factor = clip.factor(1, 0, 4.0)
    assert factor is not None
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * factor)


def test_a_small_norm_is_left_alone() -> None:
    assert Clip(1.0, frozenset({0})).factor(0, 0, 0.25) == 1.0
    assert Clip(1.0, frozenset({0})).factor(0, 0, 0.0) == 1.0


def test_a_repeat_counts_neither_twice_nor_for_the_next_step() -> None:
    clip = Clip(1.0, frozenset({0, 1}))
    assert clip.factor(0, 0, 100.0) is None
    assert clip.factor(0, 0, 100.0) is None
    assert clip.factor(1, 0, 0.0) == pytest.approx(0.1)
    assert clip.factor(0, 0, 100.0) is None
    assert clip.factor(1, 1, 0.0) is None
    assert clip.factor(0, 1, 4.0) == pytest.approx(0.5)


def test_a_step_number_may_be_left_out() -> None:
    clip = Clip(1.0, frozenset({0}))
    assert clip.factor(0, 0, 4.0) == pytest.approx(0.5)
    assert clip.factor(0, 5, 16.0) == pytest.approx(0.25)
    assert clip.factor(0, 4, 4.0) is None


def test_what_is_not_a_number_stays_so_and_infinity_gives_nothing() -> None:
    clip = Clip(1.0, frozenset({0}))
    factor = clip.factor(0, 0, math.nan)
    assert factor is not None
    assert math.isnan(factor)
    assert clip.factor(0, 1, math.inf) == 0.0


def test_squares_are_refused_where_nothing_is_clipped() -> None:
    with pytest.raises(ProtocolError, match="shard 1 sends squares, but nothing is clipped"):
        Clip(None, frozenset({0, 1})).factor(1, 0, 1.0)
