"""Flat gradient and parameter buffers, and the user's parameters as views into them.

The model computes with `parameters` and `gradients`, on its own device. What travels is
`host_parameters` and `host_gradients`: on the CPU the same memory, so that an answer written there
needs no copy; elsewhere pinned mirrors, one copy per bucket each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.dlpack import from_dlpack

from ps_core.errors import UsageError
from ps_core.memory import release_freed_memory
from ps_core.plan import BucketLayout, Placement, Plan

_NUM_SAMPLES = 4096
"""Elements per bucket that `changed` always compares."""
_NUM_SUMS = 2039
"""A prime, so that elements which change places in a weight of a usual width go into other sums."""


class Bucket:
    """One flat run of parameters and their gradients.

    All four buffers are 1-D, `layout.length` elements long; gaps between parameters are zero.
    `present` says for each placement whether the collected step has a gradient for it; without one
    its elements are zero. A parameter's `.grad` moves into `gradients` as soon as backward has made
    it: a gradient is in memory once.
    """

    def __init__(self, layout: BucketLayout, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Take over `parameters`, in the order of `layout.placements`: their storage moves into
        this bucket.
        """
        device = parameters[0].device
        self.layout = layout
        self.members = tuple(parameters)
        self.present = [False] * len(parameters)
        self._left_alone: dict[int, torch.Tensor] = {}
        """Placement → the values of a parameter for which the collected step has no gradient. Where
        the other workers have none either, an update does not change them.
        """
        self.parameters = torch.zeros(layout.length, dtype=layout.dtype, device=device)
        self.gradients = torch.zeros_like(self.parameters)
        on_host = device.type == "cpu"
        self.host_parameters = self.parameters if on_host else _mirror(self.parameters)
        self.host_gradients = self.gradients if on_host else _mirror(self.gradients)
        # Edits of these by a script are counted apart from the exchange's of `gradients`.
        self.gradient_views = self._views(self.gradients.data)
        # With storages of their own parameters are copied, saved and compared as in plain torch.
        self.parameter_views = [from_dlpack(view) for view in self._views(self.parameters)]
        for parameter, view in zip(self.members, self.parameter_views, strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        for position, parameter in enumerate(self.members):
            parameter.register_post_accumulate_grad_hook(partial(self._move_in, position))
        self.host_parameters.copy_(self.parameters)
        self._anchor = torch.empty(0, dtype=layout.dtype, device=device)
        self._sample_step = max(1, layout.length // _NUM_SAMPLES)
        self.accept()

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [
            flat[placement.offset : placement.offset + placement.length].view(parameter.shape)
            for placement, parameter in zip(self.layout.placements, self.members, strict=True)
        ]

    @torch.no_grad()
    def collect(self, scale: float = 1.0) -> None:
        """Have every `.grad`, times `scale`, in `gradients`, and note which are present."""
        for position, parameter in enumerate(self.members):
            view = self.gradient_views[position]
            self.present[position] = parameter.grad is not None
            if parameter.grad is None:
                view.zero_()
                self._left_alone[position] = self.parameter_views[position].clone()
                continue
            if parameter.grad.is_sparse:
                raise UsageError(
                    "a gradient is sparse (sparse=True): shards take dense gradients only, so "
                    "build the embedding with sparse=False"
                )
            self._move_in(position, parameter)
            if parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
            if scale != 1.0:
                view.mul_(scale)

    def _move_in(self, position: int, parameter: torch.Tensor) -> None:
        """Make a parameter's `.grad` the view into `gradients`, unless it has a graph."""
        gradient, view = parameter.grad, self.gradient_views[position]
        assert gradient is not None
        if gradient is view or gradient.is_sparse or gradient.requires_grad:
            return
        view.copy_(gradient)
        parameter.grad = view

    def set_anchor(self) -> None:
        """Keep a copy of the parameters, for `return_to_anchor`."""
        self._anchor.resize_as_(self.parameters).copy_(self.parameters)

    def return_to_anchor(self) -> None:
        """Fill `gradients` with anchor − parameters, all of them present, and put the parameters
        back to the anchor.
        """
        torch.sub(self._anchor, self.parameters, out=self.gradients)
        self.present = [True] * len(self.members)
        self.parameters.copy_(self._anchor)
        self.accept()

    def download(self) -> None:
        """Bring the collected gradients to the host, where the exchange reads them."""
        if self.host_gradients is not self.gradients:
            self.host_gradients.copy_(self.gradients)

    def upload(self) -> None:
        """Make `host_parameters`, just written by the exchange, what the model computes with."""
        if self.host_parameters is not self.parameters:
            self.parameters.copy_(self.host_parameters)
        self.accept()

    def accept(self) -> None:
        """Take the parameters, just written, as they are: `changed` compares with them from now on,
        and a backward pass through the former values fails, as after a step of torch.optim, which
        leaves alone what has no gradient.
        """
        written = set(range(len(self.members)))
        for position, former in self._left_alone.items():
            if torch.equal(former, self.parameter_views[position]):
                written.discard(position)
        self._left_alone = {}
        torch.autograd.graph.increment_version([self.members[each] for each in written])
        self._versions = [parameter._version for parameter in self.members]
        self._remembered, self._sums = self._sample(), self._sum_up()

    def first_nonfinite(self) -> Placement | None:
        """The first placement whose collected gradient holds NaN or infinity.

        One reading pass when all is well: the extremes are finite exactly when every element is.
        """
        low, high = self.gradients.aminmax()
        if low.isfinite() and high.isfinite():
            return None
        for placement in self.layout.placements:
            end = placement.offset + placement.length
            if not self.gradients[placement.offset : end].isfinite().all():
                return placement
        return None

    def lend(self) -> None:
        """From now on the exchange may write the host parameters, long before it calls `upload`.
        Where the model computes with these a backward pass that still needs them fails.
        """
        if self.host_parameters is self.parameters:
            torch.autograd.graph.increment_version(
                [p for each, p in enumerate(self.members) if each not in self._left_alone]
            )

    @property
    def gradient_version(self) -> int:
        """Grows with everything but the exchange that writes to a `.grad` in here."""
        return self.gradient_views[0]._version

    @torch.no_grad()
    def changed(self) -> Placement | None:
        """A placement whose parameter was changed by anyone but the exchange since `accept`.

        Exact for replaced storage and for in-place operations that autograd sees (`p.copy_()`,
        `p.add_()` under no_grad); operations on `p.data` are found by comparing a sample of the
        elements. A parameter that has its values back is as it was.
        """
        touched = [
            position
            for position, parameter in enumerate(self.members)
            if parameter._version != self._versions[position]
            or parameter.data_ptr() != self.parameter_views[position].data_ptr()
        ]
        if touched:
            if not all(map(self._take_back, touched)) or not self._sum_up().equal(self._sums):
                return self.layout.placements[touched[0]]
            self._versions = [parameter._version for parameter in self.members]
        different = (self._sample() != self._remembered).nonzero()
        if not len(different):
            return None
        element = int(different[0]) * self._sample_step
        return max(
            (p for p in self.layout.placements if p.offset <= element), key=lambda p: p.offset
        )

    def _take_back(self, position: int) -> bool:
        """Have a parameter's values in this bucket again, if they are of its kind."""
        parameter, view = self.members[position], self.parameter_views[position]
        kinds = [(each.dtype, each.shape, each.device) for each in (parameter, view)]
        if kinds[0] != kinds[1]:
            return False
        if parameter.data_ptr() != view.data_ptr():
            view.copy_(parameter)
            parameter.data = view
        return True

    def _sum_up(self) -> torch.Tensor:
        """All bits, as sums of words that are evenly spaced: other values do not have the same by
        chance. One reading pass.
        """
        words = self.parameters.view(torch.int64)
        rest = len(words) % _NUM_SUMS
        sums = words[rest:].view(-1, _NUM_SUMS).sum(0)
        sums[:rest] += words[:rest]
        return sums

    def _sample(self) -> torch.Tensor:
        """Bits of evenly spaced elements, as integers so that NaN equals itself."""
        integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}
        bits = self.parameters.view(integer[self.layout.dtype.itemsize])
        return bits[:: self._sample_step].clone()


def _mirror(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def make_buckets(
    plan: Plan, parameters: Sequence[torch.nn.Parameter], stage: int = 0
) -> list[Bucket]:
    """Buckets for those of the plan's `parameters` that are in a stage, which become views into
    them.
    """
    buckets = [
        Bucket(layout, [parameters[placement.parameter] for placement in layout.placements])
        for layout in plan.buckets
        if layout.stage == stage
    ]
    release_freed_memory()  # where the parameters have been
    return buckets
