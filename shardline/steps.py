"""What a worker counts and times around its steps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle

from ps_core.exchange import DataLeases, Meeting, Outcome, Purpose, Work
from ps_core.leases import Lease
from ps_core.metrics import WorkerMetrics
from shardline.attendance import Attendance
from shardline.journal import Journal


@dataclass(frozen=True, slots=True)
class _Batch:
    """One batch of a loader."""

    lease: Lease
    num_ends: int
    """Of the attendance when it was granted; once a pass has ended its leases are void."""


class Steps:
    """Samples and phases of the step in progress, totals of those that are done.

    A step's weight is the number of samples that `session.loader` has yielded for it. A batch
    counts once a backward pass has followed it: one that the script skips (`continue`) has no part
    in the gradients, and its lease is given back with the next step. Gradients that outlive their
    pass keep their weight, and not their leases: those samples are others' to train on.
    """

    def __init__(
        self,
        metrics: WorkerMetrics,
        journal: Journal,
        attendance: Attendance,
        count_schedules: Callable[[], tuple[int, ...]],
        check_preempted: Callable[[], None],
        *,
        counts_samples: bool = True,
    ) -> None:
        """`attendance` is told about every step; `count_schedules` says how often each scheduler
        has been stepped; `check_preempted` raises Preempted. Without `counts_samples` another
        worker counts the same samples.
        """
        self._counts_samples = counts_samples
        self._metrics = metrics
        self._journal = journal
        self._attendance = attendance
        self._count_schedules = count_schedules
        self._check_preempted = check_preempted
        self._leases: DataLeases | None = None
        self._fresh: dict[int, _Batch] = {}
        """Loader → the batch that the script has now, before the backward pass."""
        self._used: list[_Batch] = []
        self._skipped: list[_Batch] = []
        self._is_early = False
        """The step in progress began before its backward pass."""
        self._brings_own_data = False
        """Of the step in progress: its gradients are of no loader's batch."""
        self._yielded: Counter[int] = Counter()
        """Loader → its batches in this pass."""
        self._stepped: set[int] = set()
        """Loaders of which a batch went into a step in this pass."""
        self._data_seconds = self._compute_seconds = 0.0
        self._batch_at = self._backward_at = 0.0
        self._hook: RemovableHandle | None = None
        self.num_steps = 0
        self.num_samples = 0

    def watch(self, parameters: Sequence[torch.nn.Parameter], leases: DataLeases) -> None:
        """Notice backward passes through any of `parameters`; give skipped batches back."""
        self._leases = leases
        # Not a hook on what is accumulated: zero-bubble schedules accumulate by themselves.
        self._hook = torch.autograd.graph.register_multi_grad_hook(
            parameters, self._on_backward, mode="any"
        )

    def close(self) -> None:
        """Stop noticing. Idempotent."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # -- The loader's side -------------------------------------------------------------------------

    def begin_pass(self, loader: int) -> None:
        """The script begins to read a loader."""
        self._yielded[loader] = 0
        self._stepped.discard(loader)

    def yielded(self, lease: Lease, data_seconds: float) -> None:
        """The loader gives a batch to the script, after `data_seconds` of work for it."""
        now = time.perf_counter()
        self._stop_computing(now - data_seconds)  # gradients accumulate
        self._skip_fresh(lease.loader)
        self._fresh[lease.loader] = _Batch(lease, self._attendance.num_ends)
        self._yielded[lease.loader] += 1
        self._data_seconds += data_seconds
        self._batch_at = now

    def has_gradients(self, loader: int) -> bool:
        """There are gradients of this pass's batches that no step has used."""
        own = [batch for batch in self._used if batch.lease.loader == loader]
        return bool(self._valid(own))

    def end_data(self, loader: int) -> bool:
        """The loader has nothing more for this worker: what the script has skipped is given back.

        False: the script only reads, to evaluate or to count. It has no use for samples that others
        leave behind, and what it has read is nobody's to train on.
        """
        self._stop_computing(time.perf_counter())
        self._skip_fresh(loader)
        if not self._yielded[loader] or loader in self._stepped or self.has_gradients(loader):
            self._give_back()
            return True
        self._skipped = []
        return False

    def give_back_rest(self) -> None:
        """The pass is over: what no step has used is for others to train on."""
        self._give_back()
        self._return(self._valid(self._used), declined=False)

    def drop_rest(self, loader: int) -> None:
        """The script has broken out of its pass: the lead takes back whatever no step has used."""
        self._stop_computing(time.perf_counter())
        self._fresh.pop(loader, None)
        self._skipped = []

    def _skip_fresh(self, loader: int) -> None:
        if loader in self._fresh:
            self._skipped.append(self._fresh.pop(loader))

    def _give_back(self) -> None:
        skipped, self._skipped = self._skipped, []
        self._return(self._valid(skipped), declined=True)

    def _return(self, leases: Sequence[int], *, declined: bool) -> None:
        if leases and self._leases is not None:
            self._leases.return_leases(leases, declined=declined)

    def _valid(self, batches: Sequence[_Batch]) -> tuple[int, ...]:
        """The leases that this worker still holds."""
        now = self._attendance.num_ends
        return tuple(batch.lease.id for batch in batches if batch.num_ends == now)

    # -- The optimizer's side ----------------------------------------------------------------------

    def _on_backward(self, gradient: torch.Tensor) -> None:
        """The first gradient of a backward pass, which ends the forward phase."""
        self._use_fresh()
        if self._is_early:
            return
        self._backward_at = time.perf_counter()
        if self._batch_at:
            self._metrics.spent("forward", self._backward_at - self._batch_at)

    def _use_fresh(self) -> None:
        self._used += self._fresh.values()
        self._fresh.clear()

    def before_step(self) -> None:
        """The gradients are complete."""
        now = time.perf_counter()
        if self._backward_at:
            self._metrics.spent("backward", now - self._backward_at)
        self._stop_computing(now)
        self._is_early = False
        self._enter_step()

    def before_backward(self) -> None:
        """The gradients are not there yet: the time that they take counts for the step after."""
        self._use_fresh()
        now = time.perf_counter()
        if self._batch_at:
            self._metrics.spent("forward", now - self._batch_at)
        self._stop_computing(now)
        self._enter_step()
        self._batch_at = self._backward_at = time.perf_counter()
        self._is_early = True

    def _enter_step(self) -> None:
        self._attendance.ensure_member()
        self._give_back()

    def take_work(self) -> Work:
        """What the step is made of; 1 sample when the script brings its own data."""
        if not self._used:
            self._use_fresh()  # its gradients were not computed by a backward pass
        used, self._used = self._used, []
        self._brings_own_data = not used
        self._stepped.update(batch.lease.loader for batch in used)
        data_seconds, self._data_seconds = self._data_seconds, 0.0
        compute_seconds, self._compute_seconds = self._compute_seconds, 0.0
        self._metrics.spent("data", data_seconds)
        return Work(
            samples=sum(batch.lease.length for batch in used) or 1,
            leases=self._valid(used),
            data_seconds=data_seconds,
            compute_seconds=compute_seconds,
            schedules=self._count_schedules(),
            point=self._attendance.point,
        )

    def gradients_cleared(self) -> None:
        """The script has thrown its gradients away, or taken a step with them."""
        self._skipped += self._used
        self._used = []

    def after_step(self, outcome: Outcome, samples: int, exchange_seconds: float) -> None:
        """The parameters are those of `outcome.version`. Raises Preempted in a script that has no
        loader to raise it.
        """
        self._metrics.spent("exchange", exchange_seconds)
        counted = samples if self._counts_samples else 0
        self._metrics.finished_step(counted, applied=outcome.applied)
        if not outcome.applied and not samples:
            self._metrics.nonfinite_step()
        elif not outcome.applied:
            self._metrics.refused_step()
        self._attendance.step_taken()
        self.num_steps += 1
        self.num_samples += counted
        self._journal.step(self._attendance.point.data_epoch, outcome.version, self.num_samples)
        if self._brings_own_data:
            self._check_preempted()

    def log(self, values: Mapping[str, float]) -> None:
        """Values of the script; its `loss` is a metric, too."""
        self._journal.log(values)
        if "loss" in values:
            self._metrics.logged_loss(values["loss"])

    def meet(self, purpose: Purpose, values: Sequence[float] = ()) -> Meeting:
        """See StepObserver."""
        return self._attendance.meet(purpose, values)

    @property
    def is_scheduled(self) -> bool:
        """See StepObserver."""
        return bool(self._count_schedules())

    def _stop_computing(self, now: float) -> None:
        """Whatever the script has done since its batch is done."""
        if self._batch_at:
            self._compute_seconds += max(0.0, now - self._batch_at)
        self._batch_at = self._backward_at = 0.0
