"""The lead at the edge: the pure `Lead` with the control streams of the other shards around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ps_core.errors import DataLossError, MismatchError, ProtocolError, ShardlineError
from ps_core.job import Job
from ps_core.v1 import lead_pb2
from ps_server import lead
from ps_server.lead import Arrival, Complete, Factor, Failed, Lead, Membership, Met
from ps_server.liveness import Liveness
from ps_server.outbox import Outbox

Order = Membership | Factor | Complete | Failed
"""What the lead tells every shard, its own included."""


class Office:
    """Carries the lead's effects out. Only touched on the event loop."""

    def __init__(
        self,
        incarnation: int,
        num_shards: int,
        grace_seconds: float,
        obey: Callable[[Order], None],
        answer: Callable[[Met], None],
    ) -> None:
        """`obey` gives an order to the lead's own shard, `answer` sends a worker what its meeting
        decided.
        """
        self._incarnation = incarnation
        self._num_shards = num_shards
        self._obey = obey
        self._answer = answer
        self._lead: Lead | None = None
        self._shards: dict[int, int] = {}
        self._controls: dict[int, Outbox] = {}
        self._liveness = Liveness(grace_seconds)
        self._last: dict[type[Order], lead_pb2.ControlResponse] = {}

    def join(self, job: Job, worker: int, incarnation: int, deadline: float) -> bool:
        """Admit a worker; True: its initial values count. The first one's `deadline` is the one for
        all.
        """
        if self._lead is None:
            holders = frozenset(part.shard for part in job.plan.parts)
            norm = job.optimizer.max_grad_norm
            self._lead = Lead(job.num_workers, holders, norm, deadline)
        return self._lead.join(worker, incarnation)

    def state(self, worker: int) -> str:
        """Where a worker is, in a word."""
        return self._lead.state(worker) if self._lead else ""

    def idle(self, worker: int) -> None:
        """A worker is not to be waited for."""
        self._perform(self._joined().idle(worker))

    def meet(self, worker: int, arrival: Arrival) -> None:
        """A worker waits for all the others."""
        self._perform(self._joined().meet(worker, arrival))

    def leave(self, worker: int, failure: str) -> None:
        """A worker's last word."""
        self._perform(self._joined().leave(worker, failure))

    def squares(self, shard: int, step: int, total: float) -> None:
        """A shard's share of the squared norm."""
        joined = self._joined()
        if joined.max_grad_norm is None:
            raise ProtocolError(f"shard {shard} sends squares, but nothing is clipped")
        self._perform(joined.squares(shard, step, total))

    def fail(self, reason: str) -> None:
        """The job cannot go on."""
        self._perform(self._lead.fail(reason) if self._lead else [Failed(reason)])

    def tick(self, now: float) -> None:
        """Let time pass."""
        for shard in self._liveness.lost(now):
            self.fail(
                f"shard {shard} was lost: its stream to the lead closed and did not come back"
            )
        if self._lead is not None:
            self._perform(self._lead.tick(now))

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
        outbox = self._controls[hello.shard] = Outbox()
        self._liveness.opened(hello.shard)
        welcome = lead_pb2.Welcome(lead_incarnation=self._incarnation)
        outbox.put(lead_pb2.ControlResponse(welcome=welcome))
        for message in self._last.values():
            outbox.put(message)
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
            case "failure":
                self.fail(request.failure.reason)
            case other:
                raise ProtocolError(f"shard {shard} sends {other} on an open control stream")

    def _joined(self) -> Lead:
        if self._lead is None:
            raise ProtocolError("no worker has joined yet")
        return self._lead

    def _perform(self, effects: Iterable[lead.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Met):
                self._answer(effect)
                continue
            message = encode_order(effect)
            self._last[type(effect)] = message
            for outbox in self._controls.values():
                outbox.put(message)
                if isinstance(effect, Failed | Complete):
                    outbox.finish()
            self._obey(effect)


def encode_order(order: Order) -> lead_pb2.ControlResponse:
    """An order as a message."""
    match order:
        case Membership(epoch, members):
            membership = lead_pb2.Membership(epoch=epoch, members=sorted(members))
            return lead_pb2.ControlResponse(membership=membership)
        case Factor(step, factor):
            return lead_pb2.ControlResponse(factor=lead_pb2.Factor(step=step, factor=factor))
        case Failed(reason):
            return lead_pb2.ControlResponse(failure=lead_pb2.Failure(reason=reason))
        case Complete():
            return lead_pb2.ControlResponse(complete=lead_pb2.Complete())


def decode_order(message: lead_pb2.ControlResponse) -> Order | None:
    """The order of a message; None for a Welcome. Raises ShardlineError for an unknown one."""
    match message.WhichOneof("message"):
        case "welcome":
            return None
        case "membership":
            return Membership(message.membership.epoch, frozenset(message.membership.members))
        case "factor":
            return Factor(message.factor.step, message.factor.factor)
        case "failure":
            return Failed(message.failure.reason)
        case "complete":
            return Complete()
    raise ShardlineError(
        "the lead sends a message that this release does not know: run the same release everywhere"
    )
