import copy
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import nn

from ps_core.buckets import Bucket, make_buckets
from ps_core.errors import UsageError
from ps_core.optim_spec import OPTIMIZERS
from ps_core.plan import ParameterSpec, make_plan

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAN = float("nan")
INF = float("inf")


def random_parameters(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(20)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def buckets_of(parameters: Sequence[nn.Parameter], bucket_bytes: int = 2**30) -> list[Bucket]:
    specs = [
        ParameterSpec(f"p{number}", p.dtype, tuple(p.shape), 0)
        for number, p in enumerate(parameters)
    ]
    return make_buckets(make_plan(specs, 1, 2**20, bucket_bytes), parameters)


def bucket_of(*parameters: nn.Parameter) -> Bucket:
    (bucket,) = buckets_of(parameters)
    return bucket


def changed_parameter(bucket: Bucket) -> int | None:
    placement = bucket.changed()
    return None if placement is None else placement.parameter


# -- Views -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_parameters_keep_their_values_shapes_and_dtypes_and_become_views(
    dtype: torch.dtype,
) -> None:
    parameters = random_parameters((3, 5), (), (130,), dtype=dtype)
    before = [p.detach().clone() for p in parameters]
    bucket = bucket_of(*parameters)
    for parameter, old, offset in zip(parameters, before, (0, 64, 128), strict=True):
        assert torch.equal(parameter, old)
        assert (parameter.shape, parameter.dtype) == (old.shape, dtype)
        assert parameter.data_ptr() == bucket.parameters[offset:].data_ptr()
        assert parameter.requires_grad
    assert bucket.members == tuple(parameters)


def test_what_is_written_to_the_flat_buffer_is_what_the_model_computes_with() -> None:
    model = nn.Linear(3, 2)
    bucket = bucket_of(*model.parameters())
    bucket.parameters.fill_(1.0)
    bucket.upload()
    assert model(torch.ones(1, 3)).tolist() == [[4.0, 4.0]]


def test_a_parameter_has_a_storage_of_its_own_size() -> None:
    parameters = random_parameters((3, 5), (), (130,))
    bucket = bucket_of(*parameters)
    for parameter in parameters:
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert copy.deepcopy(parameter).untyped_storage().nbytes() == parameter.nbytes
    values = [parameter.detach() for parameter in parameters]
    del parameters, parameter, bucket
    gc.collect()
    assert [value.sum().isfinite() for value in values]  # their memory is theirs, too


