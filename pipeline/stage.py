"""One stage of a model as torch's pipelining runs it: measured, and safe to cut anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from pipeline.boundaries import Boundary, check
from pipeline.measure import Meter
from ps_core.errors import UsageError


class ModelError(Exception):
    """The model or the loss raised `cause`: the workers are not to blame."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _HandOver(torch.autograd.Function):
    """The same tensor, contiguous, as neither a leaf nor a view; its gradient contiguous.

    A stage's first layer may work in place, which a leaf forbids; torch detaches outputs in place,
    which a view forbids; and only contiguous tensors can be sent.
    """

    @staticmethod
    def forward(ctx: object, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.contiguous()


def _hand_over(tensor: torch.Tensor) -> torch.Tensor:
    apply: Callable[[torch.Tensor], torch.Tensor] = _HandOver.apply
    return apply(tensor)


class Layers(nn.Module):
    """A stage's module between its two boundaries."""

    def __init__(self, stage: int, module: nn.Module, gives: Boundary) -> None:
        super().__init__()
        self._stage = stage
        self._module = module
        self._gives = gives

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """As many rows of `gives` as there are inputs, contiguous. UsageError when the module
        gives anything else than its run on shapes did.
        """
        output = check(self._stage, self._module(_hand_over(inputs)), len(inputs))
        expected = self._gives.with_rows(len(inputs))
        if Boundary.of(output) != expected:
            raise UsageError(
                f"stage {self._stage} gives {Boundary.of(output)} where its run on shapes gave "
                f"{expected}: a pipeline needs layers that give the same shape and dtype every time"
            )
        return _hand_over(output)


class Stage(PipelineStage):
    """Torch's stage, whose computation is measured and whose errors are told apart.

    What the model raises comes out as ModelError, without torch's wrapping.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        boundaries: Sequence[Boundary],
        group: dist.ProcessGroup,
        device: torch.device,
        meter: Meter,
    ) -> None:
        """Stage `index` of as many as `boundaries` has but one; `group` is the default one now."""
        takes, gives = boundaries[index : index + 2]
        super().__init__(
            Layers(index, module, gives),
            index,
            len(boundaries) - 1,
            device,
            input_args=takes.example(),
            output_args=gives.example(),
            group=group,
        )
        self._meter = meter

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> torch.Tensor:
        with self._meter.forward(self.stage_index, fwd_chunk_id), model_errors():
            output: torch.Tensor = super().forward_one_chunk(
                fwd_chunk_id, args, kwargs, save_forward_output
            )
        outputs, inputs = self.fwd_cache[fwd_chunk_id]
        self._meter.hold(self.stage_index, fwd_chunk_id, (*inputs, *outputs))
        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: torch.Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        with self._meter.backward(self.stage_index, bwd_chunk_id), model_errors():
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if full_backward:
            self._meter.release(self.stage_index, bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        fresh = [parameter for parameter in self.submod.parameters() if parameter.grad is None]
        with self._meter.backward(self.stage_index, bwd_chunk_id), model_errors():
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        # Torch lets parameters share a first gradient, or a received buffer, and later adds to it.
        for parameter in fresh:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        self._meter.release(self.stage_index, bwd_chunk_id)


@contextmanager
def model_errors() -> Iterator[None]:
    """What is raised inside leaves as ModelError; torch's wrapping of it is taken off."""
    try:
        yield
    except Exception as error:
        wrapped = error.__cause__ if type(error) is RuntimeError else None
        raise ModelError(wrapped or error) from error
