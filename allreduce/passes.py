"""Who reads which samples, as every worker computes it for itself. Pure.

The rules, each with a test in tests/allreduce/test_passes.py:

1. What is free of a pass is cut into units of one batch and dealt in turn, by rank: so the order is
   a function of what has been used and who the members are. With a global batch size a unit is one
   update, shared out by speed; the speeds are those when all last were at the same point, the end
   of the passes before or a change of members, since workers begin a pass one after the other.
2. Every worker learns which samples each update is made of, and that alone takes them from what is
   free. What a worker has drawn ahead, or its script has skipped, stays free.
3. When the members are others than before, everything that is free is dealt anew. What workers hold
   of the deal before is void, also what is behind a step that they are in the middle of.
4. When all have come to the end of their data, what is still free is dealt anew to those who want
   more of it. If nobody has used anything of such a deal, the pass ends without it.
5. Who comes to a pass that has ended is told so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from allreduce.record import Reading
from ps_core.errors import UsageError
from ps_core.exchange import Grant
from ps_core.lease_pool import Units, shares
from ps_core.leases import Lease, PassEnd, PassSpec, check_fingerprints
from ps_core.point import BEGINNING, Point
from ps_core.ranges import Ranges

_NEW_SHARE = 0.2
"""Of the newest step in a worker's mean speed."""


@dataclass(frozen=True, slots=True)
class Deal:
    """Free positions, dealt once. Rule 1."""

    units: Units
    members: tuple[int, ...]
    """Sorted; whose turn is first comes first."""
    is_shared: bool
    speeds: Mapping[int, float]

    def unit(self, member: int, number: int) -> range | None:
        """The member's `number`-th unit, which may be empty. None: there are not so many."""
        index = self.members.index(member)
        if not self.is_shared:
            return self.units.at(index + number * len(self.members))
        whole = self.units.at(number)
        if whole is None:
            return None
        sizes = shares(len(whole), self.members, self.speeds)
        start = sum(sizes[each] for each in self.members[:index])
        return whole[start : start + sizes[member]]


@dataclass(slots=True)
class Pass:
    """One loader's pass, open."""

    number: int
    num_positions: int
    unit: int
    is_shared: bool
    point: Point
    used: Ranges = field(default_factory=Ranges)
    deal: Deal | None = None
    """None: this worker is not one of those it was dealt to."""
    num_taken: int = 0
    """Of this worker's units."""
    has_progress: bool = True
    """Something was used since the free positions were last dealt to those who want more."""
    fingerprint: int = 0
    """As in PassSpec."""

    def free(self) -> list[range]:
        """What nobody has used."""
        free = Ranges([range(self.num_positions)])
        for positions in self.used:
            free.remove(positions)
        return list(iter(free))  # list(free) would make room for as many ranges as positions

    def take(self, member: int) -> range | None:
        """The next unit of a member that has any left."""
        while self.deal is not None:
            unit = self.deal.unit(member, self.num_taken)
            if unit is None:
                return None
            self.num_taken += 1
            if unit:
                return unit
        return None


