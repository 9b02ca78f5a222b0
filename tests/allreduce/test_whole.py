"""What both kinds of replicas keep: each test runs with the whole and with the sharded optimizer,
and plain torch says what must come out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from allreduce.group import Group, PeerLostError
from ps_core.optim_spec import OptimizerSpec
from tests.allreduce.replicas import KINDS, Alone, Member, gradients, net, spec_of
from tests.allreduce.together import PATIENCE_SECONDS, groups, in_group, outcomes, together
from tests.reference import assert_close, concatenated, shares

SIZES = [5, 2, 4]
"""Samples of each worker."""
WEIGHTS = [size / sum(SIZES) for size in SIZES]
TOLERANCE = 1e-12
ADAMW: dict[str, Any] = {"weight_decay": 0.1}
pytestmark = pytest.mark.parametrize("kind", KINDS)


def trained(kind: str, spec: OptimizerSpec, num_steps: int = 4) -> list[dict[str, Tensor]]:
    """Every worker's parameters."""

    def act(group: Group) -> dict[str, Tensor]:
        member = Member(kind, group, spec)
        for step in range(num_steps):
            member.step(shares(SIZES, step)[group.index], WEIGHTS[group.index])
        return member.parameters()

    return in_group(len(SIZES), act)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05, 1000.0])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad"])
def test_an_update_is_that_of_one_process_with_all_samples(
    kind: str, name: str, max_grad_norm: float | None
) -> None:
    alone = Alone(name)
    for step in range(4):
        alone.step(concatenated(shares(SIZES, step)), max_grad_norm=max_grad_norm)
    for parameters in trained(kind, spec_of(name, max_grad_norm)):
        assert_close(parameters, alone.parameters(), TOLERANCE)


def test_who_has_nothing_to_add_takes_the_others_update(kind: str) -> None:
    alone = Alone("AdamW", **ADAMW)
    for step in range(3):
        alone.step(concatenated([shares(SIZES, step)[i] for i in (0, 2)]), without={"scale"})

    def act(group: Group) -> dict[str, Tensor]:
        member = Member(kind, group, spec_of("AdamW", **ADAMW))
        for step in range(3):
            if group.index == 1:
                for bucket in member.buckets:  # what another step has left there
                    bucket.gradients.fill_(float("nan"))
                    bucket.present = [True] * len(bucket.present)
                member.step(None, 0.0)
            else:
                batch = shares(SIZES, step)[group.index]
                member.step(batch, SIZES[group.index] / 9, without={"scale"})
        return member.parameters()

    for parameters in in_group(3, act):
        assert_close(parameters, alone.parameters(), TOLERANCE)


ABSENT = [
    [{"first.weight", "scale"}, set(), {"first.weight"}],
    [{"first.weight", "scale"}] * 3,
    [{"norm.weight"}, {"third.bias"}, {"second.weight"}],
]


@pytest.mark.parametrize("absent", ABSENT, ids=["on some", "on all", "on each another"])
def test_parameters_without_gradients_are_treated_as_torch_does(
    kind: str, absent: list[set[str]]
) -> None:
    """AdamW would decay what has a gradient of zero, and leaves alone what has none."""
    alone = Alone("AdamW", **ADAMW)
    for step in range(4):
        lacking = absent if step % 2 else [set()] * 3
        batches = shares(SIZES, step)
        each = [gradients(alone.model, batch, lacking[i]) for i, batch in enumerate(batches)]
        alone.set_gradients({name: _mean([g[name] for g in each]) for name in each[0]})

    def act(group: Group) -> dict[str, Tensor]:
        member = Member(kind, group, spec_of("AdamW", **ADAMW))
        for step in range(4):
            lacking = absent[group.index] if step % 2 else set()
            member.step(shares(SIZES, step)[group.index], WEIGHTS[group.index], lacking)
        return member.parameters() | member.named(member.replica.gather_state())

    for result in in_group(3, act):
        assert_close(result, alone.parameters() | alone.state(), TOLERANCE)


