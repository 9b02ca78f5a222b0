"""A whole elastic job without a network: the lead, shards, and workers that live and die.

Messages travel over links that keep their order and take turns at random. Shard 0 and the lead are
one process, as Node and Office have it; the workers do what ps_worker.exchange, shardline.loader
and shardline.attendance do. `Fleet.check` compares what has come of it with an account of its own.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

from ps_core.entries import Contribution, Entry
from ps_core.exchange import Arrival, Grant, Position, Purpose
from ps_core.job import Job
from ps_core.leases import Lease, PassSpec
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import ParameterSpec
from ps_core.point import BEGINNING, Point
from ps_core.settings import ConsistencyConfig
from ps_server import effects, orders
from ps_server.lead import Lead
from ps_server.part import PartState
from ps_server.policy import consistency_of
from ps_server.shard import Shard
from ps_server.terms import Begin, Member, Terms

NUM_SHARDS = 2
NUM_PARTS = 4
LENGTH = 64
AHEAD = 2
LR = 0.25

Key = tuple[int, int, int]
"""Rank, incarnation and step: whose contribution it is."""
Blocked = Callable[[], bool]
"""A worker that waits says when it can go on."""
Script = Generator[Blocked, None, None]
Turn = Callable[[], None]


# -- Messages --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Push:
    step: int
    part: int
    value: float


@dataclass(frozen=True)
class Fetch:
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """A numbered request to the lead."""

    number: int
    what: Arrival | PassSpec | None
    """None: the worker is idle."""
    returned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Return:
    """A numbered request as well: leases that the script has skipped."""

    number: int
    leases: tuple[int, ...]


Request = Begin | Push | Fetch | Ask | Return


@dataclass(frozen=True)
class Part:
    part: int
    version: int
    clock: int
    epoch: int
    value: float


@dataclass(frozen=True)
class Numbered:
    """An answer of the lead."""

    number: int
    answer: orders.Met | Grant


class Evicted:
    """The stream ends: the process is fenced."""


class Unreachable(Exception):
    """A shard cannot be reached any more, says the exchange in any wait of the script."""


Report = effects.Squares | effects.Ready | effects.Remains
"""What a shard tells the lead."""
Response = Part | Numbered | orders.Readmitted | Evicted


@dataclass
class Stream:
    """Of one process and one shard."""

    up: deque[Request] = field(default_factory=deque)
    down: deque[Response] = field(default_factory=deque)


# -- What really happens to parameters -------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """An update of one part, and what it was made of."""

    version: int
    """Before."""
    used: dict[Key, tuple[int, float]]
    """Whose → samples and gradient; 0 samples: it abstained."""
    members: frozenset[int]
    """Those that it had to wait for, by what the shard was told."""


class WatchedPart(PartState):
    """Keeps an account of what its updates are made of."""

    edge: Edge

    def watch(self, edge: Edge) -> None:
        self.edge = edge
        self.ranks: dict[int, Key] = {}
        """Who has contributed to the update in progress."""
        self.given: dict[Key, tuple[int, float]] = {}
        self.updates: list[Update] = []
        self.settled: set[Key] = set()
        """All whose step is over here: used, or abstained from."""

    def contribute(
        self,
        rank: int,
        weight: float,
        hyperparameters: Hyperparameters,
        present: Sequence[bool],
        gradient: torch.Tensor,
    ) -> None:
        self._note(rank, int(weight), float(gradient[0]))
        super().contribute(rank, weight, hyperparameters, present, gradient)

    def abstain(self, rank: int) -> None:
        self._note(rank, 0, 0.0)
        super().abstain(rank)

    def _note(self, rank: int, samples: int, gradient: float) -> None:
        key = self.edge.begun[rank]
        assert rank not in self.ranks, f"two contributions of {key} in one update"
        self.ranks[rank], self.given[key] = key, (samples, gradient)

    def drop_others(self, contributors: Collection[int]) -> int:
        for rank in self.ranks.keys() - set(contributors):
            del self.ranks[rank]
        return super().drop_others(contributors)

    def note_abstention(self, rank: int, step: int) -> None:
        super().note_abstention(rank, step)
        self._settle(self.ranks.pop(rank))

    def apply(self, step: int, factor: float = 1.0) -> None:
        used = {key: self.given[key] for key in self.ranks.values()}
        members = self.edge.expected_members(self.version)
        self.updates.append(Update(self.version, used, members))
        for key in used:
            self._settle(key)
        self.ranks.clear()
        super().apply(step, factor)

    def _settle(self, key: Key) -> None:
        assert key not in self.settled, f"part {self.part.index} uses {key} twice"
        self.settled.add(key)
        if all(key in part.settled for part in self.edge.parts.values()):
            self.edge.clocks[key[:2]] = key[2] + 1


# -- Workers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Habits:
    """What scripts do now and then; probabilities."""

    num_epochs: int = 2
    num_samples: int = 12
    batch_size: int = 2
    global_batch_size: int = 0
    abstain: float = 0.0
    skip: float = 0.0
    accumulate: float = 0.0
    break_off: float = 0.0


class Process:
    """One incarnation of a worker."""

    def __init__(self, fleet: Fleet, rank: int, incarnation: int) -> None:
        self.fleet, self.rank, self.incarnation = fleet, rank, incarnation
        self.chance, self.habits = fleet.chance, fleet.habits
        self.lockstep = fleet.policy.lockstep
        self.streams: list[Stream | None] = [None] * NUM_SHARDS
        self.is_alive, self.has_left, self.is_preempted = True, False, False
        self.refused_by: set[int] = set()
        """The shards that it cannot reach any more."""
        self.has_given_up = False
        """It has tried to reach one of them for long enough."""
        self.epoch = 0
        self.expected: dict[int, int] = {}
        self.marks: dict[int, int] = {}
        self.values = dict.fromkeys(range(NUM_PARTS), 0.0)
        self.versions = dict.fromkeys(range(NUM_PARTS), 0)
        self.met: orders.Met | None = None
        self.grants: deque[Grant] = deque()
        self.refused: orders.Readmitted | None = None
        self.sent: dict[int, list[Request]] = {}
        self.requests: dict[int, Ask | Return] = {}
        self.last_number = 0
        self.next_step = 0
        self.num_open = 0
        self.kept: deque[Grant] = deque()
        self.is_dry = False
        self.lease: Lease | None = None
        self.used: list[Lease] = []
        self.skipped: list[Lease] = []
        self.is_meeting = self.is_interrupted = False
        self.point = BEGINNING
        self.num_meetings = 0
        self.num_steps = 0
        self.script = self._run()
        self.blocked: Blocked = lambda: True

    def __repr__(self) -> str:
        return f"worker {self.rank}#{self.incarnation}"

    @property
    def can_go_on(self) -> bool:
        return self.is_alive and not self.has_left and (self.has_given_up or self.blocked())

    def go_on(self) -> None:
        """Run the script until it waits again."""
        try:
            if self.blocked():
                self.blocked = next(self.script)
            else:
                self.script.throw(Unreachable())
        except StopIteration:
            self.has_left = True
        except Unreachable:
            self.die()

    def give_up(self) -> None:
        self.has_given_up = True

    def die(self) -> None:
        self.is_alive = False
        self.script.close()

    # The exchange.

    def send(self, shard: int, message: Request) -> None:
        stream = self.streams[shard]
        if stream is not None:
            stream.up.append(message)

    def ask(self, what: Arrival | PassSpec | None, leases: Sequence[int] = ()) -> None:
        self.last_number += 1
        message: Ask | Return = Ask(self.last_number, what)
        if leases:
            message = Return(self.last_number, tuple(leases))
        self.requests[self.last_number] = message
        self.send(0, message)

    def reopened(self, shard: int) -> None:
        """What must be heard again on a stream that broke."""
        if shard == 0:
            for request in self.requests.values():
                self.send(0, request)
        here = [part for part in self.fleet.shards[shard].parts if self._may_want(part)]
        sent = self.sent.get(shard)
        if sent is None:
            if here:
                self.send(shard, Fetch(tuple(here)))
            return
        for message in sent:
            if not isinstance(message, Push) or message.part in self.expected:
                self.send(shard, message)

    def receive(self, response: Response) -> None:
        match response:
            case Part(part, version, clock, epoch, value):
                self.epoch = max(self.epoch, epoch)
                mark = clock or version if self.lockstep else clock
                if self._may_want(part) and mark >= self.expected.get(
                    part, self.marks.get(part, 0)
                ):
                    self.values[part], self.versions[part] = value, version
                    self.marks[part] = mark
                    self.expected.pop(part, None)
            case Numbered(number, answer) if number in self.requests:
                for old in [each for each in self.requests if each <= number]:
                    if old == number or not wants_answer(self.requests[old]):
                        del self.requests[old]
                if isinstance(answer, Grant):
                    self.grants.append(answer)
                else:
                    self._meet(answer)
            case orders.Readmitted():
                self.refused = response
            case Evicted():
                self.die()

    def _may_want(self, part: int) -> bool:
        """It is awaited; until a meeting is over a part that is here may still become newer."""
        return part in self.expected or (self.is_meeting and self.met is None)

    def _meet(self, met: orders.Met) -> None:
        self.met = met
        late = [part for part in range(NUM_PARTS) if self.marks.get(part, -1) < met.step]
        self.expected = dict.fromkeys(late, met.step) if met.refreshed else {}

    def wait_for_all(self, purpose: Purpose, *, takes_leases: bool = False) -> Script:
        self.marks, self.expected = {}, dict.fromkeys(range(NUM_PARTS), self.next_step)
        values = (1.0,) if purpose is Purpose.MEAN else ()
        self.num_meetings += purpose is Purpose.MEAN
        point = replace(self.point, count=self.num_meetings)
        self.ask(Arrival(purpose, self.next_step, values, 1.0, takes_leases, point))
        self.is_meeting = True
        yield lambda: self.met is not None or self.is_preempted
        self.is_meeting = False
        if self.met is None:
            yield from self.leave(preempted=True)
            return
        self.epoch = max(self.epoch, self.met.epoch)
        if self.met.refreshed:
            yield lambda: not self.expected
        self.next_step = self.met.step

    def meet(self, purpose: Purpose, *, takes_leases: bool = False) -> Script:
        """Afterwards `met` is what was said; None: the worker has left."""
        self.met = None
        yield from self.wait_for_all(purpose, takes_leases=takes_leases)

    def take_step(self, samples: int, leases: Sequence[Lease]) -> Script:
        step = self.next_step
        key = (self.rank, self.incarnation, step)
        ids = tuple(lease.id for lease in leases)
        self.fleet.note_step(key, samples, tuple(leases), self.versions, self.values)
        self.marks, self.expected = {}, dict.fromkeys(range(NUM_PARTS), step + 1)
        begin = Begin(step, self.epoch, samples, ({"lr": LR},), ids)
        self.sent = {shard: [begin] for shard in range(NUM_SHARDS)}
        for shard in range(NUM_SHARDS):
            self.send(shard, begin)
        for part in self.chance.sample(range(NUM_PARTS), NUM_PARTS) if samples else ():
            push = Push(step, part, gradient_of(leases, part))
            shard = self.fleet.home[part]
            self.sent[shard].append(push)
            self.send(shard, push)
        yield lambda: not self.expected
        self.sent = {}
        refused, self.refused = self.refused, None
        is_refused = refused is not None and refused.next_step > step
        self.next_step = min(self.marks.values()) if self.lockstep else step + 1
        self.num_steps += 1
        self.fleet.settled(self, key, is_refused)

    def leave(self, *, preempted: bool) -> Script:
        self.fleet.leave(self, preempted=preempted)
        self.has_left = True
        yield lambda: False

    # The script.

    def _run(self) -> Script:
        if self.fleet.lead.ended:
            return
        self.fleet.join(self)
        yield from self.meet(Purpose.START)
        assert self.met is not None or self.has_left
        there = self.met.position.point if self.met and self.met.position else BEGINNING
        yield from self._average()
        for epoch in range(there.data_epoch, self.habits.num_epochs):
            self.point, self.num_meetings = Point(1, epoch), 0
            yield from self._pass()
            if self.is_interrupted:
                yield from self.meet(Purpose.EPOCH)
                self.is_interrupted = False
            yield from self._average()
        self.point, self.num_meetings = Point(1, self.habits.num_epochs), 0
        yield from self.meet(Purpose.CLOSE)
        yield from self.leave(preempted=False)

    def _average(self) -> Script:
        yield from self.meet(Purpose.MEAN)
        assert self.met is not None
        assert self.met.means == (1.0,)

    def _pass(self) -> Script:
        try:
            yield from self._read()
        except Unreachable:
            if not self.is_preempted:
                self.ask(None)  # as when a loop is broken out of
            raise

    def _read(self) -> Script:
        grant: Grant | None = None
        stops_after = (
            self.chance.randint(1, 3) if self.chance.random() < self.habits.break_off else -1
        )
        while True:
            while self.num_open:
                yield from self._receive()
            self.kept.clear()
            self.is_dry = self.is_over = False
            if grant is not None:
                self.kept.append(grant)
            batches = self._batches(stops_after)
            yield from batches
            if self.is_interrupted:
                return
            if self.is_over:
                return
            self._return_skipped()
            yield from self.meet(Purpose.EPOCH, takes_leases=True)
            assert self.met is not None
            grant = self.met.grant
            if grant is None:
                return

    def _batches(self, stops_after: int) -> Script:
        count = 0
        while count != stops_after:
            if self.is_preempted:
                yield from self.leave(preempted=True)
            self.lease = None
            yield from self._take()
            if self.lease is None:
                self.skipped += self.used
                self.used = []
                return
            yield from self._use(self.lease)
            count += 1
        self.fleet.has_declined = True
        self.used, self.skipped = [], []
        self.ask(None)
        self.is_interrupted = True

    def _take(self) -> Script:
        """Leaves the next lease, if there is one, in `lease`."""
        while self.lease is None:
            while not self.is_dry and self.num_open + len(self.kept) < self.ahead:
                self.ask(self.spec)
                self.num_open += 1
            if not self.kept and not self.num_open:
                return
            if not self.kept:
                yield from self._receive()
            grant = self.kept.popleft()
            self.lease = grant.leases[0] if grant.leases else None
            self.is_dry |= not grant.leases
            self.is_over |= grant.is_over

    def _use(self, lease: Lease) -> Script:
        if self.chance.random() < self.habits.skip:
            self.fleet.has_declined = True
            self.skipped.append(lease)
            return
        self.used.append(lease)
        if self.chance.random() >= self.habits.accumulate:
            yield from self._step()

    @property
    def spec(self) -> PassSpec:
        habits = self.habits
        point = replace(self.point, count=1)
        size, total = habits.batch_size, habits.global_batch_size
        return PassSpec(habits.num_samples, size, total, point=point)

    @property
    def ahead(self) -> int:
        return 1 if self.habits.global_batch_size else AHEAD

    def _receive(self) -> Script:
        """Leaves the oldest grant at the end of `kept`."""
        yield lambda: bool(self.grants) or self.is_preempted
        if not self.grants:
            yield from self.leave(preempted=True)
        self.kept.append(self.grants.popleft())
        self.num_open -= 1

    def _return_skipped(self) -> None:
        if self.skipped:
            self.fleet.has_declined = True
            self.ask(None, [lease.id for lease in self.skipped])
            self.skipped = []

    def _step(self) -> Script:
        self._return_skipped()
        leases, self.used = self.used, []
        samples = sum(lease.length for lease in leases)
        abstains = self.chance.random() < self.habits.abstain
        yield from self.take_step(0 if abstains else samples, leases)


def wants_answer(request: Ask | Return) -> bool:
    return isinstance(request, Ask) and request.what is not None


def gradient_of(leases: Sequence[Lease], part: int) -> float:
    """The mean over the samples; a small whole number for each sample."""
    numbers = [
        sample_gradient(lease.number, position, part)
        for lease in leases
        for position in range(lease.start, lease.start + lease.length)
    ]
    return sum(numbers) / len(numbers)


def sample_gradient(number: int, position: int, part: int) -> int:
    """Of the sample at a position of a pass."""
    return random.Random(f"{number} {position} {part}").randint(-8, 8)


# -- Everybody -------------------------------------------------------------------------------------


@dataclass
class Peer:
    """A worker as a shard's edge knows it."""

    process: Process
    stream: Stream | None = None
    last_number: int = 0
    answers: dict[int, Numbered] = field(default_factory=dict)


