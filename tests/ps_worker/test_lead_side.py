"""The stages of a replica, in threads, before a lead that the test plays."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast

import pytest

from ps_core.errors import JobFailedError
from ps_core.exchange import Arrival, Purpose
from ps_core.leases import PassSpec
from ps_core.v1.shard_pb2 import ExchangeRequest, JobSpec, Lease, Leases, Met
from ps_worker.client import ShardClient
from ps_worker.inbox import Inbox
from ps_worker.lead_side import DirectLead, LeadSide, SharedLead

PATIENCE_SECONDS = 60.0
NUM_STAGES = 3
T = TypeVar("T")


@dataclass
class Client:
    """Notes what the lead is told."""

    gives_initial_values: bool = True
    requests: list[ExchangeRequest] = field(default_factory=list)
    joined: list[JobSpec] = field(default_factory=list)

    def join(self, job: JobSpec) -> bool:
        self.joined.append(job)
        return self.gives_initial_values

    def request(self, message: ExchangeRequest) -> None:
        self.requests.append(message)


class Room:
    """Where the stages of a replica meet."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(NUM_STAGES, timeout=PATIENCE_SECONDS)
        self.said: list[bytes] = [b""] * NUM_STAGES
        self.rows: list[list[float]] = [[]] * NUM_STAGES
        self.num_shared = 0
        self.changed = threading.Condition()


class Stage:
    """One of them. Implements Replica."""

    def __init__(self, room: Room, stage: int) -> None:
        self.stage, self.num_stages = stage, NUM_STAGES
        self._room = room

    def share(self, data: bytes) -> bytes:
        room = self._room
        room.said[self.stage] = data
        room.barrier.wait()
        said = room.said[0]
        if room.barrier.wait() == 0:
            with room.changed:
                room.num_shared += 1
                room.changed.notify_all()
        return said

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        self._room.rows[self.stage] = list(numbers)
        self._room.barrier.wait()
        rows = list(self._room.rows)
        self._room.barrier.wait()
        return rows


@dataclass
class Given:
    """A replica whose first stage speaks to `client`."""

    client: Client
    room: Room
    inboxes: list[Inbox]
    leads: list[SharedLead]
    threads: ThreadPoolExecutor

    def all_do(self, act: Callable[[int], T]) -> list[T]:
        """What each stage's call returns, when all are made at once."""
        futures = [self.threads.submit(act, stage) for stage in range(NUM_STAGES)]
        return [future.result(PATIENCE_SECONDS) for future in futures]


@pytest.fixture
def given() -> Iterator[Given]:
    client, room = Client(), Room()
    inboxes = [Inbox() for _ in range(NUM_STAGES)]
    direct = DirectLead(cast(ShardClient, client), inboxes[0])
    leads = [
        SharedLead(None if stage else direct, Stage(room, stage), inboxes[stage])
        for stage in range(NUM_STAGES)
    ]
    with ThreadPoolExecutor(NUM_STAGES + 1) as threads:
        yield Given(client, room, inboxes, leads, threads)


def arrive(given: Given, stage: int, value: float, weight: float) -> Met:
    return given.leads[stage].meet(Arrival(Purpose.MEAN, 7, (value,), weight))


@pytest.mark.parametrize("first", [True, False])
def test_all_stages_learn_whether_the_replicas_initial_values_count(
    given: Given, first: bool
) -> None:
    given.client.gives_initial_values = first
    assert given.all_do(lambda stage: given.leads[stage].join(JobSpec())) == [first] * NUM_STAGES
    assert len(given.client.joined) == 1


def test_a_replica_comes_to_a_meeting_once_with_the_weighted_mean_of_its_stages(
    given: Given,
) -> None:
    met = Met(step=7, means=[0.25], chosen=True)
    given.inboxes[0].met(met)
    values, weights = (3.0, math.nan, 6.0), (1.0, 0.0, 2.0)
    results = given.all_do(lambda stage: arrive(given, stage, values[stage], weights[stage]))
    assert results == [met] * NUM_STAGES
    [request] = given.client.requests
    assert (list(request.meet.values), request.meet.weight) == ([5.0], 3.0)
    assert request.meet.step == 7


