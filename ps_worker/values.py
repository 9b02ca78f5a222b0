"""Whole values to the shards and back: outside the steps, and in calls of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch

from ps_core import codec
from ps_core.buckets import Bucket
from ps_core.errors import MismatchError
from ps_core.exchange import ReadExtras
from ps_core.plan import Plan
from ps_core.v1 import shard_pb2
from ps_worker.client import ShardClient


class Values:
    """Initial parameters, and the extras of the chosen worker."""

    def __init__(
        self,
        plan: Plan,
        buckets: Mapping[int, Bucket],
        extras: ReadExtras,
        clients: Mapping[int, ShardClient],
        explaining: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`explaining`: around each call, to raise the reason for which shards refuse it. The first
        of the shards keeps the extras.
        """
        self._plan = plan
        self._buckets = buckets
        self._extras = extras
        self._clients = clients
        self._keeper = clients[min(clients)]
        self._explaining = explaining
        self._kept_extras: dict[str, tuple[int, int]] = {}

    def load_initial(self) -> None:
        for client in self._clients.values():
            parts = self._plan.parts_of_shard(client.index)
            self.load(
                client,
                (codec.encode_initial(p, self._buckets[p.bucket].host_parameters) for p in parts),
            )
        self.load_extras()

    def load_extras(self) -> None:
        """Send what has changed since the last time."""
        changed = {}
        for name, tensor in self._extras().items():
            mark = (tensor.data_ptr(), tensor._version)
            if self._kept_extras.get(name) != mark:
                self._kept_extras[name], changed[name] = mark, tensor
        chunks = (
            shard_pb2.LoadRequest(buffer=chunk)
            for name, tensor in changed.items()
            for chunk in codec.encode_chunks(name, tensor.detach().cpu())
        )
        if changed:
            self.load(self._keeper, chunks)

    def load(self, client: ShardClient, messages: Iterable[shard_pb2.LoadRequest | bytes]) -> None:
        with self._explaining():
            client.load(messages)

    def pull(
        self, client: ShardClient, content: shard_pb2.Content
    ) -> Iterator[shard_pb2.PullResponse]:
        with self._explaining():
            yield from client.pull(content)

    def pull_extras(self) -> None:
        extras = self._extras()
        received = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in extras.items()}
        missing = set(received)
        for response in self.pull(self._keeper, shard_pb2.CONTENT_BUFFERS):
            if response.WhichOneof("message") == "buffer":
                name = response.buffer.spec.name
                if name not in received:
                    raise MismatchError(
                        f"the job's model has {name!r}, which this worker's model lacks: build "
                        "the same model on every worker"
                    )
                codec.write_chunk(response.buffer, received[name])
                missing.discard(name)
        if missing:
            raise MismatchError(
                f"this worker's model has {sorted(missing)}, which the job's model lacks: build "
                "the same model on every worker"
            )
        with torch.no_grad():
            for name, tensor in extras.items():
                tensor.copy_(received[name])
