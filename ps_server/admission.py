"""Whether a worker that joins describes the job that this shard is part of."""

from __future__ import annotations

import os

from ps_core import codec
from ps_core.errors import MismatchError, UsageError
from ps_core.job import PROTOCOL, Job, check_plan, first_difference
from ps_core.optim_spec import check_consistency
from ps_core.plan import mean_bytes
from ps_core.settings import Config
from ps_core.v1 import shard_pb2

_MEMORY_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def decode(request: shard_pb2.JoinRequest, config: Config) -> Job:
    """The job that a worker describes, of which no plan has been made yet: it may be a stranger's.
    Raises MismatchError when it is not one for this shard, or ProtocolError when it is none.
    """
    index = config.server.index
    if request.shard != index:
        raise MismatchError(
            f"this is shard {index}, not {request.shard}: list the shards in index order"
        )
    if request.worker.rank >= config.cluster.num_ranks:
        raise MismatchError(
            f"worker {request.worker.rank} joins a job of at most {config.cluster.num_ranks} "
            "workers: allow more with cluster.max_workers (--workers MIN:MAX)"
        )
    if request.job.num_workers > config.cluster.num_ranks:
        raise MismatchError(
            f"the job starts with {request.job.num_workers} workers and shard {index} admits "
            f"{config.cluster.num_ranks}: give all processes the same cluster.num_workers"
        )
    _check_configured(request.job, config)
    job = codec.decode_job(request.job)
    try:
        check_consistency(job.optimizer, job.consistency)
    except UsageError as error:
        raise MismatchError(str(error)) from error
    _check_memory(job, index)
    return job


def compare(request: shard_pb2.JoinRequest, mine: Job, theirs: Job) -> None:
    """Raises MismatchError naming the first thing that a worker sees differently."""
    difference = first_difference(mine, theirs)
    if difference is not None:
        raise MismatchError(
            f"worker {request.worker.rank} disagrees with the job on shard {request.shard}: "
            f"{difference}"
        )
    check_plan(mine, request.job.fingerprint)


def _check_configured(theirs: shard_pb2.JobSpec, config: Config) -> None:
    """What the shard knows about the job before its first worker comes."""
    for what, here, there in (
        ("protocol", PROTOCOL, theirs.protocol),
        ("job id", config.job.id, theirs.job_id),
        ("number of shards", len(config.cluster.shards) or 1, theirs.num_shards),
        ("mode", config.consistency.mode, theirs.consistency.mode),
    ):
        if here != there:
            raise MismatchError(
                f"{what} is {here!r} on shard {config.server.index} and {there!r} on the worker"
            )


def _check_memory(job: Job, index: int) -> None:
    num_bytes = mean_bytes(job.parameters, job.num_shards, index)
    if num_bytes > _MEMORY_BYTES:
        raise MismatchError(
            f"shard {index} would hold {num_bytes / 2**30:.1f} GiB of parameters on a machine with "
            f"{_MEMORY_BYTES / 2**30:.1f} GiB of memory: use more shards"
        )
