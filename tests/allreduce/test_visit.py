"""A job's rendezvous, kept by a launcher and seen by somebody from outside."""

from __future__ import annotations

import pytest

from allreduce.rendezvous import Rendezvous
from allreduce.store import Keeper
from allreduce.visit import Visit
from ps_core.config import load
from ps_core.errors import (
    JobFailedError,
    JobOverError,
    MismatchError,
    ShardUnreachableError,
)
from ps_core.listening import listen
from tests.allreduce.together import together, wait_until
from tests.processes import free_ports


@pytest.fixture
def keeper() -> Keeper:
    return Keeper(listen("127.0.0.1:0"))


def visit(keeper: Keeper) -> Visit:
    return Visit(f"127.0.0.1:{keeper.port}", timeout_seconds=10)


def members(keeper: Keeper, num_workers: int) -> list[Rendezvous]:
    """Of the first generation; the caller closes them."""
    made = []
    for rank in range(num_workers):
        keys = {
            "CLUSTER_RENDEZVOUS": f"127.0.0.1:{keeper.port}",
            "CLUSTER_RANK": rank,
            "CLUSTER_NUM_WORKERS": num_workers,
            "MEMBERSHIP_HEARTBEAT_SECONDS": 0.05,
        }
        environ = {f"SHARDLINE_{key}": str(value) for key, value in keys.items()}
        made.append(Rendezvous(load(environ=environ), "cpu", incarnation=rank + 1))
    together(*(each.meet for each in made))
    return made


def test_the_settings_are_those_that_were_published(keeper: Keeper) -> None:
    settings = {"SHARDLINE_JOB_ID": "a=b", "SHARDLINE_JOB_SEED": "7"}
    keeper.publish(settings)
    assert visit(keeper).settings() == settings


def test_a_store_without_settings_is_not_one_to_join(keeper: Keeper) -> None:
    with pytest.raises(MismatchError, match=f"127.0.0.1:{keeper.port} is no rendezvous"):
        visit(keeper).settings()


def test_a_job_that_has_failed_or_is_complete_cannot_be_joined(keeper: Keeper) -> None:
    (member,) = members(keeper, 1)
    assert not keeper.has_failed
    member.finish()
    with pytest.raises(JobOverError, match="nothing to join any more"):
        visit(keeper).settings()
    member.fail("worker 0: the disk is full")
    with pytest.raises(JobFailedError, match="worker 0: the disk is full"):
        visit(keeper).settings()
    assert keeper.has_failed
    member.close()


def test_the_newest_members_are_seen_with_their_versions(keeper: Keeper) -> None:
    guest = visit(keeper)
    assert guest.workers() == (0, [])
    first, second = members(keeper, 2)
    first.version, second.version = 8, 7
    wait_until(lambda: [each.version for each in guest.workers()[1]] == [8, 7], "they beat")
    generation, seen = guest.workers()
    assert generation == 1
    assert [each.member for each in seen] == [first.me, second.me]
    second.close()
    keeper.ended(1, second.me.pid)
    together(first.meet)
    generation, seen = guest.workers()
    assert (generation, [each.member.rank for each in seen]) == (2, [0])
    first.close()


def test_ranks_are_reserved_once_and_not_those_of_members(keeper: Keeper) -> None:
    both = members(keeper, 2)
    assert [visit(keeper).reserve(1, 3) for _ in range(2)] == [2, 3]
    with pytest.raises(MismatchError, match="--workers 1:6"):
        visit(keeper).reserve(1, 3)
    for each in both:
        each.close()


def test_a_port_where_nobody_keeps_a_rendezvous_is_an_error() -> None:
    (port,) = free_ports(1)
    with pytest.raises(ShardUnreachableError, match=f"no rendezvous answers at 127.0.0.1:{port}"):
        Visit(f"127.0.0.1:{port}", timeout_seconds=1)
