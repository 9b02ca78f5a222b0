"""The workers of one replica of a model that is split: how they find and speak to each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from allreduce.group import Group, PeerLostError, Wiring
from allreduce.rendezvous import Rendezvous
from allreduce.sharing import share_bytes
from pipeline.group import PipelineGroup, connect, disconnect
from ps_core.errors import EvictedError
from ps_core.exchange import new_incarnation
from ps_core.settings import Config
from ps_core.tensors import plain


class StageOfReplica:
    """This worker among them. Implements ps_core.exchange.Replica."""

    def __init__(self, config: Config, device: torch.device) -> None:
        """Does not connect yet."""
        self.num_stages = config.pipeline.stages
        self.index, self.stage = divmod(config.cluster.rank, self.num_stages)
        self._config = config
        self._device = device
        self._rendezvous: Rendezvous | None = None
        self._channel: Group | None = None
        self._pipeline: PipelineGroup | None = None

    def connect(self) -> None:
        """Blocks until all are there, within bounds. Raises JoinTimeoutError, JobFailedError."""
        config, timeout = self._config, self._config.allreduce.timeout_seconds
        rendezvous = self._rendezvous = Rendezvous(
            config, self._device.type, new_incarnation(), self.index
        )
        rendezvous.meet()
        store, host = rendezvous.group_store(), rendezvous.own_host
        size = self.num_stages
        with _noticing():
            self._channel = Group(Wiring(store, self.stage, size, 1, host, False, timeout))
        self._pipeline = connect(
            store,
            self.stage,
            size,
            backend="nccl" if self._device.type == "cuda" else "gloo",
            timeout_seconds=timeout,
            prefix="pipeline",
            host=host,
        )

    def share(self, data: bytes) -> bytes:
        """See Replica."""
        with _noticing():
            return share_bytes(self._connected, 0, data)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """See Replica."""
        with _noticing():
            rows = self._connected.gather([1.0 + len(numbers), *numbers]).wait()
        return [row[1 : int(row[0])] for row in rows]

    def fetch(self, tensor: torch.Tensor, stage: int) -> torch.Tensor:
        """One stage's `tensor`, which has the same shape and type on all; on the host."""
        host = plain(tensor)
        with _noticing():
            flat = host.view(-1).view(torch.uint8)
            self._connected.broadcast(flat, stage).wait()
        return host

    def close(self, *, well: bool) -> None:
        """Leave, also in the middle of `connect`: well, when all do; otherwise the others notice at
        once. Idempotent.
        """
        pipeline, channel, rendezvous = self._pipeline, self._channel, self._rendezvous
        self._pipeline = self._channel = self._rendezvous = None
        if pipeline is not None and well:
            disconnect(pipeline)
        elif pipeline is not None:
            pipeline.abort()
        if channel is not None:
            channel.close()
        if rendezvous is not None:
            rendezvous.close()

    @property
    def group(self) -> PipelineGroup:
        """For the pipeline."""
        assert self._pipeline is not None, "connect comes first"
        return self._pipeline

    @property
    def rendezvous(self) -> Rendezvous:
        """Where they have met."""
        assert self._rendezvous is not None, "connect comes first"
        return self._rendezvous

    @property
    def _connected(self) -> Group:
        assert self._channel is not None, "connect comes first"
        return self._channel


@contextmanager
def _noticing() -> Iterator[None]:
    try:
        yield
    except PeerLostError as error:
        raise EvictedError(
            f"another worker of this replica of the model is gone ({error}): all of them start "
            "again together"
        ) from error
