"""ZeRO-1: every worker has the optimizer's state of its own piece of each bucket only.

Gradients are added up on the owner of a piece, which updates it and sends the parameters to all.
Exact because every optimizer in the table is elementwise. Rajbhandari et al. 2020, section 5.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from allreduce.group import Group
from allreduce.sharing import share_tensors
from allreduce.whole import Summation
from allreduce.wire import Wire
from ps_core.buckets import Bucket
from ps_core.exchange import StateByParameter
from ps_core.optim_spec import SCALAR_STATE, Hyperparameters, OptimizerSpec
from ps_core.part_optimizer import PartOptimizer
from ps_core.plan import Part, Plan, cut


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a bucket, and the member that owns it."""

    part: Part
    owner: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Its elements of one of the bucket's buffers."""
        return flat[self.part.start : self.part.start + self.part.length]


class ShardedUpdater:
    """All parameters, and a share of the optimizer."""

    def __init__(
        self,
        plan: Plan,
        buckets: Sequence[Bucket],
        spec: OptimizerSpec,
        dtype: torch.dtype | None,
    ) -> None:
        self._plan = plan
        self._buckets = buckets
        self._spec = spec
        self._summation = Summation(plan, buckets, dtype)
        self._pieces: dict[int, list[_Piece]] = {}
        """Bucket → its pieces."""
        self._own: list[tuple[Bucket, _Piece, PartOptimizer]] = []

    def connect(self, group: Group) -> None:
        """See GroupUpdater. The state begins anew: `gather_state` comes before."""
        self._group = group
        self._summation.connect(group)
        self._pieces = {
            bucket.layout.index: [
                _Piece(part, owner) for owner, part in enumerate(cut(bucket.layout, group.size))
            ]
            for bucket in self._buckets
        }
        self._own = [
            (bucket, piece, PartOptimizer(self._spec, piece.part, piece.of(bucket.parameters)))
            for bucket in self._buckets
            for piece in self._pieces[bucket.layout.index]
            if piece.owner == group.index
        ]

    def issue(self, bucket: Bucket, weight: float) -> None:
        """See GroupUpdater."""
        wire = self._summation.load(bucket, weight)
        sums = [
            self._group.add_up_on(piece.of(wire.buffer), piece.owner)
            for piece in self._pieces[bucket.layout.index]
        ]
        self._summation.started(wire, sums)

    def collect(self) -> None:
        """See GroupUpdater."""
        self._summation.finish()

    def update(self, hyperparameters: Sequence[Hyperparameters]) -> None:
        """See GroupUpdater."""
        self._clip()
        for bucket, piece, optimizer in self._own:
            present = [_is_present(bucket, each.parameter) for each in piece.part.slices]
            groups = hyperparameters[piece.part.group]
            optimizer.step(piece.of(bucket.gradients), present, groups)
        self._spread()

    def _clip(self) -> None:
        """To the spec's norm over the whole model, as torch.nn.utils.clip_grad_norm_ does."""
        if self._spec.max_grad_norm is None:
            return
        own = [piece.of(bucket.gradients) for bucket, piece, _ in self._own]
        squares = sum((each.double().square().sum() for each in own), torch.zeros(()))
        total = squares.to("cpu", torch.float64).reshape(1)
        self._group.add_up_everywhere(total).wait()
        factor = (self._spec.max_grad_norm / (total.sqrt() + 1e-6)).clamp(max=1.0).item()
        for each in own:
            each.mul_(factor)

    def _spread(self) -> None:
        """The owners' parameters to all."""
        wires = [self._summation.wires[bucket.layout.index] for bucket in self._buckets]
        for wire in wires:
            self._download(wire)
        pending = [
            self._group.broadcast(piece.of(wire.parameters), piece.owner)
            for wire in wires
            for piece in self._pieces[wire.bucket.layout.index]
        ]
        for each in pending:
            each.wait()
        for wire in wires:
            if not wire.is_on_device:
                wire.bucket.upload()

    def _download(self, wire: Wire) -> None:
        if not wire.is_on_device and wire.parameters is not wire.bucket.parameters:
            wire.parameters.copy_(wire.bucket.parameters)

    def gather_state(self) -> StateByParameter:
        """See GroupUpdater. The owners send theirs in turn."""
        state: dict[int, dict[str, torch.Tensor]] = {
            placement.parameter: {}
            for bucket in self._buckets
            for placement in bucket.layout.placements
        }
        for owner in range(self._group.size):
            own = dict(self._named_state()) if owner == self._group.index else {}
            for name, tensor in share_tensors(self._group, owner, own).items():
                parameter, start, key = name.split("/")
                self._place(state[int(parameter)], int(parameter), int(start), key, tensor)
        return state

    def _named_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for _, piece, optimizer in self._own:
            for index, key, tensor in optimizer.read_state():
                each = piece.part.slices[index]
                yield f"{each.parameter}/{each.start}/{key}", tensor

    def _place(
        self,
        entries: dict[str, torch.Tensor],
        parameter: int,
        start: int,
        key: str,
        tensor: torch.Tensor,
    ) -> None:
        """One slice's entry into the whole parameter's."""
        if key in SCALAR_STATE:
            entries.setdefault(key, tensor)
            return
        shape = self._plan.parameters[parameter].shape
        whole = entries.setdefault(key, torch.zeros(shape, dtype=tensor.dtype))
        whole.view(-1)[start : start + len(tensor)] = tensor

    def write_state(self, state: StateByParameter) -> None:
        """See GroupUpdater."""
        for bucket, piece, optimizer in self._own:
            optimizer.clear_state()
            for index, each in enumerate(piece.part.slices):
                for key, value in state.get(each.parameter, {}).items():
                    if key not in SCALAR_STATE:
                        flat = value.reshape(-1)[each.start : each.start + each.length]
                        value = flat.to(bucket.parameters.device)
                    optimizer.write_state(index, key, value.clone())


def _is_present(bucket: Bucket, parameter: int) -> bool:
    return bucket.present[
        next(i for i, each in enumerate(bucket.layout.placements) if each.parameter == parameter)
    ]
