"""What a shard says about itself, for people and dashboards."""

from __future__ import annotations

import os
import socket
import time

from ps_core import __version__
from ps_core.v1 import shard_pb2
from ps_server.node import Node
from ps_server.roster import Peer

_STARTED = time.monotonic()


def describe(node: Node) -> shard_pb2.DescribeResponse:
    """The answer to Describe."""
    response = shard_pb2.DescribeResponse(
        shard=node.index,
        incarnation=node.incarnation,
        pid=os.getpid(),
        host=socket.gethostname(),
        release=__version__,
        phase=_phase(node),
        reason=str(node.failure or ""),
        version=node.version,
        updates_per_second=node.updates.per_second,
        workers=[_worker(node, rank, peer) for rank, peer in node.roster],
        uptime_seconds=time.monotonic() - _STARTED,
    )
    if node.shard is not None:
        response.job_id = node.shard.job.job_id
        response.num_parts = len(node.shard.parts)
        response.parameter_bytes = node.shard.num_bytes
    return response


def _phase(node: Node) -> shard_pb2.Phase:
    if node.failure is not None:
        return shard_pb2.PHASE_FAILED
    if node.ended.is_set():
        return shard_pb2.PHASE_COMPLETE
    if node.shard is None:
        return shard_pb2.PHASE_EMPTY
    return shard_pb2.PHASE_TRAINING if node.shard.members else shard_pb2.PHASE_STARTING


def _worker(node: Node, rank: int, peer: Peer) -> shard_pb2.WorkerStatus:
    clock = node.shard.clock(rank) if node.shard is not None else 0
    return shard_pb2.WorkerStatus(
        worker=shard_pb2.WorkerId(rank=rank, incarnation=peer.incarnation),
        pid=peer.pid,
        host=peer.host,
        clock=clock,
        staleness=node.version - clock,
        received_bytes=peer.received_bytes,
        sent_bytes=peer.sent_bytes,
        received_bytes_per_second=peer.rate.per_second,
        state=_state(node, rank, peer),
    )


def _state(node: Node, rank: int, peer: Peer) -> str:
    if peer.left:
        return "left"
    if node.shard is not None and rank in node.shard.members:
        return "member"
    return "idle" if node.shard is not None and node.shard.clock(rank) else "joined"
