"""New tensors are where the old ones were, in every respect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.places import replace_tensors


class Special(nn.Parameter):
    pass


class Layer(nn.Module):
    state: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = Special(torch.ones(3, device="meta"))
        self.weight.decays = False  # type: ignore[attr-defined] # what scripts mark weights with
        self.frozen = nn.Parameter(torch.ones(2, device="meta"), requires_grad=False)
        self.register_parameter("bias", None)
        self.register_buffer("state", torch.ones(2, device="meta"))
        self.register_buffer("scratch", torch.ones(2, device="meta"), persistent=False)
        self.plain = torch.ones(4, device="meta")
        self.known = torch.ones(4)
        self.inner = nn.Linear(2, 2, device="meta")
        self.again = self.inner
        self.tied = nn.Linear(2, 2, device="meta")
        self.tied.weight = self.inner.weight


def twos(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.full_like(tensor, 2.0, device="cpu") for tensor in tensors]


def test_every_tensor_is_replaced_once_and_what_was_shared_stays_shared() -> None:
    layer = Layer()
    known, parameters = layer.known, list(layer.parameters())
    asked: list[Tensor] = []

    def make(old: Sequence[Tensor]) -> list[Tensor]:
        asked.extend(old)
        return twos(old)

    successors = replace_tensors(layer, make)
    # Two weights of its own, two buffers, a plain tensor, one shared weight and two biases.
    assert len(asked) == len(set(asked)) == 8
    assert layer.tied.weight is layer.inner.weight
    assert layer.again is layer.inner
    assert layer.known is known
    assert layer.plain.tolist() == [2.0] * 4
    assert all(
        tensor.tolist() == torch.full_like(tensor, 2.0).tolist() for tensor in layer.parameters()
    )
    assert list(successors) == parameters
    assert list(successors.values()) == list(layer.parameters())


def test_class_attributes_gradients_and_persistence_are_taken_over() -> None:
    layer = Layer()
    names = list(layer.state_dict())
    replace_tensors(layer, twos)
    assert type(layer.weight) is Special
    assert layer.weight.decays is False  # type: ignore[attr-defined] # as above
    assert layer.weight.requires_grad
    assert not layer.frozen.requires_grad
    assert layer.bias is None
    assert list(layer.state_dict()) == names
    assert "scratch" not in names
    assert "plain" not in dict(layer.named_buffers())


def test_recurrent_layers_use_their_new_weights() -> None:
    layer = nn.GRU(2, 3, device="meta")
    replace_tensors(layer, twos)
    assert all(
        listed is weight
        for listed, weight in zip(layer._flat_weights, layer.parameters(), strict=True)
    )
