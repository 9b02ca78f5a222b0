"""Workers that come, go, fall silent and are replaced, over real gRPC: who is heard, who is not,
and what the others' parameters are made of.
"""

from __future__ import annotations

import queue
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import grpc
import pytest
import torch
from grpc import StatusCode

from ps_core import codec, dialogue
from ps_core.errors import JobFailedError
from ps_core.exchange import Purpose
from ps_core.leases import PassSpec
from ps_core.settings import ConsistencyConfig
from ps_core.v1 import lead_pb2, shard_pb2
from ps_core.v1.shard_pb2 import ExchangeRequest, LoadRequest
from tests.ps_server.shards import Shards
from tests.wire import Frame, HandJob, HandStream

BEAT = ExchangeRequest(heartbeat=shard_pb2.Heartbeat())
ELASTIC = {"cluster.max_workers": 4, "membership.heartbeat_floor_seconds": 600}


@contextmanager
def a_job(
    *, num_shards: int = 2, num_workers: int = 2, serve: int | None = None, **settings: object
) -> Iterator[tuple[HandJob, Shards]]:
    """A job that has started; `settings` are configuration keys with underscores for dots."""
    given = {key.replace("__", "."): value for key, value in settings.items()}
    shards = Shards(
        num_shards=num_shards, num_workers=num_workers, serve=serve, settings={**ELASTIC, **given}
    )
    with shards, closing(HandJob(shards, num_workers=num_workers)) as job:
        job.start()
        yield job, shards


def states(job: HandJob, shard: int = 0) -> dict[int, str]:
    """Each worker's, as a shard tells it."""
    return {each.worker.rank: each.state for each in job.wires[shard].describe().workers}


def step_until_member(job: HandJob, rank: int) -> None:
    """The others step until the worker has entered."""
    for _ in range(100):
        job.step()
        if states(job)[rank] == "member":
            return
    raise AssertionError(f"worker {rank} never entered")


def enter(job: HandJob, rank: int) -> shard_pb2.Met:
    """A worker that has joined waits for its turn; what it is told."""
    job.ask(rank, job.arrival(Purpose.START, 0))
    step_until_member(job, rank)
    met = job.answer(rank, "met").met
    assert met.step == job.next_step
    return met


def check_exact_parts(job: HandJob, rank: int, version: int) -> None:
    """Every part comes once, in exactly this version, and nothing else comes."""
    for shard in range(len(job.wires)):
        stream, missing = job.streams[rank, shard], {p.index: p for p in job.parts_of(shard)}
        while missing:
            answer = stream.read()
            assert answer.WhichOneof("message") == "part"
            assert answer.part.step == version
            job.check(missing.pop(answer.part.part), answer.part)


def evicted(rank: int, reason: str) -> str:
    return rf"^worker {rank} was evicted \({reason}\): it may come back as a new one$"


def assert_ends(stream: HandStream, code: StatusCode, pattern: str) -> None:
    ended_with, text = stream.wait()
    assert ended_with is code, text
    assert re.search(pattern, text), text


# -- Silence ---------------------------------------------------------------------------------------


def test_a_worker_whose_heart_stops_is_evicted_and_the_others_go_on() -> None:
    with a_job(membership__heartbeat_deadline_seconds=0.3) as (job, _):
        job.step()
        for shard in range(2):  # worker 0 waits for worker 1
            job.streams[0, shard].send(*job.share(0, shard))
        job.streams[1, 0].send(BEAT)
        for shard in range(2):
            key = "membership.heartbeat_deadline_seconds"
            reason = (
                rf"it gave no sign of life for \d\.\d s, and 0\.3 s are allowed: raise {key} .+"
            )
            assert_ends(job.streams[1, shard], StatusCode.PERMISSION_DENIED, evicted(1, reason))
        job.advance(0)
        job.check_parts(0)
        job.ranks = [0]
        job.step()
        assert states(job) == {0: "member", 1: "evicted"}
        assert states(job, shard=1) == {0: "member", 1: "evicted"}


