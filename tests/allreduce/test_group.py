"""Groups over real Gloo, their members in threads of one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # it exports it without a list

from allreduce.group import Group, PeerLostError, Wiring, own_address
from tests.allreduce.together import (
    Worker,
    groups,
    in_group,
    num_threads_and_sockets,
    outcomes,
    together,
    wait_until,
)

SOON_SECONDS = 10.0
"""Far less than the timeout of a group, and plenty on a busy machine."""


# -- What members tell each other ------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_of_any_length_come_to_everybody(length: int, size: int) -> None:
    rows = [[float(length), *(index + n / 7 for n in range(length - 1))] for index in range(size)]
    for heard in in_group(size, lambda group: group.gather(rows[group.index]).wait()):
        assert [row[:length] for row in heard] == rows


def test_one_long_row_is_enough_for_all_to_gather_again() -> None:
    lengths = [3, 200, 64]

    def say(group: Group) -> list[list[float]]:
        group.gather([1.0]).wait()
        length = lengths[group.index]
        return group.gather([float(length)] * length).wait()

    for heard in in_group(3, say):
        assert [row[: int(row[0])] for row in heard] == [[float(n)] * n for n in lengths]


def test_a_gathering_is_done_once_all_have_said_something() -> None:
    with groups(2) as (first, second):
        gathering = first.gather([1.0])
        assert not gathering.is_done()
        answer = second.gather([1.0])
        wait_until(gathering.is_done, "all have said something")
        assert gathering.wait() == answer.wait()


# -- Tensors ---------------------------------------------------------------------------------------


def own(group: Group, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(1, 6, dtype=dtype) * (group.index + 1)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32]
)
def test_tensors_are_added_up_in_place(dtype: torch.dtype) -> None:
    def act(group: Group) -> torch.Tensor:
        tensor = own(group, dtype)
        group.add_up(tensor).wait()
        return tensor

    for tensor in in_group(3, act):
        assert tensor.dtype == dtype
        assert tensor.tolist() == [6, 12, 18, 24, 30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_added_up_on_one_member(dtype: torch.dtype) -> None:
    def act(group: Group) -> torch.Tensor:
        tensor = own(group, dtype)
        group.add_up_on(tensor, 1).wait()
        return tensor

    assert in_group(3, act)[1].tolist() == [6, 12, 18, 24, 30]


def test_a_tensor_of_one_member_comes_to_all() -> None:
    def act(group: Group) -> torch.Tensor:
        tensor = own(group)
        group.broadcast(tensor, 2).wait()
        return tensor

    for tensor in in_group(3, act):
        assert tensor.tolist() == [3, 6, 9, 12, 15]


def test_a_slice_of_a_tensor_is_added_up_without_the_rest() -> None:
    def act(group: Group) -> torch.Tensor:
        tensor = own(group)
        group.add_up(tensor[1:3]).wait()
        return tensor

    first, second = in_group(2, act)
    assert first.tolist() == [1, 6, 9, 4, 5]
    assert second.tolist() == [2, 6, 9, 8, 10]


def test_many_collectives_may_be_on_their_way() -> None:
    def act(group: Group) -> list[float]:
        tensors = [torch.full((1000,), float(group.index + n)) for n in range(20)]
        pending = [group.add_up(tensor) for tensor in tensors]
        gathering = group.gather([2.0, group.index])
        for each in pending:
            each.wait()
        assert [row[1] for row in gathering.wait()] == [0, 1]
        return [float(tensor.mean()) for tensor in tensors]

    for sums in in_group(2, act):
        assert sums == [1.0 + 2 * n for n in range(20)]


def test_alone_everything_is_done_at_once() -> None:
    (tensor,) = in_group(1, lambda group: _alone(group))
    assert tensor.tolist() == [1, 2, 3, 4, 5]


def _alone(group: Group) -> torch.Tensor:
    tensor = own(group)
    for start in (group.add_up, group.add_up_everywhere):
        assert start(tensor).is_done()
    for begin in (group.add_up_on, group.broadcast, group.broadcast_everywhere):
        begin(tensor, 0).wait()
    assert group.gather([2.0, 5.0]).wait()[0][:2] == [2.0, 5.0]
    return tensor


# -- Stages ----------------------------------------------------------------------------------------


def test_members_of_one_stage_share_tensors_and_all_share_rows() -> None:
    def act(group: Group) -> tuple[list[int], list[float], list[float], list[float]]:
        assert (group.num_members, group.size) == (4, 2)
        me = group.sharing[group.index]
        summed, shared, norm, everywhere = (torch.tensor([10.0**me]) for _ in range(4))
        group.add_up(summed).wait()
        group.broadcast(shared, 1).wait()
        group.add_up_everywhere(norm).wait()
        group.broadcast_everywhere(everywhere, 2).wait()
        assert everywhere.tolist() == [100]
        heard = [row[1] for row in group.gather([2.0, me]).wait()]
        assert heard == [0, 1, 2, 3]
        return list(group.sharing), summed.tolist(), shared.tolist(), norm.tolist()

    results = in_group(4, act, num_stages=2)
    assert [each[0] for each in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [each[1] for each in results] == [[101], [1010], [101], [1010]]
    assert [each[2] for each in results] == [[100], [1000], [100], [1000]]
    assert [each[3] for each in results] == [[1111]] * 4


def test_the_stages_of_one_replica_share_nothing_but_rows_and_norms() -> None:
    def act(group: Group) -> tuple[list[float], list[float]]:
        assert (group.size, list(group.sharing)) == (1, [group.sharing.start])
        tensor, norm = torch.tensor([5.0]), torch.tensor([1.0])
        group.add_up(tensor).wait()
        group.add_up_everywhere(norm).wait()
        return tensor.tolist(), norm.tolist()

    assert in_group(2, act, num_stages=2) == [([5.0], [2.0])] * 2


# -- Peers that are gone ---------------------------------------------------------------------------


ACTS: dict[str, Callable[[Group], object]] = {
    "gather": lambda group: group.gather([1.0]).wait(),
    "add up": lambda group: group.add_up(torch.ones(100_000)).wait(),
    "add up on": lambda group: group.add_up_on(torch.ones(100_000), 0).wait(),
    "broadcast": lambda group: group.broadcast(torch.ones(100_000), 2).wait(),
}
AFTERWARDS = {"gather": "waiting for", "add up": "adding up", "broadcast": "sharing"}


@pytest.mark.parametrize("name", ["gather", "add up", "broadcast"])
def test_a_member_that_closes_is_noticed_at_once(name: str) -> None:
    with groups(3, timeout_seconds=60) as (first, second, third):
        waiting = [Worker(partial(ACTS[name], each)) for each in (first, second)]
        began = time.monotonic()
        third.close()
        errors = [each.outcome() for each in waiting]
        assert time.monotonic() - began < SOON_SECONDS
        for error in errors:
            assert isinstance(error, PeerLostError)
            assert str(error).startswith(f"while {AFTERWARDS[name]}")
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["gather", "add up"])
def test_who_is_not_next_to_the_lost_member_notices_when_its_neighbours_close(name: str) -> None:
    """Gloo's rings connect neighbours: so everybody closes, whatever else is on its way."""
    kept = []

    def act(group: Group) -> None:
        kept.extend([group.add_up(torch.ones(1000)) for _ in range(5)])
        lost = False
        try:
            ACTS[name](group)
        except PeerLostError:
            lost = True
        assert lost
        group.close()

    with groups(6, timeout_seconds=60) as members:
        waiting = [Worker(partial(act, member)) for member in members[:-1]]
        began = time.monotonic()
        members[-1].close()
        assert [each.outcome() for each in waiting] == [None] * 5
        assert time.monotonic() - began < SOON_SECONDS
    for pending in kept:
        with pytest.raises(PeerLostError):
            pending.wait()


