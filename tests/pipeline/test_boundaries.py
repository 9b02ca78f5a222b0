import copy

import pytest
import torch
from torch import nn

from pipeline.boundaries import Boundary, infer
from ps_core.errors import UsageError

CPU = torch.device("cpu")


class _Recurrent(nn.Module):
    """Keeps a mask as a plain attribute, and makes positions in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.mask = torch.ones(6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.lstm(inputs)[0]
        return output * self.mask + torch.arange(6)


def _layers() -> list[nn.Module]:
    return [
        nn.Embedding(11, 4),
        nn.Sequential(_Recurrent(), nn.Dropout()),
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(18)),
        nn.Sequential(nn.Linear(18, 5), nn.ReLU(inplace=True), nn.Dropout()),
    ]


@pytest.mark.parametrize("own", [(), (0, 2), (1, 3), (0, 1, 2, 3)])
def test_the_boundaries_are_what_real_layers_give(own: tuple[int, ...]) -> None:
    real = _layers()
    with torch.device("meta"):
        meta = _layers()
    whole = [real[stage] if stage in own else meta[stage] for stage in range(4)]
    tokens = torch.zeros(7, 3, dtype=torch.int64)
    expected = [Boundary.of(tokens)]
    output = tokens
    for layer in copy.deepcopy(real):
        output = layer(output)
        expected.append(Boundary.of(output))
    assert infer(whole, own, Boundary.of(tokens), CPU) == tuple(expected)


def test_nothing_is_changed() -> None:
    layers = _layers()
    before = copy.deepcopy(nn.Sequential(*layers).state_dict())
    versions = [t._version for t in nn.Sequential(*layers).state_dict().values()]
    state = torch.get_rng_state()
    infer(layers, range(4), Boundary((7, 3), torch.int64), CPU)
    after = nn.Sequential(*layers).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [t._version for t in after.values()] == versions
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in nn.Sequential(*layers).parameters())


def test_no_memory_is_allocated_for_data() -> None:
    petabyte = [nn.Flatten(1), nn.Linear(2**20, 4, device="meta")]
    boundaries = infer(petabyte, (0,), Boundary((2**28, 2**10, 2**10), torch.float32), CPU)
    assert boundaries[-1] == Boundary((2**28, 4), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_those_of_the_layers(dtype: torch.dtype) -> None:
    layers = [nn.Embedding(5, 2, dtype=dtype), nn.Linear(2, 2, dtype=dtype)]
    found = infer(layers, (0, 1), Boundary((3,), torch.int64), CPU)
    assert [boundary.dtype for boundary in found] == [torch.int64, dtype, dtype]


class _Gives(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, inputs: torch.Tensor) -> object:
        if self.what == "tuple":
            return inputs, inputs
        return inputs.sum() if self.what == "scalar" else inputs.transpose(0, 1)


@pytest.mark.parametrize("own", [(), (1,)])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tuple", "stage 1 gives a tuple: what passes between layers .* must be one tensor"),
        ("scalar", r"stage 1 gives a tensor \[\] for a batch of 3"),
        ("transposed", r"stage 1 gives a tensor \[4, 3\] for a batch of 3: .* first dimension"),
    ],
)
def test_a_stage_that_gives_anything_else_is_named(
    what: str, message: str, own: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError, match=message):
        infer([nn.Identity(), _Gives(what)], own, Boundary((3, 4), torch.float32), CPU)


def test_a_stage_that_cannot_take_what_comes_is_named() -> None:
    layers = [nn.Identity(), nn.Linear(5, 5)]
    with pytest.raises(
        UsageError, match=r"stage 1 cannot be run on torch.float32 \[3, 4\] without values"
    ):
        infer(layers, (0, 1), Boundary((3, 4), torch.float32), CPU)


class _Looks(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs if inputs.sum() > 0 else -inputs


@pytest.mark.parametrize("own", [(), (0,)])
def test_a_stage_that_looks_at_values_is_named(own: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"stage 0 cannot be run on .* without values"):
        infer([_Looks()], own, Boundary((3, 4), torch.float32), CPU)


def test_what_can_have_a_gradient_asks_for_it() -> None:
    asks = [Boundary((2,), d).example() for d in (torch.float64, torch.complex64, torch.int64)]
    assert [(t.requires_grad, t.device.type) for t in asks] == [
        (True, "meta"),
        (True, "meta"),
        (False, "meta"),
    ]
