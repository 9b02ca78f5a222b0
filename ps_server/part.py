"""One part on its shard: contributions in, one weighted mean out, parameters updated."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.part_optimizer import PartOptimizer
from ps_core.plan import Part

_HALF = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True, slots=True)
class _Contribution:
    weight: float
    gradient: torch.Tensor
    present: Sequence[bool]
    """For each slice: it has a gradient."""


class PartState:
    """Parameters, optimizer state and the contributions of the update in progress.

    The weighted mean is sum(n_i * g_i) / sum(n_i). Contributions are folded in as they arrive,
    relative to the weight of the first, so that equal weights cost no multiplication and a single
    contribution is used untouched ((g * n) / n is not g). With `keep` they are kept, may be dropped
    again, and are added in rank order, weighted n_i / sum(n). Half precision is added in float32
    and rounded once.
    """

    def __init__(self, part: Part, optimizer: OptimizerSpec, *, keep: bool) -> None:
        self.part = part
        self.parameters = torch.zeros(part.length, dtype=part.dtype)
        self.optimizer = PartOptimizer(optimizer, part, self.parameters)
        self.version = 0
        self.acted: dict[int, float] = {}
        """Worker → weight (0: abstained) in the update in progress."""
        self.last_step: dict[int, int] = {}
        """The ledger: worker → last step of which this part used a contribution. It changes with
        the update.
        """
        self.awaiting: set[int] = set()
        """Workers that entered and are to be sent the part when it is next updated."""
        self._pulled: dict[int, tuple[int, torch.Tensor | None]] = {}
        self._hyperparameters: dict[int, Hyperparameters] = {}
        self._keep = keep
        self._kept: dict[int, _Contribution] = {}
        self._sum: _Contribution | None = None
        self._buffer: torch.Tensor | None = None
        self.averaged = False
        """`average` has run and `apply` has not."""
        self.mean: torch.Tensor | None = None
        """The averaged gradient meanwhile; None when every worker abstained."""

    def contribute(
        self,
        rank: int,
        weight: float,
        hyperparameters: Hyperparameters,
        present: Sequence[bool],
        gradient: torch.Tensor,
    ) -> None:
        """Take a gradient that weighs `weight` > 0: 1-D, the part's length and dtype; read until
        `apply`.
        """
        contribution = _Contribution(weight, gradient, present)
        if self._keep:
            self._kept[rank] = contribution
        else:
            self._fold(contribution)
        self.acted[rank] = weight
        self._hyperparameters[rank] = hyperparameters

    def abstain(self, rank: int) -> None:
        """Note that the worker has no gradient in this update."""
        self.acted[rank] = 0

    def note_abstention(self, rank: int, step: int) -> None:
        """The worker's step is over without an update."""
        self.last_step[rank] = step
        del self.acted[rank]

    def drop_others(self, contributors: Collection[int]) -> int:
        """With `keep`: forget what all other workers have done; how many gradients that were."""
        others = [rank for rank in self.acted if rank not in contributors]
        num_gradients = len(self._kept.keys() & others)
        for rank in others:
            del self.acted[rank]
            self._hyperparameters.pop(rank, None)
            self._kept.pop(rank, None)
        return num_gradients

    def has_used(self, rank: int, step: int) -> bool:
        """The worker's contribution of `step` is in an update, or in the sum of the next one."""
        return self.last_step.get(rank, -1) >= step or rank in self.acted

    def enter(self, rank: int, first_step: int) -> None:
        """A worker's ledger begins, or goes on, right before `first_step`."""
        self.last_step[rank] = first_step - 1
        self.awaiting.discard(rank)

    def pull(self, rank: int, *, copy: bool) -> None:
        """The worker is sent the parameters as they are now; `copy` keeps their values."""
        self._pulled[rank] = self.version, self.parameters.clone() if copy else None

    def forget(self, rank: int) -> None:
        """The worker is gone. What it contributed stays."""
        self._pulled.pop(rank, None)
        self.awaiting.discard(rank)

    def staleness(self, rank: int) -> int:
        """Updates since the worker was last sent the parameters."""
        return self.version - self._pulled.get(rank, (self.version, None))[0]

    def compensate(self, rank: int, factor: float) -> None:
        """Without `keep`: correct the only contribution, the worker's, for the updates that it did
        not know of.
        """
        version, pulled = self._pulled.get(rank, (0, None))
        if self._sum is not None and pulled is not None and version < self.version:
            corrected = compensated(self._sum.gradient, self.parameters, pulled, factor)
            self._sum = replace(self._sum, gradient=corrected)

    def average(self) -> None:
        """Turn the contributions into `mean`."""
        self.averaged = True
        if self._keep:
            self.mean = self._ordered_mean()
        elif self._sum is not None:
            total = math.fsum(self.acted.values())  # in whatever order they came
            if total != self._sum.weight:
                self._sum.gradient.mul_(self._sum.weight / total)
            self.mean = self._sum.gradient.to(self.part.dtype)

    def squares(self) -> float:
        """Sum of squares of `mean` over the slices that have a gradient (the others are zero), in
        float64.
        """
        if self.mean is None:
            return 0.0
        return float(torch.linalg.vector_norm(self.mean, dtype=torch.float64)) ** 2

    def apply(self, step: int, factor: float = 1.0) -> None:
        """Update the parameters with `mean` times `factor` and the hyperparameters of the lowest
        rank, note in the ledger that it was `step` of all who acted, and start the next version.
        """
        if self.mean is not None:
            gradient = self.mean if factor == 1.0 else self.mean * factor
            first = min(self._hyperparameters)
            self.optimizer.step(gradient, self._present(), self._hyperparameters[first])
        self.version += 1
        for rank in self.acted:
            self.last_step[rank] = max(step, self.last_step.get(rank, -1))
        self.acted.clear()
        self._hyperparameters.clear()
        self._kept.clear()
        self._sum = self.mean = None
        self.averaged = False

    def _present(self) -> list[bool]:
        """For each slice: somebody has contributed a gradient."""
        contributions = self._kept.values() if self._sum is None else (self._sum,)
        return [any(flags) for flags in zip(*(c.present for c in contributions), strict=True)]

    def _fold(self, new: _Contribution) -> None:
        if self._sum is None:
            self._sum = new
            return
        ratio = new.weight / self._sum.weight
        total = torch.add(
            _wide(self._sum.gradient), _wide(new.gradient), alpha=ratio, out=self._total()
        )
        present = [a or b for a, b in zip(self._sum.present, new.present, strict=True)]
        self._sum = _Contribution(self._sum.weight, total, present)

    def _ordered_mean(self) -> torch.Tensor | None:
        ordered = [self._kept[rank] for rank in sorted(self._kept)]
        if len(ordered) < 2:
            return ordered[0].gradient if ordered else None
        weight = math.fsum(item.weight for item in ordered)
        total = self._total().zero_()
        for item in ordered:
            total.add_(_wide(item.gradient), alpha=item.weight / weight)
        return total.to(self.part.dtype)

    def _total(self) -> torch.Tensor:
        """The buffer for sums, made when a second worker first contributes."""
        if self._buffer is None:
            self._buffer = torch.empty_like(_wide(self.parameters))
        return self._buffer


def compensated(
    gradient: torch.Tensor, parameters: torch.Tensor, pulled: torch.Tensor, factor: float
) -> torch.Tensor:
    """g + λ·g⊙g⊙(w - w_pulled): the gradient at `parameters`, estimated from the one at `pulled`
    (DC-ASGD, Zheng et al. 2017, equation 10, with constant λ = `factor`). Half precision is
    computed in float32 and rounded once.
    """
    wide, moved = _wide(gradient), _wide(parameters) - _wide(pulled)
    # g * moved first: g * g may be infinite, and is not a number where nothing has moved.
    return torch.addcmul(wide, wide * moved, wide, value=factor).to(gradient.dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor
