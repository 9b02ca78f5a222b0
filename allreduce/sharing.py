"""One member hands bytes and tensors to the others of its group."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from allreduce.group import Group, Pending
from ps_core.tensors import bytes_of, from_wire, plain, spec_of
from ps_core.v1 import group_pb2, tensor_pb2


def share_bytes(group: Group, index: int, data: bytes) -> bytes:
    """The `data` of one of those that share tensors; that of the others is ignored. Raises
    PeerLostError.
    """
    return _share(group.broadcast, index, data, is_source=index == group.index)


def share_bytes_everywhere(group: Group, index: int, data: bytes) -> bytes:
    """The same, of one of all members."""
    is_source = index == group.sharing[group.index]
    return _share(group.broadcast_everywhere, index, data, is_source=is_source)


def _share(
    broadcast: Callable[[torch.Tensor, int], Pending], index: int, data: bytes, *, is_source: bool
) -> bytes:
    length = torch.tensor([len(data)])
    broadcast(length, index).wait()
    buffer = torch.empty(int(length), dtype=torch.uint8)
    if is_source and data:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if len(buffer):
        broadcast(buffer, index).wait()
    return bytes(bytes_of(buffer))


def share_tensors(
    group: Group, index: int, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The `tensors` of member `index`, by name, as copies on the host, sent one at a time; those of
    the others are ignored. Raises PeerLostError.
    """
    listed = group_pb2.TensorList(specs=[spec_of(name, each) for name, each in tensors.items()])
    data = share_bytes(group, index, listed.SerializeToString())
    specs = group_pb2.TensorList.FromString(data).specs
    return {spec.name: share_tensor(group, index, spec, tensors.get(spec.name)) for spec in specs}


def share_tensor(
    group: Group, index: int, spec: tensor_pb2.TensorSpec, own: torch.Tensor | None
) -> torch.Tensor:
    """Member `index`'s tensor, described by `spec`, as a copy on the host; `own` counts on that
    member only. Raises PeerLostError.
    """
    if index == group.index and own is not None:
        tensor = plain(own).clone()
    else:
        tensor = torch.empty(tuple(spec.shape), dtype=from_wire(spec.dtype))
    if tensor.numel():
        group.broadcast(tensor.view(-1).view(torch.uint8), index).wait()
    return tensor
