"""Initial parameters and extras on their way to shards and back, which only keep what they hear."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
from torch import nn

from ps_core import codec
from ps_core.buckets import Bucket, make_buckets
from ps_core.errors import MismatchError, ProtocolError
from ps_core.extras import Extras
from ps_core.plan import ParameterSpec, Plan, make_plan
from ps_core.tensors import from_wire, tensor_of
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_worker.client import ShardClient
from ps_worker.values import Values
from tests.reference import holding

SHAPES = {"first": (100,), "second": (300,), "third": (64,)}


@dataclass
class Client:
    """Keeps the parts and the buffers that it is sent, and gives the buffers back."""

    index: int
    parts: dict[int, torch.Tensor] = field(default_factory=dict)
    buffers: list[shard_pb2.LoadRequest] = field(default_factory=list)
    num_loads: int = 0
    num_pulled: int = 0
    """Buffers that it has given back with their elements."""
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

    def pull(
        self, content: shard_pb2.Content, held: Mapping[str, bytes]
    ) -> Iterator[shard_pb2.PullResponse]:
        assert content == shard_pb2.CONTENT_BUFFERS
        yield shard_pb2.PullResponse(version=3)
        for each in self.buffers:
            chunk = each.buffer
            if held.get(chunk.spec.name) == chunk.digest:
                chunk = tensor_pb2.TensorChunk(spec=chunk.spec, digest=chunk.digest)
            else:
                self.num_pulled += 1
            yield shard_pb2.PullResponse(buffer=chunk)


@dataclass
class Given:
    """One worker, or a stage of one, with the shards `clients`."""

    values: Values
    clients: Mapping[int, Client]
    plan: Plan
    buckets: Mapping[int, Bucket]
    model: nn.Module
    """With the extras, which are buffers."""

    @property
    def extras(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_buffers())


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
    model = holding({"mean": torch.randn(5), "count": torch.tensor(4)})
    values = Values(
        plan,
        buckets,
        Extras(model, ()),
        cast(Mapping[int, ShardClient], clients),
        contextlib.nullcontext,
    )
    return Given(values, clients, plan, buckets, model)


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


def add_in_place(model: nn.Module) -> None:
    model.get_buffer("mean").add_(1)


def add_behind_the_version_counter(model: nn.Module) -> None:
    model.get_buffer("mean").data.add_(1)


@pytest.mark.parametrize("change", [add_in_place, add_behind_the_version_counter])
def test_extras_are_sent_again_exactly_when_their_content_has_changed(
    change: Callable[[nn.Module], None],
) -> None:
    given = make(0)
    given.values.load_extras()
    given.clients[0].buffers.clear()
    loads = given.clients[0].num_loads
    for _ in range(2):
        given.model.mean = given.model.get_buffer("mean").clone()
        given.values.load_extras()
    assert given.clients[0].num_loads == loads
    change(given.model)
    given.values.load_extras()
    assert list(received(given.clients[0])) == ["mean"]


def test_nan_equals_itself() -> None:
    given = make(0)
    given.model.get_buffer("mean").fill_(torch.nan)
    given.values.load_extras()
    loads = given.clients[0].num_loads
    given.values.load_extras()
    assert given.clients[0].num_loads == loads


@pytest.mark.parametrize("shard", [0, 1])
def test_another_worker_takes_over_the_extras_that_differ(shard: int) -> None:
    given, other = make(shard, stage=shard, num_stages=2), make(shard, stage=shard, num_stages=2)
    given.values.load_extras()
    client = other.clients[shard]
    client.buffers += given.clients[shard].buffers
    other.model.get_buffer("mean").zero_()
    for _ in range(2):
        other.values.take_extras(joins=True)
        assert client.num_pulled <= 1
        for name, tensor in given.extras.items():
            assert torch.equal(other.extras[name], tensor)


def test_what_a_worker_has_taken_over_it_does_not_send_back() -> None:
    given, other = make(0), make(0)
    given.model.get_buffer("mean").zero_()
    given.values.load_extras()
    other.clients[0].buffers += given.clients[0].buffers
    other.values.take_extras()
    other.values.load_extras()
    assert not other.clients[0].num_loads


def test_one_that_knows_of_nothing_kept_sends_all() -> None:
    given = make(0)
    given.values.load_extras()
    given.values.keep_nothing()
    given.values.load_extras()
    assert given.clients[0].num_loads == 2


def test_a_tensor_of_which_a_piece_is_missing_is_not_taken_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(codec, "CHUNK_BYTES", 8)
    given = make(0)
    given.values.load_extras()
    given.clients[0].buffers.pop(1)
    given.model.get_buffer("mean").zero_()
    with pytest.raises(ProtocolError, match=r"pieces of \['mean'\] are missing"):
        given.values.take_extras()


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        ({"mean": torch.zeros(5)}, r"'count' is absent in this worker's model and int64\[\] in"),
        (
            {"mean": torch.zeros(5), "count": torch.tensor(0), "more": torch.zeros(1)},
            r"'more' is float32\[1\] in this worker's model and absent in the job's",
        ),
        (
            {"mean": torch.zeros(2), "count": torch.tensor(0)},
            r"'mean' is float32\[2\] in this worker's model and float32\[5\] in the job's",
        ),
    ],
)
def test_models_with_other_extras_are_refused(mine: dict[str, torch.Tensor], message: str) -> None:
    given = make(0)
    given.values.load_extras()
    del given.model.mean, given.model.count
    for name, tensor in mine.items():
        given.model.register_buffer(name, tensor)
    with pytest.raises(MismatchError, match=message):
        given.values.take_extras(joins=True)