class Edge:
    """What surrounds one shard: who is heard, and what it was told."""

    def __init__(self, job: Job, index: int) -> None:
        self.index = index
        self.shard = Shard(job, index)
        self.parts: dict[int, WatchedPart] = {}
        for number, state in self.shard.parts.items():
            watched = WatchedPart(state.part, job.optimizer, keep=state._keep)
            watched.watch(self)
            self.parts[number] = self.shard.parts[number] = watched
            self.shard.load(number, torch.zeros(LENGTH, dtype=torch.float64))
        self.peers: dict[int, Peer] = {}
        self.fenced: set[tuple[int, int]] = set()
        self.epoch = 0
        self.members: Mapping[int, Member] = {}
        self.said: dict[object, Report] = {}
        """What a shard other than the lead's says again when its stream breaks."""
        self.begun: dict[int, Key] = {}
        """Rank → the step whose begin it sent last."""
        self.clocks: dict[tuple[int, int], int] = {}
        """Rank and incarnation → the step after the last that this shard has in full."""

    def expected_members(self, version: int) -> frozenset[int]:
        return frozenset(r for r, m in self.members.items() if m.first_step <= version)

    def slowest(self) -> int | None:
        clocks = (
            max(member.first_step, self.clocks.get((rank, member.incarnation), 0))
            for rank, member in self.members.items()
        )
        return min(clocks, default=None)


