"""Times are those of each layer, and of one at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from pipeline.deferred import Deferred
from pipeline.partition import layers
from pipeline.timing import layer_seconds, stand_in
from ps_core.errors import UsageError

CPU = torch.device("cpu")


class Pair(nn.Module):
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, inputs


class Positions(nn.Module):
    """Keeps a tensor of integers, and one that is not registered."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(4))
        self.scale = torch.full((4,), 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs * self.scale)[..., self.order]


def test_a_large_layer_takes_longer_than_small_ones() -> None:
    with Deferred():
        model = nn.Sequential(
            nn.Embedding(10, 4), Positions(), nn.Sequential(nn.Linear(4, 2000), nn.ReLU())
        ).append(nn.Linear(2000, 2000))
    seconds = layer_seconds(layers(model), torch.randint(10, (64,)))
    assert len(seconds) == 5
    assert all(0 < value < seconds[4] for value in seconds[:4])
    assert all(parameter.is_meta for parameter in model.parameters())


def test_one_layer_is_in_memory_at_a_time_and_runs_forward_and_backward() -> None:
    alive: list[weakref.ref[nn.Module]] = []
    gradients: list[Tensor] = []

    def materialise(layer: nn.Module) -> nn.Module:
        assert all(reference() is None for reference in alive)
        replica = stand_in(layer, CPU)
        for parameter in replica.parameters():
            parameter.register_hook(gradients.append)
        alive.append(weakref.ref(replica))
        return replica

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    layer_seconds(layers(model), torch.ones(2, 3), materialise)
    assert len(alive) == 3
    assert {tuple(gradient.shape) for gradient in gradients} == {
        (4, 3), (4,), (5, 4), (5,), (2, 5), (2,),
    }  # fmt: skip


def test_the_random_state_and_the_layers_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    layer_seconds(layers(model), torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_layer_that_returns_more_than_a_tensor_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(Pair()))
    with pytest.raises(UsageError, match=r"1\.0 returns a tuple, .*hand one tensor on"):
        layer_seconds(layers(model), torch.ones(2, 3))
