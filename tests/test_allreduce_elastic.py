"""`shardline run --strategy allreduce` and torchrun with workers that are killed, stopped and told
to go, judged by what the script itself writes down: which samples it has put into which update.

The parameters are computed here once more, from these files alone.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM, Signals
from typing import Any, Final

import pytest
import torch

from allreduce.store import Keeper
from ps_core.listening import listen
from tests.allreduce.together import wait_until
from tests.processes import Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

NUM_SAMPLES: Final = 48
BATCH_SIZE: Final = 4
NUM_FEATURES: Final = 6
LEARNING_RATE: Final = 0.02
SETTINGS: Final = {"worker.device": "cpu", "worker.threads": 1, "metrics.port": -1}
SCRIPT: Final = f"""
import json
import os
import sys
import time
from pathlib import Path

import torch
import shardline

for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
    method.__wrapped__.__dynamo_disable = method.__wrapped__  # imports torch's compiler otherwise

folder, make = Path(sys.argv[1]), getattr(torch.optim, sys.argv[2])
attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
numbers = torch.tensor(json.loads((folder / "numbers.json").read_text()), dtype=torch.float64)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(numbers)

    def __getitem__(self, index):
        return numbers[index], index


torch.manual_seed(5)
model = torch.nn.Linear({NUM_FEATURES}, 1, dtype=torch.float64)
with shardline.connect() as session:
    name = f"steps-{{attempt}}-{{session.rank}}-{{os.getpid()}}.jsonl"
    log = (folder / name).open("w", buffering=1)

    def write(kind, epoch=-1, indices=()):
        values = [p.detach().flatten().tolist() for p in model.parameters()]
        line = dict(kind=kind, version=optimizer.next_step, epoch=epoch, indices=indices)
        log.write(json.dumps(dict(values=sum(values, []), **line)) + "\\n")

    torch.nn.init.constant_(model.weight, session.rank + 1.0)  # those of worker 0 count
    optimizer = session.optimizer(make(model.parameters(), lr={LEARNING_RATE}), model)
    settle, outcomes = session.exchange.settle, []
    session.exchange.settle = lambda step: outcomes.append(settle(step)) or outcomes[-1]
    write("start")
    loader = session.loader(Rows(), batch_size={BATCH_SIZE})
    for epoch in session.epochs(100_000):
        if session.mean(float((folder / "stop").exists())) > 0:
            break
        for rows, indices in loader:
            loss = torch.nn.functional.mse_loss(model(rows[:, :-1]), rows[:, -1:])
            loss.backward()
            write("begin", epoch, indices.tolist())
            optimizer.step()
            optimizer.zero_grad()
            write("done", epoch, indices.tolist() if outcomes.pop().applied else [])
            time.sleep(0.01)
    loss = torch.nn.functional.mse_loss(model(numbers[:, :-1]), numbers[:, -1:]).item()
    session.report(loss=loss)
write("end")
"""


@pytest.fixture(autouse=True)
def impatient_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's store looks up the name of every peer, see tests/allreduce/conftest.py."""
    monkeypatch.setenv("RES_OPTIONS", "timeout:1")


