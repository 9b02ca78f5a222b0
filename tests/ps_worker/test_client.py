"""A worker's connection to a shard that answers, breaks, comes back, and does not."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial

import pytest
import torch
from grpc import StatusCode

from ps_core.codec import PartFrame, encode_answer
from ps_core.errors import (
    DataLossError,
    EvictedError,
    JobFailedError,
    JobOverError,
    MismatchError,
    ProtocolError,
    ShardlineError,
    ShardUnreachableError,
)
from ps_core.exchange import Farewell
from ps_core.rpc import Frame
from ps_core.settings import Config, MembershipConfig, RpcConfig
from ps_core.v1 import shard_pb2
from ps_core.v1.shard_pb2 import ExchangeRequest, ExchangeResponse, WorkerId
from ps_worker.calls import describe
from ps_worker.client import ShardClient
from tests.processes import Proxy, occupied_port
from tests.ps_worker.fake_shard import PATIENCE_SECONDS, FakeShard, FakeStream

WORKER = WorkerId(rank=3, incarnation=77)
HELLO = ExchangeRequest(hello=shard_pb2.Hello(worker=WORKER))
BEAT = ExchangeRequest(heartbeat=shard_pb2.Heartbeat())
LONG = RpcConfig(connect_timeout_seconds=50, call_timeout_seconds=50, reconnect_seconds=50)
Received = PartFrame | ExchangeResponse


def begin(step: int) -> ExchangeRequest:
    return ExchangeRequest(begin=shard_pb2.Begin(step=step))


def idle() -> ExchangeRequest:
    return ExchangeRequest(idle=shard_pb2.Idle())


def meet(step: int) -> ExchangeRequest:
    return ExchangeRequest(meet=shard_pb2.Meet(step=step))


def lease(loader: int) -> ExchangeRequest:
    request = ExchangeRequest(lease=shard_pb2.LeaseRequest(loader=loader))
    wanted: shard_pb2.Pass = getattr(request.lease, "pass")
    wanted.num_samples = 10
    return request


def give_back(lease_id: int) -> ExchangeRequest:
    return ExchangeRequest(lease=shard_pb2.LeaseRequest(returned=[lease_id]))


class Notes:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[str | Received | ShardlineError] = queue.SimpleQueue()
        self.to_send: list[ExchangeRequest | Frame] = []
        """What the shard has missed."""
        self.hear: Callable[[Received], None] = self._events.put
        """What is done with a message."""

    def receive(self, shard: int, response: Received) -> None:
        assert shard == 1
        self.hear(response)

    def missing(self, shard: int) -> list[ExchangeRequest | Frame]:
        assert shard == 1
        return self.to_send

    def recovered(self, shard: int) -> None:
        assert shard == 1
        self._events.put("recovered")

    def fail(self, shard: int, failure: ShardlineError, *, final: bool = True) -> None:
        assert shard == 1
        if not final:
            self._events.put("a symptom")
        self._events.put(failure)

    def next(self) -> str | Received | ShardlineError:
        return self._events.get(timeout=PATIENCE_SECONDS)

    def next_message(self) -> Received:
        """What the shard sends next, after anything else."""
        while isinstance(event := self.next(), (str, ShardlineError)):
            pass
        return event

    def failure(self) -> ShardlineError:
        """The reason why the stream ended, after any symptoms."""
        while True:
            match self.next():
                case "a symptom":
                    self.next()
                case ShardlineError() as failure:
                    return failure

    def is_empty(self) -> bool:
        return self._events.empty()


def make_client(address: str, rpc: RpcConfig = LONG) -> ShardClient:
    config = Config(rpc=rpc, membership=MembershipConfig(join_timeout_seconds=50))
    return ShardClient(1, address, WORKER, config)


@contextmanager
def connection(
    shard: FakeShard, rpc: RpcConfig = LONG, address: str = ""
) -> Iterator[tuple[ShardClient, Notes, FakeStream]]:
    """A client that has joined, its listener, and its first stream, which has said hello."""
    client, notes = make_client(address or shard.address, rpc), Notes()
    with closing(client):
        client.join(shard_pb2.JobSpec())
        shard.called()
        client.open(notes)
        stream = shard.accept()
        assert stream.read() == HELLO
        yield client, notes, stream


@pytest.fixture
def shard() -> Iterator[FakeShard]:
    with FakeShard() as shard:
        yield shard


def break_stream(stream: FakeStream) -> None:
    stream.end(StatusCode.UNAVAILABLE, "Socket closed")


# -- Before the stream -----------------------------------------------------------------------------


def test_a_client_waits_until_its_shard_is_up(shard: FakeShard) -> None:
    with closing(make_client(shard.address)) as client:
        client.connect()


def test_a_shard_that_does_not_come_up_is_unreachable() -> None:
    with occupied_port() as port:
        rpc = RpcConfig(connect_timeout_seconds=0.2)
        with closing(make_client(f"127.0.0.1:{port}", rpc)) as client:
            reason = (
                rf"shard 1 at 127\.0\.0\.1:{port} did not answer for 0\.2 s \(rpc\.connect_timeout_"
                r"seconds\): check that it runs"
            )
            with pytest.raises(ShardUnreachableError, match=reason):
                client.connect()


def test_a_worker_introduces_itself_and_the_shard_it_knows(shard: FakeShard) -> None:
    job = shard_pb2.JobSpec(job_id="digits", num_workers=3)
    with closing(make_client(shard.address)) as client:
        assert client.join(job) is True
        first = shard.called()
        shard.joined.gives_initial_values = False
        assert client.join(job) is False
        again = shard.called()
    expected = shard_pb2.JoinRequest(
        worker=WORKER, shard=1, job=job, pid=os.getpid(), host=socket.gethostname()
    )
    assert first == expected
    expected.expected_shard_incarnation = 5
    assert again == expected


REFUSALS = [
    (StatusCode.FAILED_PRECONDITION, MismatchError, r"^why$"),
    (StatusCode.PERMISSION_DENIED, EvictedError, r"^why$"),
    (StatusCode.DATA_LOSS, DataLossError, r"^why$"),
    (StatusCode.ABORTED, JobFailedError, r"^why$"),
    (StatusCode.INVALID_ARGUMENT, ProtocolError, r"^why$"),
    (
        StatusCode.DEADLINE_EXCEEDED,
        ShardUnreachableError,
        r"^no answer from shard 1 at .* within \w+\.\w+_timeout_seconds \(why",
    ),
]


@pytest.mark.parametrize(("code", "kind", "text"), REFUSALS)
def test_every_call_that_is_refused_raises_what_the_shard_says(
    shard: FakeShard, code: StatusCode, kind: type[ShardlineError], text: str
) -> None:
    with closing(make_client(shard.address)) as client:
        shard.refusal = code, "why"
        with pytest.raises(kind, match=text):
            client.join(shard_pb2.JobSpec())
        with pytest.raises(kind, match=text):
            client.leave(Farewell.FINISHED, "")
        with pytest.raises(kind, match=text):
            client.load([])
        with pytest.raises(kind, match=text):
            list(client.pull(shard_pb2.CONTENT_STATE))


def test_a_shard_that_is_not_available_is_tried_again_and_is_then_unreachable(
    shard: FakeShard,
) -> None:
    shard.refusal = StatusCode.UNAVAILABLE, "draining"
    with (
        closing(make_client(shard.address)) as client,
        pytest.raises(ShardUnreachableError, match=r"^no answer from shard 1 at .*draining"),
    ):
        client.join(shard_pb2.JobSpec())
    assert shard.num_refused == 5


def test_a_load_says_hello_first(shard: FakeShard) -> None:
    message = shard_pb2.LoadRequest(clear_state=True)
    with closing(make_client(shard.address)) as client:
        client.load([message, message.SerializeToString()])
        hello = shard_pb2.LoadRequest(hello=shard_pb2.Hello(worker=WORKER))
        assert [shard.called() for _ in range(3)] == [hello, message, message]


def test_a_pull_gives_what_the_shard_sends(shard: FakeShard) -> None:
    shard.pulled = [shard_pb2.PullResponse(version=9), shard_pb2.PullResponse()]
    with closing(make_client(shard.address)) as client:
        assert list(client.pull(shard_pb2.CONTENT_STATE)) == shard.pulled
        expected = shard_pb2.PullRequest(worker=WORKER, content=shard_pb2.CONTENT_STATE)
        assert shard.called() == expected


def test_a_goodbye_says_why_in_words_that_fit(shard: FakeShard) -> None:
    with closing(make_client(shard.address)) as client:
        client.leave(Farewell.FATAL, "é" * 5000)
        assert shard.called() == shard_pb2.LeaveRequest(
            worker=WORKER, failure="é" * 2000, farewell=shard_pb2.FAREWELL_FATAL
        )


def test_anybody_may_ask_a_shard_what_it_is(shard: FakeShard) -> None:
    shard.description.job_id = "digits"
    assert describe(shard.address, LONG).job_id == "digits"
    shard.die()
    with pytest.raises(ShardUnreachableError, match=f"no answer from shard at {shard.address}"):
        describe(shard.address, RpcConfig(call_timeout_seconds=0.2))


# -- A stream that works ---------------------------------------------------------------------------


def test_messages_are_sent_in_order_and_as_they_are(shard: FakeShard) -> None:
    frame = encode_answer(1, 2, torch.ones(3))
    with connection(shard) as (client, _, stream):
        client.send(begin(7))
        client.send(lambda: frame)
        client.request(meet(8))
        assert stream.read() == begin(7)
        assert stream.read_bytes() == frame
        request = meet(8)
        request.number = 1
        assert stream.read() == request


def test_requests_are_counted_from_one(shard: FakeShard) -> None:
    with connection(shard) as (client, _, stream):
        client.request(lease(0))
        client.send(BEAT)
        client.request(idle())
        client.request(meet(4))
        assert [stream.read().number for _ in range(4)] == [1, 0, 2, 3]


def test_what_the_shard_sends_is_told(shard: FakeShard) -> None:
    elements = torch.arange(4.0)
    met = ExchangeResponse(met=shard_pb2.Met(step=3), number=1)
    with connection(shard) as (_, notes, stream):
        stream.send(encode_answer(2**40, 5, elements, epoch=6, clock=7), met)
        part = notes.next()
        assert isinstance(part, PartFrame)
        assert (part.step, part.part, part.epoch, part.clock) == (2**40, 5, 6, 7)
        assert torch.equal(torch.frombuffer(part.data, dtype=torch.float32), elements)
        assert notes.next() == met


def test_an_answer_counts_once(shard: FakeShard) -> None:
    with connection(shard) as (client, _, _):
        client.request(lease(0))
        client.request(meet(1))
        assert client.answered(2)
        assert not client.answered(2)
        assert client.answered(1)  # a broken stream brings it late
        assert not client.answered(1)
        assert not client.answered(3)


# -- A stream that breaks --------------------------------------------------------------------------


def numbered(request: ExchangeRequest, number: int) -> ExchangeRequest:
    request.number = number
    return request


def test_a_broken_stream_is_opened_again_and_what_was_not_answered_is_repeated(
    shard: FakeShard,
) -> None:
    frames = [encode_answer(9, part, torch.full((3,), float(part))) for part in range(3)]
    with connection(shard) as (client, notes, stream):
        client.request(lease(0))
        client.request(give_back(5))
        client.request(lease(1))
        client.request(idle())
        client.request(meet(2))
        assert [stream.read().number for _ in range(5)] == [1, 2, 3, 4, 5]
        assert client.answered(1)
        notes.to_send = [begin(9), *(partial(bytes, frame) for frame in frames[1:])]
        break_stream(stream)
        again = shard.accept()
        assert again.read() == HELLO
        assert again.read() == numbered(give_back(5), 2)
        assert again.read() == numbered(lease(1), 3)
        assert again.read() == numbered(idle(), 4)
        assert again.read() == numbered(meet(2), 5)
        assert again.read() == begin(9)
        assert [again.read_bytes() for _ in range(2)] == frames[1:]
        client.send(BEAT)
        assert again.read() == BEAT
        assert notes.next() == "a symptom"
        symptom = notes.next()
        assert isinstance(symptom, ShardUnreachableError)
        assert str(symptom) == f"no answer from shard 1 at {shard.address} (Socket closed)"
        assert notes.next() == "recovered"
        assert notes.is_empty()


def test_what_wants_no_answer_is_repeated_until_a_later_request_is_answered(
    shard: FakeShard,
) -> None:
    with connection(shard) as (client, _, stream):
        client.request(give_back(5))
        client.request(lease(1))
        client.request(idle())
        client.request(give_back(6))
        assert [stream.read().number for _ in range(4)] == [1, 2, 3, 4]
        assert client.answered(2)
        break_stream(stream)
        again = shard.accept()
        client.send(BEAT)
        assert [again.read() for _ in range(4)] == [
            HELLO,
            numbered(idle(), 3),
            numbered(give_back(6), 4),
            BEAT,
        ]


def test_an_answer_that_overtakes_an_older_one_leaves_that_open(shard: FakeShard) -> None:
    # A meeting may end on a new stream before the lease that was lost with the old one is repeated.
    with connection(shard) as (client, _, stream):
        client.request(lease(1))
        client.request(meet(2))
        assert client.answered(2)
        break_stream(stream)
        again = shard.accept()
        client.send(BEAT)
        assert [again.read() for _ in range(3)] == [HELLO, numbered(lease(1), 1), BEAT]


def test_what_is_sent_while_the_stream_is_broken_reaches_the_shard_once(
    shard: FakeShard,
) -> None:
    frame = encode_answer(9, 0, torch.ones(3))
    shard.may_describe.clear()
    with connection(shard) as (client, notes, stream):
        break_stream(stream)
        assert notes.next() == "a symptom"
        client.request(idle())
        notes.to_send = [lambda: frame]  # as the exchange does: it notes what it sends
        client.send(lambda: frame)
        client.send(BEAT)
        shard.may_describe.set()
        again = shard.accept()
        assert again.read() == HELLO
        assert again.read() == numbered(idle(), 1)
        assert again.read_bytes() == frame
        client.close()
        assert again.read_rest() == []


def test_a_stream_may_break_again_and_again(shard: FakeShard) -> None:
    with connection(shard) as (client, notes, stream):
        client.request(meet(1))
        for _ in range(5):
            break_stream(stream)
            stream = shard.accept()
            assert [stream.read() for _ in range(2)] == [HELLO, numbered(meet(1), 1)]
        met = ExchangeResponse(met=shard_pb2.Met(step=1), number=1)
        stream.send(met)
        events = [notes.next() for _ in range(16)]
        assert [event for event in events if isinstance(event, (str, ExchangeResponse))] == [
            *["a symptom", "recovered"] * 5,
            met,
        ]


def test_a_connection_that_is_cut_is_made_again(shard: FakeShard) -> None:
    with (
        Proxy(shard.address) as proxy,
        connection(shard, address=proxy.address) as (client, _, stream),
    ):
        client.request(meet(1))
        assert stream.read() == numbered(meet(1), 1)
        proxy.cut()
        again = shard.accept()
        assert again.read() == HELLO
        assert again.read() == numbered(meet(1), 1)


def test_a_shard_that_keeps_a_stream_for_a_message_is_never_given_up(shard: FakeShard) -> None:
    rpc = RpcConfig(reconnect_seconds=0.2)
    told = ExchangeResponse(refused=shard_pb2.Refused())
    started = time.monotonic()
    with connection(shard, rpc) as (_, notes, stream):
        while time.monotonic() < started + 1:
            stream.send(told)
            assert notes.next_message() == told
            break_stream(stream)
            stream = shard.accept()


# -- A stream that does not come back --------------------------------------------------------------


def test_a_dead_shard_is_given_up_after_the_time_to_reconnect(shard: FakeShard) -> None:
    with connection(shard, RpcConfig(reconnect_seconds=0.4)) as (client, notes, _):
        started = time.monotonic()
        shard.die()
        failure = notes.failure()
        assert isinstance(failure, ShardUnreachableError)
        assert f"shard 1 at {shard.address} died or cannot be reached any more" in str(failure)
        assert time.monotonic() - started >= 0.4
        client.leave(Farewell.FINISHED, "")  # to nobody, without waiting for an answer
    assert shard.num_streams == 1


def test_a_stream_that_breaks_at_once_every_time_is_given_up(shard: FakeShard) -> None:
    with connection(shard, RpcConfig(reconnect_seconds=0.4)) as (_, notes, stream):
        started = time.monotonic()
        ended = threading.Event()

        def break_all() -> None:
            break_stream(stream)
            while not ended.is_set():
                try:
                    break_stream(shard.streams.get(timeout=0.05))
                except queue.Empty:
                    continue

        breaker = threading.Thread(target=break_all)
        breaker.start()
        failure = notes.failure()
        assert time.monotonic() - started >= 0.4
        ended.set()
        breaker.join()
        assert isinstance(failure, ShardUnreachableError)
        assert "Socket closed" in str(failure)
        assert shard.num_streams > 2


def test_with_no_time_to_reconnect_a_stream_is_opened_once(shard: FakeShard) -> None:
    with connection(shard, RpcConfig(reconnect_seconds=0)) as (_, notes, stream):
        break_stream(stream)
        assert isinstance(notes.failure(), ShardUnreachableError)
    assert shard.num_streams == 1


def test_a_shard_that_has_restarted_has_lost_its_state(shard: FakeShard) -> None:
    with connection(shard) as (client, notes, stream):
        shard.description.incarnation = 6
        break_stream(stream)
        failure = notes.failure()
        assert isinstance(failure, DataLossError)
        assert str(failure) == (
            f"shard 1 at {shard.address} restarted and lost its state: start the job again"
        )
        client.leave(Farewell.FINISHED, "")
        assert shard.calls.empty()
    assert shard.num_streams == 1


def test_a_job_that_has_failed_meanwhile_is_told_with_its_reason(shard: FakeShard) -> None:
    with connection(shard) as (_, notes, stream):
        shard.description.reason = "worker 2 failed: the loss is NaN"
        break_stream(stream)
        failure = notes.failure()
        assert isinstance(failure, JobFailedError)
        assert str(failure) == "worker 2 failed: the loss is NaN"
    assert shard.num_streams == 1


def test_a_job_that_is_complete_meanwhile_is_over(shard: FakeShard) -> None:
    with connection(shard) as (_, notes, stream):
        shard.description.phase = shard_pb2.PHASE_COMPLETE
        break_stream(stream)
        assert isinstance(notes.failure(), JobOverError)
    assert shard.num_streams == 1


def test_a_stream_that_the_shard_ends_well_means_that_the_job_is_over(shard: FakeShard) -> None:
    with connection(shard) as (client, notes, stream):
        stream.end()
        assert isinstance(notes.next(), JobOverError)
        client.leave(Farewell.FINISHED, "")
        assert shard.calls.empty()
    assert shard.num_streams == 1


ENDS = [
    (StatusCode.PERMISSION_DENIED, EvictedError, True),
    (StatusCode.ABORTED, JobFailedError, True),
    (StatusCode.DATA_LOSS, DataLossError, True),
    (StatusCode.INVALID_ARGUMENT, ProtocolError, False),
    (StatusCode.FAILED_PRECONDITION, MismatchError, False),
    (StatusCode.INTERNAL, ShardlineError, False),
]


@pytest.mark.parametrize(("code", "kind", "is_gone"), ENDS)
def test_what_the_shard_ends_a_stream_with_is_the_reason_and_nothing_is_tried_again(
    shard: FakeShard, code: StatusCode, kind: type[ShardlineError], is_gone: bool
) -> None:
    with connection(shard) as (client, notes, stream):
        stream.end(code, "why")
        failure = notes.next()
        assert type(failure) is kind
        assert "why" in str(failure)
        client.leave(Farewell.FAILED, "because")
        assert shard.calls.empty() is is_gone  # who is gone cannot be told
    assert shard.num_streams == 1


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ProtocolError("part 7 is unknown"), ProtocolError, r"^part 7 is unknown$"),
        (KeyError("part"), ShardlineError, r"an answer of shard 1 at .*: KeyError: 'part'"),
    ],
)
def test_an_answer_that_cannot_be_taken_is_a_failure(
    shard: FakeShard, error: Exception, kind: type[ShardlineError], text: str
) -> None:
    def hear(response: Received) -> None:
        raise error

    with connection(shard) as (_, notes, stream):
        notes.hear = hear
        stream.send(ExchangeResponse(number=1))
        failure = notes.next()
        assert type(failure) is kind
        with pytest.raises(kind, match=text):
            raise failure


def test_bytes_that_are_no_answer_are_a_failure(shard: FakeShard) -> None:
    with connection(shard) as (_, notes, stream):
        stream.send(b"\xff\xff")
        assert isinstance(notes.next(), ProtocolError)


# -- The end ---------------------------------------------------------------------------------------


def closed_within(client: ShardClient) -> float:
    started = time.monotonic()
    client.close()
    return time.monotonic() - started


def test_closing_finishes_the_stream_after_what_was_sent(shard: FakeShard) -> None:
    with connection(shard) as (client, notes, stream):
        client.send(BEAT)
        closer = threading.Thread(target=client.close)
        closer.start()
        assert stream.read_rest() == [BEAT]
        stream.end()
        closer.join(PATIENCE_SECONDS)
        assert not closer.is_alive()
        assert notes.is_empty()


def test_closing_does_not_wait_for_ever_for_a_shard_that_keeps_the_stream_open(
    shard: FakeShard,
) -> None:
    rpc = RpcConfig(drain_seconds=0.2)
    with connection(shard, rpc) as (client, notes, stream):
        stream.is_kept_open = True
        assert 0.2 <= closed_within(client) < PATIENCE_SECONDS / 2
        assert notes.is_empty()


def test_closing_in_the_middle_of_a_recovery_does_not_wait_for_its_end(shard: FakeShard) -> None:
    shard.may_describe.clear()
    with connection(shard) as (client, notes, stream):  # whose times are 50 s
        break_stream(stream)
        assert notes.next() == "a symptom"
        notes.next()
        assert closed_within(client) < 20
        assert notes.is_empty()
    assert shard.num_streams == 1


def test_closing_while_the_shard_is_dead_does_not_wait_for_it(shard: FakeShard) -> None:
    with connection(shard) as (client, notes, _):
        shard.die()
        assert notes.next() == "a symptom"
        notes.next()
        assert closed_within(client) < 20
        assert notes.is_empty()


def test_a_client_that_never_opened_a_stream_can_be_closed(shard: FakeShard) -> None:
    assert closed_within(make_client(shard.address)) < 20


def test_no_thread_is_left(shard: FakeShard) -> None:
    before = set(threading.enumerate())
    with connection(shard) as (_, _, stream):
        own = {each for each in threading.enumerate() if each.name == "shard-1"} - before
        stream.end()
    assert len(own) == 1
    assert not own & set(threading.enumerate())


def test_a_client_is_named_by_its_shard() -> None:
    with closing(make_client("127.0.0.1:1")) as client:
        assert str(client) == "shard 1 at 127.0.0.1:1"
