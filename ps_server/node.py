"""One shard at the edge: the pure `Shard` with workers' streams and time around it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator

from ps_core import codec
from ps_core.codec import PartFrame
from ps_core.config import Config
from ps_core.errors import (
    DataLossError,
    JobFailedError,
    MismatchError,
    ProtocolError,
    ShardlineError,
    UsageError,
)
from ps_core.exchange import Purpose
from ps_core.job import PROTOCOL, Job, first_difference
from ps_core.metrics import ShardMetrics
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_server import shard as effects
from ps_server import values
from ps_server.lead import Arrival, Complete, Factor, Failed, Membership, Met
from ps_server.office import Office, Order
from ps_server.outbox import Outbox
from ps_server.roster import Rate, Roster
from ps_server.shard import Shard

log = logging.getLogger(__name__)

Report = Callable[[effects.Squares | Failed], None]
"""Tells the lead, wherever it is."""


_MEMORY_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Node:
    """One shard of one job, from its first worker to its end. Only touched on the event loop."""

    def __init__(self, config: Config, incarnation: int, metrics: ShardMetrics) -> None:
        self.index = config.server.index
        self.incarnation = incarnation
        self.office: Office | None = None
        """Set on the lead."""
        self.report: Report = lambda message: None
        """Set by whoever connects this node to the lead."""
        self.shard: Shard | None = None
        self.roster = Roster(config.rpc.reconnect_seconds)
        self.updates = Rate()
        self.ended = asyncio.Event()
        self.failure: ShardlineError | None = None
        self.stopped = False
        self._config = config
        self._metrics = metrics
        self._buffers: values.Buffers = {}
        self._ticked = time.monotonic()

    @property
    def version(self) -> int:
        """Updates that every part has."""
        return self.shard.version if self.shard is not None else 0

    # -- Workers come and go -----------------------------------------------------------------------

    def join(self, request: shard_pb2.JoinRequest) -> shard_pb2.JoinResponse:
        """Admit a worker. Raises MismatchError naming the first disagreement, or DataLossError."""
        self._check_alive()
        if request.expected_shard_incarnation not in (0, self.incarnation):
            raise DataLossError(
                f"shard {self.index} restarted and lost its state: start the job again"
            )
        job, rank = self._agree(request), request.worker.rank
        if rank >= job.num_workers:
            raise MismatchError(f"worker {rank} joins a job of {job.num_workers} workers")
        deadline = time.monotonic() + self._config.membership.join_timeout_seconds
        peer = self.roster.admit(request.worker, request.pid, request.host, deadline)
        first = self.office is not None and self.office.join(job, rank, peer.incarnation, deadline)
        log.info("worker %d joined (%s)", rank, peer)
        return shard_pb2.JoinResponse(
            shard_incarnation=self.incarnation, gives_initial_values=first
        )

    def _agree(self, request: shard_pb2.JoinRequest) -> Job:
        """The job, which the first worker describes and all others must repeat."""
        if request.shard != self.index:
            raise MismatchError(
                f"this is shard {self.index}, not {request.shard}: list the shards in index order"
            )
        self._check_configured(request.job)
        theirs = codec.decode_job(request.job)
        if self.shard is None:
            self.shard = self._make_shard(theirs)
            self._metrics.set_parameters(self.shard.num_bytes)
        difference = first_difference(self.shard.job, theirs)
        if difference is not None:
            raise MismatchError(
                f"worker {request.worker.rank} disagrees with the job on shard {self.index}: "
                f"{difference}"
            )
        return self.shard.job

    def _check_configured(self, theirs: shard_pb2.JobSpec) -> None:
        """What the shard knows about the job before its first worker comes."""
        num_shards = len(self._config.cluster.shards) or 1
        for what, here, there in (
            ("protocol", PROTOCOL, theirs.protocol),
            ("job id", self._config.job.id, theirs.job_id),
            ("number of shards", num_shards, theirs.num_shards),
            ("mode", self._config.consistency.mode, theirs.mode),
        ):
            if here != there:
                raise MismatchError(
                    f"{what} is {here!r} on shard {self.index} and {there!r} on the worker"
                )

    def _make_shard(self, job: Job) -> Shard:
        num_bytes = sum(part.num_bytes for part in job.plan.parts_of_shard(self.index))
        if num_bytes > _MEMORY_BYTES:
            raise MismatchError(
                f"shard {self.index} would hold {num_bytes / 2**30:.1f} GiB of parameters on a "
                f"machine with {_MEMORY_BYTES / 2**30:.1f} GiB of memory: use more shards"
            )
        return Shard(job, self.index)

    def identify(self, worker: shard_pb2.WorkerId) -> int:
        """The rank of a worker that has joined. Raises MismatchError, or JobFailedError after the
        end.
        """
        self._check_alive()
        return self.roster.identify(worker)

    def open_stream(self, worker: shard_pb2.WorkerId) -> tuple[int, Outbox]:
        """A joined worker opens its stream."""
        self._check_alive()
        return self.roster.open(worker)

    def close_stream(self, rank: int, outbox: Outbox) -> None:
        """A worker's stream has ended."""
        self.roster.close(rank, outbox, time.monotonic())

    def leave(self, request: shard_pb2.LeaveRequest) -> None:
        """A worker's last word; only the lead acts on it."""
        rank = self.roster.identify(request.worker)
        self.roster.leave(rank)
        if self.office is not None:
            self.office.leave(rank, request.failure)

    # -- Steps -------------------------------------------------------------------------------------

    def receive(self, rank: int, request: PartFrame | shard_pb2.ExchangeRequest) -> None:
        """One message of a worker's stream. Raises ShardlineError, which ends the stream."""
        if isinstance(request, PartFrame):
            self._push(rank, request)
            return
        match request.WhichOneof("message"):
            case "part":
                self._push(rank, request.part)
            case "begin":
                begin = request.begin
                groups = codec.decode_groups(begin.groups)
                shard = self._joined_shard()
                self._perform(shard.begin(rank, begin.step, begin.epoch, begin.samples, groups))
            case "idle":
                self._lead().idle(rank)
            case "meet":
                self._meet(rank, _decode_meet(request.meet))
            case other:
                raise ProtocolError(f"worker {rank} sends {other} on an open stream")

    def _meet(self, rank: int, arrival: Arrival) -> None:
        try:
            self._lead().meet(rank, arrival)
        except UsageError as error:  # as a status it would be a failure of this shard
            raise MismatchError(str(error)) from error

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
            case Membership(epoch, members):
                self._metrics.set_live_workers(len(members))
                self._perform(self._joined_shard().set_membership(epoch, members))
            case Factor(step, factor):
                self._perform(self._joined_shard().apply_factor(step, factor))
            case Failed(reason):
                self.end(JobFailedError(reason))
            case Complete():
                self.end(None)

    def answer_meeting(self, met: Met) -> None:
        """Send a worker what its meeting decided."""
        outbox = self.roster[met.worker].outbox
        if outbox is not None:
            message = shard_pb2.Met(
                step=met.step, epoch=met.epoch, means=met.means, chosen=met.chosen
            )
            outbox.put(shard_pb2.ExchangeResponse(met=message))

    def _perform(self, todo: Iterable[effects.Effect]) -> None:
        for effect in todo:
            match effect:
                case effects.Release():
                    self._release(effect)
                case effects.Squares():
                    self.report(effect)
                case effects.Duplicate():
                    self._metrics.duplicate()
                case effects.HyperparametersDiffer(step, workers):
                    self._warn_once(step, workers)

    def _release(self, release: effects.Release) -> None:
        shard = self._joined_shard()
        state = shard.part(release.part)
        frame = codec.encode_answer(release.version, release.part, state.parameters)
        for rank in release.workers:
            peer = self.roster[rank]
            if peer.outbox is not None:
                peer.outbox.put(frame)
                peer.sent_bytes += state.part.num_bytes
                self._metrics.sent(state.part.num_bytes)

    def _warn_once(self, step: int, workers: tuple[int, int]) -> None:
        if self._metrics.hyperparameters_differ():
            text = "workers %d and %d have different hyperparameters at step %d: %d's are used"
            log.warning(text, *workers, step, min(workers))

    # -- Values ------------------------------------------------------------------------------------

    def load(self, request: shard_pb2.LoadRequest) -> None:
        """One message of a load. Raises ProtocolError."""
        values.load(self._joined_shard(), self._buffers, request)

    def read(self, content: int) -> Iterator[shard_pb2.PullResponse | bytes]:
        """The values asked for. Raises ProtocolError before the shard has its initial values."""
        shard = self._joined_shard()
        if not shard.ready:
            raise ProtocolError(f"shard {self.index} has no values yet")
        return values.read(shard, self._buffers, content)

    # -- Time and the end --------------------------------------------------------------------------

    def tick(self) -> None:
        """Let time pass: lost workers, rates, the lead's deadlines."""
        now = time.monotonic()
        for rank in self.roster.lost(now):
            peer = self.roster[rank]
            end = "closed" if peer.opened else "was never opened"
            died = f"worker {rank} ({peer}) died: its stream to shard {self.index} {end}"
            self.report(Failed(died))
        elapsed, self._ticked = now - self._ticked, now
        self.roster.update_rates(elapsed)
        self.updates.update(self.version, elapsed)
        self._show_progress()
        if self.office is not None:
            self.office.tick(now)

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
        if failure is not None:
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


def _decode_meet(message: shard_pb2.Meet) -> Arrival:
    try:
        purpose = Purpose(message.purpose)
    except ValueError as error:
        raise ProtocolError(f"unknown purpose {message.purpose} of a meeting") from error
    if not 0 <= message.weight < math.inf:
        raise ProtocolError(f"numbers cannot be averaged with weight {message.weight}")
    return Arrival(purpose, message.step, tuple(message.values), message.weight)
