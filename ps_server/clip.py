"""The clip factor of a step, from the shards' shares of the squared norm. Pure."""

from __future__ import annotations

from ps_core.errors import ProtocolError


class Clip:
    """Adds up what the shards report."""

    def __init__(self, max_grad_norm: float | None, holders: frozenset[int]) -> None:
        """`holders`: the shards that hold parts. None: nothing is clipped."""
        self._max_grad_norm = max_grad_norm
        self._holders = holders
        self._squares: dict[int, float] = {}
        self._next_step = 0
        """Squares of steps before this one are repeats."""

    def factor(self, shard: int, step: int, total: float) -> float | None:
        """What to multiply the mean gradient of `step` with, once every shard has told: that of
        torch.nn.utils.clip_grad_norm_. Raises ProtocolError when nothing is clipped.
        """
        if self._max_grad_norm is None:
            raise ProtocolError(f"shard {shard} sends squares, but nothing is clipped")
        if step < self._next_step:
            return None
        self._squares[shard] = total
        if self._squares.keys() != self._holders:
            return None
        norm = sum(self._squares[index] for index in sorted(self._squares)) ** 0.5
        self._squares.clear()
        self._next_step = step + 1
        return float(min(self._max_grad_norm / (norm + 1e-6), 1.0))
