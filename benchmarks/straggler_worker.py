"""What one worker of benchmarks/stragglers.py does, in a process of its own.

The same loops train over shards and over Gloo; `Team` is what differs.
"""

import contextlib
import itertools
import logging
import random
import runpy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ps_core.optimizer import ExchangeOptimizer
from ps_core.settings import Config
from shardline.session import Session

NUM_LAYERS = 4
DIGITS = Path(__file__).parent.parent / "examples" / "digits.py"
Pause = tuple[float, float]  # from, to: in seconds since the start


class Job(NamedTuple):
    config: Config  # of every worker, but for the rank
    gloo_port: int  # 0: the workers share parameters through shards
    start_seconds: float  # for all workers to find each other


class Team(Protocol):
    """The workers of a job, as one of them sees them."""

    model: nn.Module
    num_round_steps: int
    """How many steps it takes from one exchange to the next."""

    def step(self, samples: int) -> None:
        """Use the gradients of the model, which are dropped afterwards."""

    def next_step(self) -> int:
        """As the lead counts steps."""

    def meet(self) -> None:
        """Wait for all others."""

    def all_stop(self, wants: bool) -> bool:
        """After a round: whether this worker takes no further step. Those who must take equal
        numbers of steps stop when one of them wants to.
        """


class ShardlineTeam:
    """A worker that stops is not waited for, so each stops when it wants to."""

    def __init__(
        self, session: Session, optimizer: ExchangeOptimizer, model: nn.Module, num_round_steps: int
    ) -> None:
        self.model, self.num_round_steps = model, num_round_steps
        self._session, self._optimizer = session, optimizer

    def step(self, samples: int) -> None:
        self._optimizer.step(samples=samples)
        self._optimizer.zero_grad()

    def next_step(self) -> int:
        return self._optimizer.next_step

    def meet(self) -> None:
        self._session.mean(0.0)

    def all_stop(self, wants: bool) -> bool:
        return wants


class GlooTeam:
    """DistributedDataParallel, which exchanges during the backward pass."""

    num_round_steps = 1

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model: nn.Module = DistributedDataParallel(model)
        self._optimizer, self._num_steps = optimizer, 0

    def step(self, samples: int) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._num_steps += 1

    def next_step(self) -> int:
        return self._num_steps

    def meet(self) -> None:
        torch.distributed.barrier()

    def all_stop(self, wants: bool) -> bool:
        flag = torch.tensor(float(wants))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)