class Fleet:
    """One job."""

    def __init__(
        self,
        seed: int,
        consistency: ConsistencyConfig,
        *,
        num_workers: int = 3,
        min_workers: int = 1,
        max_grad_norm: float | None = None,
        habits: Habits | None = None,
    ) -> None:
        self.chance = random.Random(seed)
        self.habits = habits or Habits()
        self.consistency, self.policy = consistency, consistency_of(consistency)
        self.max_grad_norm = max_grad_norm
        specs = [ParameterSpec(f"p{n}", torch.float64, (LENGTH,), 0) for n in range(NUM_PARTS)]
        self.job = Job(
            job_id="job",
            num_workers=num_workers,
            num_shards=NUM_SHARDS,
            parameters=tuple(specs),
            part_bytes=LENGTH * 8,
            bucket_bytes=LENGTH * 8,
            optimizer=OptimizerSpec("SGD", ({"lr": LR},), max_grad_norm),
            consistency=consistency,
        )
        assert len(self.job.plan.parts) == NUM_PARTS
        self.home = {part.index: part.shard for part in self.job.plan.parts}
        self.edges = [Edge(self.job, index) for index in range(NUM_SHARDS)]
        terms = Terms(num_workers, deadline=1e9, min_workers=min_workers)
        self.lead = Lead(terms, self.policy, frozenset(range(NUM_SHARDS)), max_grad_norm)
        self.processes: list[Process] = []
        self.entries: list[Entry] = []
        self.steps: dict[Key, tuple[int, tuple[Lease, ...]]] = {}
        self.held: dict[Key, dict[int, tuple[int, float]]] = {}
        """Versions and values of the parts from which a step was computed."""
        self.outcomes: dict[Key, bool] = {}
        """Whether a settled step was refused."""
        self.has_declined = False
        self.failure = ""
        self.todo: deque[orders.Effect] = deque()
        self.is_performing = False
        self.turn = 0
        self.withheld: list[effects.Release] = []
        self.orders: dict[object, orders.Effect] = {}
        self.control_is_open = True
        self.to_shard: deque[orders.Effect] = deque()
        self.to_lead: deque[Report] = deque()
        self.count = 0
        self.frozen: dict[object, int] = {}
        self.num_incarnations = 0
        self.num_duplicates = 0
        for rank in range(num_workers):
            self.spawn(rank)

    @property
    def shards(self) -> list[Shard]:
        return [edge.shard for edge in self.edges]

    # -- Turns -----------------------------------------------------------------------------------

    def turns(self) -> Iterator[tuple[object, Turn]]:
        """Everything that can happen next, other than faults, and at what."""
        for process in self.processes:
            if process.can_go_on:
                yield process, process.go_on
            if not process.is_alive and self._is_held_by(process):
                evict = partial(self.evict, process.rank, process.incarnation)
                yield (process, "is missed"), evict
            for shard, stream in enumerate(process.streams):
                yield from self._stream_turns(process, shard, stream)
        if not self.control_is_open:
            yield "control", self._reopen_control
        if self.to_shard:
            yield "to shard", lambda: self.order(1, self.to_shard.popleft())
        if self.to_lead:
            yield "to lead", lambda: self._hear(1, self.to_lead.popleft())

    def _stream_turns(
        self, process: Process, shard: int, stream: Stream | None
    ) -> Iterator[tuple[object, Turn]]:
        if shard in process.refused_by and process.is_alive and not process.has_left:
            if self._is_held_by(process):
                evict = partial(self.evict, process.rank, process.incarnation)
                yield (process, shard, "is lost"), evict
            if not process.has_given_up:
                yield (process, "gives up"), process.give_up
        elif stream is None and self._wants_stream(process, shard):
            yield (process, shard), partial(self._reopen, process, shard)
        if stream is not None and stream.up:
            yield (process, shard, "up"), partial(self._deliver_up, process, shard, stream)
        if stream is not None and stream.down and process.is_alive:
            yield (process, shard, "down"), partial(self._deliver_down, process, stream)

    def take_turn(self) -> bool:
        """One of them; False: there is none."""
        self.count += 1
        turns = list(self.turns())
        if not turns:
            return False
        quick = [turn for where, turn in turns if self.frozen.get(where, 0) <= self.count]
        self.chance.choice(quick or [turn for _, turn in turns])()
        return True

    def freeze(self, num_turns: int) -> None:
        """Somebody or some link is slow for a while."""
        where = self.chance.choice([where for where, _ in self.turns()] or [None])
        self.frozen[where] = self.count + num_turns

    def _wants_stream(self, process: Process, shard: int) -> bool:
        peer = self.edges[shard].peers.get(process.rank)
        joined = peer is not None and peer.process is process
        return joined and process.is_alive and not process.has_left

    def _is_held_by(self, process: Process) -> bool:
        return self.lead.crew.incarnation(process.rank) == process.incarnation

    def _deliver_up(self, process: Process, shard: int, stream: Stream) -> None:
        message, edge = stream.up.popleft(), self.edges[shard]
        peer = edge.peers.get(process.rank)
        if peer is None or peer.stream is not stream:
            return  # it was replaced, or is fenced
        held, rank = edge.shard, process.rank
        match message:
            case Begin():
                edge.begun[rank] = (rank, process.incarnation, message.step)
                todo = held.begin(rank, message)
                if shard == 0:
                    self.perform(self.lead.begin(rank, message, self._position(process, message)))
                self.act(shard, todo)
            case Push(step, part, value):
                gradient = torch.full((LENGTH,), value, dtype=torch.float64)
                assert edge.begun[rank][2] == step
                self.act(shard, held.push(rank, step, part, [True], gradient))
            case Fetch(parts):
                self.act(shard, held.fetch(rank, parts))
            case _:
                self._obey(peer, message)

    def _position(self, process: Process, begin: Begin) -> Position:
        return Position(process.point, (), begin.step, process.point)

    def _obey(self, peer: Peer, message: Ask | Return) -> None:
        if message.number <= peer.last_number:
            if message.number in peer.answers and peer.stream is not None:
                peer.stream.down.append(peer.answers[message.number])
            return
        peer.last_number, rank = message.number, peer.process.rank
        if isinstance(message, Return):
            self.perform(self.lead.give_back(rank, message.leases, declined=True))
            return
        match message.what:
            case None:
                self.perform(self.lead.idle(rank))
            case Arrival():
                self.perform(self.lead.meet(rank, message.what))
            case PassSpec():
                self._answer(rank, self.lead.request(rank, 0, message.what, {}))

    def _answer(self, rank: int, answer: orders.Met | Grant) -> None:
        peer = self.edges[0].peers[rank]
        numbered = peer.answers[peer.last_number] = Numbered(peer.last_number, answer)
        if peer.stream is not None:
            peer.stream.down.append(numbered)

    def _deliver_down(self, process: Process, stream: Stream) -> None:
        process.receive(stream.down.popleft())

    # -- Node and Office -------------------------------------------------------------------------

    def act(self, shard: int, todo: Sequence[effects.Effect]) -> None:
        """A shard's effects."""
        for effect in todo:
            match effect:
                case effects.Release():
                    self._check_gate(self.edges[shard], effect)
                    self._release(shard, effect)
                case effects.Squares() | effects.Remains():
                    self._report(shard, effect)
                case effects.Arrived(worker, step, version):
                    if shard == 0:
                        self.perform(self.lead.arrived(worker, step, version))
                    if self.policy.sealed:
                        self._report(shard, effects.Ready(worker, step))
                case effects.Late(worker, _) if shard == 0:
                    self.perform(self.lead.late(worker))
                case effects.Duplicate():
                    self.num_duplicates += 1

    def _check_gate(self, edge: Edge, release: effects.Release) -> None:
        """By clocks that are counted here."""
        slowest, bound = edge.slowest(), self.policy.bound
        if not self.policy.lockstep and bound is not None and slowest is not None:
            assert slowest >= release.clock - bound, f"{release} at {slowest}"

    def _release(self, shard: int, release: effects.Release) -> None:
        if shard == 0:
            if self.policy.lockstep and release.version > self.turn:
                self.turn = release.version
                self.perform(self.lead.take_turn(release.version))
            if self.lead.is_paused:
                self.withheld.append(release)
                return
        self._send(shard, release)

    def _send(self, shard: int, release: effects.Release) -> None:
        edge = self.edges[shard]
        value = float(edge.shard.parts[release.part].parameters[0])
        epoch = self.lead.epoch if shard == 0 else 0
        part = Part(release.part, release.version, release.clock, epoch, value)
        for rank in release.workers:
            peer = edge.peers[rank]
            if peer.stream and edge.shard.has_entered(rank, peer.process.incarnation):
                peer.stream.down.append(part)

    def _report(self, shard: int, message: Report) -> None:
        if shard == 0:
            self._hear(0, message)
            return
        edge = self.edges[shard]
        key: object = type(message)
        match message:
            case effects.Ready(worker, _):
                key = effects.Ready, worker
            case effects.Remains(worker, incarnation):
                key = effects.Remains, worker, incarnation
                edge.said.pop((effects.Ready, worker), None)
        edge.said[key] = message
        if self.control_is_open:
            self.to_lead.append(message)

    def _hear(self, shard: int, message: Report) -> None:
        match message:
            case effects.Squares(step, total):
                self.perform(self.lead.squares(shard, step, total))
            case effects.Ready(worker, step):
                self.perform(self.lead.ready(shard, worker, step))
            case effects.Remains():
                self.perform(self.lead.remains(shard, message))

    def perform(self, todo: Sequence[orders.Effect]) -> None:
        """The lead's effects, in order."""
        self.todo.extend(todo)
        if self.is_performing:
            return
        self.is_performing = True
        while self.todo:
            effect = self.todo.popleft()
            match effect:
                case orders.Met():
                    self._answer(effect.worker, effect)
                case orders.Readmitted():
                    stream = self.edges[0].peers[effect.worker].stream
                    if stream is not None:
                        stream.down.append(effect)
                case _:
                    key = effect.epoch if isinstance(effect, orders.Membership) else type(effect)
                    self.orders.pop(key, None)
                    self.orders[key] = effect
                    if self.control_is_open:
                        self.to_shard.append(effect)
                    self.order(0, effect)
        self.is_performing = False
        self.entries += self.lead.ledger.take_entries()
        if not self.lead.is_paused:
            withheld, self.withheld = self.withheld, []
            for release in withheld:
                self._send(0, release)

    def order(self, shard: int, order: orders.Effect) -> None:
        """The lead's word reaches a shard."""
        edge = self.edges[shard]
        match order:
            case orders.Membership(epoch, members, evicted):
                for rank, incarnation in evicted.items():
                    self._fence(edge, rank, incarnation)
                if epoch > edge.epoch:
                    assert epoch == edge.epoch + 1, "an epoch was left out"
                    edge.epoch, edge.members = epoch, members
                self.act(shard, edge.shard.set_membership(epoch, members, evicted))
            case orders.Factor(step, factor):
                self.act(shard, edge.shard.apply_factor(step, factor))
            case orders.Seal(step, contributors):
                self.act(shard, edge.shard.seal(step, contributors))
            case orders.Failed(reason):
                self.failure = reason

    @staticmethod
    def _fence(edge: Edge, rank: int, incarnation: int) -> None:
        edge.fenced.add((rank, incarnation))
        peer = edge.peers.get(rank)
        if peer is not None and peer.process.incarnation == incarnation and peer.stream is not None:
            peer.stream.down.append(Evicted())
            peer.stream = None

    # -- Workers come and go ---------------------------------------------------------------------

    def spawn(self, rank: int) -> Process:
        self.num_incarnations += 1
        process = Process(self, rank, self.num_incarnations)
        self.processes.append(process)
        return process

    def join(self, process: Process) -> None:
        rank, incarnation = process.rank, process.incarnation
        holder = self.lead.crew.incarnation(rank)
        if holder:
            self.evict(rank, holder)
        self.lead.join(rank, incarnation)
        for shard, edge in enumerate(self.edges):
            old = edge.peers.get(rank)
            if old is not None and old.stream is not None:
                old.stream.down.append(Evicted())
            stream = process.streams[shard] = Stream()
            edge.peers[rank] = Peer(process, stream)
            edge.shard.reopened(rank)

    def evict(self, rank: int, incarnation: int) -> None:
        self.perform(self.lead.evict(rank, incarnation, "stream", "it was lost"))

    def leave(self, process: Process, *, preempted: bool) -> None:
        """Over calls of its own, which may be faster than the streams."""
        if self._is_held_by(process):
            farewell: Literal["finished", "preempted"] = "preempted" if preempted else "finished"
            self.perform(self.lead.leave(process.rank, farewell))

    # -- Faults ----------------------------------------------------------------------------------

    def kill(self, process: Process) -> None:
        """What it had sent arrives, or a first part of it."""
        process.die()
        for stream in process.streams:
            if stream is not None:
                for _ in range(self.chance.randint(0, len(stream.up))):
                    stream.up.pop()

    def break_stream(self, process: Process, shard: int) -> None:
        """What is on its way is lost."""
        peer = self.edges[shard].peers.get(process.rank)
        if peer is not None and peer.process is process:
            peer.stream = None
            process.streams[shard] = None

    def cut_off(self, process: Process, shard: int, num_turns: int) -> None:
        """The shard refuses the worker from now on. One of them will count the other as lost, and
        not before about so many turns.
        """
        self.break_stream(process, shard)
        process.refused_by.add(shard)
        for where in ((process, shard, "is lost"), (process, "gives up")):
            self.frozen[where] = self.count + self.chance.randint(num_turns // 2, num_turns)

    def _reopen(self, process: Process, shard: int) -> None:
        edge = self.edges[shard]
        if (process.rank, process.incarnation) in edge.fenced:
            process.die()
            return
        process.streams[shard] = edge.peers[process.rank].stream = Stream()
        edge.shard.reopened(process.rank)
        process.reopened(shard)

    def break_control(self) -> None:
        self.control_is_open = False
        self.to_shard.clear()
        self.to_lead.clear()

    def _reopen_control(self) -> None:
        self.control_is_open = True
        known = self.edges[1].epoch
        for order in self.orders.values():
            if not isinstance(order, orders.Membership) or order.epoch > known:
                self.to_shard.append(order)
        self.to_lead.extend(self.edges[1].said.values())

    # -- The account -----------------------------------------------------------------------------

    def note_step(
        self,
        key: Key,
        samples: int,
        leases: tuple[Lease, ...],
        versions: Mapping[int, int],
        values: Mapping[int, float],
    ) -> None:
        assert key not in self.steps, f"{key} is begun twice"
        self.steps[key] = samples, leases
        self.held[key] = {part: (versions[part], values[part]) for part in versions}

    def settled(self, process: Process, key: Key, is_refused: bool) -> None:
        self.outcomes[key] = is_refused

    @property
    def contributions(self) -> list[Contribution]:
        return [entry for entry in self.entries if isinstance(entry, Contribution)]
