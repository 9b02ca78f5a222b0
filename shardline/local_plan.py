"""Which processes a run on this machine has, and how each is configured."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ps_core.config import (
    inherited_environment,
    join_address,
    load,
    to_environment,
    to_settings,
    validate,
)
from ps_core.settings import Config, JobConfig
from shardline.processes import ProcessSpec
from shardline.program import Program
from shardline.supervision import ProcessId

_HOST: Final = "127.0.0.1"
_HASH_SEED: Final = "PYTHONHASHSEED"
"""Of Python: sets of texts have the same order in all processes."""
_SHARD_COMMAND: Final = (sys.executable, "-u", "-P", "-m", "ps_server")
"""With -P nothing is imported from the working directory, which is the script's."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run; `config` is what all processes have in common, the number of workers too."""

    program: Program
    num_shards: int
    config: Config
    shard_command: tuple[str, ...] = _SHARD_COMMAND

    @property
    def strategy(self) -> str:
        """Where updates are made."""
        return "parameter-server" if self.num_shards else "allreduce"

    @property
    def needs_rendezvous(self) -> bool:
        """Whether workers speak to each other."""
        return self.strategy == "allreduce" or self.config.pipeline.stages > 1

    @property
    def num_workers(self) -> int:
        """How many workers are started."""
        return self.config.cluster.num_workers

    @property
    def num_ranks(self) -> int:
        """How many workers there may be, with those that join by hand."""
        return self.config.cluster.num_ranks

    @property
    def job_name(self) -> str:
        """The name in the configuration, or else the program's."""
        given = self.config.job.id
        return self.program.name if given == JobConfig().id else given


def with_rendezvous(launch: Launch, port: int) -> Launch:
    """The same, with the place on this machine where workers meet."""
    cluster = replace(launch.config.cluster, rendezvous=f"{_HOST}:{port}", serve_rendezvous=False)
    return replace(launch, config=replace(launch.config, cluster=cluster))


def plan(
    launch: Launch, job_id: str, run_dir: Path, ports: Sequence[int], num_cpus: int
) -> list[ProcessSpec]:
    """The processes to start, shards first.

    `ports`: one per shard to serve on, then one per shard and one per worker for metrics.
    """
    shards = tuple(f"{_HOST}:{port}" for port in ports[: launch.num_shards])
    config = replace(
        launch.config,
        job=replace(launch.config.job, id=job_id, run_dir=str(run_dir)),
        cluster=replace(launch.config.cluster, shards=shards, rank=0),
        server=replace(launch.config.server, index=0, port=0),
        rpc=replace(launch.config.rpc, shared_ports=True),
    )
    roles = [ProcessId("shard", index) for index in range(launch.num_shards)]
    roles += [ProcessId("worker", rank) for rank in range(launch.num_workers)]
    return [
        _spec(launch, _of_process(config, process, port, num_cpus), process)
        for process, port in zip(roles, ports[launch.num_shards :], strict=True)
    ]


def job_settings(specs: Sequence[ProcessSpec]) -> dict[str, str]:
    """The variables with which another worker can join."""
    worker = next(spec for spec in specs if spec.id.role == "worker")
    return to_settings(load(environ=worker.environment))


def _of_process(config: Config, process: ProcessId, metrics_port: int, num_cpus: int) -> Config:
    """The configuration of one process."""
    metrics = config.metrics
    if metrics.port != -1:  # which says that there shall be no endpoint
        metrics = replace(metrics, port=metrics_port)
    if process.role == "shard":
        server = replace(config.server, index=process.index)
        worker = replace(config.worker, threads=1)
        return replace(config, server=server, worker=worker, metrics=metrics)
    threads = config.worker.threads or max(1, num_cpus // config.cluster.num_workers)
    return replace(
        config,
        cluster=replace(config.cluster, rank=process.index),
        worker=replace(config.worker, threads=threads),
        metrics=metrics,
    )


def _spec(launch: Launch, config: Config, process: ProcessId) -> ProcessSpec:
    validate(config)
    metrics, is_shard = config.metrics, process.role == "shard"
    worker_command = (sys.executable, "-u", *launch.program.command)
    return ProcessSpec(
        process,
        launch.shard_command if is_shard else worker_command,
        {_HASH_SEED: str(config.job.seed)}
        | inherited_environment()
        | to_environment(config)
        | {"OMP_NUM_THREADS": str(config.worker.threads)},
        config.cluster.shards[process.index] if is_shard else None,
        None
        if metrics.port == -1
        else f"http://{join_address(metrics.host, metrics.port)}/metrics",
    )
