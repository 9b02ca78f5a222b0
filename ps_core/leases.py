"""Data leases: who trains on which samples, as a state machine without I/O, threads or a clock.

A loader reads a dataset in passes. A pass is a seeded permutation that every worker computes by
itself, so samples are named by their positions in it. The rules, each with a test in
tests/ps_core/test_leases.py:

1. A pass opens when the first worker asks for it and ends when every worker has come to its end.
   Workers agree on what it reads; only the batch size is each worker's own.
2. With drop_last the positions are a multiple of the batch size, or of the global batch size; the
   batch size is then that of the worker that opens the pass.
3. A position is free, or in one lease, or closed: applied, applied in part, or abandoned.
4. A lease is granted to one worker, which consumes it in a step. A step's leases are all applied,
   all applied in part (a part of the gradient was used and its worker is gone), or all refused.
5. What is refused, given back, or left by a worker that is gone is free again, under a new lease.
   What was applied or applied in part is never granted again.
6. What the script has declined is free once more; declined again, it is abandoned. Otherwise a
   script that always skips a short batch would never end its pass.
7. When a pass ends, what is free or granted in it is abandoned.
8. The book remembers leases that are out, and numbers of samples: nothing of a closed lease.
9. Who comes to a pass that has ended is told so, and opens no other one: a worker that has joined
   a running job passes over what the job has read before.

Which positions a worker is granted: ps_core/lease_pool.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ps_core.errors import ProtocolError, UsageError
from ps_core.lease_pool import Asking, FirstCome, Piece, Pool, Rounds, Stripes
from ps_core.point import BEGINNING, Point
from ps_core.ranges import Ranges


@dataclass(frozen=True, slots=True)
class PassSpec:
    """What a loader reads in one pass: the same on all workers, except for `batch_size`."""

    num_samples: int
    """Length of the dataset."""
    batch_size: int
    """The most samples of one lease that this worker asks for; not used with a global batch."""
    global_batch_size: int = 0
    """Samples of one update over all workers, shared out by speed; 0: `batch_size` each."""
    drop_last: bool = False
    point: Point = BEGINNING
    """Which call of the script reads this pass; without a `count`: any, the one that is open."""
    fingerprint: int = 0
    """Differs where the samples do, below 2^53; 0: unknown."""

    def __post_init__(self) -> None:
        """Raises UsageError for a size that nothing can be read with."""
        if self.num_samples < 0 or self.global_batch_size < 0:
            raise UsageError(f"a loader cannot read {self}: sizes are not negative")
        if not self.global_batch_size and self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}: give at least 1")

    @property
    def num_positions(self) -> int:
        """How many samples are read. Rule 2."""
        unit = self.global_batch_size or self.batch_size
        return self.num_samples - (self.num_samples % unit if self.drop_last else 0)


@dataclass(frozen=True, slots=True)
class Lease:
    """Positions start .. start + length of a pass, for one batch of one worker."""

    id: int
    """Unique in the job, from 1."""
    loader: int
    number: int
    """Of the loader's pass, from 0."""
    start: int
    length: int


class State(Enum):
    """What a lease has come to; all but the first two close it."""

    GRANTED = "granted"
    CONSUMED = "consumed"
    """Its worker has begun a step with it."""
    APPLIED = "applied"
    IN_PART = "applied in part"
    RETURNED = "returned"
    """Its positions are free again."""
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class PassOpened:
    """A pass has begun: positions 0 .. num_samples - dropped will be granted."""

    loader: int
    number: int
    num_samples: int
    """Length of the dataset."""
    dropped: int
    """Samples that are not read because of drop_last."""


@dataclass(frozen=True, slots=True)
class PassEnd:
    """A pass has ended."""

    loader: int
    number: int
    abandoned: tuple[tuple[int, int], ...]
    """Positions that were neither applied nor applied in part: ranges by their first position and
    the one after their last, sorted.
    """


@dataclass(frozen=True, slots=True)
class Answer:
    """To a request."""

    number: int
    """Of the loader's open pass."""
    lease: Lease | None
    """None: there is nothing for this worker now."""
    opened: PassOpened | None
    """The request has opened the pass."""
    is_over: bool = False
    """The pass had ended before."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Samples over the whole job, by what has become of them."""

    granted: int
    """In leases that are out, consumed or not."""
    applied: int
    applied_in_part: int
    returned: int
    """Came back to be granted again; counted each time."""
    abandoned: int
    open: int
    """Free, in open passes."""


@dataclass(slots=True)
class _Pass:
    number: int
    spec: PassSpec
    pool: Pool
    abandoned: Ranges = field(default_factory=Ranges)


