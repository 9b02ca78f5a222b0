"""LocalExchange: one process, no shards. Every other exchange is tested against it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from ps_core.buckets import Bucket
from ps_core.exchange import (
    Arrival,
    Farewell,
    Grant,
    Meeting,
    Outcome,
    Purpose,
    ReadExtras,
    Start,
    StateByParameter,
    Traffic,
    Work,
)
from ps_core.leases import LeaseBook, PassSpec
from ps_core.optim_spec import (
    SCALAR_STATE,
    Hyperparameters,
    OptimizerSpec,
    build,
    local_hyperparameters,
    take_step,
)
from ps_core.plan import Plan

_ALONE = 0
"""The rank of the only worker."""


class LocalExchange:
    """Runs torch.optim on the buckets, on the model's own device."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._leases = LeaseBook(striped=True)
        self._granted: deque[Grant] = deque()
        self._reading: tuple[int, PassSpec] | None = None

    def join(
        self, plan: Plan, buckets: Sequence[Bucket], optimizer: OptimizerSpec, extras: ReadExtras
    ) -> Start:
        """Keep the values as they are: there is nobody else."""
        self._spec = optimizer
        self._buckets = buckets
        self._views = {
            placement.parameter: (bucket, position)
            for bucket in buckets
            for position, placement in enumerate(bucket.layout.placements)
        }
        groups = [(index, self._group(plan, index)) for index in range(len(optimizer.groups))]
        self._optimizer = build(optimizer, [group for group in groups if group[1]])
        self._indices = [index for index, tensors in groups if tensors]
        return Start(step=0, chosen=True)

    def _group(self, plan: Plan, group: int) -> list[torch.Tensor]:
        members = (index for index, spec in enumerate(plan.parameters) if spec.group == group)
        return [self._parameter(index) for index in members]

    def _parameter(self, index: int) -> torch.Tensor:
        bucket, position = self._views[index]
        return bucket.parameter_views[position]

    def begin(self, step: int, work: Work, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Take the step's hyperparameters; without samples nothing will be applied."""
        self._samples = work.samples
        self._leases.consume(_ALONE, step, work.leases)
        for group, index in zip(self._optimizer.param_groups, self._indices, strict=True):
            group.update(
                local_hyperparameters(self._spec.name, hyperparameters[index], group["params"])
            )

    def submit(self, bucket: Bucket, step: int) -> None:
        """Give torch the bucket's gradients."""
        for parameter, gradient, present in zip(
            bucket.parameter_views, bucket.gradient_views, bucket.present, strict=True
        ):
            parameter.grad = gradient if present else None

    def settle(self, step: int) -> Outcome:
        """Apply the update."""
        if self._samples:
            if self._spec.max_grad_norm is not None:
                views = [view for bucket in self._buckets for view in bucket.parameter_views]
                torch.nn.utils.clip_grad_norm_(views, self._spec.max_grad_norm)
            take_step(self._optimizer)
        for bucket in self._buckets:
            bucket.accept()
        self._leases.settle(_ALONE)
        return Outcome(step + 1, version=step + 1, applied=self._samples > 0, staleness=0)

    def close(self, farewell: Farewell = Farewell.FINISHED, failure: str = "") -> None:
        """Nothing to leave."""

    def idle(self) -> None:
        """Nobody waits."""

    def meet(self, arrival: Arrival) -> Meeting:
        """Alone: everybody has come. What was given back is trained on before the pass ends."""
        grant: Grant | None = None
        if arrival.purpose is Purpose.EPOCH:
            if arrival.takes_leases and self._reading is not None:
                self.request_lease(*self._reading)
                grant = self.receive_lease()
            if grant is None or not grant.leases:
                grant = None
                self._leases.end_passes()
        return Meeting(arrival.step, arrival.values, chosen=True, grant=grant)

    def request_lease(self, loader: int, spec: PassSpec) -> None:
        """Take it from the book."""
        self._reading = loader, spec
        answer = self._leases.request(loader, spec, _ALONE, (_ALONE,))
        leases = () if answer.lease is None else (answer.lease,)
        self._granted.append(Grant(answer.number, leases, answer.is_over))

    def receive_lease(self) -> Grant:
        """What was taken."""
        return self._granted.popleft()

    def return_leases(self, leases: Sequence[int], *, declined: bool = False) -> None:
        """Back into the book."""
        self._leases.give_back(_ALONE, leases, declined=declined)

    def read_state(self) -> StateByParameter:
        """Copies of torch's state."""
        return {
            index: {
                key: value.clone()
                for key, value in self._optimizer.state[self._parameter(index)].items()
                if isinstance(value, torch.Tensor)
            }
            for index in self._views
        }

    def write_state(self, state: StateByParameter) -> None:
        """Replace torch's state with copies."""
        for index in self._views:
            parameter = self._parameter(index)
            self._optimizer.state[parameter] = {
                key: value.to(value.device if key in SCALAR_STATE else parameter.device, copy=True)
                for key, value in state.get(index, {}).items()
            }
