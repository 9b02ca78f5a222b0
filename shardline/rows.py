"""How many rows a model is given, where nothing else tells how large a batch is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from shardline.batch_size import num_rows


class RowsSeen:
    """Reports the rows of every call of a model in which gradients are computed, until `close`.

    A copy of the model reports nothing.
    """

    def __init__(self, model: nn.Module, report: Callable[[int], None]) -> None:
        self._report = report
        self._handle = model.register_forward_pre_hook(_Hook(self._see), with_kwargs=True)

    def close(self) -> None:
        """Stop. Idempotent."""
        self._handle.remove()

    def _see(self, values: Any) -> None:  # noqa: ANN401 - the arguments of any model
        self._report(num_rows(values))


class _Hook:
    """In a model that is copied or pickled it is one that does nothing."""

    def __init__(self, see: Callable[[Any], None] | None = None) -> None:
        self._see = see

    def __call__(
        self, module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]
    ) -> None:
        if torch.compiler.is_compiling() or self._see is None:
            return
        if torch.is_grad_enabled():
            self._see([*arguments, *named.values()])

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()
