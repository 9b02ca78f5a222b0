"""How one more worker gets into a job that runs: which rank it takes, and what it has to know."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from ps_core.config import (
    check_addresses,
    inherited_environment,
    load_job,
    to_environment,
    validate,
)
from ps_core.errors import ConfigError, JobFailedError, MismatchError, ShardlineError
from ps_core.settings import Config
from ps_core.v1 import shard_pb2
from ps_worker import calls
from shardline.program import Program
from shardline.run_directory import is_of_job
from shardline.streams import say


def join(config: Config, program: Program) -> NoReturn:
    """Become a worker that runs `program`, in the job whose workers meet at `cluster.rendezvous`,
    or else whose lead is the first of `cluster.shards`.

    Raises ShardUnreachableError, MismatchError when there is no room, and all that `joined` raises.
    """
    program.check()
    check_addresses(config)
    mine = _join_workers(config) if config.cluster.rendezvous else _join_shards(config)
    say(f"shardline: joining the job as worker {mine.cluster.rank}\n")
    command = (sys.executable, "-u", *program.command)
    os.execve(sys.executable, command, environment(mine))  # noqa: S606  # a shell would only be in the way


def environment(mine: Config) -> dict[str, str]:
    """All variables of the new worker: this process's, and its configuration."""
    variables = inherited_environment() | to_environment(mine)
    if mine.worker.threads:
        variables["OMP_NUM_THREADS"] = str(mine.worker.threads)
    return variables


def _join_shards(config: Config) -> Config:
    """In a job with shards: what `described` says, with a rank."""
    address = config.cluster.shards[0]
    job = described(calls.describe(address, config.rpc), config)
    return _with_rank(job, calls.reserve(address, config.rpc))


def _join_workers(config: Config) -> Config:
    """In an all-reduce job."""
    from allreduce.visit import Visit  # imports torch

    visit = Visit(config.cluster.rendezvous, config.rpc.call_timeout_seconds)
    job = joined(load_job(visit.settings(), config.cluster.rendezvous), config)
    num_workers, num_ranks = job.cluster.num_workers, job.cluster.num_ranks
    return _with_rank(job, visit.reserve(num_workers, num_ranks - num_workers))


def _with_rank(job: Config, rank: int) -> Config:
    mine = replace(job, cluster=replace(job.cluster, rank=rank))
    validate(mine)
    return mine


def described(lead: shard_pb2.DescribeResponse, own: Config) -> Config:
    """The configuration of a new worker in the job that the first of `own.cluster.shards` leads.

    ShardlineError when there is nothing to join.
    """
    address = own.cluster.shards[0]
    _check(lead, address)
    job = load_job(lead.settings, address)
    if job.pipeline.stages > 1:
        raise MismatchError(
            f"a replica of this job's model takes {job.pipeline.stages} workers, and this would be "
            "one: start the job with more of them, `shardline run --workers`"
        )
    return joined(job, own)


def joined(job: Config, own: Config) -> Config:
    """The configuration of a new worker in `job`, which another process has described: what is of
    the job, and from `own` what is of this machine. Raises ConfigError.
    """
    cluster = replace(
        job.cluster,
        shards=tuple(_addresses(own.cluster.shards, job.cluster.shards)),
        rendezvous=own.cluster.rendezvous or job.cluster.rendezvous,
    )
    taken = replace(
        job,
        job=replace(job.job, run_dir=_run_dir(job, own)),
        cluster=cluster,
        worker=own.worker,
        rpc=own.rpc,
        metrics=own.metrics,
    )
    check_addresses(taken)
    return taken


def _run_dir(job: Config, own: Config) -> str:
    """Where the new worker writes. The job's own folder may be on another machine, and another
    process must not choose what is written to on this one.
    """
    if own.job.run_dir or not is_of_job(Path(job.job.run_dir), job.job.id):
        return own.job.run_dir
    return job.job.run_dir


def _check(lead: shard_pb2.DescribeResponse, address: str) -> None:
    """Whether it is the lead of a job that goes on."""
    if lead.shard != 0:
        raise ConfigError(f"{address} is shard {lead.shard}: name shard 0 first")
    if lead.phase == shard_pb2.PHASE_COMPLETE:
        raise ShardlineError(f"job {lead.job_id} is complete: there is nothing to join any more")
    if lead.phase == shard_pb2.PHASE_FAILED:
        raise JobFailedError(f"job {lead.job_id} has failed: {lead.reason}")
    if not lead.settings:
        raise MismatchError(f"{address} runs {lead.release}, which cannot say how to join its job")


def _addresses(given: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """The given addresses if they are all of the job's, which may have other names from here."""
    if not known or len(given) == len(known):
        return given
    if len(given) == 1:
        return known
    raise ConfigError(
        f"the job has {len(known)} shards, and --join names {len(given)}: name all, or the first"
    )
