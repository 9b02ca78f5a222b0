"""The lead's office without a network: what it was asked, and all that it has done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ps_core.exchange import Arrival, Purpose
from ps_core.job import Job
from ps_core.optim_spec import OptimizerSpec
from ps_core.plan import ParameterSpec
from ps_core.settings import ClusterConfig, Config, ConsistencyConfig, MembershipConfig
from ps_core.v1 import lead_pb2, shard_pb2
from ps_server.control import Order
from ps_server.office import Office
from ps_server.orders import Met, Readmitted
from ps_server.outbox import Outbox
from ps_server.terms import Begin

JOB = Job(
    job_id="shardline",
    num_workers=2,
    num_shards=2,
    parameters=(ParameterSpec("weight", torch.float32, (8, 64), 0),),
    part_bytes=512,
    bucket_bytes=2**20,
    optimizer=OptimizerSpec("SGD", ({"lr": 0.1},)),
    consistency=ConsistencyConfig(),
)
CONFIG = Config(
    cluster=ClusterConfig(shards=("a:1", "b:2"), num_workers=2, max_workers=4),
    membership=MembershipConfig(heartbeat_deadline_seconds=2.0),
)
OWN = 99
"""The lead's incarnation."""


@dataclass
class Desk:
    """An office and all that it has done."""

    config: Config = CONFIG
    job: Job = JOB
    orders: list[Order] = field(default_factory=list)
    answers: list[Met | Readmitted] = field(default_factory=list)
    num_resumed: int = 0

    def __post_init__(self) -> None:
        self.office = Office(OWN, self.config, self.orders.append, self.answers.append, self.resume)

    def resume(self) -> None:
        self.num_resumed += 1

    def join(self, worker: int, incarnation: int = 0, *, alive: bool = False) -> bool:
        return self.office.join(self.job, worker, incarnation or 10 + worker, holder_alive=alive)

    def start(self, workers: int = 2) -> None:
        """All join and meet."""
        for worker in range(workers):
            self.join(worker)
        for worker in range(workers):
            self.office.meet(worker, Arrival(Purpose.START, 0))
        assert [met.worker for met in self.answers] == list(range(workers))

    def open_shard(self, incarnation: int = 55, *, epoch: int = 0) -> Outbox:
        """Shard 1's control stream, as it is opened."""
        hello = lead_pb2.ShardHello(shard=1, incarnation=incarnation, epoch=epoch)
        return self.office.open_control(hello)

    def begin(self, worker: int, step: int, **fields: Any) -> None:  # noqa: ANN401 - of any type
        message = shard_pb2.Begin(step=step, samples=8, **fields)
        begin = Begin(step, self.office.epoch, 8, (), tuple(message.leases))
        self.office.begin(worker, begin, message)

    def tick_until(self, end: float, beats: Callable[[], None] = lambda: None) -> None:
        """Let time pass as a shard does, four times a second."""
        now = time.monotonic()
        while now < end:
            now += 0.25
            beats()
            self.office.tick(now)
