"""One shard at the edge: the pure `Shard` with workers' streams and time around it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator

from ps_core import codec, dialogue
from ps_core.codec import PartFrame
from ps_core.errors import (
    DataLossError,
    JobFailedError,
    JobOverError,
    MismatchError,
    ProtocolError,
    ShardlineError,
    UsageError,
)
from ps_core.exchange import UNEQUAL_BATCHES
from ps_core.job import Job
from ps_core.settings import Config
from ps_core.shard_metrics import ShardMetrics
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_server import admission, effects, requests, values
from ps_server.control import Order
from ps_server.office import Office
from ps_server.orders import Complete, Factor, Failed, Membership, Met, Readmitted, Seal
from ps_server.outbox import Outbox
from ps_server.roster import Peer, Rate, Roster
from ps_server.shard import Shard
from ps_server.stragglers import Lags
from ps_server.terms import Begin

log = logging.getLogger(__name__)

Report = Callable[[effects.Squares | effects.Ready | effects.Remains | effects.Lost | Failed], None]
"""Tells the lead, wherever it is."""


class Node:
    """One shard of one job, from its first worker to its end. Only touched on the event loop."""

    def __init__(self, config: Config, incarnation: int, metrics: ShardMetrics) -> None:
        self.config = config
        self.index = config.server.index
        self.incarnation = incarnation
        self.office: Office | None = None
        """Set on the lead."""
        self.report: Report = lambda message: None
        """Set by whoever connects this node to the lead."""
        self.shard: Shard | None = None
        self.roster = Roster(config.rpc.reconnect_seconds)
        self.updates = Rate()
        self.lags = Lags()
        self.num_duplicates = self.num_refused = 0
        """Parts that came again, and parts that came too late."""
        self.epoch = 0
        """The last membership epoch that this shard was told."""
        self.ended = asyncio.Event()
        self.failure: ShardlineError | None = None
        self.stopped = False
        self._metrics = metrics
        self._buffers: values.Buffers = {}
        self._early: list[Membership] = []
        """Orders that came before the first worker."""
        self._turn = 0
        self._has_warned_of_batches = False
        self._withheld: list[effects.Release] = []
        """On the lead, while the job is paused."""
        self._ticked = time.monotonic()

    @property
    def version(self) -> int:
        """Updates that every part has."""
        return self.shard.version if self.shard is not None else 0

    # -- Workers come and go -----------------------------------------------------------------------

    def join(self, request: shard_pb2.JoinRequest) -> shard_pb2.JoinResponse:
        """Admit a worker. Raises MismatchError naming the first disagreement, DataLossError, or
        JobOverError.
        """
        self._check_alive()
        if self.ended.is_set():
            raise JobOverError("the job is complete: there is nothing left to do")
        if request.expected_shard_incarnation not in (0, self.incarnation):
            raise DataLossError(
                f"shard {self.index} restarted and lost its state: start the job again"
            )
        job, rank = self._agree(request), request.worker.rank
        self.roster.check_fence(request.worker)
        first, alive = False, self.roster.is_alive(rank)
        if self.office is not None:
            first = self.office.join(job, rank, request.worker.incarnation, holder_alive=alive)
        deadline = time.monotonic() + self.config.membership.join_timeout_seconds
        peer = self.roster.admit(request.worker, request.pid, request.host, deadline)
        log.info("worker %d joined (%s)", rank, peer)
        return shard_pb2.JoinResponse(
            shard_incarnation=self.incarnation, gives_initial_values=first
        )

    def reserve(self) -> int:
        """Keep a rank for a worker that is about to be started. Raises MismatchError."""
        self._check_alive()
        return self._lead().reserve(time.monotonic())

    def _agree(self, request: shard_pb2.JoinRequest) -> Job:
        """The job, which the first worker describes and all others must repeat."""
        theirs = admission.decode(request, self.config)
        known = self.shard.job if self.shard is not None else theirs
        admission.compare(request, known, theirs)
        if self.shard is None:
            self.shard = Shard(known, self.index)
            self._metrics.set_parameters(self.shard.num_bytes)
            early, self._early = self._early, []
            for order in early:
                self._set_membership(order)
        return known

    def identify(self, worker: shard_pb2.WorkerId) -> int:
        """The rank of a worker that has joined. Raises MismatchError, or JobFailedError after the
        end.
        """
        self._check_alive()
        return self.roster.identify(worker)

    def open_stream(self, worker: shard_pb2.WorkerId) -> tuple[int, Outbox]:
        """A joined worker opens its stream. It may have entered before its first one is open: then
        it does not know what it has missed.
        """
        is_first = not self.roster[self.identify(worker)].opened
        rank, outbox = self.roster.open(worker)
        if self.shard is not None:
            self.shard.reopened(rank)
            self._perform(self.shard.fetch(rank, self.shard.parts if is_first else ()))
        return rank, outbox

    def close_stream(self, rank: int, outbox: Outbox) -> None:
        """A worker's stream has ended."""
        self.roster.close(rank, outbox, time.monotonic())

    def leave(self, request: shard_pb2.LeaveRequest) -> None:
        """A worker's last word; only the lead acts on it."""
        rank = self.roster.identify(request.worker)
        self.roster.leave(rank)
        self._forget(rank)
        if self.office is not None:
            self.office.leave(rank, request.farewell, request.failure)

    # -- Steps -------------------------------------------------------------------------------------

    def receive(
        self, rank: int, outbox: Outbox, request: PartFrame | shard_pb2.ExchangeRequest
    ) -> None:
        """One message of a worker's stream. Raises ShardlineError, which ends the stream."""
        self.roster.check_stream(rank, outbox)
        if isinstance(request, PartFrame):
            self._push(rank, request)
            return
        match request.WhichOneof("message"):
            case "part":
                self._push(rank, request.part)
            case "begin":
                self._begin(rank, request.begin)
            case "heartbeat":
                self._lead().beat(rank)
            case "fetch":
                self._perform(self._joined_shard().fetch(rank, set(request.fetch.parts)))
            case "idle" | "meet" | "lease":
                self._receive_numbered(rank, request)
            case other:
                raise ProtocolError(f"worker {rank} sends {other} on an open stream")

    def _begin(self, rank: int, message: shard_pb2.Begin) -> None:
        work, groups = dialogue.decode_work(message), codec.decode_groups(message.groups)
        given = work.samples, groups, work.leases, work.given_weight
        begin = Begin(message.step, message.epoch, *given)
        todo = self._joined_shard().begin(rank, begin)  # the lead hears only of what is right
        try:
            if self.office is not None:
                self.office.begin(rank, begin, message)
        finally:
            self._perform(todo)

    def _receive_numbered(self, rank: int, request: shard_pb2.ExchangeRequest) -> None:
        """A request to the lead. A repeat, after a stream broke, is answered again if it has been
        answered, and not obeyed again.
        """
        lead = self._lead()
        if self.roster.is_repeat(rank, request.number):
            return
        try:
            answer = requests.obey(lead, rank, request)
        except UsageError as error:  # as a status it would be a failure of this shard
            raise MismatchError(str(error)) from error
        if answer is not None:
            self.roster.answer(rank, answer)

    def _push(self, rank: int, message: PartFrame | tensor_pb2.Part) -> None:
        shard = self._joined_shard()
        part = shard.part(message.part).part
        gradient = codec.decode_elements(message, part)
        present = codec.decode_present(message, part)
        self.roster[rank].received_bytes += part.num_bytes
        self._metrics.received(part.num_bytes)
        started = time.perf_counter()
        todo = shard.push(rank, message.step, part.index, present, gradient)
        if todo:
            self._metrics.applied(time.perf_counter() - started)
        self._perform(todo)

    def obey(self, order: Order) -> None:
        """Do what the lead says."""
        match order:
            case Membership():
                self._set_membership(order)
            case Factor(step, factor):
                self._perform(self._joined_shard().apply_factor(step, factor))
            case Seal(step, contributors):
                self._perform(self._joined_shard().seal(step, contributors))
            case Failed(reason):
                self.end(JobFailedError(reason))
            case Complete():
                self.end(None)

    def _set_membership(self, order: Membership) -> None:
        if self.shard is None:
            self._early.append(order)
            return
        self.epoch = max(self.epoch, order.epoch)
        self._metrics.set_live_workers(len(order.members))
        for rank, incarnation in order.evicted.items():
            log.warning("worker %d is evicted: %s", rank, order.reason)
            self.roster.fence(rank, incarnation, order.reason)
            self._forget(rank)
        self._perform(self.shard.set_membership(order.epoch, order.members, order.evicted))

    def _forget(self, rank: int) -> None:
        """A process is gone."""
        self.lags.forget(rank)
        self._metrics.forget(rank)

    def answer(self, told: Met | Readmitted) -> None:
        """Tell a worker that it goes on."""
        message = requests.encode_told(told)
        if isinstance(told, Met):
            self.roster.answer(told.worker, message)
        else:
            self.roster.tell(told.worker, message)

    def resume(self) -> None:
        """Send what was withheld while the job was paused."""
        withheld, self._withheld = self._withheld, []
        for release in withheld:
            self._send(release)

    def _perform(self, todo: Iterable[effects.Effect]) -> None:
        for effect in todo:
            match effect:
                case effects.Release():
                    self._release(effect)
                case effects.Squares() | effects.Remains() | effects.Lost():
                    self.report(effect)
                case effects.Arrived():
                    self._note_arrival(effect)
                case effects.Late(worker, _):
                    if self.office is not None:
                        self.office.late(worker)
                case _:
                    self._count(effect)

    def _count(self, effect: effects.Effect) -> None:
        match effect:
            case effects.Stale(versions):
                self._metrics.stale(versions)
            case effects.Duplicate():
                self.num_duplicates += 1
                self._metrics.duplicate()
            case effects.Refused(parts):
                self.num_refused += parts
                self._metrics.refused_parts(parts)
            case effects.HyperparametersDiffer(step, workers):
                self._warn_once(step, workers)
            case effects.BatchesDiffer(step, workers) if not self._has_warned_of_batches:
                self._has_warned_of_batches = True
                log.warning(UNEQUAL_BATCHES, *workers, step)

    def _note_arrival(self, arrived: effects.Arrived) -> None:
        shard, rank = self._joined_shard(), arrived.worker
        self.lags.arrived(rank, arrived.step, time.monotonic())
        self._metrics.lag(rank, self.lags.lag_seconds(rank))
        if self.office is not None:
            self.office.arrived(rank, arrived.step, arrived.version)
        if shard.policy.sealed:
            self.report(effects.Ready(rank, arrived.step))

    def _release(self, release: effects.Release) -> None:
        """Send a part; on the lead it may be the turn of workers that wait to enter."""
        if self.office is not None:
            if self._joined_shard().policy.lockstep and release.version > self._turn:
                self._turn = release.version
                self._metrics.quorum_waited(self.lags.waited(release.version - 1))
                self.office.take_turn(release.version)
            if self.office.is_paused:
                self._withheld.append(release)
                return
        self._send(release)

    def _send(self, release: effects.Release) -> None:
        shard = self._joined_shard()
        state = shard.part(release.part)
        epoch = self.office.epoch if self.office is not None else 0
        frame = codec.encode_answer(
            release.version, release.part, state.parameters, epoch=epoch, clock=release.clock
        )
        for rank in release.workers:
            peer = self.roster[rank]
            if peer.outbox is not None and shard.has_entered(rank, peer.incarnation):
                peer.outbox.put(frame)
                peer.sent_bytes += state.part.num_bytes
                self._metrics.sent(state.part.num_bytes)

    def _warn_once(self, step: int, workers: tuple[int, int]) -> None:
        if self._metrics.hyperparameters_differ():
            text = "workers %d and %d have different hyperparameters at step %d: %d's are used"
            log.warning(text, *workers, step, min(workers))

    # -- Values ------------------------------------------------------------------------------------

    def load(self, loaded: values.Buffers, request: shard_pb2.LoadRequest) -> None:
        """One message of a load. Raises ProtocolError."""
        values.load(self._joined_shard(), loaded, request)

    def keep(self, loaded: values.Buffers) -> None:
        """The load has ended: all its buffers count from now on, together."""
        self._buffers |= loaded

    def read(self, request: shard_pb2.PullRequest) -> Iterator[shard_pb2.PullResponse | bytes]:
        """The values asked for. Raises ProtocolError before the shard has its initial values."""
        shard = self._joined_shard()
        if not shard.ready:
            raise ProtocolError(f"shard {self.index} has no values yet")
        return values.read(shard, self._buffers, request)

    # -- Time and the end --------------------------------------------------------------------------

    def tick(self) -> None:
        """Let time pass: lost workers, rates, the lead's deadlines."""
        now = time.monotonic()
        for rank in self.roster.lost(now):
            peer = self.roster[rank]
            self.report(effects.Lost(rank, peer.incarnation, self._why_lost(rank, peer)))
        elapsed, self._ticked = now - self._ticked, now
        self.roster.update_rates(elapsed)
        self.updates.update(self.version, elapsed)
        self._show_progress()
        if self.office is not None:
            self.office.tick(now)

    def _why_lost(self, rank: int, peer: Peer) -> str:
        died = f"worker {rank} ({peer}) died: its stream to shard {self.index}"
        if not peer.opened:
            patience = self.config.membership.join_timeout_seconds
            return f"{died} was not opened within {patience:g} s (membership.join_timeout_seconds)"
        patience = self.config.rpc.reconnect_seconds
        return f"{died} closed and did not come back within {patience:g} s (rpc.reconnect_seconds)"

    def _show_progress(self) -> None:
        self._metrics.updated(self.version)
        if self.shard is not None:
            for rank, _ in self.roster:
                self._metrics.set_clock(rank, self.shard.clock(rank))

    def stop(self) -> None:
        """This process was told to stop before the job has ended. Idempotent."""
        if not self.ended.is_set():
            self.stopped = True
            self._give_up(f"shard {self.index} was stopped")

    def crash(self, error: BaseException) -> None:
        """This process cannot go on because of a bug."""
        if not self.ended.is_set():
            self._give_up(f"shard {self.index} failed: {type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        self.report(Failed(reason))
        self.end(JobFailedError(reason))

    def end(self, failure: ShardlineError | None) -> None:
        """The job is over: complete, or failed. Open streams end with the failure. Idempotent."""
        if self.ended.is_set():
            return
        self.failure = failure
        self._show_progress()
        self.ended.set()
        self.roster.end_streams(failure)

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise JobFailedError(str(self.failure))

    def _joined_shard(self) -> Shard:
        if self.shard is None:
            raise ProtocolError(f"no worker has joined shard {self.index} yet")
        return self.shard

    def _lead(self) -> Office:
        if self.office is None:
            raise ProtocolError(f"shard {self.index} is not the lead: meetings go to shard 0")
        return self.office
