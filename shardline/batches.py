"""Which batches stand behind the gradients, and what they weigh. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ps_core.leases import Lease


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of a loader."""

    lease: Lease
    samples: int
    """Of the lease, without those that a collate_fn has dropped."""
    num_ends: int
    """Of the attendance when it was granted; once a pass has ended its leases are void."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What one step is made of."""

    batches: tuple[Batch, ...]
    samples: int
    given_weight: float | None
    """As in Work."""
    brings_own_data: bool
    """The gradients are of no loader's batch."""


class Batches:
    """What the script has read, by what has become of it.

    A batch counts once a backward pass has followed it. Several steps with one batch weigh the same
    each, and only the first has its leases. Rows that the model was given tell how many samples a
    step has where nothing else does, and not what it weighs: they need not be samples.
    """

    def __init__(self) -> None:
        self._fresh: dict[int, Batch] = {}
        """Loader → the batch that the script has now, before the backward pass."""
        self.used: list[Batch] = []
        self._skipped: list[Batch] = []
        self._counted: list[tuple[int, float | None]] = []
        """Samples and weight of each call of `session.step`."""
        self._weight: float | None = None
        """Of the last step with batches of the pass that the script is in."""
        self._fresh_rows = self._rows = 0

    # -- Reading -----------------------------------------------------------------------------------

    def read(self, batch: Batch) -> None:
        """The script is given a batch; it has skipped the one before if that is still fresh."""
        self.skip(batch.lease.loader)
        self._fresh[batch.lease.loader] = batch

    def skip(self, loader: int) -> None:
        """The script is done with the loader's batch."""
        if loader in self._fresh:
            self._skipped.append(self._fresh.pop(loader))

    def drop(self, loader: int) -> None:
        """The script has broken out of its pass."""
        self._fresh.pop(loader, None)
        self._skipped = []
        self._weight = None

    def end_pass(self) -> None:
        """What follows is made of other batches."""
        self._weight = None

    def see(self, rows: int) -> None:
        """The model is given so many rows."""
        self._fresh_rows = rows

    # -- Gradients ---------------------------------------------------------------------------------

    @property
    def is_fresh(self) -> bool:
        """There is something of which the next backward pass may be."""
        return bool(self._fresh or self._fresh_rows)

    @property
    def has_gradients(self) -> bool:
        """There must be some, of what was read."""
        return bool(self.used or self._counted or self._rows) and _weight(self._counted) != 0

    def use(self) -> None:
        """There are gradients of what is fresh."""
        self.used += self._fresh.values()
        self._fresh.clear()
        self._rows += self._fresh_rows
        self._fresh_rows = 0

    def count(self, samples: int, weight: float | None) -> None:
        """Gradients of so many samples are added, whose mean weighs `weight`; None: as many."""
        self._counted.append((samples, weight))

    def throw_away(self) -> None:
        """The gradients are gone."""
        self._skipped += self.used
        self._forget()

    def take_skipped(self) -> list[Batch]:
        """What the script has skipped, once."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def take(self) -> Taken:
        """A step is made of all that stands behind the gradients."""
        taken = self._taken()
        if taken.batches:
            given = taken.given_weight
            self._weight = taken.samples if given is None else given
        self._forget()
        return taken

    def weighed(self, weight: float) -> None:
        """The script has said what the step with the latest batches weighs."""
        self._weight = weight

    def _forget(self) -> None:
        self.used = []
        self._counted = []
        self._rows = 0

    def _taken(self) -> Taken:
        given = _weight(self._counted)
        if self.used:
            samples = sum(batch.samples for batch in self.used)
            return Taken(tuple(self.used), samples, given, brings_own_data=False)
        samples = sum(samples for samples, _ in self._counted)
        if self._weight is not None:
            own = samples if given is None else given
            weight = own if self._counted else self._weight
            return Taken((), 0, weight, brings_own_data=False)
        if self._counted:
            return Taken((), samples, given, brings_own_data=True)
        return Taken((), self._rows, 1.0, brings_own_data=True)


def _weight(counted: Sequence[tuple[int, float | None]]) -> float | None:
    if all(weight is None for _, weight in counted):
        return None
    return math.fsum(samples if weight is None else weight for samples, weight in counted)
