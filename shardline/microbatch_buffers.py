"""Buffers that a forward pass changes: in a split model it runs once for each microbatch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from pipeline.partition import Layer

log = logging.getLogger(__name__)


@contextmanager
def naming_changes(layers: Sequence[Layer], num_microbatches: int) -> Iterator[None]:
    """Name in a warning the buffers that change in it."""
    before = _marks(layers)
    yield
    after = _marks(layers)
    changed = [name for name in after if not _is_same(before.get(name), after[name])]
    if changed:
        log.warning(
            "forward changes %s, which happens %d times a batch in a split model: use "
            "--schedule gpipe --microbatches 1 if it must happen once",
            ", ".join(changed),
            num_microbatches,
        )


_Mark = tuple[Tensor, int]


def _marks(layers: Sequence[Layer]) -> dict[str, _Mark]:
    return {
        name: (buffer, -1 if buffer.is_inference() else buffer._version)
        for layer in layers
        for name, buffer in layer.module.named_buffers(prefix=layer.name)
    }


def _is_same(before: _Mark | None, after: _Mark) -> bool:
    return before is not None and before[0] is after[0] and before[1] == after[1]
