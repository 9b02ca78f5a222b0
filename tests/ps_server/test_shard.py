import re
from pathlib import Path

import pytest
import torch

from ps_core.errors import MismatchError
from ps_core.job import Job
from ps_core.optim_spec import OptimizerSpec
from ps_core.plan import ParameterSpec
from ps_core.settings import ConsistencyConfig
from ps_server import shard
from ps_server.shard import Shard
from tests.ps_server.scenario import FOLDER, play

SCENARIOS = sorted(FOLDER.glob("shard_*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_scenario_comes_out_as_written(path: Path) -> None:
    text = path.read_text()
    assert play(text) == text


def test_every_rule_has_a_scenario() -> None:
    rules = re.findall(r"^(\d+)\. ", shard.__doc__ or "", flags=re.MULTILINE)
    assert {int(rule) for rule in rules} == {int(path.stem.split("_")[1]) for path in SCENARIOS}


def test_a_shard_refuses_a_job_whose_hyperparameters_torch_refuses() -> None:
    job = Job(
        job_id="job",
        num_workers=1,
        num_shards=1,
        parameters=(ParameterSpec("p", torch.float32, (100,), 0),),
        part_bytes=512,
        bucket_bytes=2**20,
        optimizer=OptimizerSpec("SGD", ({"lr": -1.0},)),
        consistency=ConsistencyConfig(),
    )
    with pytest.raises(MismatchError, match="refuses its hyperparameters"):
        Shard(job, 0)
