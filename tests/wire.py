"""Shards spoken to in bytes: what a worker never sends, or a worker of another release would."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import grpc
import torch
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from ps_core import codec
from ps_core.exchange import Purpose
from ps_core.job import Job
from ps_core.optim_spec import OptimizerSpec
from ps_core.plan import ParameterSpec, Part
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_core.v1.shard_pb2 import WorkerId
from tests.processes import PATIENCE_SECONDS, Fleet

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

    def read(self) -> shard_pb2.ExchangeResponse:
        """The next answer. Raises grpc.RpcError."""
        return shard_pb2.ExchangeResponse.FromString(next(self._call))

    def wait(self) -> tuple[grpc.StatusCode, str]:
        """Wait until the shard ends the stream: status and text."""
        with suppress(grpc.RpcError):
            list(self._call)
        return self._call.code(), self._call.details()


class HandJob:
    """A job of plain SGD whose workers are made by hand, and the parameters it must have."""

    lr: Final = 0.25
    samples: Final = (1, 3)
    """Behind the gradients of each of the two workers."""

    def __init__(self, fleet: Fleet) -> None:
        self.wires = [Wire(address) for address in fleet.addresses]
        tensors = (("weight", (25, 40)), ("bias", (24,)))
        self.spec = Job(
            job_id="shardline",
            num_workers=len(self.samples),
            num_shards=len(self.wires),
            parameters=tuple(ParameterSpec(n, torch.float32, shape, 0) for n, shape in tensors),
            part_bytes=512,
            bucket_bytes=2**20,
            optimizer=OptimizerSpec("SGD", ({"lr": self.lr},)),
            mode="sync",
            deterministic=False,
        )
        self.parts = self.spec.plan.parts
        self.workers = [WorkerId(rank=rank, incarnation=77 + rank) for rank in range(2)]
        self.streams: dict[tuple[int, int], HandStream] = {}
        """By rank and shard."""
        self.epoch = self.next_step = 0
        [bucket] = self.spec.plan.buckets
        self.parameters = torch.linspace(-1, 1, bucket.length)

    def close(self) -> None:
        for wire in self.wires:
            wire.close()

    def request(self, rank: int, shard: int) -> shard_pb2.JoinRequest:
        """What a worker joins with."""
        job = codec.encode_job(self.spec)
        return shard_pb2.JoinRequest(
            worker=self.workers[rank], shard=shard, job=job, pid=1, host="hand"
        )

    def hello(self, rank: int) -> shard_pb2.Hello:
        return shard_pb2.Hello(worker=self.workers[rank])

    def open(self, rank: int, shard: int) -> None:
        """Open a joined worker's stream, again if it has broken."""
        self.streams[rank, shard] = HandStream(
            self.wires[shard], shard_pb2.ExchangeRequest(hello=self.hello(rank))
        )

    def ask_again(self, rank: int, shard: int) -> None:
        """Repeat a push of the worker's last step and wait for the answer: then the shard has taken
        all that was sent on the stream.
        """
        self.next_step -= 1
        repeated = self.begin(rank), self.pushes(rank, shard)[0]
        self.next_step += 1
        stream = self.streams[rank, shard]
        stream.send(*repeated)
        while stream.read().part.step != self.next_step:
            pass

    def start(self) -> None:
        """All join, the first one gives the initial values, and all meet."""
        for shard, wire in enumerate(self.wires):
            for rank in range(len(self.workers)):
                wire.call("Join", self.request(rank, shard))
                self.open(rank, shard)
            loads = [codec.encode_initial(p, self.parameters) for p in self.parts_of(shard)]
            wire.call("Load", shard_pb2.LoadRequest(hello=self.hello(0)), *loads)
        self.meet(Purpose.START)

    def parts_of(self, shard: int) -> list[Part]:
        return [part for part in self.parts if part.shard == shard]

    def meet(self, purpose: Purpose) -> None:
        """All workers meet at the lead."""
        for rank in range(len(self.workers)):
            self.streams[rank, 0].send(self.arrival(purpose))
        for rank in range(len(self.workers)):
            self.epoch = self.streams[rank, 0].read().met.epoch

    def arrival(self, purpose: Purpose) -> shard_pb2.ExchangeRequest:
        """What a worker sends to meet the others."""
        name = shard_pb2.Purpose.Name(purpose)
        return shard_pb2.ExchangeRequest(
            meet=shard_pb2.Meet(purpose=name, step=self.next_step, weight=1)
        )

    def begin(self, rank: int) -> shard_pb2.ExchangeRequest:
        """Opens the worker's next step."""
        groups = codec.encode_groups(self.spec.optimizer.groups)
        step, epoch, samples = self.next_step, self.epoch, self.samples[rank]
        return shard_pb2.ExchangeRequest(
            begin=shard_pb2.Begin(step=step, epoch=epoch, samples=samples, groups=groups)
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

    def step(self) -> None:
        """All workers take a step, and must get the parameters that SGD gives. A part that was
        pushed before may be answered twice.
        """
        for (rank, shard), stream in self.streams.items():
            stream.send(self.begin(rank), *self.pushes(rank, shard))
        total = sum(n * self.gradients(rank) for rank, n in enumerate(self.samples))
        self.parameters = self.parameters - self.lr * total / sum(self.samples)
        self.next_step += 1
        for (_, shard), stream in self.streams.items():
            missing = {part.index: part for part in self.parts_of(shard)}
            while missing:
                answer = stream.read().part
                if answer.step == self.next_step and answer.part in missing:
                    self._check(missing.pop(answer.part), answer)

    def _check(self, part: Part, answer: tensor_pb2.Part) -> None:
        elements = torch.frombuffer(bytearray(answer.data), dtype=torch.float32)
        expected = self.parameters[part.start : part.start + part.length]
        for piece in part.slices:
            here = slice(piece.offset, piece.offset + piece.length)
            torch.testing.assert_close(elements[here], expected[here])
