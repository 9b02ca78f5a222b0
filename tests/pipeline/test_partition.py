"""Cuts are balanced, or where the user wants them, and never change what is trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from pipeline.partition import Layer, at, check, layers, parameter_costs, partition
from ps_core.errors import UsageError

Stages = tuple[range, ...]


def named(*names: str) -> list[Layer]:
    return [Layer(name, nn.Identity()) for name in names]


# -- The layers of a model -------------------------------------------------------------------------


class Parallel(nn.Sequential):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([module(inputs) for module in self])


def test_nested_sequentials_are_flattened_in_the_order_in_which_they_run() -> None:
    model = nn.Sequential()
    model.add_module("embedding", nn.Embedding(5, 3))
    model.add_module("empty", nn.Sequential())
    blocks = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), nn.Tanh())
    model.add_module("blocks", blocks)
    model.add_module("parallel", Parallel(nn.Linear(3, 3)))
    found = layers(model)
    assert [layer.name for layer in found] == [
        "embedding", "blocks.0", "blocks.1.0", "blocks.1.1", "blocks.2", "parallel",
    ]  # fmt: skip
    assert all(model.get_submodule(layer.name) is layer.module for layer in found)
    ids = torch.tensor([1, 4])
    values: torch.Tensor = ids
    for layer in found:
        values = layer.module(values)
    assert torch.equal(values, model(ids))


def test_a_layer_that_runs_twice_is_listed_twice() -> None:
    activation = nn.ReLU()
    model = nn.Sequential(activation, nn.Sequential(nn.Linear(2, 2), activation))
    assert [layer.name for layer in layers(model)] == ["0", "1.0", "1.1"]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Parallel(nn.Linear(2, 2))])
def test_a_model_that_is_no_sequential_is_refused(model: nn.Module) -> None:
    with pytest.raises(
        UsageError,
        match=rf"A {type(model).__name__} cannot .*nn\.Sequential of its layers.*without --stages",
    ):
        layers(model)


def test_a_layer_costs_its_elements_and_one_more_and_shared_ones_count_once() -> None:
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU())
    tied.append(tied[0])
    model = [Layer("a", nn.Linear(3, 4)), Layer("b", nn.ReLU()), Layer("c", tied)]
    assert parameter_costs(model) == [17.0, 1.0, 10.0]


# -- The balanced split ----------------------------------------------------------------------------


def all_splits(num_layers: int, num_stages: int) -> list[Stages]:
    return [
        tuple(range(start, end) for start, end in pairwise((0, *inner, num_layers)))
        for inner in combinations(range(1, num_layers), num_stages - 1)
    ]


def badness(costs: Sequence[float], stages: Stages) -> tuple[float, float]:
    totals = [sum(costs[index] for index in stage) for stage in stages]
    return max(totals), sum(total**2 for total in totals)


# Whole numbers, so that sums are exact in any order; few of them, so that there are many ties.
costs_and_stages = st.lists(
    st.one_of(st.integers(0, 4), st.integers(0, 1000)).map(float), min_size=1, max_size=9
).flatmap(lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs))))


@given(costs_and_stages)
def test_no_split_has_a_smaller_largest_cost_nor_at_that_one_a_smaller_sum_of_squares(
    case: tuple[list[float], int],
) -> None:
    costs, num_stages = case
    stages = partition(costs, num_stages)
    assert stages in all_splits(len(costs), num_stages)
    best = min(badness(costs, split) for split in all_splits(len(costs), num_stages))
    assert badness(costs, stages) == best


@given(
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=60).flatmap(
        lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
    )
)
def test_every_layer_is_in_one_stage_in_order_and_no_stage_is_empty(
    case: tuple[list[float], int],
) -> None:
    costs, num_stages = case
    stages = partition(costs, num_stages)
    assert len(stages) == num_stages
    assert all(stages)
    assert [index for stage in stages for index in stage] == list(range(len(costs)))
    # No stage is worse than an even share and the largest layer together.
    largest, _ = badness(costs, stages)
    assert largest <= (sum(costs) / num_stages + max(costs)) * (1 + 1e-9)


def test_equal_layers_are_spread_evenly() -> None:
    assert sorted(map(len, partition([1.0] * 10, 4))) == [2, 2, 3, 3]


def test_one_heavy_layer_does_not_unbalance_the_others() -> None:
    assert partition([1.0, 1.0, 1.0, 1.0, 9.0], 3) == (range(2), range(2, 4), range(4, 5))


def test_thousands_of_layers_take_less_than_a_second_or_so() -> None:
    costs = [float(1 + index * 7919 % 1000) for index in range(2000)]
    start = time.perf_counter()
    stages = partition(costs, 64)
    assert time.perf_counter() - start < 5  # a busy machine is slow, not wrong
    assert badness(costs, stages)[0] <= 1.05 * sum(costs) / 64


@pytest.mark.parametrize("num_stages", [0, 4])
def test_more_stages_than_layers_or_none_are_refused(num_stages: int) -> None:
    with pytest.raises(
        UsageError, match=f"3 layers cannot be cut into {num_stages} stages: .*1 to 3"
    ):
        partition([1.0, 2.0, 3.0], num_stages)


# -- Cuts that the user names ----------------------------------------------------------------------

MODEL = named("embedding", "blocks.0", "blocks.1.0", "blocks.1.1", "blocks.10", "head")


@pytest.mark.parametrize(
    ("cuts", "starts"),
    [
        ([], []),
        (["blocks"], [1]),
        (["blocks.1", "head"], [2, 5]),
        (["blocks.1.1"], [3]),
        (["blocks.10"], [4]),
        ([1, "blocks.10", 5], [1, 4, 5]),
    ],
)
def test_a_cut_is_the_first_layer_of_the_next_stage(
    cuts: list[str | int], starts: list[int]
) -> None:
    expected = tuple(range(start, end) for start, end in pairwise([0, *starts, 6]))
    assert at(cuts, MODEL, len(cuts) + 1) == expected


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (["blocks.1"], "3 stages need 2 cuts, not 1"),
        (["blocks.3", "head"], "'blocks.3' is no layer .* such as 'blocks.[0-9]+'.* 1 to 5"),
        (["block", "head"], "'block' is no layer of this model"),
        ([2, 6], "6 is no layer of this model"),
        ([-1, 3], "-1 is no layer of this model"),
        (["head", "blocks.1"], "'blocks.1' leaves the stage before it empty"),
        (["head", "head"], "'head' leaves the stage before it empty"),
        (["blocks.1", 2], "2 leaves the stage before it empty"),
        ([0, "head"], "0 leaves the stage before it empty"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(cuts: list[str | int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        at(cuts, MODEL, 3)


# -- What must not be cut --------------------------------------------------------------------------


def test_tied_weights_are_refused_in_two_stages_but_not_in_one() -> None:
    embedding, head = nn.Embedding(5, 3), nn.Sequential(nn.Linear(3, 5, bias=False))
    head[0].weight = embedding.weight
    model = [Layer("embedding", embedding), Layer("body", nn.Linear(3, 3)), Layer("head", head)]
    with pytest.raises(
        UsageError, match=r"embedding\.weight and head\.0\.weight are tied .*without --stages"
    ):
        check(model, (range(2), range(2, 3)), 4)
    check(model, (range(3),), 4)


def test_one_layer_in_two_stages_is_refused() -> None:
    block = nn.Linear(3, 3)
    model = [Layer("0", block), Layer("1", nn.ReLU()), Layer("2", block)]
    with pytest.raises(UsageError, match="0 and 2 are one and the same layer"):
        check(model, (range(2), range(2, 3)), 1)
    check(model, (range(3),), 1)


def test_batch_statistics_are_refused_with_microbatches_unless_they_are_fixed() -> None:
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model = [Layer("body", nn.Linear(3, 3)), Layer("blocks.1", norm)]
    stages = (range(1), range(1, 2))
    with pytest.raises(
        UsageError, match=r"blocks\.1\.1 normalises.*GroupNorm or LayerNorm .* --microbatches 1"
    ):
        check(model, stages, 2)
    check(model, stages, 1)
    norm.eval()
    check(model, stages, 2)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (parametrizations.spectral_norm(nn.Linear(3, 3)), r"blocks\.1\.1 has a spectral norm"),
        (nn.utils.spectral_norm(nn.Linear(3, 3)), r"blocks\.1\.1 has a spectral norm"),
        (nn.InstanceNorm1d(3, track_running_stats=True), r"blocks\.1\.1 counts running statistics"),
    ],
    ids=["spectral norm", "by a hook", "instance norm"],
)
def test_what_counts_batches_is_refused_with_microbatches(norm: nn.Module, message: str) -> None:
    block = nn.Sequential(nn.Linear(3, 3), norm)
    model = [Layer("body", nn.Linear(3, 3)), Layer("blocks.1", block)]
    stages = (range(1), range(1, 2))
    with pytest.raises(UsageError, match=message):
        check(model, stages, 2)
    check(model, stages, 1)
    block.eval()
    check(model, stages, 2)
