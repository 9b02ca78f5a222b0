import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from pipeline.group import as_default, connect, disconnect
from ps_core.errors import JobFailedError, UsageError
from tests.pipeline.worker import Place, run, workers


def _open() -> tuple[int, list[str]]:
    """Threads, and sockets and what else is open without being a file."""
    links = []
    for entry in os.scandir("/proc/self/fd"):
        try:
            links.append(Path(entry.path).readlink().name.split(":")[0])
        except OSError:  # the descriptor of this very listing
            continue
    kinds = [link for link in links if link in ("socket", "anon_inode")]
    return len(list(Path("/proc/self/task").iterdir())), sorted(kinds)


def _exchange(group: dist.ProcessGroup) -> None:
    """Each worker sends its rank to the next and takes that of the one before."""
    rank, size = group.rank(), group.size()
    taken = torch.zeros(2, dtype=torch.int64)
    receiving = group.recv([taken], (rank - 1) % size, 0)
    group.send([torch.full((2,), rank)], (rank + 1) % size, 0).wait()
    receiving.wait()
    assert taken.tolist() == [(rank - 1) % size] * 2


def meet_again_and_again(place: Place) -> None:
    disconnect(place.connect("once"))  # torch starts what it keeps for ever
    before = _open()
    for meeting in range(3):
        group = place.connect(f"meeting {meeting}")
        assert (group.rank(), group.size()) == (place.rank, place.size)
        assert _open() > before
        _exchange(group)
        disconnect(group)
        assert _open() == before, "the group is still referred to, yet gone"
        disconnect(group)
        with pytest.raises(UsageError, match="disconnected: connect again"):
            group.send([torch.ones(1)], 0, 0)


def test_workers_can_meet_again_and_leave_nothing_behind() -> None:
    run(meet_again_and_again, size=2)


def beside_the_users_group(place: Place) -> None:
    store = PrefixStore("user", place.store)
    dist.init_process_group("gloo", store=store, rank=1 - place.rank, world_size=2)
    group = place.connect()
    _exchange(group)
    with as_default(group):
        assert dist.get_rank() == place.rank
    assert dist.get_rank() == 1 - place.rank
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    assert total == 1
    disconnect(group)
    dist.barrier()
    dist.destroy_process_group()
    assert not dist.is_initialized()
    group = place.connect("later")
    _exchange(group)
    assert not dist.is_initialized()
    disconnect(group)


def test_a_group_lives_beside_the_users_own_and_without_one() -> None:
    run(beside_the_users_group, size=2)


def leave_before_the_other(place: Place) -> None:
    group = place.connect()
    if place.rank == 1:  # as one whose last message is still on its way
        with pytest.raises(RuntimeError, match="timeout"):
            place.store.wait(["0 has left"], timedelta(seconds=0.5))
    disconnect(group)
    place.store.set(f"{place.rank} has left", "")


def test_nobody_closes_a_connection_that_the_other_end_still_uses() -> None:
    run(leave_before_the_other, size=2)


def leave_after_the_other_has_died(place: Place) -> None:
    group = place.connect()
    if place.rank == 1:
        os._exit(5)
    began = time.monotonic()
    disconnect(group)
    assert time.monotonic() - began < 30


def test_leaving_does_not_wait_for_the_dead() -> None:
    with workers(leave_after_the_other_has_died, size=2) as processes:
        assert [process.wait() for process in processes] == [0, 5]


def test_a_worker_that_never_comes_is_an_error_within_the_timeout() -> None:
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=300)
    )
    before = _open()
    began = time.monotonic()
    with pytest.raises(JobFailedError, match="worker 0 of the pipeline did not meet the other 2"):
        connect(store, 0, 3, backend="gloo", timeout_seconds=0.5, prefix="p", host="127.0.0.1")
    assert time.monotonic() - began < 60
    assert _open() == before


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="no backend 'mpi': give one of gloo, nccl"):
        connect(HashStore(), 0, 1, backend="mpi", timeout_seconds=1, prefix="p")


def test_the_address_is_the_machines_own_when_none_is_given() -> None:
    group = connect(HashStore(), 0, 1, backend="gloo", timeout_seconds=5, prefix="p")
    assert (group.rank(), group.size()) == (0, 1)
    disconnect(group)


def test_the_default_group_comes_back_after_an_error() -> None:
    group = connect(HashStore(), 0, 1, backend="gloo", timeout_seconds=5, prefix="p")
    with pytest.raises(KeyError), as_default(group):  # noqa: PT012 - the error is what it is about
        assert dist.is_initialized()
        raise KeyError
    assert not dist.is_initialized()
    disconnect(group)
