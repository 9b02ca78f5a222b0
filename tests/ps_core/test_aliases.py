"""Parameters, buffers and attributes that share memory with a trained parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from ps_core.aliases import aliases, tie
from ps_core.buckets import make_buckets
from ps_core.errors import UsageError
from ps_core.plan import ParameterSpec, make_plan
from ps_core.tensors import memory_of


class Pair(nn.Module):
    """Two layers of one shape."""

    by_name: dict[str, nn.Parameter]
    both: tuple[Tensor, ...]
    w: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def move(model: nn.Module) -> None:
    """The model's trained parameters into buckets of 64 elements."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    specs = [ParameterSpec(name, p.dtype, tuple(p.shape), 0) for name, p in named]
    parameters = [parameter for _, parameter in named]
    found = aliases(model, parameters)
    make_buckets(make_plan(specs, 1, 512, 256), parameters)
    for alias in found:
        alias.follow()


def by_data() -> Pair:
    model = Pair()
    model.b.weight.data = model.a.weight.data
    return model


def by_a_parameter() -> Pair:
    model = Pair()
    model.b.weight = nn.Parameter(model.a.weight.data)
    return model


@pytest.mark.parametrize("make", [by_data, by_a_parameter])
def test_two_parameters_over_the_same_elements_become_one(make: Callable[[], Pair]) -> None:
    model = make()
    optimizer = sgd(model)
    tie(model, optimizer)
    assert model.b.weight is model.a.weight
    assert optimizer.param_groups[0]["params"] == [model.a.weight]


def test_three_over_the_same_elements_become_one_wherever_they_are() -> None:
    model = by_data()
    model.c = nn.GRU(4, 4)
    third = nn.Parameter(torch.zeros(0))
    third.data = model.a.weight.data
    model.by_name = {"third": third}
    model.c.weight_hh_l0 = model.b.weight
    optimizer = torch.optim.SGD([*model.parameters(), third], lr=0.5)
    tie(model, optimizer)
    assert model.b.weight is model.a.weight
    assert model.c.weight_hh_l0 is model.a.weight
    assert model.by_name["third"] is model.a.weight
    assert sum(each is model.a.weight for each in model.c._flat_weights) == 1


def transposed(model: Pair) -> None:
    model.b.weight.data = model.a.weight.data.t()


def shifted(model: Pair) -> None:
    flat = torch.randn(20)
    model.a.weight.data, model.b.weight.data = flat[:16].view(4, 4), flat[4:].view(4, 4)


def of_another_shape(model: Pair) -> None:
    model.b.weight.data = model.a.weight.data.view(2, 8)


@pytest.mark.parametrize("share", [transposed, shifted, of_another_shape])
def test_parameters_that_share_memory_otherwise_are_refused(share: Callable[[Pair], None]) -> None:
    model = Pair()
    share(model)
    with pytest.raises(UsageError, match=r"^b\.weight shares memory with parameter a\.weight"):
        tie(model, sgd(model))


def test_a_tie_over_two_groups_is_refused() -> None:
    model = by_data()
    groups: list[dict[str, Any]] = [
        {"params": [model.a.weight]},
        {"params": [model.b.weight], "lr": 0.1},
    ]
    with pytest.raises(UsageError, match=r"a\.weight and b\.weight are one memory, in two groups"):
        tie(model, torch.optim.SGD(groups, lr=0.5))


def test_a_tie_in_a_tuple_is_refused() -> None:
    model = by_data()
    model.both = (model.a.weight, model.b.weight)
    with pytest.raises(UsageError, match=r"^both\[1\] shares memory with parameter a\.weight"):
        tie(model, sgd(model))


def test_parameters_that_are_apart_in_one_memory_stay_apart() -> None:
    model = Pair()
    flat = torch.randn(4, 8)
    model.a.weight.data, model.b.weight.data = flat[:, :4], flat[:, 4:]
    before = [model.a.weight.detach().clone(), model.b.weight.detach().clone()]
    tie(model, sgd(model))
    move(model)
    assert model.a.weight is not model.b.weight
    assert torch.equal(model.a.weight, before[0])
    assert torch.equal(model.b.weight, before[1])


class Followed(Pair):
    """All kinds of tensors that have the first weight's values."""

    buffer: Tensor

    def __init__(self) -> None:
        super().__init__()
        weight = self.a.weight
        self.register_buffer("buffer", weight.data)
        self.plain = weight.detach()
        self.row = weight.detach()[2]
        self.turned = weight.detach().t()
        self.flat = {"of a": [weight.data.view(-1)]}
        self.selected = weight[1]
        self.b.weight = nn.Parameter(weight.data, requires_grad=False)

    def values(self) -> list[Tensor]:
        turned = self.turned.t()
        whole = [self.buffer, self.plain, turned, self.flat["of a"][0].view(4, 4), self.b.weight]
        return [*whole, self.row, self.selected]


def test_buffers_and_attributes_follow_the_parameter_that_they_are_in() -> None:
    model = Followed()
    tie(model, sgd(model))
    move(model)
    with torch.no_grad():
        model.a.weight.add_(3)
    weight = model.a.weight.detach()
    expected = [weight] * 5 + [weight[2], weight[1]]
    for value, right in zip(model.values(), expected, strict=True):
        assert torch.equal(value, right)
    assert not model.b.weight.requires_grad
    assert model.selected.grad_fn is not None


def test_an_alias_follows_a_parameter_that_moves_into_another_order_of_memory() -> None:
    model = Pair()
    model.a.weight = nn.Parameter(torch.randn(4, 4).t())
    model.register_buffer("w", model.a.weight.data)
    move(model)
    with torch.no_grad():
        model.a.weight.add_(3)
    assert torch.equal(model.w, model.a.weight)


def test_a_tensor_over_several_parameters_is_refused() -> None:
    model = Pair()
    model.w = torch.randn(32)
    model.a.weight.data, model.b.weight.data = (model.w[i : i + 16].view(4, 4) for i in (0, 16))
    with pytest.raises(UsageError, match=r"^w shares memory with parameter a\.weight"):
        move(model)


def two() -> Tensor:
    """Two tensors that pass for one, as quantised and distributed ones do."""
    made: Tensor = TwoTensor(torch.ones(4, 4), torch.ones(4, 4))
    return made


def test_tensors_without_memory_of_their_own_share_none() -> None:
    model = Pair()
    for name in ("first", "second"):
        model.register_buffer(name, two())
    model.a.weight = nn.Parameter(two())
    tie(model, sgd(model))
    assert aliases(model, [*model.parameters()]) == []
    assert len({memory_of(tensor) for tensor in model.state_dict(keep_vars=True).values()}) == 4
