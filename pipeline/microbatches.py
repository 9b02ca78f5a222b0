"""How a batch is cut into microbatches of one size, and what each counts for.

Torch's schedules want as many microbatches as they were built for, all of one shape. So a batch of
B samples becomes M microbatches of ceil(B / M) rows; the last ones are filled up with copies of the
last sample, which count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    def weight(self, microbatch: int) -> float:
        """The share of the microbatch's mean in the batch's mean."""
        return self.size(microbatch) / self.batch

    def fill(self, batch: torch.Tensor) -> torch.Tensor:
        """`batch` with M · rows rows: itself, or a copy with the last sample repeated."""
        missing = self.num_microbatches * self.rows - self.batch
        if not missing:
            return batch
        return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
