"""What is free in one pass, and whose it is: pure, and as cheap for 10^9 samples as for ten.

The rules, each with a test in tests/ps_core/test_lease_pool.py:

1. First come, first served: a worker gets the lowest free positions, as many as a batch has (with a
   global batch: its share of that) or fewer where the free range ends. So what came back goes out
   before what nobody has had: it does not wait for the end of the pass, where everybody would wait
   for it, and few gaps are left.
2. Stripes: the free positions are cut into units of one batch and dealt in turn, unit k to the k-th
   of the workers by rank, modulo their number. Who asks first makes no difference. A last unit of
   one position takes another from the unit before, if that is part of the same update and keeps
   two: BatchNorm, for one, cannot train on a single sample.
3. Stripes are dealt anew when the workers are others than before. What comes back in between is for
   whoever has taken all of its own units. Another worker's units never are.
4. Workers with different batch sizes cannot share stripes evenly: from the first difference on,
   the pass is first come, first served.
5. Rounds: the next samples, as many as one update has, are shared out by speed. A round lies in one
   free range, so after a failure some rounds are short. A worker takes its share of the earliest
   round in which it has one; the shares of a worker that is gone are free again.
6. A worker with a share of 0 is not part of that update and goes on with the next round. When its
   share of a round that it would open is 0, there is nothing for it: the round is left to others.
7. What a script has declined goes out last, and to another worker if there is one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Protocol

from ps_core.ranges import Ranges


@dataclass(frozen=True, slots=True)
class Asking:
    """A worker wants samples for one batch."""

    worker: int
    workers: tuple[int, ...]
    """All that share the pass, sorted; `worker` is one of them."""
    batch_size: int
    global_batch_size: int
    """Samples of one update; 0: `batch_size` each."""
    speeds: Mapping[int, float]

    @property
    def size(self) -> int:
        """The most samples that the batch can have."""
        if not self.global_batch_size:
            return self.batch_size
        return max(1, shares(self.global_batch_size, self.workers, self.speeds)[self.worker])


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions for one batch."""

    positions: range
    declined_by: int | None = None
    """The worker whose script skipped them once."""


class Dealer(Protocol):
    """Says whose the free positions of a pass are."""

    def take(self, asking: Asking) -> range | None:
        """Take positions out for a worker. None: it has none now."""

    def put_back(self, positions: range) -> None:
        """Make positions free again."""

    def free(self) -> Ranges:
        """All free positions, as a copy."""


class Pool:
    """The free positions of one pass. Rule 7."""

    def __init__(self, dealer: Dealer) -> None:
        self._dealer = dealer
        self._declined: dict[int, Ranges] = {}
        self.num_free = len(dealer.free())

    def take(self, asking: Asking) -> Piece | None:
        """Take positions out for a worker. None: it has none now."""
        positions = self._dealer.take(asking)
        piece = Piece(positions) if positions else self._second_chance(asking)
        if piece is not None:
            self.num_free -= len(piece.positions)
        return piece

    def put_back(self, piece: Piece) -> None:
        """Make positions free again."""
        self.num_free += len(piece.positions)
        if piece.declined_by is None:
            self._dealer.put_back(piece.positions)
        else:
            self._declined.setdefault(piece.declined_by, Ranges()).add(piece.positions)

    def free(self) -> Ranges:
        """All free positions, as a copy."""
        declined = (positions for ranges in self._declined.values() for positions in ranges)
        return Ranges([*self._dealer.free(), *declined])

    def _second_chance(self, asking: Asking) -> Piece | None:
        alone = len(asking.workers) == 1
        for worker, ranges in sorted(self._declined.items()):
            if alone or worker != asking.worker:
                positions = ranges.take_first(asking.size)
                if positions:
                    return Piece(positions, worker)
        return None


class FirstCome:
    """Whoever asks gets the lowest free positions. Rule 1."""

    def __init__(self, free: Iterable[range]) -> None:
        self._free = Ranges(free)

    def take(self, asking: Asking) -> range | None:
        """See Dealer."""
        return self._free.take_first(asking.size)

    def put_back(self, positions: range) -> None:
        """See Dealer."""
        self._free.add(positions)

    def free(self) -> Ranges:
        """See Dealer."""
        return Ranges(self._free)


class Stripes:
    """Every worker has units of its own. Rules 2 to 4."""

    def __init__(self, free: Iterable[range]) -> None:
        self._common = Ranges(free)
        self._deal: _Deal | None = None
        self._mixed = False

    def take(self, asking: Asking) -> range | None:
        """See Dealer."""
        self._keep_deal_right(asking)
        own = self._deal.take(asking.worker) if self._deal else None
        return own or self._common.take_first(asking.size)

    def put_back(self, positions: range) -> None:
        """See Dealer."""
        self._common.add(positions)

    def free(self) -> Ranges:
        """See Dealer."""
        return Ranges([*self._common, *(self._deal.rest() if self._deal else ())])

    def _keep_deal_right(self, asking: Asking) -> None:
        if self._mixed:
            return
        if self._deal and self._deal.unit != asking.size:
            self._common, self._deal, self._mixed = self.free(), None, True
        elif not self._deal or self._deal.workers != asking.workers:
            self._deal = _Deal(self.free(), asking.size, asking.workers)
            self._common = Ranges()


