"""`session.loader`: a DataLoader over this worker's share of a dataset."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ps_core.errors import UsageError
from shardline.attendance import Attendance
from shardline.steps import Steps


class Loader:
    """Batches of a map-style dataset, in an order that depends on the seed and the number of passes
    only.

    Every pass permutes the whole dataset and cuts it into batches; batch b goes to the worker of
    rank b mod world_size. So N workers' batches of one step are the batch that one process with N
    times the batch size would see, and workers may have unequal numbers of batches. A pass ends
    when every worker's has.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        rank: int,
        world_size: int,
        seed: int,
        attendance: Attendance,
        steps: Steps,
        options: dict[str, Any],
    ) -> None:
        """`options` go to torch's DataLoader. Raises UsageError for a dataset that cannot be shared
        out.
        """
        self._num_samples = _checked_length(dataset)
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}: give at least 1")
        self._dataset = dataset
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._attendance = attendance
        self._steps = steps
        self._options = options
        self._num_passes = 0

    def __len__(self) -> int:
        """Batches of this worker in one pass."""
        return len(range(self._rank, self._num_batches, self._world_size))

    def __iter__(self) -> Iterator[Any]:
        """One pass. Waits for the other workers at its end, and first when the pass before was
        broken off.
        """
        self._attendance.enter_pass()
        finished = False
        try:
            yield from self._batches()
            finished = True
        finally:
            self._attendance.leave_pass(finished=finished)

    def _batches(self) -> Iterator[Any]:
        shares = self._shares()
        batches = iter(DataLoader(self._dataset, batch_sampler=shares, **self._options))
        for indices in shares:
            started = time.perf_counter()
            batch = next(batches)
            self._steps.yielded(len(indices), time.perf_counter() - started)
            yield batch

    @property
    def _num_batches(self) -> int:
        whole, rest = divmod(self._num_samples, self._batch_size)
        return whole + (1 if rest and not self._drop_last else 0)

    def _shares(self) -> list[list[int]]:
        """The index lists of this worker's batches in the next pass."""
        order = list(range(self._num_samples))
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed + self._num_passes)
            order = torch.randperm(self._num_samples, generator=generator).tolist()
        self._num_passes += 1
        starts = range(
            self._rank * self._batch_size,
            self._num_batches * self._batch_size,
            self._world_size * self._batch_size,
        )
        return [order[start : start + self._batch_size] for start in starts]


def _checked_length(dataset: Dataset[Any]) -> int:
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise UsageError(
            "session.loader needs a map-style dataset (__getitem__ and __len__), because it "
            "shares out indices: for an "
            "IterableDataset bring your own DataLoader, split by session.rank, and call "
            "optimizer.step(samples=n)"
        )
    if not len(dataset):
        raise UsageError("the dataset is empty: there is nothing to train on")
    return len(dataset)
