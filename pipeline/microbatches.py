"""How a batch is cut into microbatches of one size, and what each counts for.

Torch's schedules want as many microbatches as they were built for, all of one shape. So a batch of
B samples becomes M microbatches of ceil(B / M) rows; the last ones are filled up with copies of the
last sample, which count for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Weight = Callable[[torch.Tensor], torch.Tensor | float]
"""Of a target: what the loss is divided by."""


@dataclass(frozen=True, slots=True)
class Cut:
    """`batch` samples in `num_microbatches` microbatches of `rows` rows; both at least 1."""

    batch: int
    num_microbatches: int

    @property
    def rows(self) -> int:
        return -(-self.batch // self.num_microbatches)

    def start(self, microbatch: int) -> int:
        """The first sample of the batch that `microbatch` holds, in its first row."""
        return min(microbatch * self.rows, self.batch)

    def size(self, microbatch: int) -> int:
        """How many samples `microbatch` holds; may be none."""
        return self.start(microbatch + 1) - self.start(microbatch)

    def shares(self, target: torch.Tensor, weight: Weight | None = None) -> list[float]:
        """The share of each microbatch's mean in the batch's mean. All are 0 in a batch that weighs
        nothing.
        """
        weigh = len if weight is None else weight
        pieces = [self._piece(target, microbatch) for microbatch in range(self.num_microbatches)]
        weights = [float(weigh(piece)) if len(piece) else 0.0 for piece in pieces]
        total = math.fsum(weights)
        return [each / total if total else 0.0 for each in weights]

    def _piece(self, rows: torch.Tensor, microbatch: int) -> torch.Tensor:
        start = self.start(microbatch)
        return rows[start : start + self.size(microbatch)]

    def fill(self, batch: torch.Tensor) -> torch.Tensor:
        """`batch` with M · rows rows: itself, or a copy with the last sample repeated."""
        missing = self.num_microbatches * self.rows - self.batch
        if not missing:
            return batch
        return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
