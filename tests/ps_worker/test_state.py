"""Optimizer state is cut into the slices of each shard, and put together again."""

from __future__ import annotations

import itertools

import pytest
import torch

from ps_core import codec
from ps_core.errors import ProtocolError
from ps_core.plan import ParameterSpec, Plan, make_plan
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_worker.state import cut_state, place_state

SHAPES = {"weight": (25, 40), "bias": (24,), "scale": (), "embedding": (3, 5, 64)}
PARAMETERS = tuple(ParameterSpec(n, torch.float32, s, 0) for n, s in SHAPES.items())
PLAN = make_plan(PARAMETERS, num_shards=3, part_bytes=512, bucket_bytes=2**20)


def make_state(plan: Plan = PLAN) -> dict[int, dict[str, torch.Tensor]]:
    """State as Adam has it: two tensors of each parameter's shape and a count."""
    generator = torch.Generator().manual_seed(3)
    return {
        index: {
            "exp_avg": torch.randn(spec.shape, generator=generator),
            "exp_avg_sq": torch.rand(spec.shape, generator=generator),
            "step": torch.tensor(7.0),
        }
        for index, spec in enumerate(plan.parameters)
    }


def cut(state: dict[int, dict[str, torch.Tensor]], shard: int) -> list[shard_pb2.LoadRequest]:
    """What a shard is sent, as it arrives there."""
    frames = [request.SerializeToString() for request in cut_state(PLAN, shard, state)]
    return [shard_pb2.LoadRequest.FromString(frame) for frame in frames]


def put_together(messages: list[tensor_pb2.StateTensor]) -> dict[int, dict[str, torch.Tensor]]:
    state: dict[int, dict[str, torch.Tensor]] = {i: {} for i in range(len(PLAN.parameters))}
    for message in messages:
        place_state(PLAN, state, message)
    return state


def test_the_plan_of_these_tests_cuts_a_parameter_over_shards() -> None:
    shards = {part.shard for part in PLAN.parts for piece in part.slices if piece.parameter == 0}
    assert len(shards) > 1


def test_state_that_was_cut_is_put_together_as_it_was() -> None:
    state = make_state()
    messages = [request.state for shard in range(3) for request in cut(state, shard)[1:]]
    back = put_together(messages[::-1])  # in whatever order the shards are read
    assert back.keys() == state.keys()
    for index, entries in state.items():
        assert back[index].keys() == entries.keys()
        for key, value in entries.items():
            assert torch.equal(back[index][key], value)
            assert back[index][key].shape == value.shape


@pytest.mark.parametrize("shard", range(3))
def test_a_shard_first_forgets_what_it_had_and_then_gets_what_belongs_to_its_slices(
    shard: int,
) -> None:
    clear, *requests = cut(make_state(), shard)
    assert clear.clear_state
    own = [
        (part.index, number, key)
        for part in PLAN.parts
        if part.shard == shard
        for number in range(len(part.slices))
        for key in ("exp_avg", "exp_avg_sq", "step")
    ]
    sent = [(each.state.part, each.state.slice, each.state.spec.name) for each in requests]
    assert sorted(sent) == sorted(own)


def test_every_element_is_sent_once() -> None:
    counted = make_state()
    total = sum(entries["exp_avg"].numel() for entries in counted.values())
    elements = [
        each.state.spec.shape[0]
        for shard in range(3)
        for each in cut(counted, shard)
        if each.state.spec.name == "exp_avg"
    ]
    assert sum(elements) == total


def test_without_state_the_shards_only_forget() -> None:
    for shard in range(3):
        assert cut({}, shard) == [shard_pb2.LoadRequest(clear_state=True)]


def test_a_parameter_without_state_is_left_out() -> None:
    state = make_state()
    del state[1]
    sent = {
        PLAN.parts[each.state.part].slices[each.state.slice].parameter
        for shard in range(3)
        for each in cut(state, shard)[1:]
    }
    assert sent == {0, 2, 3}


def test_a_tensor_of_another_layout_is_cut_by_its_indices() -> None:
    weight = torch.arange(1000.0).view(40, 25).t()
    messages = [each.state for shard in range(3) for each in cut({0: {"m": weight}}, shard)[1:]]
    assert torch.equal(put_together(messages)[0]["m"], weight)


def test_a_whole_tensor_is_made_once_and_not_for_every_slice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages = [each.state for shard in range(3) for each in cut(make_state(), shard)[1:]]
    made: list[torch.Size] = []
    zeros = torch.zeros

    def noting(shape: torch.Size, *, dtype: torch.dtype) -> torch.Tensor:
        made.append(shape)
        return zeros(shape, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", noting)
    put_together(messages)
    assert sorted(made) == sorted([*SHAPES.values()] * 2)


def message(
    part: int, slice_: int, tensor: torch.Tensor, name: str = "exp_avg"
) -> tensor_pb2.StateTensor:
    return codec.encode_state(part, slice_, name, tensor)


LENGTH = PLAN.parts[0].slices[0].length
WRONG = {
    "an unknown part": message(len(PLAN.parts), 0, torch.zeros(LENGTH)),
    "an unknown slice": message(0, 99, torch.zeros(LENGTH)),
    "too few elements": message(0, 0, torch.zeros(LENGTH - 1)),
    "too many elements": message(0, 0, torch.zeros(LENGTH + 1)),
    "one element for all": message(0, 0, torch.zeros(1)),
    "a number for a slice": message(0, 0, torch.tensor(1.0)),
    "two dimensions": message(0, 0, torch.zeros(1, LENGTH)),
    "a list for a number": message(0, 0, torch.zeros(2), name="step"),
}


@pytest.mark.parametrize("what", WRONG)
def test_state_that_does_not_fit_the_plan_is_refused(what: str) -> None:
    with pytest.raises(ProtocolError):
        put_together([WRONG[what]])


def test_slices_of_different_dtypes_are_no_tensor() -> None:
    pieces = [
        (part.index, number, piece.length)
        for part in PLAN.parts
        for number, piece in enumerate(part.slices)
        if piece.parameter == 0
    ]
    (one, first, length), (other, second, more) = itertools.islice(pieces, 2)
    half = message(other, second, torch.zeros(more, dtype=torch.float16))
    with pytest.raises(ProtocolError, match="float16"):
        put_together([message(one, first, torch.zeros(length)), half])
