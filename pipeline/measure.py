"""Where the time of a step went, and what it held."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step of this worker, in wall seconds of its training thread.

    On a CUDA device kernels run later than they are launched: there the seconds of a stage are
    those of launching its kernels, and only `total_seconds` of many steps say what they cost.
    """

    total_seconds: float
    """The whole call, with padding, waiting for the other workers, and communication."""

    forward_seconds: Mapping[int, Sequence[float]]
    """Stage → seconds per microbatch in the stage's layers and, at the last stage, the loss."""

    backward_seconds: Mapping[int, Sequence[float]]
    """Stage → seconds per microbatch in autograd, for inputs and parameters together."""

    activation_bytes: int
    """The most bytes of stage inputs and outputs held at once for backward: those of microbatches
    between their forward and the end of their backward. Not what the layers themselves save.
    """

    @property
    def compute_seconds(self) -> float:
        """Forward and backward of all stages and microbatches on this worker."""
        spent = (*self.forward_seconds.values(), *self.backward_seconds.values())
        return sum(map(sum, spent))

    @property
    def bubble_fraction(self) -> float:
        """The part of the step in which this worker computed nothing."""
        return 1.0 - self.compute_seconds / self.total_seconds


class Meter:
    """Measures the steps of one worker, one after another."""

    def __init__(self, stages: Sequence[int], num_microbatches: int) -> None:
        self._shape = tuple(stages), num_microbatches
        self.start()

    def start(self) -> None:
        """Forget all; the step begins now."""
        stages, num_microbatches = self._shape
        self._forward = {stage: [0.0] * num_microbatches for stage in stages}
        self._backward = {stage: [0.0] * num_microbatches for stage in stages}
        self._held: dict[tuple[int, int], int] = {}
        self._peak_bytes = 0
        self._began = time.perf_counter()

    @contextmanager
    def forward(self, stage: int, microbatch: int) -> Iterator[None]:
        """What runs inside is forward computation."""
        began = time.perf_counter()
        yield
        self._forward[stage][microbatch] += time.perf_counter() - began

    @contextmanager
    def backward(self, stage: int, microbatch: int) -> Iterator[None]:
        """What runs inside is backward computation."""
        began = time.perf_counter()
        yield
        self._backward[stage][microbatch] += time.perf_counter() - began

    def hold(self, stage: int, microbatch: int, tensors: Sequence[torch.Tensor]) -> None:
        """These boundary tensors stay until `release`."""
        self._held[stage, microbatch] = sum(t.nbytes for t in tensors)
        self._peak_bytes = max(self._peak_bytes, sum(self._held.values()))

    def release(self, stage: int, microbatch: int) -> None:
        """The boundary tensors of this microbatch are needed no more."""
        del self._held[stage, microbatch]

    def stop(self) -> StepTimes:
        """The step is over."""
        return StepTimes(
            total_seconds=time.perf_counter() - self._began,
            forward_seconds=_frozen(self._forward),
            backward_seconds=_frozen(self._backward),
            activation_bytes=self._peak_bytes,
        )


def _frozen(seconds: dict[int, list[float]]) -> Mapping[int, Sequence[float]]:
    return MappingProxyType({stage: tuple(spent) for stage, spent in seconds.items()})
