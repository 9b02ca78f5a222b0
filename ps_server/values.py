"""What goes into a shard and out of it whole: initial parameters, optimizer state, the model's
buffers.
"""

from __future__ import annotations

from collections.abc import Iterator

from ps_core import codec
from ps_core.errors import ProtocolError
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_server.shard import Shard

Buffers = dict[str, list[tensor_pb2.TensorChunk]]
"""Name → the chunks of the tensor. A shard only keeps them: it has no use for their elements."""


def load(shard: Shard, loaded: Buffers, request: shard_pb2.LoadRequest) -> None:
    """Take one message of a load; buffers into `loaded`, until all are there. Raises
    ProtocolError.
    """
    match request.WhichOneof("message"):
        case "part":
            part = shard.part(request.part.part).part
            shard.load(part.index, codec.decode_elements(request.part, part))
        case "state":
            _load_state(shard, request.state)
        case "clear_state":
            for part_state in shard.parts.values():
                part_state.optimizer.clear_state()
        case "buffer":
            loaded.setdefault(request.buffer.spec.name, []).append(request.buffer)
        case other:
            raise ProtocolError(f"{other} is not something to load")


def _load_state(shard: Shard, message: tensor_pb2.StateTensor) -> None:
    optimizer = shard.part(message.part).optimizer
    optimizer.write_state(message.slice, message.spec.name, codec.decode_state(message))


def read(
    shard: Shard, buffers: Buffers, request: shard_pb2.PullRequest
) -> Iterator[shard_pb2.PullResponse | bytes]:
    """The version, then the values asked for. Raises ProtocolError."""
    yield shard_pb2.PullResponse(version=shard.version)
    match request.content:
        case shard_pb2.CONTENT_PARAMETERS:
            for index, state in shard.parts.items():
                yield codec.encode_pulled(state.version, index, state.parameters)
        case shard_pb2.CONTENT_STATE:
            yield from _read_state(shard)
        case shard_pb2.CONTENT_BUFFERS:
            # As they are now: while the messages are on their way others may be loaded.
            for name, chunks in list(buffers.items()):
                if request.held.get(name) == chunks[0].digest:
                    same = tensor_pb2.TensorChunk(spec=chunks[0].spec, digest=chunks[0].digest)
                    yield shard_pb2.PullResponse(buffer=same)
                else:
                    yield from (shard_pb2.PullResponse(buffer=chunk) for chunk in chunks)
        case content:
            raise ProtocolError(f"unknown content {content}")


def _read_state(shard: Shard) -> Iterator[shard_pb2.PullResponse]:
    # All at once: while the messages are on their way another worker may load a state.
    entries = [
        (index, number, key, value)
        for index, state in shard.parts.items()
        for number, key, value in state.optimizer.read_state()
    ]
    for index, number, key, value in entries:
        yield shard_pb2.PullResponse(state=codec.encode_state(index, number, key, value))
