"""Tensors of a model that share memory with its trained parameters, whose memory moves.

`b.weight.data = a.weight.data` makes two parameters of one memory, `self.w = a.weight.detach()` a
tensor that always has the parameter's values. Both are so after the parameters have moved, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ps_core.errors import UsageError
from ps_core.model_tensors import Place, places_of
from ps_core.tensors import address_of, has_address, is_trained, memory_of


@dataclass(frozen=True, slots=True)
class Alias:
    """A tensor in the memory of a trained parameter, which is not trained itself."""

    place: Place
    of: Place
    offset: int
    """Elements between the two first ones."""
    is_whole: bool
    """It has the same elements in the same order."""

    def follow(self) -> None:
        """Be in the memory that the parameter has now."""
        alias, memory = self.place.tensor, self.of.tensor.detach()
        if not self.is_whole:
            start = memory.storage_offset() + self.offset
            memory = memory.as_strided(alias.size(), alias.stride(), start)
        alias.data = memory


def tie(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put one parameter in the place of several that have the same elements in the same order.

    They are trained as what they are: one weight in several places, whose gradient is the sum over
    these, with one optimizer state. Raises UsageError for parameters that share memory otherwise.
    """
    groups = {
        id(parameter): number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if is_trained(parameter)
    }
    places = places_of(model)
    replaced: set[int] = set()
    for first, second in _overlaps(places, groups):
        if not {id(first.tensor), id(second.tensor)} <= groups.keys() - replaced:
            continue
        if memory_of(first.tensor) != memory_of(second.tensor):
            raise _refusal(second, first)
        if groups[id(first.tensor)] != groups[id(second.tensor)]:
            raise UsageError(
                f"parameters {first.name} and {second.name} are one memory, in two groups of the "
                "optimizer: give it one of them"
            )
        replaced.add(id(second.tensor))
        _put_everywhere(first, [place for place in places if place.tensor is second.tensor])
    for group in optimizer.param_groups:
        group["params"] = [each for each in group["params"] if id(each) not in replaced]


def _put_everywhere(first: Place, places: Sequence[Place]) -> None:
    for place in places:
        if place.put is None:
            raise _refusal(place, first)
        place.put(first.tensor)


def aliases(model: nn.Module, trained: Sequence[nn.Parameter]) -> list[Alias]:
    """Of these parameters, no two of which overlap. Raises UsageError for a tensor that overlaps
    one in a way that cannot be kept.
    """
    owners = {id(parameter) for parameter in trained}
    found = []
    for first, second in _overlaps(places_of(model), owners):
        of, other = (first, second) if id(first.tensor) in owners else (second, first)
        is_whole = memory_of(of.tensor) == memory_of(other.tensor)
        if not is_whole and not _is_inside(of.tensor, other.tensor):
            raise _refusal(other, of)
        found.append(Alias(other, of, _offset(of.tensor, other.tensor), is_whole))
    return found


def _refusal(second: Place, first: Place) -> UsageError:
    return UsageError(
        f"{second.name} shares memory with parameter {first.name}, but not as the same elements in "
        "the same order: such parts would be trained apart. Compute one from the other in the "
        "model's forward, or give it memory of its own with .clone()"
    )


# -- Which tensors overlap -------------------------------------------------------------------------


def _overlaps(places: Sequence[Place], owners: Collection[int]) -> Iterator[tuple[Place, Place]]:
    """Pairs of different tensors with an element in common, of which one is an owner; each in the
    order of the places.
    """
    distinct: dict[int, Place] = {}
    for place in places:
        if has_address(place.tensor):
            distinct.setdefault(id(place.tensor), place)
    numbered = enumerate(distinct.values())
    spans = sorted((*_span(place.tensor), number, place) for number, place in numbered)
    near: list[tuple[object, int, int, int, Place]] = []
    for span in spans:
        space, start, _, number, place = span
        near = [each for each in near if each[0] == space and each[2] > start]
        for _, _, _, other_number, other in near:
            pair = (other, place) if other_number < number else (place, other)
            is_owned = any(id(each.tensor) in owners for each in pair)
            if is_owned and _have_elements_in_common(other.tensor, place.tensor):
                yield pair
        near.append(span)


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """Address space, first and last address."""
    space, start = address_of(tensor)
    return space, start, start + _reach(tensor) * tensor.itemsize


def _reach(tensor: Tensor) -> int:
    """Elements from the first to the last one in memory."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.size(), tensor.stride(), strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Two of its elements are one in memory."""
    if tensor.is_contiguous():
        return False
    taken = torch.zeros(_reach(tensor), dtype=torch.bool)
    taken.as_strided(tensor.size(), tensor.stride()).fill_(True)
    return int(taken.sum()) < tensor.numel()


def _offset(first: Tensor, second: Tensor) -> int:
    return (_span(second)[1] - _span(first)[1]) // first.itemsize


def _is_inside(owner: Tensor, other: Tensor) -> bool:
    """All elements of `other` are elements of an owner that stays as it is laid out."""
    (_, start, end), (_, other_start, other_end) = _span(owner), _span(other)
    is_within = start <= other_start and other_end <= end
    is_plain = owner.dtype == other.dtype and owner.is_neg() == other.is_neg()
    return is_within and is_plain and owner.is_contiguous()


def _have_elements_in_common(first: Tensor, second: Tensor) -> bool:
    """Of two tensors whose spans overlap."""
    if (first.is_contiguous() and second.is_contiguous()) or first.itemsize != second.itemsize:
        return True
    low = min(0, offset := _offset(first, second))
    taken = torch.zeros(max(_reach(first), offset + _reach(second)) - low, dtype=torch.bool)
    taken.as_strided(first.size(), first.stride(), -low).fill_(True)
    return bool(taken.as_strided(second.size(), second.stride(), offset - low).any())
