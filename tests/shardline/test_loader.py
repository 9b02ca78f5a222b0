"""Shares of a dataset, computed again here from the permutation that the loader promises."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from ps_core.errors import UsageError
from ps_core.exchange import Traffic
from ps_core.metrics import WorkerMetrics
from shardline.attendance import Attendance
from shardline.journal import Journal
from shardline.loader import Loader
from shardline.steps import Steps


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def make(
    dataset: object,
    *,
    batch_size: int = 2,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    drop_last: bool = False,
    **options: object,
) -> Loader:
    attendance = Attendance()
    steps = Steps(WorkerMetrics(rank, 1), Journal(None, rank, Traffic()), attendance)
    return Loader(
        dataset,  # type: ignore[arg-type]  # some tests hand over what is none
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        rank=rank,
        world_size=world_size,
        seed=5,
        attendance=attendance,
        steps=steps,
        options=options,
    )


def batches(loader: Loader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_workers_share_every_batch_of_a_pass(
    count: int, batch_size: int, world_size: int, drop_last: bool
) -> None:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5)).tolist()
    expected = [order[at : at + batch_size] for at in range(0, count, batch_size)]
    if drop_last and len(expected[-1]) < batch_size:
        expected.pop()
    for rank in range(world_size):
        loader = make(
            Numbers(count),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        share = expected[rank::world_size]
        assert len(loader) == len(share)
        assert batches(loader) == share


def test_every_pass_has_another_order_and_every_worker_the_same() -> None:
    one, other = make(Numbers(40)), make(Numbers(40))
    first, second = batches(one), batches(one)
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(40))
    assert [batches(other), batches(other)] == [first, second]


def test_without_shuffling_the_order_is_that_of_the_dataset() -> None:
    assert batches(make(Numbers(5), shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_options_go_to_torch() -> None:
    loader = make(Numbers(4), shuffle=False, collate_fn=lambda items: torch.tensor(items) * 10)
    assert batches(loader) == [[0, 10], [20, 30]]


def test_worker_processes_may_load_the_data() -> None:
    assert batches(make(Numbers(4), shuffle=False, num_workers=1)) == [[0, 1], [2, 3]]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize("dataset", [Stream(), iter(range(3))])
def test_what_has_no_indices_is_refused_with_a_way_out(dataset: object) -> None:
    with pytest.raises(UsageError, match=r"optimizer\.step\(samples=n\)"):
        make(dataset)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        make(Numbers(0))


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size is 0"):
        make(Numbers(3), batch_size=0)
