"""The calls of a script that need the other workers, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """A call that the script makes on every worker: in the body for `data_epoch` of its `loop`-th
    `session.epochs` (0: before the first), the `count`-th of its kind, from 1.
    """

    loop: int = 0
    data_epoch: int = 0
    count: int = 0

    def __str__(self) -> str:
        """Such as: time 2 in epoch 3 of session.epochs 1."""
        return f"time {self.count} in epoch {self.data_epoch} of session.epochs {self.loop}"


BEGINNING: Final = Point()
"""Of the script, and no call in particular."""