def numbers() -> torch.Tensor:
    """A sum, and noise, so that no update is without effect: a column for each feature, and one to
    be found out.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_SAMPLES, NUM_FEATURES + 1, generator=generator, dtype=torch.float64)
    return torch.cat([x[:, :-1], x[:, :-1].sum(1, keepdim=True) + 0.5 * x[:, -1:]], dim=1)


# -- What became of the samples --------------------------------------------------------------------


@dataclass(slots=True)
class History:
    """What one process has written down."""

    rank: int
    pid: int
    lines: list[dict[str, Any]]

    @property
    def has_ended(self) -> bool:
        return bool(self.lines[-1]["kind"] == "end")

    @property
    def done(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == "done"]

    @property
    def starts(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == "start"]

    @property
    def in_progress(self) -> dict[str, Any] | None:
        """The step of which it does not say what became."""
        return self.lines[-1] if self.lines[-1]["kind"] == "begin" else None


def histories(folder: Path, attempt: int = 0) -> list[History]:
    """Of all processes, which may still write theirs."""
    found = []
    for path in sorted(folder.glob(f"steps-{attempt}-*.jsonl")):
        _, _, rank, pid = path.stem.split("-")
        whole, _, _ = path.read_text().rpartition("\n")
        if whole:
            lines = [json.loads(line) for line in whole.splitlines()]
            found.append(History(int(rank), int(pid), lines))
    return found


@dataclass(slots=True)
class Account:
    """Version → the samples behind the update that led to it, as it follows from all histories."""

    updates: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    values: dict[int, list[float]] = field(default_factory=dict)

    def put(self, line: Mapping[str, Any], version: int) -> None:
        self.updates[version] += line["indices"]


def account(crew: list[History], dead: set[int], *, is_complete: bool = True) -> Account:
    """Every sample of every pass was in exactly one update; if the job is not complete, those of
    the last pass in at most one. A process in `dead` had no time to say what became of its last
    batch, or nobody has heard of it: it was in an update exactly if the others have not been given
    its samples again.
    """
    made = Account()
    given: dict[int, Counter[int]] = defaultdict(Counter)
    uncertain: list[tuple[dict[str, Any], int]] = []
    for each in crew:
        done = each.done
        if each.pid in dead and done:
            uncertain.append((done[-1], done[-1]["version"]))
            done = done[:-1]
        if each.in_progress is not None:
            assert each.pid in dead, f"worker {each.rank} ended in the middle of a step"
            uncertain.append((each.in_progress, each.in_progress["version"] + 1))
        for line in done:
            given[line["epoch"]].update(line["indices"])
            made.put(line, line["version"])
    for line, version in uncertain:
        counts, indices = given[line["epoch"]], line["indices"]
        again = [index for index in indices if counts[index]]
        assert len(again) in (0, len(indices)), "a batch is given again as a whole, or not at all"
        if not again:
            counts.update(indices)
            made.put(line, version)
    last, once = max(given), Counter(range(NUM_SAMPLES))
    for epoch in range(last + 1):
        is_over = epoch < last or is_complete
        assert given[epoch] == once if is_over else given[epoch] <= once, f"pass {epoch}"
    for each in crew:
        said = each.done[:-1] if each.pid in dead else each.done
        for line in [*each.starts, *said]:
            known = made.values.setdefault(line["version"], line["values"])
            assert known == line["values"], f"worker {each.rank} is elsewhere"
    return made


def check_values(made: Account, optimizer: str, tolerance: float = 1e-9) -> None:
    """What plain torch comes to with the same samples in the same updates."""
    rows = numbers()
    model = torch.nn.Linear(NUM_FEATURES, 1, dtype=torch.float64)
    torch.nn.utils.vector_to_parameters(
        torch.tensor(made.values[0], dtype=torch.float64), model.parameters()
    )
    plain: torch.optim.Optimizer = getattr(torch.optim, optimizer)(
        model.parameters(), lr=LEARNING_RATE
    )
    for version in range(1, max(made.values) + 1):
        if made.updates[version]:
            batch = rows[made.updates[version]]
            plain.zero_grad()
            torch.nn.functional.mse_loss(model(batch[:, :-1]), batch[:, -1:]).backward()
            plain.step()
        if version in made.values:
            own = torch.nn.utils.parameters_to_vector(model.parameters())
            difference = (own - torch.tensor(made.values[version], dtype=torch.float64)).abs().max()
            assert difference < tolerance, f"version {version}"


# -- Runs ------------------------------------------------------------------------------------------


class Run:
    """A job whose workers run the script in a folder of their own, until told to stop."""

    def __init__(self, folder: Path, program: list[str], optimizer: str = "SGD") -> None:
        self.folder = folder
        self._hit: set[int] = set()
        (folder / "train.py").write_text(SCRIPT)
        (folder / "numbers.json").write_text(json.dumps(numbers().tolist()))
        arguments = [*program, str(folder / "train.py"), str(folder), optimizer]
        self.launcher = Process(program[1], arguments, SETTINGS)

    def wait_for_steps(self, rank: int, count: int = 3, attempt: int = 0) -> int:
        """Wait until the newest process of a rank has taken some steps; its pid."""
        found: list[int] = []

        def has_come() -> bool:
            assert self.launcher.is_running, self.launcher.tail()
            found[:] = [
                pid
                for path in self.folder.glob(f"steps-{attempt}-{rank}-*.jsonl")
                if (pid := int(path.stem.rpartition("-")[2])) not in self._hit
                and path.read_bytes().count(b"done") >= count
            ]
            return bool(found)

        wait_until(has_come, f"worker {rank} trains")
        return found[-1]

    def num_steps(self, rank: int, pid: int) -> int:
        """How many a process has taken."""
        return (self.folder / f"steps-0-{rank}-{pid}.jsonl").read_bytes().count(b"done")

    def hit(self, rank: int, number: Signals) -> int:
        """Send a worker a signal in the middle of its training; its pid."""
        pid = self.wait_for_steps(rank)
        os.kill(pid, number)
        self._hit.add(pid)
        return pid

    def stop(self) -> None:
        """Let the script end."""
        (self.folder / "stop").touch()


@contextmanager
def running(folder: Path, *options: str, optimizer: str = "SGD") -> Iterator[Run]:
    """`shardline run`."""
    program = ["-m", "shardline", "run", "--strategy", "allreduce", *options]
    run = Run(folder, [*program, "--run-dir", str(folder / "run")], optimizer)
    with closing(run.launcher):
        yield run


def summary(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return read


def test_workers_may_be_killed_told_to_go_and_stopped_and_no_sample_is_lost(
    tmp_path: Path,
) -> None:
    with running(tmp_path, "--workers", "3", "--collective-timeout", "2") as run:
        dead = set()
        for rank in (1, 0):
            dead.add(run.hit(rank, SIGKILL))
            run.wait_for_steps(rank)
        preempted = run.hit(2, SIGTERM)
        run.wait_for_steps(2)
        stopped = run.hit(1, SIGSTOP)
        other = run.wait_for_steps(0)
        run.wait_for_steps(0, count=run.num_steps(0, other) + 20)
        os.kill(stopped, SIGCONT)
        run.wait_for_steps(1)
        run.stop()
        assert run.launcher.wait() == 0, run.launcher.tail()
    crew = histories(tmp_path)
    left = {each.pid for each in crew if not each.has_ended}
    dead.add(stopped)
    assert left == {*dead, preempted}
    made = account(crew, dead)
    check_values(made, "SGD")
    result = summary(tmp_path)
    assert (result["preemptions"], result["restarts"], result["exit_code"]) == (1, 3, 0)
    assert result["reported"]["loss"] < 0.5, "the noise is 0.25"
    assert (result["samples_lost"], result["samples_repeated"]) == (0, 0)


def test_a_sharded_optimizer_outlives_who_is_told_to_go_and_not_who_is_killed(
    tmp_path: Path,
) -> None:
    with running(tmp_path, "--workers", "2", "--shard-optimizer", optimizer="AdamW") as run:
        preempted = run.hit(1, SIGTERM)
        run.wait_for_steps(1, count=20)
        dead = {run.hit(0, SIGKILL)}
        assert run.launcher.wait() == 1, run.launcher.tail()
    said = run.launcher.output
    assert "a worker is gone, and with it its share of the optimizer's state (--shard-opt" in said
    crew = histories(tmp_path)
    dead |= {each.pid for each in crew if each.pid != preempted}
    made = account(crew, dead, is_complete=False)
    check_values(made, "AdamW")
    (left,) = (each for each in crew if each.pid == preempted)
    assert max(made.values) > left.done[-1]["version"] + 10, "it went on for a while"


# -- Jobs without a launcher -----------------------------------------------------------------------

FAILING: Final = """
import sys
import torch
import shardline