@dataclass(slots=True)
class _Out:
    """A lease that is out."""

    lease: Lease
    worker: int
    declined_by: int | None
    state: State = State.GRANTED

    @property
    def positions(self) -> range:
        return range(self.lease.start, self.lease.start + self.lease.length)


@dataclass(frozen=True, slots=True)
class _Begun:
    """The last step that a worker has begun."""

    step: int
    lease_ids: tuple[int, ...]


_MUST_AGREE = {
    "num_samples": "give every worker the same dataset",
    "global_batch_size": "give every worker the same global_batch_size",
    "drop_last": "give every worker the same drop_last",
}


class LeaseBook:
    """The leases of one job."""

    def __init__(self, *, striped: bool) -> None:
        """`striped`: reserve every worker's own samples, so that who asks first makes no
        difference. For modes in which an update waits for all workers.
        """
        self._striped = striped
        self._passes: dict[int, _Pass] = {}
        self._num_passes: Counter[int] = Counter()
        self._ended: dict[int, Point] = {}
        """Loader → which call of the script read its last pass that has ended."""
        self._out: dict[int, _Out] = {}
        self._begun: dict[int, _Begun] = {}
        self._last_id = 0
        self._closed: Counter[State] = Counter()
        """Samples of closed leases, by what closed them."""

    def request(
        self,
        loader: int,
        spec: PassSpec,
        worker: int,
        workers: Sequence[int],
        speeds: Mapping[int, float] = {},
    ) -> Answer:
        """Grant a lease of the loader's open pass; opens one when there is none. Rules 1, 2 and 9.

        `workers`: all that share the pass, with `worker`, in any order: also those that wait at its
        end, not those that have left it. `speeds`: samples per second, where known. Raises
        UsageError when the workers do not agree on what the pass reads.
        """
        assert worker in workers
        if spec.point.count and spec.point <= self._ended.get(loader, BEGINNING):
            return Answer(0, None, None, is_over=True)
        opened = self._open(loader, spec)
        current = self._passes[loader]
        _check_same(loader, worker, spec, current.spec)
        ranks = tuple(sorted(workers))
        asking = Asking(worker, ranks, spec.batch_size, spec.global_batch_size, speeds)
        piece = current.pool.take(asking)
        lease = self._grant(loader, current.number, worker, piece) if piece else None
        return Answer(current.number, lease, opened)

    def consume(self, worker: int, step: int, lease_ids: Sequence[int]) -> None:
        """The worker has begun `step` with these leases. Rule 4.

        Repeating its last call changes nothing, whatever has become of the step since. Raises
        ProtocolError, and changes nothing, when a lease is not granted to the worker or the step
        before is not decided.
        """
        begun = _Begun(step, tuple(lease_ids))
        last = self._begun.get(worker)
        if begun == last:
            return
        if last and self.consumed_by(worker):
            raise ProtocolError(f"worker {worker} begins step {step} in the middle of {last.step}")
        if len(set(lease_ids)) < len(lease_ids):
            raise ProtocolError(f"worker {worker} begins step {step} with a lease twice")
        for out in [self._granted(worker, lease_id) for lease_id in lease_ids]:
            out.state = State.CONSUMED
        self._begun[worker] = begun

    def settle(self, worker: int) -> tuple[Lease, ...]:
        """All of the worker's gradient was used: its consumed leases are applied. Returns them."""
        return self._end_step(worker, State.APPLIED)

    def settle_in_part(self, worker: int) -> tuple[Lease, ...]:
        """Some parts of the gradient of a worker that is gone were used. Returns the leases that it
        had consumed.
        """
        return self._end_step(worker, State.IN_PART)

    def refuse(self, worker: int) -> tuple[Lease, ...]:
        """Nothing of the worker's gradient was used: its consumed leases are free again. Rule 5.
        Returns them.
        """
        return self._end_step(worker, State.RETURNED)

    def give_back(self, worker: int, lease_ids: Sequence[int], *, declined: bool) -> None:
        """Leases that no step will use are free again. Rules 5 and 6.

        A lease that is closed is ignored: its worker cannot know that it was released, or that its
        pass has ended. Raises ProtocolError, and changes nothing, for one that was never granted,
        is consumed, or is another worker's.
        """
        asked = dict.fromkeys(lease_ids)
        outs = [self._granted(worker, i) for i in asked if i in self._out or not self._existed(i)]
        for out in outs:
            again = declined and out.declined_by is not None
            if declined:
                out.declined_by = worker
            self._close(out, State.ABANDONED if again else State.RETURNED)

    def release(self, worker: int) -> None:
        """The worker is gone: what it was granted and has not consumed is free again. Rule 5.

        What it has consumed waits for `settle`, `settle_in_part` or `refuse`; until then no other
        process can begin a step under its rank.
        """
        for out in [out for out in self._out.values() if out.worker == worker]:
            if out.state is State.GRANTED:
                self._close(out, State.RETURNED)

    def consumed_by(self, worker: int) -> tuple[int, ...]:
        """The leases of the worker's step in progress."""
        begun = self._begun.get(worker)
        return tuple(i for i in begun.lease_ids if i in self._out) if begun else ()

    def end_passes(self) -> list[PassEnd]:
        """Every worker has come to the end: close all open passes. Rule 7. No lease may be
        consumed: each step has been decided.
        """
        assert all(out.state is State.GRANTED for out in self._out.values())
        ends = [self._end(loader, current) for loader, current in sorted(self._passes.items())]
        self._passes.clear()
        return ends

    def totals(self) -> Totals:
        """Where all samples are."""
        return Totals(
            granted=sum(out.lease.length for out in self._out.values()),
            applied=self._closed[State.APPLIED],
            applied_in_part=self._closed[State.IN_PART],
            returned=self._closed[State.RETURNED],
            abandoned=self._closed[State.ABANDONED],
            open=sum(current.pool.num_free for current in self._passes.values()),
        )

    def _open(self, loader: int, spec: PassSpec) -> PassOpened | None:
        if loader in self._passes:
            return None
        number = self._num_passes[loader]
        self._num_passes[loader] += 1
        self._passes[loader] = _Pass(number, spec, _make_pool(spec, striped=self._striped))
        dropped = spec.num_samples - spec.num_positions
        return PassOpened(loader, number, spec.num_samples, dropped)

    def _grant(self, loader: int, number: int, worker: int, piece: Piece) -> Lease:
        self._last_id += 1
        start, length = piece.positions.start, len(piece.positions)
        lease = Lease(self._last_id, loader, number, start, length)
        self._out[lease.id] = _Out(lease, worker, piece.declined_by)
        return lease

    def _granted(self, worker: int, lease_id: int) -> _Out:
        out = self._out.get(lease_id)
        if out is None or out.worker != worker or out.state is not State.GRANTED:
            raise ProtocolError(f"worker {worker} names lease {lease_id}, which it does not hold")
        return out

    def _existed(self, lease_id: int) -> bool:
        return 1 <= lease_id <= self._last_id

    def _end_step(self, worker: int, state: State) -> tuple[Lease, ...]:
        outs = [self._out[lease_id] for lease_id in self.consumed_by(worker)]
        return tuple(self._close(out, state) for out in outs)

    def _close(self, out: _Out, state: State) -> Lease:
        del self._out[out.lease.id]
        self._closed[state] += out.lease.length
        current = self._passes[out.lease.loader]
        if state is State.RETURNED:
            current.pool.put_back(Piece(out.positions, out.declined_by))
        elif state is State.ABANDONED:
            current.abandoned.add(out.positions)
        return out.lease

    def _end(self, loader: int, current: _Pass) -> PassEnd:
        self._ended[loader] = current.spec.point
        for out in [out for out in self._out.values() if out.lease.loader == loader]:
            self._close(out, State.ABANDONED)
        for positions in current.pool.free():
            self._closed[State.ABANDONED] += len(positions)
            current.abandoned.add(positions)
        abandoned = tuple((known.start, known.stop) for known in current.abandoned)
        return PassEnd(loader, current.number, abandoned)


def _make_pool(spec: PassSpec, *, striped: bool) -> Pool:
    positions = [range(spec.num_positions)]
    if not striped:
        return Pool(FirstCome(positions))
    return Pool(Rounds(positions) if spec.global_batch_size else Stripes(positions))


def _check_same(loader: int, worker: int, mine: PassSpec, others: PassSpec) -> None:
    for name, advice in _MUST_AGREE.items():
        value, expected = getattr(mine, name), getattr(others, name)
        if value != expected:
            raise UsageError(
                f"loader {loader} has {name}={value} on worker {worker} and {name}={expected} on "
                f"the worker that came first: {advice}"
            )
    check_fingerprints(loader, mine.fingerprint, others.fingerprint)


def check_fingerprints(loader: int, mine: int, others: int) -> None:
    """Raises UsageError for datasets that are as long, and differ."""
    if mine and others and mine != others:
        raise UsageError(
            f"loader {loader} has other samples on one worker than on another, though as many: "
            "seed, or sort, before data are split or shuffled, or do it between "
            "shardline.connect() and session.optimizer(...), where all workers draw the same"
        )
