"""Memory for some of the tensors of a deferred model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.deferred import Deferred
from ps_core.errors import UsageError
from tests.pipeline.same import CPU, assert_deferred_equals_plain, assert_same, tensors_of

# -- Only some of the tensors ----------------------------------------------------------------------


def deep() -> nn.Sequential:
    torch.manual_seed(11)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoder(layer, 3), nn.Linear(8, 9))


def test_a_part_of_the_model_has_the_values_of_the_whole() -> None:
    plain = deep()
    with Deferred() as deferred:
        model = deep()
    for name in ("2", "1.layers.2"):  # not in the order of construction
        deferred.materialise_module(model.get_submodule(name), CPU)
        assert_same(model.get_submodule(name), plain.get_submodule(name))
    assert {name for name, tensor in tensors_of(model).items() if tensor.is_meta} == {
        name for name in tensors_of(plain) if not name.startswith(("2", "1.layers.2"))
    }


def test_materialising_leaves_the_random_state_and_the_default_dtype_alone() -> None:
    with Deferred() as deferred:
        model = nn.Sequential(deep(), nn.Linear(4, 4, dtype=torch.float64))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    deferred.materialise_module(model, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() is torch.float32


def test_an_explicit_generator_ends_where_a_plain_construction_leaves_it() -> None:
    states = []
    for context in (None, Deferred()):
        generator = torch.Generator().manual_seed(3)
        with context or torch.no_grad():
            nn.init.normal_(torch.empty(5, 7), generator=generator)
            nn.init.trunc_normal_(torch.empty(50, 7), a=-1.0, b=1.0, generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_materialised_tensors_are_as_deferred_ones_were_when_the_block_ended() -> None:
    with Deferred() as deferred:
        first = torch.ones(3)
        second = first.clone()
        first.mul_(2)
        third = first + second
        second.zero_()
    made = deferred.materialise([third, second, first], CPU)
    assert [tensor.tolist() for tensor in made] == [[3.0] * 3, [0.0] * 3, [2.0] * 3]


# -- What belongs together -------------------------------------------------------------------------


def test_views_share_their_memory_again_when_asked_for_together() -> None:
    with Deferred() as deferred:
        whole = torch.arange(6.0).to("cpu")
        rows = whole.view(2, 3)
        swapped = rows.t().cpu()
        other = whole.to(torch.float64)
    made = deferred.materialise([swapped, other, rows[1]], CPU)
    made[2].fill_(9)
    assert made[0].tolist() == [[0, 9], [1, 9], [2, 9]]
    assert made[0].stride() == (1, 3)
    assert made[1].tolist() == [0, 1, 2, 3, 4, 5]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.other = nn.Linear(3, 5, bias=False)
        self.other.weight.data = self.embedding.weight.data
        self.register_buffer("row", self.embedding.weight.detach()[2], persistent=False)


def test_tied_weights_stay_tied() -> None:
    model = cast(Tied, assert_deferred_equals_plain(Tied))
    assert model.head.weight is model.embedding.weight
    assert model.other.weight.data_ptr() == model.head.weight.data_ptr()
    assert "row" not in model.state_dict()


def test_recurrent_layers_run_with_their_new_weights() -> None:
    torch.manual_seed(2)
    plain = nn.LSTM(4, 3, num_layers=2)
    torch.manual_seed(2)
    with Deferred() as deferred:
        model = nn.LSTM(4, 3, num_layers=2)
    deferred.materialise_module(model, CPU)
    example = torch.ones(2, 1, 4)
    assert torch.equal(model(example)[0], plain(example)[0])


def test_successors_say_which_parameter_an_optimizer_holds_now() -> None:
    with Deferred() as deferred:
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    old = list(model.parameters())
    successors = deferred.materialise_module(model[1], CPU)
    assert list(successors) == old[2:]
    assert [successors[parameter] for parameter in old[2:]] == list(model[1].parameters())


# -- What cannot work ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "look",
    [
        lambda: torch.randn(3).numpy(),
        lambda: np.asarray(torch.randn(3)),
        lambda: torch.randn(3).data_ptr(),
        lambda: torch.tensor([torch.ones(()), 2.0]),
    ],
    ids=["numpy", "array", "address", "tensor of tensors"],
)
def test_a_model_that_needs_memory_while_it_is_built_is_refused(look: Callable[[], object]) -> None:
    with (
        pytest.raises(UsageError, match=r"without looking at its values.*without --stages"),
        Deferred(),
    ):
        look()


def test_a_mistake_in_the_script_is_reported_as_usual() -> None:
    with pytest.raises(RuntimeError, match="must match the size"), Deferred():
        torch.randn(3) + torch.randn(4)


@pytest.mark.parametrize(
    ("build", "device"),
    [
        (lambda: torch.zeros(3, device="cuda"), "cuda"),
        (lambda: torch.zeros(3).to("xla"), "xla"),
        (lambda: nn.Linear(2, 2, device="meta"), "meta"),
    ],
)
def test_another_device_is_refused_while_the_model_is_built(
    build: Callable[[], object], device: str
) -> None:
    with pytest.raises(UsageError, match=f"built on the CPU, not on {device}"), Deferred():
        build()


def test_sparse_and_conjugated_tensors_are_refused() -> None:
    with pytest.raises(UsageError, match="dense"), Deferred():
        torch.randn(3, dtype=torch.complex64).conj()


def test_a_tensor_that_was_not_built_in_the_block_is_refused() -> None:
    with Deferred() as deferred:
        model = nn.Linear(2, 2)
    model.double()  # outside
    with pytest.raises(UsageError, match="not built together with the model"):
        deferred.materialise_module(model, CPU)
    foreign = torch.ones(2, device="meta")
    with pytest.raises(UsageError, match="not built together with the model"), Deferred():
        torch.ones(2) + foreign


def test_a_tensor_that_changes_after_the_model_took_it_over_is_refused() -> None:
    table = torch.ones(3)
    with Deferred() as deferred:
        copied = torch.randn(3).copy_(table)
    table.zero_()
    with pytest.raises(UsageError, match="give the model a clone"):
        deferred.materialise([copied], CPU)


def test_nothing_can_be_materialised_after_close() -> None:
    with Deferred() as deferred:
        tensor = torch.ones(3)
    deferred.close()
    with pytest.raises(UsageError, match="not built together"):
        deferred.materialise([tensor], CPU)


# -- Memory ----------------------------------------------------------------------------------------

PROGRAM = """
import re
from pathlib import Path
import torch
from torch import nn
from pipeline.deferred import Deferred

MIB = 2**20
cpu = torch.device("cpu")

def build(width, layers):
    # Their own initialisation, and then another one.
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    for layer in model:
        nn.init.trunc_normal_(layer.weight, std=0.02)
    return model

def peak():
    # Not ru_maxrss, which begins with what the process had that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

with Deferred() as deferred:  # loads what torch loads late
    model = build(8, 1)
deferred.materialise_module(model, cpu)
before = peak()
with Deferred() as deferred:
    model = build(1448, 16)
built = peak()
deferred.materialise_module(model[4:8], cpu)
print((built - before) / MIB, (peak() - before) / MIB)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_quarter_of_the_model_needs_about_a_quarter_of_the_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    built, materialised = map(float, done.stdout.split())
    # 16 layers of 8 MiB, of which 4 are wanted; truncating holds a few temporaries of this size.
    assert built < 64
    assert 32 <= materialised < 80
