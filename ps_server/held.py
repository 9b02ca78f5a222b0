"""What workers have said in a membership epoch that the lead has not told this shard yet. Pure."""

from __future__ import annotations

from collections.abc import Callable

from ps_core.errors import ProtocolError
from ps_server.effects import Effect, Lost

Call = Callable[[], list[Effect]]


class Held:
    """Keeps a worker's begin and what follows it: not more than its step can have.

    A worker begins again only after its stream broke, and then says everything again: what was kept
    of it before is dropped.
    """

    def __init__(self, num_parts: int) -> None:
        """`num_parts`: that may follow a begin."""
        self._num_parts = num_parts
        self._calls: dict[int, list[Call]] = {}
        self._incarnations: dict[int, int] = {}

    def begin(self, worker: int, incarnation: int, call: Call) -> None:
        """Keep the begin of a worker."""
        self._calls[worker], self._incarnations[worker] = [call], incarnation

    def follows(self, worker: int, call: Call) -> bool:
        """Keep what follows a begin that is kept; False: none is. Raises ProtocolError."""
        if worker not in self._calls:
            return False
        if len(self._calls[worker]) > self._num_parts:
            raise ProtocolError(f"worker {worker} pushes more than {self._num_parts} parts")
        self._calls[worker].append(call)
        return True

    def forget(self, worker: int) -> None:
        """The worker is gone, or begins again."""
        self._calls.pop(worker, None)

    def take(self) -> list[Effect]:
        """Obey what was kept, as far as its epoch is known now. Who has said something wrong is
        lost: it is not the fault of whoever has told the epoch.
        """
        kept, self._calls = self._calls, {}
        effects: list[Effect] = []
        for worker, calls in kept.items():
            try:
                for call in calls:
                    effects += call()
            except ProtocolError as error:
                self.forget(worker)
                effects.append(Lost(worker, self._incarnations[worker], str(error)))
        return effects
