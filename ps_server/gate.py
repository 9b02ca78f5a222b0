"""Which parts workers have been sent, and which they will be once the slowest is near enough: the
gate of bounded staleness (SSP, Ho et al. 2013). Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ps_server.policy import Consistency, may_continue


class Gate:
    """Answers that are kept, and those that have been given."""

    def __init__(self, policy: Consistency) -> None:
        self._policy = policy
        self._waiting: dict[int, tuple[int, list[int]]] = {}
        """Worker → its clock once it has the parts, and the parts."""
        self._sent: dict[int, set[int]] = {}
        """Worker → parts sent for its present step, on its present stream."""

    def wait(self, worker: int, clock: int, part: int) -> None:
        """Keep the answer to a worker that will be at `clock`. It has taken the steps before: what
        was kept for an earlier one is not needed any more.
        """
        if self._waiting.get(worker, (clock,))[0] != clock:
            del self._waiting[worker]
        _, parts = self._waiting.setdefault(worker, (clock, []))
        if part not in parts:
            parts.append(part)

    def sent(self, worker: int, part: int) -> None:
        """The worker is sent the part now."""
        self._sent.setdefault(worker, set()).add(part)

    def has(self, worker: int, part: int) -> bool:
        """Whether the worker has been sent the part, or will be without asking again."""
        kept: Sequence[int] = self._waiting[worker][1] if worker in self._waiting else ()
        return part in kept or part in self._sent.get(worker, ())

    def renew(self, worker: int) -> None:
        """The worker takes another step, or has another stream: what was sent does not count."""
        self._sent.pop(worker, None)

    def forget(self, worker: int) -> None:
        """The worker is gone."""
        self._waiting.pop(worker, None)
        self._sent.pop(worker, None)

    def open(self, clocks: Iterable[int]) -> list[tuple[int, int, int]]:
        """Let go of all (worker, clock, part) that need not wait. `clocks`: of all live members,
        only read when something waits.
        """
        if not self._waiting:
            return []
        live_clocks = tuple(clocks)
        opened = [
            (worker, clock, parts)
            for worker, (clock, parts) in sorted(self._waiting.items())
            if may_continue(self._policy, clock, live_clocks)
        ]
        for worker, _, _ in opened:
            del self._waiting[worker]
        return [(worker, clock, part) for worker, clock, parts in opened for part in parts]
