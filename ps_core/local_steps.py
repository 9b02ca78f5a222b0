"""Mode `local`: every worker steps on its own, and now and then all average what has changed.

DiLoCo (Douillard et al. 2023): a worker takes H inner steps with its own optimizer, then hands over
Δ = θ_global − θ_local as if it were a gradient. The shards average Δ, weighted by samples, and take
an outer step with it: SGD with Nesterov momentum. With H = 1, outer learning rate 1 and no outer
momentum this is averaging plain SGD.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from ps_core.buckets import Bucket
from ps_core.exchange import Outcome, Work
from ps_core.optim_spec import OptimizerSpec
from ps_core.optimizer import (
    ExchangeOptimizer,
    JobExchange,
    StepObserver,
    without_gradients,
)
from ps_core.plan import Plan
from ps_core.settings import ConsistencyConfig
from ps_core.tensors import is_trained


def outer_spec(config: ConsistencyConfig, num_groups: int) -> OptimizerSpec:
    """The job's optimizer: SGD, the same for all of the plan's `num_groups` parameter groups."""
    group = {
        "lr": config.outer_lr,
        "momentum": config.outer_momentum,
        "nesterov": config.outer_momentum > 0,  # torch refuses Nesterov without momentum
    }
    return OptimizerSpec("SGD", (group,) * num_groups)


class LocalStepsOptimizer(ExchangeOptimizer):
    """Takes the place of the user's optimizer, which it runs; every `local_steps` calls of `step()`
    make one exchange.

    `param_groups`, `state` and the state_dict are those of the user's optimizer, which exchanges
    neither average nor reset. A skipped inner step counts as one of the `local_steps`.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        plan: Plan,
        buckets: Sequence[Bucket],
        exchange: JobExchange,
        observer: StepObserver,
        *,
        first_step: int,
        nonfinite: Literal["error", "skip"],
        outer: OptimizerSpec,
        local_steps: int,
        max_grad_norm: float | None = None,
    ) -> None:
        """`outer`: what the exchange has been joined with. `max_grad_norm`: this worker's gradient
        is clipped to it before every inner step.
        """
        super().__init__(
            inner,
            plan,
            buckets,
            exchange,
            observer,
            first_step=first_step,
            nonfinite=nonfinite,
            max_grad_norm=max_grad_norm,
        )
        self.state = inner.state
        self._outer = outer
        self._local_steps = local_steps
        members = (p for group in inner.param_groups for p in group["params"])
        self._trained = [parameter for parameter in members if is_trained(parameter)]
        """As in the plan."""
        self._pending: list[Work] = []
        """Of the inner steps since the last exchange."""

    def begin_step(self) -> None:
        """Nothing: only some steps exchange anything, and then it is no gradient."""

    def flush(self) -> None:
        """Exchange what has been done since the last exchange, if anything. Blocks until it is
        done.
        """
        if self._pending:
            self._check_parameters()
            self._exchange_pending()

    def state_dict(self) -> dict[str, Any]:
        """That of this worker's own optimizer."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into this worker's own optimizer."""
        self._inner.load_state_dict(state_dict)
        self.param_groups, self.state = self._inner.param_groups, self._inner.state

    def _take_step(self, work: Work) -> None:
        """One inner step and, when it is due, the exchange of all since the last one."""
        if not self._pending:
            for bucket in self._buckets:
                bucket.set_anchor()
        if work.weight:
            if self._prepare_gradients():
                self._take_inner_step()
            else:
                work = without_gradients(work)
                self.num_skipped += 1
        self._pending.append(work)
        self._exchange_if_due(work)

    def _exchange_if_due(self, work: Work) -> None:
        """End an inner step, and tell the observer."""
        started = time.perf_counter()
        outcome = Outcome(self.next_step, version=self.next_step, applied=True, staleness=0)
        if len(self._pending) >= self._local_steps:
            outcome = self._exchange_pending()
        outcome = replace(outcome, applied=outcome.applied and work.weight > 0)
        self._observer.after_step(outcome, work, time.perf_counter() - started)

    @torch.no_grad()
    def _prepare_gradients(self) -> bool:
        """Unscale the gradients in place; False: the inner step is skipped."""
        if self._overflowed():
            return False
        factor = self._read_unscaling()
        gradients = {i: p.grad for i, p in enumerate(self._trained) if p.grad is not None}
        if factor != 1.0:
            for gradient in gradients.values():
                gradient.mul_(factor)
        if _all_finite(gradients.values()):
            return True
        culprit = next(i for i, gradient in gradients.items() if not _all_finite([gradient]))
        self._refuse_nonfinite("the gradient of", culprit)
        return False

    def _take_inner_step(self) -> None:
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._trained, self._max_grad_norm)
        self._inner.step()
        for bucket in self._buckets:
            bucket.accept()

    def _exchange_pending(self) -> Outcome:
        """Hand over Δ and take θ_global. A Δ that is not finite is dropped or an error, so that it
        reaches nobody else.
        """
        work, self._pending = _add(self._pending), []
        for bucket in self._buckets:
            bucket.return_to_anchor()
        if not self._check_finite("what the local steps made of"):
            work = without_gradients(work)
            self.num_skipped += 1
        return self._exchange_step(work, self._outer.groups)


def _add(works: Sequence[Work]) -> Work:
    """All as one: samples, weights and seconds are summed, leases collected, the rest is the
    latest.
    """
    is_weighed = any(work.given_weight is not None for work in works)
    return replace(
        works[-1],
        samples=sum(work.samples for work in works),
        leases=tuple(itertools.chain.from_iterable(work.leases for work in works)),
        data_seconds=sum(work.data_seconds for work in works),
        compute_seconds=sum(work.compute_seconds for work in works),
        given_weight=math.fsum(work.weight for work in works) if is_weighed else None,
    )


def _all_finite(gradients: Iterable[torch.Tensor]) -> bool:
    """One reading pass and one wait for the device: the largest magnitude is finite exactly when
    every element is.
    """
    values = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    return bool(torch.nn.utils.get_total_norm(values, math.inf).isfinite())
