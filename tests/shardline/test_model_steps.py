from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ps_core.errors import UsageError
from shardline.model_steps import WholeModel, evaluating, inputs_of, only_input

CPU = torch.device("cpu")


class Sum(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.weight * (first + second)


def test_a_step_leaves_the_gradients_of_the_mean_loss_and_returns_it_without_graph() -> None:
    model = Sum()
    first, second, target = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), torch.zeros(2)
    step = WholeModel(model, CPU)
    loss = step.train((first, second, target), mse_loss, None)
    assert loss.item() == (3.0**2 + 9.0**2) / 2
    assert not loss.requires_grad
    step.train((first, second, target), mse_loss, None)  # which adds to them
    assert model.weight.grad is not None
    assert model.weight.grad.item() == 2 * (2 * 3.0 * (1 + 9) / 2)


def test_what_is_to_come_before_backward_comes_after_forward() -> None:
    model, seen = Sum(), []

    def before_backward() -> None:
        seen.append(model.weight.grad)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        assert not seen
        return mse_loss(output, target)

    ones = torch.ones(2)
    WholeModel(model, CPU, None, before_backward).train((ones, ones, ones), loss_of, None)
    assert seen == [None]
    assert model.weight.grad is not None


def test_evaluation_has_no_graph() -> None:
    output = WholeModel(Sum(), CPU).evaluate((torch.ones(2), torch.ones(2)))
    assert torch.equal(output, torch.full((2,), 6.0))
    assert not output.requires_grad


class Seen(nn.Module):
    """Remembers the modes in which it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Dropout(), nn.BatchNorm1d(1), nn.Sequential(nn.Dropout())])
        self.seen: list[list[bool]] = []

    def modes(self) -> list[bool]:
        return [module.training for module in self.modules()]

    def forward(self) -> None:
        self.seen.append(self.modes())


def test_a_model_is_evaluated_in_evaluation_mode_and_then_has_the_modes_it_had() -> None:
    model = Seen()
    model.parts[1].eval()
    before = model.modes()
    with evaluating(model):
        model()
    assert model.seen == [[False] * len(before)]
    assert model.modes() == before


def test_a_model_in_evaluation_mode_is_left_as_it_is() -> None:
    model = Seen().eval()
    model.parts[0].train()
    before = model.modes()
    with evaluating(model):
        model()
    assert model.seen == [before]
    assert model.modes() == before


def test_a_compiled_model_is_evaluated_in_evaluation_mode() -> None:
    model = nn.Dropout()
    compiled = cast(nn.Module, torch.compile(model, backend="eager"))
    with evaluating(compiled):
        assert not model.training
    assert model.training
    assert compiled.training


def test_one_tensor_is_one_input() -> None:
    tensor = torch.ones(2)
    assert inputs_of(tensor) == (tensor,)
    assert inputs_of([tensor, tensor]) == [tensor, tensor]


def test_a_split_model_takes_one_input() -> None:
    tensor = torch.ones(2)
    assert only_input([tensor]) is tensor
    for count in (0, 2):
        with pytest.raises(UsageError, match=f"this batch has {count}: put them into one tensor"):
            only_input([tensor] * count)


@pytest.mark.parametrize("batch", [{"x": torch.ones(2)}, (torch.ones(2, 2), 3), "text"])
def test_a_batch_of_something_else_is_refused(batch: Any) -> None:  # noqa: ANN401 - the point
    model = WholeModel(nn.Linear(2, 1), CPU)
    with pytest.raises(UsageError, match=r"^a batch of session\.step is a list of tensors"):
        model.train(batch, nn.functional.mse_loss, None)
    with pytest.raises(UsageError, match=r"of session\.evaluate the inputs"):
        inputs_of(batch)
