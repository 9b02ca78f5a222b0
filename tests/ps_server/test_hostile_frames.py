"""More than ten thousand spoiled frames against two live shards, as a stranger and as a worker.

Each must end with a status that says what was wrong, and nothing may be left behind: the job that the
shards serve goes on, with the right values. The seed is in the name of each test.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import grpc
import pytest
import torch
from grpc import StatusCode

from ps_core import codec
from ps_core.exchange import Purpose
from ps_core.plan import ParameterSpec
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_core.v1.shard_pb2 import ExchangeRequest, JobSpec, LoadRequest, PullRequest
from tests.processes import Fleet, Process
from tests.wire import Frame, HandJob, Wire, as_bytes

MIB: Final = 2**20
SEED: Final = 20260
CLEAR: Final = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.DATA_LOSS,  # for a worker that says it knew another incarnation
}


class Spoiler:
    """Spoils frames, the same way for the same seed."""

    def __init__(self, seed: int, frames: Sequence[Frame]) -> None:
        self._random = random.Random(seed)
        self._frames = [as_bytes(frame) for frame in frames]
        self._ways = (self._flip, self._flip, self._flip, self._cut, self._splice, self._noise)

    def frames(self, count: int) -> Iterator[bytes]:
        for _ in range(count):
            frame = bytearray(self._random.choice(self._frames))
            for _ in range(self._random.choice((1, 1, 2))):
                self._random.choice(self._ways)(frame)
            yield bytes(frame)

    def _position(self, frame: bytearray) -> int:
        """Mostly in the head, where a frame says what it is."""
        end = min(len(frame), self._random.choice((4, 16, 64, len(frame))))
        return self._random.randint(0, end)

    def _flip(self, frame: bytearray) -> None:
        for _ in range(self._random.randint(1, 4)):
            at = self._position(frame)
            frame[at : at + 1] = bytes([self._random.choice((0, 1, 127, 128, 255, *range(256)))])

    def _cut(self, frame: bytearray) -> None:
        del frame[self._position(frame) :]

    def _splice(self, frame: bytearray) -> None:
        other = self._random.choice(self._frames)
        at = self._position(frame)
        frame[at:] = other[self._random.randint(0, len(other)) :]

    def _noise(self, frame: bytearray) -> None:
        at = self._position(frame)
        frame[at:at] = self._random.randbytes(self._random.randint(1, 40))


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
    yield job
    job.close()


@pytest.fixture
def job(started: HandJob, shards: list[Process]) -> Iterator[HandJob]:
    """Worker 0 has given its gradients for the next step, so that no frame of it can change them,
    and worker 1 has not. After the test both meet, repeat themselves and must get the right values.
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
    started.meet(Purpose.MEAN)
    started.step()


def outcome(wire: Wire, method: str, *frames: Frame) -> StatusCode:
    """Send frames, whatever they are. AssertionError for a status that helps nobody."""
    try:
        wire.call(method, *frames)
    except grpc.RpcError as error:
        sent = [as_bytes(frame).hex() for frame in frames]
        assert error.code() in CLEAR, (error.code(), error.details(), sent)
        assert error.details(), sent
        return error.code()
    return StatusCode.OK


def requests(job: HandJob, worker: shard_pb2.WorkerId) -> dict[str, list[Frame]]:
    """A frame of every kind for each method, from a worker that is or is not what it says."""
    part = job.parts_of(1)[0]
    join = job.request(rank=0, shard=1)
    join.worker.CopyFrom(worker)
    spec = tensor_pb2.TensorSpec(name="momentum_buffer", dtype="DATA_TYPE_FLOAT32", shape=[128])
    state = tensor_pb2.StateTensor(part=part.index, spec=spec, data=bytes(512))
    chunk = tensor_pb2.TensorChunk(spec=spec, data=bytes(512))
    meet = shard_pb2.Meet(purpose="PURPOSE_MEAN", step=job.next_step, values=[1.0], weight=1.0)
    return {
        "Join": [join],
        "Exchange": [
            ExchangeRequest(hello=shard_pb2.Hello(worker=worker)),
            job.begin(0),
            *job.pushes(0, 1),
            ExchangeRequest(idle=shard_pb2.Idle(step=job.next_step)),
            ExchangeRequest(meet=meet),
        ],
        "Load": [
            LoadRequest(hello=shard_pb2.Hello(worker=worker)),
            codec.encode_initial(part, job.parameters),
            LoadRequest(state=state),
            LoadRequest(buffer=chunk),
        ],
        "Pull": [PullRequest(worker=worker, content=content) for content in range(1, 4)],
        "Leave": [shard_pb2.LeaveRequest(worker=worker, failure="because")],
    }


STRANGER = shard_pb2.WorkerId(rank=0, incarnation=2**62 + 1)


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("method", ["Join", "Exchange", "Load", "Pull", "Leave"])
def test_no_frame_of_a_stranger_harms_a_shard(job: HandJob, method: str, seed: int) -> None:
    spoiler = Spoiler(seed, requests(job, STRANGER)[method])
    codes = Counter(outcome(job.wires[1], method, frame) for frame in spoiler.frames(1000))
    print(codes)


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
@pytest.mark.parametrize("shard", [0, 1])
def test_no_frame_of_a_worker_harms_a_shard(job: HandJob, shard: int, seed: int) -> None:
    spoiler = Spoiler(seed, requests(job, job.workers[0])["Exchange"])
    hello = ExchangeRequest(hello=job.hello(0))
    codes = Counter(
        outcome(job.wires[shard], "Exchange", hello, frame) for frame in spoiler.frames(1000)
    )
    print(codes)
