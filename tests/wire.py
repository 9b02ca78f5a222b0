"""Shards spoken to in bytes: what a worker never sends, or a worker of another release would."""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Final, Protocol

import grpc
import torch
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from ps_core import codec
from ps_core.exchange import Purpose
from ps_core.job import Job
from ps_core.optim_spec import OptimizerSpec
from ps_core.plan import ParameterSpec, Part
from ps_core.settings import ConsistencyConfig
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_core.v1.shard_pb2 import WorkerId
from tests.processes import PATIENCE_SECONDS

_MAX_MESSAGE_BYTES: Final = 64 * 2**20
"""More than a shard takes."""

Frame = Message | bytes


def as_bytes(frame: Frame) -> bytes:
    return frame if isinstance(frame, bytes) else frame.SerializeToString()


class Wire:
    """One shard. Nothing on this side checks what is sent, or tries a call again."""

    def __init__(self, address: str) -> None:
        size = ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES)
        self.channel = grpc.insecure_channel(address, options=[("grpc.enable_retries", 0), size])

    def close(self) -> None:
        self.channel.close()

    def open(self, method: str, frames: Iterator[Frame]) -> grpc._CallIterator[bytes]:
        """A call of a method of ShardService, or of "LeadService/…"; on the wire a unary call is a
        stream of one.
        """
        service, _, name = method.rpartition("/")
        path = f"/ps_core.v1.{service or 'ShardService'}/{name}"
        stub: grpc.StreamStreamMultiCallable[Frame, bytes]
        stub = self.channel.stream_stream(path, request_serializer=as_bytes)
        return stub(frames, timeout=PATIENCE_SECONDS)

    def call(self, method: str, *frames: Frame) -> list[bytes]:
        """Send frames, and return all answers. Raises grpc.RpcError."""
        return list(self.open(method, iter(frames)))

    def refusal(self, method: str, *frames: Frame) -> tuple[grpc.StatusCode, str]:
        """Send frames that must be refused: status and text."""
        try:
            answers = self.call(method, *frames)
        except grpc.RpcError as error:
            return error.code(), error.details() or ""
        raise AssertionError(f"{method} gave {len(answers)} answers")

    def describe(self) -> shard_pb2.DescribeResponse:
        [answer] = self.call("Describe", shard_pb2.DescribeRequest())
        return shard_pb2.DescribeResponse.FromString(answer)

    def is_serving(self) -> bool:
        """What health checks see."""
        check = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=as_bytes,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class HandStream:
    """A worker's open Exchange stream."""

    def __init__(self, wire: Wire, *frames: Frame) -> None:
        self._outgoing: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._call = wire.open("Exchange", iter(self._outgoing.get, None))
        self.send(*frames)

    def send(self, *frames: Frame) -> None:
        for frame in frames:
            self._outgoing.put(frame)

    def read_bytes(self) -> bytes:
        """The next answer. Raises grpc.RpcError."""
        return next(self._call)

    def read(self) -> shard_pb2.ExchangeResponse:
        """The next answer. Raises grpc.RpcError."""
        return shard_pb2.ExchangeResponse.FromString(self.read_bytes())

    def wait(self) -> tuple[grpc.StatusCode, str]:
        """Wait until the shard ends the stream: status and text."""
        with suppress(grpc.RpcError):
            list(self._call)
        return self._call.code(), self._call.details()

    def finish(self) -> tuple[grpc.StatusCode, str]:
        """Say that nothing more comes; afterwards the shard has taken all that was sent. What it
        has answered is not read.
        """
        self._outgoing.put(None)
        return self.wait()

    def cut(self) -> None:
        """Break the stream: what was sent may have arrived or not."""
        self._call.cancel()
        self._outgoing.put(None)


class Served(Protocol):
    """Shards that listen."""

    addresses: list[str]


