"""Which layers make up which stage: decisions about a model, without running it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate, pairwise
from math import inf

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ps_core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Layer:
    """A member of the model's sequence, and its name in the model."""

    name: str
    module: nn.Module


def layers(model: nn.Module) -> list[Layer]:
    """The members of `model` in the order in which they run, those of nested Sequentials in place.

    UsageError unless the model is exactly an `nn.Sequential`: a subclass may run its members in
    another way, so one inside the model counts as a single layer.
    """
    if type(model) is not nn.Sequential:
        raise UsageError(
            f"A {type(model).__name__} cannot be cut into stages: write the model as an "
            "nn.Sequential of its layers (such as embedding, blocks, head), "
            "or train without --stages."
        )
    return list(_members(model, ""))


def _members(sequence: nn.Module, prefix: str) -> Iterator[Layer]:
    # Not named_children(), which leaves out a member's second occurrence.
    for name, member in sequence._modules.items():
        if type(member) is nn.Sequential:
            yield from _members(member, f"{prefix}{name}.")
        elif member is not None:
            yield Layer(prefix + name, member)


def parameter_costs(layers: Sequence[Layer]) -> list[float]:
    """Elements of each layer's parameters, plus one, so that layers without any spread evenly."""
    return [
        1.0 + sum(parameter.numel() for parameter in layer.module.parameters()) for layer in layers
    ]


def partition(costs: Sequence[float], num_stages: int) -> tuple[range, ...]:
    """The layers of each stage: contiguous, none empty, the largest cost of a stage minimal.

    Among those the one with the smallest sum of squared stage costs. Depends on nothing but its
    arguments, of which `costs` are not negative. UsageError if there are fewer layers than stages.
    """
    _check_num_stages(len(costs), num_stages)
    assert all(cost >= 0 for cost in costs), "a layer costs nothing or more"
    sums = [0.0, *accumulate(costs)]
    starts = _most_balanced(sums, num_stages, _smallest_limit(sums, num_stages))
    return tuple(range(*ends) for ends in pairwise([*starts, len(costs)]))


def at(cuts: Sequence[str | int], layers: Sequence[Layer], num_stages: int) -> tuple[range, ...]:
    """The layers of each stage, where each of `cuts` says with which layer the next one begins.

    By its index in `layers`, its name, or the name of a Sequential that it is the first layer of.
    UsageError if a cut is unknown, out of order, or leaves a stage empty, or their number is not
    `num_stages` − 1.
    """
    _check_num_stages(len(layers), num_stages)
    if len(cuts) != num_stages - 1:
        raise UsageError(
            f"{num_stages} stages need {num_stages - 1} cuts, not {len(cuts)}: "
            "give the first layer of each stage but the first."
        )
    starts = [0]
    for cut in cuts:
        starts.append(_index_of(cut, layers))
        if starts[-1] <= starts[-2]:
            raise UsageError(
                f"The cut at {cut!r} leaves the stage before it empty: "
                "name each cut once, in the order of the layers, and not the first layer."
            )
    return tuple(range(*ends) for ends in pairwise([*starts, len(layers)]))


def check(layers: Sequence[Layer], stages: Sequence[range], num_microbatches: int) -> None:
    """UsageError for a model that trains differently when it is cut into these stages.

    That is: a layer or a parameter in two stages, which would become two; or batch statistics in
    training, taken over one of several microbatches.
    """
    _check_layers_are_apart(layers, stages)
    _check_parameters_are_apart(layers, stages)
    if num_microbatches > 1:
        _check_batches_are_whole(layers)


def _check_num_stages(num_layers: int, num_stages: int) -> None:
    if not 1 <= num_stages <= num_layers:
        raise UsageError(
            f"{num_layers} layers cannot be cut into {num_stages} stages: "
            f"train with 1 to {num_layers} stages."
        )


def _smallest_limit(sums: Sequence[float], num_stages: int) -> float:
    """The smallest cost that no stage has to exceed, by bisection down to the last bit."""
    low, high = 0.0, sums[-1]
    while low < (middle := (low + high) / 2) < high:
        if _fits(sums, num_stages, middle):
            high = middle
        else:
            low = middle
    return high


def _fits(sums: Sequence[float], num_stages: int, limit: float) -> bool:
    end = 0
    for _ in range(num_stages):
        end = _reach(sums, end, limit)
    return end == len(sums) - 1


def _reach(sums: Sequence[float], start: int, limit: float) -> int:
    """The largest end of a stage from `start` that costs at most `limit`."""
    return bisect_right(sums, limit, start, key=lambda total: total - sums[start]) - 1


def _earliest(sums: Sequence[float], end: int, limit: float) -> int:
    """The smallest start of a stage to `end` that costs at most `limit`."""
    return bisect_left(sums, -limit, 0, end, key=lambda total: total - sums[end])


