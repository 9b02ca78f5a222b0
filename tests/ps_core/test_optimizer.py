"""ExchangeOptimizer over LocalExchange: what it does itself, without shards."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from ps_core.buckets import make_buckets
from ps_core.errors import NonFiniteError, UsageError
from ps_core.exchange import Meeting, Outcome, Purpose, Work
from ps_core.extras import Extras
from ps_core.local import LocalExchange
from ps_core.optim_spec import describe
from ps_core.optimizer import ExchangeOptimizer
from ps_core.plan import ParameterSpec, make_plan


class Observed:
    def __init__(self) -> None:
        self.steps: list[tuple[Outcome, int]] = []
        self.met: list[Purpose] = []
        self.is_past = self.is_scheduled = False
        self.written: deque[tuple[float, ...]] = deque()

    def before_step(self) -> None:
        pass

    def before_backward(self) -> None:
        pass

    def take_work(self) -> Work:
        return Work(samples=3)

    def gradients_cleared(self) -> None:
        pass

    def after_step(self, outcome: Outcome, work: Work, exchange_seconds: float) -> None:
        self.steps.append((outcome, work.samples))

    def meet(self, purpose: Purpose, values: Sequence[float] = ()) -> Meeting:
        """Alone: nobody else is to come."""
        self.met.append(purpose)
        means = (1.0,) * len(values) if self.is_past else tuple(values)
        means = self.written.popleft() if values and self.written else means
        return Meeting(0, means, chosen=True, is_past=self.is_past)


def enter(
    model: nn.Linear, *, skip: bool = False, momentum: float = 0.0
) -> tuple[ExchangeOptimizer, Observed]:
    inner = torch.optim.SGD(model.parameters(), lr=0.5, momentum=momentum)
    specs = [
        ParameterSpec(name, p.dtype, tuple(p.shape), 0) for name, p in model.named_parameters()
    ]
    plan = make_plan(specs, 1, 2**20, 2**20)
    buckets = make_buckets(plan, list(model.parameters()))
    exchange, observer = LocalExchange(), Observed()
    start = exchange.join(plan, buckets, describe(inner), Extras(torch.nn.Module(), ()))
    optimizer = ExchangeOptimizer(
        inner,
        plan,
        buckets,
        exchange,
        observer,
        first_step=start.step,
        nonfinite="skip" if skip else "error",
    )
    return optimizer, observer


def give_gradients(model: nn.Linear, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_every_step_is_an_exchange_and_flush_has_nothing_left_to_do() -> None:
    model = nn.Linear(2, 1)
    optimizer, observer = enter(model)
    before = model.weight.detach().clone()
    for samples in (None, 8):
        give_gradients(model, 1.0)
        optimizer.step(samples=samples)
        optimizer.flush()
    assert torch.equal(model.weight, before - 0.5 - 0.5)
    assert observer.steps == [(Outcome(1, 1, True, 0), 3), (Outcome(2, 2, True, 0), 8)]
    assert optimizer.next_step == 2


def test_a_gradient_that_is_not_finite_is_an_error_that_names_it() -> None:
    model = nn.Linear(2, 1)
    optimizer, _ = enter(model)
    give_gradients(model, 1.0)
    optimizer.step()
    model.bias.grad = torch.full((1,), math.nan)
    message = r"the gradient of bias holds NaN or infinity at step 1: .*worker\.nonfinite to skip"
    with pytest.raises(NonFiniteError, match=message):
        optimizer.step()


def test_a_gradient_that_is_not_finite_skips_the_step_if_asked() -> None:
    model = nn.Linear(2, 1)
    optimizer, observer = enter(model, skip=True)
    before = model.weight.detach().clone()
    give_gradients(model, math.inf)
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert observer.steps == [(Outcome(1, 1, False, 0), 0)]
    assert optimizer.num_skipped == 1


def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer, observer = enter(model)
    before, calls = model.weight.detach().clone(), 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.ones(1, 2)).sum()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        loss = optimizer.step(closure, samples=8)
    assert calls == 1
    assert loss == before.sum().item()
    assert torch.equal(model.weight, before - 0.5)
    assert observer.steps == [(Outcome(1, 1, True, 0), 8)]
    assert optimizer.step() is None


def test_a_closure_under_a_grad_scaler_is_refused_as_in_plain_torch() -> None:
    model = nn.Linear(2, 1)
    optimizer, _ = enter(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    with pytest.raises(UsageError, match=r"step\(closure\) cannot be used with a GradScaler"):
        scaler.step(optimizer, lambda: 0.0)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: 0.0)


def with_momentum(optimizer: ExchangeOptimizer) -> dict[str, Any]:
    saved = optimizer.state_dict()
    saved["state"] = {0: {"momentum_buffer": torch.tensor([[3.0, 4.0]])}}
    saved["param_groups"] = [{**group, "lr": 0.125} for group in saved["param_groups"]]
    return saved


def momentum(optimizer: ExchangeOptimizer) -> list[Any]:
    state = optimizer.state_dict()["state"]
    return [entries["momentum_buffer"].tolist() for entries in state.values()]


@pytest.mark.parametrize("is_past", [False, True])
@pytest.mark.parametrize("is_scheduled", [False, True])
def test_state_is_loaded_unless_the_job_has_gone_on_from_there(
    *, is_past: bool, is_scheduled: bool
) -> None:
    optimizer, observer = enter(nn.Linear(2, 1), momentum=0.9)
    observer.is_past, observer.is_scheduled = is_past, is_scheduled
    optimizer.load_state_dict(with_momentum(optimizer))
    assert observer.met == [Purpose.LOAD] * 2
    assert momentum(optimizer) == ([] if is_past else [[[3.0, 4.0]]])
    keeps = is_past and is_scheduled
    assert optimizer.param_groups[0]["lr"] == (0.5 if keeps else 0.125)
    assert optimizer._inner.param_groups is optimizer.param_groups


def test_state_is_written_again_when_whoever_was_to_write_it_did_not_come_back() -> None:
    optimizer, observer = enter(nn.Linear(2, 1), momentum=0.9)
    observer.written = deque([(0.0,), (0.5,)])  # what all have brought, on average
    optimizer.load_state_dict(with_momentum(optimizer))
    assert observer.met == [Purpose.LOAD] * 4
    assert momentum(optimizer) == [[[3.0, 4.0]]]
