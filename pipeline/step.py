"""Forward and backward of a model whose stages are spread over workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from pipeline.boundaries import Boundary, infer
from pipeline.forward import forward
from pipeline.group import as_default
from pipeline.measure import Meter, StepTimes
from pipeline.microbatches import Cut, Weight
from pipeline.schedule import (
    Loss,
    TorchSchedule,
    build,
    check_microbatches,
    splits_backward,
    stages_of,
    virtual_stages,
    without_dump,
    worker_of,
)
from pipeline.stage import ModelError, Stage, model_errors
from ps_core.errors import JobFailedError, ShardlineError, UsageError, in_short

_MAX_SCHEDULES: Final = 2
"""Kept ready: usually for full batches and for an epoch's last one. Each holds buffers for all that
the microbatches of a step receive.
"""

_MAX_SHAPES: Final = 8
"""Shapes of a sample for which the boundaries are remembered."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class PipelineStep:
    """One worker's part of a pipeline: batch in, gradients out.

    All workers of the group make the same calls with batches of the same shape. `last` tells where
    the time of the last training step went. An error in the middle of a call, here or elsewhere,
    ends the pipeline: messages are under way that nobody will take.

    Layers see microbatches, the last ones filled up with copies of the last sample: one that looks
    at several samples at once, such as BatchNorm, computes otherwise than on the whole batch. Hooks
    on the accumulation of a parameter's gradient run once per microbatch, and in schedules that
    split the backward pass not at all. During a call `group` is the default group of
    `torch.distributed`.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        whole: Sequence[nn.Module],
        group: dist.ProcessGroup,
        *,
        schedule: str,
        num_microbatches: int,
        device: torch.device,
    ) -> None:
        """Take this worker's place, its rank in `group`; sends nothing.

        `modules` are this worker's stages by number, on `device`; `whole` has a module for every
        stage, on the meta device where another worker holds it. Each takes and gives one tensor
        whose first dimension is the batch. UsageError where these do not fit the schedule.
        """
        num_workers, worker = group.size(), group.rank()
        check_microbatches(schedule, num_workers, num_microbatches)
        own = stages_of(schedule, worker, num_workers)
        num_stages = num_workers * virtual_stages(schedule)
        if tuple(sorted(modules)) != own or len(whole) != num_stages:
            raise UsageError(
                f"schedule {schedule!r} on {num_workers} workers has {num_stages} stages, of which "
                f"worker {worker} holds {list(own)}: got {len(whole)}, of which {sorted(modules)}"
            )
        self.last: StepTimes | None = None
        self._modules = {stage: modules[stage] for stage in own}
        self._whole = [modules.get(stage, module) for stage, module in enumerate(whole)]
        self._group = group
        self._schedule = schedule
        self._num_microbatches = num_microbatches
        self._device = device
        self._meter = Meter(own, num_microbatches)
        self._loss = _BatchLoss(num_stages - 1, device, self._meter)
        self._boundaries: dict[Boundary, tuple[Boundary, ...]] = {}
        self._schedules: dict[Boundary, TorchSchedule] = {}
        self._broken = False

    def __call__(
        self,
        inputs: torch.Tensor,
        target: torch.Tensor,
        loss_fn: Loss,
        weight: Weight | None = None,
    ) -> torch.Tensor | None:
        """Add the gradients of `loss_fn(model(inputs), target)` to the parameters' `.grad`.

        `inputs` and `target` have a row per sample, at least one; `loss_fn` gives the mean over the
        samples it sees, or over what `weight` says of their targets. Blocks until this worker's
        part is done. Returns the mean loss of the batch, without graph, on the worker with the last
        stage, None elsewhere. JobFailedError when another worker is gone, or silent for as long as
        the group waits; what the model or the loss raises comes out as it is.
        """
        self._check_step(inputs, target)
        return self._run(partial(self._train, inputs, target, loss_fn, weight))

    def evaluate(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """The model's output for `inputs`, a row per sample, without gradients.

        On the worker with the last stage, None elsewhere. Modules stay in training or evaluation
        mode as they are. Blocks and fails as a training step does.
        """
        self._check(inputs)
        return self._run(partial(self._evaluate, inputs))

    def _train(
        self, inputs: torch.Tensor, target: torch.Tensor, loss_fn: Loss, weight: Weight | None
    ) -> torch.Tensor | None:
        self._meter.start()
        cut = Cut(len(inputs), self._num_microbatches)
        taken = Boundary.of(inputs).with_rows(cut.rows)
        losses: list[torch.Tensor] = []
        numbers = torch.arange(self._num_microbatches) if self._holds_last else None
        self._loss.begin(cut, target, loss_fn, weight)
        with as_default(self._group), without_dump():
            schedule = _recent(self._schedules, taken, self._make_schedule, _MAX_SCHEDULES)
            batch = [cut.fill(inputs.detach().to(self._device))] if 0 in self._modules else []
            schedule.step(*batch, target=numbers, losses=losses, return_outputs=False)
        self._loss.end()
        self.last = self._meter.stop()
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else None

    def _evaluate(self, inputs: torch.Tensor) -> torch.Tensor | None:
        rows = Cut(len(inputs), self._num_microbatches).rows
        outputs = forward(
            self._modules,
            self._boundaries_of(Boundary.of(inputs).with_rows(rows)),
            inputs.split(rows),
            self._group,
            self._worker_of,
            self._device,
        )
        return torch.cat(outputs) if self._holds_last else None

    @property
    def _holds_last(self) -> bool:
        return len(self._whole) - 1 in self._modules

    def _worker_of(self, stage: int) -> int:
        return worker_of(self._schedule, stage, self._group.size())

    def _boundaries_of(self, taken: Boundary) -> tuple[Boundary, ...]:
        """For microbatches like `taken`; worked out for one number of rows, valid for all."""
        rows = taken.shape[0]
        make = partial(self._infer, rows)
        found = _recent(self._boundaries, taken.with_rows(0), make, _MAX_SHAPES)
        return tuple(boundary.with_rows(rows) for boundary in found)

    def _infer(self, rows: int, taken: Boundary) -> tuple[Boundary, ...]:
        return infer(self._whole, self._modules, taken.with_rows(rows), self._device)

    def _make_schedule(self, taken: Boundary) -> TorchSchedule:
        boundaries = self._boundaries_of(taken)
        for stage, boundary in enumerate(boundaries[1:-1]):
            if splits_backward(self._schedule) and not boundary.has_gradient:
                raise UsageError(
                    f"stage {stage} gives {boundary.dtype}, which has no gradient, and schedule "
                    f"{self._schedule!r} needs one: put its layers and the next into one stage"
                )
        stages = [
            Stage(module, stage, boundaries, self._group, self._device, self._meter)
            for stage, module in self._modules.items()
        ]
        return build(self._schedule, stages, self._num_microbatches, self._loss)

    def _check_step(self, inputs: torch.Tensor, target: torch.Tensor) -> None:
        self._check(inputs)
        if not target.dim() or len(target) != len(inputs):
            raise UsageError(
                f"{len(inputs)} samples with a target {list(target.shape)}: give one row per sample"
            )
        if not torch.is_grad_enabled():
            raise UsageError("a training step needs gradients: call evaluate() under no_grad()")

    def _check(self, inputs: torch.Tensor) -> None:
        if self._broken:
            raise JobFailedError(
                "an earlier call of this pipeline failed: connect again and build a new one"
            )
        if not inputs.dim() or not len(inputs):
            raise UsageError(f"inputs {list(inputs.shape)} hold no sample: give at least one row")
        if torch.is_autocast_enabled(self._device.type):
            raise UsageError(
                "torch.autocast does not reach the stages of other workers: call the pipeline "
                "outside of it, with a model of the wanted dtype"
            )

    def _run(self, call: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """`call()`; if it fails, the pipeline is broken and nobody waits for this worker."""
        self._broken = True
        try:
            result = call()
            self._broken = False
            return result
        except ModelError as error:
            failure = error.cause
        except (RuntimeError, ValueError) as error:
            failure = error if isinstance(error, ShardlineError) else self._lost(error)
        finally:
            if self._broken:
                self._schedules.clear()  # they hold what was under way, and with it sockets
                self._group.abort()
        raise failure

    def _lost(self, error: Exception) -> JobFailedError:
        """What to say when `error` comes neither from the model nor from us."""
        # Torch's own logging of an error can fail, and then hides it.
        reason = in_short(error.__context__ or error)
        failure = JobFailedError(
            f"worker {self._group.rank()} of {self._group.size()} in the pipeline lost another, "
            f"which is gone or was silent for too long (allreduce.timeout_seconds): {reason}"
        )
        # Its frames hold what was under way, and with it the sockets by which the others know.
        failure.__cause__ = error.with_traceback(None)
        return failure


class _BatchLoss:
    """The loss of each microbatch, weighted so that they add up to that of the batch."""

    def __init__(self, stage: int, device: torch.device, meter: Meter) -> None:
        self._stage = stage
        self._device = device
        self._meter = meter
        self._batch: tuple[Cut, torch.Tensor, Loss] | None = None
        self._shares: list[float] = []

    def begin(self, cut: Cut, target: torch.Tensor, loss_fn: Loss, weight: Weight | None) -> None:
        """The batch that the next calls are about."""
        self._batch = cut, target, loss_fn
        self._shares = cut.shares(target, weight)

    def end(self) -> None:
        """Let go of the batch."""
        self._batch = None

    def __call__(self, output: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """`output` of microbatch `number`, with its filling → the samples' share of the loss."""
        assert self._batch is not None
        cut, target, loss_fn = self._batch
        microbatch = int(number)
        start, size = cut.start(microbatch), cut.size(microbatch)
        with self._meter.forward(self._stage, microbatch), model_errors():
            if not self._shares[microbatch]:  # a mean over nothing is not a number
                return output[:0].sum()
            real = output if size == len(output) else output[:size]
            loss = loss_fn(real, target[start : start + size].to(self._device))
            _check_loss(loss, needs_gradient=real.requires_grad)
            return loss * self._shares[microbatch]


def _check_loss(loss: torch.Tensor, *, needs_gradient: bool) -> None:
    if not loss.dim() and (loss.requires_grad or not needs_gradient):
        return
    found = f"a tensor {list(loss.shape)}" if loss.dim() else "a number without gradient"
    raise UsageError(
        f"loss_fn gives {found}: it must give the mean over the samples, one number computed from "
        "the output"
    )


def _recent(
    kept: dict[_Key, _Value], key: _Key, make: Callable[[_Key], _Value], most: int
) -> _Value:
    """The value of `key`, made if it is not `kept`; of those the `most` last used stay."""
    value = kept.pop(key) if key in kept else make(key)
    kept[key] = value
    while len(kept) > most:
        kept.pop(next(iter(kept)))
    return value
