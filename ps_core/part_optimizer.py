"""torch.optim on the slices of one part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ps_core.errors import MismatchError, ProtocolError
from ps_core.optim_spec import (
    SCALAR_STATE,
    Hyperparameters,
    OptimizerSpec,
    build,
    local_hyperparameters,
    take_step,
)
from ps_core.plan import Part


class PartOptimizer:
    """Updates the slices of a part in place, each as if it were a parameter of its own.

    Exact because every optimizer in the table is elementwise. A slice without a gradient is skipped
    as torch skips a parameter whose `.grad` is None: no decay, no momentum, no step count.
    """

    def __init__(self, spec: OptimizerSpec, part: Part, parameters: torch.Tensor) -> None:
        """`parameters`: the part's elements, 1-D; `step` updates them. Raises MismatchError."""
        self._spec = spec
        self._slices = [parameters[s.offset : s.offset + s.length] for s in part.slices]
        self._ranges = [slice(s.offset, s.offset + s.length) for s in part.slices]
        try:
            self._optimizer = build(spec, [(part.group, self._slices)])
        except (ValueError, TypeError, LookupError, RuntimeError) as error:
            raise MismatchError(
                f"torch.optim.{spec.name} refuses its hyperparameters: {error}"
            ) from error

    def step(
        self, gradient: torch.Tensor, present: Sequence[bool], hyperparameters: Hyperparameters
    ) -> None:
        """Apply one update. `gradient`: 1-D, the part's length and dtype; only read."""
        local = local_hyperparameters(self._spec.name, hyperparameters, self._slices)
        self._optimizer.param_groups[0].update(local)
        for parameter, elements, flag in zip(self._slices, self._ranges, present, strict=True):
            parameter.grad = gradient[elements] if flag else None
        take_step(self._optimizer)
        for parameter in self._slices:
            parameter.grad = None  # the gradient's memory belongs to a message

    def read_state(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        """(slice index, torch.optim's key, tensor) of every state tensor; the tensors are live."""
        for index, parameter in enumerate(self._slices):
            for key, value in self._optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor):
                    yield index, key, value

    def write_state(self, index: int, key: str, value: torch.Tensor) -> None:
        """Replace one state tensor, which becomes this optimizer's. Raises ProtocolError."""
        if not 0 <= index < len(self._slices):
            raise ProtocolError(f"state for slice {index} of a part with {len(self._slices)}")
        length = self._slices[index].shape
        if value.shape != (torch.Size() if key in SCALAR_STATE else length):
            raise ProtocolError(
                f"state {key} has shape {list(value.shape)} for a slice of {list(length)}"
            )
        self._optimizer.state[self._slices[index]][key] = value

    def clear_state(self) -> None:
        """Forget the state, before new state is written."""
        for parameter in self._slices:
            self._optimizer.state[parameter].clear()
