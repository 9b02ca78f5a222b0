import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from ps_core.errors import UsageError
from tests.pipeline.alone import alone

TWO_STAGES = ["interleaved", "interleaved-zero-bubble", "zbv"]
BATCH, WIDTH = 6, 4


class _Transposed(nn.Module):
    """Gives a tensor that is not contiguous, and a view."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.view(len(inputs), 2, 2).transpose(1, 2)


class _Biases(nn.Module):
    """Two parameters whose gradients autograd computes once and hands out twice."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(shape))
        self.other = nn.Parameter(torch.randn(shape))
        self.unused = nn.Parameter(torch.randn(shape))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + (self.one + self.other)


class _Twice(nn.Module):
    """Uses one layer twice, and lets its inputs pass by it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        deeper: torch.Tensor = self.layer(torch.tanh(self.layer(inputs)))
        return inputs + deeper


def _linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


CUTS: dict[str, tuple[list[nn.Module], list[nn.Module]]] = {
    # what is special about the cut: layers before, layers after
    "in place after the cut": ([_linear()], [nn.ReLU(inplace=True), _linear()]),
    "in place before the cut": ([_linear(), nn.ReLU(inplace=True)], [_linear()]),
    "a view at the cut": ([_linear(), nn.Unflatten(1, (2, 2))], [nn.Flatten(), _linear()]),
    "not contiguous at the cut": ([_linear(), _Transposed()], [nn.Flatten(), _linear()]),
    "not contiguous at the end": ([_linear()], [_linear(), _Transposed()]),
    "only a view before": ([nn.Flatten()], [_linear()]),
    "nothing before": ([], [_linear()]),
    "nothing after": ([_linear()], []),
    "shared gradients": ([_linear(), _Biases(WIDTH)], [_linear(), _Biases(WIDTH), nn.Tanh()]),
    "a gradient that is the received one": ([_linear()], [_linear(), _Biases(1, WIDTH)]),
    "a layer used twice": ([_linear()], [_Twice()]),
}


@pytest.mark.parametrize("schedule", TWO_STAGES)
@pytest.mark.parametrize("cut", CUTS)
def test_a_model_can_be_cut_anywhere(cut: str, schedule: str) -> None:
    before, after = (nn.Sequential(*copy.deepcopy(layers)).double() for layers in CUTS[cut])
    plain = copy.deepcopy(nn.Sequential(before, after))
    inputs = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    target = torch.randn_like(plain(inputs))
    with alone([before, after], schedule, num_microbatches=6) as step:
        for _ in range(2):  # gradients are added to those that are there
            loss = step(inputs, target, mse_loss)
            expected = mse_loss(plain(inputs), target)
            torch.autograd.backward(expected)
            assert loss is not None
            assert abs(loss - expected) < 1e-12
            _assert_same_gradients(nn.Sequential(before, after), plain)


def _assert_same_gradients(model: nn.Module, plain: nn.Module) -> None:
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is None:
            assert found.grad is None, name
        else:
            assert found.grad is not None, name
            assert (found.grad - expected.grad).abs().max() < 1e-12, name


@pytest.mark.parametrize("schedule", TWO_STAGES)
@pytest.mark.parametrize("frozen", [(0,), (1,)])
def test_frozen_stages_get_no_gradients_and_the_others_theirs(
    schedule: str, frozen: tuple[int, ...]
) -> None:
    stages = [nn.Sequential(_linear(), nn.Tanh()), nn.Sequential(_linear(), nn.Tanh())]
    plain = copy.deepcopy(nn.Sequential(*stages))
    inputs, target = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    with alone(stages, schedule) as step:
        step(inputs, target, mse_loss)  # freezing is possible between steps
        nn.Sequential(*stages).zero_grad()
        for stage in frozen:
            stages[stage].requires_grad_(False)
            plain[stage].requires_grad_(False)
        step(inputs, target, mse_loss)
    torch.autograd.backward(mse_loss(plain(inputs), target))
    for found, expected in zip(
        nn.Sequential(*stages).parameters(), plain.parameters(), strict=True
    ):
        assert (found.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad)


class _Round(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs.abs() * 3).long() % 5


def test_whole_numbers_may_pass_where_the_schedule_needs_no_gradient_of_them() -> None:
    stages = [_Round(), nn.Sequential(nn.Embedding(5, 3), nn.Flatten())]
    plain = copy.deepcopy(stages[1])
    inputs, target = torch.randn(BATCH, WIDTH), torch.randn(BATCH, 3 * WIDTH)
    with alone(stages, "interleaved") as step:
        step(inputs, target, mse_loss)
    torch.autograd.backward(mse_loss(plain(_Round()(inputs)), target))
    _assert_close(stages[1], plain)
    with (
        alone(stages, "zbv") as step,
        pytest.raises(UsageError, match=r"stage 0 gives torch.int64, .* and schedule 'zbv' needs"),
    ):
        step(inputs, target, mse_loss)


def _assert_close(model: nn.Module, plain: nn.Module) -> None:
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


class _Moody(nn.Module):
    """Gives half as many columns once it is told to."""

    narrow = False

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs[:, :2] if self.narrow else inputs


def test_a_stage_that_gives_another_shape_than_before_is_named() -> None:
    moody = _Moody()
    inputs, target = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    with alone([nn.Sequential(_linear(), moody), _linear()], "interleaved") as step:
        step(inputs, target, mse_loss)
        moody.narrow = True
        with pytest.raises(UsageError, match=r"stage 0 gives torch.float32 \[3, 2\] where its run"):
            step(inputs, target, mse_loss)


class _Failing(nn.Module):
    def __init__(self, error: Exception, in_backward: bool) -> None:
        super().__init__()
        self.error = error
        self.in_backward = in_backward

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():  # not in the run on shapes
            if not self.in_backward:
                raise self.error
            inputs.register_hook(self._raise)
        return inputs * 1

    def _raise(self, gradient: torch.Tensor) -> None:
        raise self.error


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("schedule", TWO_STAGES)
def test_an_error_of_the_model_comes_out_as_it_is_and_torch_logs_no_schedule(
    schedule: str, in_backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    error = KeyError("no such layer")
    inputs, target = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    stages = [_linear(), nn.Sequential(_linear(), _Failing(error, in_backward))]
    with (
        caplog.at_level(logging.ERROR),
        alone(stages, schedule) as step,
        pytest.raises(KeyError) as caught,
    ):
        step(inputs, target, mse_loss)
    assert caught.value is error
    assert not caplog.records
