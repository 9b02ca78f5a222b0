"""What a worker counts and times around its steps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils.hooks import RemovableHandle

from ps_core.exchange import DataLeases, Meeting, Outcome, Purpose, Work
from ps_core.leases import Lease
from ps_core.metrics import WorkerMetrics
from shardline.attendance import Attendance
from shardline.batches import Batch, Batches
from shardline.gradients import Gradients
from shardline.journal import Journal


class Steps:
    """Samples and phases of the step in progress, totals of those that are done.

    What a step weighs: see Batches. A batch that the script skips (`continue`), or whose gradients
    it throws away, has no part in the step, and its lease is given back. Gradients that outlive
    their pass keep their weight, and not their leases: those samples are others' to train on.
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
        self._batches = Batches()
        self._gradients: Gradients | None = None
        self._note_changes: Callable[[], None] | None = None
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

    def watch(
        self,
        gradients: Gradients,
        leases: DataLeases,
        note_changes: Callable[[], None] | None = None,
    ) -> None:
        """Notice backward passes; give skipped batches back. `note_changes` is called when the
        script has changed gradients before a step.
        """
        self._leases = leases
        self._gradients = gradients
        self._note_changes = note_changes
        # Not a hook on what is accumulated: zero-bubble schedules accumulate by themselves.
        self._hook = torch.autograd.graph.register_multi_grad_hook(
            gradients.parameters, self._on_backward, mode="any"
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

    def yielded(self, lease: Lease, data_seconds: float, samples: int | None = None) -> None:
        """The loader gives a batch to the script, after `data_seconds` of work for it. `samples`:
        how many the batch has, where those are not all of the lease.
        """
        now = time.perf_counter()
        self._stop_computing(now - data_seconds)  # gradients accumulate
        samples = lease.length if samples is None else samples
        self._batches.read(Batch(lease, samples, self._attendance.num_ends))
        self._yielded[lease.loader] += 1
        self._data_seconds += data_seconds
        self._batch_at = now

    def has_gradients(self, loader: int) -> bool:
        """There are gradients of this pass's batches that no step has used."""
        own = [batch for batch in self._batches.used if batch.lease.loader == loader]
        return bool(self._valid(own))

    def end_data(self, loader: int) -> bool:
        """The loader has nothing more for this worker: what the script has skipped is given back.

        False: the script only reads, to evaluate or to count. It has no use for samples that others
        leave behind, and what it has read is nobody's to train on.
        """
        self._stop_computing(time.perf_counter())
        self._batches.skip(loader)
        self._batches.end_pass()
        if not self._yielded[loader] or loader in self._stepped or self.has_gradients(loader):
            self._give_back()
            return True
        self._batches.take_skipped()
        return False

    def give_back_rest(self) -> None:
        """The pass is over: what no step has used is for others to train on."""
        self._give_back()
        self._return(self._valid(self._batches.used), declined=False)

    def drop_rest(self, loader: int) -> None:
        """The script has broken out of its pass: the lead takes back whatever no step has used."""
        self._stop_computing(time.perf_counter())
        self._batches.drop(loader)

    def _give_back(self) -> None:
        self._return(self._valid(self._batches.take_skipped()), declined=True)

    def _return(self, leases: Sequence[int], *, declined: bool) -> None:
        if leases and self._leases is not None:
            self._leases.return_leases(leases, declined=declined)

    def _valid(self, batches: Sequence[Batch]) -> tuple[int, ...]:
        """The leases that this worker still holds."""
        now = self._attendance.num_ends
        return tuple(batch.lease.id for batch in batches if batch.num_ends == now)

    # -- The optimizer's side ----------------------------------------------------------------------

    def counted(self, samples: int, weight: float | None) -> None:
        """`session.step` adds the gradients of so many samples, whose mean weighs `weight`."""
        self._drop_what_is_gone()
        self._batches.use()
        self._batches.count(samples, weight)

    def given_rows(self, rows: int) -> None:
        """The model is given so many rows, of which a backward pass may follow."""
        self._batches.see(rows)

    def backward_complete(self) -> None:
        """The gradients are as a backward pass leaves them."""
        if self._gradients is not None:
            self._gradients.leave()

    def _on_backward(self, gradient: torch.Tensor) -> None:
        """The first gradient of a backward pass, which ends the forward phase."""
        torch.autograd.Variable._execution_engine.queue_callback(self.backward_complete)
        self._use_fresh()
        if self._is_early:
            return
        self._backward_at = time.perf_counter()
        if self._batch_at:
            self._metrics.spent("forward", self._backward_at - self._batch_at)

    def _use_fresh(self) -> None:
        if self._batches.is_fresh:
            self._drop_what_is_gone()
            self._batches.use()

    def _drop_what_is_gone(self, *, is_stepping: bool = False) -> None:
        """The script may have thrown gradients away without `optimizer.zero_grad()`. Zeros that a
        step is taken with are those of a batch without any loss, clipped perhaps.
        """
        gradients = self._gradients
        if not self._batches.has_gradients or gradients is None:
            return
        if gradients.are_none() or (not is_stepping and gradients.were_zeroed()):
            self._batches.throw_away()

    def before_step(self) -> None:
        """The gradients are complete."""
        now = time.perf_counter()
        if self._backward_at:
            self._metrics.spent("backward", now - self._backward_at)
        self._stop_computing(now)
        if not self._is_early:
            self._drop_what_is_gone(is_stepping=True)
            self._note_what_was_changed()
        self._is_early = False
        self._enter_step()

    def _note_what_was_changed(self) -> None:
        if self._note_changes and self._gradients and self._gradients.were_changed():
            self._note_changes()
            self._note_changes = None

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
        """What the step is made of."""
        if not self._batches.used:
            self._use_fresh()  # its gradients were not computed by a backward pass
        taken = self._batches.take()
        self._brings_own_data = taken.brings_own_data
        self._stepped.update(batch.lease.loader for batch in taken.batches)
        data_seconds, self._data_seconds = self._data_seconds, 0.0
        compute_seconds, self._compute_seconds = self._compute_seconds, 0.0
        self._metrics.spent("data", data_seconds)
        return Work(
            samples=taken.samples,
            leases=self._valid(taken.batches),
            data_seconds=data_seconds,
            compute_seconds=compute_seconds,
            schedules=self._count_schedules(),
            point=self._attendance.point,
            given_weight=taken.given_weight,
        )

    def gradients_cleared(self) -> None:
        """The script has thrown its gradients away, or taken a step with them."""
        self._batches.throw_away()

    def after_step(self, outcome: Outcome, work: Work, exchange_seconds: float) -> None:
        """The parameters are those of `outcome.version`. Raises Preempted in a script that has no
        loader to raise it.
        """
        self._metrics.spent("exchange", exchange_seconds)
        if self._gradients is not None:
            self._gradients.forget()
        if work.leases and work.weight:
            self._batches.weighed(work.weight)
        counted = work.samples if self._counts_samples else 0
        self._metrics.finished_step(counted, applied=outcome.applied)
        if not outcome.applied and not work.weight and work.given_weight is None:
            self._metrics.nonfinite_step()
        elif not outcome.applied and work.weight:
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
