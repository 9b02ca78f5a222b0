"""What travels between stages, found without computing and without memory for data."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from ps_core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Boundary:
    """Shape (first dimension: the rows of a microbatch) and dtype of what a stage takes or gives;
    always contiguous.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> Boundary:
        return Boundary(tuple(tensor.shape), tensor.dtype)

    @property
    def has_gradient(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex

    def with_rows(self, rows: int) -> Boundary:
        return Boundary((rows, *self.shape[1:]), self.dtype)

    def example(self) -> torch.Tensor:
        """A tensor without data. Every one that can have a gradient asks for it, so that what the
        workers send each other does not depend on which parameters somebody has frozen.
        """
        return torch.empty(
            self.shape, dtype=self.dtype, device="meta", requires_grad=self.has_gradient
        )

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def check(stage: int, output: object, rows: int) -> torch.Tensor:
    """`output` if a stage may give it: UsageError unless it is one tensor with `rows` rows."""
    if not isinstance(output, torch.Tensor):
        raise UsageError(
            f"stage {stage} gives a {type(output).__name__}: what passes between layers of a "
            "pipeline must be one tensor, so join such layers into one module"
        )
    if not output.dim() or output.shape[0] != rows:
        raise UsageError(
            f"stage {stage} gives a tensor {list(output.shape)} for a batch of {rows}: what passes "
            "between layers of a pipeline must have the batch as its first dimension"
        )
    return output


def infer(
    whole: Sequence[nn.Module], own: Container[int], inputs: Boundary, device: torch.device
) -> tuple[Boundary, ...]:
    """Run `inputs` through all stages; entry k is what stage k takes, the last what the last gives.

    Stages in `own` hold real tensors on `device`, the others meta tensors. Changes nothing: no
    buffer, no random state. UsageError that names the stage which cannot be run, or gives
    something else than one tensor with the batch as its first dimension.
    """
    boundaries = [inputs]
    for stage, module in enumerate(whole):
        run = _run_fake if stage in own else _run_meta
        try:
            output = run(module, boundaries[-1], device)
        except Exception as error:
            raise UsageError(
                f"stage {stage} cannot be run on {boundaries[-1]} without values, which is how a "
                f"pipeline finds the shape of its output: {error}"
            ) from error
        boundaries.append(Boundary.of(check(stage, output, inputs.shape[0])))
    return tuple(boundaries)


def _run_fake(module: nn.Module, inputs: Boundary, device: torch.device) -> object:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # In-place updates of small buffers would go through to the real ones.
    buffers: dict[str, torch.Tensor] = {
        name: mode.from_tensor(buffer) for name, buffer in module.named_buffers()
    }
    with mode, torch.no_grad():
        example = torch.empty(inputs.shape, dtype=inputs.dtype, device=device)
        return functional_call(module, buffers, (example,))


def _run_meta(module: nn.Module, inputs: Boundary, device: torch.device) -> object:
    with torch.device("meta"), torch.no_grad():
        return module(torch.empty(inputs.shape, dtype=inputs.dtype))
