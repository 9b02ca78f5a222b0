"""What became of every sample, added up from `updates.jsonl`, which the lead writes.

It has one JSON object per line. `ranges` and `abandoned` are lists of [start, stop), positions in
the order in which a pass reads its dataset:

    {"kind":"pass","loader":0,"pass":0,"num_samples":1437,"dropped":0}
    {"kind":"update","time":1.5,"loader":0,"pass":0,"version":17,"worker":1,"incarnation":"123",
     "step":16,"state":"applied","ranges":[[0,32]]}
    {"kind":"pass_end","loader":0,"pass":0,"abandoned":[[64,96]]}
    {"kind":"worker","time":1.5,"worker":1,"incarnation":"123","event":"evicted","reason":"",
     "step":16}

The state of an update is `applied` or `in_part`. Where a script brings its own data, loader and
pass are null and there are no ranges. `dropped` samples, at the end of a pass, are not read.
Unknown kinds, events and fields mean nothing here.
"""

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

_Range = tuple[int, int]
"""[start, stop)."""
_PassId = tuple[int, int]
"""Which loader, and which of its passes."""
_Stepper = tuple[int, str, _PassId | None]
"""A worker, its process, and the pass that it reads."""
_STATES: Final = ("applied", "in_part")


@dataclass(frozen=True, slots=True)
class Balance:
    """The sums. A sample is a position in a pass: the next pass has others."""

    samples_lost: int = 0  # of ended passes: neither dropped nor any of what follows
    samples_repeated: int = 0  # applied once more, in full or in part, after the first time
    samples_applied: int = 0  # different ones
    samples_applied_in_part: int = 0  # different ones, by a worker that died in the middle
    samples_abandoned: int = 0  # left over in passes that every worker broke off
    updates_duplicated: int = 0  # a worker's process, its step and pass, for the second time
    passes: int = 0  # begun
    joins: int = 0
    evictions: int = 0
    malformed_ledger_lines: int = 0


class Cover:
    """Which whole numbers are covered by ranges that were added, and how often."""

    def __init__(self, ranges: Iterable[_Range] = ()) -> None:
        self.num_added = 0  # each as often as it was added
        self._starts: list[int] = []  # of ranges that do not touch
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[_Range]:
        """The ranges, lowest first."""
        return zip(self._starts, self._stops, strict=True)

    def __len__(self) -> int:
        """How many different numbers are covered."""
        return sum(self._stops) - sum(self._starts)

    def add(self, start: int, stop: int) -> None:
        """Cover [start, stop)."""
        if start == stop:
            return
        self.num_added += stop - start
        first = bisect_left(self._stops, start)  # of those that it touches
        end = bisect_right(self._starts, stop)
        if first < end:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[end - 1])
        self._starts[first:end] = [start]
        self._stops[first:end] = [stop]

    @property
    def num_repeated(self) -> int:
        """How many additions found their number covered."""
        return self.num_added - len(self)


@dataclass(slots=True)
class _Pass:
    """What is known about one pass."""

    num_samples: int = 0
    dropped: int = 0
    has_begun: bool = False
    has_ended: bool = False
    used: Cover = field(default_factory=Cover)  # applied, in full or in part
    applied: Cover = field(default_factory=Cover)
    in_part: Cover = field(default_factory=Cover)
    abandoned: Cover = field(default_factory=Cover)

    @property
    def lost(self) -> int:
        if not (self.has_begun and self.has_ended):
            return 0
        accounted = Cover([*self.used, *self.abandoned])
        return self.num_samples - self.dropped - len(accounted)

    def use(self, state: str, ranges: Iterable[_Range]) -> None:
        """An update has used these samples, or a part of it has."""
        for start, stop in ranges:
            (self.applied if state == "applied" else self.in_part).add(start, stop)
            self.used.add(start, stop)

    def abandon(self, ranges: Iterable[_Range]) -> None:
        """The pass has ended without these."""
        self.has_ended = True
        for start, stop in ranges:
            self.abandoned.add(start, stop)


class Ledger:
    """Folds the lines of `updates.jsonl`."""

    def __init__(self) -> None:
        self._passes: dict[_PassId, _Pass] = {}
        self._steps: dict[_Stepper, Cover] = {}
        self._events: Counter[str] = Counter()
        self._num_malformed = 0

    def read(self, lines: Iterable[bytes]) -> None:
        """Take lines, in order; one without a newline at its end was never finished."""
        for line in lines:
            if line.endswith(b"\n"):
                self._add(line)

    def balance(self) -> Balance:
        """The sums so far."""
        passes = self._passes.values()
        return Balance(
            samples_lost=sum(each.lost for each in passes),
            samples_repeated=sum(each.used.num_repeated for each in passes),
            samples_applied=sum(len(each.applied) for each in passes),
            samples_applied_in_part=sum(len(each.in_part) for each in passes),
            samples_abandoned=sum(len(each.abandoned) for each in passes),
            updates_duplicated=sum(steps.num_repeated for steps in self._steps.values()),
            passes=sum(each.has_begun for each in passes),
            joins=self._events["joined"],
            evictions=self._events["evicted"],
            malformed_ledger_lines=self._num_malformed,
        )

    def _add(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            kind = entry["kind"]
            if kind == "update":
                self._update(entry)
            elif kind == "pass":
                self._begin(entry)
            elif kind == "pass_end":
                self._end(entry)
            elif kind == "worker":
                self._events[_text(entry["event"])] += 1
        except (ValueError, TypeError, LookupError):
            self._num_malformed += 1

    def _begin(self, entry: Mapping[str, Any]) -> None:
        pass_id = _pass_id(entry)
        num_samples, dropped = _count(entry["num_samples"]), _count(entry["dropped"])
        begun = self._passes.setdefault(pass_id, _Pass())
        begun.num_samples, begun.dropped, begun.has_begun = num_samples, dropped, True

    def _end(self, entry: Mapping[str, Any]) -> None:
        pass_id, abandoned = _pass_id(entry), _ranges(entry["abandoned"])
        self._passes.setdefault(pass_id, _Pass()).abandon(abandoned)

    def _update(self, entry: Mapping[str, Any]) -> None:
        pass_id = None if entry["loader"] is None else _pass_id(entry)
        stepper = _count(entry["worker"]), _text(entry["incarnation"]), pass_id
        step, state, ranges = _count(entry["step"]), entry["state"], _ranges(entry["ranges"])
        if state not in _STATES:
            raise ValueError(f"{state!r} is not the state of an update")
        self._steps.setdefault(stepper, Cover()).add(step, step + 1)
        if pass_id is not None:
            self._passes.setdefault(pass_id, _Pass()).use(state, ranges)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _pass_id(entry: Mapping[str, Any]) -> _PassId:
    return _count(entry["loader"]), _count(entry["pass"])


def _ranges(value: list[Any]) -> list[_Range]:
    ranges = [(_count(start), _count(stop)) for start, stop in value]
    if any(start > stop for start, stop in ranges):
        raise ValueError("a range ends before it starts")
    return ranges
