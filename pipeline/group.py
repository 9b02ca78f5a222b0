"""The workers of one pipeline as a process group of torch that nobody else can see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, Work

from ps_core.errors import JobFailedError, UsageError

PipelineGroup = dist.ProcessGroup


class _GlooGroup(dist.ProcessGroup):
    """A group that frees its sockets and threads on `abort`, whoever still refers to it.

    Torch's own group does so only with the last reference to it.
    """

    def __init__(
        self, store: Store, rank: int, size: int, timeout: timedelta, host: str | None
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the way that can be subclassed
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in stubs
        options._timeout = timeout
        options._devices = [_gloo_device(host)]
        gloo: Any = dist.ProcessGroupGloo
        # Any: the stubs lack `send` and `recv`. None when disconnected.
        self._gloo: Any = gloo(store, rank, size, options)

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Work:
        work: Work = self._connected().send(tensors, dst, tag)
        return work

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Work:
        work: Work = self._connected().recv(tensors, src, tag)
        return work

    def barrier(self, opts: object = None) -> Work:
        work: Work = self._connected().barrier()
        return work

    def abort(self) -> None:
        self._gloo = None

    def _connected(self) -> Any:  # noqa: ANN401 - see `_gloo`
        if self._gloo is None:
            raise UsageError(
                "this pipeline is disconnected: connect again and build a new PipelineStep"
            )
        return self._gloo


def _gloo_device(host: str | None) -> dist.ProcessGroupGloo.Device:
    if host is None:
        return dist.ProcessGroupGloo.create_default_device()
    return dist.ProcessGroupGloo.create_device(hostname=host)


def _connect_nccl(
    store: Store, rank: int, size: int, timeout: timedelta, host: str | None
) -> dist.ProcessGroup:
    device = torch.device("cuda", torch.cuda.current_device())
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    backend = dist.ProcessGroupNCCL(store, rank, size, options)
    # The first batch of sends and receives between two workers must find all of them connected.
    backend.eager_connect_single_device(device)
    group = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
    group._register_backend(device, dist.ProcessGroup.BackendType.NCCL, backend)
    return group


_BACKENDS: Final[
    dict[str, Callable[[Store, int, int, timedelta, str | None], dist.ProcessGroup]]
] = {"gloo": _GlooGroup, "nccl": _connect_nccl}


def connect(
    store: Store,
    rank: int,
    size: int,
    *,
    backend: str,
    timeout_seconds: float,
    prefix: str,
    host: str | None = None,
) -> dist.ProcessGroup:
    """Meet the `size` workers of a pipeline in `store`; blocks until all are there.

    `backend` is "gloo" (CPU) or "nccl" (the current CUDA device). `prefix` names this meeting in
    the store: workers that meet again, in a rebuilt pipeline, give another one. With gloo `host` is
    an address of this machine that the others can reach, as torch finds it when None. A meeting,
    and later every send or receive, that takes longer than `timeout_seconds` is an error, here
    JobFailedError. The group is registered nowhere: `torch.distributed` may be in use, or not.
    Leave it with `disconnect`.
    """
    if backend not in _BACKENDS:
        raise UsageError(f"there is no backend {backend!r}: give one of {', '.join(_BACKENDS)}")
    timeout = timedelta(seconds=timeout_seconds)
    connection: Store = store.clone()  # type: ignore[attr-defined]  # not in stubs
    own = PrefixStore(prefix, connection)
    own.set_timeout(timeout)
    try:
        return _BACKENDS[backend](own, rank, size, timeout, host)
    except RuntimeError as error:
        raise JobFailedError(
            f"worker {rank} of the pipeline did not meet the other {size - 1} within "
            f"{timeout_seconds:g} s (allreduce.timeout_seconds): {error}"
        ) from error


def disconnect(group: dist.ProcessGroup) -> None:
    """Leave; no thread or socket of `group` is left. Does nothing when it has failed already.

    Blocks until all workers are here, one is gone, or the group's timeout is over: who closes a
    connection while the other end still waits for its last send to complete makes that fail.
    """
    with suppress(RuntimeError, UsageError):
        group.barrier().wait()
    group.abort()


@contextmanager
def as_default(group: dist.ProcessGroup) -> Iterator[None]:
    """Make `group` torch's default one inside: torch's pipelining asks for its ranks there.

    Other threads see it too: none may use the default group of `torch.distributed` meanwhile.
    """
    before = dist.GroupMember.WORLD
    dist.GroupMember.WORLD = group
    try:
        yield
    finally:
        dist.GroupMember.WORLD = before
