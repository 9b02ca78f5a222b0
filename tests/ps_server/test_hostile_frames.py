"""More than ten thousand spoiled frames against two live shards, as a stranger and as a worker.

Each call must end with a status that says what was wrong, and nothing may be left behind: the job
that the shards serve goes on, with the right values. The seed is part of each test's name.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

import grpc
import pytest
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from grpc import StatusCode

from ps_core import codec, dialogue
from ps_core.errors import ProtocolError
from ps_core.exchange import Purpose
from ps_core.job import Job
from ps_core.leases import PassSpec
from ps_core.optim_spec import OptimizerSpec
from ps_core.plan import ParameterSpec
from ps_core.settings import ConsistencyConfig
from ps_core.v1 import lead_pb2, shard_pb2, tensor_pb2
from ps_core.v1.lead_pb2 import ControlRequest
from ps_core.v1.shard_pb2 import (
    Content,
    ExchangeRequest,
    Hello,
    JobSpec,
    JoinRequest,
    LoadRequest,
    WorkerId,
)
from tests.processes import Fleet, Process
from tests.ps_server.shards import Shards
from tests.wire import HandJob, Wire

MIB: Final = 2**20
FRAMES: Final = 1000
"""In each test of spoiled frames."""
SEED: Final = 20260
STRANGER: Final = WorkerId(rank=0, incarnation=2**62 + 1)
CLEAR: Final = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.DATA_LOSS,  # for a worker that says it knew another incarnation
    StatusCode.UNAVAILABLE,  # for one that comes before the lead's word about its predecessor
}


# -- How frames are spoiled ------------------------------------------------------------------------


class Spoiler:
    """Spoils copies of messages, the same way for the same seed."""

    def __init__(self, seed: int, messages: Sequence[Message]) -> None:
        self._random = random.Random(seed)
        self._messages = messages
        self._ways: list[Callable[[bytearray], None]] = [
            self._flip,
            self._cut,
            self._splice,
            self._insert,
        ]

    def frames(self, count: int) -> Iterator[bytes]:
        """Half of them are still messages, with values that nobody sends."""
        for _ in range(count):
            message = self._random.choice(self._messages)
            if self._random.random() < 0.5:
                copy = type(message).FromString(message.SerializeToString())
                for _ in range(self._random.randint(1, 3)):
                    self._set_field(copy)
                yield copy.SerializeToString()
            else:
                frame = bytearray(message.SerializeToString())
                self._random.choice(self._ways)(frame)
                yield bytes(frame)

    def _set_field(self, message: Message) -> None:
        """Give one field, at any depth, an extreme value."""
        fields: list[FieldDescriptor] = [*message.DESCRIPTOR.fields]
        present = {field.number for field, _ in message.ListFields()}
        if not fields:
            return
        field = self._random.choice([f for f in fields if f.number in present] or fields)
        value = getattr(message, field.name)
        if field.is_repeated:
            self._set_list(value, field)
        elif field.message_type is not None:
            self._set_field(value)
        else:
            setattr(message, field.name, self._scalar(field))

    def _set_list(self, values: Any, field: FieldDescriptor) -> None:  # noqa: ANN401 - of any type
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            self._set_field(values[self._random.choice([*values, "foreach"])])
        elif self._random.random() < 0.2:
            del values[:]
        elif field.message_type is None:
            values.append(self._scalar(field))
        elif values:
            self._set_field(self._random.choice(values))
        else:
            values.add()

    def _scalar(self, field: FieldDescriptor) -> object:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return self._random.randbytes(self._random.choice((0, 1, 511, 513)))
            case FieldDescriptor.CPPTYPE_STRING:
                return self._random.choice(("", "\0", "é" * 9, "weight", "exp_avg", "x" * 9999))
            case FieldDescriptor.CPPTYPE_BOOL:
                return self._random.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE:
                return self._random.choice((0.0, -1.0, 1e308, float("inf"), float("nan")))
            case FieldDescriptor.CPPTYPE_INT64:
                return self._random.choice((0, -1, 1, 2**31, 2**63 - 1, -(2**63)))
            case FieldDescriptor.CPPTYPE_UINT64:
                return self._random.choice((0, 1, 2, 512, 2**32, 2**64 - 1))
            case FieldDescriptor.CPPTYPE_UINT32:
                return self._random.choice((0, 1, 2, 3, 2**16, 2**32 - 1))
            case FieldDescriptor.CPPTYPE_ENUM:
                return self._random.choice((0, 1, 2, 3, 5, 99, -1))
        raise AssertionError(f"no value for {field.full_name}")

    def _position(self, frame: bytearray) -> int:
        """Mostly in the head, where a frame says what it is."""
        return self._random.randint(0, min(len(frame), self._random.choice((8, 64, len(frame)))))

    def _flip(self, frame: bytearray) -> None:
        for _ in range(self._random.randint(1, 4)):
            at = self._position(frame)
            frame[at : at + 1] = bytes([self._random.randrange(256)])

    def _cut(self, frame: bytearray) -> None:
        del frame[self._position(frame) :]

    def _splice(self, frame: bytearray) -> None:
        other = self._random.choice(self._messages).SerializeToString()
        frame[self._position(frame) :] = other[self._random.randint(0, len(other)) :]

    def _insert(self, frame: bytearray) -> None:
        at = self._position(frame)
        frame[at:at] = self._random.randbytes(self._random.randint(1, 40))


def messages(job: HandJob, worker: WorkerId) -> dict[str, list[Message]]:
    """All that a worker sends to shard 1, by method."""
    part = job.parts_of(1)[0]
    join = job.request(rank=0, shard=1)
    join.worker.CopyFrom(worker)
    spec = tensor_pb2.TensorSpec(name="exp_avg", dtype="DATA_TYPE_FLOAT32", shape=[part.length])
    state = tensor_pb2.StateTensor(part=part.index, spec=spec, data=bytes(part.num_bytes))
    chunk = tensor_pb2.TensorChunk(spec=spec, data=bytes(part.num_bytes))
    pushes = map(ExchangeRequest.FromString, job.pushes(0, 1))
    initial = codec.encode_initial(part, job.parameters)
    return {
        "Join": [join],
        "Exchange": [
            ExchangeRequest(hello=Hello(worker=worker)),
            job.begin(0),
            *pushes,
            ExchangeRequest(idle=shard_pb2.Idle(), number=1),
            job.arrival(Purpose.MEAN, job.next_step),
            ExchangeRequest(lease=dialogue.encode_lease_request(0, PassSpec(100, 8)), number=1),
            ExchangeRequest(fetch=shard_pb2.Fetch(parts=[part.index])),
        ],
        "Load": [
            LoadRequest(hello=Hello(worker=worker)),
            LoadRequest.FromString(initial),
            LoadRequest(state=state),
            LoadRequest(buffer=chunk),
        ],
        "Pull": [shard_pb2.PullRequest(worker=worker, content=Content.Name(n)) for n in (1, 2, 3)],
        "Leave": [shard_pb2.LeaveRequest(worker=worker, failure="because")],
    }


def outcome(wire: Wire, method: str, *frames: Message | bytes) -> StatusCode:
    """The status of a call with these frames. AssertionError for one that helps nobody."""
    call = wire.open(method, iter(frames))
    with suppress(grpc.RpcError):
        list(call)
    code = call.code()
    assert code in CLEAR, (code, call.details(), method, frames)
    assert code is StatusCode.OK or call.details(), (code, method, frames)
    return code


# -- A job under attack ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    settings = {"rpc.reconnect_seconds": 600}  # worker 0 has no stream most of the time
    with Fleet(folder, num_shards=2, num_workers=2, settings=settings) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def shards(fleet: Fleet) -> list[Process]:
    return fleet.shards()


@pytest.fixture(scope="module")
def started(fleet: Fleet, shards: list[Process]) -> Iterator[HandJob]:
    job = HandJob(fleet)
    job.start()
    job.step()
    yield job
    job.close()


@pytest.fixture
def job(started: HandJob, shards: list[Process]) -> Iterator[HandJob]:
    """Worker 0 has given its gradients for the next step, so that no frame of it can change them,
    and worker 1 has not. After the test both repeat themselves and must get the right values.
    """
    peaks = [shard.peak_memory_bytes() for shard in shards]
    hello = ExchangeRequest(hello=started.hello(0))
    for shard, wire in enumerate(started.wires):
        wire.call("Exchange", hello, started.begin(0), *started.pushes(0, shard))
    yield started
    for shard, wire in enumerate(started.wires):
        assert wire.is_serving()
        assert wire.describe().phase == shard_pb2.PHASE_TRAINING
        assert "Traceback" not in shards[shard].output
        assert shards[shard].peak_memory_bytes() < peaks[shard] + 200 * MIB
        started.open(0, shard)
    started.step()


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("method", ["Join", "Exchange", "Load", "Pull", "Leave"])
def test_no_frame_of_a_stranger_harms_a_shard(job: HandJob, method: str, seed: int) -> None:
    spoiler = Spoiler(seed, messages(job, STRANGER)[method])
    codes = Counter(outcome(job.wires[1], method, frame) for frame in spoiler.frames(FRAMES))
    assert codes[StatusCode.OK] == 0
    assert min(codes[StatusCode.INVALID_ARGUMENT], codes[StatusCode.FAILED_PRECONDITION]) > 20


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
@pytest.mark.parametrize("shard", [0, 1])
def test_no_frame_on_a_worker_s_stream_harms_a_shard(job: HandJob, shard: int, seed: int) -> None:
    spoiler = Spoiler(seed, messages(job, job.workers[0])["Exchange"])
    hello = ExchangeRequest(hello=job.hello(0))
    codes = Counter(
        outcome(job.wires[shard], "Exchange", hello, frame)
        for frame in spoiler.frames(FRAMES)
        if not (shard == 0 and is_absence(frame))
    )
    assert min(codes[StatusCode.OK], codes[StatusCode.INVALID_ARGUMENT]) > 40


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("shard", [0, 1])
def test_nothing_that_a_worker_loads_harms_a_shard(job: HandJob, shard: int, seed: int) -> None:
    spoiler = Spoiler(seed, messages(job, job.workers[0])["Load"])
    hello = LoadRequest(hello=job.hello(0))
    codes = Counter(
        outcome(job.wires[shard], "Load", hello, frame) for frame in spoiler.frames(FRAMES)
    )
    assert min(codes[StatusCode.OK], codes[StatusCode.INVALID_ARGUMENT]) > 40


def is_absence(frame: bytes) -> bool:
    """Whether a worker says that nobody needs to wait for it, or makes a request of its own that
    counts, which the lead has to believe.
    """
    try:
        kind = ExchangeRequest.FromString(frame).WhichOneof("message")
    except DecodeError:
        return False
    return kind in ("idle", "meet", "lease")


# -- The lead's side of the other shards -----------------------------------------------------------


def control_messages() -> list[Message]:
    """All that a shard tells the lead, about workers of the job and others."""
    remains = lead_pb2.Remains(
        rank=1, incarnation=5, step=1, leases=[1, 2], used_parts=2, num_parts=4, samples=3
    )
    return [
        ControlRequest(hello=lead_pb2.ShardHello(shard=1, incarnation=5)),
        ControlRequest(squares=lead_pb2.Squares(step=1, total=0.5)),
        ControlRequest(ready=lead_pb2.Ready(step=1, rank=1)),
        ControlRequest(remains=remains),
        ControlRequest(lost=lead_pb2.Lost(rank=1, incarnation=5, reason="because")),
    ]


def is_failure(frame: bytes) -> bool:
    """Whether a shard says that it cannot go on, which the lead has to believe."""
    try:
        kind = ControlRequest.FromString(frame).WhichOneof("message")
    except DecodeError:
        return False
    return kind in ("failure",)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="sync"),
        pytest.param({"consistency.backup_workers": 1}, id="backup workers"),
        pytest.param({"consistency.mode": "async"}, id="async"),
    ],
)
@pytest.mark.parametrize("seed", [SEED])
def test_no_frame_of_another_shard_harms_the_lead(settings: dict[str, object], seed: int) -> None:
    consistency = ConsistencyConfig(
        str(settings.get("consistency.mode", "sync")),  # type: ignore[arg-type]  # one of the modes
        backup_workers=int(bool(settings.get("consistency.backup_workers"))),
    )
    with Shards(num_shards=2, serve=1, settings=settings) as shards:
        job = HandJob(shards, consistency=consistency)
        for rank in range(2):
            job.wires[0].call("Join", job.request(rank, 0))
            job.open(rank, 0)
        loads = [codec.encode_initial(part, job.parameters) for part in job.parts_of(0)]
        job.wires[0].call("Load", LoadRequest(hello=job.hello(0)), *loads)
        job.meet(Purpose.START)
        hello, *_ = control_messages()
        codes = Counter(
            outcome(job.wires[0], "LeadService/Control", hello, frame)
            for frame in Spoiler(seed, control_messages()).frames(FRAMES)
            if not is_failure(frame)
        )
        assert min(codes[StatusCode.OK], codes[StatusCode.INVALID_ARGUMENT]) > 40
        states = {worker.state for worker in job.wires[0].describe().workers}
        assert states == {"member"}
        job.meet(Purpose.MEAN)
        job.close()


# -- Jobs that would take all memory, or for ever --------------------------------------------------


def spec_of(*shapes: tuple[int, ...], part_bytes: int = 2**22) -> Job:
    """A job of one worker and one shard, with a parameter of each shape."""
    parameters = tuple(ParameterSpec("w", torch.float32, shape, 0) for shape in shapes)
    sgd = OptimizerSpec("SGD", ({"lr": 0.1},))
    return Job("shardline", 1, 1, parameters, part_bytes, 2**25, sgd, ConsistencyConfig())


def resized(*shapes: Sequence[int], **changes: int) -> JobSpec:
    """A job of parameters of these shapes, of which no plan has been made."""
    message = codec.encode_job(spec_of((64,)))
    [parameter] = message.parameters
    del message.parameters[:]
    for shape in shapes:
        parameter.tensor.shape[:] = shape
        message.parameters.append(parameter)
    for name, value in changes.items():
        setattr(message, name, value)
    return message


MEMORY_BYTES: Final = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MONSTERS: Final = {
    "a huge tensor": (resized([2**60]), "too many pieces: choose larger parts"),
    "many huge sizes": (resized([2**62] * 64), "too many pieces: choose larger parts"),
    "many sizes": (resized([1] * 10**6), "parameter 'w' has 1000000 dimensions"),
    "small parts": (resized([2**30], part_bytes=512), "too many pieces: choose larger parts"),
    "large parts": (resized([2**40], part_bytes=2**40), "part_bytes 1099511627776 is more than"),
    "many small parameters": (
        resized(*[[4096]] * 10**4, part_bytes=512, bucket_bytes=2**63),
        "too many pieces: choose larger parts",
    ),
    "the smallest message for the most parts": (
        resized([128 * 2**18 - 2**9], part_bytes=512),
        "too many pieces: choose larger parts",
    ),
    "more than the machine's memory": (
        codec.encode_job(spec_of((MEMORY_BYTES // 2,), part_bytes=2**23)),
        "shard 0 would hold ",
    ),
    "many shards": (
        resized([64], num_shards=2**32 - 1),
        "number of shards is 1 on shard 0 and 4294967295 on the worker",
    ),
}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Wire]]:
    """A shard that nobody has joined."""
    with Fleet(tmp_path_factory.mktemp("empty")) as fleet:
        wire = Wire(fleet.addresses[0])
        yield fleet.shard(0), wire
        wire.close()


@pytest.mark.parametrize("what", MONSTERS)
def test_a_monstrous_job_is_refused_at_once(empty: tuple[Process, Wire], what: str) -> None:
    shard, wire = empty
    job, reason = MONSTERS[what]
    memory, seconds = shard.peak_memory_bytes(), shard.cpu_seconds()
    request = JoinRequest(worker=STRANGER, job=job)
    code, text = wire.refusal("Join", request)
    assert code in (StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION)
    assert reason in text
    assert shard.peak_memory_bytes() < memory + 200 * MIB
    assert shard.cpu_seconds() < seconds + 4
    assert wire.describe().phase == shard_pb2.PHASE_EMPTY
    assert wire.is_serving()


@pytest.mark.parametrize(
    ("num_shards", "reason"),
    [(2**32 - 1, "4294967295 shards are more than 4096"), (4096, "too many pieces")],
)
def test_a_plan_over_very_many_shards_is_not_made(num_shards: int, reason: str) -> None:
    job = resized([2**24], num_shards=num_shards, part_bytes=512)
    with pytest.raises(ProtocolError, match=reason):
        codec.decode_job(job)
