"""Numbers that scripts average and log, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import IterableDataset, TensorDataset

from ps_core.errors import (
    UsageError,
)
from ps_core.optimizer import ExchangeOptimizer
from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster, run_alone
from tests.features.three_ways import (
    LR,
    SIZES,
    Returned,
)
from tests.host import Case
from tests.reference import (
    Net,
    loss_of,
    samples,
    shares,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)


# -- Numbers ---------------------------------------------------------------------------------------


def average(session: Session) -> Returned:
    model = Net()
    session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    value = float(10 + session.rank)
    return {
        "plain": session.mean(value),
        "weighted": session.mean(torch.tensor(value), weight=1 + 2 * session.rank),
        "nothing here": session.mean(value, weight=session.rank),
    }


def test_a_mean_is_over_all_workers_and_weighted(cluster: Cluster) -> None:
    assert run_alone(average).values["plain"] == 10.0
    for result in cluster.run(average):
        assert result.values == {
            "plain": 10.5,
            "weighted": (1 * 10 + 3 * 11) / 4,
            "nothing here": 11.0,
        }


def log_and_report(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    for epoch in session.epochs(2):
        for step in range(3):
            x, y = shares(SIZES, step)[session.rank]
            optimizer.zero_grad()
            loss_of(model, (x, y)).backward()
            optimizer.step(samples=len(x))
            session.log(progress=10 * epoch + step + session.rank / 2)
    session.log(bad=torch.tensor(torch.nan))
    session.report(accuracy=torch.tensor(0.25), name=f"worker {session.rank}")
    return {}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_is_logged_and_reported_is_in_the_file_of_records(
    cluster: Cluster, num_workers: int, tmp_path: Path
) -> None:
    environ = {"SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    if num_workers == 1:
        run_alone(log_and_report, environ=environ)
    else:
        cluster.run(log_and_report, environ=environ)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for rank in range(num_workers):
        own = [line for line in lines if line["rank"] == rank]
        values: dict[str, Any] = {}
        assert own[0]["kind"] == "join"
        for line in own[1:-1]:
            assert line["kind"] == "step"
            values |= line["values"]
        assert values == {"progress": 12 + rank / 2, "bad": "NaN"}
        end = own[-1]
        assert end["kind"] == "end"
        assert end["reported"] == {"accuracy": 0.25, "name": f"worker {rank}"}
        assert (end["steps"], end["version"], end["samples"]) == (6, 6, 6 * SIZES[rank])
        assert (end["pushed_bytes"] > 0) == (end["pulled_bytes"] > 0) == (num_workers > 1)


# -- Refusals --------------------------------------------------------------------------------------


class ThirdParty(torch.optim.SGD):
    """A subclass may compute anything."""


class Stream(IterableDataset[Tensor]):
    """Has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(7)


def joined(session: Session) -> tuple[Net, ExchangeOptimizer]:
    """A session that has taken one step, with gradients for the next."""
    model = Net()
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    for step in range(2):
        if step:
            optimizer.step()
        loss_of(model, shares(SIZES, step)[session.rank]).backward()
    return model, optimizer


def sparse_gradients(session: Session) -> Returned:
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True), nn.Linear(3, 1))
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    return {}


def another_group(session: Session) -> Returned:
    _, optimizer = joined(session)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    return {}


def unfreeze(session: Session) -> Returned:
    model = Net()
    model.first.requires_grad_(False)
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    model.first.requires_grad_(True)
    loss_of(model, samples(4)).backward()
    optimizer.step()
    return {}


def copy_into(session: Session) -> Returned:
    model, optimizer = joined(session)
    with torch.no_grad():
        model.second.weight.copy_(torch.zeros(11, 13))
    optimizer.step()
    return {}


def clamp_data(session: Session) -> Returned:
    model, optimizer = joined(session)
    model.second.weight.data.clamp_(-0.001, 0.001)
    optimizer.step()
    return {}


def replace_data(session: Session) -> Returned:
    model, optimizer = joined(session)
    model.second.weight.data = model.second.weight.data + 1
    optimizer.step()
    return {}


