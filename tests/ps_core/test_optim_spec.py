import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from ps_core.errors import UsageError
from ps_core.optim_spec import (
    OPTIMIZERS,
    Hyperparameters,
    OptimizerSpec,
    build,
    check_consistency,
    check_norm,
    describe,
    local_hyperparameters,
    read_groups,
    same_kind,
)
from ps_core.settings import ConsistencyConfig

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
FUSED = {"SGD", "Adam", "AdamW", "Adagrad"}


def parameters(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2)) for _ in range(count)]


# -- Which optimizers run --------------------------------------------------------------------------


def test_these_nine_run_on_shards() -> None:
    names = "SGD Adam AdamW Adagrad RMSprop Adadelta Adamax NAdam RAdam"
    assert set(OPTIMIZERS) == set(names.split())
    assert all(getattr(torch.optim, name) is kind for name, kind in OPTIMIZERS.items())


class MySGD(torch.optim.SGD):
    pass


# A class that only shares the name.
Impostor = type("SGD", (torch.optim.SGD,), {})

UNSUPPORTED: list[Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = [
    torch.optim.LBFGS,
    torch.optim.ASGD,
    torch.optim.Rprop,
    torch.optim.Adafactor,
    torch.optim.SparseAdam,
    torch.optim.Muon,
    MySGD,
    Impostor,
]


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_an_optimizer_that_is_not_elementwise_or_not_torchs_is_refused_with_the_choices(
    kind: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    with pytest.raises(UsageError, match=r"cannot run on shards.*Adadelta.*SGD"):
        describe(kind(parameters()))


def test_no_optimizer_of_torch_is_forgotten() -> None:
    classes = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    refused = {"LBFGS", "ASGD", "Rprop", "Adafactor", "SparseAdam", "Muon", "Optimizer"}
    assert classes == {*OPTIMIZERS, *refused}


# -- Clipping and consistency ----------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, 1e-30, 1.0, 1e30])
def test_a_gradient_can_be_clipped_to_any_positive_norm_or_not_at_all(norm: float | None) -> None:
    check_norm(norm)
    assert describe(torch.optim.SGD(parameters(), lr=0.1), norm).max_grad_norm == norm


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_a_norm_to_which_nothing_can_be_clipped_is_refused(norm: float) -> None:
    with pytest.raises(UsageError, match="give a positive number or None"):
        check_norm(norm)
    with pytest.raises(UsageError, match="give a positive number or None"):
        describe(torch.optim.SGD(parameters(), lr=0.1), norm)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_delay_compensation_is_for_sgd_and_every_other_modifier_for_all(name: str) -> None:
    spec = OptimizerSpec(name, ({"lr": 0.1},))
    for consistency in (
        ConsistencyConfig(),
        ConsistencyConfig(backup_workers=1),
        ConsistencyConfig("bounded"),
        ConsistencyConfig("async", staleness_scaling=True),
        ConsistencyConfig("local"),
    ):
        check_consistency(spec, consistency)
    compensated = ConsistencyConfig("async", delay_compensation=0.5)
    if name == "SGD":
        check_consistency(spec, compensated)
    else:
        with pytest.raises(UsageError, match=f"derived for SGD, and {name} scales"):
            check_consistency(spec, compensated)


# -- Reading hyperparameters -----------------------------------------------------------------------


def test_the_hyperparameters_of_sgd_are_torchs_keywords_without_none() -> None:
    spec = describe(torch.optim.SGD(parameters(), lr=0.1, momentum=0.9), max_grad_norm=2.0)
    assert spec == OptimizerSpec(
        "SGD",
        (
            {
                "lr": 0.1,
                "momentum": 0.9,
                "dampening": 0,
                "weight_decay": 0,
                "nesterov": False,
                "maximize": False,
                "differentiable": False,
            },
        ),
        max_grad_norm=2.0,
    )


def test_each_parameter_group_has_its_own_entry() -> None:
    one, two = parameters(2)
    own: list[dict[str, Any]] = [
        {"params": [one], "lr": 0.5},
        {"params": [two], "betas": (0.5, 0.6)},
    ]
    optimizer = torch.optim.Adam(own, lr=0.1)
    groups = read_groups(optimizer)
    assert [group["lr"] for group in groups] == [0.5, 0.1]
    assert [group["betas"] for group in groups] == [(0.9, 0.999), (0.5, 0.6)]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_everything_read_is_a_plain_number_bool_or_tuple(name: str) -> None:
    optimizer = OPTIMIZERS[name](parameters())  # type: ignore[call-arg]  # every class takes them alone
    (group,) = read_groups(optimizer)
    assert {type(value) for value in group.values()} <= {int, float, bool, tuple}


def test_a_learning_rate_in_a_tensor_is_read_as_its_number() -> None:
    (group,) = read_groups(torch.optim.Adam(parameters(), lr=torch.tensor(0.25)))
    assert group["lr"] == 0.25
    assert type(group["lr"]) is float


def test_betas_in_a_list_of_tensors_are_read_as_numbers() -> None:
    optimizer = torch.optim.AdamW(parameters())
    optimizer.param_groups[0]["betas"] = [torch.tensor(0.5), 0.25]
    assert read_groups(optimizer)[0]["betas"] == (0.5, 0.25)


def test_capturable_is_left_out_since_it_only_says_where_a_step_runs() -> None:
    for capturable in (True, False):
        (group,) = read_groups(torch.optim.NAdam(parameters(), capturable=capturable))
        assert "capturable" not in group


def test_a_choice_of_kernel_is_kept() -> None:
    (group,) = read_groups(torch.optim.Adam(parameters(), foreach=True))
    assert group["foreach"] is True
    assert "fused" not in group


def test_keys_that_a_scheduler_adds_are_ignored() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=1.0, momentum=0.9)
    before = read_groups(optimizer)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    assert "initial_lr" in optimizer.param_groups[0]
    (after,) = read_groups(optimizer)
    assert after.keys() == before[0].keys()
    assert after["lr"] == scheduler.get_last_lr()[0]


def test_the_values_are_those_of_now() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert read_groups(optimizer)[0]["lr"] == 0.5


def test_differentiable_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="differentiable=True"):
        describe(torch.optim.SGD(parameters(), lr=0.1, differentiable=True))


