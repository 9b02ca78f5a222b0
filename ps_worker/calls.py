"""Single calls to a shard, from outside its job too. Imports no torch: commands answer at once."""

from __future__ import annotations

from typing import Any

import grpc

from ps_core.errors import ShardlineError, ShardUnreachableError, error_from
from ps_core.rpc import SHARD_SERVICE, open_channel, unary_unary
from ps_core.settings import RpcConfig
from ps_core.v1 import shard_pb2

CALL_KEY, LONG_KEY = "rpc.call_timeout_seconds", "membership.join_timeout_seconds"
"""How long calls may take, and those that move values."""


def describe(address: str, config: RpcConfig) -> shard_pb2.DescribeResponse:
    """What the shard at `address` says about itself. Raises ShardUnreachableError within the call
    timeout.
    """
    with open_channel(address, config) as channel:
        call = unary_unary(channel, SHARD_SERVICE, "Describe")
        response: shard_pb2.DescribeResponse = unary(
            call, shard_pb2.DescribeRequest(), f"shard at {address}", config.call_timeout_seconds
        )
        return response


def reserve(address: str, config: RpcConfig) -> int:
    """A rank for a worker that is about to be started, from the lead at `address`. Raises
    MismatchError when there is none, ShardUnreachableError within the call timeout.
    """
    with open_channel(address, config) as channel:
        call = unary_unary(channel, SHARD_SERVICE, "Reserve")
        request = shard_pb2.ReserveRequest()
        response = unary(call, request, f"the lead at {address}", config.call_timeout_seconds)
        return int(response.rank)


def unary(call: Any, request: Any, shard: str, timeout_seconds: float, key: str = CALL_KEY) -> Any:
    """The answer to a call, or an error that names the shard. `key`: where the timeout is from."""
    try:
        return call(request, timeout=timeout_seconds)
    except grpc.RpcError as error:
        raise translate(error, shard, key) from error


def translate(error: grpc.RpcError, shard: str, key: str = CALL_KEY) -> ShardlineError:
    """The error of a call that failed; one that names the shard when it did not answer, and the key
    when it did not answer in time.
    """
    code, details = error.code(), error.details() or ""
    failure = error_from(code, details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ShardUnreachableError(f"no answer from {shard} within {key} ({details})")
    if isinstance(failure, ShardUnreachableError):
        return ShardUnreachableError(f"no answer from {shard} ({details})")
    return failure