def load_weights_late(session: Session) -> Returned:
    model, optimizer = joined(session)
    model.load_state_dict(Net().state_dict())
    optimizer.step()
    return {}


def negative_samples(session: Session) -> Returned:
    _, optimizer = joined(session)
    optimizer.step(samples=-1)
    return {}


def early_scheduler(session: Session) -> Returned:
    session.scheduler(lambda optimizer: lr_scheduler.ConstantLR(optimizer))
    return {}


def second_optimizer(session: Session) -> Returned:
    model, _ = joined(session)
    session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    return {}


def iterable_dataset(session: Session) -> Returned:
    joined(session)
    session.loader(Stream())
    return {}


def empty_dataset(session: Session) -> Returned:
    joined(session)
    session.loader(TensorDataset(torch.zeros(0, 7)))
    return {}


def with_optimizer(session: Session, name: str) -> Returned:
    model = nn.Linear(3, 3, bias=False)
    kind = ThirdParty if name == "ThirdParty" else getattr(torch.optim, name)
    session.optimizer(kind(model.parameters(), lr=LR), model)
    return {}


def lbfgs(session: Session) -> Returned:
    return with_optimizer(session, "LBFGS")


def muon(session: Session) -> Returned:
    return with_optimizer(session, "Muon")


def adafactor(session: Session) -> Returned:
    return with_optimizer(session, "Adafactor")


def third_party(session: Session) -> Returned:
    return with_optimizer(session, "ThirdParty")


def stray_parameter(session: Session) -> Returned:
    model, other = Net(), nn.Linear(2, 5)
    session.optimizer(torch.optim.SGD([*model.parameters(), *other.parameters()], lr=LR), model)
    return {}


def nothing_to_train(session: Session) -> Returned:
    model = Net().requires_grad_(False)
    session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    return {}


MID_RUN: dict[Case, list[str]] = {
    sparse_gradients: ["sparse=False"],
    another_group: ["add_param_group", "before session.optimizer"],
    unfreeze: ["unfrozen", "before session.optimizer"],
    copy_into: ["second.weight", "changed between steps", "before session.optimizer"],
    clamp_data: ["second.weight", "changed between steps", "before session.optimizer"],
    replace_data: ["second.weight", "changed between steps", "before session.optimizer"],
    load_weights_late: ["changed between steps", "before session.optimizer"],
    negative_samples: ["samples=…", "got -1.0", "give 0, or a number from"],
    second_optimizer: ["called twice"],
    iterable_dataset: ["map-style", "session.rank", "step(samples=n)"],
    empty_dataset: ["empty"],
}
AT_THE_START: dict[Case, list[str]] = {
    lbfgs: ["LBFGS", "Use one of", "AdamW"],
    muon: ["Muon", "Use one of"],
    adafactor: ["Adafactor", "Use one of"],
    third_party: ["ThirdParty", "Use one of"],
    stray_parameter: ["[5, 2]", "session.optimizer the module that holds all"],
    early_scheduler: ["before session.scheduler"],
    nothing_to_train: ["requires a gradient", "nothing to train"],
}


@pytest.mark.parametrize("case", [*MID_RUN, *AT_THE_START])
def test_a_session_alone_refuses(case: Case) -> None:
    with pytest.raises(SystemExit) as caught:
        run_alone(case)
    assert caught.value.code == 2
    error = caught.value.__cause__
    assert isinstance(error, UsageError)
    for words in {**MID_RUN, **AT_THE_START}[case]:
        assert words in str(error)


@pytest.mark.parametrize("case", MID_RUN)
def test_a_worker_refuses(cluster: Cluster, case: Case) -> None:
    errors = cluster.run_failing(case)
    own = [error for error in errors if error.startswith("UsageError")]
    told = [error for error in errors if error.startswith("JobFailedError: worker")]
    assert own
    assert len(own) + len(told) == len(errors), errors
    for words in MID_RUN[case]:
        assert all(words in error for error in errors), errors
