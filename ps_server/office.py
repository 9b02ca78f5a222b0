"""The lead at the edge: the pure `Lead` with the control streams of the other shards around it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ps_core import dialogue
from ps_core.errors import DataLossError, MismatchError, ProtocolError
from ps_core.exchange import Arrival, Grant, Position
from ps_core.job import Job
from ps_core.lead_metrics import LeadMetrics
from ps_core.leases import PassSpec, Totals
from ps_core.settings import Config
from ps_core.updates_log import UpdatesLog
from ps_core.v1 import lead_pb2, shard_pb2
from ps_server.control import Order, decode_remains, encode_order
from ps_server.effects import Remains
from ps_server.heartbeats import Heartbeats
from ps_server.lead import Lead
from ps_server.liveness import Liveness
from ps_server.order_log import OrderLog
from ps_server.orders import Complete, Effect, Failed, Membership, Met, Readmitted
from ps_server.outbox import Outbox
from ps_server.policy import consistency_of
from ps_server.stragglers import Stragglers, Verdict
from ps_server.terms import Begin, Cause, Terms

_RESERVED_SECONDS = 60.0
"""A worker that is started imports torch before it joins, which may take a while."""


class Office:
    """Carries the lead's effects out. Only touched on the event loop."""

    def __init__(
        self,
        incarnation: int,
        config: Config,
        obey: Callable[[Order], None],
        answer: Callable[[Met | Readmitted], None],
        resume: Callable[[], None],
    ) -> None:
        """`obey` gives an order to the lead's own shard, `answer` tells a worker that it goes on,
        `resume` says that answers need not be withheld (any more). Raises ConfigError, and
        DataLossError when the run directory tells of a run that has begun already.
        """
        self._incarnation = incarnation
        self._config = config
        self._num_shards = len(config.cluster.shards)
        self._obey = obey
        self._answer = answer
        self._resume = resume
        self._lead: Lead | None = None
        self._shards: dict[int, int] = {}
        self._controls: dict[int, Outbox] = {}
        self._liveness = Liveness(config.rpc.reconnect_seconds)
        self._orders = OrderLog()
        self._todo: deque[Effect] = deque()
        self._is_performing = False
        self._stragglers = Stragglers()
        self._reserved: dict[int, float] = {}
        """Ranks kept for workers that are being started, and until when."""
        self._begun: dict[int, tuple[float, shard_pb2.Begin]] = {}
        member = config.membership
        self._heartbeats = Heartbeats(
            member.heartbeat_floor_seconds, member.heartbeat_deadline_seconds
        )
        self._metrics = LeadMetrics()
        self._log = UpdatesLog(config.job.run_dir, is_new=True)

    # -- Workers -----------------------------------------------------------------------------------

    def join(self, job: Job, worker: int, incarnation: int, *, holder_alive: bool) -> bool:
        """Admit a worker; True: its initial values count. Who holds its rank is fenced, unless it
        is alive: then MismatchError.
        """
        if self._lead is None:
            self._lead = self._make_lead(job)
        holder = self._lead.crew.incarnation(worker)
        if holder not in (0, incarnation) and not (holder_alive and self._beats(worker)):
            self.evict(worker, holder, "replaced", "another process has taken its rank")
        first = self._lead.join(worker, incarnation)
        if holder != incarnation:
            self._metrics.joined()
        self._write()
        return first

    def reserve(self, now: float) -> int:
        """A free rank, kept for a minute. Those that the job starts with are left to whoever starts
        these workers again. Raises MismatchError when there is none.
        """
        cluster = self._config.cluster
        self._reserved = {rank: until for rank, until in self._reserved.items() if until > now}
        for rank in range(cluster.num_workers, cluster.num_ranks):
            holder = self._lead.crew.incarnation(rank) if self._lead else 0
            if rank not in self._reserved and not holder:
                self._reserved[rank] = now + _RESERVED_SECONDS
                return rank
        raise MismatchError(
            f"the job starts with {cluster.num_workers} workers and has all the others that it may "
            f"have: to leave room for more, start it with `shardline run --workers "
            f"{cluster.num_workers}:{cluster.num_ranks + 2}`"
        )

    def _make_lead(self, job: Job) -> Lead:
        member = self._config.membership
        terms = Terms(
            num_workers=job.num_workers,
            deadline=time.monotonic() + member.join_timeout_seconds,
            min_workers=member.min_workers,
            pause_seconds=member.pause_timeout_seconds,
            step_seconds=member.step_deadline_seconds,
        )
        holders = frozenset(part.shard for part in job.plan.parts)
        policy = consistency_of(job.consistency)
        return Lead(terms, policy, holders, job.optimizer.max_grad_norm)

    def _beats(self, worker: int) -> bool:
        """It has given a sign of life when it should have."""
        silence = self._heartbeats.silence(worker, time.monotonic())
        return silence is not None and silence < 3 * self._config.membership.heartbeat_seconds

    def beat(self, worker: int) -> None:
        """A worker's sign of life."""
        self._heartbeats.beat(worker, time.monotonic())

    def leave(self, worker: int, farewell: int, failure: str) -> None:
        """A worker's last word."""
        lead = self._joined()
        self._forget(worker)
        match farewell:
            case shard_pb2.FAREWELL_FINISHED:
                self._perform(lead.leave(worker, "finished"))
            case shard_pb2.FAREWELL_PREEMPTED:
                self._metrics.preempted()
                self._perform(lead.leave(worker, "preempted"))
            case shard_pb2.FAREWELL_FAILED:
                self.evict(worker, lead.crew.incarnation(worker), "failed", failure)
            case _:
                self.fail(f"worker {worker} failed: {failure}")

    def evict(self, worker: int, incarnation: int, cause: Cause, reason: str) -> None:
        """Fence a process, if it holds its rank; 0: none does."""
        if self._lead is not None and self._lead.crew.incarnation(worker) == incarnation != 0:
            self._metrics.evicted(cause)
            self._perform(self._lead.evict(worker, incarnation, cause, reason))

    def state(self, worker: int) -> str:
        """Where a worker is, in a word; empty for one that has never joined."""
        known = self._lead.crew.get(worker) if self._lead else None
        return known.state.value if known else ""

    def verdict(self, worker: int) -> Verdict | None:
        """Whether it is a straggler."""
        return self._stragglers.verdict(worker)

    # -- Steps -------------------------------------------------------------------------------------

    def begin(self, worker: int, begin: Begin, message: shard_pb2.Begin) -> None:
        """A worker opens a step."""
        self._begun[worker] = time.monotonic(), message
        point = dialogue.decode_point(message.point)
        position = Position(point, tuple(message.schedules), begin.step, point)
        self._perform(self._joined().begin(worker, begin, position))

    def arrived(self, worker: int, step: int, version: int) -> None:
        """The lead's shard has all of a worker's step."""
        if worker in self._begun:
            started, begin = self._begun.pop(worker)
            spent, network_seconds = begin.phases, time.monotonic() - started
            self._stragglers.observe(
                worker, spent.data_seconds, spent.compute_seconds, network_seconds, begin.samples
            )
        self._perform(self._joined().arrived(worker, step, version))

    def ready(self, shard: int, worker: int, step: int) -> None:
        """With backup workers: a shard has all of a worker's step."""
        self._perform(self._joined().ready(shard, worker, step))

    def late(self, worker: int) -> None:
        """With backup workers: a step was made without the worker."""
        self._perform(self._joined().late(worker))

    def take_turn(self, version: int) -> None:
        """The lead's shard is about to send out this version for the first time."""
        self._perform(self._joined().take_turn(version))

    def squares(self, shard: int, step: int, total: float) -> None:
        """A shard's share of the squared norm."""
        self._perform(self._joined().squares(shard, step, total))

    @property
    def epoch(self) -> int:
        """The membership epoch."""
        return self._lead.epoch if self._lead else 0

    @property
    def is_paused(self) -> bool:
        """Answers to workers are to be withheld."""
        return self._lead is not None and self._lead.is_paused

    # -- Data and meetings -------------------------------------------------------------------------

    def request(self, worker: int, loader: int, spec: PassSpec) -> Grant:
        """A lease, if there is one. Raises UsageError when workers disagree."""
        lead = self._joined()
        sharing = lead.members if spec.global_batch_size else ()
        speeds = {rank: self._stragglers.speed(rank) or 0.0 for rank in sharing}
        grant = lead.request(worker, loader, spec, speeds)
        self._write()
        return grant

    def give_back(self, worker: int, leases: Sequence[int], *, declined: bool) -> None:
        """Leases that no step will use."""
        self._perform(self._joined().give_back(worker, leases, declined=declined))

    def idle(self, worker: int) -> None:
        """A worker is not to be waited for."""
        self._perform(self._joined().idle(worker))

    def meet(self, worker: int, arrival: Arrival) -> None:
        """A worker waits for all the others."""
        self._perform(self._joined().meet(worker, arrival))

    def totals(self) -> Totals | None:
        """What has become of the samples."""
        return self._lead.ledger.book.totals() if self._lead else None

    # -- Shards ------------------------------------------------------------------------------------

    def open_control(self, hello: lead_pb2.ShardHello) -> Outbox:
        """A shard opens its stream. Raises MismatchError for one that the job does not have, and
        DataLossError when it, or this lead, is not the one that the other knew.
        """
        if not 0 < hello.shard < self._num_shards:
            raise MismatchError(
                f"shard {hello.shard} has no place beside the lead among {self._num_shards} shards:"
                " list the same shards everywhere"
            )
        if hello.expected_lead_incarnation not in (0, self._incarnation):
            raise DataLossError(
                "the lead (shard 0) restarted and lost its state: start the job again"
            )
        self._check_same(hello.shard, hello.incarnation)
        missed = self._orders.since(hello.epoch)
        outbox = self._controls[hello.shard] = Outbox()
        self._liveness.opened(hello.shard)
        welcome = lead_pb2.Welcome(lead_incarnation=self._incarnation)
        outbox.put(lead_pb2.ControlResponse(welcome=welcome))
        for order in missed:
            outbox.put(encode_order(order))
        return outbox

    def _check_same(self, shard: int, incarnation: int) -> None:
        """Refuse a shard that is not the process it was, once it has had state to lose."""
        known = self._shards.get(shard, incarnation)
        if known == incarnation or self._lead is None:
            self._shards[shard] = incarnation
            return
        if shard in self._controls:
            raise MismatchError(f"shard {shard} runs already, as another process")
        reason = f"shard {shard} restarted and lost its state: start the job again"
        self.fail(reason)
        raise DataLossError(reason)

    def close_control(self, shard: int, outbox: Outbox, now: float) -> None:
        """A shard's stream has ended."""
        if self._controls.get(shard) is outbox:
            del self._controls[shard]
            if self._lead is not None and not self._lead.ended:
                self._liveness.closed(shard, now)

    def receive_control(self, shard: int, request: lead_pb2.ControlRequest) -> None:
        """A shard's message. Raises ProtocolError."""
        match request.WhichOneof("message"):
            case "squares":
                self.squares(shard, request.squares.step, request.squares.total)
            case "ready":
                self.ready(shard, request.ready.rank, request.ready.step)
            case "remains":
                self.remains(shard, decode_remains(request.remains))
            case "lost":
                lost = request.lost
                self.evict(lost.rank, lost.incarnation, "stream", lost.reason)
            case "failure":
                self.fail(request.failure.reason)
            case other:
                raise ProtocolError(f"shard {shard} sends {other} on an open control stream")

    def remains(self, shard: int, remains: Remains) -> None:
        """A shard's word about a fenced process."""
        self._perform(self._joined().remains(shard, remains))

    def fail(self, reason: str) -> None:
        """The job cannot go on."""
        self._perform(self._lead.fail(reason) if self._lead else [Failed(reason)])

    # -- Time --------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Let time pass."""
        for shard in self._liveness.lost(now):
            self.fail(
                f"shard {shard} was lost: its stream to the lead closed and did not come back "
                f"within {self._config.rpc.reconnect_seconds:g} s (rpc.reconnect_seconds)"
            )
        if self._lead is None:
            return
        for worker in self._heartbeats.silent(now):
            reason = self._heartbeats.reason(worker, now)
            self.evict(worker, self._lead.crew.incarnation(worker), "heartbeat", reason)
        self._perform(self._lead.tick(now))
        self._show(self._lead)
        self._log.flush()

    def close(self) -> None:
        """The job is over."""
        self._write()
        self._log.close()

    def _show(self, lead: Lead) -> None:
        self._metrics.set_epoch(lead.epoch)
        self._metrics.set_paused(lead.is_paused)
        totals = lead.ledger.book.totals()
        self._metrics.set_ledger(
            granted=totals.granted,
            applied=totals.applied,
            applied_in_part=totals.applied_in_part,
            returned=totals.returned,
            abandoned=totals.abandoned,
            open=totals.open,
        )
        for rank in lead.present:
            verdict = self._stragglers.verdict(rank)
            if verdict is None:
                self._metrics.no_straggler(rank)
            else:
                self._metrics.straggler(rank, verdict.ratio, verdict.phase)

    def _joined(self) -> Lead:
        if self._lead is None:
            raise ProtocolError("no worker has joined yet")
        return self._lead

    def _write(self) -> None:
        if self._lead is not None:
            self._log.write(self._lead.ledger.take_entries())

    def _perform(self, effects: Iterable[Effect]) -> None:
        """In the order that the lead has decided them: what comes of one while it is carried out is
        done after the others. A shard that hears of a later epoch first takes no earlier one.
        """
        self._todo.extend(effects)
        if self._is_performing:
            return
        self._is_performing = True
        try:
            while self._todo:
                effect = self._todo.popleft()
                if isinstance(effect, Met | Readmitted):
                    self._answer(effect)
                else:
                    self._order(effect)
        finally:
            self._is_performing = False
        self._write()
        if not self.is_paused:
            self._resume()

    def _order(self, order: Order) -> None:
        message = encode_order(order)
        self._orders.add(order)
        for rank in order.evicted if isinstance(order, Membership) else ():
            self._forget(rank)
        for outbox in self._controls.values():
            outbox.put(message)
            if isinstance(order, Failed | Complete):
                outbox.finish()
        self._obey(order)

    def _forget(self, worker: int) -> None:
        """A process is gone."""
        self._stragglers.forget(worker)
        self._heartbeats.forget(worker)
        self._begun.pop(worker, None)
        self._metrics.forget(worker)
