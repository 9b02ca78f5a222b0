"""What a worker has to do with the lead: directly, or through the first stage of its replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from ps_core import dialogue
from ps_core.exchange import Arrival, Replica
from ps_core.leases import PassSpec
from ps_core.meeting import weighted_means
from ps_core.v1 import shard_pb2
from ps_worker.client import ShardClient
from ps_worker.inbox import Inbox

_PULSE_SECONDS = 0.25
"""Between two signs of the first stage that it still waits for the lead, who may take hours: the
other stages wait for the first one within bounds.
"""
_WAITING, _MET = b"\0", b"\1"


class LeadSide(Protocol):
    """The lead's answers, the same for all stages of a replica."""

    def join(self, job: shard_pb2.JobSpec) -> bool:
        """Enter the job; True: this worker's initial values count."""
        ...

    def meet(self, arrival: Arrival) -> shard_pb2.Met:
        """Wait for all workers; the inbox has heard the answer, too."""
        ...

    def idle(self) -> None:
        """Nobody need wait for this worker."""
        ...

    def request_lease(self, loader: int, spec: PassSpec) -> None:
        """Ask for samples."""
        ...

    def receive_lease(self) -> shard_pb2.Leases:
        """The answer to the oldest request."""
        ...

    def return_leases(self, leases: Sequence[int], *, declined: bool) -> None:
        """Give samples back."""
        ...

    def settled(self, epoch: int) -> int:
        """This worker's step is settled. The membership epoch of the next one; `epoch` is what it
        has heard.
        """
        ...

    def finish(self) -> None:
        """Before the lead is told that this worker has finished."""
        ...


class DirectLead:
    """The lead itself."""

    def __init__(self, client: ShardClient, inbox: Inbox) -> None:
        self._client = client
        self._inbox = inbox

    def join(self, job: shard_pb2.JobSpec) -> bool:
        """See LeadSide."""
        return self._client.join(job)

    def meet(self, arrival: Arrival) -> shard_pb2.Met:
        """See LeadSide."""
        self.arrive(arrival)
        return self._inbox.wait_for_meeting()

    def arrive(self, arrival: Arrival) -> None:
        """Come to a meeting, without waiting for the others."""
        self._client.request(shard_pb2.ExchangeRequest(meet=dialogue.encode_meet(arrival)))

    def idle(self) -> None:
        """See LeadSide."""
        self._client.request(shard_pb2.ExchangeRequest(idle=shard_pb2.Idle()))

    def request_lease(self, loader: int, spec: PassSpec) -> None:
        """See LeadSide."""
        lease = dialogue.encode_lease_request(loader, spec)
        self._client.request(shard_pb2.ExchangeRequest(lease=lease))

    def receive_lease(self) -> shard_pb2.Leases:
        """See LeadSide."""
        return self._inbox.wait_for_leases()

    def return_leases(self, leases: Sequence[int], *, declined: bool) -> None:
        """See LeadSide."""
        lease = shard_pb2.LeaseRequest(returned=leases, declined=declined)
        self._client.request(shard_pb2.ExchangeRequest(lease=lease))

    def settled(self, epoch: int) -> int:
        """Its answers have told."""
        return epoch

    def finish(self) -> None:
        """Nobody else is told."""


class SharedLead:
    """The lead as the stages of a replica see it: one worker, for which the first stage speaks."""

    def __init__(self, direct: DirectLead | None, replica: Replica, inbox: Inbox) -> None:
        """`direct`: on the first stage only."""
        self._direct = direct
        self._replica = replica
        self._inbox = inbox

    def join(self, job: shard_pb2.JobSpec) -> bool:
        """See LeadSide. The other stages join their shards once the lead knows the replica."""
        first = self._direct.join(job) if self._direct else False
        return self._replica.share(bytes([first])) == b"\1"

    def meet(self, arrival: Arrival) -> shard_pb2.Met:
        """See LeadSide. Numbers are averaged in the replica first."""
        rows = self._replica.gather([arrival.weight, *arrival.values])
        if self._direct:
            self._direct.arrive(_combined(arrival, rows))
            while not self._inbox.meeting_ends(_PULSE_SECONDS):
                self._replica.share(_WAITING)
            met = self._inbox.wait_for_meeting()
            self._replica.share(_MET + met.SerializeToString())
            return met
        while (said := self._replica.share(b"")) == _WAITING:
            pass
        self._inbox.met(shard_pb2.Met.FromString(said[len(_MET) :]))
        return self._inbox.wait_for_meeting()

    def idle(self) -> None:
        """See LeadSide."""
        if self._direct:
            self._direct.idle()

    def request_lease(self, loader: int, spec: PassSpec) -> None:
        """See LeadSide."""
        if self._direct:
            self._direct.request_lease(loader, spec)

    def receive_lease(self) -> shard_pb2.Leases:
        """See LeadSide."""
        if self._direct:
            leases = self._direct.receive_lease()
            self._replica.share(leases.SerializeToString())
            return leases
        return shard_pb2.Leases.FromString(self._replica.share(b""))

    def return_leases(self, leases: Sequence[int], *, declined: bool) -> None:
        """See LeadSide."""
        if self._direct:
            self._direct.return_leases(leases, declined=declined)

    def settled(self, epoch: int) -> int:
        """Only the first stage is answered by the lead's shard. Whatever it tells the lead next
        means that all stages have settled.
        """
        return int(max(row[0] for row in self._replica.gather([float(epoch)])))

    def finish(self) -> None:
        """Shards end once the lead has seen all workers finish: every stage leaves them before."""
        self._replica.gather([0.0])


def _combined(arrival: Arrival, rows: Sequence[Sequence[float]]) -> Arrival:
    """One worker's arrival for those of all stages."""
    each = [replace(arrival, weight=weight, values=tuple(values)) for weight, *values in rows]
    weight = sum(row[0] for row in rows)
    return replace(arrival, weight=weight, values=weighted_means(each))
