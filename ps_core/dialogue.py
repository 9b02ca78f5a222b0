"""What a worker says besides parts, and what it is told: to messages and back."""

from __future__ import annotations

from collections.abc import Sequence

from ps_core.codec import encode_groups
from ps_core.errors import ProtocolError
from ps_core.exchange import Arrival, Grant, Position, Purpose, Work
from ps_core.leases import Lease, PassSpec
from ps_core.optim_spec import Hyperparameters
from ps_core.point import Point
from ps_core.v1 import shard_pb2
from ps_core.weights import is_weight

MAX_STEP = 2**62
MAX_SAMPLES = 2**48
"""In a dataset, or behind one step: sums of them fit into the 64 bits of the wire."""
MAX_LEASES = 2**16
"""Behind one step."""
MAX_SCHEDULES = 2**10
"""Every worker that joins is told about all of them."""


def encode_begin(
    step: int, epoch: int, work: Work, groups: Sequence[Hyperparameters]
) -> shard_pb2.Begin:
    """The opening of a step."""
    return shard_pb2.Begin(
        step=step,
        epoch=epoch,
        samples=work.samples,
        groups=encode_groups(groups),
        leases=work.leases,
        phases=shard_pb2.Phases(
            data_seconds=work.data_seconds, compute_seconds=work.compute_seconds
        ),
        schedules=work.schedules,
        point=encode_point(work.point),
        weight=work.given_weight,
    )


def decode_work(message: shard_pb2.Begin) -> Work:
    """What stands behind a step. Raises ProtocolError."""
    _check_step(message.step)
    if message.samples > MAX_SAMPLES:
        raise ProtocolError(f"{message.samples} samples cannot be behind one step")
    if len(message.leases) > MAX_LEASES:
        raise ProtocolError(f"{len(message.leases)} leases cannot be behind one step")
    if len(message.schedules) > MAX_SCHEDULES:
        raise ProtocolError(f"{len(message.schedules)} schedulers are more than {MAX_SCHEDULES}")
    weight = message.weight if message.HasField("weight") else None
    if not is_weight(message.weight):
        raise ProtocolError(f"gradients cannot be averaged with weight {message.weight}")
    phases = message.phases
    return Work(
        message.samples,
        tuple(message.leases),
        phases.data_seconds,
        phases.compute_seconds,
        tuple(message.schedules),
        decode_point(message.point),
        weight,
    )


def encode_point(point: Point) -> shard_pb2.Point:
    """A call of the script."""
    return shard_pb2.Point(loop=point.loop, data_epoch=point.data_epoch, count=point.count)


def decode_point(message: shard_pb2.Point) -> Point:
    """The inverse."""
    return Point(message.loop, message.data_epoch, message.count)


def _check_step(step: int) -> None:
    if step > MAX_STEP:
        raise ProtocolError(f"step {step} is beyond all training")


def encode_meet(arrival: Arrival) -> shard_pb2.Meet:
    """A worker waits for the others."""
    return shard_pb2.Meet(
        purpose=shard_pb2.Purpose.Name(arrival.purpose),
        step=arrival.step,
        values=arrival.values,
        weight=arrival.weight,
        takes_leases=arrival.takes_leases,
        point=encode_point(arrival.point),
        hands_over=arrival.hands_over,
    )


def decode_meet(message: shard_pb2.Meet) -> Arrival:
    """The inverse. Raises ProtocolError."""
    _check_step(message.step)
    try:
        purpose = Purpose(message.purpose)
    except ValueError as error:
        raise ProtocolError(f"unknown purpose {message.purpose} of a meeting") from error
    if not is_weight(message.weight):
        raise ProtocolError(f"numbers cannot be averaged with weight {message.weight}")
    return Arrival(
        purpose,
        message.step,
        tuple(message.values),
        message.weight,
        message.takes_leases,
        decode_point(message.point),
        message.hands_over,
    )


def encode_lease_request(loader: int, spec: PassSpec) -> shard_pb2.LeaseRequest:
    """A worker wants samples of a loader's pass."""
    message = shard_pb2.LeaseRequest(loader=loader)
    wanted: shard_pb2.Pass = getattr(message, "pass")  # a word of Python's, too
    wanted.num_samples, wanted.batch_size = spec.num_samples, spec.batch_size
    wanted.global_batch_size, wanted.drop_last = spec.global_batch_size, spec.drop_last
    wanted.point.CopyFrom(encode_point(spec.point))
    wanted.fingerprint = spec.fingerprint
    return message


def decode_pass(message: shard_pb2.LeaseRequest) -> PassSpec | None:
    """What is wanted, if anything. Raises ProtocolError."""
    if not message.HasField("pass"):
        return None
    wanted: shard_pb2.Pass = getattr(message, "pass")
    if wanted.num_samples > MAX_SAMPLES:
        raise ProtocolError(f"a pass over {wanted.num_samples} samples never ends")
    try:
        return PassSpec(
            wanted.num_samples,
            wanted.batch_size,
            wanted.global_batch_size,
            wanted.drop_last,
            decode_point(wanted.point),
            wanted.fingerprint,
        )
    except ValueError as error:
        raise ProtocolError(f"no pass is like this: {error}") from error


def encode_grant(grant: Grant) -> shard_pb2.Leases:
    """The lead's answer to a request for samples."""
    leases = [
        shard_pb2.Lease(id=each.id, start=each.start, length=each.length) for each in grant.leases
    ]
    loader = grant.leases[0].loader if grant.leases else 0
    message = shard_pb2.Leases(loader=loader, leases=leases, over=grant.is_over)
    setattr(message, "pass", grant.number)
    return message


def decode_grant(message: shard_pb2.Leases) -> Grant:
    """The inverse."""
    number: int = getattr(message, "pass")
    leases = (
        Lease(each.id, message.loader, number, each.start, each.length) for each in message.leases
    )
    return Grant(number, tuple(leases), message.over)


def encode_position(position: Position) -> shard_pb2.Position:
    """Where a running job stands."""
    return shard_pb2.Position(
        point=encode_point(position.point),
        schedules=position.schedules,
        schedules_step=position.schedules_step,
        schedules_point=encode_point(position.schedules_point),
    )


def decode_position(message: shard_pb2.Position) -> Position:
    """The inverse."""
    return Position(
        decode_point(message.point),
        tuple(message.schedules),
        message.schedules_step,
        decode_point(message.schedules_point),
    )
