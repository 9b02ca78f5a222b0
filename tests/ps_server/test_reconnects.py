"""Streams that break at every point of a step, of a meeting and of a request, over real gRPC.

Whatever was repeated: the parameters are those of plain SGD, computed here, and who asks again is
answered with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from grpc import StatusCode

from ps_core import dialogue
from ps_core.exchange import Purpose
from ps_core.leases import PassSpec
from ps_core.settings import ConsistencyConfig
from ps_core.v1 import shard_pb2
from ps_core.v1.shard_pb2 import ExchangeRequest, ExchangeResponse
from tests.ps_server.shards import Shards
from tests.wire import Frame, HandJob, HandStream

NUM_PARTS = (5, 4)
"""Of the job's parts on each shard."""


@pytest.fixture(scope="module")
def started() -> Iterator[HandJob]:
    """Two workers and two shards in lockstep."""
    with Shards(num_shards=2) as shards, closing(HandJob(shards)) as job:
        job.start()
        job.step()
        assert tuple(len(job.parts_of(shard)) for shard in range(2)) == NUM_PARTS
        yield job


@pytest.fixture
def job(started: HandJob) -> Iterator[HandJob]:
    """The job trains before and after each test."""
    yield started
    for _ in range(2):
        started.step()
    versions = {wire.describe().version for wire in started.wires}
    assert versions == {started.next_step}


def finish(stream: HandStream) -> None:
    """The shard has taken everything, and the worker reads no answer."""
    assert stream.finish()[0] is StatusCode.OK


def cut(stream: HandStream) -> None:
    """Nobody knows what has arrived."""
    stream.cut()


Break = Callable[[HandStream], None]
BREAKS = pytest.mark.parametrize("break_stream", [finish, cut])
POINTS = pytest.mark.parametrize(
    ("shard", "num_sent"), [(s, n) for s in range(2) for n in range(NUM_PARTS[s] + 2)]
)
"""A shard, and how much of a step's begin and parts it has been sent."""


def read_parts(stream: HandStream, count: int) -> dict[int, bytes]:
    """So many answers, all of different parts: index → frame."""
    frames: dict[int, bytes] = {}
    while len(frames) < count:
        frame = stream.read_bytes()
        answer = ExchangeResponse.FromString(frame)
        assert answer.WhichOneof("message") == "part"
        assert answer.part.part not in frames
        frames[answer.part.part] = frame
    return frames


def duplicates(job: HandJob, shard: int) -> int:
    return job.wires[shard].describe().duplicate_parts


# -- In the middle of a step -----------------------------------------------------------------------


@BREAKS
@POINTS
def test_a_stream_that_breaks_before_the_update_changes_nothing(
    job: HandJob, shard: int, num_sent: int, break_stream: Break
) -> None:
    job.streams[0, shard].send(*job.share(0, shard)[:num_sent])
    break_stream(job.streams[0, shard])
    job.open(0, shard)
    job.step()  # says all of it, again or for the first time


@BREAKS
@POINTS
def test_a_stream_that_breaks_twice_changes_nothing(
    job: HandJob, shard: int, num_sent: int, break_stream: Break
) -> None:
    for count in (num_sent, NUM_PARTS[shard] + 1 - num_sent):
        job.streams[0, shard].send(*job.share(0, shard)[:count])
        break_stream(job.streams[0, shard])
        job.open(0, shard)
    job.step()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("shard", "num_read"), [(s, n) for s in range(2) for n in range(NUM_PARTS[s] + 1)]
)
def test_answers_that_were_not_read_are_given_again_with_the_same_bytes(
    job: HandJob, rank: int, shard: int, num_read: int
) -> None:
    before = duplicates(job, shard)
    other, shares = 1 - rank, {(r, s): job.share(r, s) for r in range(2) for s in range(2)}
    for (r, s), frames in shares.items():
        job.streams[r, s].send(*frames)
    job.advance(0, 1)
    job.check_parts_of(rank, 1 - shard)
    job.check_parts_of(other, 1 - shard)
    count = NUM_PARTS[shard]
    expected = read_parts(job.streams[other, shard], count)  # so all is applied
    known = read_parts(job.streams[rank, shard], num_read)
    job.streams[rank, shard].cut()
    # As the client does: the begin, and the pushes that are not answered.
    begin, *pushes = shares[rank, shard]
    parts = [part.index for part in job.parts_of(shard)]
    missing = [frame for part, frame in zip(parts, pushes, strict=True) if part not in known]
    job.open(rank, shard).send(begin, *missing)
    again = read_parts(job.streams[rank, shard], count - num_read)
    assert known | again == expected
    for part in job.parts_of(shard):
        job.check(part, ExchangeResponse.FromString(expected[part.index]).part)
    assert duplicates(job, shard) - before == len(missing)


