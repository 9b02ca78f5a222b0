"""Buffers and untrained parameters: which there are, what can be sent, how they are replaced."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ps_core.errors import MismatchError, UsageError
from ps_core.extras import Extras, Kind
from ps_core.tensors import digest, plain
from tests.buffers import contents, every_kind
from tests.reference import holding


def test_they_are_what_is_not_trained_and_has_memory_here() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.get_parameter("0.bias").requires_grad_(False)
    extras = Extras(model, {id(p) for p in model.parameters() if p.requires_grad})
    norm = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert extras.read().keys() == {*norm, "0.bias"}
    model.get_submodule("1").to("meta")  # as another stage's
    assert extras.read().keys() == {"0.bias"}


def test_every_kind_is_taken_over_with_all_that_it_holds() -> None:
    theirs, mine = every_kind(1), holding(every_kind(2))
    extras = Extras(mine, ())
    extras.check()
    extras.check_kinds({name: Kind.of(tensor) for name, tensor in theirs.items()})
    extras.write({name: plain(tensor).clone() for name, tensor in theirs.items()})
    assert contents(extras.read()) == contents(theirs)
    assert extras.digests() == Extras(holding(theirs), ()).digests()


def test_a_tensor_that_can_be_written_stays_the_same_object_and_others_are_replaced() -> None:
    model = holding({"plain": torch.zeros(3), "expanded": torch.zeros(1).expand(3)})
    before = dict(model.named_buffers())
    Extras(model, ()).write({"plain": torch.ones(3), "expanded": torch.tensor([1.0, 2.0, 3.0])})
    assert model.get_buffer("plain") is before["plain"]
    assert model.get_buffer("plain").tolist() == [1, 1, 1]
    assert model.get_buffer("expanded").tolist() == [1, 2, 3]


def test_what_is_replaced_is_replaced_under_all_of_its_names() -> None:
    mask = torch.zeros(1).expand(3)
    model = nn.Sequential(holding({"mask": mask}), holding({"mask": mask}))
    extras = Extras(model, ())
    assert extras.read().keys() == {"0.mask"}
    extras.write({"0.mask": torch.ones(3)})
    assert model.get_buffer("1.mask") is model.get_buffer("0.mask")
    assert model.get_buffer("1.mask").tolist() == [1, 1, 1]


def test_a_frozen_parameter_stays_a_frozen_parameter() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.zeros(1).expand(3), requires_grad=False)
    Extras(model, ()).write({"scale": torch.ones(3)})
    assert isinstance(model.scale, nn.Parameter)
    assert not model.scale.requires_grad
    assert model.scale.tolist() == [1, 1, 1]


def test_a_buffer_may_get_another_shape_and_one_that_was_none_a_value() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("cache", torch.zeros(2))
    model.register_buffer("later", None)
    extras = Extras(model, {id(p) for p in model.parameters()})
    extras.check_kinds({"cache": Kind(torch.float32, (2,)), "later": Kind(torch.int64, ())})
    extras.write({"cache": torch.ones(3), "later": torch.tensor(7)})
    assert contents(extras.read()) == contents({"cache": torch.ones(3), "later": torch.tensor(7)})


def test_what_the_model_has_no_place_for_is_refused() -> None:
    with pytest.raises(MismatchError, match="'more', which this worker's model lacks"):
        Extras(holding({"mask": torch.zeros(1)}), ()).write({"more": torch.zeros(1)})


def sparse(layout: Callable[[Tensor], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that CSR is in beta
        return layout(torch.eye(3))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: sparse(Tensor.to_sparse), "is sparse_coo: register the plain tensors"),
        (lambda: sparse(Tensor.to_sparse_csr), "is sparse_csr: register the plain tensors"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "is nested: register the plain tensors",
        ),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "is quantised: register the plain tensors",
        ),
        (lambda: torch.ones(2).to(torch.complex32), "is torch.complex32: convert it to one of"),
    ],
    ids=["coo", "csr", "nested", "quantised", "type"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_sent_is_refused_by_name(make: Callable[[], Tensor], problem: str) -> None:
    model = nn.Sequential(holding({"odd": make()}))
    message = re.escape(f"buffer 0.odd cannot be sent to other workers: it {problem}")
    with pytest.raises(UsageError, match=message):
        Extras(model, ()).check()


def test_digests_are_of_bytes_types_and_shapes() -> None:
    zeros = torch.zeros(2, 3)
    assert digest(torch.full((2, 3), torch.nan)) == digest(torch.full((2, 3), torch.nan))
    others = [zeros.t(), -zeros, zeros.int(), torch.ones(2, 3)]
    assert digest(zeros) not in {digest(each) for each in others}
    assert digest(zeros) == digest(torch.zeros(3, 2).t()) == digest(torch.zeros(1).expand(2, 3))
