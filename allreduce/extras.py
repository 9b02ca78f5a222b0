"""One member's buffers and untrained parameters to all, where they differ."""

from __future__ import annotations

import torch

from allreduce.group import Group
from allreduce.sharing import share_bytes, share_tensor
from ps_core.extras import Extras, Kind
from ps_core.tensors import from_wire, spec_of
from ps_core.v1 import group_pb2


def share_extras(
    group: Group, index: int, extras: Extras, *, takes: bool = True, joins: bool = False
) -> None:
    """Let those that share tensors, and of them who `takes` any, take over what member `index` has.

    A worker that `joins` must have the same names, types and shapes, which may change later. Raises
    MismatchError, once all has been sent, and PeerLostError.
    """
    if group.size == 1:
        return
    tensors, own = extras.read(), extras.digests()
    specs = [spec_of(name, each) for name, each in tensors.items()]
    told = group_pb2.TensorList(specs=specs, digests=[own[spec.name] for spec in specs])
    listed = group_pb2.TensorList.FromString(share_bytes(group, index, told.SerializeToString()))
    differ = {
        spec.name: takes and own.get(spec.name) != digest
        for spec, digest in zip(listed.specs, listed.digests, strict=True)
    }
    wanted = torch.tensor(list(differ.values()), dtype=torch.int64)
    group.add_up(wanted).wait()
    received = {
        spec.name: share_tensor(group, index, spec, tensors.get(spec.name))
        for spec, count in zip(listed.specs, wanted.tolist(), strict=True)
        if count
    }
    if takes and joins:
        extras.check_kinds(
            {each.name: Kind(from_wire(each.dtype), tuple(each.shape)) for each in listed.specs}
        )
    extras.write({name: tensor for name, tensor in received.items() if differ[name]})
