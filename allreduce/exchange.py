"""AllReduceExchange: gradients added up among workers, which all make the same update.

Workers act in rounds. A round begins with a row of numbers from everybody: what each wants of the
others. If anybody takes a step, all take part in it, those that wait in a meeting too, with nothing
to add. If all have come to the same meeting, it is over. A round that is complete on one worker
counts: when the group is formed anew, the others take over what it has led to.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from allreduce import hyperparameters as numbers_of
from allreduce import record as records
from allreduce.chronicle import Chronicle
from allreduce.crew import Crew, Finish, Held
from allreduce.group import Gathering, PeerLostError
from allreduce.record import Call, Record
from allreduce.sharded import ShardedUpdater
from allreduce.table import Table
from allreduce.whole import GroupUpdater, WholeUpdater
from allreduce.wire import DTYPES
from ps_core.buckets import Bucket
from ps_core.errors import JobOverError, ShardlineError
from ps_core.exchange import (
    HANDS_OVER,
    UNEQUAL_BATCHES,
    Arrival,
    Farewell,
    Grant,
    Meeting,
    Outcome,
    Position,
    Purpose,
    Start,
    StateByParameter,
    Traffic,
    Work,
    new_incarnation,
)
from ps_core.extras import Extras
from ps_core.group_metrics import AllReduceMetrics
from ps_core.job import describe_job
from ps_core.leases import PassSpec
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import Plan
from ps_core.settings import Config

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Round:
    """A round that this worker is in the middle of."""

    record: Record
    gathering: Gathering | None
    """What all say; None: it cannot be heard, the group is broken."""
    groups: Sequence[Hyperparameters] = ()
    table: Table | None = None
    """What all have said, once it was heard."""
    ready: set[int] = field(default_factory=set)
    """Buckets whose gradients are complete."""
    num_issued: int = 0
    """Buckets on their way, in the order in which all workers send them."""
    finish: Finish | None = None
    """Makes its update, once all that it takes is here."""


class AllReduceExchange:
    """One worker's side of the group. All methods are for the training thread."""

    def __init__(self, config: Config, device: torch.device) -> None:
        """Does not connect yet."""
        self._config = config
        self._device = device
        self._rank = config.cluster.rank
        self._num_stages = config.pipeline.stages
        self.traffic = Traffic()
        self.incarnation = new_incarnation()
        self._crew: Crew | None = None
        self._granted: deque[Grant] = deque()
        self._has_warned = self._has_warned_of_batches = False
        self._is_updating = False
        self._extras_are_final = False
        """Training is complete, and all hold the same."""
        self._metrics = AllReduceMetrics(self._rank)
        self._chronicle = Chronicle(config.job.run_dir, self._rank)

    # -- Exchange ----------------------------------------------------------------------------------

    def join(
        self, plan: Plan, buckets: Sequence[Bucket], optimizer: OptimizerSpec, extras: Extras
    ) -> Start:
        """Enter the group and take its values. Blocks until all workers have come, or until the
        others let this one in between two of their steps.

        Raises JoinTimeoutError, MismatchError, JobFailedError, JobOverError, DataLossError.
        """
        self._buckets = list(reversed(buckets))  # the last layers' gradients are complete first
        self._spec = optimizer
        dtype = DTYPES.get(self._config.allreduce.wire_dtype)
        make = ShardedUpdater if self._config.allreduce.shard_optimizer else WholeUpdater
        self._updater: GroupUpdater = make(plan, buckets, optimizer, dtype)
        self._num_bytes = sum(b.layout.length * b.layout.dtype.itemsize for b in buckets)
        crew = self._crew = Crew(self._config, self._device, self.incarnation)
        self._agreed = crew.agreed
        crew.check_job(describe_job(self._config, plan, optimizer))
        crew.enter(Held(self._updater, buckets, extras))
        self._count_formed()
        is_running = crew.rendezvous.generation > 1
        position = self._agreed.whereabouts.position if is_running else None
        return Start(self._agreed.version, crew.is_first, position)

    def _count_formed(self, leavers: Sequence[int] = ()) -> None:
        crew, version = self._joined, self._agreed.version
        self._metrics.formed(crew.rendezvous.generation, len(crew.ranks))
        is_first = self._rank == crew.ranks[0]
        members = crew.rendezvous.members
        if self._chronicle.formed(members, leavers, version, is_first=is_first):
            self._chronicle.caught_up(self._recall(), version)
        if crew.has_received:
            self.traffic.pulled_bytes += self._num_bytes

    @property
    def _joined(self) -> Crew:
        assert self._crew is not None, "join comes first"
        return self._crew

    def begin(self, step: int, work: Work, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Tell the others. Does not block."""
        numbers = numbers_of.to_numbers(hyperparameters)
        readings = self._agreed.passes.consume(work.leases)
        record = records.of_step(step, work, numbers_of.checksum(numbers), readings)
        self._round = self._open(record)
        self._round.groups = hyperparameters

    def _open(self, record: Record) -> _Round:
        """Begin a round."""
        record = replace(record, has_guest=self._joined.sees_guest())
        try:
            return _Round(record, self._joined.gather(record))
        except PeerLostError:
            return _Round(record, None)

    def submit(self, bucket: Bucket, step: int) -> None:
        """Hand over a bucket's gradients, to be added up in place."""
        self._round.ready.add(bucket.layout.index)
        self.traffic.pushed_bytes += bucket.layout.length * bucket.layout.dtype.itemsize
        try:
            if self._round.gathering is not None and self._round.gathering.is_done():
                self._issue(self._hear(self._round))
        except PeerLostError:
            self._round.gathering = None

    def settle(self, step: int) -> Outcome:
        """Wait until all have made the update."""
        table = self._complete()
        self.traffic.pulled_bytes += self._num_bytes
        applied = bool(self._round.record.gradient_weight and table.total)
        version = self._agreed.version
        return Outcome(version, version, applied, staleness=0)

    def held_versions(self) -> tuple[int, int]:
        """That of the last round, unless the update of the next was broken off."""
        return self._agreed.version, self._agreed.version + self._is_updating

    def close(self, farewell: Farewell = Farewell.FINISHED, failure: str = "") -> None:
        """Leave the job. Idempotent; blocks for a bounded time."""
        crew, self._crew = self._crew, None
        if crew is None:
            return
        with contextlib.suppress(ShardlineError):
            if farewell is Farewell.FINISHED:
                crew.rendezvous.finish()
            elif (farewell is Farewell.FATAL and not crew.is_guest) or not crew.is_elastic:
                crew.rendezvous.fail(f"worker {self._rank}: {failure}")
            else:
                self._leave(crew, farewell)
        self._chronicle.close()
        crew.drop()
        crew.rendezvous.close()

    def _leave(self, crew: Crew, farewell: Farewell) -> None:
        """One that leaves well takes part in the step of the others, so that nobody is lost."""
        if farewell is Farewell.PREEMPTED and self._num_stages == 1:
            self._crew = crew
            with contextlib.suppress(ShardlineError):  # it goes whatever has become of the others
                self._hand_over()
            self._crew = None
        crew.rendezvous.leave()

    def _hand_over(self) -> None:
        """Leave the job's values with the others. When all leave at once, the first of them waits
        until a worker has come that takes them over.
        """
        while True:
            table = self._take_part(Record(Call.LEAVE, self._agreed.version))
            others = [rank for rank in table.rows if rank != self._rank]
            if len(table.leavers) < len(table.rows) or min(others, default=self._rank) < self._rank:
                return
            if not self._joined.await_guest():
                return
            self._form_again(None, others)

    # -- Rounds ------------------------------------------------------------------------------------

    def _take_part(self, record: Record) -> Table:
        """A round in which this worker has no gradients; what all have said."""
        self._round = self._open(record)
        return self._complete()

    def _complete(self) -> Table:
        """Complete the open round, whoever is lost on the way."""
        while True:
            lost = ""
            try:
                table = self._hear(self._round)
                if table.readers:
                    self._read_together(table)
                    if self._rank in table.readers:
                        return table
                    self._begin_again(self._round.record)
                    continue
                self._make_update(table)
            except PeerLostError as error:
                lost = str(error)
            if lost:  # not above, where `error` still keeps connections of the group open
                log.warning("a worker is gone (%s)", lost)
                self._metrics.lost()
                if self._form_again(self._round.finish):
                    return self._recall()
                self._begin_again(records.without_gradients(self._round.record))
                continue
            self._commit(table)
            return table

    def _hear(self, current: _Round) -> Table:
        if current.table is None:
            if current.gathering is None:
                raise PeerLostError("the group is broken")
            started = time.perf_counter()
            rows = current.gathering.wait()
            self._metrics.waited("wait", time.perf_counter() - started)
            heard = zip(self._joined.ranks, map(records.decode, rows), strict=True)
            current.table = Table(dict(heard), self._num_stages)
        return current.table

    def _begin_again(self, record: Record) -> None:
        """The round in progress, in which nothing has been added up or all of it was in vain."""
        before = self._round
        self._round = self._open(record)
        self._round.groups = before.groups
        if record.gradient_weight:
            self._round.ready = before.ready

    def _form_again(self, finish: Finish | None, leavers: Sequence[int] = ()) -> bool:
        is_completed = self._joined.form_again(finish, leavers)
        self._is_updating = False
        self._count_formed(leavers)
        return is_completed

    def _recall(self) -> Table:
        """What all said in a round that others have completed."""
        rows = self._agreed.rows
        heard = {rank: records.decode(row) for rank, row in rows.items()}
        return Table(heard, self._num_stages)

    def _make_update(self, table: Table) -> None:
        """All that a round does with tensors, before it counts. Raises PeerLostError."""
        if table.writer is not None:
            self._joined.share_state(table.writer)
        if table.hands_over:
            self._joined.share_extras()
        if table.has_step and table.total:
            started = time.perf_counter()
            self._note_unequal(table)
            self._issue(table, all_of_them=True)
            self._updater.collect()
            self._metrics.waited("reduce", time.perf_counter() - started)
            groups = self._agree_on_groups(table)
            if self._num_stages > 1:
                self._round.finish = partial(self._apply, groups)
                self._joined.vote()
            self._apply(groups)

    def _apply(self, groups: Sequence[Hyperparameters]) -> None:
        """Make the update that all is there for; a sharded optimizer needs the others in it."""
        self._is_updating = True
        self._updater.update(groups)
        self._is_updating = False
        for bucket in self._buckets:
            bucket.accept()

    def _issue(self, table: Table, *, all_of_them: bool = False) -> None:
        """Send buckets that are ready, in their order; in the end all, with what there is."""
        if table.readers or not table.total:
            return
        own = self._round.record.gradient_weight
        for bucket in self._buckets[self._round.num_issued :]:
            if not (all_of_them or bucket.layout.index in self._round.ready):
                return
            self._updater.issue(bucket, own / table.total)
            self._round.num_issued += 1

    def _note_unequal(self, table: Table) -> None:
        pair = table.unequal
        if pair is not None and not self._has_warned_of_batches:
            self._has_warned_of_batches = True
            log.warning(UNEQUAL_BATCHES, *pair, self._agreed.version)

    def _agree_on_groups(self, table: Table) -> Sequence[Hyperparameters]:
        """The hyperparameters of the update: those of its lowest rank. Raises PeerLostError."""
        if table.differ and not self._has_warned:
            self._has_warned = True
            log.warning("workers differ in their hyperparameters: those of the lowest rank count")
        if table.is_of_one_mind:
            return self._round.groups
        groups = self._round.groups or self._spec.groups
        numbers = self._joined.share_numbers(table.leader, numbers_of.to_numbers(groups))
        return numbers_of.from_numbers(groups, numbers)

    def _commit(self, table: Table) -> None:
        """The round counts."""
        agreed, passes = self._agreed, self._agreed.passes
        agreed.round += 1
        agreed.rows = {rank: records.encode(record) for rank, record in table.rows.items()}
        if table.has_step:
            leader = table.replicas[table.leader]
            agreed.whereabouts.begun(
                Position(leader.point, leader.schedules, agreed.version, leader.point)
            )
            agreed.version += 1
            self._joined.rendezvous.version = agreed.version
            self._chronicle.updated(table, agreed.version)
        for index, record in table.replicas.items():
            passes.measured(index, record.samples, record.compute_seconds)
        passes.use(table.readings())
        self._meet_all(table)
        if table.has_guest or table.leavers:
            self._joined.keep_state()
            if self._rank not in table.leavers:
                self._form_again(None, table.leavers)

    def _meet_all(self, table: Table) -> None:
        """What follows from a meeting, if this is one."""
        agreed, purpose = self._agreed, table.meeting()
        agreed.goes_on = False
        if purpose is None:
            return
        for arrival in table.arrivals.values():
            agreed.whereabouts.arrived(arrival)
        agreed.whereabouts.met(table.arrivals.values(), table.means())
        if purpose is Purpose.EPOCH:
            agreed.goes_on = agreed.passes.goes_on(table.takers)
            if not agreed.goes_on:
                self._chronicle.ended(agreed.passes.end())

    # -- Peers -------------------------------------------------------------------------------------

    def idle(self) -> None:
        """Nothing: the others wait until this worker comes to a meeting."""

    def meet(self, arrival: Arrival) -> Meeting:
        """Wait until all have come, and take part in their steps meanwhile."""
        agreed = self._agreed
        past = agreed.whereabouts.past(arrival)
        if past is not None:
            is_first = self._joined.is_first
            return Meeting(agreed.version, past, is_first, is_past=True)
        hands_over = arrival.purpose in HANDS_OVER and not self._extras_are_final
        arrival = replace(arrival, hands_over=hands_over)
        while True:
            has_state = self._joined.written_state is not None
            record = records.of_arrival(agreed.version, arrival, has_state=has_state)
            try:
                table = self._take_part(record)
            except JobOverError:
                if arrival.purpose is not Purpose.CLOSE:
                    raise
                # A worker was lost on the way to the last meeting, and the others have held it.
                return Meeting(agreed.version, (), self._joined.is_first, is_past=True)
            if table.meeting() is None:
                continue
            grant = agreed.passes.more() if agreed.goes_on and arrival.takes_leases else None
            if grant is not None or not agreed.goes_on:
                break
        self._extras_are_final |= arrival.purpose is Purpose.CLOSE
        return Meeting(agreed.version, table.means(), self._joined.is_first, grant)

    # -- DataLeases --------------------------------------------------------------------------------

    def request_lease(self, loader: int, spec: PassSpec) -> None:
        """Take the next samples, which every worker knows by itself."""
        self._granted.append(self._agreed.passes.request(loader, spec))

    def receive_lease(self) -> Grant:
        """What was taken. Does not block."""
        return self._granted.popleft()

    def return_leases(self, leases: Sequence[int], *, declined: bool = False) -> None:
        """They stay free."""
        self._agreed.passes.give_back(leases)

    def holds_lease(self, lease: int) -> bool:
        """Whether it was granted since the members have changed."""
        return self._agreed.passes.holds(lease)

    # -- Optimizer state ---------------------------------------------------------------------------

    def read_state(self) -> StateByParameter:
        """A copy of the state. With a sharded optimizer it waits until the others take their next
        step or meet, and then all gather it.
        """
        if not self._config.allreduce.shard_optimizer:
            return self._updater.gather_state()
        self._take_part(Record(Call.READ, self._agreed.version))
        return self._state

    def _read_together(self, table: Table) -> None:
        state = self._updater.gather_state()
        if self._rank in table.readers:
            self._state = state

    def write_state(self, state: StateByParameter) -> None:
        """Keep it for the next meeting, at which all take it over; only the chosen worker's."""
        if self._joined.is_first:
            self._joined.written_state = state