@contextlib.contextmanager
def in_team(
    job: Job, rank: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[Team]:
    """Join the job with a model that it does not know yet. All workers leave together."""
    logging.disable(logging.WARNING)  # workers may be there before the shards
    cluster, consistency = job.config.cluster, job.config.consistency
    if job.gloo_port:
        url, limit = f"tcp://127.0.0.1:{job.gloo_port}", timedelta(seconds=job.start_seconds)
        torch.distributed.init_process_group("gloo", url, limit, cluster.num_workers, rank)
        yield GlooTeam(model, optimizer)
        torch.distributed.barrier()
        return  # the group ends with the process: to destroy it under a DDP model can hang
    num_round_steps = consistency.local_steps if consistency.mode == "local" else 1
    try:
        with Session(replace(job.config, cluster=replace(cluster, rank=rank))) as session:
            shared = session.optimizer(optimizer, model)
            yield ShardlineTeam(session, shared, model, num_round_steps)
    except SystemExit as error:  # which would end the process and leave the pool waiting for it
        raise RuntimeError(f"worker {rank} has failed, with exit code {error.code}") from error


# -- How fast --------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One scenario, as it is for one worker."""

    step_seconds: float  # of computing
    pauses: tuple[Pause, ...]  # in order
    lead_seconds: float  # before it counts
    seconds: float  # that count


class Taken(NamedTuple):
    """What one worker did in the time that counts: from the end of one round to that of another."""

    seconds: float
    num_steps: int
    steps: tuple[int, int]  # first one, and the one after the last, as the lead counts


def busy_until(start: float, seconds: float, pauses: Sequence[Pause]) -> float:
    """When `seconds` of work are done that begin at `start`, if nothing is done in the pauses."""
    now = start
    for begin, end in pauses:
        if begin >= now + seconds:
            break
        seconds -= max(0.0, begin - now)
        now = max(now, end)
    return now + seconds


def compute(start: float, cell: Cell) -> None:
    """Sleep for as long as a step takes now, in a scenario that began at `start`."""
    now = time.monotonic()
    end = start + busy_until(now - start, cell.step_seconds, cell.pauses)
    time.sleep(end - now)


def run_cell(team: Team, cell: Cell, inputs: Tensor) -> Taken:
    """A scenario, from the moment when all workers are ready."""
    team.meet()
    start = time.monotonic()
    begin = None if cell.lead_seconds else (start, 0, team.next_step())
    for num_steps in itertools.count(1):
        compute(start, cell)
        team.model(inputs).square().mean().backward()
        team.step(len(inputs))
        if num_steps % team.num_round_steps:
            continue
        end = time.monotonic(), num_steps, team.next_step()
        is_over = begin is not None and end[0] - begin[0] >= cell.seconds
        if begin is None and end[0] - start >= cell.lead_seconds:
            begin = end
        if team.all_stop(is_over):
            break
    assert begin is not None
    return Taken(end[0] - begin[0], num_steps - begin[1], (begin[2], end[2]))


def run_cells(job: Job, rank: int, cells: Sequence[Cell], width: int, samples: int) -> list[Taken]:
    """All scenarios, one after the other. The first is there to warm up."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(NUM_LAYERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.randn(samples, width)
    with in_team(job, rank, model, optimizer) as team:
        return [run_cell(team, cell, inputs) for cell in cells]


# -- How soon --------------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """Reading digits up to an accuracy on those held out."""

    lr: float
    batch_size: int  # per worker
    accuracy: float
    num_eval_steps: int  # from one evaluation to the next
    limit_seconds: float
    seed: int


class Learned(NamedTuple):
    """How far worker 0 came."""

    accuracy: float
    seconds: float  # of training, without its own evaluations
    num_steps: int  # its own


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, then those held out: as in examples/digits.py."""
    from sklearn import datasets, model_selection  # the other loop does without

    pixels, digits = datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digits)
    train, test = model_selection.train_test_split(
        range(len(images)), test_size=0.2, stratify=digits, random_state=0
    )
    return images[train], labels[train], images[test], labels[test]


def learn(job: Job, rank: int, lesson: Lesson) -> Learned:
    """Train until worker 0 is accurate enough, or the time is up."""
    example = runpy.run_path(str(DIGITS))
    images, labels, *held_out = load_digits()
    torch.manual_seed(lesson.seed)
    model = example["cnn"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lesson.lr)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    loss_fn(model(images[: lesson.batch_size]), labels[: lesson.batch_size]).backward()  # warm up
    optimizer.zero_grad()
    draw, everything = random.Random(f"{lesson.seed} {rank}"), range(len(images))

    def read_batch(team: Team) -> None:
        batch = draw.sample(everything, lesson.batch_size)
        loss_fn(team.model(images[batch]), labels[batch]).backward()

    def evaluate() -> float:
        return float(example["accuracy"](model, *held_out)) if rank == 0 else 0.0

    reached = Path(job.config.job.run_dir, "reached")
    with in_team(job, rank, model, optimizer) as team:
        return learn_together(team, lesson, reached, read_batch, evaluate)


def learn_together(
    team: Team,
    lesson: Lesson,
    reached: Path,
    read_batch: Callable[[Team], None],
    evaluate: Callable[[], float],
) -> Learned:
    """The training loop. The clock stands still while this worker evaluates. Worker 0 makes the
    file `reached` once it is accurate enough.
    """
    team.meet()
    start, accuracy = time.monotonic(), 0.0
    for num_steps in itertools.count(1):
        read_batch(team)
        team.step(lesson.batch_size)
        if num_steps % team.num_round_steps:
            continue
        now = time.monotonic()
        if num_steps % max(lesson.num_eval_steps, team.num_round_steps) == 0:
            accuracy = evaluate()
        seconds = now - start
        start += time.monotonic() - now
        if accuracy >= lesson.accuracy:
            reached.touch()
        if team.all_stop(reached.exists() or seconds >= lesson.limit_seconds):
            break
    return Learned(accuracy, seconds, num_steps)
