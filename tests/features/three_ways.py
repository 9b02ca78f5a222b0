"""Scripts that run three times: with plain torch in one process, in a session alone, and on two
shards with two workers that see unequal shares of every batch. They must return the same.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shardline.session import Session
from tests.cluster import Cluster, run_alone
from tests.host import Result
from tests.reference import (
    JOB_SEED,
    SEED,
    assert_close,
    loss_of,
    samples,
)

NUM_STEPS = 12
BATCH_SIZE = 7
SIZES = (4, 3)
"""Two workers' shares of a batch."""
LR = 1e-3
Returned = Mapping[str, Any]
Scaler = torch.amp.GradScaler


class Run(Protocol):
    """All that differs between plain torch and a session in the scripts below."""

    def optimizer(
        self, plain: torch.optim.Optimizer, model: nn.Module, max_grad_norm: float | None = None
    ) -> torch.optim.Optimizer: ...

    def share(self, *tensors: Tensor) -> Sequence[Tensor]:
        """This process's rows of a batch."""
        ...

    def step(
        self, optimizer: torch.optim.Optimizer, num_samples: int, scaler: Scaler | None = None
    ) -> None: ...

    def mean(self, value: Tensor, weight: float) -> float: ...


class PlainTorch:
    """One process, whole batches, no session."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        self.norms: list[float] = []

    def optimizer(
        self, plain: torch.optim.Optimizer, model: nn.Module, max_grad_norm: float | None = None
    ) -> torch.optim.Optimizer:
        self._clipped, self._max_grad_norm = list(model.parameters()), max_grad_norm
        return plain

    def share(self, *tensors: Tensor) -> Sequence[Tensor]:
        return tensors

    def step(
        self, optimizer: torch.optim.Optimizer, num_samples: int, scaler: Scaler | None = None
    ) -> None:
        if self._max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self._clipped, self._max_grad_norm)
            self.norms.append(float(norm))
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)

    def mean(self, value: Tensor, weight: float) -> float:
        return float(value)


class InSession:
    """One worker of a job, or a process that trains alone."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def optimizer(
        self, plain: torch.optim.Optimizer, model: nn.Module, max_grad_norm: float | None = None
    ) -> torch.optim.Optimizer:
        return self._session.optimizer(plain, model, max_grad_norm=max_grad_norm)

    def share(self, *tensors: Tensor) -> Sequence[Tensor]:
        session = self._session
        return [tensor.tensor_split(session.world_size)[session.rank] for tensor in tensors]

    def step(
        self, optimizer: torch.optim.Optimizer, num_samples: int, scaler: Scaler | None = None
    ) -> None:
        if scaler is None:
            optimizer.step(samples=num_samples)  # type: ignore[call-overload]  # a session's optimizer
        else:
            scaler.step(optimizer, samples=num_samples)

    def mean(self, value: Tensor, weight: float) -> float:
        return self._session.mean(value, weight)


Script = Callable[..., Returned]
"""Takes a `Run`, and arguments that JSON can hold."""


def run_script(session: Session, *, script: str, arguments: Mapping[str, Any]) -> Returned:
    """The case of every script: a worker calls it by its name."""
    module, _, name = script.partition(":")
    function: Script = getattr(importlib.import_module(module), name)
    return function(InSession(session), **arguments)


def check(
    cluster: Cluster,
    script: Script,
    *,
    tolerance: float = 1e-10,
    num_shards: int = 2,
    **arguments: Any,  # noqa: ANN401 - JSON
) -> tuple[PlainTorch, list[Result]]:
    """The script must return the same in plain torch, alone and on every worker of a job."""
    plain = PlainTorch()
    expected = script(plain, **arguments)
    tensors = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in expected.items() if name not in tensors}
    call: dict[str, Any] = {
        "script": f"{script.__module__}:{script.__name__}",
        "arguments": arguments,
        "environ": JOB_SEED,
    }
    results = [run_alone(run_script, **call)]
    results += cluster.run(run_script, num_shards=num_shards, **call)
    for who, result in zip(("alone", "worker 0", "worker 1"), results, strict=True):
        assert_close(result.tensors, tensors, tolerance, who)
        assert result.values == json.loads(json.dumps(values)), f"{who}, seed {SEED}"
    return plain, results


def train_here(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[], None] = lambda: None,
    steps: Sequence[int] = range(NUM_STEPS),
) -> None:
    """The usual loop."""
    for step in steps:
        x, y = run.share(*samples(BATCH_SIZE, step))
        optimizer.zero_grad()
        loss_of(model, (x, y)).backward()
        run.step(optimizer, len(x))
        after_step()


def with_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The model's tensors, and the optimizer's state and groups."""
    return {
        **model.state_dict(),
        **flat_state(optimizer),
        "groups": optimizer.state_dict()["param_groups"],
    }


def flat_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of `state_dict()`, named `state.<parameter>.<key>`."""
    return {
        f"state.{index}.{key}": value
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def restored_state(
    tensors: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The `state_dict()` that `with_state` has taken apart."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("state."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": list(groups)}


def of_the_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `with_state` took from the model."""
    return {name: value for name, value in tensors.items() if not name.startswith("state.")}
