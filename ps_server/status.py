"""What a shard says about itself, for people and dashboards."""

from __future__ import annotations

import os
import socket
import time

from ps_core import __version__
from ps_core.config import to_settings
from ps_core.v1 import shard_pb2
from ps_server.node import Node
from ps_server.office import Office
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
        duplicate_parts=node.num_duplicates,
        refused_parts=node.num_refused,
    )
    if node.shard is not None:
        response.job_id = node.shard.job.job_id
        response.num_parts = len(node.shard.parts)
        response.parameter_bytes = node.shard.num_bytes
    if node.office is not None:
        _describe_lead(response, node, node.office)
    return response


def _describe_lead(response: shard_pb2.DescribeResponse, node: Node, office: Office) -> None:
    totals = office.totals()
    if totals is not None:
        response.ledger.CopyFrom(
            shard_pb2.Ledger(
                granted=totals.granted,
                applied=totals.applied,
                applied_in_part=totals.applied_in_part,
                returned=totals.returned,
                abandoned=totals.abandoned,
                open=totals.open,
            )
        )
    response.settings.update(to_settings(node.config.by_worker()))


def _phase(node: Node) -> shard_pb2.Phase:
    if node.failure is not None:
        return shard_pb2.PHASE_FAILED
    if node.ended.is_set():
        return shard_pb2.PHASE_COMPLETE
    if node.shard is None:
        return shard_pb2.PHASE_EMPTY
    has_started = node.shard.members or node.version  # in a meeting nobody is a member
    return shard_pb2.PHASE_TRAINING if has_started else shard_pb2.PHASE_STARTING


def _worker(node: Node, rank: int, peer: Peer) -> shard_pb2.WorkerStatus:
    clock = node.shard.clock(rank) if node.shard is not None else 0
    verdict = node.office.verdict(rank) if node.office is not None else None
    return shard_pb2.WorkerStatus(
        worker=shard_pb2.WorkerId(rank=rank, incarnation=peer.incarnation),
        pid=peer.pid,
        host=peer.host,
        clock=clock,
        staleness=_behind(node, clock),
        received_bytes=peer.received_bytes,
        sent_bytes=peer.sent_bytes,
        received_bytes_per_second=peer.rate.per_second,
        state=_state(node, rank, peer),
        lag_seconds=node.lags.lag_seconds(rank),
        verdict=str(verdict) if verdict is not None else "",
    )


def _behind(node: Node, clock: int) -> int:
    """Steps that the worker is behind: the version in lockstep, or else the fastest worker."""
    if node.shard is None:
        return 0
    if node.shard.policy.lockstep:
        return max(0, node.version - clock)
    fastest = max((node.shard.clock(rank) for rank in node.shard.members), default=clock)
    return max(0, fastest - clock)  # the fastest may have left


def _state(node: Node, rank: int, peer: Peer) -> str:
    if node.office is not None:
        return node.office.state(rank)
    if node.roster.is_fenced(rank):
        return "evicted"
    if peer.left:
        return "left"
    if node.shard is not None and rank in node.shard.members:
        return "member"
    return "idle" if node.shard is not None and node.shard.clock(rank) else "joined"