def test_a_begin_alone_is_repeated_when_all_has_been_answered(job: HandJob) -> None:
    begin = job.begin(0)
    job.step()
    job.streams[0, 1].cut()
    job.open(0, 1).send(begin)
    job.step()


def test_pushes_of_a_stream_that_breaks_are_counted_once(job: HandJob) -> None:
    before = [duplicates(job, shard) for shard in range(2)]
    for _ in range(3):
        job.streams[0, 0].send(*job.share(0, 0))
        finish(job.streams[0, 0])
        job.open(0, 0)
    job.step()
    assert [duplicates(job, shard) - before[shard] for shard in range(2)] == [3 * NUM_PARTS[0], 0]


def test_a_worker_that_abstains_is_answered_again_as_well(job: HandJob) -> None:
    begins = {}
    for shard in range(2):
        job.streams[1, shard].send(*job.share(1, shard))
        begins[shard] = job.begin(0)
        begins[shard].begin.samples = 0
        job.streams[0, shard].send(begins[shard])
    job.advance(1)
    expected = {}
    for shard in range(2):
        expected[shard] = read_parts(job.streams[1, shard], NUM_PARTS[shard])
        job.streams[0, shard].cut()
        job.open(0, shard).send(begins[shard])
        assert read_parts(job.streams[0, shard], NUM_PARTS[shard]) == expected[shard]


# -- Requests to the lead --------------------------------------------------------------------------


def meet(job: HandJob, rank: int, value: float) -> ExchangeRequest:
    return job.ask(rank, job.arrival(Purpose.MEAN, job.next_step, value))


def reopen(job: HandJob, rank: int, *frames: Frame) -> None:
    job.open(rank, 0).send(*frames)


@BREAKS
@pytest.mark.parametrize("num_breaks", [1, 3])
def test_a_meeting_goes_on_over_a_stream_that_breaks(
    job: HandJob, break_stream: Break, num_breaks: int
) -> None:
    request = meet(job, 0, 1.0)
    for _ in range(num_breaks):
        break_stream(job.streams[0, 0])
        reopen(job, 0, request)
    meet(job, 1, 4.0)
    for rank in range(2):
        met = job.answer(rank, "met")
        assert list(met.met.means) == [2.5]
        assert met.number == (request.number if rank == 0 else met.number)
        job.epoch = met.met.epoch


@BREAKS
def test_the_end_of_a_meeting_that_was_lost_is_told_again_with_the_same_bytes(
    job: HandJob, break_stream: Break
) -> None:
    requests = [meet(job, rank, 3.0 * rank) for rank in range(2)]
    answers = []
    met = job.answer(1, "met")  # so worker 0 has been told as well
    for _ in range(3):
        break_stream(job.streams[0, 0])
        reopen(job, 0, requests[0])
        answers.append(job.streams[0, 0].read_bytes())
    assert len(set(answers)) == 1
    told = ExchangeResponse.FromString(answers[0])
    assert list(told.met.means) == list(met.met.means) == [1.5]
    assert (told.met.step, told.met.epoch) == (met.met.step, met.met.epoch)
    job.epoch = met.met.epoch


def lease(loader: int) -> ExchangeRequest:
    """Wants two of a hundred thousand samples."""
    return ExchangeRequest(lease=dialogue.encode_lease_request(loader, PassSpec(100_000, 2)))


@BREAKS
def test_a_lease_that_was_lost_is_granted_again_and_not_another(
    job: HandJob, break_stream: Break
) -> None:
    ledger = job.wires[0].describe().ledger
    request = job.ask(0, lease(0))
    if break_stream is finish:
        finish(job.streams[0, 0])
        reopen(job, 0, request)
    first = job.streams[0, 0].read_bytes()
    for _ in range(3):
        break_stream(job.streams[0, 0])
        reopen(job, 0, request)
        assert job.streams[0, 0].read_bytes() == first
    job.ask(0, lease(0))
    other = job.answer(0, "leases").leases.leases
    assert [each.id for each in ExchangeResponse.FromString(first).leases.leases] != [
        each.id for each in other
    ]
    assert job.wires[0].describe().ledger.granted - ledger.granted == 4


def test_requests_ahead_are_answered_in_order_after_a_break(job: HandJob) -> None:
    requests = [job.ask(0, lease(1)) for _ in range(4)]
    finish(job.streams[0, 0])
    requests += [job.numbered(0, lease(1))]
    reopen(job, 0, *requests)
    answers = [job.streams[0, 0].read() for _ in range(5)]
    assert [answer.number for answer in answers] == [each.number for each in requests]
    starts = [answer.leases.leases[0].start for answer in answers]
    assert starts == sorted(set(starts))


