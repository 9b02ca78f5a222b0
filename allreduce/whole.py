"""Every worker keeps the whole optimizer: gradients are added up everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from allreduce.group import Group, Pending
from allreduce.wire import Wire
from ps_core.buckets import Bucket
from ps_core.exchange import StateByParameter
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import Plan
from ps_core.updater import Updater


class GroupUpdater(Protocol):
    """The parameters and the optimizer of a job, as far as one worker has them.

    A round is `issue` for every bucket, in the same order on all workers, then `collect` and
    `update`. All raise PeerLostError; then nothing has changed but gradients.
    """

    def connect(self, group: Group) -> None:
        """From now on the others are these."""
        ...

    def issue(self, bucket: Bucket, weight: float) -> None:
        """Begin to add up a bucket's gradients times `weight`. Does not block."""
        ...

    def collect(self) -> None:
        """Wait for all that was issued."""
        ...

    def update(self, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Apply it."""
        ...

    def gather_state(self) -> StateByParameter:
        """The state of every parameter, copied. All workers call it together."""
        ...

    def write_state(self, state: StateByParameter) -> None:
        """Replace the state, or this worker's share of it, with copies."""
        ...


class Summation:
    """Buckets whose gradients are being added up, and which of them exist at all."""

    def __init__(self, plan: Plan, buckets: Sequence[Bucket], dtype: torch.dtype | None) -> None:
        self._num_parameters = len(plan.parameters)
        self._buckets = buckets
        self._dtype = dtype
        self._pending: list[tuple[Wire, list[Pending]]] = []
        self._present = torch.zeros(self._num_parameters, dtype=torch.int32)

    def connect(self, group: Group) -> None:
        """From now on the others are these."""
        self.group = group
        self._pending.clear()
        self._present.zero_()
        self.wires = {
            bucket.layout.index: Wire(bucket, self._dtype, on_device=group.is_on_device)
            for bucket in self._buckets
        }

    def load(self, bucket: Bucket, weight: float) -> Wire:
        """The bucket's wire, filled."""
        wire = self.wires[bucket.layout.index]
        wire.load(weight)
        for placement, present in zip(bucket.layout.placements, bucket.present, strict=True):
            self._present[placement.parameter] = bool(weight) and present
        return wire

    def started(self, wire: Wire, pending: list[Pending]) -> None:
        """Collectives of a wire are on their way."""
        self._pending.append((wire, pending))

    def finish(self) -> None:
        """Wait for all, and note for which parameters somebody had a gradient."""
        flags = self.group.add_up(self._present)
        for _, pending in self._pending:
            for each in pending:
                each.wait()
        flags.wait()
        for wire, _ in self._pending:
            wire.unload()
            bucket = wire.bucket
            bucket.present = [
                bool(self._present[placement.parameter]) for placement in bucket.layout.placements
            ]
        self._pending.clear()


class WholeUpdater:
    """All parameters, and the whole optimizer."""

    def __init__(
        self,
        plan: Plan,
        buckets: Sequence[Bucket],
        spec: OptimizerSpec,
        dtype: torch.dtype | None,
    ) -> None:
        self._summation = Summation(plan, buckets, dtype)
        self._updater = Updater(plan, buckets, spec)
        self._clips = spec.max_grad_norm is not None
        self._norm: torch.Tensor | None = None
        """Of the gradients of all stages, where there are several."""

    def connect(self, group: Group) -> None:
        """See GroupUpdater."""
        self._summation.connect(group)

    def issue(self, bucket: Bucket, weight: float) -> None:
        """See GroupUpdater."""
        wire = self._summation.load(bucket, weight)
        self._summation.started(wire, [self._summation.group.add_up(wire.buffer)])

    def collect(self) -> None:
        """See GroupUpdater."""
        self._summation.finish()
        self._norm = (
            self._add_up_norms() if self._clips and self._summation.group.is_split else None
        )

    def _add_up_norms(self) -> torch.Tensor:
        """`size` members have the gradients of a stage, and so its norm."""
        group, norm = self._summation.group, self._updater.norm()
        squares = norm.to("cpu", torch.float64).square()
        group.add_up_everywhere(squares).wait()
        return (squares / group.size).sqrt().to(norm)

    def update(self, hyperparameters: Sequence[Hyperparameters]) -> None:
        """See GroupUpdater. Needs nobody else."""
        self._updater.set_hyperparameters(hyperparameters)
        self._updater.step(self._norm)

    def gather_state(self) -> StateByParameter:
        """Everybody has all of it."""
        return self._updater.read_state()

    def write_state(self, state: StateByParameter) -> None:
        """See GroupUpdater."""
        self._updater.write_state(state)