def test_what_an_evicted_worker_gave_stays_with_the_right_divisor() -> None:
    with a_job(membership__heartbeat_deadline_seconds=0.3) as (job, _):
        used = job.parts_of(0)[:2]
        stream = job.streams[1, 0]
        stream.send(*job.share(1, 0)[:3], BEAT)  # its begin and two parts
        stream.wait()
        before = job.parameters
        job.advance(0)
        alone = job.parameters
        job.parameters, job.next_step = before, job.next_step - 1
        job.advance(0, 1)
        both, job.parameters = job.parameters, alone.clone()
        for part in used:
            here = slice(part.start, part.start + part.length)
            job.parameters[here] = both[here]
        assert not torch.equal(job.parameters, alone)
        job.next_step -= 1
        shares = {shard: job.share(0, shard) for shard in range(2)}
        job.next_step += 1
        for shard, frames in shares.items():
            job.streams[0, shard].send(*frames)
        job.check_parts(0)
        job.ranks = [0]
        job.step()


def test_nothing_that_a_fenced_process_says_is_taken() -> None:
    with a_job(num_shards=1) as (job, _):
        wire = job.wires[0]
        wire.call("Leave", farewell(job, 1, shard_pb2.FAREWELL_FAILED, "out of memory"))
        assert_ends(job.streams[1, 0], StatusCode.PERMISSION_DENIED, evicted(1, "out of memory"))
        frames: dict[str, Frame] = {
            "Join": job.request(1, 0),
            "Exchange": ExchangeRequest(hello=job.hello(1)),
            "Load": LoadRequest(hello=job.hello(1)),
            "Pull": shard_pb2.PullRequest(worker=job.workers[1]),
            "Leave": farewell(job, 1, shard_pb2.FAREWELL_FATAL, "it is over"),
        }
        for method, frame in frames.items():
            code, text = wire.refusal(method, frame)
            assert code is StatusCode.PERMISSION_DENIED, method
            assert re.search(evicted(1, "out of memory"), text)
        job.ranks = [0]
        job.step()


def farewell(job: HandJob, rank: int, kind: int, failure: str = "") -> shard_pb2.LeaveRequest:
    request = shard_pb2.LeaveRequest(worker=job.workers[rank], failure=failure)
    request.farewell = kind  # type: ignore[assignment]  # enums are ints on the wire
    return request


def test_a_load_that_is_under_way_ends_with_the_eviction() -> None:
    shards = Shards(num_shards=1, settings=ELASTIC)
    with shards, closing(HandJob(shards)) as job:
        for rank in range(2):
            job.join(rank)
        first, second = (codec.encode_initial(part, job.parameters) for part in job.parts[:2])
        frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        frames.put(LoadRequest(hello=job.hello(0)))
        frames.put(first)
        load = job.wires[0].open("Load", iter(frames.get, None))
        job.wires[0].call("Leave", farewell(job, 0, shard_pb2.FAREWELL_FAILED, "out of memory"))
        assert_ends(job.streams[0, 0], StatusCode.PERMISSION_DENIED, "out of memory")
        frames.put(second)
        with pytest.raises(grpc.RpcError) as ended:
            next(load)
        frames.put(None)
        assert load.code() is StatusCode.PERMISSION_DENIED
        assert "out of memory" in str(ended.value)


# -- Streams that close ----------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [0, 1])
def test_a_worker_whose_stream_to_any_shard_stays_closed_is_evicted_everywhere(shard: int) -> None:
    with a_job(rpc__reconnect_seconds=0.3) as (job, _):
        job.step()
        assert job.streams[1, shard].finish()[0] is StatusCode.OK
        reason = (
            rf"worker 1 \(pid 1 on hand\) died: its stream to shard {shard} closed and did not "
            r"come back within 0\.3 s \(rpc\.reconnect_seconds\)"
        )
        other = job.streams[1, 1 - shard]
        assert_ends(other, StatusCode.PERMISSION_DENIED, evicted(1, reason))
        job.ranks = [0]
        job.step()


def test_a_worker_that_never_opens_its_stream_does_not_count_as_joined() -> None:
    settings = {"rpc.reconnect_seconds": 0.2, "membership.join_timeout_seconds": 0.5}
    with Shards(settings=settings) as shards, closing(HandJob(shards)) as job:
        for rank in range(2):
            job.wires[0].call("Join", job.request(rank, shard=0))
        stream = job.open(0, 0)
        code, text = stream.wait()
        assert code is StatusCode.ABORTED
        assert text.startswith("1 of 2 workers never joined: 1 (membership.join_timeout_seconds)")
        shards.wait()
        [failure] = shards.failures
        assert isinstance(failure, JobFailedError)