def _most_balanced(sums: Sequence[float], num_stages: int, limit: float) -> list[int]:
    """Where the stages start that have the least sum of squares, with none above `limit`."""
    least = [0.0] + [inf] * (len(sums) - 1)
    starts: list[list[int]] = []
    for _ in range(num_stages):
        least, start_of = _one_stage_more(least, sums, limit)
        starts.append(start_of)
    chosen = [len(sums) - 1]
    for start_of in reversed(starts):
        chosen.append(start_of[chosen[-1]])
    return chosen[:0:-1]


def _one_stage_more(
    least: Sequence[float], sums: Sequence[float], limit: float
) -> tuple[list[float], list[int]]:
    """From the least sum of squares of stages up to each layer, that with one more stage.

    With it comes the start of that stage. The best start never moves left as the end moves right,
    so that each end that is tried halves the starts that are left for the ends beside it.
    """
    longer, start_of = [inf] * len(sums), [0] * len(sums)
    ends = [end for end, total in enumerate(least) if total < inf]
    todo = [(ends[0] + 1, _reach(sums, ends[-1], limit), ends[0], ends[-1])]
    while todo:
        low, high, left, right = todo.pop()
        if low > high:
            continue
        end = (low + high) // 2
        starts = range(max(left, _earliest(sums, end, limit)), min(right, end - 1) + 1)
        longer[end], start = min((least[s] + (sums[end] - sums[s]) ** 2, s) for s in starts)
        start_of[end] = start
        todo += [(low, end - 1, left, start), (end + 1, high, start, right)]
    return longer, start_of


def _index_of(cut: str | int, layers: Sequence[Layer]) -> int:
    names = [layer.name for layer in layers]
    if isinstance(cut, int) and 0 <= cut < len(names):
        return cut
    for index, name in enumerate(names):
        if cut == name or name.startswith(f"{cut}."):
            return index
    nearest = get_close_matches(str(cut), names, n=1, cutoff=0.0)[0]
    raise UsageError(
        f"The cut at {cut!r} is no layer of this model: give a name, such as {nearest!r}, "
        f"or an index from 1 to {len(names) - 1}."
    )


def _check_layers_are_apart(layers: Sequence[Layer], stages: Sequence[range]) -> None:
    shared = _in_two_stages(
        (layer.module, stage, layer.name) for stage, layer in _placed(layers, stages)
    )
    if shared is not None:
        first, second = shared
        raise UsageError(
            f"{first} and {second} are one and the same layer but in different stages: "
            "make a layer of its own for each, or cut elsewhere."
        )


def _check_parameters_are_apart(layers: Sequence[Layer], stages: Sequence[range]) -> None:
    shared = _in_two_stages(
        (parameter, stage, f"{layer.name}.{name}")
        for stage, layer in _placed(layers, stages)
        for name, parameter in layer.module.named_parameters(remove_duplicate=False)
    )
    if shared is not None:
        first, second = shared
        raise UsageError(
            f"{first} and {second} are tied but in different stages: untie them, "
            "cut so that one stage has both, or train without --stages."
        )


def _check_batches_are_whole(layers: Sequence[Layer]) -> None:
    for layer in layers:
        for name, module in layer.module.named_modules(prefix=layer.name):
            if module.training and (problem := _depends_on_batches(module)):
                raise UsageError(f"{name.partition('.parametrizations')[0]} {problem}")


def _depends_on_batches(module: nn.Module) -> str | None:
    """Why a module in training trains otherwise on microbatches, and what to do."""
    if isinstance(module, _BatchNorm):
        return (
            "normalises over a batch, which a pipeline cuts into microbatches: use GroupNorm or "
            "LayerNorm instead, or --schedule gpipe --microbatches 1."
        )
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return (
            "counts running statistics once per batch, which a pipeline cuts into microbatches: "
            "leave out track_running_stats, or use --schedule gpipe --microbatches 1."
        )
    hooks = module._forward_pre_hooks.values()
    if isinstance(module, _SpectralNorm) or any(isinstance(each, SpectralNorm) for each in hooks):
        return (
            "has a spectral norm, which iterates once per batch, and a pipeline cuts that into "
            "microbatches: train without it, or with --schedule gpipe --microbatches 1."
        )
    return None


def _placed(layers: Sequence[Layer], stages: Sequence[range]) -> Iterator[tuple[int, Layer]]:
    return ((stage, layers[index]) for stage, members in enumerate(stages) for index in members)


def _in_two_stages(things: Iterable[tuple[object, int, str]]) -> tuple[str, str] | None:
    """The names of two of the (thing, stage, name) that are the same thing in different stages."""
    seen: dict[int, tuple[int, str]] = {}
    for thing, stage, name in things:
        other_stage, other_name = seen.setdefault(id(thing), (stage, name))
        if other_stage != stage:
            return other_name, name
    return None
