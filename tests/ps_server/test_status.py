"""What a shard says about itself, before, during and after a job."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ps_core import codec
from ps_core.errors import JobFailedError
from ps_core.settings import (
    Config,
    ConsistencyConfig,
    MetricsConfig,
    ServerConfig,
    WorkerConfig,
)
from ps_core.shard_metrics import ShardMetrics
from ps_core.v1 import shard_pb2
from ps_server import status
from ps_server.node import Node
from ps_server.orders import Membership
from ps_server.terms import Begin, Member
from tests.ps_server.desk import CONFIG, JOB, Desk

ASYNC = ConsistencyConfig("async")


def make_node(index: int, config: Config = CONFIG, *, consistency: ConsistencyConfig) -> Node:
    """A shard that workers 0 and 1 have joined; shard 0 is the lead."""
    own = replace(config, server=ServerConfig(index=index), consistency=consistency)
    node = Node(own, 1000 + index, ShardMetrics(index, consistency.mode))
    job = replace(JOB, consistency=consistency)
    if index == 0:
        node.office = Desk(own, job).office
    for rank in range(2):
        worker = shard_pb2.WorkerId(rank=rank, incarnation=10 + rank)
        node.join(
            shard_pb2.JoinRequest(
                worker=worker, shard=index, job=codec.encode_job(job), pid=5, host="here"
            )
        )
    return node


def start(node: Node, ranks: tuple[int, ...] = (0, 1), epoch: int = 1, step: int = 0) -> None:
    """These are the members from now on."""
    assert node.shard is not None
    for part in node.shard.parts if epoch == 1 else ():
        node.shard.load(part, torch.zeros(JOB.plan.parts[part].length))
    members = {rank: Member(10 + rank, step) for rank in ranks}
    node.obey(Membership(epoch, members))


def take_step(node: Node, rank: int, step: int) -> None:
    assert node.shard is not None
    node.shard.begin(rank, Begin(step, 1, 1, JOB.optimizer.groups))
    for index, state in node.shard.parts.items():
        gradient = torch.ones(state.part.length)
        node.shard.push(rank, step, index, [True] * len(state.part.slices), gradient)


def test_a_shard_that_nobody_has_joined_says_that_it_is_empty() -> None:
    node = Node(CONFIG, 5, ShardMetrics(0, "sync"))
    node.office = Desk().office
    told = status.describe(node)
    assert (told.phase, told.job_id, told.version) == (shard_pb2.PHASE_EMPTY, "", 0)
    assert told.incarnation == 5
    assert not told.workers
    assert not told.HasField("ledger")


def test_the_phase_follows_the_job() -> None:
    node = make_node(1, consistency=ConsistencyConfig())
    assert status.describe(node).phase == shard_pb2.PHASE_STARTING
    start(node)
    assert status.describe(node).phase == shard_pb2.PHASE_TRAINING
    for rank in range(2):
        take_step(node, rank, 0)
    node.obey(Membership(2, {}))  # all wait for each other at the end of a pass
    assert status.describe(node).phase == shard_pb2.PHASE_TRAINING
    node.end(None)
    assert status.describe(node).phase == shard_pb2.PHASE_COMPLETE


def test_a_job_that_has_failed_says_why() -> None:
    node = make_node(1, consistency=ConsistencyConfig())
    node.end(JobFailedError("worker 1 failed: the loss is NaN"))
    told = status.describe(node)
    assert (told.phase, told.reason) == (
        shard_pb2.PHASE_FAILED,
        "worker 1 failed: the loss is NaN",
    )


def test_a_shard_tells_what_it_holds() -> None:
    node = make_node(1, consistency=ConsistencyConfig())
    start(node)
    for rank in range(2):
        take_step(node, rank, 0)
    told = status.describe(node)
    own = [part for part in JOB.plan.parts if part.shard == 1]
    assert (told.job_id, told.shard, told.version) == ("shardline", 1, 1)
    assert (told.num_parts, told.parameter_bytes) == (len(own), sum(p.num_bytes for p in own))
    assert not told.HasField("ledger")  # that is the lead's
    assert not told.settings


# -- Workers ---------------------------------------------------------------------------------------


def workers(node: Node) -> list[tuple[int, str, int, int]]:
    """Rank, state, clock and staleness of each."""
    told = status.describe(node).workers
    return [(each.worker.rank, each.state, each.clock, each.staleness) for each in told]


def test_another_shard_tells_the_state_of_workers_from_what_it_has_seen() -> None:
    node = make_node(1, consistency=ConsistencyConfig())
    assert workers(node) == [(0, "joined", 0, 0), (1, "joined", 0, 0)]
    start(node)
    for rank in range(2):
        take_step(node, rank, 0)
    assert workers(node) == [(0, "member", 1, 0), (1, "member", 1, 0)]
    node.obey(Membership(2, {0: Member(10, 0)}))
    assert workers(node)[1] == (1, "idle", 1, 0)
    node.leave(shard_pb2.LeaveRequest(worker=shard_pb2.WorkerId(rank=1, incarnation=11)))
    assert workers(node)[1] == (1, "left", 1, 0)
    node.obey(Membership(3, {}, {0: 10}, reason="it was silent"))
    assert workers(node)[0] == (0, "evicted", 1, 0)


def test_the_lead_tells_the_state_of_workers_as_it_decides() -> None:
    node = make_node(0, consistency=ConsistencyConfig())
    assert [state for _, state, _, _ in workers(node)] == ["joined", "joined"]
    assert node.office is not None
    node.office.leave(1, shard_pb2.FAREWELL_FINISHED, "")
    assert [state for _, state, _, _ in workers(node)] == ["joined", "left"]


def test_in_lockstep_a_worker_is_behind_the_version() -> None:
    node = make_node(1, consistency=ConsistencyConfig(backup_workers=1))
    start(node)
    take_step(node, 0, 0)
    assert node.shard is not None
    node.shard.seal(0, frozenset({0}))
    assert workers(node) == [(0, "member", 1, 0), (1, "member", 0, 1)]


def test_without_lockstep_a_worker_is_behind_the_fastest() -> None:
    node = make_node(1, consistency=ASYNC)
    start(node)
    for step in range(3):
        take_step(node, 0, step)
    take_step(node, 1, 0)
    assert workers(node) == [(0, "member", 3, 0), (1, "member", 1, 2)]


def test_a_worker_that_has_left_the_others_behind_is_not_a_negative_number_behind() -> None:
    node = make_node(1, consistency=ASYNC)
    start(node)
    for step in range(3):
        take_step(node, 0, step)
    node.obey(Membership(2, {1: Member(11, 0)}))
    assert workers(node) == [(0, "idle", 3, 0), (1, "member", 0, 0)]


# -- The lead --------------------------------------------------------------------------------------


def test_the_lead_tells_what_has_become_of_the_samples() -> None:
    node = make_node(0, consistency=ConsistencyConfig())
    assert status.describe(node).ledger == shard_pb2.Ledger()
    assert status.describe(node).HasField("ledger")


def test_the_lead_tells_how_another_worker_can_join_and_keeps_its_own_settings() -> None:
    config = replace(
        CONFIG,
        server=ServerConfig(index=0, port=4711),
        metrics=MetricsConfig(port=4712),
        worker=WorkerConfig(device="cuda"),
    )
    node = Node(config, 5, ShardMetrics(0, "sync"))
    node.office = Desk().office
    assert dict(status.describe(node).settings) == {
        "SHARDLINE_CLUSTER_SHARDS": "a:1,b:2",
        "SHARDLINE_CLUSTER_NUM_WORKERS": "2",
        "SHARDLINE_CLUSTER_MAX_WORKERS": "4",
        "SHARDLINE_MEMBERSHIP_HEARTBEAT_DEADLINE_SECONDS": "2.0",
    }


@pytest.mark.parametrize("index", [0, 1])
def test_what_a_shard_says_can_be_sent(index: int) -> None:
    node = make_node(index, consistency=ASYNC)
    told = status.describe(node)
    assert shard_pb2.DescribeResponse.FromString(told.SerializeToString()) == told
