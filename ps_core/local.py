"""LocalExchange: one process, no shards. Every other exchange is tested against it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ps_core.buckets import Bucket
from ps_core.exchange import (
    Arrival,
    Farewell,
    Grant,
    Meeting,
    Outcome,
    Purpose,
    Start,
    StateByParameter,
    Traffic,
    Work,
    new_incarnation,
)
from ps_core.extras import Extras
from ps_core.leases import LeaseBook, PassSpec
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import Plan
from ps_core.updater import Updater

_ALONE = 0
"""The rank of the only worker."""


class LocalExchange:
    """Runs torch.optim on the buckets, on the model's own device."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.incarnation = new_incarnation()
        self._leases = LeaseBook(striped=True)
        self._granted: deque[Grant] = deque()
        self._reading: tuple[int, PassSpec] | None = None
        self._version = 0

    def join(
        self, plan: Plan, buckets: Sequence[Bucket], optimizer: OptimizerSpec, extras: Extras
    ) -> Start:
        """Keep the values as they are: there is nobody else."""
        self._buckets = buckets
        self._updater = Updater(plan, buckets, optimizer)
        return Start(step=0, chosen=True)

    def begin(self, step: int, work: Work, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Take the step's hyperparameters; with weight 0 nothing will be applied."""
        self._abstains = not work.weight
        self._leases.consume(_ALONE, step, work.leases)
        self._updater.set_hyperparameters(hyperparameters)

    def submit(self, bucket: Bucket, step: int) -> None:
        """Nothing to hand over."""

    def settle(self, step: int) -> Outcome:
        """Apply the update."""
        if not self._abstains:
            self._updater.step()
            for bucket in self._buckets:
                bucket.accept()
        self._leases.settle(_ALONE)
        self._version = step + 1
        return Outcome(step + 1, version=step + 1, applied=not self._abstains, staleness=0)

    def held_versions(self) -> tuple[int, int]:
        """That of the last step."""
        return self._version, self._version

    def close(self, farewell: Farewell = Farewell.FINISHED, failure: str = "") -> None:
        """Nothing to leave."""

    def idle(self) -> None:
        """Nobody waits."""

    def meet(self, arrival: Arrival) -> Meeting:
        """Alone: everybody has come. What was given back is trained on before the pass ends."""
        grant: Grant | None = None
        if arrival.purpose is Purpose.EPOCH:
            if arrival.takes_leases and self._reading is not None:
                self.request_lease(*self._reading)
                grant = self.receive_lease()
            if grant is None or not grant.leases:
                grant = None
                self._leases.end_passes()
        return Meeting(arrival.step, arrival.values, chosen=True, grant=grant)

    def request_lease(self, loader: int, spec: PassSpec) -> None:
        """Take it from the book."""
        self._reading = loader, spec
        answer = self._leases.request(loader, spec, _ALONE, (_ALONE,))
        leases = () if answer.lease is None else (answer.lease,)
        self._granted.append(Grant(answer.number, leases, answer.is_over))

    def receive_lease(self) -> Grant:
        """What was taken."""
        return self._granted.popleft()

    def return_leases(self, leases: Sequence[int], *, declined: bool = False) -> None:
        """Back into the book."""
        self._leases.give_back(_ALONE, leases, declined=declined)

    def holds_lease(self, lease: int) -> bool:
        """Nobody takes it away."""
        return True

    def read_state(self) -> StateByParameter:
        """Copies of torch's state."""
        return self._updater.read_state()

    def write_state(self, state: StateByParameter) -> None:
        """Replace torch's state with copies."""
        self._updater.write_state(state)
