"""The metrics of the lead: who joins and who is evicted, who is slow, what became of the data.

As in ps_core/metrics.py, labels are bounded and series begin at 0. The endpoint shows these metrics
once a `LeadMetrics` is built, so only the lead has them.
"""

from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from ps_core.metrics import REGISTRY

EvictionReason = Literal["stream", "heartbeat", "step_deadline", "failed", "replaced"]
LeaseState = Literal["granted", "applied", "applied_in_part", "returned", "abandoned", "open"]
StragglerPhase = Literal["data", "compute", "network"]

# A shard that is not the lead imports this file too. Metrics without labels have a value as soon as
# they are registered, and an epoch of 0 would be wrong there.
_LEAD: Final = CollectorRegistry()

_EVICTIONS: Final = Counter(
    "shardline_evictions_total",
    "Workers that the lead evicted, by what gave them away.",
    ["reason"],
    registry=_LEAD,
)
_PREEMPTIONS: Final = Counter(
    "shardline_preemptions_total",
    "Workers that left because their machine was wanted back.",
    registry=_LEAD,
)
_JOINS: Final = Counter(
    "shardline_joins_total",
    "Workers that joined the job, those that took the place of another included.",
    registry=_LEAD,
)
_LEASES: Final = Gauge(
    "shardline_leases", "Samples of the job's passes, by state.", ["state"], registry=_LEAD
)
_STRAGGLER_RATIO: Final = Gauge(
    "shardline_straggler_ratio",
    "Step time of a straggler over the median of the other workers'; 1 for other workers.",
    ["worker"],
    registry=_LEAD,
)
_STRAGGLER: Final = Gauge(
    "shardline_straggler",
    "Whether a worker is a straggler, and loses its time in this phase.",
    ["worker", "phase"],
    registry=_LEAD,
)
_MEMBERSHIP_EPOCH: Final = Gauge(
    "shardline_membership_epoch", "Changes of membership so far.", registry=_LEAD
)
_PAUSED: Final = Gauge(
    "shardline_paused", "Whether the job waits for more workers.", registry=_LEAD
)


class LeadMetrics:
    """Counts what the lead decides."""

    def __init__(self) -> None:
        REGISTRY.register(_LEAD)  # again changes nothing
        self._evictions = {reason: _EVICTIONS.labels(reason) for reason in get_args(EvictionReason)}
        self._leases = {state: _LEASES.labels(state) for state in get_args(LeaseState)}

    def joined(self) -> None:
        """A worker joined."""
        _JOINS.inc()

    def preempted(self) -> None:
        """A worker left because its machine was wanted back."""
        _PREEMPTIONS.inc()

    def evicted(self, reason: EvictionReason) -> None:
        """A worker was evicted: its stream stayed closed, its heartbeats stopped, an update waited
        for it for too long, its script failed, or another process took its rank.
        """
        self._evictions[reason].inc()

    def set_epoch(self, epoch: int) -> None:
        """The membership has changed `epoch` times."""
        _MEMBERSHIP_EPOCH.set(epoch)

    def set_paused(self, paused: bool) -> None:
        """The job waits for more workers, or goes on."""
        _PAUSED.set(paused)

    def set_ledger(self, **samples: int) -> None:
        """How many samples are in each `LeaseState`; one that is left out stays as it was."""
        for state, count in samples.items():
            self._leases[state].set(count)

    def straggler(self, rank: int, ratio: float, phase: StragglerPhase) -> None:
        """Worker `rank` takes `ratio` times as long as the others, because of `phase`."""
        self._show(rank, ratio, phase)

    def no_straggler(self, rank: int) -> None:
        """Worker `rank` is as fast as the others, or not known to be slower yet."""
        self._show(rank, 1.0, None)

    def forget(self, rank: int) -> None:
        """Worker `rank` is gone: show nothing about it any more."""
        _STRAGGLER_RATIO.remove(str(rank))
        for phase in get_args(StragglerPhase):
            _STRAGGLER.remove(str(rank), phase)

    def _show(self, rank: int, ratio: float, slow: StragglerPhase | None) -> None:
        _STRAGGLER_RATIO.labels(str(rank)).set(ratio)
        for phase in get_args(StragglerPhase):
            _STRAGGLER.labels(str(rank), phase).set(phase == slow)