def _mean(each: list[Tensor | None]) -> Tensor | None:
    present = [(g, w) for g, w in zip(each, WEIGHTS, strict=True) if g is not None]
    return sum((g * w for g, w in present[1:]), present[0][0] * present[0][1]) if present else None


def test_a_parameter_that_never_has_a_gradient_has_no_state(kind: str) -> None:
    def act(group: Group) -> None:
        member = Member(kind, group, spec_of("Adam"))
        member.step(shares([2, 2], 0)[group.index], 0.5, {"scale", "second.weight"})
        state = member.replica.gather_state()
        empty = {member.names[index] for index, entries in state.items() if not entries}
        assert empty == {"scale", "second.weight"}
        before = member.parameters()
        member.replica.write_state(state)
        member.step(shares([2, 2], 1)[group.index], 0.5, {"scale", "second.weight"})
        for name in empty:
            assert torch.equal(member.parameters()[name], before[name])

    in_group(2, act)


def test_the_hyperparameters_are_those_of_the_step(kind: str) -> None:
    alone = Alone("SGD", momentum=0.5)
    for step in range(3):
        for index, group in enumerate(alone.optimizer.param_groups):
            group["lr"] = 0.1 / (1 + step + index)
        alone.step(concatenated(shares(SIZES, step)))

    def act(group: Group) -> dict[str, Tensor]:
        member = Member(kind, group, spec_of("SGD", momentum=0.5))
        for step in range(3):
            member.hyperparameters = [
                {**each, "lr": 0.1 / (1 + step + index)}
                for index, each in enumerate(member.hyperparameters)
            ]
            member.step(shares(SIZES, step)[group.index], WEIGHTS[group.index])
        return member.parameters()

    for parameters in in_group(3, act):
        assert_close(parameters, alone.parameters(), TOLERANCE)


# -- Narrow wires ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wire_dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_wire_rounds_gradients_and_nothing_else(
    kind: str, wire_dtype: torch.dtype
) -> None:
    start, alone = net("float32"), Alone("SGD", "float32")
    alone.step(concatenated(shares(SIZES, 0)))
    exact = alone.parameters()

    def act(group: Group) -> dict[str, Tensor]:
        member = Member(kind, group, spec_of("SGD"), dtype="float32", wire_dtype=wire_dtype)
        member.step(shares(SIZES, 0)[group.index], WEIGHTS[group.index])
        return member.parameters()

    results = in_group(3, act)
    is_exact = True
    for name, before in start.named_parameters():
        batches = zip(shares(SIZES, 0), WEIGHTS, strict=True)
        parts = [(gradients(start, batch)[name], weight) for batch, weight in batches]
        lr = 0.02 * (1 + (before.dim() < 2))
        size = sum(g.abs() * w for g, w in parts if g is not None)
        bound = lr * 3 * torch.finfo(wire_dtype).eps * size + 1e-6
        for result in results:
            assert result[name].dtype == torch.float32
            assert ((result[name] - exact[name]).abs() <= bound).all(), name
            assert torch.equal(result[name], results[0][name]), "all have the same parameters"
            is_exact = is_exact and torch.equal(result[name], exact[name])
    assert not is_exact, "it was narrow"


def test_large_gradients_do_not_overflow_a_narrow_wire(kind: str) -> None:
    def act(group: Group) -> None:
        member = Member(kind, group, spec_of("SGD"), dtype="float32", wire_dtype=torch.float16)
        for bucket in member.buckets:
            bucket.gradients.fill_(60_000.0)
            bucket.present = [True] * len(bucket.present)
            member.replica.issue(bucket, 0.25)
        before = member.parameters()
        member.hyperparameters = [{**each, "lr": 1.0} for each in member.hyperparameters]
        member.finish()
        for name, after in member.parameters().items():
            assert (before[name] - after - 60_000.0).abs().max() < 32, name

    in_group(4, act)


