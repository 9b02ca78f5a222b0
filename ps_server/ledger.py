"""What became of every sample and of every contribution, as the lead knows it: pure.

The rules, each with a test:

1. A worker's step takes the leases that its `begin` names. Its leases are applied once the worker
   names a later step as its next one, which it does when every part has been answered; nothing else
   that it says proves that. Each step is closed once.
2. A refused step gives its leases back.
3. The step that a fenced process began last is in doubt until every shard that holds parts has told
   what it used: nothing → its leases go back; everything → they are applied; something → they are
   applied in part, never granted again. A process begins no step before the one before is settled.
4. Whatever else a worker that is gone, or has broken out of its data, had been granted goes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ps_core.entries import Contribution, Entry, WorkerEvent
from ps_core.errors import ProtocolError
from ps_core.exchange import Grant
from ps_core.leases import LeaseBook, PassSpec
from ps_server.effects import Remains

_INTERRUPTED: Final = ": let the exception that has interrupted optimizer.step() end the script"


@dataclass(slots=True)
class _Step:
    """The last step that a worker has begun."""

    incarnation: int
    number: int
    samples: int
    given_weight: float | None
    version: int
    leases: tuple[int, ...]
    is_open: bool = True
    """It is neither settled nor refused."""


class Ledger:
    """The lead's book of samples and contributions."""

    def __init__(self, holders: frozenset[int], *, striped: bool) -> None:
        """`holders`: the shards that hold parts. `striped`: see LeaseBook."""
        self.book = LeaseBook(striped=striped)
        self._holders = holders
        self._steps: dict[int, _Step] = {}
        self._inquests: dict[tuple[int, int], dict[int, Remains]] = {}
        """(worker, incarnation) of a fenced process → what the shards have told, by shard."""
        self._entries: list[Entry] = []

    def take_entries(self) -> list[Entry]:
        """What was entered since the last call, in order."""
        entries, self._entries = self._entries, []
        return entries

    def note(self, event: WorkerEvent) -> None:
        """Enter that a worker has come or gone."""
        self._entries.append(event)

    # -- Steps -------------------------------------------------------------------------------------

    def begin(
        self,
        worker: int,
        incarnation: int,
        step: int,
        samples: int,
        leases: Sequence[int],
        given_weight: float | None = None,
    ) -> None:
        """Rule 1. A repeat changes nothing. Raises ProtocolError for leases of others, and for a
        step that was begun with other ones.
        """
        if self._has_begun(worker, incarnation, step):
            self._check_repeat(worker, step, leases)
            return
        self._close(worker, "applied")
        self.book.consume(worker, step, leases)
        self._steps[worker] = _Step(
            incarnation, step, samples, given_weight, step + 1, tuple(leases)
        )

    def _check_repeat(self, worker: int, step: int, leases: Sequence[int]) -> None:
        if self._steps[worker].leases != tuple(leases):
            raise ProtocolError(
                f"worker {worker} begins step {step} again with other samples{_INTERRUPTED}"
            )

    def _has_begun(self, worker: int, incarnation: int, step: int) -> bool:
        known = self._steps.get(worker)
        return known is not None and (known.incarnation, known.number) == (incarnation, step)

    def is_open(self, worker: int, step: int) -> bool:
        """The worker has begun the step and not said more: parts may have been updated by it."""
        known = self._steps.get(worker)
        return known is not None and known.is_open and known.number == step

    def arrived(self, worker: int, step: int, version: int) -> None:
        """The lead's shard has the whole step; `version` includes it."""
        known = self._steps.get(worker)
        if known is not None and known.number == step:
            known.version = version

    def settle(self, worker: int, next_step: int) -> None:
        """The worker takes `next_step` next. Rule 1. A step in doubt is not one of the process
        that holds the rank now. Raises ProtocolError in the middle of a step.
        """
        known = self._steps.get(worker)
        if known is None or not known.is_open or self.is_in_doubt(worker):
            return
        if next_step <= known.number:
            raise ProtocolError(
                f"worker {worker} goes on in the middle of its step {known.number}{_INTERRUPTED}"
            )
        self._close(worker, "applied")

    def refuse(self, worker: int) -> None:
        """The worker's step was not used. Rule 2."""
        known = self._steps.get(worker)
        if known is not None and known.is_open:
            known.is_open = False
            self.book.refuse(worker)

    def _close(self, worker: int, state: Literal["applied", "in_part"]) -> None:
        known = self._steps.get(worker)
        if known is None or not known.is_open:
            return
        known.is_open = False
        book = self.book
        leases = book.settle(worker) if state == "applied" else book.settle_in_part(worker)
        step = known.incarnation, known.number, known.version
        self._entries.append(
            Contribution(worker, *step, known.samples, leases, state, known.given_weight)
        )

    # -- Samples -----------------------------------------------------------------------------------

    def request(
        self,
        worker: int,
        loader: int,
        spec: PassSpec,
        workers: Sequence[int],
        speeds: Mapping[int, float],
    ) -> Grant:
        """One lease, if there is one for this worker. Raises UsageError when workers disagree."""
        answer = self.book.request(loader, spec, worker, workers, speeds)
        if answer.opened is not None:
            self._entries.append(answer.opened)
        leases = () if answer.lease is None else (answer.lease,)
        return Grant(answer.number, leases, answer.is_over)

    def give_back(self, worker: int, leases: Sequence[int], *, declined: bool) -> None:
        """Leases that no step will use."""
        self.book.give_back(worker, leases, declined=declined)

    def take_back(self, worker: int) -> None:
        """The worker has broken out of its data. Rule 4."""
        if not self.is_in_doubt(worker):
            self.book.release(worker)

    def release(self, worker: int) -> None:
        """The worker is gone, and its last step is settled. Rules 1 and 4."""
        if not self.is_in_doubt(worker):
            self._close(worker, "applied")
            self.book.release(worker)

    def end_passes(self) -> None:
        """Every worker has come to the end of its data."""
        self._entries += self.book.end_passes()

    # -- Death -------------------------------------------------------------------------------------

    def investigate(self, worker: int, incarnation: int) -> None:
        """The process is fenced: its last step is in doubt. Rule 3."""
        self._inquests[worker, incarnation] = {}

    def is_in_doubt(self, worker: int | None = None) -> bool:
        """Whether the shards' word about a worker is awaited; None: about any."""
        return any(worker in (None, rank) for rank, _ in self._inquests)

    def remains(self, shard: int, remains: Remains) -> bool:
        """A shard's word about a fenced process. True: it was the last one that was awaited."""
        process = remains.worker, remains.incarnation
        told = self._inquests.get(process)
        if told is None or shard not in self._holders:
            return False
        told[shard] = remains
        if told.keys() < self._holders:
            return False
        del self._inquests[process]
        self._conclude(*process, list(told.values()))
        return True

    def _conclude(self, worker: int, incarnation: int, told: Sequence[Remains]) -> None:
        last = max(told, key=lambda remains: (remains.step, remains.used_parts))
        latest = [remains for remains in told if remains.step == last.step]
        used = sum(remains.used_parts for remains in latest)
        if used:
            if not self._has_begun(worker, incarnation, last.step):
                # The lead's own stream was the first to go.
                work = last.samples, last.leases, last.given_weight
                self.begin(worker, incarnation, last.step, *work)
            is_whole = used == sum(remains.num_parts for remains in told)
            self._close(worker, "applied" if is_whole else "in_part")
        else:
            self._settle_before(worker, last.step)
            self.refuse(worker)
        self.book.release(worker)

    def _settle_before(self, worker: int, last: int) -> None:
        """No part of the last step was used; the one before is settled if another was begun."""
        known = self._steps.get(worker)
        if known is not None and known.number < last:
            self._close(worker, "applied")