def test_a_second_stream_of_a_worker_ends_its_first_and_the_job_goes_on() -> None:
    with a_job(num_shards=1) as (job, _):
        first = job.streams[0, 0]
        job.open(0, 0)
        assert_ends(first, StatusCode.UNAVAILABLE, "^worker 0 opened another stream$")
        job.step()


# -- Another process of the same rank --------------------------------------------------------------


def is_heard(job: HandJob, rank: int) -> None:
    """The lead has taken what the worker sent before."""
    wanted = dialogue.encode_lease_request(0, PassSpec(1000, 1))
    job.ask(rank, ExchangeRequest(lease=wanted))
    job.answer(rank, "leases")


def test_a_second_process_of_a_rank_is_refused_while_the_first_lives_and_replaces_it_after() -> (
    None
):
    with a_job(membership__heartbeat_seconds=100) as (job, _):
        job.step()
        job.streams[1, 0].send(BEAT)
        is_heard(job, 1)
        old, streams = job.workers[1], [job.streams[1, shard] for shard in range(2)]
        job.replace(1)
        assert job.wires[0].refusal("Join", job.request(1, 0)) == (
            StatusCode.FAILED_PRECONDITION,
            "worker 1 has joined already, as another process: give every worker a rank of its own",
        )
        # Who asks only the other shard cannot take the rank either: the lead decides.
        assert job.wires[1].refusal("Join", job.request(1, 1)) == (
            StatusCode.UNAVAILABLE,
            "worker 1 is still another process (pid 1 on hand) here",
        )
        streams[0].finish()
        join_in_time(job, 1)
        reason = "another process has taken its rank"
        assert_ends(streams[1], StatusCode.PERMISSION_DENIED, evicted(1, reason))
        request = job.request(1, 0)
        request.worker.CopyFrom(old)
        code, text = job.wires[0].refusal("Join", request)
        assert code is StatusCode.PERMISSION_DENIED
        assert re.search(evicted(1, reason), text)
        job.ranks = [0]
        met = enter(job, 1)
        assert met.refreshed
        assert not met.chosen
        check_exact_parts(job, 1, met.step)
        job.ranks = [0, 1]
        for _ in range(2):
            job.step()


def join_in_time(job: HandJob, rank: int) -> None:
    """As a client does: the other shards may not have heard yet that the rank is free."""
    job.wires[0].call("Join", job.request(rank, 0))
    for shard, wire in enumerate(job.wires):
        for _ in range(1000):
            call = wire.open("Join", iter([job.request(rank, shard)]))
            with suppress(grpc.RpcError):
                list(call)
            if call.code() is not StatusCode.UNAVAILABLE:
                break
        assert call.code() is StatusCode.OK
        job.open(rank, shard)


def test_the_process_that_gives_the_initial_values_may_be_replaced_before_the_start() -> None:
    shards = Shards(num_shards=1, settings=ELASTIC)
    with shards, closing(HandJob(shards)) as job:
        for rank in range(2):
            job.join(rank)
        job.streams[0, 0].finish()
        job.replace(0)
        [answer] = job.wires[0].call("Join", job.request(0, 0))
        assert shard_pb2.JoinResponse.FromString(answer).gives_initial_values
        job.open(0, 0)
        loads = [codec.encode_initial(part, job.parameters) for part in job.parts]
        job.wires[0].call("Load", LoadRequest(hello=job.hello(0)), *loads)
        job.meet(Purpose.START)
        job.step()


# -- Joining a running job -------------------------------------------------------------------------


def test_a_worker_that_joins_a_running_job_gets_all_parts_of_exactly_one_version() -> None:
    with a_job() as (job, _):
        job.step()
        for rank in (2, 3):
            job.join(rank)
            met = enter(job, rank)
            assert met.refreshed
            assert met.HasField("position")
            check_exact_parts(job, rank, met.step)
            job.ranks.append(rank)
            job.step()
        for _ in range(3):
            job.step()
        assert states(job) == dict.fromkeys(range(4), "member")


def test_a_worker_may_open_its_stream_to_another_shard_after_it_has_entered() -> None:
    with a_job() as (job, _):
        for shard, wire in enumerate(job.wires):
            wire.call("Join", job.request(2, shard))
        job.open(2, 0)
        met = enter(job, 2)
        job.open(2, 1)
        check_exact_parts(job, 2, met.step)
        job.ranks.append(2)
        job.step()


