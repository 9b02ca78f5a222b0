"""What a worker counts and times around its steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.utils.hooks import RemovableHandle

from ps_core.exchange import Outcome
from ps_core.metrics import WorkerMetrics
from shardline.attendance import Attendance
from shardline.journal import Journal


class Steps:
    """Samples and phases of the step in progress, totals of those that are done.

    A step's weight is the number of samples that `session.loader` has yielded for it. A batch
    counts once a backward pass has followed it: one that the script skips (`continue`) has no part
    in the gradients.
    """

    def __init__(self, metrics: WorkerMetrics, journal: Journal, attendance: Attendance) -> None:
        """`attendance` is told about every step."""
        self._metrics = metrics
        self._journal = journal
        self._attendance = attendance
        self._fresh_samples = self._used_samples = 0
        self._data_seconds = 0.0
        self._batch_at = self._backward_at = 0.0
        self._hook: RemovableHandle | None = None
        self.epoch = 0
        self.num_steps = 0
        self.num_samples = 0

    def watch(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Notice backward passes through any of `parameters`."""
        self._hook = torch.autograd.graph.register_multi_grad_hook(
            parameters, self._on_backward, mode="any"
        )

    def close(self) -> None:
        """Stop noticing. Idempotent."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def yielded(self, num_samples: int, data_seconds: float) -> None:
        """The loader gives a batch to the script, after `data_seconds` of work for it."""
        self._fresh_samples = num_samples
        self._data_seconds += data_seconds
        self._batch_at, self._backward_at = time.perf_counter(), 0.0

    def _on_backward(self, gradient: torch.Tensor) -> None:
        """The first gradient of a backward pass, which ends the forward phase."""
        self._used_samples += self._fresh_samples
        self._fresh_samples = 0
        self._backward_at = time.perf_counter()
        if self._batch_at:
            self._metrics.spent("forward", self._backward_at - self._batch_at)

    def before_step(self) -> None:
        """The gradients are complete."""
        if self._backward_at:
            self._metrics.spent("backward", time.perf_counter() - self._backward_at)
        self._batch_at = self._backward_at = 0.0
        self._attendance.ensure_member()

    def take_samples(self) -> int:
        """The step's weight; 1 when the script brings its own data."""
        samples, self._used_samples = self._used_samples, 0
        return samples or 1

    def gradients_cleared(self) -> None:
        """The script has thrown its gradients away, or taken a step with them."""
        self._used_samples = 0

    def after_step(self, outcome: Outcome, samples: int, exchange_seconds: float) -> None:
        """The parameters are those of `outcome.version`."""
        self._metrics.spent("data", self._data_seconds)
        self._metrics.spent("exchange", exchange_seconds)
        self._data_seconds = 0.0
        self._metrics.finished_step(samples)
        if not outcome.applied:
            self._metrics.nonfinite_step()
        self._attendance.step_taken()
        self.num_steps += 1
        self.num_samples += samples
        self._journal.step(self.epoch, outcome.version, self.num_samples)
