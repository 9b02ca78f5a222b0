"""What all workers of a job agree on besides tensors, and how a worker that lacks it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from allreduce.passes import Pass, Passes
from ps_core.dialogue import decode_point, decode_position, encode_point, encode_position
from ps_core.ranges import Ranges
from ps_core.v1 import group_pb2
from ps_core.whereabouts import Whereabouts


@dataclass(slots=True)
class Agreed:
    """The same on every worker once a round is complete."""

    passes: Passes
    round: int = 0
    """Rounds that are complete."""
    version: int = 0
    """Updates that are in the parameters."""
    rows: Mapping[int, list[float]] = field(default_factory=dict)
    """Rank → what it said in the last round."""
    goes_on: bool = False
    """The last round was at the end of the data, and found more of it."""
    whereabouts: Whereabouts = field(default_factory=Whereabouts)


def encode(agreed: Agreed) -> bytes:
    """All of it."""
    passes, whereabouts = agreed.passes, agreed.whereabouts
    loaders = sorted({*passes.open, *passes.num_ended})
    message = group_pb2.GroupState(
        round=agreed.round,
        goes_on=agreed.goes_on,
        version=agreed.version,
        rows=[group_pb2.Row(rank=rank, numbers=row) for rank, row in agreed.rows.items()],
        position=encode_position(whereabouts.position),
        meetings=[
            group_pb2.PastMeeting(point=encode_point(point), means=means)
            for point, means in whereabouts.meetings.items()
        ],
        loaders=[_encode_loader(passes, loader) for loader in loaders],
        speeds=[
            group_pb2.Speed(rank=rank, samples_per_second=speed)
            for rank, speed in passes.speeds.items()
        ],
    )
    return message.SerializeToString()


def adopt(agreed: Agreed, data: bytes) -> None:
    """Take over what another worker has encoded, as if this one had been there."""
    message = group_pb2.GroupState.FromString(data)
    agreed.round, agreed.version = message.round, message.version
    agreed.goes_on = message.goes_on
    agreed.rows = {row.rank: list(row.numbers) for row in message.rows}
    agreed.whereabouts.position = decode_position(message.position)
    agreed.whereabouts.meetings = {
        decode_point(each.point): tuple(each.means) for each in message.meetings
    }
    passes = agreed.passes
    passes.speeds = {each.rank: each.samples_per_second for each in message.speeds}
    passes.open.clear()
    for each in message.loaders:
        passes.num_ended[each.loader] = each.num_ended
        if each.num_ended:
            passes.ended[each.loader] = decode_point(each.ended)
        if each.open:
            passes.open[each.loader] = _decode_pass(each)


def _encode_loader(passes: Passes, loader: int) -> group_pb2.LoaderState:
    message = group_pb2.LoaderState(loader=loader, num_ended=passes.num_ended[loader])
    if loader in passes.ended:
        message.ended.CopyFrom(encode_point(passes.ended[loader]))
    current = passes.open.get(loader)
    if current is not None:
        message.open = True
        message.num_positions, message.unit = current.num_positions, current.unit
        message.shared, message.progress = current.is_shared, current.has_progress
        message.point.CopyFrom(encode_point(current.point))
        message.used.extend(
            group_pb2.Positions(start=each.start, stop=each.stop) for each in current.used
        )
    return message


def _decode_pass(message: group_pb2.LoaderState) -> Pass:
    return Pass(
        number=message.num_ended,
        num_positions=message.num_positions,
        unit=message.unit,
        is_shared=message.shared,
        point=decode_point(message.point),
        used=Ranges(range(each.start, each.stop) for each in message.used),
        has_progress=message.progress,
    )