def test_a_script_saves_one_layer_and_the_whole_model_as_in_plain_torch(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(100, 100))
    bucket_of(*model.parameters())
    torch.save(model[0].state_dict(), tmp_path / "layer.pt")
    assert (tmp_path / "layer.pt").stat().st_size < 4000
    save_model(model, str(tmp_path / "model.safetensors"))
    other = nn.Sequential(nn.Linear(3, 2), nn.Linear(100, 100))
    load_model(other, tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_a_backward_pass_through_values_that_were_replaced_fails_as_in_plain_torch() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    bucket = bucket_of(*model.parameters())
    first, second = (model(torch.ones(1, 3)).sum() for _ in range(2))
    first.backward()
    bucket.upload()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
    model(torch.ones(1, 3)).sum().backward()


@pytest.mark.parametrize("others_change_it", [False, True])
def test_a_parameter_without_gradient_may_be_used_on_unless_others_have_changed_it(
    others_change_it: bool,
) -> None:
    left_alone, trained = nn.Linear(3, 3), nn.Linear(3, 3)
    bucket = bucket_of(*left_alone.parameters(), *trained.parameters())
    used_before = left_alone(torch.ones(1, 3, requires_grad=True)).sum()
    trained(torch.ones(1, 3)).sum().backward()
    bucket.collect()
    bucket.lend()
    if others_change_it:
        bucket.parameters[0] += 1.0
    bucket.upload()
    if others_change_it:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            used_before.backward()
    else:
        used_before.backward()
        assert left_alone.weight.grad is not None


def test_gaps_between_parameters_are_zero_in_both_buffers() -> None:
    parameters = random_parameters((3,), (70,))
    bucket = bucket_of(*parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    bucket.collect()
    gaps = torch.ones(bucket.layout.length, dtype=torch.bool)
    gaps[:3] = gaps[64:134] = False
    assert bucket.layout.length == 192
    assert not bucket.parameters[gaps].any()
    assert not bucket.gradients[gaps].any()


def test_the_buckets_of_a_plan_hold_the_parameters_the_plan_says() -> None:
    parameters = random_parameters((64,), (64,), (64,))
    first, second = buckets_of(parameters, bucket_bytes=512)
    assert first.members == (parameters[0], parameters[1])
    assert second.members == (parameters[2],)


def test_a_transposed_parameter_keeps_its_values() -> None:
    values = torch.arange(6.0).view(2, 3).t()
    parameter = nn.Parameter(values)
    bucket = bucket_of(parameter)
    assert torch.equal(parameter, torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
    assert bucket.parameters[:6].tolist() == [0, 3, 1, 4, 2, 5]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.embedding(tokens))
        assert isinstance(logits, torch.Tensor)
        return logits


def test_tied_weights_stay_tied_and_their_gradient_is_the_sum_of_both_uses() -> None:
    torch.manual_seed(3)
    model = Tied()
    tokens = torch.tensor([0, 3, 3])
    table = model.embedding.weight.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad((table[tokens] @ table.t()).square().sum(), table)
    bucket = bucket_of(*model.parameters())
    model(tokens).square().sum().backward()
    bucket.collect()
    assert model.head.weight is model.embedding.weight
    torch.testing.assert_close(bucket.gradients[:15].view(5, 3), expected)


# -- Collecting gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_collected_gradients_are_those_of_autograd(dtype: torch.dtype) -> None:
    parameters = random_parameters((3, 5), (7,), dtype=dtype)
    bucket = bucket_of(*parameters)
    sum((p * p).sum() for p in parameters).backward()  # type: ignore[union-attr]  # not empty
    bucket.collect()
    assert torch.equal(bucket.gradients[:15], 2 * parameters[0].detach().flatten())
    assert torch.equal(bucket.gradients[64:71], 2 * parameters[1].detach())
    assert bucket.present == [True, True]


def test_a_parameter_without_gradient_is_absent_and_its_elements_are_zero() -> None:
    parameters = random_parameters((4,), (4,))
    bucket = bucket_of(*parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    bucket.collect()
    parameters[0].grad = None
    bucket.collect()
    assert bucket.present == [False, True]
    assert bucket.gradients[:4].tolist() == [0.0] * 4
    assert bucket.gradients[64:68].tolist() == [1.0] * 4


def test_a_zero_gradient_is_present() -> None:
    (parameter,) = random_parameters((4,))
    bucket = bucket_of(parameter)
    assert bucket.present == [False]
    parameter.grad = torch.zeros(4)
    bucket.collect()
    assert bucket.present == [True]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [0.5, 1 / 3, 0.0, 2.0])
def test_gradients_are_multiplied_with_the_scale_in_place(dtype: torch.dtype, scale: float) -> None:
    (parameter,) = random_parameters((100,), dtype=dtype)
    bucket = bucket_of(parameter)
    gradient = torch.linspace(-3, 3, 100).to(dtype)
    parameter.grad = gradient.clone()
    bucket.collect(scale)
    assert torch.equal(bucket.gradients[:100], gradient * scale)
    assert torch.equal(parameter.grad, gradient * scale)


def test_a_gradient_is_in_memory_once_and_accumulates_there() -> None:
    (parameter,) = random_parameters((100,))
    bucket = bucket_of(parameter)
    for count in (1, 2):
        (parameter * 3).sum().backward()
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() == bucket.gradients.data_ptr()
        assert bucket.gradients[:100].tolist() == [3.0 * count] * 100
    parameter.grad = None
    parameter.sum().backward()
    bucket.collect()
    assert bucket.gradients[:100].tolist() == [1.0] * 100


def test_a_gradient_in_another_memory_order_is_collected_in_the_parameters_order() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    bucket = bucket_of(parameter)
    parameter.grad = torch.arange(6.0).view(3, 2).t()
    bucket.collect()
    assert bucket.gradients[:6].tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_gradient_that_belongs_to_a_graph_is_collected_as_plain_numbers(scale: float) -> None:
    # torch.autograd.grad(…, create_graph=True), as gradient penalties use it.
    parameters = random_parameters((4,), (4,))
    bucket = bucket_of(*parameters)
    for parameter in parameters:
        parameter.grad = parameter * 3.0
    for _ in range(2):
        bucket.collect(scale)
    assert not bucket.gradients.requires_grad
    assert torch.equal(bucket.gradients[64:68], parameters[1].detach() * 3.0 * scale)


def test_a_sparse_gradient_is_refused_with_the_way_out() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    bucket = bucket_of(*embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UsageError, match="sparse=False"):
        bucket.collect()


# -- Changes since the anchor ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_returning_to_the_anchor_leaves_anchor_minus_parameters_as_gradients(
    dtype: torch.dtype,
) -> None:
    parameters = random_parameters((3, 5), (70,), dtype=dtype)
    bucket = bucket_of(*parameters)
    before = [p.detach().clone() for p in parameters]
    bucket.set_anchor()
    changes = [torch.full_like(p, 0.25) for p in before]
    after = [value - change for value, change in zip(before, changes, strict=True)]
    for parameter, value in zip(parameters, after, strict=True):
        parameter.data.copy_(value)
    bucket.return_to_anchor()
    for position, parameter in enumerate(parameters):
        assert torch.equal(bucket.gradient_views[position], before[position] - after[position])
        assert torch.equal(parameter, before[position])
    assert bucket.present == [True, True]
    assert not bucket.gradients[15:64].any()


def test_every_round_has_its_own_anchor() -> None:
    (parameter,) = random_parameters((4,))
    bucket = bucket_of(parameter)
    for value in (1.0, 2.0):
        parameter.data.fill_(value)
        bucket.set_anchor()
        parameter.data.fill_(0.5)
        bucket.return_to_anchor()
        assert parameter.tolist() == [value] * 4
        assert bucket.gradients[:4].tolist() == [value - 0.5] * 4


# -- Between host and device -----------------------------------------------------------------------


def test_on_the_cpu_the_host_buffers_are_the_buffers() -> None:
    bucket = bucket_of(*random_parameters((9,)))
    assert bucket.host_parameters is bucket.parameters
    assert bucket.host_gradients is bucket.gradients


def check_mirrors(bucket: Bucket, parameter: nn.Parameter) -> None:
    assert torch.equal(bucket.host_parameters, bucket.parameters.cpu())
    parameter.grad = torch.full_like(parameter, 3.0)
    bucket.collect(0.5)
    assert not bucket.host_gradients.any()
    bucket.download()
    assert bucket.host_gradients[:9].tolist() == [1.5] * 9
    bucket.host_parameters.fill_(7.0)
    assert not (parameter == 7.0).any()
    bucket.upload()
    assert (parameter == 7.0).all()
    assert bucket.changed() is None


def test_download_and_upload_copy_between_a_device_and_its_mirror() -> None:
    (parameter,) = random_parameters((9,))
    bucket = bucket_of(parameter)
    # What another device has: memory of its own for the host's buffers.
    bucket.host_parameters = bucket.parameters.clone()
    bucket.host_gradients = bucket.gradients.clone()
    check_mirrors(bucket, parameter)


@pytest.mark.gpu
def test_a_bucket_on_a_gpu_is_mirrored_in_pinned_memory() -> None:
    parameter = nn.Parameter(torch.arange(9.0, device="cuda"))
    bucket = bucket_of(parameter)
    assert bucket.parameters.is_cuda
    assert bucket.host_parameters.is_pinned()
    assert bucket.host_gradients.is_pinned()
    check_mirrors(bucket, parameter)


# -- Numbers that are not finite -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(("culprit", "element"), [(0, 0), (1, 0), (1, 129), (2, 6)])
def test_the_first_parameter_with_a_nonfinite_gradient_is_named(
    dtype: torch.dtype, bad: float, culprit: int, element: int
) -> None:
    parameters = random_parameters((5,), (130,), (7,), dtype=dtype)
    bucket = bucket_of(*parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    gradient = parameters[culprit].grad
    assert gradient is not None
    gradient[element] = bad
    bucket.collect()
    found = bucket.first_nonfinite()
    assert found is not None
    assert found.parameter == culprit


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_finite_gradients_are_fine(dtype: torch.dtype) -> None:
    (parameter,) = random_parameters((64,), dtype=dtype)
    bucket = bucket_of(parameter)
    limits = torch.finfo(dtype)
    parameter.grad = torch.tensor([limits.min, limits.max] * 32, dtype=dtype)
    bucket.collect()
    assert bucket.first_nonfinite() is None


def test_of_two_bad_parameters_the_first_is_named() -> None:
    parameters = random_parameters((4,), (4,), (4,))
    bucket = bucket_of(*parameters)
    for parameter, value in zip(parameters, (1.0, NAN, INF), strict=True):
        parameter.grad = torch.full((4,), value)
    bucket.collect()
    found = bucket.first_nonfinite()
    assert found is not None
    assert found.parameter == 1


# -- Changes behind the exchange's back ------------------------------------------------------------


def no_grad_add(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(1.0)


def no_grad_copy(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.copy_(torch.zeros_like(parameter))


def no_grad_one_element(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter[0, 1] = 5.0


def initialise(parameter: nn.Parameter) -> None:
    nn.init.constant_(parameter, 3.0)


def data_clamp(parameter: nn.Parameter) -> None:
    parameter.data.clamp_(-0.01, 0.01)


def data_replaced(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.clone() + 1


def data_of_another_dtype(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.double()


CHANGES: list[Callable[[nn.Parameter], None]] = [
    no_grad_add,
    no_grad_copy,
    no_grad_one_element,
    initialise,
    data_clamp,
    data_replaced,
    data_of_another_dtype,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_parameter_changed_by_the_script_is_found_and_named(
    change: Callable[[nn.Parameter], None], culprit: int
) -> None:
    parameters = random_parameters((3, 5), (2, 70), (4, 4))
    bucket = bucket_of(*parameters)
    assert bucket.changed() is None
    change(parameters[culprit])
    assert changed_parameter(bucket) == culprit


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("kernel", ["foreach", "fused", None])
def test_a_step_of_a_torch_optimizer_is_found(name: str, kernel: str | None) -> None:
    if kernel == "fused" and name not in {"SGD", "Adam", "AdamW", "Adagrad"}:
        pytest.skip("has no fused kernel")
    (parameter,) = random_parameters((3, 5))
    bucket = bucket_of(parameter)
    parameter.grad = torch.ones_like(parameter)
    flags = {} if kernel is None else {kernel: True}
    OPTIMIZERS[name]([{"params": [parameter], "lr": 0.1, **flags}]).step()  # type: ignore[call-arg]  # every class takes groups alone
    assert changed_parameter(bucket) == 0


def test_a_loaded_state_dict_is_found() -> None:
    model = nn.Linear(3, 2)
    bucket = bucket_of(*model.parameters())
    model.load_state_dict({name: torch.ones_like(v) for name, v in model.state_dict().items()})
    assert changed_parameter(bucket) == 0


def test_changes_of_data_in_a_large_bucket_are_found_by_a_sample() -> None:
    parameters = random_parameters((100_000,), (50_000,))
    bucket = bucket_of(*parameters)
    parameters[1].data.mul_(1.5)
    assert changed_parameter(bucket) == 1
    bucket.upload()
    parameters[0].data.clamp_(-1e-3, 1e-3)
    assert changed_parameter(bucket) == 0


def test_a_change_that_autograd_sees_is_found_in_a_single_element_of_a_large_bucket() -> None:
    parameters = random_parameters((100,), (100_000,))
    bucket = bucket_of(*parameters)
    for element in (1, 7, 50_001):
        with torch.no_grad():
            parameters[1][element] += 1.0
        assert changed_parameter(bucket) == 1
        bucket.accept()


def test_what_the_exchange_writes_is_quiet_once_uploaded() -> None:
    parameters = random_parameters((3, 5), (9,))
    bucket = bucket_of(*parameters)
    for value in (1.0, 2.0, NAN):
        bucket.parameters.fill_(value)
        bucket.upload()
        assert bucket.changed() is None


@pytest.mark.parametrize("change", [no_grad_add, data_clamp])
def test_accepting_makes_the_parameters_as_they_are_the_known_ones(
    change: Callable[[nn.Parameter], None],
) -> None:
    (parameter,) = random_parameters((3, 5))
    bucket = bucket_of(parameter)
    change(parameter)
    bucket.accept()
    assert bucket.changed() is None
    data_clamp(parameter)
    parameter.data.zero_()
    assert changed_parameter(bucket) == 0


def test_accepting_does_not_forgive_replaced_storage() -> None:
    (parameter,) = random_parameters((9,))
    bucket = bucket_of(parameter)
    data_replaced(parameter)
    bucket.accept()
    assert changed_parameter(bucket) == 0


def climb_and_return(parameter: nn.Parameter) -> None:
    """As implementations of SAM do."""
    before = parameter.data.clone()
    no_grad_add(parameter)
    parameter.data = before


def swap_and_return(parameter: nn.Parameter) -> None:
    """As averages of weights are evaluated."""
    before = parameter.detach().clone()
    for values in (torch.zeros_like(before), before):
        with torch.no_grad():
            parameter.copy_(values)


def replace_and_return(parameter: nn.Parameter) -> None:
    before = parameter.data
    parameter.data = torch.zeros_like(before)
    parameter.data = before


def load_and_return(parameter: nn.Parameter) -> None:
    owner = nn.ParameterList([parameter])
    before = {"0": parameter.detach().clone()}
    owner.load_state_dict({"0": torch.zeros_like(parameter)})
    owner.load_state_dict(before)


RETURNING = [climb_and_return, swap_and_return, replace_and_return, load_and_return]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("change", RETURNING)
def test_a_parameter_that_has_its_values_back_is_not_changed(
    change: Callable[[nn.Parameter], None], dtype: torch.dtype
) -> None:
    parameters = random_parameters((3, 5), (5000,), dtype=dtype)
    bucket = bucket_of(*parameters)
    for parameter in parameters:
        change(parameter)
    assert bucket.changed() is None
    bucket.parameters.fill_(2.0)
    bucket.upload()
    assert all(bool((parameter == 2).all()) for parameter in parameters)  # it is still here
    assert bucket.changed() is None


@pytest.mark.parametrize("change", RETURNING)
def test_of_values_that_come_back_every_bit_counts(change: Callable[[nn.Parameter], None]) -> None:
    (parameter,) = random_parameters((100_000,))
    bucket = bucket_of(parameter)
    change(parameter)
    with torch.no_grad():
        parameter[77_777] = torch.nextafter(parameter[77_777], torch.tensor(9.0))
    assert changed_parameter(bucket) == 0


@pytest.mark.parametrize("places", [(0, 1), (1, 64), (3, 4096), (5, 3 * 2048 + 5)])
def test_values_that_come_back_in_other_places_are_a_change(places: tuple[int, int]) -> None:
    (parameter,) = random_parameters((100_000,))
    bucket = bucket_of(parameter)
    with torch.no_grad():
        parameter[list(places)] = parameter[list(reversed(places))]
    assert changed_parameter(bucket) == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_parameters_that_are_nan_are_not_taken_for_changed(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.full((100,), NAN, dtype=dtype))
    bucket = bucket_of(parameter)
    assert bucket.changed() is None
    parameter.data.zero_()
    assert changed_parameter(bucket) == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_training_without_touching_parameters_is_quiet(dtype: torch.dtype) -> None:
    parameters = random_parameters((3, 5), (7,), dtype=dtype)
    bucket = bucket_of(*parameters)
    for _ in range(3):
        sum((p * p).sum() for p in parameters).backward()  # type: ignore[union-attr]  # not empty
        bucket.collect()
        assert bucket.changed() is None


@given(st.integers(1, 20_000), st.data())
def test_the_changed_parameter_is_named_whatever_the_sizes(first: int, data: st.DataObject) -> None:
    sizes = [first, *data.draw(st.lists(st.integers(1, 20_000), max_size=3))]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    bucket = bucket_of(*parameters)
    culprit = data.draw(st.integers(0, len(sizes) - 1))
    parameters[culprit].data.fill_(1.0)
    # Every bucket of up to 4096 elements is compared whole; larger ones at evenly spaced elements.
    step = max(1, bucket.layout.length // 4096)
    offset = bucket.layout.placements[culprit].offset
    is_sampled = any(element % step == 0 for element in range(offset, offset + sizes[culprit]))
    assert changed_parameter(bucket) == (culprit if is_sampled else None)
