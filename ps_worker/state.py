"""Optimizer state: whole tensors on the worker, slices of parts on the shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ps_core import codec
from ps_core.errors import ProtocolError
from ps_core.exchange import StateByParameter
from ps_core.optim_spec import SCALAR_STATE
from ps_core.plan import Plan, Slice
from ps_core.v1 import shard_pb2, tensor_pb2


def place_state(
    plan: Plan, state: Mapping[int, dict[str, torch.Tensor]], message: tensor_pb2.StateTensor
) -> None:
    """Write one slice's tensor into its parameter's, which is made when its first slice comes.
    Raises ProtocolError.
    """
    piece = _piece(plan, message)
    name, value = message.spec.name, codec.decode_state(message)
    entries = state[piece.parameter]
    if name in SCALAR_STATE and value.dim() == 0:
        entries[name] = value
        return
    if name not in entries:
        entries[name] = torch.zeros(plan.parameters[piece.parameter].shape, dtype=value.dtype)
    whole = entries[name]
    if value.shape != (piece.length,) or value.dtype != whole.dtype:
        raise ProtocolError(
            f"state {name} of a slice of {piece.length} elements is {value.dtype}"
            f"{list(value.shape)}"
        )
    whole.view(-1)[piece.start : piece.start + piece.length] = value


def _piece(plan: Plan, message: tensor_pb2.StateTensor) -> Slice:
    try:
        return plan.parts[message.part].slices[message.slice]
    except IndexError as error:
        raise ProtocolError(
            f"there is no slice {message.slice} of part {message.part} in the plan"
        ) from error


def cut_state(plan: Plan, shard: int, state: StateByParameter) -> Iterator[shard_pb2.LoadRequest]:
    """What replaces the state of every slice on a shard."""
    yield shard_pb2.LoadRequest(clear_state=True)
    for part in plan.parts_of_shard(shard):
        for number, piece in enumerate(part.slices):
            for key, value in state.get(piece.parameter, {}).items():
                if key not in SCALAR_STATE:
                    value = value.reshape(-1)[piece.start : piece.start + piece.length]
                message = codec.encode_state(part.index, number, key, value.cpu())
                yield shard_pb2.LoadRequest(state=message)
