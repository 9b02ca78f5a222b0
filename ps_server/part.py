"""One part on its shard: contributions in, one weighted mean out, parameters updated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import Part
from ps_server.optimizer import PartOptimizer

_HALF = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True, slots=True)
class _Contribution:
    samples: int
    gradient: torch.Tensor


class PartState:
    """Parameters, optimizer state and the contributions of the update in progress.

    The mean over samples is sum(n_i * g_i) / sum(n_i). Contributions are folded in as they arrive,
    relative to the weight of the first, so that equal weights cost no multiplication and a single
    contribution is used untouched ((g * n) / n is not g). With `deterministic` they are kept and
    added in rank order, weighted n_i / sum(n). Half precision is added in float32 and rounded once.
    """

    def __init__(self, part: Part, optimizer: OptimizerSpec, *, deterministic: bool) -> None:
        self.part = part
        self.parameters = torch.zeros(part.length, dtype=part.dtype)
        self.optimizer = PartOptimizer(optimizer, part, self.parameters)
        self.version = 0
        self.acted: dict[int, int] = {}
        """Worker → samples (0: abstained) of the update in progress."""
        self.last_step: dict[int, int] = {}
        """The ledger: worker → last step of which this part used a contribution. It changes with
        the update.
        """
        self._deterministic = deterministic
        self._present = [False] * len(part.slices)
        self._kept: dict[int, _Contribution] = {}
        self._sum: _Contribution | None = None
        self._buffer: torch.Tensor | None = None
        self.averaged = False
        """`average` has run and `apply` has not."""
        self.mean: torch.Tensor | None = None
        """The averaged gradient meanwhile; None when every worker abstained."""

    def contribute(
        self, rank: int, step: int, samples: int, present: Sequence[bool], gradient: torch.Tensor
    ) -> None:
        """Take a gradient of `samples` > 0 samples: 1-D, the part's length and dtype; read until
        `apply`.
        """
        self.last_step[rank] = step
        self.acted[rank] = samples
        self._present = [a or b for a, b in zip(self._present, present, strict=True)]
        contribution = _Contribution(samples, gradient)
        if self._deterministic:
            self._kept[rank] = contribution
        else:
            self._fold(contribution)

    def abstain(self, rank: int, step: int) -> None:
        """Note that the worker has no gradient in this update."""
        self.last_step[rank] = step
        self.acted[rank] = 0

    def average(self) -> None:
        """Turn the contributions into `mean`."""
        self.averaged = True
        if self._deterministic:
            self.mean = self._ordered_mean()
        elif self._sum is not None:
            total = sum(self.acted.values())
            if total != self._sum.samples:
                self._sum.gradient.mul_(self._sum.samples / total)
            self.mean = self._sum.gradient.to(self.part.dtype)

    def squares(self) -> float:
        """Sum of squares of `mean` over the slices that have a gradient (the others are zero), in
        float64.
        """
        if self.mean is None:
            return 0.0
        return float(torch.linalg.vector_norm(self.mean, dtype=torch.float64)) ** 2

    def apply(self, hyperparameters: Hyperparameters, factor: float = 1.0) -> None:
        """Update the parameters with `mean` times `factor`, and start the next version."""
        if self.mean is not None:
            gradient = self.mean if factor == 1.0 else self.mean * factor
            self.optimizer.step(gradient, self._present, hyperparameters)
        self.version += 1
        self.acted.clear()
        self._kept.clear()
        self._sum = self.mean = None
        self.averaged = False
        self._present = [False] * len(self.part.slices)

    def _fold(self, new: _Contribution) -> None:
        if self._sum is None:
            self._sum = new
            return
        ratio = new.samples / self._sum.samples
        total = torch.add(
            self._wide(self._sum.gradient), self._wide(new.gradient), alpha=ratio, out=self._total()
        )
        self._sum = _Contribution(self._sum.samples, total)

    def _ordered_mean(self) -> torch.Tensor | None:
        ordered = [self._kept[rank] for rank in sorted(self._kept)]
        if len(ordered) < 2:
            return ordered[0].gradient if ordered else None
        samples = sum(item.samples for item in ordered)
        total = self._total().zero_()
        for item in ordered:
            total.add_(self._wide(item.gradient), alpha=item.samples / samples)
        return total.to(self.part.dtype)

    def _total(self) -> torch.Tensor:
        """The buffer for sums, made when a second worker first contributes."""
        if self._buffer is None:
            self._buffer = torch.empty_like(self._wide(self.parameters))
        return self._buffer

    @staticmethod
    def _wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype in _HALF else tensor