class Units:
    """Ranges cut into units, numbered by arithmetic: no list of them is made."""

    def __init__(self, free: Iterable[range], size: int, num_workers: int = 1) -> None:
        """A unit has `size` positions, or fewer where a range ends. `num_workers` units are one
        update.
        """
        self.size = size
        self._ranges = list(free)
        counts = (math.ceil(len(positions) / size) for positions in self._ranges)
        self._first_units = [0, *accumulate(counts)]
        """Number of the first unit of each range; the last entry is the number of all units."""
        self._grown = self._find_grown(num_workers)
        """The unit that takes a position from the one before; -1: none. Rule 2."""

    def __len__(self) -> int:
        return self._first_units[-1]

    def _find_grown(self, num_workers: int) -> int:
        last = len(self) - 1
        if self.size < 3 or last < 1 or not last % num_workers:
            return -1
        has_neighbour = last > self._first_units[-2]
        is_single = len(self._ranges[-1]) % self.size == 1
        return last if is_single and has_neighbour else -1

    def at(self, number: int) -> range | None:
        """Unit `number`; None: there are not so many."""
        size = self.size - (number + 1 == self._grown)
        return self._from(number)[:size] if number < len(self) else None

    def since(self, number: int) -> Iterator[range]:
        """The unit and all that follows it, as ranges."""
        if number < len(self):
            yield self._from(number)
            yield from self._ranges[self._range_index(number) + 1 :]

    def _range_index(self, number: int) -> int:
        return bisect_right(self._first_units, number) - 1

    def _from(self, number: int) -> range:
        """A unit and all that follows it in its range."""
        index = self._range_index(number)
        start = (number - self._first_units[index]) * self.size - (number == self._grown)
        return self._ranges[index][start:]


class _Deal:
    """Units dealt to workers."""

    def __init__(self, free: Iterable[range], unit: int, workers: tuple[int, ...]) -> None:
        self.unit = unit
        self.workers = workers
        self._units = Units(free, unit, len(workers))
        self._next = {worker: index for index, worker in enumerate(workers)}
        """Number of the unit that each worker takes next."""

    def take(self, worker: int) -> range | None:
        """The worker's own next unit; None when it has taken all."""
        unit = self._units.at(self._next[worker])
        if unit is not None:
            self._next[worker] += len(self.workers)
        return unit

    def rest(self) -> Ranges:
        """All that nobody has taken. Costs as many steps as workers are units apart."""
        lowest = min(self._next.values())
        highest = min(max(self._next.values()), len(self._units))
        untaken = (n for n in range(lowest, highest) if n >= self._next[self._owner(n)])
        units = (unit for n in untaken if (unit := self._units.at(n)) is not None)
        return Ranges([*units, *self._units.since(highest)])

    def _owner(self, number: int) -> int:
        return self.workers[number % len(self.workers)]


class Rounds:
    """One update's samples at a time are shared out by speed. Rules 5 and 6.

    Keeps a range for every share that was not taken yet, so its memory grows with how many updates
    the workers are apart: a bounded number where all take part in every update.
    """

    def __init__(self, free: Iterable[range]) -> None:
        self._free = Ranges(free)
        self._untaken: dict[int, deque[range]] = {}

    def take(self, asking: Asking) -> range | None:
        """See Dealer."""
        self._take_back_from_absent(asking.workers)
        if not self._untaken.get(asking.worker):
            self._open_round(asking)
        own = self._untaken.get(asking.worker)
        return own.popleft() if own else None

    def put_back(self, positions: range) -> None:
        """See Dealer."""
        self._free.add(positions)

    def free(self) -> Ranges:
        """See Dealer."""
        return Ranges([*self._free, *(r for queue in self._untaken.values() for r in queue)])

    def _take_back_from_absent(self, workers: tuple[int, ...]) -> None:
        for worker in self._untaken.keys() - set(workers):
            for positions in self._untaken.pop(worker):
                self._free.add(positions)

    def _open_round(self, asking: Asking) -> None:
        # A range that is too short for everybody comes last: it would leave somebody idle.
        free = self._free.first(at_least=len(asking.workers)) or self._free.first()
        if free is None:
            return
        whole = free[: asking.global_batch_size]
        sizes = shares(len(whole), asking.workers, asking.speeds)
        if not sizes[asking.worker]:
            return
        self._free.remove(whole)
        ends = accumulate(sizes.values(), initial=0)
        for worker, (start, stop) in zip(sizes, pairwise(ends), strict=True):
            if start < stop:
                self._untaken.setdefault(worker, deque()).append(whole[start:stop])


def shares(total: int, workers: Sequence[int], speeds: Mapping[int, float]) -> dict[int, int]:
    """Split `total` samples in proportion to speed: worker → samples, in the order of `workers`.

    A worker whose speed is missing, zero or not a number counts as the mean of the known ones.
    Rounded by largest remainder, the lower rank first; everybody gets at least 1 if that is
    possible.
    """
    weights = _weights(workers, speeds)
    whole = sum(weights.values())
    quotas = {worker: total * weight / whole for worker, weight in weights.items()}
    sizes = {worker: math.floor(quota) for worker, quota in quotas.items()}
    by_remainder = sorted(workers, key=lambda worker: (sizes[worker] - quotas[worker], worker))
    for worker in by_remainder[: total - sum(sizes.values())]:
        sizes[worker] += 1
    if total >= len(workers):
        _leave_nobody_out(sizes)
    return sizes


def _weights(workers: Sequence[int], speeds: Mapping[int, float]) -> dict[int, Fraction]:
    """Fractions, because sums of floats depend on their order and may overflow."""
    known = {w: Fraction(speeds[w]) for w in workers if 0 < speeds.get(w, 0) < math.inf}
    mean = sum(known.values()) / Fraction(len(known)) if known else Fraction(1)
    return {worker: known.get(worker, mean) for worker in workers}


def _leave_nobody_out(sizes: dict[int, int]) -> None:
    for left_out in [worker for worker, size in sizes.items() if not size]:
        largest = max(sizes, key=lambda worker: (sizes[worker], -worker))
        sizes[largest] -= 1
        sizes[left_out] += 1
