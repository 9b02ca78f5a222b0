"""A deferred construction gives what a plain one gives, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.pipeline.same import Build, assert_deferred_equals_plain


class Holder(nn.Module):
    """Whatever tensors a function makes, as parameters, or as buffers if they are not floats."""

    def __init__(self, make: Callable[[], list[Tensor]]) -> None:
        super().__init__()
        for number, tensor in enumerate(make()):
            if tensor.is_floating_point():
                self.register_parameter(f"p{number}", nn.Parameter(tensor))
            else:
                self.register_buffer(f"b{number}", tensor, persistent=number % 2 == 0)


# -- Layers, as torch initialises them -------------------------------------------------------------

LAYERS: dict[str, Build] = {
    "linear": lambda: nn.Linear(5, 7),
    "linear without bias": lambda: nn.Linear(40, 30, bias=False),
    "convolution": lambda: nn.Conv2d(3, 4, 3),
    "transposed convolution": lambda: nn.ConvTranspose1d(3, 4, 3),
    "embedding": lambda: nn.Embedding(9, 4, padding_idx=2),
    "embedding bag": lambda: nn.EmbeddingBag(9, 4, padding_idx=0),
    "layer norm": lambda: nn.LayerNorm([3, 4]),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "prelu": lambda: nn.PReLU(3),
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3
    ),
    "transformer": lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True),
    "lstm": lambda: nn.LSTM(5, 3, num_layers=2, bidirectional=True, proj_size=2),
    "gru cell": lambda: nn.GRUCell(5, 3),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(5, 7)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(5, 7)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(5, 7)),
    "sixteen elements and fewer": lambda: Holder(
        lambda: [torch.randn(size) for size in (15, 16, 17, 1, 0)]
    ),
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_a_layer_has_the_values_of_a_plain_construction(build: Build) -> None:
    assert_deferred_equals_plain(lambda: nn.Sequential(build(), nn.Linear(4, 4), build()))


# -- What scripts do -------------------------------------------------------------------------------


def filled(fill: Callable[[Tensor], object], *shape: int) -> Build:
    return lambda: Holder(lambda: [empty for empty in [torch.empty(shape)] if [fill(empty)]])


INITIALISERS: dict[str, Build] = {
    "xavier": filled(nn.init.xavier_uniform_, 6, 5),
    "xavier normal": filled(nn.init.xavier_normal_, 6, 5),
    "kaiming": filled(nn.init.kaiming_normal_, 6, 5),
    "orthogonal, tall": filled(nn.init.orthogonal_, 40, 30),
    "orthogonal, wide": filled(nn.init.orthogonal_, 30, 5, 8),
    "truncated": filled(lambda t: nn.init.trunc_normal_(t, std=0.02), 60, 50),
    "truncated often": filled(lambda t: nn.init.trunc_normal_(t, a=-0.5, b=0.7), 60, 50),
    "truncated tail": filled(lambda t: nn.init.trunc_normal_(t, a=2.0, b=3.0), 30, 10),
    "sparse": filled(lambda t: nn.init.sparse_(t, sparsity=0.3), 20, 6),
    "dirac": filled(nn.init.dirac_, 4, 3, 3),
    "eye": filled(nn.init.eye_, 4, 3),
    "constant": filled(lambda t: nn.init.constant_(t, 0.3), 4, 3),
    "bernoulli": filled(lambda t: t.bernoulli_(0.3), 4, 3),
    "exponential": filled(lambda t: t.exponential_(), 40, 3),
    "strided": filled(lambda t: (t.zero_(), t[:, ::2].normal_(), t.t()[1:].uniform_()), 9, 40),
    "twice": filled(lambda t: nn.init.normal_(nn.init.uniform_(t)), 9, 40),
}


@pytest.mark.parametrize("build", INITIALISERS.values(), ids=INITIALISERS)
def test_an_initialiser_draws_what_it_draws_in_a_plain_construction(build: Build) -> None:
    assert_deferred_equals_plain(build)


def tensors(*make: Callable[[], Tensor]) -> Build:
    return lambda: Holder(lambda: [one() for one in make])


def with_init() -> nn.Module:
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight, gain=0.5)
            nn.init.zeros_(module.bias)

    return nn.Sequential(nn.Linear(4, 20), nn.Sequential(nn.Linear(20, 3))).apply(init)


def with_generator() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(30, generator=generator)
    return torch.cat([first, torch.rand(3), torch.empty(5).normal_(generator=generator)])


def sinusoids() -> Tensor:
    table = torch.zeros(10, 8)
    position = torch.arange(0, 10).unsqueeze(1)
    rate = torch.exp(torch.arange(0, 8, 2) * (-np.log(10000.0) / 8))
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return table.unsqueeze(0)


def rotations() -> Tensor:
    angles = torch.outer(torch.arange(6), 1.0 / (10000 ** (torch.arange(0, 8, 2) / 8)))
    return torch.polar(torch.ones_like(angles), angles)


def in_double() -> Tensor:
    torch.set_default_dtype(torch.float64)
    try:
        return torch.randn(20) / torch.arange(1, 21)
    finally:
        torch.set_default_dtype(torch.float32)


def changed_mask() -> Tensor:
    tensor = torch.randn(40)
    tensor[tensor < 0] = 0.5
    tensor[[1, 3]] = torch.tensor([9.0, 8.0])
    return tensor


def scaled_by_a_value() -> Tensor:
    tensor = torch.randn(40)
    return tensor * 2 if tensor.sum() > 0 else tensor / tensor.norm().item()


OUTSIDE = torch.arange(12.0).reshape(3, 4)

SCRIPTS: dict[str, Build] = {
    "random parameters": tensors(lambda: torch.randn(30, 3), lambda: torch.rand(3)),
    "old constructors": tensors(
        lambda: torch.Tensor(3, 4).zero_(), lambda: torch.FloatTensor([1.0, 2.0])
    ),
    "buffers": tensors(
        lambda: torch.zeros(2, 3, dtype=torch.int32),
        lambda: torch.arange(5),
        lambda: torch.tril(torch.ones(4, 4)).bool(),
        lambda: torch.triu(torch.full((4, 4), float("-inf")), diagonal=1),
        lambda: torch.linspace(0, 1, 5),
        lambda: torch.randperm(7),
        lambda: torch.randint(5, (6,)),
    ),
    "apply": with_init,
    "generators": tensors(with_generator, lambda: torch.rand(2), with_generator),
    "sinusoids": tensors(sinusoids),
    "rotations": tensors(rotations),
    "default dtype": tensors(in_double),
    "to double": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double(),
    "to half and back": lambda: nn.Linear(40, 5).half().float(),
    "bfloat16 from the start": lambda: Holder(
        lambda: [torch.randn(40, dtype=torch.bfloat16).float()]
    ),
    "to the CPU": lambda: nn.Linear(4, 5).to("cpu").cpu().to(torch.device("cpu"), torch.float64),
    "channels last": lambda: Holder(
        lambda: [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    ),
    "deep copies": lambda: nn.ModuleList(copy.deepcopy(nn.Linear(3, 4)) for _ in range(2)),
    "data from Python": tensors(
        lambda: torch.tensor([1.0, 2.0]) * torch.randn(2),
        lambda: torch.zeros(3, 2) + torch.as_tensor(np.ones(2, dtype=np.float32)),
        lambda: torch.tensor([[1, 2], [3, 4]]),
        lambda: torch.randn(3).new_tensor([1.0, 2.5]),
        lambda: torch.randn(3).new_full((2,), 2.5),
        lambda: torch.randn(3).new([1.0, 2.5]),
    ),
    "data from outside": tensors(
        lambda: torch.randn(3, 4).copy_(OUTSIDE),
        lambda: OUTSIDE * torch.randn(4),
        lambda: OUTSIDE.clone(),
        lambda: copy.deepcopy(OUTSIDE),
        lambda: torch.randn(2, 3) @ OUTSIDE.t()[:3],
    ),
    "copy into a tensor from Python": tensors(
        lambda: torch.tensor([1.0, 2.0]).add_(torch.randn(2))
    ),
    "state of another model": lambda: loaded(),
    "masks and lists": tensors(changed_mask),
    "values": tensors(scaled_by_a_value, lambda: torch.full((2,), sum(torch.randn(3).tolist()))),
    "rates": tensors(
        *[lambda n=n: torch.full((2,), torch.linspace(0, 1, 5)[n].item()) for n in (1, 3)]
    ),
    "shapes that depend on values": tensors(
        lambda: torch.randn(30)[torch.randn(30) > 0], lambda: torch.randn(9).nonzero()
    ),
    "draws that depend on values": tensors(
        lambda: torch.bernoulli(torch.rand(40)),
        lambda: torch.normal(torch.randn(40), torch.rand(40)),
        lambda: torch.multinomial(torch.rand(40), 5),
        lambda: torch.rand_like(torch.randn(5)),
        lambda: nn.functional.dropout(torch.randn(40)),
    ),
    "a product of matrices": tensors(lambda: torch.linalg.qr(torch.randn(9, 4))[0]),
    "eigenvectors": tensors(lambda: torch.linalg.eigh(torch.randn(4, 4))[1]),
}


def loaded() -> nn.Module:
    model = nn.Linear(4, 3)
    model.load_state_dict({"weight": OUTSIDE, "bias": torch.ones(3)})
    return model


@pytest.mark.parametrize("build", SCRIPTS.values(), ids=SCRIPTS)
def test_what_scripts_do_gives_the_values_of_a_plain_construction(build: Build) -> None:
    assert_deferred_equals_plain(lambda: nn.Sequential(build(), build()))
