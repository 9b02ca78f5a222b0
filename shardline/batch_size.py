"""How many samples a batch has, as far as it shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


def num_rows(values: Iterable[Any]) -> int:
    """The first dimension of the first tensor that has one; 0: there is none."""
    return next((len(each) for each in values if isinstance(each, Tensor) and each.dim()), 0)


def num_left(batch: Any, asked: int) -> int:  # noqa: ANN401 - whatever a collate_fn returns
    """Of `asked` samples, those that a collate_fn has left in the batch.

    They show where all of a batch's tensors have the same, smaller first dimension; otherwise it
    may count something else, and none are taken to be dropped.
    """
    tensors = _tensors(batch)
    sizes = {len(each) for each in tensors}
    if len(sizes) != 1 or not 0 < min(sizes) < asked:
        return asked
    is_second = all(each.dim() > 1 and each.shape[1] == asked for each in tensors)
    is_list_of_samples = isinstance(batch, Sequence) and len(batch) == asked
    return asked if is_second or is_list_of_samples else min(sizes)


def _tensors(batch: Any) -> list[Tensor]:  # noqa: ANN401 - see above
    """Those that may be fields of the batch, rather than samples."""
    fields: Iterable[Any] = (batch,)
    if isinstance(batch, Mapping):
        fields = batch.values()
    elif isinstance(batch, Sequence):
        fields = batch
    return [each for each in fields if isinstance(each, Tensor) and each.dim()]
