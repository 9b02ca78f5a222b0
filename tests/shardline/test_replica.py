"""The workers of one replica, in threads, with a real store and real process groups."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import pytest
import torch

from allreduce.store import Keeper
from ps_core.errors import EvictedError, JoinTimeoutError
from ps_core.listening import listen
from ps_core.settings import (
    AllReduceConfig,
    ClusterConfig,
    Config,
    MembershipConfig,
    PipelineConfig,
)
from shardline.replica import StageOfReplica
from tests.allreduce.together import outcomes, together

CPU = torch.device("cpu")
T = TypeVar("T")


@contextmanager
def stages(
    replica: int = 0, count: int = 2, *, timeout_seconds: float = 60, join_seconds: float = 60
) -> Iterator[list[StageOfReplica]]:
    """Those of one of two replicas; they are not connected yet."""
    keeper = Keeper(listen("127.0.0.1:0"))
    config = Config(
        cluster=ClusterConfig(num_workers=2 * count, rendezvous=f"127.0.0.1:{keeper.port}"),
        pipeline=PipelineConfig(stages=count),
        allreduce=AllReduceConfig(timeout_seconds=timeout_seconds),
        membership=MembershipConfig(join_timeout_seconds=join_seconds),
    )
    made = [
        StageOfReplica(replace(config, cluster=replace(config.cluster, rank=rank)), CPU)
        for rank in range(replica * count, (replica + 1) * count)
    ]
    with ExitStack() as stack:
        for each in made:
            stack.callback(partial(each.close, well=False))
        yield made


def all_do(workers: list[StageOfReplica], act: Callable[[StageOfReplica], T]) -> list[T]:
    return together(*(partial(act, each) for each in workers))


def talk(own: StageOfReplica) -> tuple[bytes, bytes, list[list[float]], torch.Tensor]:
    own.connect()
    heard = own.share(f"from {own.stage}".encode())
    nothing = own.share(b"")
    rows = own.gather([float(own.stage), 0.5])
    tensor = torch.full((2, 3), own.stage, dtype=torch.bfloat16)
    fetched = own.fetch(tensor, own.num_stages - 1)
    return heard, nothing, rows, fetched


@pytest.mark.parametrize(("replica", "count"), [(0, 2), (1, 3)])
def test_stages_hear_the_first_one_and_know_each_others_numbers_and_tensors(
    replica: int, count: int
) -> None:
    with stages(replica, count) as workers:
        assert [(each.index, each.stage) for each in workers] == [
            (replica, stage) for stage in range(count)
        ]
        for heard, nothing, rows, fetched in all_do(workers, talk):
            assert (heard, nothing) == (b"from 0", b"")
            assert rows == [[float(stage), 0.5] for stage in range(count)]
            assert fetched.dtype is torch.bfloat16
            assert torch.equal(fetched, torch.full((2, 3), count - 1, dtype=torch.bfloat16))


def test_a_scalar_and_a_transposed_tensor_arrive_as_they_are() -> None:
    def act(own: StageOfReplica) -> tuple[torch.Tensor, torch.Tensor]:
        own.connect()
        scalar = torch.tensor(7 if own.stage else 0)
        matrix = torch.arange(6.0).view(2, 3).T * own.stage
        return own.fetch(scalar, 1), own.fetch(matrix, 1)

    with stages() as workers:
        for scalar, matrix in all_do(workers, act):
            assert scalar.item() == 7
            assert torch.equal(matrix, torch.arange(6.0).view(2, 3).T)


def test_who_leaves_in_a_hurry_is_noticed_at_once() -> None:
    def act(own: StageOfReplica) -> None:
        own.connect()
        if own.stage:
            own.close(well=False)
        else:
            own.gather([1.0])

    with stages() as workers:
        first, second = outcomes(*(partial(act, each) for each in workers))
    assert isinstance(first, EvictedError)
    assert "another worker of this replica of the model is gone" in str(first)
    assert "all of them start again together" in str(first)
    assert second is None


def test_who_is_silent_is_waited_for_within_bounds() -> None:
    def act(own: StageOfReplica) -> None:
        own.connect()
        if own.stage:
            own.share(b"")

    with stages(timeout_seconds=1) as workers:
        first, second = outcomes(*(partial(act, each) for each in workers))
    assert first is None
    assert isinstance(second, EvictedError)


def test_who_does_not_come_is_waited_for_within_bounds_and_named() -> None:
    before = set(threading.enumerate())
    with (
        stages(replica=1, join_seconds=0.2) as (first, _),
        pytest.raises(JoinTimeoutError, match="workers 3 have not come"),
    ):
        first.connect()
    assert set(threading.enumerate()) == before, "it has left, though it was not connected yet"


def test_a_replica_that_starts_again_meets_anew() -> None:
    with stages() as workers:
        all_do(workers, lambda own: own.connect())
        for each in workers:
            each.close(well=False)
            each.close(well=False)
        for heard, *_ in all_do(workers, talk):
            assert heard == b"from 0"
