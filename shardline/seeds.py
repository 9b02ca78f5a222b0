"""Random generators: the same on all workers while they prepare, each worker's own in training."""

from __future__ import annotations

import contextlib
import random

import torch

_LARGEST_CHOSEN = 2**32
"""A seed that a script chooses is smaller; torch's own, at its start, has 64 bits."""


def seed_all(seed: int) -> None:
    """Seed torch, NumPy and random, unless the script has seeded torch: then it has seeded itself,
    and its generators stay as they are.
    """
    if torch.initial_seed() >= _LARGEST_CHOSEN:
        _seed(seed)


def part_ways(rank: int) -> None:
    """From now on this worker draws other numbers than the others; rank 0 those it would have drawn
    anyway.
    """
    if rank:
        _seed(torch.initial_seed() + rank)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    with contextlib.suppress(ImportError):  # torch does without it
        import numpy as np

        np.random.seed(seed % 2**32)
