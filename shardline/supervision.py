"""What follows when a process of a run ends: who is started again, who is to blame, and who gets
which signal when. No processes and no clock here.

- All workers end with 0: the shards end by themselves; after a while they are told to.
- A worker fails or is preempted: it is started again, as far as `Restarts` allows; not if the
  workers themselves have said that the job has failed, nor if its script fails before any worker
  has taken a step: it would fail again.
- A worker ends with 0 and has never joined the job: the others would wait for it, so that the run
  has failed.
- A shard fails, or a worker once too often: the others get a moment to notice and to say so, then
  they are told to end. If all workers end with 0 in that moment, with their last records written,
  the shard was lost after training was complete: nothing has failed.
- The shards end with 0 while a worker is still there (it hung, and the others have finished without
  it): the job is complete. Whatever such workers do is no failure; they are told to end.
- Somebody interrupts the run: workers are told to end, then shards. A second time: all are killed.

Whoever does not end when told is killed.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from signal import SIGKILL, SIGTERM, Signals
from typing import Final, Literal

from shardline.restarts import PREEMPTED, Restarts

Role = Literal["shard", "worker"]

WRONG_USAGE: Final = 2
"""A worker that ends with this would do so again."""
UNREACHABLE: Final = 3
"""A worker that ends with this may find its shards the next time."""

NOTICE_SECONDS: Final = 5.0
"""How much longer than `reconnect_seconds` the others may take to notice a failure and end."""
LONELY_SECONDS: Final = 1.0
"""How long shards may take to end by themselves once all workers are gone after a failure, a worker
that the others have finished without, and everything in a job that fails before its first step."""
SPARE_SECONDS: Final = 3.0
"""How much longer than `drain_seconds`, the time for its open calls, a process may take to end."""
REAP_SECONDS: Final = 5.0
"""How long a killed process may take to disappear before nobody waits for it any more."""

_WORKERS: Final[frozenset[Role]] = frozenset({"worker"})
_SHARDS: Final[frozenset[Role]] = frozenset({"shard"})
_ALL: Final = _WORKERS | _SHARDS


@dataclass(frozen=True, slots=True, order=True)
class ProcessId:
    """A process of the run."""

    role: Role
    index: int

    def __str__(self) -> str:
        return f"{self.role} {self.index}"


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended; `code` is negative for a signal, and `told` if we had sent it one."""

    process: ProcessId
    code: int
    told: bool

    @property
    def is_preemption(self) -> bool:
        """Whether it is a worker that has left because its machine was wanted back."""
        return self.code == PREEMPTED and self.process.role == "worker"

    def __str__(self) -> str:
        if self.is_preemption:
            return f"{self.process} was preempted"
        if self.code >= 0:
            return f"{self.process} ended with exit code {self.code}"
        return f"{self.process} was killed by {signal_name(-self.code)}"


@dataclass(frozen=True, slots=True)
class Order:
    """Send `signal` to `processes`; `note` tells the user why, or is empty."""

    signal: Signals
    processes: tuple[ProcessId, ...]
    note: str


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker that has ended again; `note` tells the user why."""

    process: ProcessId
    note: str


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A worker that is to be started again."""

    until: float
    note: str


@dataclass(frozen=True, slots=True)
class _Step:
    """A signal for all processes of some roles, some time after the step before it."""

    wait_seconds: float
    signal: Signals
    roles: frozenset[Role]
    why: str = ""


def signal_name(number: int) -> str:
    """`SIGKILL` for 9."""
    try:
        return Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(slots=True)