@pytest.mark.parametrize("value", ["fast", 1j, object()])
def test_a_hyperparameter_that_is_no_number_is_refused_by_name(value: object) -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.param_groups[0]["momentum"] = value
    with pytest.raises(UsageError, match="hyperparameter momentum="):
        read_groups(optimizer)


# -- Hyperparameters of the same kind --------------------------------------------------------------

GROUP: Hyperparameters = {"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False}


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(GROUP, id="the same"),
        pytest.param({"lr": 1, "betas": (0.0, 0.0), "amsgrad": True}, id="other values"),
    ],
)
def test_other_values_are_of_the_same_kind(given: Hyperparameters) -> None:
    assert same_kind([GROUP, GROUP], [GROUP, given])


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([], id="no group"),
        pytest.param([GROUP, GROUP], id="a group more"),
        pytest.param([{"lr": 0.1, "betas": (0.9, 0.99)}], id="a keyword fewer"),
        pytest.param([{**GROUP, "eps": 1e-8}], id="a keyword more"),
        pytest.param([{**GROUP, "lr": (0.1,)}], id="a list for a number"),
        pytest.param([{**GROUP, "betas": 0.9}], id="a number for a list"),
        pytest.param([{**GROUP, "betas": (0.9,)}], id="a shorter list"),
        pytest.param([{**GROUP, "amsgrad": 0.0}], id="a number for a bool"),
        pytest.param([{**GROUP, "lr": True}], id="a bool for a number"),
    ],
)
def test_other_groups_keywords_or_types_are_not(given: list[Hyperparameters]) -> None:
    assert not same_kind([GROUP], given)


# -- Kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("dtype", FLOATS)
def test_fused_kernels_are_chosen_where_torch_has_them_except_for_sgd_in_half_precision(
    name: str, dtype: torch.dtype
) -> None:
    local = local_hyperparameters(name, {"lr": 0.1}, [torch.ones(4, dtype=dtype)])
    if name not in FUSED:
        assert local == {"lr": 0.1}
    else:
        assert local == {"lr": 0.1, "fused": name != "SGD" or dtype not in HALF}


