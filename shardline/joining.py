"""How one more worker gets into a job that runs: which rank it takes, and what it has to know."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from ps_core.config import PREFIX, check_addresses, inherited_environment, load, to_environment
from ps_core.errors import ConfigError, JobFailedError, MismatchError, ShardlineError
from ps_core.settings import Config
from ps_core.v1 import shard_pb2
from ps_worker import calls
from shardline.program import Program
from shardline.streams import say

_SHARDS: Final = f"{PREFIX}CLUSTER_SHARDS"
_RANK: Final = f"{PREFIX}CLUSTER_RANK"
_RUN_DIR: Final = f"{PREFIX}JOB_RUN_DIR"


def join(config: Config, program: Program) -> NoReturn:
    """Become a worker that runs `program`, in the job whose workers meet at `cluster.rendezvous`,
    or else whose lead is the first of `cluster.shards`.

    Raises ShardUnreachableError, MismatchError when there is no room, and all that `environment`
    raises.
    """
    program.check()
    check_addresses(config)
    job, rank = _place_among_workers(config) if config.cluster.rendezvous else _place(config)
    variables = inherited_environment() | job | {_RANK: str(rank)}
    if not Path(variables.get(_RUN_DIR, ".")).is_dir():  # it is on the machine of the others
        del variables[_RUN_DIR]
    say(f"shardline: joining the job as worker {variables[_RANK]}\n")
    command = (sys.executable, "-u", *program.command)
    os.execve(sys.executable, command, variables)  # noqa: S606  # a shell would only be in the way


def _place(config: Config) -> tuple[dict[str, str], int]:
    """In a job with shards: its variables, and a rank."""
    address = config.cluster.shards[0]
    job = environment(calls.describe(address, config.rpc), config)
    return job, calls.reserve(address, config.rpc)


def _place_among_workers(config: Config) -> tuple[dict[str, str], int]:
    """In an all-reduce job."""
    from allreduce.visit import Visit  # imports torch

    visit = Visit(config.cluster.rendezvous, config.rpc.call_timeout_seconds)
    job = visit.settings()
    cluster = load(environ=job).cluster
    rank = visit.reserve(cluster.num_workers, cluster.num_ranks - cluster.num_workers)
    return job | _own(config), rank


def environment(lead: shard_pb2.DescribeResponse, own: Config) -> dict[str, str]:
    """The variables of the new worker: the job's, and what is its own in `own`.

    ShardlineError when there is nothing to join.
    """
    _check(lead, own.cluster.shards[0])
    job = dict(lead.settings)
    job[_SHARDS] = ",".join(_addresses(own.cluster.shards, load(environ=job).cluster.shards))
    return job | _own(own)


def _own(config: Config) -> dict[str, str]:
    """The variables that are the new worker's own."""
    mine = to_environment(Config(worker=config.worker, rpc=config.rpc, metrics=config.metrics))
    if config.worker.threads:
        mine["OMP_NUM_THREADS"] = str(config.worker.threads)
    return mine


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