def test_nobody_waits_for_a_worker_that_has_only_joined() -> None:
    with a_job() as (job, _):
        job.join(2)
        for _ in range(3):
            job.step()
        assert states(job)[2] == "joined"


def test_parts_that_were_lost_on_the_way_to_a_joiner_are_fetched() -> None:
    with a_job() as (job, _):
        job.step()
        job.join(2)
        met = enter(job, 2)
        for shard in range(2):
            job.streams[2, shard].cut()
            fetch = shard_pb2.Fetch(parts=[part.index for part in job.parts_of(shard)])
            job.open(2, shard).send(ExchangeRequest(fetch=fetch))
        check_exact_parts(job, 2, met.step)
        job.ranks.append(2)
        job.step()


def test_a_fetch_before_the_turn_brings_nothing_that_is_too_old() -> None:
    with a_job() as (job, _):
        job.join(2)
        for shard in range(2):  # its stream broke while it waited, so it asks for what it may miss
            fetch = shard_pb2.Fetch(parts=[part.index for part in job.parts_of(shard)])
            job.streams[2, shard].send(ExchangeRequest(fetch=fetch))
        is_opened = {rank for rank, _ in job.streams}
        assert is_opened == {0, 1, 2}
        met = enter(job, 2)
        check_exact_parts(job, 2, met.step)


def test_a_worker_that_everybody_has_left_behind_goes_on_alone_with_their_parameters() -> None:
    with a_job() as (job, _):
        job.step()
        job.join(2)
        job.ask(2, job.arrival(Purpose.START, 0))
        for rank in range(2):
            for wire in reversed(job.wires):
                wire.call("Leave", farewell(job, rank, shard_pb2.FAREWELL_PREEMPTED))
        met = job.answer(2, "met").met
        assert (met.step, met.chosen) == (job.next_step, True)
        check_exact_parts(job, 2, met.step)
        job.ranks = [2]
        job.step()


# -- Farewells -------------------------------------------------------------------------------------


def test_a_worker_whose_failure_would_happen_again_ends_the_job_for_all() -> None:
    with a_job() as (job, shards):
        job.wires[0].call("Leave", farewell(job, 1, shard_pb2.FAREWELL_FATAL, "the loss is NaN"))
        for stream in job.streams.values():
            assert_ends(stream, StatusCode.ABORTED, "^worker 1 failed: the loss is NaN$")
        shards.wait()
        assert all(isinstance(failure, JobFailedError) for failure in shards.failures)


def test_when_all_have_finished_every_stream_ends_well() -> None:
    with a_job() as (job, shards):
        job.step()
        for rank in range(2):
            for wire in reversed(job.wires):
                wire.call("Leave", farewell(job, rank, shard_pb2.FAREWELL_FINISHED))
        for stream in job.streams.values():
            assert_ends(stream, StatusCode.OK, "")
        shards.wait()
        assert shards.failures == [None, None]


@pytest.mark.parametrize("kind", [shard_pb2.FAREWELL_PREEMPTED, shard_pb2.FAREWELL_FAILED])
def test_a_worker_that_leaves_may_be_replaced(kind: int) -> None:
    with a_job() as (job, _):
        job.step()
        for wire in reversed(job.wires):
            wire.call("Leave", farewell(job, 1, kind, "out of memory"))
        job.ranks = [0]
        job.step()
        job.replace(1)
        join_in_time(job, 1)
        met = enter(job, 1)
        check_exact_parts(job, 1, met.step)
        job.ranks = [0, 1]
        job.step()


# -- A shard that says what no shard says ----------------------------------------------------------


def control(**message: Any) -> lead_pb2.ControlRequest:  # noqa: ANN401 - any message
    return lead_pb2.ControlRequest(**message)


