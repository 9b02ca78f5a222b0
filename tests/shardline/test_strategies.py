import pytest
import torch

from allreduce.exchange import AllReduceExchange
from ps_core.config import load
from ps_core.errors import ConfigError
from ps_core.local import LocalExchange
from ps_core.metrics import WorkerMetrics
from ps_core.settings import Config
from ps_worker.exchange import ParameterServerExchange
from shardline.strategies import check_strategy, make_exchange

SHARDS = {"CLUSTER_SHARDS": "a:1,a:2"}
RENDEZVOUS = {"CLUSTER_RENDEZVOUS": "a:3"}
FOUR = {"CLUSTER_NUM_WORKERS": "4"}
STAGES = {**FOUR, "PIPELINE_STAGES": "2"}


def configured(settings: dict[str, str]) -> Config:
    return load(environ={f"SHARDLINE_{key}": value for key, value in settings.items()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FOUR, "4 workers and no shards: name the shards in cluster.shards, or start"),
        ({"JOB_STRATEGY": "parameter-server"}, "needs shards: name them in cluster.shards"),
        ({"JOB_STRATEGY": "allreduce"}, "needs cluster.rendezvous: start the script with"),
        ({**STAGES, **SHARDS}, "stages of a pipeline need cluster.rendezvous to find each other"),
        (
            {**STAGES, **SHARDS, **RENDEZVOUS, "CONSISTENCY_MODE": "local"},
            "trains in modes sync, bounded and async, without backup workers: choose one",
        ),
        (
            {**STAGES, **SHARDS, **RENDEZVOUS, "CONSISTENCY_BACKUP_WORKERS": "1"},
            "without backup workers: choose one, or leave out --stages",
        ),
    ],
)
def test_a_strategy_that_lacks_something_is_refused_with_advice(
    settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_strategy(configured(settings))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, LocalExchange),
        (SHARDS, ParameterServerExchange),
        ({**SHARDS, **FOUR}, ParameterServerExchange),
        ({**RENDEZVOUS, **FOUR}, AllReduceExchange),
        ({**SHARDS, **RENDEZVOUS, **FOUR}, ParameterServerExchange),
        ({**SHARDS, **RENDEZVOUS, "JOB_STRATEGY": "allreduce"}, AllReduceExchange),
        ({**RENDEZVOUS, **STAGES}, AllReduceExchange),
        ({**SHARDS, **RENDEZVOUS, **STAGES}, ParameterServerExchange),
        (
            {**SHARDS, **RENDEZVOUS, **STAGES, "CONSISTENCY_MODE": "bounded"},
            ParameterServerExchange,
        ),
    ],
)
def test_a_configuration_has_its_exchange(settings: dict[str, str], kind: type) -> None:
    config = configured(settings)
    check_strategy(config)
    exchange = make_exchange(
        config, torch.device("cpu"), WorkerMetrics(72, 2), lambda: False, replica=None
    )
    assert type(exchange) is kind
    exchange.close()  # of one that has not joined