# -- State -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_state_is_that_of_one_process_and_can_be_put_back(kind: str, name: str) -> None:
    options = {"momentum": 0.9} if name == "SGD" else ADAMW
    alone = Alone(name, **options)
    for step in range(3):
        alone.step(concatenated(shares(SIZES, step)))
    expected = alone.state()
    assert expected

    def act(group: Group) -> dict[str, Tensor]:
        member = Member(kind, group, spec_of(name, **options))
        for step in range(3):
            member.step(shares(SIZES, step)[group.index], WEIGHTS[group.index])
        gathered = member.replica.gather_state()
        assert_close(member.named(gathered), expected, TOLERANCE)
        values = member.parameters()

        member.step(shares(SIZES, 3)[group.index], WEIGHTS[group.index])
        after = member.parameters()
        assert_close(member.named(gathered), expected, TOLERANCE, "they are copies")
        _put_back(member, values)
        member.replica.write_state(gathered)
        assert_close(member.named(member.replica.gather_state()), expected, TOLERANCE)
        member.step(shares(SIZES, 3)[group.index], WEIGHTS[group.index])
        assert_close(member.parameters(), after, 0, "as if it had not been taken before")
        assert_close(member.named(gathered), expected, TOLERANCE, "they were copied")
        return after

    alone.step(concatenated(shares(SIZES, 3)))
    for result in in_group(3, act):
        assert_close(result, alone.parameters(), TOLERANCE)


def _put_back(member: Member, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in member.model.named_parameters():
            parameter.copy_(values[name])


def test_training_goes_on_in_a_group_of_another_size(kind: str) -> None:
    alone = Alone("AdamW", **ADAMW)
    for step in range(4):
        alone.step(concatenated(shares(SIZES, step)))

    def before(group: Group) -> tuple[Member, dict[int, dict[str, Tensor]]]:
        member = Member(kind, group, spec_of("AdamW", **ADAMW))
        for step in range(2):
            member.step(shares(SIZES, step)[group.index], WEIGHTS[group.index])
        state = member.replica.gather_state()
        return member, {index: dict(entries) for index, entries in state.items()}

    def after(group: Group) -> dict[str, Tensor]:
        member, state = members[group.index]
        member.replica.connect(group)
        member.replica.write_state(state)
        for step in range(2, 4):
            first, second, third = shares(SIZES, step)
            batch = concatenated([second, third]) if group.index else first
            member.step(batch, len(batch[0]) / sum(SIZES))
        return member.parameters()

    members = in_group(3, before)
    for parameters in in_group(2, after):
        assert_close(parameters, alone.parameters(), TOLERANCE)


# -- A peer that is lost ---------------------------------------------------------------------------


def test_a_round_that_loses_a_peer_changes_nothing_and_another_may_follow(kind: str) -> None:
    spec = spec_of("AdamW", **ADAMW)
    batches = shares([3, 4], 1)

    def start(group: Group) -> Member:
        member = Member(kind, group, spec)
        member.step(shares(SIZES, 0)[group.index], WEIGHTS[group.index])
        return member

    def lose(member: Member, index: int) -> dict[str, Tensor]:
        before = member.parameters()
        with pytest.raises(PeerLostError):
            member.step(batches[index], 0.4)
        assert_close(member.parameters(), before, 0)
        return before

    def again(group: Group) -> dict[str, Tensor]:
        member = members[group.index]
        member.replica.connect(group)
        if kind == "ZeRO-1":  # its share of the state is gone
            member.replica.write_state({})
        member.step(batches[group.index], [3 / 7, 4 / 7][group.index])
        return member.parameters()

    with groups(3, timeout_seconds=10 * PATIENCE_SECONDS) as crowd:
        members = together(*(partial(start, group) for group in crowd))
        crowd[2].close()
        calls: list[Callable[[], object]] = [partial(lose, members[i], i) for i in (0, 1)]
        assert not [each for each in outcomes(*calls) if isinstance(each, BaseException)]
    alone = Alone("AdamW", **ADAMW)
    alone.step(concatenated(shares(SIZES, 0)))
    if kind == "ZeRO-1":
        alone.optimizer.state.clear()
    alone.step(concatenated(batches))
    for parameters in in_group(2, again):
        assert_close(parameters, alone.parameters(), TOLERANCE)
