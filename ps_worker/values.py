"""Whole values to the shards and back: outside the steps, and in calls of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Final

import torch

from ps_core import codec
from ps_core.buckets import Bucket
from ps_core.errors import ProtocolError
from ps_core.extras import Extras, Kind
from ps_core.plan import Plan
from ps_core.tensors import from_wire
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_worker.client import ShardClient

_NONE: Final[Mapping[str, bytes]] = MappingProxyType({})


class Values:
    """Initial parameters, and the extras of the chosen worker."""

    def __init__(
        self,
        plan: Plan,
        buckets: Mapping[int, Bucket],
        extras: Extras,
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
        self._kept_extras: dict[str, bytes] = {}
        """Digests of those that the shard keeps, as far as this worker knows."""

    def load_initial(self) -> None:
        for client in self._clients.values():
            parts = self._plan.parts_of_shard(client.index)
            self.load(
                client,
                (codec.encode_initial(p, self._buckets[p.bucket].host_parameters) for p in parts),
            )
        self.load_extras()

    def load_extras(self) -> Mapping[str, bytes]:
        """Send those whose content is not what the shard keeps; the digests of all."""
        tensors, digests = self._extras.read(), self._extras.digests()
        changed = [name for name in tensors if self._kept_extras.get(name) != digests[name]]
        chunks = (
            shard_pb2.LoadRequest(buffer=chunk)
            for name in changed
            for chunk in codec.encode_chunks(name, tensors[name], digests[name])
        )
        if changed:
            self.load(self._keeper, chunks)
        self._kept_extras |= digests
        return digests

    def take_extras(
        self, digests: Mapping[str, bytes] | None = None, *, joins: bool = False
    ) -> None:
        """Take over those that the shard keeps; `digests` of the own ones, if they are known. A
        worker that `joins` must have the same names, types and shapes, which may change later.
        Raises MismatchError, ProtocolError.
        """
        own = self._extras.digests() if digests is None else digests
        kinds: dict[str, Kind] = {}
        received: dict[str, torch.Tensor] = {}
        missing: Counter[str] = Counter()
        for chunk in self._pull_buffers(own):
            name, kind = chunk.spec.name, Kind(from_wire(chunk.spec.dtype), tuple(chunk.spec.shape))
            self._kept_extras[name] = chunk.digest
            kinds[name] = kind
            if own.get(name) == chunk.digest:
                continue
            if name not in received:
                received[name] = torch.empty(kind.shape, dtype=kind.dtype)
                missing[name] = received[name].nbytes
            codec.write_chunk(chunk, received[name])
            missing[name] -= len(chunk.data)
        if missing.total():
            raise ProtocolError(f"pieces of {sorted(+missing)} are missing")
        if joins:
            self._extras.check_kinds(kinds)
        self._extras.write(received)

    def keep_nothing(self) -> None:
        """The shard may keep another worker's: send all of them the next time."""
        self._kept_extras.clear()

    def _pull_buffers(self, held: Mapping[str, bytes]) -> Iterator[tensor_pb2.TensorChunk]:
        for response in self.pull(self._keeper, shard_pb2.CONTENT_BUFFERS, held):
            if response.WhichOneof("message") == "buffer":
                yield response.buffer

    def load(self, client: ShardClient, messages: Iterable[shard_pb2.LoadRequest | bytes]) -> None:
        with self._explaining():
            client.load(messages)

    def pull(
        self, client: ShardClient, content: shard_pb2.Content, held: Mapping[str, bytes] = _NONE
    ) -> Iterator[shard_pb2.PullResponse]:
        with self._explaining():
            yield from client.pull(content, held)