class HandJob:
    """A job of plain SGD whose workers are made by hand, and the parameters it must have."""

    lr: Final = 0.25
    samples: Final = (1, 3, 2, 5)
    """Behind the gradients of each worker."""

    def __init__(
        self,
        served: Served,
        *,
        num_workers: int = 2,
        consistency: ConsistencyConfig | None = None,
    ) -> None:
        self.wires = [Wire(address) for address in served.addresses]
        tensors = (("weight", (25, 40)), ("bias", (24,)))
        self.spec = Job(
            job_id="shardline",
            num_workers=num_workers,
            num_shards=len(self.wires),
            parameters=tuple(ParameterSpec(n, torch.float32, shape, 0) for n, shape in tensors),
            part_bytes=512,
            bucket_bytes=2**20,
            optimizer=OptimizerSpec("SGD", ({"lr": self.lr},)),
            consistency=consistency or ConsistencyConfig(),
        )
        self.parts = self.spec.plan.parts
        self.ranks = list(range(num_workers))
        """Of the workers that take steps."""
        self.workers = [WorkerId(rank=r, incarnation=77 + r) for r in range(len(self.samples))]
        self.streams: dict[tuple[int, int], HandStream] = {}
        """By rank and shard."""
        self.epoch = self.next_step = 0
        self._numbers: Counter[int] = Counter()
        """Rank → requests to the lead so far."""
        [bucket] = self.spec.plan.buckets
        self.parameters = torch.linspace(-1, 1, bucket.length)

    def close(self) -> None:
        for wire in self.wires:
            wire.close()

    # -- Workers come and go -----------------------------------------------------------------------

    def request(self, rank: int, shard: int) -> shard_pb2.JoinRequest:
        """What a worker joins with."""
        job = codec.encode_job(self.spec)
        return shard_pb2.JoinRequest(
            worker=self.workers[rank], shard=shard, job=job, pid=1, host="hand"
        )

    def hello(self, rank: int) -> shard_pb2.Hello:
        return shard_pb2.Hello(worker=self.workers[rank])

    def open(self, rank: int, shard: int) -> HandStream:
        """Open a joined worker's stream, again if it has broken."""
        stream = self.streams[rank, shard] = HandStream(
            self.wires[shard], shard_pb2.ExchangeRequest(hello=self.hello(rank))
        )
        return stream

    def join(self, rank: int) -> None:
        """A worker joins all shards and opens its streams."""
        for shard, wire in enumerate(self.wires):
            wire.call("Join", self.request(rank, shard))
            self.open(rank, shard)

    def replace(self, rank: int) -> None:
        """From now on the rank is another process."""
        self.workers[rank] = WorkerId(rank=rank, incarnation=self.workers[rank].incarnation + 1000)
        self._numbers[rank] = 0

    def start(self) -> None:
        """All join, the first one gives the initial values, and all meet."""
        for rank in self.ranks:
            self.join(rank)
        for shard, wire in enumerate(self.wires):
            loads = [codec.encode_initial(p, self.parameters) for p in self.parts_of(shard)]
            wire.call("Load", shard_pb2.LoadRequest(hello=self.hello(0)), *loads)
        self.meet(Purpose.START)

    # -- Requests to the lead ----------------------------------------------------------------------

    def numbered(self, rank: int, request: shard_pb2.ExchangeRequest) -> shard_pb2.ExchangeRequest:
        """The worker's next request to the lead."""
        self._numbers[rank] += 1
        request.number = self._numbers[rank]
        return request

    def ask(self, rank: int, request: shard_pb2.ExchangeRequest) -> shard_pb2.ExchangeRequest:
        """Send a request to the lead; what was sent."""
        self.streams[rank, 0].send(self.numbered(rank, request))
        return request

    def answer(self, rank: int, kind: str) -> shard_pb2.ExchangeResponse:
        """The lead's next answer of this kind; parts before it are not looked at."""
        while (answer := self.streams[rank, 0].read()).WhichOneof("message") != kind:
            assert answer.WhichOneof("message") == "part"
        return answer

    def meet(self, purpose: Purpose) -> None:
        """All workers meet at the lead."""
        for rank in self.ranks:
            self.ask(rank, self.arrival(purpose, self.next_step))
        for rank in self.ranks:
            self.epoch = self.answer(rank, "met").met.epoch

    def arrival(self, purpose: Purpose, step: int, *values: float) -> shard_pb2.ExchangeRequest:
        """What a worker sends to meet the others."""
        name = shard_pb2.Purpose.Name(purpose)
        return shard_pb2.ExchangeRequest(
            meet=shard_pb2.Meet(purpose=name, step=step, weight=1, values=values)
        )

    # -- Steps -------------------------------------------------------------------------------------

    def parts_of(self, shard: int) -> list[Part]:
        return [part for part in self.parts if part.shard == shard]

    def begin(self, rank: int, *leases: int) -> shard_pb2.ExchangeRequest:
        """Opens the worker's next step."""
        return shard_pb2.ExchangeRequest(
            begin=shard_pb2.Begin(
                step=self.next_step,
                epoch=self.epoch,
                samples=self.samples[rank],
                groups=codec.encode_groups(self.spec.optimizer.groups),
                leases=leases,
            )
        )

    def gradients(self, rank: int) -> torch.Tensor:
        """Of the worker's next step."""
        generator = torch.Generator().manual_seed(1000 * rank + self.next_step)
        return torch.randn(len(self.parameters), generator=generator)

    def pushes(self, rank: int, shard: int) -> list[bytes]:
        """The parts of the worker's next step."""
        return [
            codec.encode_push(self.next_step, part, [True] * len(part.slices), self.gradients(rank))
            for part in self.parts_of(shard)
        ]

    def share(self, rank: int, shard: int) -> list[Frame]:
        """All that a shard must hear of the worker's next step."""
        return [self.begin(rank), *self.pushes(rank, shard)]

    def step(self) -> None:
        """All workers take a step, and must get the parameters that SGD gives. A part that was
        pushed before may be answered twice.
        """
        for rank in self.ranks:
            for shard in range(len(self.wires)):
                self.streams[rank, shard].send(*self.share(rank, shard))
        self.advance(*self.ranks)
        for rank in self.ranks:
            self.check_parts(rank)

    def advance(self, *ranks: int) -> None:
        """The next version is made of these workers' gradients."""
        total = sum(self.samples[rank] * self.gradients(rank) for rank in ranks)
        num_samples = sum(self.samples[rank] for rank in ranks)
        self.parameters = self.parameters - self.lr * total / num_samples
        self.next_step += 1

    def check_parts(self, rank: int) -> None:
        """The worker gets every part of the version that its next step begins with."""
        for shard in range(len(self.wires)):
            self.check_parts_of(rank, shard)

    def check_parts_of(self, rank: int, shard: int) -> None:
        """The same, from one shard."""
        missing = {part.index: part for part in self.parts_of(shard)}
        while missing:
            answer = self.streams[rank, shard].read().part
            self.epoch = max(self.epoch, answer.epoch)
            if answer.step == self.next_step and answer.part in missing:
                self.check(missing.pop(answer.part), answer)

    def check(self, part: Part, answer: tensor_pb2.Part) -> None:
        """These must be the parameters."""
        elements = torch.frombuffer(bytearray(answer.data), dtype=torch.float32)
        expected = self.parameters[part.start : part.start + part.length]
        for piece in part.slices:
            here = slice(piece.offset, piece.offset + piece.length)
            torch.testing.assert_close(elements[here], expected[here])
