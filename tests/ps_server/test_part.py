import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import ParameterSpec, Part, make_plan
from ps_server.part import PartState, compensated

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FLOATS = [F32, F64, BF16, F16]
PLAIN = OptimizerSpec("SGD", ({"lr": 1.0},))
LR: Hyperparameters = {"lr": 1.0}
BOTH = [False, True]


def make_part(*sizes: int, dtype: torch.dtype = F32) -> Part:
    specs = [ParameterSpec(f"p{number}", dtype, (size,), 0) for number, size in enumerate(sizes)]
    (part,) = make_plan(specs, 1, 2**20, 2**20).parts
    return part


def make_state(
    *sizes: int,
    dtype: torch.dtype = F32,
    deterministic: bool = False,
    optimizer: OptimizerSpec = PLAIN,
) -> PartState:
    return PartState(make_part(*(sizes or (64,)), dtype=dtype), optimizer, keep=deterministic)


def full(value: float, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.full((64,), value, dtype=dtype)


def mean_of(
    state: PartState,
    contributions: Sequence[tuple[int, int, torch.Tensor]],
    group: Hyperparameters = LR,
) -> torch.Tensor:
    """The mean of (rank, samples, gradient) contributed in this order."""
    for rank, samples, gradient in contributions:
        state.contribute(rank, samples, group, [True] * len(state.part.slices), gradient)
    state.average()
    assert state.mean is not None
    return state.mean


def random_gradients(count: int, dtype: torch.dtype = F32, seed: int = 17) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, generator=generator, dtype=F64).to(dtype) for _ in range(count)]


def exact_mean(samples: Sequence[int], gradients: Sequence[torch.Tensor]) -> list[Fraction]:
    """sum(n_i * g_i) / sum(n_i) of each element, without any rounding."""
    columns = zip(*(gradient.tolist() for gradient in gradients), strict=True)
    return [
        sum((n * Fraction(g) for n, g in zip(samples, column, strict=True)), Fraction(0))
        / sum(samples)
        for column in columns
    ]


# -- The weighted mean -----------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", BOTH)
def test_the_mean_is_over_samples_not_over_workers(deterministic: bool) -> None:
    state = make_state(deterministic=deterministic)
    mean = mean_of(state, [(0, 1, full(8.0)), (1, 3, full(4.0))])
    assert mean.tolist() == [5.0] * 64  # (1 * 8 + 3 * 4) / 4


@pytest.mark.parametrize("deterministic", BOTH)
@pytest.mark.parametrize("dtype", FLOATS)
@given(samples=st.lists(st.integers(1, 2**20), min_size=1, max_size=6))
def test_the_mean_is_exact_within_rounding_for_any_numbers_of_samples(
    deterministic: bool, dtype: torch.dtype, samples: list[int]
) -> None:
    gradients = random_gradients(len(samples), dtype)
    state = make_state(dtype=dtype, deterministic=deterministic)
    mean = mean_of(state, list(zip(range(len(samples)), samples, gradients, strict=True)))
    assert mean.dtype is dtype
    # Half precision is added in float32 and rounded once: half a unit in the last place. The others
    # round once or twice for each contribution.
    wide = F32 if dtype in (BF16, F16) else dtype
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    slack = 4 * len(samples) * torch.finfo(wide).eps * largest
    for actual, expected in zip(mean.tolist(), exact_mean(samples, gradients), strict=True):
        rounding = 0.0 if wide is dtype else abs(float(expected)) * torch.finfo(dtype).eps / 2
        smallest = torch.finfo(dtype).smallest_normal
        assert abs(actual - expected) <= slack + rounding + smallest


