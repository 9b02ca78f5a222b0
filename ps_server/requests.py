"""A worker's requests to the lead: decode, one call, encode."""

from __future__ import annotations

from ps_core import dialogue
from ps_core.errors import ProtocolError
from ps_core.exchange import Purpose
from ps_core.v1 import shard_pb2
from ps_server.office import Office
from ps_server.orders import Met, Readmitted

_PRESENT = ("member", "idle")


def obey(
    office: Office, rank: int, request: shard_pb2.ExchangeRequest
) -> shard_pb2.ExchangeResponse | None:
    """Carry a request out; its answer, unless that comes later. Raises ProtocolError, or UsageError
    when the workers' scripts disagree.
    """
    match request.WhichOneof("message"):
        case "idle":
            office.idle(rank)
        case "meet":
            arrival = dialogue.decode_meet(request.meet)
            if office.state(rank) == "joined" and arrival.purpose is not Purpose.START:
                raise ProtocolError(f"worker {rank} meets others and does not take part yet")
            office.meet(rank, arrival)
        case "lease":
            return _lease(office, rank, request.lease)
    return None


def _lease(
    office: Office, rank: int, message: shard_pb2.LeaseRequest
) -> shard_pb2.ExchangeResponse | None:
    if message.returned:
        office.give_back(rank, message.returned, declined=message.declined)
    spec = dialogue.decode_pass(message)
    if spec is None:
        return None
    if office.state(rank) not in _PRESENT:
        raise ProtocolError(f"worker {rank} asks for samples and does not take part yet")
    grant = office.request(rank, message.loader, spec)
    return shard_pb2.ExchangeResponse(leases=dialogue.encode_grant(grant))


def encode_told(told: Met | Readmitted) -> shard_pb2.ExchangeResponse:
    """What a worker is told that goes on."""
    if isinstance(told, Readmitted):
        return shard_pb2.ExchangeResponse(refused=shard_pb2.Refused(next_step=told.next_step))
    met = shard_pb2.Met(
        step=told.step,
        epoch=told.epoch,
        means=told.means,
        chosen=told.chosen,
        refreshed=told.refreshed,
        leases=dialogue.encode_grant(told.grant) if told.grant is not None else None,
        position=dialogue.encode_position(told.position) if told.position is not None else None,
        past=told.is_past,
        handed_over=told.handed_over,
    )
    return shard_pb2.ExchangeResponse(met=met)
