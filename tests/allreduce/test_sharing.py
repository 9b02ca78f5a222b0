from functools import partial

import pytest
import torch

from allreduce.group import Group, PeerLostError
from allreduce.sharing import share_bytes, share_bytes_everywhere, share_tensors
from tests.allreduce.together import groups, in_group, outcomes

TENSORS = {
    "weights": torch.arange(12.0).view(3, 4),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "scalar": torch.tensor(5.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4, dtype=torch.int64),
    "flags": torch.tensor([True, False]),
    "half": torch.tensor([1.5, float("inf"), -0.0], dtype=torch.float16),
    "brain": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    "whole": torch.tensor([-(2**62), 2**62]),
    "bytes": torch.arange(256).to(torch.uint8),
    "trained": torch.ones(3, requires_grad=True),
}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        got = actual[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        assert got.is_contiguous()
        assert not got.requires_grad
        torch.testing.assert_close(got, tensor.detach(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("data", [b"", b"\0", b"some words", bytes(range(256)) * 1000])
@pytest.mark.parametrize("size", [1, 3])
def test_bytes_of_one_come_to_all(data: bytes, size: int) -> None:
    source = size - 1

    def act(group: Group) -> bytes:
        own = data if group.index == source else b"what others say is ignored"
        return share_bytes(group, source, own)

    assert in_group(size, act) == [data] * size


@pytest.mark.parametrize("size", [1, 2])
def test_tensors_of_one_come_to_all_by_name(size: int) -> None:
    source = size - 1

    def act(group: Group) -> dict[str, torch.Tensor]:
        own = TENSORS if group.index == source else {"weights": torch.zeros(1)}
        return share_tensors(group, source, own)

    for shared in in_group(size, act):
        assert_same(shared, TENSORS)


def test_there_may_be_none() -> None:
    assert in_group(2, lambda group: share_tensors(group, 0, {})) == [{}, {}]


def test_what_is_shared_is_a_copy() -> None:
    def act(group: Group) -> None:
        own = {"weights": torch.ones(3)}
        shared = share_tensors(group, 0, own)
        shared["weights"].add_(1)
        assert own["weights"].tolist() == [1, 1, 1]

    in_group(2, act)


def test_each_stage_shares_its_own() -> None:
    def act(group: Group) -> tuple[bytes, list[float]]:
        me = group.sharing[group.index]
        tensors = share_tensors(group, 1, {"rank": torch.tensor([float(me)])})
        return share_bytes(group, 0, b"from %d" % me), tensors["rank"].tolist()

    even, odd = (b"from 0", [2.0]), (b"from 1", [3.0])
    assert in_group(4, act, num_stages=2) == [even, odd, even, odd]


def test_one_of_any_stage_shares_with_everybody() -> None:
    def act(group: Group) -> bytes:
        return share_bytes_everywhere(group, 2, b"from %d" % group.sharing[group.index])

    assert in_group(4, act, num_stages=2) == [b"from 2"] * 4


def test_a_lost_source_is_an_error() -> None:
    with groups(3) as (first, second, third):
        third.close()
        for error in outcomes(*(partial(share_tensors, g, 2, {}) for g in (first, second))):
            assert isinstance(error, PeerLostError)
