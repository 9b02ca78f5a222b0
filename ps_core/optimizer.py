"""The torch.optim.Optimizer that a user holds: `step()` submits gradients and settles for
parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch

from ps_core.buckets import Bucket
from ps_core.errors import NonFiniteError, UsageError
from ps_core.exchange import (
    DataLeases,
    Exchange,
    Meeting,
    OptimizerState,
    Outcome,
    Peers,
    Purpose,
    Replica,
    StateByParameter,
    Work,
)
from ps_core.optim_spec import SCALAR_STATE, Hyperparameters, read_groups
from ps_core.overlap import Overlap
from ps_core.plan import Plan, num_stages
from ps_core.tensors import is_trained
from ps_core.weights import checked_weight


class JobExchange(Exchange, Peers, DataLeases, OptimizerState, Protocol):
    """All seams, which every strategy implements in one class."""


class StepObserver(Protocol):
    """Whoever prepares, counts and times steps."""

    def before_step(self) -> None:
        """The gradients are complete, the exchange has not begun. May wait for other workers."""
        ...

    def before_backward(self) -> None:
        """As `before_step`, of a step that begins before its backward pass."""
        ...

    def take_work(self) -> Work:
        """What stands behind the gradients."""
        ...

    def gradients_cleared(self) -> None:
        """The gradients are gone, used or not."""
        ...

    def after_step(self, outcome: Outcome, work: Work, exchange_seconds: float) -> None:
        """The parameters are those of `outcome.version`. `work` is without samples where they went
        into nothing: the gradients were not finite.
        """
        ...

    def meet(self, purpose: Purpose, values: Sequence[float] = ()) -> Meeting:
        """Wait for all workers, and take over the step that they go on with."""
        ...

    @property
    def is_scheduled(self) -> bool:
        """A `session.scheduler` acts on the hyperparameters."""
        ...


def weighed(work: Work, samples: float) -> Work:
    """The same with the weight that the script gives, which says how many samples there are where
    nothing else does.
    """
    if samples and not work.leases and samples == int(samples):
        return replace(work, samples=int(samples), given_weight=None)
    return replace(work, given_weight=samples)


def without_gradients(work: Work) -> Work:
    """The same where the gradients are not finite: the worker abstains."""
    return replace(work, samples=0, given_weight=None)


class ExchangeOptimizer(torch.optim.Optimizer):
    """Takes the place of the user's optimizer, whose parameter groups it shares; updates happen in
    the exchange.

    `state` stays empty: the state lives where the parameters are updated, and `state_dict()`
    gathers it.
    """

    _step_supports_amp_scaling = (
        True  # a GradScaler leaves the unscaling, and skipping on overflow, to step()
    )

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
        max_grad_norm: float | None = None,
        replica: Replica | None = None,
    ) -> None:
        """`buckets` hold the trained parameters of `inner` as `plan` says; the exchange has been
        joined. `max_grad_norm`: this worker's own gradient is clipped to it. `replica`: this is one
        stage of it, and such a norm is that of all stages.
        """
        self._frozen = False
        super().__init__(inner.param_groups, inner.defaults)
        self._frozen = True
        self._inner = inner
        self.param_groups = inner.param_groups
        self._plan = plan
        self._buckets = buckets
        self._exchange = exchange
        self._observer = observer
        self._nonfinite = nonfinite
        self._max_grad_norm = max_grad_norm
        self._replica = replica
        self.next_step = first_step
        """The step that the next call of `step()` takes; the version of the parameters held."""
        self.num_skipped = 0
        """Steps this worker abstained from because its gradients were not finite."""
        self._overlap = Overlap(buckets, self._hand_over)
        members = [p for group in inner.param_groups for p in group["params"]]
        self._untrained = [p for p in members if not p.requires_grad]
        self._torch_indices = [i for i, p in enumerate(members) if is_trained(p)]
        """Plan index → position among all parameters of the groups, which is how torch's state_dict
        counts.
        """

    def step(  # type: ignore[override]  # it takes samples, too
        self,
        closure: Callable[[], float] | None = None,
        *,
        samples: float | torch.Tensor | None = None,
    ) -> float | None:
        """Exchange the gradients for the next version of the parameters. Blocks until it is here.

        `closure`: computes the loss and the gradients, and is called once, before; its loss is
        returned.

        `samples`: how many samples the gradients are the mean of, their weight in the average over
        workers, which may be any number: of tokens, or the sum of class weights. With 0 this worker
        abstains: the others' update goes on without its gradients. By default what `session.loader`
        or `session.step` has counted since the last step; with other data loading every worker
        weighs the same, which is exact for mean-reduced losses of equal batches.
        """
        samples = None if samples is None else checked_weight("optimizer.step(samples=…)", samples)
        loss = None if closure is None else self._evaluate(closure)
        self._observer.before_step()
        if self._overlap.work is not None:
            self._finish_step(self._overlap.work, samples)
            return loss
        self._check_parameters()
        work = self._observer.take_work()
        self._take_step(work if samples is None else weighed(work, samples))
        return loss

    def _evaluate(self, closure: Callable[[], float]) -> float:
        self._overlap.check_closed()
        if getattr(self, "grad_scale", None) is not None:
            raise UsageError(
                "step(closure) cannot be used with a GradScaler, which has looked at the gradients "
                "before: compute them before scaler.step(optimizer)"
            )
        with torch.enable_grad():
            return closure()

    def begin_step(self) -> None:
        """Open the next step before its backward pass, in which each bucket is handed over as soon
        as its gradients are complete; `step()` follows. Does nothing where all gradients are needed
        first: with `nonfinite` skip, or a norm for this worker's own gradient.
        """
        self._overlap.check_closed()
        if self._nonfinite == "skip" or self._max_grad_norm is not None:
            return
        self._observer.before_backward()
        self._check_parameters()
        work = self._observer.take_work()
        self._exchange.begin(self.next_step, work, read_groups(self))
        self._overlap.begin(work)

    def _hand_over(self, bucket: Bucket) -> None:
        """Of a step that began before its backward pass."""
        bucket.collect()
        placement = bucket.first_nonfinite()
        if placement is not None:
            self._refuse_nonfinite("the gradient of", placement.parameter)
        self._exchange.submit(bucket, self.next_step)

    def _finish_step(self, work: Work, samples: float | None) -> None:
        if getattr(self, "grad_scale", None) is not None or samples not in (None, work.weight):
            raise UsageError(
                "with session.step(…, overlap=True) gradients are sent before step() is called: a "
                "GradScaler and step(samples=n) need overlap=False"
            )
        started = time.perf_counter()
        self._overlap.end()
        outcome = self._settle_step()
        self._observer.after_step(outcome, work, time.perf_counter() - started)

    def flush(self) -> None:
        """Exchange what steps have left for later: nothing, since every step exchanges."""
        self._overlap.check_closed()

    def _take_step(self, work: Work) -> None:
        """Exchange the gradients, and tell the observer."""
        started = time.perf_counter()
        if work.weight:
            is_finite = self._agree(self._collect())
            self._clip()
            if not is_finite:
                work = without_gradients(work)
                self.num_skipped += 1
        outcome = self._exchange_step(work, read_groups(self))
        self._observer.after_step(outcome, work, time.perf_counter() - started)

    def _exchange_step(self, work: Work, groups: Sequence[Hyperparameters]) -> Outcome:
        """Hand over the collected gradients and take the next parameters."""
        self._exchange.begin(self.next_step, work, groups)
        if work.weight:
            for bucket in reversed(self._buckets):
                self._exchange.submit(bucket, self.next_step)
        return self._settle_step()

    def _settle_step(self) -> Outcome:
        outcome = self._exchange.settle(self.next_step)
        self.next_step = outcome.next_step
        return outcome

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; samples of backward passes since the last step no longer count."""
        self._overlap.check_closed()
        super().zero_grad(set_to_none)
        self._observer.gradients_cleared()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once training has begun: the shards hold a fixed set of parameters."""
        if self._frozen:
            raise UsageError(
                "add_param_group cannot be used mid-run: give all parameters to the optimizer "
                "before session.optimizer(...)"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """torch's own format, gathered from where the state lives. Any one worker may call it,
        between its steps. Raises UsageError for a model that is split.
        """
        self._check_whole("state_dict")
        packed = super().state_dict()
        state = self._exchange.read_state()
        packed["state"] = {
            self._torch_indices[index]: dict(entries) for index, entries in state.items() if entries
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accepts what `state_dict()` of this or of the plain torch optimizer gave. Call it on
        every worker. The job of a worker that joins later has gone on from there: no state is
        replaced, and hyperparameters are unless a `session.scheduler` has brought them forward.
        """
        self._check_whole("load_state_dict")
        groups = self.param_groups
        super().load_state_dict({**state_dict, "state": {}})
        self._inner.param_groups = self.param_groups
        given = {int(key): entries for key, entries in state_dict["state"].items()}
        state = {
            index: self._own_state(index, given[position])
            for index, position in enumerate(self._torch_indices)
            if position in given
        }
        if self._write(state) and self._observer.is_scheduled:
            self._inner.param_groups = self.param_groups = groups

    def _check_whole(self, what: str) -> None:
        if num_stages(self._plan.parameters) > 1:
            raise UsageError(f"{what} needs the whole model in one place: train without --stages")

    def _write(self, state: StateByParameter) -> bool:
        """Replace the job's state, once; whoever does so may die of it, and then it is the next
        worker's turn. True: it was replaced before this worker joined.
        """
        while True:
            meeting = self._observer.meet(Purpose.LOAD)
            writes = meeting.chosen and not meeting.is_past
            if writes:
                self._exchange.write_state(state)
            written = self._observer.meet(Purpose.LOAD, [float(writes)])
            if written.means[0]:
                return written.is_past

    def _own_state(self, index: int, entries: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """A parameter's state entries with its own shape and dtype, which only "step" does not take
        (torch's rule).
        """
        spec = self._plan.parameters[index]
        own = {}
        for key, value in entries.items():
            if key == "step":
                own[key] = torch.as_tensor(value, dtype=torch.float32)
            elif isinstance(value, torch.Tensor):
                if tuple(value.shape) != (() if key in SCALAR_STATE else spec.shape):
                    raise UsageError(
                        f"{key} of parameter {spec.name} has shape {list(value.shape)} in the "
                        f"state_dict, and {list(spec.shape)} is needed: load the state of an "
                        "optimizer over the same parameters in the same order"
                    )
                own[key] = value.to(spec.dtype)
        return own

    def _collect(self) -> bool:
        """Fill the buckets; False: this worker abstains from the step."""
        factor = self._read_unscaling()
        for bucket in self._buckets:
            bucket.collect(factor)
        return not self._overflowed() and self._check_finite("the gradient of")

    def _agree(self, is_finite: bool) -> bool:
        """All stages of a replica abstain from a step, or none."""
        if self._replica is None or self._nonfinite == "error":
            return is_finite
        return all(row[0] for row in self._replica.gather([float(is_finite)]))

    def _clip(self) -> None:
        """As torch.nn.utils.clip_grad_norm_ does, over what all stages have collected."""
        if self._max_grad_norm is not None:
            flat = [bucket.gradients for bucket in self._buckets]
            norm = torch.nn.utils.get_total_norm(flat)
            if self._replica is not None:
                norms = [row[0] for row in self._replica.gather([norm.item()])]
                norm = norm.new_tensor(math.hypot(*norms))
            factor = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradients in flat:
                gradients.mul_(factor)

    def _read_unscaling(self) -> float:
        """What undoes the factor of a GradScaler that has left this to `step()`."""
        scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        return 1.0 if scale is None else 1.0 / float(scale)

    def _overflowed(self) -> bool:
        """Whether a GradScaler has found infinity."""
        return bool(float(getattr(self, "found_inf", 0.0)))

    def _check_finite(self, what: str) -> bool:
        """Whether all that the buckets have collected is finite."""
        for bucket in self._buckets:
            placement = bucket.first_nonfinite()
            if placement is not None:
                self._refuse_nonfinite(what, placement.parameter)
                return False
        return True

    def _refuse_nonfinite(self, what: str, parameter: int) -> None:
        """Raise, unless such steps are skipped."""
        if self._nonfinite == "error":
            raise NonFiniteError(
                f"{what} {self._plan.parameters[parameter].name} holds NaN or infinity at step "
                f"{self.next_step}: lower the learning rate, clip the gradients, or set "
                "worker.nonfinite to skip"
            )

    def _check_parameters(self) -> None:
        for bucket in self._buckets:
            placement = bucket.changed()
            if placement is not None:
                name = self._plan.parameters[placement.parameter].name
                raise UsageError(
                    f"parameter {name} was changed between steps: the shards hold the parameters, "
                    "so the change would be lost. Put its values back before optimizer.step(), "
                    "clamp, normalise or mask it in the model's forward instead, and load or "
                    "initialise the model before session.optimizer(...)"
                )
        if any(parameter.requires_grad for parameter in self._untrained):
            raise UsageError(
                "a frozen parameter was unfrozen mid-run: the shards hold a fixed set of "
                "parameters, so set "
                "requires_grad before session.optimizer(...)"
            )
