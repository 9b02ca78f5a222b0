"""The messages between the lead and the other shards, to and from our own types."""

from __future__ import annotations

from ps_core.errors import ShardlineError
from ps_core.v1 import lead_pb2
from ps_server.effects import Remains
from ps_server.orders import Complete, Factor, Failed, Membership, Seal
from ps_server.terms import Member

Order = Membership | Factor | Seal | Complete | Failed
"""What the lead tells every shard, its own included."""


def encode_order(order: Order) -> lead_pb2.ControlResponse:
    """An order as a message."""
    match order:
        case Membership():
            return lead_pb2.ControlResponse(membership=_encode_membership(order))
        case Factor(step, factor):
            return lead_pb2.ControlResponse(factor=lead_pb2.Factor(step=step, factor=factor))
        case Seal(step, contributors):
            seal = lead_pb2.Seal(step=step, contributors=sorted(contributors))
            return lead_pb2.ControlResponse(seal=seal)
        case Failed(reason):
            return lead_pb2.ControlResponse(failure=lead_pb2.Failure(reason=reason))
        case Complete():
            return lead_pb2.ControlResponse(complete=lead_pb2.Complete())


def _encode_membership(order: Membership) -> lead_pb2.Membership:
    members = [
        lead_pb2.Member(
            rank=rank,
            incarnation=member.incarnation,
            first_step=member.first_step,
            enters=member.enters,
        )
        for rank, member in sorted(order.members.items())
    ]
    evicted = [lead_pb2.Member(rank=r, incarnation=i) for r, i in sorted(order.evicted.items())]
    return lead_pb2.Membership(
        epoch=order.epoch, members=members, evicted=evicted, reason=order.reason
    )


def decode_order(message: lead_pb2.ControlResponse) -> Order | None:
    """The order of a message; None for a Welcome. Raises ShardlineError for an unknown one."""
    match message.WhichOneof("message"):
        case "welcome":
            return None
        case "membership":
            return _decode_membership(message.membership)
        case "factor":
            return Factor(message.factor.step, message.factor.factor)
        case "seal":
            return Seal(message.seal.step, frozenset(message.seal.contributors))
        case "failure":
            return Failed(message.failure.reason)
        case "complete":
            return Complete()
    raise ShardlineError(
        "the lead sends a message that this release does not know: run the same release everywhere"
    )


def _decode_membership(message: lead_pb2.Membership) -> Membership:
    members = {m.rank: Member(m.incarnation, m.first_step, m.enters) for m in message.members}
    evicted = {member.rank: member.incarnation for member in message.evicted}
    return Membership(message.epoch, members, evicted, reason=message.reason)


def encode_remains(remains: Remains) -> lead_pb2.Remains:
    """A shard's word about a fenced process."""
    return lead_pb2.Remains(
        rank=remains.worker,
        incarnation=remains.incarnation,
        step=remains.step,
        samples=remains.samples,
        leases=remains.leases,
        used_parts=remains.used_parts,
        num_parts=remains.num_parts,
        weight=remains.given_weight,
    )


def decode_remains(message: lead_pb2.Remains) -> Remains:
    """The inverse."""
    return Remains(
        message.rank,
        message.incarnation,
        message.step,
        message.samples,
        tuple(message.leases),
        message.used_parts,
        message.num_parts,
        message.weight if message.HasField("weight") else None,
    )
