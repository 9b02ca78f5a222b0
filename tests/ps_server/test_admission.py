"""Which job a shard lets in before it knows one, and what it says to a worker that sees another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ps_core import codec
from ps_core.errors import MismatchError, ProtocolError, ShardlineError
from ps_core.job import Job
from ps_core.optim_spec import OptimizerSpec
from ps_core.plan import ParameterSpec
from ps_core.settings import ClusterConfig, Config, ConsistencyConfig, JobConfig, ServerConfig
from ps_core.v1 import shard_pb2
from ps_server import admission

ADAM = OptimizerSpec("Adam", ({"lr": 0.1},))
JOB = Job(
    job_id="digits",
    num_workers=2,
    num_shards=2,
    parameters=(ParameterSpec("weight", torch.float32, (30, 50), 0),),
    part_bytes=1024,
    bucket_bytes=4096,
    optimizer=OptimizerSpec("SGD", ({"lr": 0.1},)),
    consistency=ConsistencyConfig(),
)
CONFIG = Config(
    job=JobConfig(id="digits"),
    cluster=ClusterConfig(shards=("a:1", "b:2"), num_workers=2, max_workers=3),
    server=ServerConfig(index=1),
)


def request(job: Job = JOB, *, rank: int = 0, shard: int = 1) -> shard_pb2.JoinRequest:
    worker = shard_pb2.WorkerId(rank=rank, incarnation=5)
    return shard_pb2.JoinRequest(worker=worker, shard=shard, job=codec.encode_job(job))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_worker_of_any_rank_that_may_join_brings_its_job(rank: int) -> None:
    assert admission.decode(request(rank=rank), CONFIG) == JOB


REFUSED: dict[str, tuple[shard_pb2.JoinRequest, type[ShardlineError], str]] = {
    "another shard": (
        request(shard=0),
        MismatchError,
        "this is shard 1, not 0: list the shards in index order",
    ),
    "a rank beyond the job": (
        request(rank=3),
        MismatchError,
        "worker 3 joins a job of at most 3 workers: allow more with cluster.max_workers",
    ),
    "more workers than may join": (
        request(replace(JOB, num_workers=4)),
        MismatchError,
        "the job starts with 4 workers and shard 1 admits 3",
    ),
    "a billion workers": (
        request(replace(JOB, num_workers=2**32 - 1)),
        MismatchError,
        "the job starts with 4294967295 workers and shard 1 admits 3",
    ),
    "another protocol": (
        request(replace(JOB, protocol=1)),
        MismatchError,
        "protocol is 2 on shard 1 and 1 on the worker",
    ),
    "another job": (
        request(replace(JOB, job_id="letters")),
        MismatchError,
        "job id is 'digits' on shard 1 and 'letters' on the worker",
    ),
    "another number of shards": (
        request(replace(JOB, num_shards=3)),
        MismatchError,
        "number of shards is 2 on shard 1 and 3 on the worker",
    ),
    "another mode": (
        request(replace(JOB, consistency=ConsistencyConfig("async"))),
        MismatchError,
        "mode is 'sync' on shard 1 and 'async' on the worker",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_this_shard_s_job_is_refused_with_the_difference(what: str) -> None:
    message, kind, reason = REFUSED[what]
    with pytest.raises(kind) as refusal:
        admission.decode(message, CONFIG)
    assert reason in str(refusal.value)


def test_a_job_that_is_none_is_refused() -> None:
    message = request()
    del message.job.parameters[:]
    with pytest.raises(ProtocolError, match="a job needs workers, shards and parameters"):
        admission.decode(message, CONFIG)


def test_a_modifier_that_does_not_fit_the_optimizer_is_refused() -> None:
    consistency = ConsistencyConfig("async", delay_compensation=0.5)
    config = replace(CONFIG, consistency=consistency)
    job = replace(JOB, consistency=consistency)
    assert admission.decode(request(job), config) == job
    with pytest.raises(MismatchError, match="delay compensation is derived for SGD, and Adam"):
        admission.decode(request(replace(job, optimizer=ADAM)), config)


def test_a_job_larger_than_the_machine_s_memory_is_refused_before_its_plan_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mean = 30 * 50 * 4 // 2
    assert abs(sum(part.num_bytes for part in JOB.plan.parts_of_shard(1)) - mean) <= 1024
    monkeypatch.setattr(admission, "_MEMORY_BYTES", mean)
    assert "plan" not in vars(admission.decode(request(), CONFIG))
    monkeypatch.setattr(admission, "_MEMORY_BYTES", mean - 1)
    with pytest.raises(MismatchError, match=r"shard 1 would hold .* use more shards"):
        admission.decode(request(), CONFIG)


def test_each_stage_s_shards_share_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(JOB.parameters[0], name="large", shape=(300, 50), stage=1)
    job = replace(JOB, parameters=(*JOB.parameters, large))
    monkeypatch.setattr(admission, "_MEMORY_BYTES", 30 * 50 * 4)
    first = replace(CONFIG, server=ServerConfig(index=0))
    admission.decode(request(job, shard=0), first)
    with pytest.raises(MismatchError, match="shard 1 would hold"):
        admission.decode(request(job), CONFIG)


def test_a_worker_whose_plan_comes_out_different_is_refused() -> None:
    message = request()
    message.job.fingerprint = "0" * 64
    with pytest.raises(MismatchError, match="run the same release everywhere"):
        admission.compare(message, JOB, admission.decode(message, CONFIG))


CHANGES: list[tuple[Callable[[Job], Job], str]] = [
    (lambda job: replace(job, num_workers=1), "num workers is 2 here and 1 there"),
    (lambda job: replace(job, optimizer=ADAM), "optimizer is 'SGD' here and 'Adam' there"),
    (
        lambda job: replace(job, consistency=ConsistencyConfig(backup_workers=1)),
        "backup workers is 0 here and 1 there",
    ),
]


@pytest.mark.parametrize(("change", "difference"), CHANGES)
def test_a_worker_that_sees_another_job_than_the_first_is_told_the_difference(
    change: Callable[[Job], Job], difference: str
) -> None:
    admission.compare(request(rank=2), JOB, replace(JOB))
    with pytest.raises(MismatchError) as refusal:
        admission.compare(request(rank=2), JOB, change(JOB))
    assert str(refusal.value) == f"worker 2 disagrees with the job on shard 1: {difference}"