class Supervisor:
    """What is known about the processes of one run, and what has to be done about it.

    Times are seconds of one monotonic clock. Call `due` often and carry out what it returns.
    """

    processes: Collection[ProcessId]
    drain_seconds: float
    restarts: Restarts
    reconnect_seconds: float = 0.0
    exits: dict[ProcessId, Exit] = field(default_factory=dict)  # of those that do not run now
    failure: Exit | None = None  # the exit that ends the run
    num_spent_restarts: int = 0  # in the window, when they ruled out another one
    num_restarts: int = 0  # after failures
    num_preemptions: int = 0
    interrupted: Signals | None = None
    joined: set[int] = field(default_factory=set)  # ranks that have ever taken part in the job
    finished: set[int] = field(default_factory=set)  # ranks that have written their last record
    has_trained: bool = False  # some worker has taken a step
    is_hopeless: bool = False  # the workers have said that the job has failed
    _outlived_shard: bool = False  # all workers have finished without a shard that had failed
    _waiting: dict[ProcessId, _Waiting] = field(default_factory=dict)
    _steps: list[_Step] = field(default_factory=list)
    _since: float = 0.0
    _addressed: frozenset[Role] = frozenset()
    _told: set[ProcessId] = field(default_factory=set)
    _killed_at: float | None = None
    _early: dict[ProcessId, float] = field(default_factory=dict)

    @property
    def notice_seconds(self) -> float:
        """How long the others may take to notice a failure and to end by themselves."""
        return self.reconnect_seconds + NOTICE_SECONDS

    def alive(self, roles: Iterable[Role] = _ALL) -> tuple[ProcessId, ...]:
        """The processes of these roles that have not ended."""
        return tuple(
            each for each in self.processes if each.role in roles and each not in self.exits
        )

    def is_over(self, now: float) -> bool:
        """Whether there is nothing left to wait for."""
        gave_up = self._killed_at is not None and now - self._killed_at > REAP_SECONDS
        return gave_up or not (self.alive() or self._waiting)

    def exit_code(self) -> int:
        """What the command ends with: 0 done, 1 failed, 3 try again, 128 + signal interrupted."""
        if self.interrupted is not None:
            return 128 + self.interrupted
        if self.failure is not None:
            return UNREACHABLE if self.failure.code == UNREACHABLE else 1
        return 0

    def interrupt(self, signal: Signals, now: float) -> None:
        """The user wants the run to end; the second time at once."""
        plan = [
            _Step(0, SIGTERM, _WORKERS),
            _Step(self.drain_seconds, SIGTERM, _SHARDS),
            self._kill(),
        ]
        if self.interrupted is not None:
            plan = [_Step(0, SIGKILL, _ALL)]
        self.interrupted = self.interrupted or signal
        self._waiting.clear()
        self._begin(plan, now)

    def exited(self, process: ProcessId, code: int, now: float) -> None:
        """`process` has ended with `code`, negative for a signal."""
        ended = self.exits[process] = Exit(process, code, process in self._told)
        if self.interrupted is not None:
            return
        if self.failure is None:
            self._judge(ended, now)
        if self._is_outlived(self.failure):
            self.failure, self._outlived_shard = None, True
        failed = self.failure is not None or self._outlived_shard
        if failed and not self._told and not self.alive(_WORKERS):
            self._begin([_Step(LONELY_SECONDS, SIGTERM, _SHARDS), self._kill()], now)

    def _judge(self, ended: Exit, now: float) -> None:
        """What an exit means while nothing has gone wrong yet."""
        has_finished = ended.process.role == "worker" and ended.process.index in self.finished
        if self._never_joined(ended):
            self._fail(ended, now)
        elif ended.code != 0 and not ended.told and not (has_finished and ended.is_preemption):
            self._answer(ended, has_finished, now)
        elif ended.process.role == "shard":
            self._early[ended.process] = now
        elif not self.alive(_WORKERS) and not self._waiting:
            self._drain(now)

    def _is_outlived(self, failure: Exit | None) -> bool:
        """It is a shard's, and all workers have ended well since."""
        if failure is None or failure.process.role != "shard":
            return False
        workers = [each for each in self.processes if each.role == "worker"]
        codes = {each.index: self.exits[each].code for each in workers if each in self.exits}
        return (
            len(codes) == len(workers) and not any(codes.values()) and codes.keys() <= self.finished
        )

    def _never_joined(self, ended: Exit) -> bool:
        """It has ended well, and the job has not been complete without it."""
        if ended.code != 0 or ended.told or ended.process.role == "shard":
            return False
        return ended.process.index not in self.joined and not self.joined & self.finished

    def _would_fail_again(self, ended: Exit) -> bool:
        """Rather than a crash, an unreachable shard or a machine that is wanted back."""
        is_early = not self.has_trained and ended.code not in (UNREACHABLE, PREEMPTED)
        return ended.code == WRONG_USAGE or self.is_hopeless or (is_early and ended.code > 0)

    def _answer(self, ended: Exit, has_finished: bool, now: float) -> None:
        """A process has failed, or a worker was preempted."""
        self.num_preemptions += ended.is_preemption
        if self._outlived_shard:
            return
        if ended.process.role == "shard" or has_finished:
            self._fail(ended, now)
        elif self._job_is_complete():
            return
        elif self._would_fail_again(ended):
            self._fail(ended, now)
        elif again := self.restarts.ended(ended.process.index, ended.code, now):
            note = f"{ended}: starting it again ({again.why})"
            self._waiting[ended.process] = _Waiting(now + again.delay_seconds, note)
        else:
            self.num_spent_restarts = self.restarts.num_recent(now)
            self._fail(ended, now)

    def _job_is_complete(self) -> bool:
        """All shards have ended well and some workers have finished, so nobody else is needed."""
        shards = [each for each in self.processes if each.role == "shard"]
        return bool(self.finished) and all(shard in self._early for shard in shards)

    def due(self, now: float) -> list[Order | Start]:
        """The signals to send now, and the workers to start."""
        if self.failure is None and self.interrupted is None:
            self._blame_early_shards(now)
            self._dismiss_leftovers(now)
        orders: list[Order | Start] = [*self._starts(now)]
        while self._steps and self._is_due(self._steps[0], now):
            step = self._steps.pop(0)
            self._since, self._addressed = now, self._addressed | step.roles
            if targets := self.alive(step.roles):
                orders.append(self._order(step, targets, now))
        return orders

    def _starts(self, now: float) -> list[Start]:
        """Nobody is started once a shard has gone: the job is complete, or the shard is blamed."""
        if self._early:
            return []
        ready = [process for process, each in self._waiting.items() if each.until <= now]
        return [self._start(process, now) for process in ready]

    def _start(self, process: ProcessId, now: float) -> Start:
        self.num_restarts += not self.exits.pop(process).is_preemption
        self.restarts.started(process.index, now)
        return Start(process, self._waiting.pop(process).note)

    def _order(self, step: _Step, targets: tuple[ProcessId, ...], now: float) -> Order:
        self._told.update(targets)
        if step.signal is SIGKILL:
            self._killed_at = now
        names = ", ".join(map(str, targets))
        note = step.why and f"{names} {step.why}: sending {step.signal.name}"
        return Order(step.signal, targets, note)

    def _is_due(self, step: _Step, now: float) -> bool:
        """Its time has come, or nobody is left whom the steps before it were for."""
        waited = now - self._since >= step.wait_seconds
        return waited or (bool(self._addressed) and not self.alive(self._addressed))

    def _begin(self, steps: list[_Step], now: float) -> None:
        self._steps, self._since, self._addressed = steps, now, frozenset()

    def _fail(self, ended: Exit, since: float) -> None:
        """The others may take a while to notice and to leave, if there is something to leave."""
        self.failure = ended
        self._waiting.clear()
        wait, kill = self.notice_seconds, self._kill()
        if not self.has_trained:
            wait, kill = LONELY_SECONDS, self._kill(LONELY_SECONDS)
        told = f"still there {wait:g} s after {ended}"
        self._begin([_Step(wait, SIGTERM, _ALL, told), kill], since)

    def _drain(self, now: float) -> None:
        wait = self.drain_seconds + SPARE_SECONDS
        told = f"did not end within {wait:g} s after the workers"
        self._begin([_Step(wait, SIGTERM, _SHARDS, told), self._kill()], now)

    def _kill(self, wait: float = 0) -> _Step:
        wait = wait or self.drain_seconds + SPARE_SECONDS
        return _Step(wait, SIGKILL, _ALL, f"did not end within {wait:g} s")

    def _unfinished(self) -> list[ProcessId]:
        """Workers that run, or will, and have not written their last record."""
        workers = (*self.alive(_WORKERS), *self._waiting)
        return [each for each in workers if each.index not in self.finished]

    def _blame_early_shards(self, now: float) -> None:
        """A shard ends with 0 once all workers have left it, which their last records confirm."""
        if self._job_is_complete() or not self._unfinished():
            return
        for process, since in self._early.items():
            if now - since >= self.notice_seconds:
                return self._fail(self.exits[process], since)

    def _dismiss_leftovers(self, now: float) -> None:
        """The others have ended, and so have the shards: nobody needs who is left."""
        if not self._job_is_complete():
            return
        self._waiting.clear()
        left = self.alive()
        if left and len(left) == len(self._unfinished()) and not (self._steps or self._told):
            why = "still there, although the job is complete"
            self._begin([_Step(LONELY_SECONDS, SIGTERM, _WORKERS, why), self._kill()], now)
