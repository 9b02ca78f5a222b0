"""Sets of positions as sorted ranges, so that their size does not matter, only their gaps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator


class Ranges:
    """A set of positions, kept as sorted ranges of which no two touch.

    Iterating gives the ranges, lowest first. Searching takes time in proportion to the logarithm of
    their number.
    """

    def __init__(self, ranges: Iterable[range] = ()) -> None:
        """`ranges`: in any order, disjoint."""
        self._ranges: list[range] = []
        for positions in ranges:
            self.add(positions)

    def __iter__(self) -> Iterator[range]:
        return iter(self._ranges)

    def __len__(self) -> int:
        """The number of positions."""
        return sum(map(len, self._ranges))

    def first(self, at_least: int = 1) -> range | None:
        """The lowest range of at least so many positions."""
        return next((known for known in self._ranges if len(known) >= at_least), None)

    def add(self, positions: range) -> None:
        """Put positions in, none of which is in the set."""
        if not positions:
            return
        start, stop = positions.start, positions.stop
        low = high = self._index_after(start)
        if low:
            assert self._ranges[low - 1].stop <= start, "already in the set"
        if high < len(self._ranges):
            assert stop <= self._ranges[high].start, "already in the set"
        if low and self._ranges[low - 1].stop == start:
            low -= 1
            start = self._ranges[low].start
        if high < len(self._ranges) and self._ranges[high].start == stop:
            stop = self._ranges[high].stop
            high += 1
        self._ranges[low:high] = [range(start, stop)]

    def remove(self, positions: range) -> None:
        """Take positions out, all of which are in the set."""
        if not positions:
            return
        index = self._index_after(positions.start) - 1
        known = self._ranges[index] if index >= 0 else range(0)
        assert positions.stop <= known.stop, "not in the set"
        rests = range(known.start, positions.start), range(positions.stop, known.stop)
        self._ranges[index : index + 1] = [rest for rest in rests if rest]

    def take_first(self, limit: int) -> range | None:
        """Take out the lowest positions: `limit`, or fewer where a gap follows. None: empty."""
        lowest = self.first()
        if lowest is None:
            return None
        taken = lowest[:limit]
        self.remove(taken)
        return taken

    def _index_after(self, position: int) -> int:
        """The index of the first range that begins after `position`."""
        return bisect_right(self._ranges, position, key=lambda known: known.start)