@pytest.mark.parametrize(
    ("chosen", "fused"),
    [
        ({}, True),
        ({"fused": True}, True),
        ({"fused": False}, False),
        ({"foreach": True}, False),
        ({"foreach": False}, False),
        ({"foreach": False, "fused": True}, True),
    ],
)
def test_what_the_user_chose_counts(chosen: Mapping[str, bool], fused: bool) -> None:
    local = local_hyperparameters("Adam", {"lr": 0.1, **chosen}, [torch.ones(4)])
    assert local["fused"] is fused


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("chosen", [{}, {"fused": True}])
def test_fused_sgd_in_half_precision_is_not_used_even_when_the_user_chose_it(
    dtype: torch.dtype, chosen: Mapping[str, bool]
) -> None:
    tensors = [torch.ones(4), torch.ones(4, dtype=dtype)]
    assert local_hyperparameters("SGD", {"lr": 0.1, **chosen}, tensors)["fused"] is False


def test_on_another_device_the_choice_is_torchs() -> None:
    elsewhere = torch.ones(4, device="meta")
    assert local_hyperparameters("SGD", {"lr": 0.1}, [elsewhere]) == {"lr": 0.1}


def one_step(name: str, dtype: torch.dtype, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Parameters before and after one step with a gradient of 1 everywhere."""
    parameter = torch.linspace(-1, 1, 1000).to(dtype)
    before = parameter.clone()
    parameter.grad = torch.ones_like(parameter)
    kind: Any = OPTIMIZERS[name]
    kind([parameter], lr=0.5, fused=fused).step()
    return before, parameter


@pytest.mark.parametrize("dtype", HALF)
def test_torchs_fused_sgd_leaves_most_elements_of_half_precision_unchanged(
    dtype: torch.dtype,
) -> None:
    # Why fused SGD is not used there. When torch has repaired it this fails: then use it again.
    before, fused = one_step("SGD", dtype, fused=True)
    _, plain = one_step("SGD", dtype, fused=False)
    assert (fused == before).float().mean() > 0.9
    assert torch.equal(plain, before - 0.5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", sorted(FUSED))
def test_the_kernel_that_is_chosen_moves_every_element_as_the_plain_one_does(
    name: str, dtype: torch.dtype
) -> None:
    chosen = local_hyperparameters(name, {"lr": 0.5}, [torch.ones(4, dtype=dtype)])["fused"]
    before, parameter = one_step(name, dtype, fused=bool(chosen))
    # The first step is lr times the gradient's sign, or its value: 0.5 for a gradient of 1.
    # (AdamW also decays by lr * 0.01 * parameter.)
    decay = 0.005 * before.double() if name == "AdamW" else 0.0
    expected = before.double() - decay - 0.5
    rounding = 4 * torch.finfo(dtype).eps
    assert (parameter.double() - expected).abs().max() <= max(rounding, 2e-8)


# -- Building --------------------------------------------------------------------------------------


def test_an_optimizer_is_built_over_the_given_tensors_with_the_hyperparameters_of_their_group() -> (
    None
):
    spec = OptimizerSpec("Adam", ({"lr": 0.1}, {"lr": 0.2, "betas": (0.5, 0.6)}))
    first, second, third = torch.ones(1), torch.ones(2), torch.ones(3)
    optimizer = build(spec, [(1, [first]), (0, [second, third])])
    assert type(optimizer) is torch.optim.Adam
    one, two = optimizer.param_groups
    assert (one["params"][0] is first, one["lr"], one["betas"]) == (True, 0.2, (0.5, 0.6))
    assert ([p.numel() for p in two["params"]], two["lr"]) == ([2, 3], 0.1)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_what_is_read_from_an_optimizer_builds_an_equal_one(name: str) -> None:
    optimizer = OPTIMIZERS[name](parameters())  # type: ignore[call-arg]  # every class takes them alone
    spec = describe(optimizer)
    again = build(spec, [(0, parameters())])
    fused = {"fused": True} if name in FUSED else {}
    assert read_groups(again) == ({**spec.groups[0], **fused},)