class Passes:
    """The passes of one job, on one of its workers.

    All workers are told the same in the same order, and so agree; only what a worker has drawn is
    its own.
    """

    def __init__(self, me: int) -> None:
        self._me = me
        self._members: tuple[int, ...] = (me,)
        self.open: dict[int, Pass] = {}
        """By loader."""
        self.num_ended: Counter[int] = Counter()
        self.ended: dict[int, Point] = {}
        """Loader → which call of the script read its last pass that has ended."""
        self.speeds: dict[int, float] = {}
        """Samples per second of each worker."""
        self._speeds_of_deals: dict[int, float] = {}
        """As they were when all last were at the same point."""
        self._held: dict[int, Reading] = {}
        self._last_id = 0
        self._latest: tuple[int, PassSpec] | None = None

    # -- What this worker does ---------------------------------------------------------------------

    def request(self, loader: int, spec: PassSpec) -> Grant:
        """This worker's next unit. Raises UsageError when others read the pass differently."""
        self._latest = loader, spec
        if spec.point.count and spec.point <= self.ended.get(loader, BEGINNING):  # rule 5
            return Grant(0, (), is_over=True)
        current = self.open.get(loader)
        if current is None:
            unit = spec.global_batch_size or spec.batch_size
            current = self._begin(
                loader, Reading(loader, self.num_ended[loader], 0, 0, spec.num_positions, unit,
                                bool(spec.global_batch_size), spec.fingerprint), spec.point
            )  # fmt: skip
        self._check(loader, spec, current)
        current.point = spec.point
        positions = current.take(self._me)
        if positions is None:
            return Grant(current.number, ())
        return Grant(current.number, (self._hold(loader, current, positions),))

    def _hold(self, loader: int, current: Pass, positions: range) -> Lease:
        self._last_id += 1
        start, length = positions.start, len(positions)
        self._held[self._last_id] = Reading(
            loader, current.number, start, length,
            current.num_positions, current.unit, current.is_shared, current.fingerprint,
        )  # fmt: skip
        return Lease(self._last_id, loader, current.number, start, length)

    def holds(self, lease: int) -> bool:
        """Whether a lease is still good. Rule 3."""
        return lease in self._held

    def give_back(self, leases: Sequence[int]) -> None:
        """No step will use them."""
        for lease in leases:
            self._held.pop(lease, None)

    def consume(self, leases: Sequence[int]) -> list[Reading]:
        """A step is made of them; what is void is left out."""
        return [self._held.pop(lease) for lease in leases if lease in self._held]

    # -- What all workers are told -----------------------------------------------------------------

    def set_members(self, members: Sequence[int]) -> None:
        """The members are others. Rule 3."""
        self._members = tuple(sorted(members))
        self._settle()
        for current in self.open.values():
            self._deal(current, self._members)

    def use(self, readings: Iterable[Reading]) -> None:
        """An update is made of these samples. Rule 2. Raises UsageError when workers read a pass
        differently.
        """
        for each in readings:
            current = self.open.get(each.loader)
            if current is None and each.number == self.num_ended[each.loader]:
                current = self._begin(each.loader, each, BEGINNING)
            if current is not None and each.number == current.number:
                _check_same(each.loader, current, each.num_positions, each.unit, each.is_shared)
                _know(each.loader, current, each.fingerprint)
                current.used.add(each.positions)
                current.has_progress = True

    def measured(self, member: int, samples: int, seconds: float) -> None:
        """A worker has computed on so many samples for so long."""
        if samples and seconds > 0:
            speed = samples / seconds
            before = self.speeds.get(member, speed)
            self.speeds[member] = before + _NEW_SHARE * (speed - before)

    def goes_on(self, takers: Sequence[int]) -> bool:
        """All have come to the end of their data; `takers` want more of it. Rule 4."""
        left = [each for each in self.open.values() if each.has_progress and each.free()]
        if not takers or not left:
            return False
        self._settle()
        for current in self.open.values():
            current.has_progress = False
            self._deal(current, tuple(sorted(takers)))
        return True

    def more(self) -> Grant | None:
        """After `goes_on`: this worker's first unit of the loader that it reads."""
        if self._latest is None:
            return None
        grant = self.request(*self._latest)
        return grant if grant.leases else None

    def end(self) -> list[PassEnd]:
        """The passes are over, with what is left of them. Rule 4."""
        ends = []
        for loader, current in sorted(self.open.items()):
            left = tuple((each.start, each.stop) for each in current.free())
            ends.append(PassEnd(loader, current.number, left))
            self.num_ended[loader] += 1
            self.ended[loader] = current.point
        self.open.clear()
        self._settle()
        return ends

    def _settle(self) -> None:
        """All workers are at the same point: what they hold is void, and speeds of now count."""
        self._held.clear()
        self._speeds_of_deals = dict(self.speeds)

    def _begin(self, loader: int, reads: Reading, point: Point) -> Pass:
        known = reads.num_positions, reads.unit, reads.is_shared
        current = Pass(reads.number, *known, point, fingerprint=reads.fingerprint)
        self.open[loader] = current
        self._deal(current, self._members)
        return current

    def _deal(self, current: Pass, members: tuple[int, ...]) -> None:
        sharers = 1 if current.is_shared else len(members)
        units = Units(current.free(), current.unit, sharers)
        is_dealt_to = self._me in members
        deal = Deal(units, members, current.is_shared, self._speeds_of_deals)
        current.deal, current.num_taken = deal if is_dealt_to else None, 0

    def _check(self, loader: int, spec: PassSpec, current: Pass) -> None:
        unit = spec.global_batch_size or spec.batch_size
        _check_same(loader, current, spec.num_positions, unit, bool(spec.global_batch_size))
        _know(loader, current, spec.fingerprint)


def _know(loader: int, current: Pass, fingerprint: int) -> None:
    check_fingerprints(loader, fingerprint, current.fingerprint)
    current.fingerprint = current.fingerprint or fingerprint


def _check_same(loader: int, current: Pass, num_positions: int, unit: int, is_shared: bool) -> None:
    here = _reads(num_positions, unit, is_shared)
    there = _reads(current.num_positions, current.unit, current.is_shared)
    if here != there:
        raise UsageError(
            f"workers read loader {loader} differently: {here}, and {there}. With strategy "
            "allreduce give every worker the same dataset and batch_size; global_batch_size "
            "shares out updates by speed"
        )


def _reads(num_positions: int, unit: int, is_shared: bool) -> str:
    return f"{num_positions} samples in {'updates' if is_shared else 'batches'} of {unit}"
