"""Which numbers a worker draws, before and after it has joined."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from shardline.seeds import part_ways, seed_all


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    torch.seed()
    yield
    torch.seed()


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_torch_numpy_and_random_are_seeded() -> None:
    seed_all(5)
    drawn = draw()
    assert drawn[0] == torch.rand((), generator=torch.Generator().manual_seed(5)).item()
    assert drawn[1] == random.Random(5).random()
    assert drawn[2] == np.random.RandomState(5).rand()


def test_a_script_that_has_seeded_itself_keeps_its_numbers() -> None:
    torch.manual_seed(7)
    random.seed(8)
    np.random.seed(9)
    expected = draw()
    torch.manual_seed(7)
    random.seed(8)
    np.random.seed(9)
    seed_all(5)
    assert draw() == expected


def test_in_training_every_worker_draws_its_own_numbers_and_the_first_goes_on() -> None:
    drawn = []
    for rank in (0, 0, 1, 2):
        torch.seed()
        seed_all(5)
        before = draw()
        part_ways(rank)
        drawn.append((before, draw()))
    assert drawn[0] == drawn[1]
    assert len({before for before, _ in drawn}) == 1
    assert len({after for _, after in drawn}) == 3
