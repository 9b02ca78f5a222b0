import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch

from ps_core.errors import MismatchError
from ps_core.exchange import Purpose
from ps_core.job import Job
from ps_core.optim_spec import OptimizerSpec
from ps_core.plan import ParameterSpec
from ps_server import shard
from ps_server.lead import Arrival, Factor, Lead, Membership, Met
from ps_server.lead import Effect as LeadEffect
from ps_server.shard import Duplicate, Release, Shard, Squares
from tests.ps_server.scenario import FOLDER, play

SCENARIOS = sorted(FOLDER.glob("shard_*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_scenario_comes_out_as_written(path: Path) -> None:
    text = path.read_text()
    assert play(text) == text


def test_every_rule_has_a_scenario() -> None:
    rules = re.findall(r"^(\d+)\. ", shard.__doc__ or "", flags=re.MULTILINE)
    assert {int(rule) for rule in rules} == {int(path.stem.split("_")[1]) for path in SCENARIOS}


def test_a_shard_refuses_a_job_whose_hyperparameters_torch_refuses() -> None:
    with pytest.raises(MismatchError, match="refuses its hyperparameters"):
        Shard(job_of(1, 1, OptimizerSpec("SGD", ({"lr": -1.0},))), 0)


# -- A whole job, in any order of events -----------------------------------------------------------
#
# Workers, two shards and the lead exchange messages over links that keep their order but take turns
# at random. Whatever the turns, the parameters must come out as plain arithmetic says.

NUM_SHARDS = 2
NUM_EPOCHS = 2
Turn = Callable[[], None]
Message = tuple[object, ...]
Answer = Met | Release


def job_of(num_workers: int, num_shards: int, optimizer: OptimizerSpec) -> Job:
    # Four parts of 128 elements, two on each of two shards.
    specs = [ParameterSpec(f"p{number}", torch.float32, (100,), 0) for number in range(4)]
    return Job(
        job_id="job",
        num_workers=num_workers,
        num_shards=num_shards,
        parameters=tuple(specs),
        part_bytes=512,
        bucket_bytes=2**20,
        optimizer=optimizer,
        mode="sync",
        deterministic=False,
    )


@dataclass(frozen=True)
class Batch:
    """What a worker does in one step: 0 samples, or a gradient whose elements are all `value`."""

    samples: int
    value: int


@dataclass
class Worker:
    """The other side of the protocol, as simple as it can be."""

    rank: int
    epochs: list[list[Batch]]
    """Its data: the batches of every pass."""
    step: int = 0
    epoch: int = 0
    waits_for: set[int] = field(default_factory=set)
    """Parts of the open step."""
    to_do: deque[Batch] = field(default_factory=deque)
    is_waiting: bool = False
    has_left: bool = False


class Fleet:
    """Everybody of one job, and the links between them."""

    def __init__(self, seed: int, max_grad_norm: float | None) -> None:
        self.chance = random.Random(seed)
        self.lr = 0.5
        num_workers = self.chance.randint(1, 4)
        spec = OptimizerSpec("SGD", ({"lr": self.lr},), max_grad_norm)
        self.job = job_of(num_workers, NUM_SHARDS, spec)
        self.shards = [Shard(self.job, index) for index in range(NUM_SHARDS)]
        self.lead = Lead(num_workers, frozenset(range(NUM_SHARDS)), max_grad_norm, deadline=1.0)
        self.workers = [Worker(rank, self._data()) for rank in range(num_workers)]
        self.to_shard: dict[tuple[int | str, int], deque[Message]] = {}
        self.to_worker: dict[tuple[int | str, int], deque[Answer]] = {}
        self.duplicates = 0
        for held in self.shards:
            for part in held.parts:
                held.load(part, torch.zeros(128))
        for worker in self.workers:
            self.lead.join(worker.rank, 1)

    def _data(self) -> list[list[Batch]]:
        """Passes of different lengths: some workers run out of data before others."""
        return [
            [
                Batch(self.chance.choice([0, 1, 1, 2, 5]), self.chance.randint(-8, 8))
                for _ in range(self.chance.randint(0, 4))
            ]
            for _ in range(NUM_EPOCHS)
        ]

    def run(self) -> None:
        """Let links and workers take turns until nothing is left to do."""
        for worker in self.workers:
            self._meet(worker)
        while turns := [*self._deliveries(), *self._moves()]:
            self.chance.choice(turns)()

    def _deliveries(self) -> Iterator[Turn]:
        for (_, index), orders in self.to_shard.items():
            if orders:
                yield partial(self._deliver_to_shard, index, orders)
        for (_, rank), answers in self.to_worker.items():
            if answers:
                yield partial(self._deliver_to_worker, self.workers[rank], answers)

    def _moves(self) -> Iterator[Turn]:
        for worker in self.workers:
            if not (worker.waits_for or worker.is_waiting or worker.has_left):
                yield partial(self._move, worker)

    def _move(self, worker: Worker) -> None:
        """A worker's training loop."""
        if worker.to_do:
            self._open_step(worker, worker.to_do.popleft())
        elif worker.epochs:
            if self.chance.random() < 0.5:
                self._obey(self.lead.idle(worker.rank))
            self._meet(worker)
        else:
            worker.has_left = True
            self._obey(self.lead.leave(worker.rank, ""))

    def _meet(self, worker: Worker) -> None:
        worker.is_waiting = True
        self._obey(self.lead.meet(worker.rank, Arrival(Purpose.EPOCH, worker.step)))

    def _open_step(self, worker: Worker, batch: Batch) -> None:
        worker.waits_for = {part.index for part in self.job.plan.parts}
        for index, held in enumerate(self.shards):
            link = self.to_shard.setdefault((worker.rank, index), deque())
            link.append(("begin", worker.rank, worker.step, worker.epoch, batch.samples))
            parts = list(held.parts) if batch.samples else []
            self.chance.shuffle(parts)
            repeated = [part for part in parts if self.chance.random() < 0.2]
            for part in parts + repeated:
                link.append(("push", worker.rank, worker.step, part, float(batch.value)))

    def _deliver_to_shard(self, index: int, link: deque[Message]) -> None:
        held = self.shards[index]
        match message := link.popleft():
            case ("begin", int(rank), int(step), int(epoch), int(samples)):
                effects = held.begin(rank, step, epoch, samples, ({"lr": self.lr},))
            case ("push", int(rank), int(step), int(part), float(value)):
                gradient = torch.zeros(128)
                gradient[:100] = value
                effects = held.push(rank, step, part, [True], gradient)
            case (Membership(epoch, members),):
                effects = held.set_membership(epoch, members)
            case (Factor(step, factor),):
                effects = held.apply_factor(step, factor)
            case _:
                raise AssertionError(message)
        for effect in effects:
            match effect:
                case Release(workers=workers):
                    for rank in workers:
                        self.to_worker.setdefault((index, rank), deque()).append(effect)
                case Squares(step, total):
                    self._obey(self.lead.squares(index, step, total))
                case Duplicate():
                    self.duplicates += 1
                case _:
                    raise AssertionError(effect)

    def _obey(self, effects: list[LeadEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Met):
                self.to_worker.setdefault(("lead", effect.worker), deque()).append(effect)
            elif isinstance(effect, Membership | Factor):
                for index in range(NUM_SHARDS):
                    self.to_shard.setdefault(("lead", index), deque()).append((effect,))

    def _deliver_to_worker(self, worker: Worker, link: deque[Answer]) -> None:
        answer = link.popleft()
        if isinstance(answer, Met):
            worker.step, worker.epoch, worker.is_waiting = answer.step, answer.epoch, False
            worker.to_do = deque(worker.epochs.pop(0))
        elif answer.version == worker.step + 1:
            worker.waits_for.discard(answer.part)
            if not worker.waits_for:
                worker.step += 1


def expected_values(
    epochs: list[list[list[Batch]]], lr: float, max_grad_norm: float | None
) -> tuple[int, float]:
    """Steps and the value of every element, from the data alone: `epochs[rank][pass][step]`."""
    steps, value = 0, 0.0
    for number in range(NUM_EPOCHS):
        for step in range(max(len(data[number]) for data in epochs)):
            batches = [data[number][step] for data in epochs if step < len(data[number])]
            samples = sum(batch.samples for batch in batches)
            if samples:
                mean = sum(batch.samples * batch.value for batch in batches) / samples
                norm = (4 * 100 * mean**2) ** 0.5
                value -= lr * mean * min(1.0, (max_grad_norm or 1e99) / (norm + 1e-6))
            steps += 1
    return steps, value


@pytest.mark.parametrize("max_grad_norm", [None, 30.0])
def test_whatever_the_order_of_events_the_parameters_are_those_of_the_data(
    max_grad_norm: float | None,
) -> None:
    duplicates = 0
    for seed in range(20):
        fleet = Fleet(seed, max_grad_norm)
        epochs = [[list(data) for data in worker.epochs] for worker in fleet.workers]
        fleet.run()
        assert fleet.lead.ended, f"seed {seed}: {fleet.workers}"
        steps, value = expected_values(epochs, fleet.lr, max_grad_norm)
        for held in fleet.shards:
            assert held.version == steps, f"seed {seed}"
            for state in held.parts.values():
                expected = torch.full((100,), value)
                torch.testing.assert_close(
                    state.parameters[:100], expected, rtol=1e-5, atol=1e-5, msg=f"seed {seed}"
                )
        duplicates += fleet.duplicates
    assert duplicates > 50
