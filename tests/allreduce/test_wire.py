import pytest
import torch

from allreduce.group import Group
from allreduce.wire import DTYPES, Wire
from ps_core.buckets import Bucket
from tests.allreduce.replicas import bucketed, net
from tests.allreduce.together import in_group

HALVES = [torch.bfloat16, torch.float16]


def bucket_with(value: float, dtype: str = "float32") -> Bucket:
    """A bucket of which every gradient is `value`."""
    bucket = bucketed(net(dtype))[0]
    bucket.gradients.fill_(value)
    return bucket


def wire_with(value: float, dtype: torch.dtype | None, own: str = "float32") -> Wire:
    return Wire(bucket_with(value, own), dtype, on_device=False)


def test_without_conversion_the_buckets_own_gradients_travel() -> None:
    wire = wire_with(2.0, None)
    assert wire.buffer is wire.bucket.gradients
    wire.load(0.25)
    wire.unload()
    assert wire.bucket.gradients.unique().tolist() == [0.5]
    assert wire.parameters is wire.bucket.parameters


@pytest.mark.parametrize("dtype", HALVES)
def test_with_conversion_they_keep_their_own_element_type(dtype: torch.dtype) -> None:
    wire = wire_with(2.0, dtype)
    wire.load(0.25)
    assert wire.buffer.dtype == dtype
    assert wire.buffer.unique().tolist() == [0.5]
    wire.buffer.add_(1)
    wire.unload()
    assert wire.bucket.gradients.dtype == torch.float32
    assert wire.bucket.gradients.unique().tolist() == [1.5]


@pytest.mark.parametrize("own", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", HALVES)
def test_what_would_not_be_smaller_is_not_converted(own: str, dtype: torch.dtype) -> None:
    wire = wire_with(2.0, dtype, own)
    assert wire.buffer is wire.bucket.gradients


@pytest.mark.parametrize("dtype", [None, *HALVES])
@pytest.mark.parametrize("value", [3.0, float("inf"), float("nan")])
def test_a_weight_of_zero_adds_nothing_whatever_the_gradients_are(
    dtype: torch.dtype | None, value: float
) -> None:
    wire = wire_with(value, dtype)
    wire.load(0.0)
    wire.unload()
    assert wire.bucket.gradients.abs().max() == 0


def test_a_weight_of_one_changes_no_bit() -> None:
    wire = wire_with(0.1, None)
    wire.load(1.0)
    assert wire.buffer.unique().tolist() == [torch.tensor(0.1).item()]


# -- Added up --------------------------------------------------------------------------------------


def added_up(values: list[torch.Tensor], weights: list[float], dtype: torch.dtype) -> torch.Tensor:
    """What one of the members has in the end."""

    def act(group: Group) -> torch.Tensor:
        wire = wire_with(0.0, dtype)
        wire.bucket.gradients.copy_(values[group.index])
        wire.load(weights[group.index])
        group.add_up(wire.buffer).wait()
        wire.unload()
        return wire.bucket.gradients

    results = in_group(len(values), act)
    assert all(torch.equal(each, results[0]) for each in results)
    return results[0]


@pytest.mark.parametrize("dtype", HALVES)
def test_the_sum_is_as_precise_as_its_element_type(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    length = bucket_with(0.0).gradients.shape
    values = [torch.randn(length, generator=generator) for _ in range(4)]
    weights = [0.4, 0.3, 0.2, 0.1]
    exact = sum(v.double() * w for v, w in zip(values, weights, strict=True))
    bound = sum(v.double().abs() * w for v, w in zip(values, weights, strict=True))
    error = (added_up(values, weights, dtype).double() - exact).abs()
    # Each of four conversions and three sums rounds by at most half a unit in the last place.
    assert (error <= 4 * torch.finfo(dtype).eps * bound + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_no_sum_overflows_that_has_a_mean(dtype: torch.dtype) -> None:
    large = torch.full(bucket_with(0.0).gradients.shape, 60_000.0)
    mean = added_up([large] * 4, [0.25] * 4, dtype)
    assert mean.unique().tolist() == [large.to(dtype)[0].item()]


def test_what_is_too_large_for_its_element_type_is_weighted_first() -> None:
    one, nothing = (torch.full(bucket_with(0.0).gradients.shape, v) for v in (200_000.0, 0.0))
    mean = added_up([one, nothing, nothing, nothing], [0.25] * 4, torch.float16)
    assert mean.unique().tolist() == [torch.tensor(50_000.0).half().item()]


def test_configured_names_are_types_of_torch() -> None:
    assert all(getattr(torch, name) is dtype for name, dtype in DTYPES.items())
