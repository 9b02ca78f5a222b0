"""Forward and backward of a model, whole or split, behind one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ps_core.errors import UsageError
from shardline.batch_size import num_rows
from shardline.weights import Weight, weight_of

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = Sequence[Tensor]
"""The model's inputs, and last the target."""


class TrainStep(Protocol):
    """What `session.step` returns."""

    def __call__(self, batch: Batch) -> Tensor | None:
        """Add the gradients of the batch's mean loss to the parameters' `.grad`. Returns the loss,
        without graph; None on a worker that does not have the last layers.
        """
        ...


class Counts(Protocol):
    """Notes what gradients are of."""

    def __call__(self, samples: int, weight: float | None) -> None:
        """Gradients of so many samples, whose mean weighs `weight`; None: as many."""
        ...


class WholeModel:
    """A model that this worker has all of."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        counts: Counts | None = None,
        before_backward: Callable[[], None] | None = None,
    ) -> None:
        self._model = model
        self._device = device
        self._counts = counts
        self._before_backward = before_backward

    def train(self, batch: Batch, loss_fn: Loss, weight: Weight | None) -> Tensor:
        """Forward and backward; only forward where the batch weighs nothing."""
        *inputs, target = (tensor.to(self._device) for tensor in tensors_of(batch))
        loss = loss_fn(self._model(*inputs), target)
        weighs = None if weight is None else weight_of(target, weight)
        if self._counts is not None:
            self._counts(num_rows(inputs), weighs)
        if weighs == 0:
            return loss.detach()
        if self._before_backward is not None:
            self._before_backward()
        loss.backward()
        return loss.detach()

    def evaluate(self, inputs: Sequence[Tensor]) -> Tensor:
        """Forward, without gradients."""
        with torch.no_grad():
            output: Tensor = self._model(*(tensor.to(self._device) for tensor in inputs))
        return output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In it a model that is in training mode is in evaluation mode; after it every module is in the
    mode that it was in.
    """
    modes = [(module, module.training) for module in model.modules()]
    if model.training:
        model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:  # parents first, which change their children's
            if module.training is not is_training:
                module.train(is_training)


def inputs_of(batch: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """The model's inputs, of which there may be one."""
    return (batch,) if isinstance(batch, Tensor) else tensors_of(batch)


def tensors_of(batch: Batch) -> Batch:
    """The same. Raises UsageError for a batch of anything else."""
    if not isinstance(batch, Sequence) or not all(isinstance(each, Tensor) for each in batch):
        raise UsageError(
            f"a batch of session.step is a list of tensors, the inputs and last the target, and "
            f"one of session.evaluate the inputs; this is a {_kinds(batch)}: take them out of it, "
            "or write forward and backward yourself"
        )
    return batch


def _kinds(batch: object) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        kind += f" of {', '.join(sorted({type(each).__name__ for each in batch}))}"
    return kind


def only_input(inputs: Sequence[Tensor]) -> Tensor:
    """Of a model that is split, whose layers hand one tensor to the next."""
    if len(inputs) != 1:
        raise UsageError(
            f"a model that is split takes one input, and this batch has {len(inputs)}: put them "
            "into one tensor, or train without --stages"
        )
    return inputs[0]
