"""What only a sharded optimizer does; the rest is in test_whole.py."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from allreduce.group import Group
from allreduce.sharded import ShardedUpdater
from ps_core.optim_spec import OPTIMIZERS, SCALAR_STATE
from tests.allreduce.replicas import Alone, Member, spec_of
from tests.allreduce.together import in_group
from tests.reference import MIXED, assert_close, concatenated, shares

SIZES = [3, 1, 2]


def train(member: Member, index: int, num_steps: int) -> None:
    for step in range(num_steps):
        member.step(shares(SIZES, step)[index], SIZES[index] / sum(SIZES))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_comes_to_what_one_process_comes_to(name: str) -> None:
    alone = Alone(name)
    for step in range(4):
        alone.step(concatenated(shares(SIZES, step)))

    def act(group: Group) -> dict[str, Tensor]:
        member = Member("ZeRO-1", group, spec_of(name))
        train(member, group.index, 4)
        return member.parameters() | member.named(member.replica.gather_state())

    for result in in_group(3, act):
        expected = alone.parameters() | alone.state()
        assert_close(result, {name: expected[name] for name in result}, 1e-12, name)
        tensors = {name for name, value in alone.state().items() if value.dim()}
        assert tensors <= result.keys()


def own_elements(member: Member) -> int:
    """Of the optimizer's state on one worker."""
    replica = cast(ShardedUpdater, member.replica)
    return sum(
        tensor.numel()
        for _, _, optimizer in replica._own
        for _, key, tensor in optimizer.read_state()
        if key not in SCALAR_STATE
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_worker_has_its_share_of_the_state_only(size: int) -> None:
    def act(group: Group) -> tuple[int, int]:
        member = Member("ZeRO-1", group, spec_of("AdamW"), bucket_bytes=2**20)
        member.step(shares([2] * size, 0)[group.index], 1 / size)
        return own_elements(member), sum(p.numel() for p in member.model.parameters())

    results = in_group(size, act)
    num_parameters = results[0][1]
    owned = [own for own, _ in results]
    assert sum(owned) == 2 * num_parameters, "every element's two entries are somewhere, once"
    # Two buckets are cut at multiples of 64 elements.
    assert max(owned) <= 2 * (num_parameters / size + 2 * 64)


def test_a_bucket_may_be_too_small_for_all() -> None:
    alone = Alone("AdamW")
    for step in range(3):
        alone.step(concatenated(shares([1] * 5, step)))

    def act(group: Group) -> dict[str, Tensor]:
        member = Member("ZeRO-1", group, spec_of("AdamW"), bucket_bytes=256)
        assert min(bucket.layout.length for bucket in member.buckets) == 64
        for step in range(3):
            member.step(shares([1] * 5, step)[group.index], 1 / 5)
        return member.parameters()

    for parameters in in_group(5, act):
        assert_close(parameters, alone.parameters(), 1e-12)


def test_the_norm_is_that_of_all_pieces_together() -> None:
    spec = spec_of("SGD", 0.01)

    def act(group: Group) -> dict[str, Tensor]:
        member = Member("ZeRO-1", group, spec)
        train(member, group.index, 1)
        return member.parameters()

    alone = Alone("SGD")
    before = alone.parameters()
    alone.step(concatenated(shares(SIZES, 0)), max_grad_norm=0.01)
    for parameters in in_group(3, act):
        assert_close(parameters, alone.parameters(), 1e-14)
        moved = [
            (before[name] - after) / (0.02 * (1 + (after.dim() < 2)))
            for name, after in parameters.items()
        ]
        norm = torch.stack([each.square().sum() for each in moved]).sum().sqrt()
        assert float(norm) == pytest.approx(0.01, rel=1e-3), "it was clipped"


def test_every_element_type_is_trained() -> None:
    def act(group: Group) -> dict[str, Tensor]:
        member = Member("ZeRO-1", group, spec_of("AdamW"), dtype=MIXED)
        train(member, group.index, 3)
        return member.parameters()

    alone: Any = Alone("AdamW", MIXED)
    for step in range(3):
        alone.step(concatenated(shares(SIZES, step)))
    results = in_group(3, act)
    for parameters in results:
        assert_close(parameters, alone.parameters(), 0.02)
        assert_close(parameters, results[0], 0)


def test_the_parameters_are_the_same_bits_everywhere_after_every_step() -> None:
    def act(group: Group) -> list[dict[str, Tensor]]:
        member = Member("ZeRO-1", group, spec_of("AdamW"), dtype="float32")
        seen = []
        for step in range(5):
            member.step(shares(SIZES, step)[group.index], SIZES[group.index] / sum(SIZES))
            seen.append(member.parameters())
        return seen

    first, *others = in_group(3, act)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert_close(theirs, mine, 0)


def test_the_state_begins_anew_with_another_group() -> None:
    def act(group: Group) -> None:
        member = Member("ZeRO-1", group, spec_of("AdamW"))
        train(member, group.index, 1)
        assert own_elements(member) > 0
        member.replica.connect(group)
        assert not any(member.replica.gather_state().values())

    in_group(3, act)