for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
    method.__wrapped__.__dynamo_disable = method.__wrapped__  # imports torch's compiler otherwise

with shardline.connect() as session:
    size = 3 + session.rank if sys.argv[1] == "models differ" else 3
    model = torch.nn.Linear(2, size)
    if sys.argv[1] == "buffers differ":
        model.register_buffer("seen", torch.zeros(3 + session.rank))
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    while True:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if sys.argv[1] == "usage" and session.rank == 1 and optimizer.next_step == 5:
            session.optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
"""


@contextmanager
def failing(folder: Path, how: str) -> Iterator[list[Process]]:
    """Two workers of a job that fails."""
    (folder / "fail.py").write_text(FAILING)
    keeper = Keeper(listen("127.0.0.1:0"))
    common = {"cluster.rendezvous": f"127.0.0.1:{keeper.port}", "cluster.num_workers": 2}
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                closing(
                    Process(
                        f"worker {rank}",
                        [str(folder / "fail.py"), how],
                        {**SETTINGS, **common, "cluster.rank": rank},
                    )
                )
            )
            for rank in range(2)
        ]


def test_wrong_usage_of_one_worker_ends_the_job_with_its_reason(tmp_path: Path) -> None:
    with failing(tmp_path, "usage") as (other, guilty):
        assert guilty.wait() == 2
        assert other.wait() == 1
    reason = "session.optimizer was called twice: a session trains one model"
    assert guilty.output.splitlines()[-1].startswith(f"shardline: {reason}")
    assert f"the job has failed: worker 1: UsageError: {reason}" in other.output


def test_workers_with_different_models_are_told_what_differs(tmp_path: Path) -> None:
    with failing(tmp_path, "models differ") as workers:
        assert [each.wait() for each in workers] == [1, 1]
        outputs = [each.output for each in workers]
    (mismatch,) = [text for text in outputs if "the job has failed" not in text]
    for said in ("do not train the same: parameter", "weight", "[3, 2]", "[4, 2]"):
        assert said in mismatch
    (other,) = [text for text in outputs if text != mismatch]
    assert "the job has failed: worker" in other


def test_workers_with_different_buffers_are_told_what_differs(tmp_path: Path) -> None:
    with failing(tmp_path, "buffers differ") as workers:
        assert [each.wait() for each in workers] == [1, 1]
        assert "seen" in workers[1].output
        assert "the job has failed: worker 1" in workers[0].output


def test_torchrun_starts_all_again_when_a_worker_is_killed(tmp_path: Path) -> None:
    program = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    run = Run(tmp_path, [*program, "--monitor-interval", "0.2"])
    with closing(run.launcher):
        killed = run.hit(1, SIGKILL)
        run.wait_for_steps(0, attempt=1)
        run.stop()
        assert run.launcher.wait() == 0, run.launcher.tail()
    first, again = (histories(tmp_path, attempt) for attempt in (0, 1))
    assert not any(each.has_ended for each in first)
    assert killed in {each.pid for each in first}
    assert [each.rank for each in again] == [0, 1]
    assert {each.starts[0]["version"] for each in again} == {0}, "all progress is lost"
    check_values(account(again, set()), "SGD")
