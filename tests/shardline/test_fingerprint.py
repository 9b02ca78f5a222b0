"""Datasets that differ between workers, and such that only look different."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset

from shardline.fingerprint import fingerprint

SEED = 3
X = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(200) % 10


class Files(Dataset[str]):
    """As people write them: reading counts, and fills a cache."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self.cache: list[str | None] = [None] * len(paths)
        self.num_reads = [0] * len(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        raise AssertionError("nothing is to be read")


class Transformed(Dataset[str]):
    def __init__(self, inner: Dataset[str]) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]  # Sized


def paths(folder: str = "/data") -> list[str]:
    return [f"{folder}/{number}.png" for number in range(200)]


def of(dataset: object) -> int:
    return fingerprint(dataset, SEED)  # type: ignore[arg-type]  # lists are datasets, too


def shuffled(values: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(values, len(values))


def test_another_order_or_split_shows() -> None:
    order, other = (
        np.random.RandomState(1).permutation(200),
        np.random.RandomState(2).permutation(200),
    )
    data = TensorDataset(X, Y)
    pairs = [
        (Subset(data, list(order[:100])), Subset(data, list(other[:100]))),
        (TensorDataset(X[order]), TensorDataset(X[other])),
        (TensorDataset(Y[order]), TensorDataset(Y[other])),
        (Files(shuffled(paths(), 1)), Files(shuffled(paths(), 2))),
        (Transformed(Files(shuffled(paths(), 1))), Transformed(Files(shuffled(paths(), 2)))),
        (shuffled(paths(), 1), shuffled(paths(), 2)),
        (ConcatDataset([data, Subset(data, order)]), ConcatDataset([data, Subset(data, other)])),  # type: ignore[arg-type]  # an array
    ]
    for one, two in pairs:
        assert 0 < of(one) < 2**48
        assert of(one) != of(two)


def test_equal_data_do_not_differ_wherever_files_lie_and_however_numbers_are_rounded() -> None:
    assert of(Files(paths("/data"))) == of(Files(paths("C:\\mnt\\other")))
    rounded = X.double() * (1 + 1e-7)
    assert of(TensorDataset(X)) == of(TensorDataset(rounded))
    tiny = torch.zeros(200, 3)
    tiny[:, 0] = 1.0
    assert of(TensorDataset(tiny)) == of(TensorDataset(tiny + 1e-9))


def test_numbers_that_data_often_have_may_differ_in_their_last_bit() -> None:
    powers = [2.0**k for k in range(-10, 3)]
    common = torch.tensor([*powers, 1 / 3, 0.001, 0.9, 0.7071]).repeat(8, 1)
    below = torch.nextafter(common, torch.zeros(()))
    assert not torch.equal(common, below)
    assert fingerprint(TensorDataset(common), SEED) == fingerprint(TensorDataset(below), SEED) != 0


def test_what_cannot_be_looked_at_is_not_known() -> None:
    class Broken(Dataset[str]):
        def __len__(self) -> int:
            raise NotImplementedError

    class Reading(list[str]):
        def __getitem__(self, index: object) -> str:  # type: ignore[override]  # the point
            raise OSError

    assert fingerprint(Broken(), SEED) == 0
    assert fingerprint(Reading(["a"]), SEED) == 0  # type: ignore[arg-type]  # as some scripts do


def test_what_a_worker_notes_while_it_reads_does_not_count() -> None:
    before = of(Files(paths()))
    read = Files(paths())
    read.cache = [path if number % 2 else None for number, path in enumerate(paths())]
    read.num_reads = list(range(200))
    assert of(read) == before


def test_of_other_datasets_nothing_is_known() -> None:
    class Computed(Dataset[int]):
        def __len__(self) -> int:
            return 200

    broken = Subset(TensorDataset(Y), [0, 10**6])
    for dataset in (Computed(), range(200), StackDataset(TensorDataset(X)), broken):
        assert of(dataset) == 0
