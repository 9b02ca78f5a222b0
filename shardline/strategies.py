"""Which exchange a session uses."""

from __future__ import annotations

from collections.abc import Callable

import torch

from allreduce.exchange import AllReduceExchange
from ps_core.errors import ConfigError
from ps_core.exchange import Replica
from ps_core.local import LocalExchange
from ps_core.metrics import WorkerMetrics
from ps_core.optimizer import JobExchange
from ps_core.settings import Config
from ps_worker.exchange import ParameterServerExchange


def check_strategy(config: Config) -> None:
    """Raises ConfigError for a strategy that lacks an address."""
    cluster = config.cluster
    if config.strategy == "alone" and cluster.num_workers > 1:
        raise ConfigError(
            f"{cluster.num_workers} workers and no shards: name the shards in cluster.shards, or "
            "start the script with `shardline run`"
        )
    if config.strategy == "parameter-server" and not cluster.shards:
        raise ConfigError("strategy parameter-server needs shards: name them in cluster.shards")
    if config.strategy == "allreduce" and not cluster.rendezvous:
        raise ConfigError(
            "strategy allreduce needs cluster.rendezvous: start the script with `shardline run "
            "--strategy allreduce` or torchrun"
        )
    if config.pipeline.stages > 1 and not cluster.rendezvous:
        raise ConfigError(
            "the stages of a pipeline need cluster.rendezvous to find each other: start the script "
            "with `shardline run --stages`"
        )


def make_exchange(
    config: Config,
    device: torch.device,
    metrics: WorkerMetrics,
    is_preempted: Callable[[], bool],
    replica: Replica | None,
) -> JobExchange:
    """The exchange of the configured strategy, not connected yet. `is_preempted`: it may leave its
    waits. `replica`: this worker has a stage of it.
    """
    if config.strategy == "allreduce":
        return AllReduceExchange(config, device)
    if config.strategy == "alone":
        return LocalExchange()
    shared = ParameterServerExchange(config.by_replica(), metrics, replica)
    shared.leave_when(is_preempted)
    return shared
