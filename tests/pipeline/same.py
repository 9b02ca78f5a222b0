"""Compares a deferred construction with a plain one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations

import torch
from torch import Tensor, nn

from pipeline.deferred import Deferred

CPU = torch.device("cpu")
Build = Callable[[], nn.Module]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(
        chain(
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        )
    )


def bits(tensor: Tensor) -> list[int]:
    return torch.frombuffer(
        bytearray(tensor.detach().contiguous().numpy().tobytes() or b"-"), dtype=torch.uint8
    ).tolist()


def sharing(model: nn.Module) -> list[tuple[str, str]]:
    return [
        (first, second)
        for (first, a), (second, b) in combinations(tensors_of(model).items(), 2)
        if a.numel() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    ]


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    ours, theirs = tensors_of(model), tensors_of(plain)
    assert list(ours) == list(theirs)
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, tensor in theirs.items():
        assert type(ours[name]) is type(tensor), name
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].stride() == tensor.stride(), name
        assert ours[name].requires_grad == tensor.requires_grad, name
        assert bits(ours[name]) == bits(tensor), name
    assert sharing(model) == sharing(plain)


def assert_deferred_equals_plain(build: Build) -> nn.Module:
    """Every tensor, and the random numbers drawn afterwards."""
    torch.manual_seed(7)
    plain = build()
    after = torch.rand(3)
    torch.manual_seed(7)
    with Deferred() as deferred:
        model = build()
    assert torch.equal(torch.rand(3), after)
    deferred.materialise_module(model, CPU)
    assert_same(model, plain)
    return model