@pytest.mark.parametrize("name", ["gather", "add up"])
def test_a_member_that_has_closed_before_is_noticed_at_once(name: str) -> None:
    with groups(3, timeout_seconds=60) as (first, second, third):
        third.close()
        began = time.monotonic()
        for error in outcomes(*(partial(ACTS[name], each) for each in (first, second))):
            assert isinstance(error, PeerLostError)
        assert time.monotonic() - began < SOON_SECONDS


@pytest.mark.parametrize("name", ["gather", "add up", "add up on"])
def test_a_silent_member_is_noticed_after_the_timeout(name: str) -> None:
    with groups(2, timeout_seconds=0.5) as (first, _):
        began = time.monotonic()
        with pytest.raises(PeerLostError):
            ACTS[name](first)
        assert 0.4 < time.monotonic() - began < SOON_SECONDS


def test_looking_whether_a_gathering_is_done_notices_a_loss_or_leaves_it_to_the_wait() -> None:
    with groups(2, timeout_seconds=60) as (first, second):
        gathering = first.gather([1.0])
        second.close()
        wait_until(partial(_is_over, gathering.is_done), "the loss is noticed")
        with pytest.raises(PeerLostError):
            gathering.wait()


def _is_over(is_done: Callable[[], bool]) -> bool:
    try:
        return is_done()
    except PeerLostError:
        return True


def test_a_member_that_never_comes_is_noticed_after_the_timeout() -> None:
    wiring = Wiring(HashStore(), 0, 2, 1, "127.0.0.1", uses_nccl=False, timeout_seconds=0.5)
    began = time.monotonic()
    with pytest.raises(PeerLostError, match="while connecting to the other workers"):
        Group(wiring)
    assert time.monotonic() - began < SOON_SECONDS


# -- The end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 2])
def test_nothing_is_left_of_a_closed_group(num_stages: int) -> None:
    def act(group: Group) -> None:
        group.gather([1.0]).wait()
        group.add_up(torch.ones(1000)).wait()
        group.add_up(torch.ones(1000))  # nobody waits for it

    in_group(4, act, num_stages)  # torch starts what it keeps for ever
    gc.collect()
    before = num_threads_and_sockets()
    with groups(4, num_stages) as members:
        connected = num_threads_and_sockets()
        assert all(now > then for now, then in zip(connected, before, strict=True))
        together(*(partial(act, member) for member in members))
        for member in members:
            member.close()
        wait_until(lambda: num_threads_and_sockets() == before, "nothing is left")


def test_closing_again_does_nothing() -> None:
    with groups(2) as members:
        for member in (*members, *members):
            member.close()


def test_a_group_leaves_the_scripts_own_groups_alone() -> None:
    with groups(2):
        assert not torch.distributed.is_initialized()


def test_the_own_address_is_the_one_towards_a_host() -> None:
    assert own_address("127.0.0.1", 1) == own_address("localhost", 1) == "127.0.0.1"
