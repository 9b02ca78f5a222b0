"""Initial parameters and extras on their way to shards and back, which only keep what they hear."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch

from ps_core import codec
from ps_core.buckets import Bucket, make_buckets
from ps_core.errors import MismatchError
from ps_core.plan import ParameterSpec, Plan, make_plan
from ps_core.tensors import from_wire, tensor_of
from ps_core.v1 import shard_pb2
from ps_worker.client import ShardClient
from ps_worker.values import Values

SHAPES = {"first": (100,), "second": (300,), "third": (64,)}


@dataclass
class Client:
    """Keeps the parts and the buffers that it is sent, and gives the buffers back."""

    index: int
    parts: dict[int, torch.Tensor] = field(default_factory=dict)
    buffers: list[shard_pb2.LoadRequest] = field(default_factory=list)
    num_loads: int = 0
    plan: Plan | None = None

    def load(self, messages: Iterable[shard_pb2.LoadRequest | bytes]) -> None:
        self.num_loads += 1
        for each in messages:
            request = shard_pb2.LoadRequest.FromString(each) if isinstance(each, bytes) else each
            if request.HasField("buffer"):
                self.buffers.append(request)
            else:
                assert self.plan is not None
                part = self.plan.parts[request.part.part]
                self.parts[part.index] = codec.decode_elements(request.part, part)

    def pull(self, content: shard_pb2.Content) -> Iterator[shard_pb2.PullResponse]:
        assert content == shard_pb2.CONTENT_BUFFERS
        yield shard_pb2.PullResponse(version=3)
        for each in self.buffers:
            yield shard_pb2.PullResponse(buffer=each.buffer)


@dataclass
class Given:
    """One worker, or a stage of one, with the shards `clients`."""

    values: Values
    clients: Mapping[int, Client]
    plan: Plan
    buckets: Mapping[int, Bucket]
    extras: dict[str, torch.Tensor]


def make(*shards: int, stage: int = 0, num_stages: int = 1, num_shards: int = 2) -> Given:
    """With extras, and parameters of which this stage has every `num_stages`-th."""
    torch.manual_seed(3)
    specs = [
        ParameterSpec(name, torch.float32, shape, 0, stage=number % num_stages)
        for number, (name, shape) in enumerate(SHAPES.items())
    ]
    plan = make_plan(specs, num_shards, 512, 1024)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES.values()]
    buckets = {each.layout.index: each for each in make_buckets(plan, parameters, stage)}
    clients = {index: Client(index, plan=plan) for index in shards}
    extras = {"mean": torch.randn(5), "count": torch.tensor(4)}
    values = Values(
        plan,
        buckets,
        lambda: extras,
        cast(Mapping[int, ShardClient], clients),
        contextlib.nullcontext,
    )
    return Given(values, clients, plan, buckets, extras)


def received(client: Client) -> dict[str, torch.Tensor]:
    """What a shard was last sent as buffers, which are small here: a chunk each."""
    return {
        each.buffer.spec.name: tensor_of(
            each.buffer.data,
            from_wire(each.buffer.spec.dtype),
            tuple(each.buffer.spec.shape),
        )
        for each in client.buffers
    }


def assert_parts(given: Given, client: Client) -> None:
    expected = {part.index: part for part in given.plan.parts_of_shard(client.index)}
    assert client.parts.keys() == expected.keys()
    for index, elements in client.parts.items():
        part = expected[index]
        bucket = given.buckets[part.bucket].parameters
        assert torch.equal(elements, bucket[part.start : part.start + part.length])


def test_every_shard_gets_its_parts_and_the_first_one_the_extras() -> None:
    given = make(0, 1)
    given.values.load_initial()
    for client in given.clients.values():
        assert client.parts
        assert_parts(given, client)
    found = received(given.clients[0])
    assert found.keys() == given.extras.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in given.extras.items())
    assert not given.clients[1].buffers


def test_a_stage_keeps_its_extras_on_the_first_of_its_own_shards() -> None:
    given = make(1, 3, stage=1, num_stages=2, num_shards=4)
    given.values.load_initial()
    for client in given.clients.values():
        assert_parts(given, client)
    assert received(given.clients[1]).keys() == given.extras.keys()
    assert not given.clients[3].buffers


def test_extras_are_sent_again_only_when_they_have_changed() -> None:
    given = make(0)
    given.values.load_extras()
    given.clients[0].buffers.clear()
    loads = given.clients[0].num_loads
    given.values.load_extras()
    assert given.clients[0].num_loads == loads
    given.extras["mean"].add_(1)
    given.values.load_extras()
    assert list(received(given.clients[0])) == ["mean"]


@pytest.mark.parametrize("shard", [0, 1])
def test_another_worker_takes_the_extras_over(shard: int) -> None:
    given, other = make(shard, stage=shard, num_stages=2), make(shard, stage=shard, num_stages=2)
    given.values.load_extras()
    other.clients[shard].buffers += given.clients[shard].buffers
    for tensor in other.extras.values():
        tensor.zero_()
    other.values.pull_extras()
    for name, tensor in given.extras.items():
        assert torch.equal(other.extras[name], tensor)


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        ({"mean": torch.zeros(5)}, "the job's model has 'count', which this worker's model lacks"),
        (
            {"mean": torch.zeros(5), "count": torch.tensor(0), "more": torch.zeros(1)},
            r"this worker's model has \['more'\], which the job's model lacks",
        ),
    ],
)
def test_models_with_other_extras_are_refused(mine: dict[str, torch.Tensor], message: str) -> None:
    given = make(0)
    given.values.load_extras()
    given.extras.clear()
    given.extras.update(mine)
    with pytest.raises(MismatchError, match=message):
        given.values.pull_extras()