@pytest.mark.parametrize("deterministic", BOTH)
@pytest.mark.parametrize("samples", [1, 3, 49])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_equal_weights_of_a_power_of_two_workers_are_added_exactly(
    deterministic: bool, samples: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    gradients = [
        torch.randint(-1000, 1000, (64,), generator=generator).float() for _ in range(count)
    ]
    state = make_state(deterministic=deterministic)
    mean = mean_of(state, [(rank, samples, g.clone()) for rank, g in enumerate(gradients)])
    assert torch.equal(mean, torch.stack(gradients).sum(0) / count)


@pytest.mark.parametrize("deterministic", BOTH)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_single_contribution_is_used_bit_for_bit(deterministic: bool, dtype: torch.dtype) -> None:
    (gradient,) = random_gradients(1, dtype)
    gradient[0] = -0.0  # adding it to 0.0 would lose the sign
    bits = gradient.clone()
    state = make_state(dtype=dtype, deterministic=deterministic)
    state.abstain(0)
    mean = mean_of(state, [(1, 49, gradient)])  # (g * 49) / 49 would not be g
    assert torch.equal(mean, bits)
    assert mean[0].signbit()
    state.apply(state.version)
    assert torch.equal(state.parameters, -bits)


@pytest.mark.parametrize("dtype", FLOATS)
def test_deterministic_sums_are_the_same_bits_whatever_the_order_of_arrival(
    dtype: torch.dtype,
) -> None:
    contributions = list(zip(range(4), (3, 1, 7, 2), random_gradients(4, dtype), strict=True))
    means = [
        mean_of(make_state(dtype=dtype, deterministic=True), order).clone()
        for order in itertools.permutations(contributions)
    ]
    assert all(torch.equal(mean, means[0]) for mean in means)


def test_without_it_the_order_of_arrival_shows_in_the_last_bits() -> None:
    # Why `deterministic` exists.
    contributions = list(zip(range(4), (3, 1, 7, 2), random_gradients(4), strict=True))
    means = [
        mean_of(make_state(), order).clone() for order in itertools.permutations(contributions)
    ]
    assert not all(torch.equal(mean, means[0]) for mean in means)
    for mean in means:
        torch.testing.assert_close(mean, means[0])


@pytest.mark.parametrize("samples", [(3, 1, 7, 2), (1, 48), (31, 7, 11)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_deterministic_sums_weight_each_contribution_with_its_share_of_the_samples(
    dtype: torch.dtype, samples: Sequence[int]
) -> None:
    gradients = random_gradients(len(samples), dtype)
    state = make_state(dtype=dtype, deterministic=True)
    mean = mean_of(state, list(zip(range(len(samples)), samples, gradients, strict=True)))
    expected = torch.zeros(64, dtype=dtype)
    for n, gradient in zip(samples, gradients, strict=True):
        expected = expected.add(gradient, alpha=n / sum(samples))
    assert torch.equal(mean, expected)


@pytest.mark.parametrize("deterministic", BOTH)
def test_bfloat16_is_added_in_float32(deterministic: bool) -> None:
    # In bfloat16 256 + 1 is 256: adding there would give 64.5.
    state = make_state(dtype=BF16, deterministic=deterministic)
    values = (256.0, 1.0, 1.0, 2.0)
    mean = mean_of(state, [(rank, 1, full(v, BF16)) for rank, v in enumerate(values)])
    assert mean.dtype is BF16
    assert mean.tolist() == [65.0] * 64


@pytest.mark.parametrize("deterministic", BOTH)
def test_float16_sums_beyond_its_range_do_not_overflow(deterministic: bool) -> None:
    state = make_state(dtype=F16, deterministic=deterministic)
    mean = mean_of(state, [(rank, 1, full(60_000.0, F16)) for rank in range(4)])
    assert mean.tolist() == [60_000.0] * 64


@pytest.mark.parametrize("deterministic", BOTH)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_gradients_that_are_given_are_only_read(
    deterministic: bool, dtype: torch.dtype, count: int
) -> None:
    gradients = random_gradients(count, dtype)
    copies = [gradient.clone() for gradient in gradients]
    versions = [gradient._version for gradient in gradients]
    optimizer = OptimizerSpec("SGD", ({"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1},))
    state = make_state(dtype=dtype, deterministic=deterministic, optimizer=optimizer)
    for _ in range(2):
        contributions = [(rank, rank + 1, gradient) for rank, gradient in enumerate(gradients)]
        mean_of(state, contributions, optimizer.groups[0])
        state.apply(state.version, factor=0.5)
    assert all(torch.equal(a, b) for a, b in zip(gradients, copies, strict=True))
    # Their memory may be that of immutable bytes: not even the same value is written.
    assert [gradient._version for gradient in gradients] == versions


# -- Updates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", BOTH)
def test_every_update_starts_from_nothing(deterministic: bool) -> None:
    state = make_state(deterministic=deterministic)
    mean_of(state, [(0, 1, full(2.0)), (1, 1, full(4.0))])
    state.apply(state.version)
    assert (state.version, state.acted, state.mean, state.averaged) == (1, {}, None, False)
    assert mean_of(state, [(1, 5, full(1.0)), (0, 5, full(3.0))]).tolist() == [2.0] * 64
    state.apply(state.version)
    assert state.parameters.tolist() == [-5.0] * 64
    assert mean_of(state, [(1, 5, full(7.0))]).tolist() == [7.0] * 64
    state.apply(state.version)
    assert state.version == 3


def test_the_ledger_keeps_each_workers_last_step_across_updates() -> None:
    state = make_state()
    mean_of(state, [(0, 2, full(1.0))])
    state.abstain(3)
    state.apply(state.version)
    mean_of(state, [(3, 2, full(1.0))])
    assert state.acted == {3: 2}
    state.apply(state.version)
    assert state.last_step == {0: 0, 3: 1}


@pytest.mark.parametrize("deterministic", BOTH)
def test_abstaining_adds_neither_samples_nor_gradient(deterministic: bool) -> None:
    state = make_state(deterministic=deterministic)
    state.abstain(0)
    state.contribute(1, 2, LR, [True], full(6.0))
    state.abstain(2)
    state.contribute(3, 1, LR, [True], full(3.0))
    assert state.acted == {0: 0, 1: 2, 2: 0, 3: 1}
    state.average()
    state.apply(state.version)
    assert state.parameters.tolist() == [-5.0] * 64


@pytest.mark.parametrize("deterministic", BOTH)
def test_when_all_abstain_the_version_advances_and_nothing_else(deterministic: bool) -> None:
    optimizer = OptimizerSpec("Adam", ({"lr": 0.1, "weight_decay": 0.1},))
    state = make_state(deterministic=deterministic, optimizer=optimizer)
    state.parameters.fill_(2.0)
    for rank in range(2):
        state.abstain(rank)
    state.average()
    assert state.mean is None
    assert state.squares() == 0.0
    state.apply(state.version, factor=0.5)
    assert state.version == 1
    assert state.parameters.tolist() == [2.0] * 64
    assert list(state.optimizer.read_state()) == []


@pytest.mark.parametrize("deterministic", BOTH)
def test_a_slice_that_nobody_has_a_gradient_for_is_skipped(deterministic: bool) -> None:
    optimizer = OptimizerSpec("AdamW", ({"lr": 0.5, "weight_decay": 0.1},))
    state = make_state(64, 64, deterministic=deterministic, optimizer=optimizer)
    state.parameters.fill_(2.0)
    gradient = torch.cat([torch.zeros(64), torch.ones(64)])
    for rank in range(2):
        state.contribute(rank, 1, optimizer.groups[0], [False, True], gradient)
    state.average()
    state.apply(state.version)
    assert state.parameters[:64].tolist() == [2.0] * 64  # a zero gradient would have decayed it
    assert (state.parameters[64:] < 2.0).all()
    assert {index for index, _, _ in state.optimizer.read_state()} == {1}


@pytest.mark.parametrize("deterministic", BOTH)
@pytest.mark.parametrize("first", [0, 1])
def test_a_gradient_that_one_worker_has_is_averaged_over_the_samples_of_all(
    deterministic: bool, first: int
) -> None:
    # As in data-parallel training of torch: the others count with zeros.
    state = make_state(64, 64, deterministic=deterministic)
    zero, one = torch.zeros(64), torch.ones(64)
    given_by = [
        ([True, False], torch.cat([4 * one, zero])),
        ([True, True], torch.cat([one, 8 * one])),
    ]
    for rank in (first, 1 - first):
        present, gradient = given_by[rank]
        state.contribute(rank, 1, LR, present, gradient)
    state.average()
    state.apply(state.version)
    assert state.parameters[:64].tolist() == [-2.5] * 64
    assert state.parameters[64:].tolist() == [-4.0] * 64


def test_presence_is_forgotten_after_the_update() -> None:
    state = make_state(64, 64, optimizer=OptimizerSpec("SGD", ({"lr": 1.0, "weight_decay": 0.5},)))
    state.parameters.fill_(1.0)
    hyperparameters: Hyperparameters = {"lr": 1.0, "weight_decay": 0.5}
    for present in ([True, True], [True, False]):
        state.contribute(0, 1, hyperparameters, present, torch.zeros(128))
        state.average()
        state.apply(state.version)
    assert state.parameters[0] == 0.25
    assert state.parameters[64] == 0.5


# -- Clipping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_squares_are_those_of_the_mean_in_float64(dtype: torch.dtype) -> None:
    state = make_state(dtype=dtype)
    mean = mean_of(state, list(zip(range(3), (1, 2, 5), random_gradients(3, dtype), strict=True)))
    expected = math.fsum(value * value for value in mean.tolist())
    assert state.squares() == pytest.approx(expected, rel=1e-14)


def test_squares_beyond_the_range_of_float32_are_finite() -> None:
    state = make_state()
    mean_of(state, [(0, 1, full(1e30))])
    assert state.squares() == pytest.approx(64e60, rel=1e-6)


@pytest.mark.parametrize("deterministic", BOTH)
def test_the_factor_scales_the_mean_and_not_what_was_given(deterministic: bool) -> None:
    given = full(8.0)
    state = make_state(deterministic=deterministic)
    mean_of(state, [(0, 3, given)])
    state.apply(state.version, factor=0.25)
    assert state.parameters.tolist() == [-2.0] * 64
    assert given.tolist() == [8.0] * 64


def test_the_parameters_are_updated_in_place() -> None:
    state = make_state()
    address = state.parameters.data_ptr()
    for _ in range(2):
        state.contribute(0, 1, LR, [True], full(1.0))
        state.average()
        state.apply(state.version)
    assert state.parameters.data_ptr() == address


# -- Whose hyperparameters, and whose contributions ------------------------------------------------


@pytest.mark.parametrize("deterministic", BOTH)
def test_the_hyperparameters_are_those_of_the_lowest_rank_that_contributed(
    deterministic: bool,
) -> None:
    state = make_state(deterministic=deterministic)
    state.abstain(0)
    for rank, lr in ((2, 10.0), (1, 0.5)):
        state.contribute(rank, 1, {"lr": lr}, [True], full(4.0))
    state.average()
    state.apply(state.version)
    assert state.parameters.tolist() == [-2.0] * 64


def test_contributions_that_were_kept_can_be_dropped_and_the_divisor_is_what_was_used() -> None:
    state = make_state(deterministic=True)
    for rank, samples, value in ((0, 1, 8.0), (1, 3, 4.0), (2, 100, 1e6)):
        state.contribute(rank, samples, LR, [True], full(value))
    assert state.drop_others({0, 1}) == 1
    state.average()
    state.apply(state.version)
    assert state.parameters.tolist() == [-5.0] * 64  # (1 * 8 + 3 * 4) / 4
    assert state.last_step == {0: 0, 1: 0}, "the ledger changes with the update"


# -- Gradients that do not know of the latest updates ----------------------------------------------


def test_staleness_counts_the_updates_since_the_worker_was_sent_the_part() -> None:
    state = make_state()
    state.pull(0, copy=False)
    assert state.staleness(0) == 0
    for expected in (1, 2):
        mean_of(state, [(1, 1, full(1.0))])
        state.apply(state.version)
        assert state.staleness(0) == expected
    state.pull(0, copy=False)
    assert state.staleness(0) == 0
    assert state.staleness(5) == 0, "one that was never sent it has nothing to be behind of"


def test_delay_compensation_is_the_formula_of_dc_asgd_on_the_raw_gradient() -> None:
    spec = OptimizerSpec("SGD", ({"lr": 0.5, "momentum": 0.9},))
    state = make_state(optimizer=spec)
    state.parameters.copy_(torch.linspace(-1, 1, 64))
    pulled = state.parameters.clone()
    state.pull(0, copy=True)
    mean_of(state, [(1, 1, full(0.25))], spec.groups[0])
    state.apply(state.version)
    current = state.parameters.clone()
    (gradient,) = random_gradients(1)
    state.contribute(0, 1, spec.groups[0], [True], gradient)
    state.compensate(0, 0.3)
    state.average()
    state.apply(state.version)
    # Zheng et al. 2017: g + lambda * g * g * (w - w_pulled); then momentum, as torch does it.
    corrected = gradient + 0.3 * gradient * gradient * (current - pulled)
    expected = current - 0.5 * (0.9 * full(0.25) + corrected)
    torch.testing.assert_close(state.parameters, expected)
    assert (current < pulled).all(), "so the sign of current minus pulled is told apart"


def test_without_other_updates_delay_compensation_changes_no_bit() -> None:
    (gradient,) = random_gradients(1)
    plain, corrected = make_state(), make_state()
    for state in (plain, corrected):
        state.pull(0, copy=True)
        state.contribute(0, 1, LR, [True], gradient)
        if state is corrected:
            state.compensate(0, 0.7)
        state.average()
        state.apply(state.version)
    assert torch.equal(plain.parameters, corrected.parameters)


@pytest.mark.parametrize(("dtype", "large"), [(F32, 1e30), (F16, 300.0), (BF16, 1e30)])
def test_delay_compensation_of_a_large_gradient_is_a_number_where_nothing_has_moved(
    dtype: torch.dtype, large: float
) -> None:
    # The square of the gradient is infinite in its own precision, and infinity times 0 is none.
    gradient, pulled = full(large, dtype), full(1.0, dtype)
    parameters = pulled.clone()
    parameters[0] += 0.5
    corrected = compensated(gradient, parameters, pulled, 0.25)
    assert corrected.dtype is dtype
    assert torch.equal(corrected[1:], gradient[1:])


def test_delay_compensation_in_half_precision_is_rounded_once() -> None:
    # 1.5 + 0.25 x 2.25 x (3 - 1) = 2.625, which bfloat16 has; 2.25 x 2 x 0.25 = 1.125 as well.
    # 301 + 0.001 x 301 x 301 x 2 = 482.202: 301 x 301 is beyond float16.
    three, one = full(3.0, F16), full(1.0, F16)
    assert compensated(full(1.5, F16), three, one, 0.25).tolist() == [2.625] * 64
    expected = torch.tensor(301 + 0.001 * 301 * 301 * 2).to(F16)
    assert compensated(full(301.0, F16), three, one, 0.001).tolist() == [float(expected)] * 64
