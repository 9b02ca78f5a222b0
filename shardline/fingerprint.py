"""Whether workers read the same data: a number that differs where some samples do.

Only what a dataset holds is looked at, never what it reads: `__getitem__` may augment at random,
open files or count. What is not known to be the same everywhere has no part in it, so that equal
data never differ: not where files lie, nor the last digits of numbers that each worker computes.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence, Sized
from os import PathLike, fspath
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

_NUM_SAMPLES = 64
_NUM_ELEMENTS = 16
"""Of a sample."""
_SPAN, _SHIFT = 1234.5, 1.2345
"""Where numbers are told apart: between values that data often have, such as powers of two, since
the last bit of those may differ.
"""


def fingerprint(dataset: Dataset[Any], seed: int) -> int:
    """Of a dataset with a length, below 2^48; 0: nothing is known. `seed` chooses the samples."""
    draw = random.Random(seed).sample  # noqa: S311 - the same on all workers is what is wanted
    try:
        size = len(dataset) if isinstance(dataset, Sized) else 0
        chosen = sorted(draw(range(size), min(size, _NUM_SAMPLES)))
        facts = list(_facts(dataset, chosen))
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OSError):
        return 0  # it only looks like what it is taken for
    if not facts:
        return 0
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=6).digest())


def _facts(held: Any, chosen: Sequence[int]) -> Iterator[object]:  # noqa: ANN401 - of any dataset
    """What is known of the chosen samples."""
    if isinstance(held, Subset):
        indices = [int(held.indices[index]) for index in chosen]
        yield indices
        yield from _facts(held.dataset, indices)
    elif isinstance(held, ConcatDataset):
        yield from _facts_of_parts(held, chosen)
    elif isinstance(held, TensorDataset):
        for tensor in held.tensors:
            yield [_row(tensor[index]) for index in chosen]
    elif type(held) in (list, tuple):  # one of another class may read files
        yield from _facts_of_sequence(held, chosen)
    elif isinstance(held, Dataset):
        size = len(held) if isinstance(held, Sized) else 0
        for name, value in sorted(vars(held).items()):
            if _may_hold_samples(value, size):
                yield from ((name, fact) for fact in _facts(value, chosen))


def _may_hold_samples(value: object, size: int) -> bool:
    """An attribute of a dataset: another dataset, or texts such as the names of files. Lists of
    numbers may be notes that a worker takes, and of other things a cache.
    """
    if not isinstance(value, list | tuple | Dataset) or not isinstance(value, Sized):
        return False
    return len(value) == size


def _facts_of_parts(held: ConcatDataset[Any], chosen: Sequence[int]) -> Iterator[object]:
    for index in chosen:
        part = bisect_right(held.cumulative_sizes, index)
        start = held.cumulative_sizes[part - 1] if part else 0
        yield from _facts(held.datasets[part], [index - start])


def _facts_of_sequence(values: Sequence[Any], chosen: Sequence[int]) -> Iterator[object]:
    texts = [_texts(values[index]) for index in chosen]
    if all(texts):
        yield texts


def _texts(value: object) -> list[str]:
    """Names and texts in a sample, without the folders that files lie in."""
    parts = value if isinstance(value, tuple) else (value,)
    found = [fspath(each) for each in parts if isinstance(each, str | bytes | PathLike)]
    texts = [each.decode(errors="replace") if isinstance(each, bytes) else each for each in found]
    return [re.split(r"[/\\]", text)[-1] for text in texts]


def _row(row: torch.Tensor) -> list[object]:
    """Whole numbers as they are; of others what rounding does not change."""
    flat = row.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // _NUM_ELEMENTS)][:_NUM_ELEMENTS].tolist()
    if not row.is_floating_point():
        return list(some)
    largest = max((abs(value) for value in some if math.isfinite(value)), default=0.0)
    return [_coarse(value, largest) for value in some]


def _coarse(value: float, largest: float) -> object:
    if not math.isfinite(value):
        return str(value)
    if abs(value) <= largest / _SPAN:
        return 0
    return math.copysign(1, value), math.frexp(value * _SHIFT)[1]