HELLO = control(hello=lead_pb2.ShardHello(shard=1, incarnation=5))
NOBODY = 2**32 - 1
HARMLESS = {
    "remains of nobody": control(
        remains=lead_pb2.Remains(rank=NOBODY, incarnation=1, step=2**64 - 1, leases=[2**64 - 1])
    ),
    "remains of one that lives": control(
        remains=lead_pb2.Remains(rank=1, incarnation=78, leases=[1], used_parts=9, num_parts=2)
    ),
    "ready for nobody": control(ready=lead_pb2.Ready(step=2**64 - 1, rank=NOBODY)),
    "ready out of turn": control(ready=lead_pb2.Ready(step=2**64 - 1, rank=0)),
    "lost nobody": control(lost=lead_pb2.Lost(rank=NOBODY, incarnation=1, reason="it died")),
    "lost an older process": control(lost=lead_pb2.Lost(rank=1, incarnation=5, reason="it died")),
    "lost without a process": control(lost=lead_pb2.Lost(rank=NOBODY)),
}
REFUSED = {
    "squares": control(squares=lead_pb2.Squares(step=0, total=1.0)),
    "hello": HELLO,
    "None": control(),
}


@pytest.fixture(scope="module")
def lead_alone() -> Iterator[HandJob]:
    """A lead whose other shard is played by the test: it has told both workers to begin."""
    shards = Shards(num_shards=2, num_workers=2, serve=1, settings=ELASTIC)
    with shards, closing(HandJob(shards)) as job:
        for rank in range(2):
            job.wires[0].call("Join", job.request(rank, 0))
            job.open(rank, 0)
        loads = [codec.encode_initial(part, job.parameters) for part in job.parts_of(0)]
        job.wires[0].call("Load", LoadRequest(hello=job.hello(0)), *loads)
        job.meet(Purpose.START)
        yield job


@pytest.mark.parametrize("what", HARMLESS)
def test_a_shard_s_word_about_a_worker_that_is_not_there_harms_nobody(
    lead_alone: HandJob, what: str
) -> None:
    wire = lead_alone.wires[0]
    welcome, *_ = wire.call("LeadService/Control", HELLO, HARMLESS[what])
    assert lead_pb2.ControlResponse.FromString(welcome).HasField("welcome")
    assert wire.is_serving()
    assert states(lead_alone) == {0: "member", 1: "member"}
    is_heard(lead_alone, 0)


@pytest.mark.parametrize("what", REFUSED)
def test_a_message_that_no_shard_sends_ends_its_stream_and_nothing_else(
    lead_alone: HandJob, what: str
) -> None:
    wire = lead_alone.wires[0]
    code, text = wire.refusal("LeadService/Control", HELLO, REFUSED[what])
    assert code is StatusCode.INVALID_ARGUMENT
    assert f"shard 1 sends {what}" in text
    assert wire.is_serving()
    is_heard(lead_alone, 1)


def test_a_worker_s_words_that_turn_out_wrong_later_evict_it_and_not_the_shard() -> None:
    with a_job() as (job, _):
        job.epoch += 1  # the next change of membership, which no shard has been told yet
        begin = job.begin(1)
        begin.begin.step += 1000
        job.streams[1, 1].send(begin)
        assert job.streams[1, 1].finish()[0] is StatusCode.OK  # the shard keeps it
        job.open(1, 1)
        job.epoch -= 1
        job.join(2)
        job.ranks = [0, 1]
        job.ask(2, job.arrival(Purpose.START, 0))
        assert job.streams[2, 0].finish()[0] is StatusCode.OK  # the lead knows
        job.open(2, 0)
        for shard in range(2):  # so that the next turn comes, and worker 2 enters
            job.streams[0, shard].send(*job.share(0, shard))
        job.streams[1, 0].send(*job.share(1, 0))
        reason = "worker 1 begins step 1000 at version 0"
        for shard in range(2):
            assert_ends(job.streams[1, shard], StatusCode.PERMISSION_DENIED, evicted(1, reason))
        assert job.wires[1].describe().phase == shard_pb2.PHASE_TRAINING


def test_the_modes_without_turns_let_a_worker_in_as_well() -> None:
    consistency = ConsistencyConfig("async")
    shards = Shards(num_shards=2, settings={**ELASTIC, "consistency.mode": "async"})
    with shards, closing(HandJob(shards, consistency=consistency)) as job:
        job.start()
        job.join(2)
        job.ask(2, job.arrival(Purpose.START, 0))
        for shard in range(2):
            job.streams[0, shard].send(*job.share(0, shard))
        met = job.answer(2, "met").met
        assert met.refreshed
        clocks = set()
        for shard in range(2):
            missing = {part.index for part in job.parts_of(shard)}
            while missing:
                answer = job.streams[2, shard].read().part
                missing.discard(answer.part)
                clocks.add(answer.clock)
        assert clocks == {met.step}