def test_leases_that_come_back_come_back_once(job: HandJob) -> None:
    job.ask(0, lease(2))
    [granted] = job.answer(0, "leases").leases.leases
    before = job.wires[0].describe().ledger.returned
    given_back = shard_pb2.LeaseRequest(returned=[granted.id])
    request = job.ask(0, ExchangeRequest(lease=given_back))
    for _ in range(3):
        finish(job.streams[0, 0])
        reopen(job, 0, request)
    finish(job.streams[0, 0])
    job.open(0, 0)
    assert job.wires[0].describe().ledger.returned - before == 2


def test_a_worker_that_has_met_since_is_not_idle_because_it_says_so_again(job: HandJob) -> None:
    idle = job.ask(0, ExchangeRequest(idle=shard_pb2.Idle()))
    request = meet(job, 0, 1.0)
    meet(job, 1, 1.0)
    assert job.answer(0, "met").number == request.number
    job.epoch = job.answer(1, "met").met.epoch
    finish(job.streams[0, 0])
    reopen(job, 0, idle, request)
    assert job.answer(0, "met").number == request.number
    assert {w.state for w in job.wires[0].describe().workers} == {"member"}


# -- Every way to synchronise ----------------------------------------------------------------------

MODES = {
    "sync": ConsistencyConfig(),
    "deterministic": ConsistencyConfig(deterministic=True),
    "bounded": ConsistencyConfig("bounded", bound=2),
    "async": ConsistencyConfig("async"),
    "local": ConsistencyConfig("local"),
}


@pytest.fixture(scope="module", params=MODES)
def alone(request: pytest.FixtureRequest) -> Iterator[HandJob]:
    """One worker, whose pushes are updates at once."""
    consistency = MODES[request.param]
    settings: dict[str, Any] = {
        "consistency.mode": consistency.mode,
        "consistency.bound": consistency.bound,
        "consistency.deterministic": consistency.deterministic,
    }
    with (
        Shards(num_shards=2, num_workers=1, settings=settings) as shards,
        closing(HandJob(shards, num_workers=1, consistency=consistency)) as job,
    ):
        job.start()
        yield job


@BREAKS
@pytest.mark.parametrize("num_sent", range(max(NUM_PARTS) + 2))
def test_in_every_mode_a_push_that_was_applied_is_answered_again_and_not_applied_again(
    alone: HandJob, num_sent: int, break_stream: Break
) -> None:
    for shard in range(2):
        share = alone.share(0, shard)
        alone.streams[0, shard].send(*share[:num_sent])
        break_stream(alone.streams[0, shard])
        alone.open(0, shard).send(*share)
    alone.advance(0)
    for shard in range(2):
        frames = read_parts(alone.streams[0, shard], NUM_PARTS[shard])
        for part in alone.parts_of(shard):
            alone.check(part, ExchangeResponse.FromString(frames[part.index]).part)
    alone.step()


def test_in_every_mode_answers_that_were_not_read_are_the_same_again(alone: HandJob) -> None:
    for shard in range(2):
        share = alone.share(0, shard)
        alone.streams[0, shard].send(*share)
        first = read_parts(alone.streams[0, shard], NUM_PARTS[shard])
        alone.streams[0, shard].cut()
        alone.open(0, shard).send(*share)
        assert read_parts(alone.streams[0, shard], NUM_PARTS[shard]) == first
    alone.advance(0)
    alone.step()


# -- With backup workers ---------------------------------------------------------------------------


def test_a_worker_that_was_too_late_learns_so_although_its_stream_broke() -> None:
    consistency = ConsistencyConfig(backup_workers=1)
    settings = {"consistency.backup_workers": 1}
    with (
        Shards(num_shards=2, settings=settings) as shards,
        closing(HandJob(shards, consistency=consistency)) as job,
    ):
        job.start()
        late = {shard: job.share(1, shard) for shard in range(2)}
        job.ranks = [0]
        job.step()  # without worker 1
        for shard in range(2):
            job.streams[1, shard].send(*late[shard])
            finish(job.streams[1, shard])
            job.open(1, shard)
        job.step()  # at whose turn worker 1 enters again
        for shard in range(2):
            job.streams[1, shard].send(*late[shard])
        refused = job.answer(1, "refused").refused
        assert refused.next_step == job.next_step
        job.check_parts(1)
        job.ranks = [1]
        job.step()