def test_numbers_that_no_stage_has_weigh_nothing(given: Given) -> None:
    given.inboxes[0].met(Met(step=7))
    given.all_do(lambda stage: arrive(given, stage, 1.0, 0.0))
    [request] = given.client.requests
    assert request.meet.weight == 0


def test_stages_wait_for_the_lead_as_long_as_the_first_one_shows_that_it_waits(
    given: Given,
) -> None:
    def answer() -> None:
        room = given.room
        with room.changed:  # the others' waits are bounded: they have to hear something
            assert room.changed.wait_for(lambda: room.num_shared >= 3, PATIENCE_SECONDS)
        given.inboxes[0].met(Met(step=9))

    answered = given.threads.submit(answer)
    results = given.all_do(lambda stage: arrive(given, stage, 0.0, 1.0))
    answered.result(PATIENCE_SECONDS)
    assert [met.step for met in results] == [9] * NUM_STAGES


def test_the_first_stage_raises_why_the_lead_does_not_answer(given: Given) -> None:
    given.inboxes[0].fail(0, JobFailedError("worker 5 has failed"))

    def meet(stage: int) -> str:
        if stage:  # as the others, which notice that the first one is gone
            given.leads[stage]._replica.gather([0.0, 1.0])
            return ""
        with pytest.raises(JobFailedError) as caught:
            arrive(given, stage, 0.0, 1.0)
        return str(caught.value)

    assert given.all_do(meet)[0] == "worker 5 has failed"


def test_all_stages_read_the_samples_that_the_first_one_was_granted(given: Given) -> None:
    leases = Leases(loader=2, leases=[Lease(id=3, start=8, length=4)])
    given.inboxes[0].granted(leases)
    spec = PassSpec(40, batch_size=4)

    def read(stage: int) -> Leases:
        given.leads[stage].request_lease(2, spec)
        granted = given.leads[stage].receive_lease()
        given.leads[stage].return_leases([3], declined=True)
        given.leads[stage].idle()
        return granted

    assert given.all_do(read) == [leases] * NUM_STAGES
    asked, returned, idle = given.client.requests
    assert (asked.lease.loader, list(returned.lease.returned)) == (2, [3])
    assert returned.lease.declined
    assert idle.HasField("idle")


def test_all_stages_take_their_next_step_in_the_newest_epoch_that_one_has_heard_of(
    given: Given,
) -> None:
    epochs = (5, 4, 4)
    assert given.all_do(lambda stage: given.leads[stage].settled(epochs[stage])) == [5, 5, 5]
    assert not given.client.requests


def test_a_replica_finishes_when_all_of_its_stages_have(given: Given) -> None:
    finished: list[int] = []

    def finish(stage: int) -> int:
        if stage == NUM_STAGES - 1:
            assert not finished
        given.leads[stage].finish()
        finished.append(stage)
        return stage

    assert sorted(given.all_do(finish)) == [0, 1, 2]


def test_without_stages_a_worker_speaks_for_itself() -> None:
    client, inbox = Client(), Inbox()
    lead: LeadSide = DirectLead(cast(ShardClient, client), inbox)
    assert lead.join(JobSpec(job_id="job"))
    inbox.met(Met(step=2))
    assert lead.meet(Arrival(Purpose.EPOCH, 1)) == Met(step=2)
    inbox.granted(Leases(loader=1))
    assert lead.receive_lease() == Leases(loader=1)
    assert lead.settled(6) == 6
    lead.finish()
    calls = [
        partial(lead.idle),
        partial(lead.request_lease, 0, PassSpec(4, batch_size=1)),
        partial(lead.return_leases, [1], declined=False),
    ]
    for call in calls:
        call()
    kinds = [request.WhichOneof("message") for request in client.requests]
    assert kinds == ["meet", "idle", "lease", "lease"]
