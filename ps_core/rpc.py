"""One function that builds a server, one that builds a channel, and the settings they share.

Methods are looked up in the generated service descriptors, and every message may be handed over as
bytes that are encoded already: hot frames are built once by `codec` and sent to many workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ps_core.errors import ConfigError
from ps_core.settings import RpcConfig
from ps_core.v1 import lead_pb2, shard_pb2

SHARD_SERVICE: ServiceDescriptor = shard_pb2.DESCRIPTOR.services_by_name["ShardService"]
LEAD_SERVICE: ServiceDescriptor = lead_pb2.DESCRIPTOR.services_by_name["LeadService"]

MAX_MESSAGE_BYTES = 16 * 2**20
"""Fixed on both sides: the largest part is 8 MiB."""

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", MAX_MESSAGE_BYTES - 1),
    ("grpc.enable_http_proxy", 0),  # of the machine, for the internet: shards are not there
)

_SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    *_OPTIONS,
    # A peer may ping as often as its keepalive says. By default gRPC breaks a connection on which
    # pings come more often than every five minutes without data in between.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)

_RETRIES = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            },
            {
                "name": [
                    {"service": SHARD_SERVICE.full_name, "method": "Exchange"},
                    {"service": LEAD_SERVICE.full_name, "method": "Control"},
                ]
            },
        ]
    }
)
"""gRPC adds the jitter, and retries a stream only before its first answer; whoever opens one of the
two that live as long as a job does so again, and must know when it has broken.
"""

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


Frame = Callable[[], bytes]
"""Makes a message when it is about to be sent: one at a time is in memory."""


def _serialize(message: Message | bytes | Frame) -> bytes:
    if isinstance(message, Message):
        return message.SerializeToString()
    return message if isinstance(message, bytes) else message()


def _keepalive(config: RpcConfig) -> list[tuple[str, int]]:
    """Pings that find a peer which is gone or hangs without having closed its connection."""
    milliseconds = int(config.keepalive_seconds * 1000)
    return [
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
    ]


def _channel_options(config: RpcConfig) -> list[tuple[str, Any]]:
    return [
        *_OPTIONS,
        *_keepalive(config),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.service_config", _RETRIES),
    ]


def open_channel(address: str, config: RpcConfig) -> grpc.Channel:
    """A channel for threads; the caller closes it. Does not connect yet."""
    return grpc.insecure_channel(address, options=_channel_options(config))


def open_async_channel(address: str, config: RpcConfig) -> grpc.aio.Channel:
    """A channel for the running event loop; the caller closes it. Does not connect yet."""
    return grpc.aio.insecure_channel(address, options=_channel_options(config))


def is_serving(address: str, timeout_seconds: float) -> bool:
    """Whether a server answers health checks there, and says that it serves."""
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_seconds
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _path(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def _codecs(method: MethodDescriptor) -> dict[str, Any]:
    return {
        "request_serializer": _serialize,
        "response_deserializer": GetMessageClass(method.output_type).FromString,
    }


def unary_unary(channel: grpc.Channel, service: ServiceDescriptor, name: str) -> Any:
    """The callable of a unary method."""
    method = service.methods_by_name[name]
    return channel.unary_unary(_path(method), **_codecs(method))


def unary_stream(channel: grpc.Channel, service: ServiceDescriptor, name: str) -> Any:
    """The callable of a method that answers with a stream."""
    method = service.methods_by_name[name]
    return channel.unary_stream(_path(method), **_codecs(method))


def stream_unary(channel: grpc.Channel, service: ServiceDescriptor, name: str) -> Any:
    """The callable of a method that takes a stream."""
    method = service.methods_by_name[name]
    return channel.stream_unary(_path(method), **_codecs(method))


def stream_stream(
    channel: grpc.Channel | grpc.aio.Channel, service: ServiceDescriptor, name: str
) -> Any:
    """The callable of a bidirectional method; its responses are bytes."""
    method = service.methods_by_name[name]
    return channel.stream_stream(_path(method), request_serializer=_serialize)


def _handler(method: MethodDescriptor, behaviour: Any) -> grpc.RpcMethodHandler[Any, Any]:
    factories = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = factories[method.client_streaming, method.server_streaming]
    return make(behaviour, response_serializer=_serialize)


@dataclass(frozen=True, slots=True)
class RpcServer:
    """A bound server: start it, wait for it, stop it."""

    server: grpc.aio.Server
    health: health.aio.HealthServicer
    port: int

    async def start(self) -> None:
        """Serve, and say so to health checks."""
        await self.server.start()
        await self.health.set("", health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, grace_seconds: float) -> None:
        """Take no new calls, and give the open ones `grace_seconds`; health checks are told."""
        await self.health.enter_graceful_shutdown()
        await self.server.stop(grace_seconds)


def build_server(
    address: str, servicers: Sequence[tuple[ServiceDescriptor, object]], config: RpcConfig
) -> RpcServer:
    """A server with our services, health and reflection, bound but not started.

    `servicers`: objects with one coroutine method per RPC, named as in the proto. They get requests
    as bytes, so that what cannot be decoded is theirs to refuse. Must be called on the running
    event loop. Raises ConfigError when the address cannot be bound.
    """
    # By default a second server on the port is an error, and does not get half of the traffic.
    sharing = ("grpc.so_reuseport", int(config.shared_ports))
    server = grpc.aio.server(options=[*_SERVER_OPTIONS, sharing, *_keepalive(config)])
    for descriptor, servicer in servicers:
        handlers = {m.name: _handler(m, getattr(servicer, m.name)) for m in descriptor.methods}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(descriptor.full_name, handlers),)
        )
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = [descriptor.full_name for descriptor, _ in servicers]
    reflection.enable_server_reflection(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    return RpcServer(server, checks, _bind(server, address))


def _bind(server: grpc.aio.Server, address: str) -> int:
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address}: the port is in use, or the address is not this "
            "machine's. Choose another "
            "port, or end the process that holds it"
        ) from error
