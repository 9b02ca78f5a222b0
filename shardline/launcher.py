"""Starts shards and workers on this machine, watches them, and leaves none behind."""

import contextlib
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Final

from ps_core.cgroup import cpu_limit
from ps_core.config import check_addresses
from ps_core.errors import ConfigError, ShardlineError
from ps_core.listening import listen
from ps_core.settings import PipelineConfig
from shardline import local_plan, report, run_directory
from shardline.curves import Curves
from shardline.display import Screen
from shardline.ledger import Balance
from shardline.local_plan import Launch, plan, with_rendezvous
from shardline.open_files import allow_open_files
from shardline.ports import held_ports
from shardline.processes import Child, ProcessSpec
from shardline.progress import Progress, Totals
from shardline.records import Tail
from shardline.restarts import Restarts
from shardline.run_directory import Outcome, RunDirectory, Running
from shardline.streams import say
from shardline.supervision import REAP_SECONDS, Order, ProcessId, Start, Supervisor
from shardline.tracebacks import HeldTraceback

if TYPE_CHECKING:
    from allreduce.store import Keeper

_POLL_SECONDS: Final = 0.05
_OF_A_TERMINAL: Final = (signal.SIGINT, signal.SIGHUP)
_SIGNALS: Final = (*_OF_A_TERMINAL, signal.SIGTERM)
_NOTEWORTHY: Final = re.compile(r"\b(WARNING|ERROR|CRITICAL|Traceback)\b|(Error|Exception): ")


def run(launch: Launch, screen: Screen) -> int:
    """Run it to its end and return the exit code of the command.

    Must be called on the main thread. ShardlineError when nothing could be started; what fails
    later is told on the screen and on standard error.
    """
    launch.program.check()
    check_addresses(launch.config)
    _check_schedule(launch.config.pipeline)
    allow_open_files(1 + launch.num_shards + launch.num_workers)
    directory = run_directory.create(launch.config.job.run_dir, launch.program.name, time.time())
    with contextlib.ExitStack() as held:
        ports = held.enter_context(held_ports(2 * launch.num_shards + launch.num_workers))
        listener = None
        if launch.needs_rendezvous:
            listener = held.enter_context(listen("127.0.0.1:0"))
            launch = with_rendezvous(launch, listener.getsockname()[1])
        job_id = f"{launch.job_name}-{secrets.token_hex(3)}"
        specs = plan(launch, job_id, directory.path, ports, _num_cpus())
        screen.note(report.opening(launch, job_id, directory))
        if invitation := report.invitation(launch, specs[0].address):
            screen.note(invitation)
        return _Run(launch, directory, screen, specs, job_id, listener).to_its_end()


def _check_schedule(pipeline: PipelineConfig) -> None:
    if pipeline.stages > 1 and pipeline.microbatches:
        from pipeline.schedule import check_microbatches  # imports torch, as a rendezvous does

        check_microbatches(pipeline.schedule, pipeline.stages, pipeline.microbatches)


def _num_cpus() -> int:
    """The CPUs that this process may use, where the system tells; of a container's share of them,
    the whole ones.
    """
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, int(min(count, cpu_limit())))


@contextlib.contextmanager
def _signals_into(received: list[signal.Signals]) -> Iterator[None]:
    """Collect the signals that end a run, instead of dying of them.

    Those of a terminal stay ignored under nohup and in the background of a script. SIGCHLD must not
    be ignored: the kernel would keep exit codes to itself.
    """

    def collect(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGCHLD)}
    for number in _SIGNALS:
        if number not in _OF_A_TERMINAL or before[number] is not signal.SIG_IGN:
            signal.signal(number, collect)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


class _Run:
    """The edge between the decisions of a Supervisor and real processes."""

    def __init__(
        self,
        launch: Launch,
        directory: RunDirectory,
        screen: Screen,
        specs: Sequence[ProcessSpec],
        job_id: str,
        listener: socket.socket | None,
    ) -> None:
        """`listener`: where the rendezvous is to be kept."""
        self._job_id = job_id
        self._listener = listener
        self._launch, self._directory, self._screen = launch, directory, screen
        self._specs = specs
        self._children: dict[ProcessId, Child] = {}  # the newest of each
        self._num_starts: Counter[ProcessId] = Counter()
        self._tracebacks: dict[ProcessId, HeldTraceback] = {}  # of workers
        self._shown: set[tuple[str, ...]] = set()
        """The last words of workers that have ended."""
        self._signals: list[signal.Signals] = []
        self._keeper: Keeper | None = None
        self._tail = Tail(directory.metrics)
        self._curves = Curves()
        self._progress = Progress(launch.num_workers, launch.num_ranks)
        self._started, self._started_at = time.monotonic(), time.time()
        rpc, policy = launch.config.rpc, launch.config.launch
        stages = launch.config.pipeline.stages
        restarts = Restarts(policy.max_restarts, policy.restart_window_seconds, stages)
        processes = [spec.id for spec in specs]
        self._supervisor = Supervisor(processes, rpc.drain_seconds, restarts, rpc.reconnect_seconds)

    def to_its_end(self) -> int:
        """Start, watch, clean up, tell; returns the exit code."""
        with _signals_into(self._signals):
            try:
                for spec in self._specs:
                    self._start(spec)
                self._write_cluster()
                self._keep_rendezvous()
                self._watch()
            finally:
                self._clean_up()
            return self._tell(time.monotonic() - self._started)

    def _keep_rendezvous(self) -> None:
        """After the workers were started, which import torch meanwhile, too."""
        if self._listener is not None:
            from allreduce.store import Keeper  # most runs need no torch here

            self._keeper = Keeper(self._listener)
            self._keeper.publish(local_plan.job_settings(self._specs))

    def _start(self, spec: ProcessSpec) -> None:
        child = self._children[spec.id] = Child(spec, self._directory.open_log(spec))
        self._num_starts[spec.id] += 1
        self._tracebacks[spec.id] = HeldTraceback()
        child.listen(partial(self._show_line, spec.id))

    def _write_cluster(self) -> None:
        running = [
            Running(child.spec, child.pid, self._num_starts[process] - 1)
            for process, child in self._children.items()
        ]
        meeting = self._launch.config.cluster.rendezvous
        document = run_directory.cluster(self._job_id, self._started_at, meeting, running)
        self._directory.write_json("cluster.json", document)

    def _show_line(self, process: ProcessId, text: str) -> None:
        if process.role == "worker":
            for line in self._tracebacks[process].add(text):
                self._screen.line(str(process), line)
        # What shards say when we end them is no news.
        elif self._supervisor.interrupted is None and _NOTEWORTHY.search(text):
            self._screen.line(str(process), text)

    def _show_last_words(self, process: ProcessId) -> None:
        """Show the traceback with which a worker has ended, but for that of the run's failure,
        which the report tells, and one that was shown before.
        """
        failure = self._supervisor.failure
        words = tuple(self._tracebacks[process].lines)
        if failure and words == tuple(self._tracebacks[failure.process].lines):
            return
        lines = self._tracebacks[process].release()
        if words in self._shown:
            lines = [f"(the same traceback as before) {words[-1]}"]
        elif words:
            self._shown.add(words)
        for line in lines:
            self._screen.line(str(process), line)

    def _watch(self) -> None:
        while not self._supervisor.is_over(time.monotonic()):
            self._notice(time.monotonic())
            for order in self._supervisor.due(time.monotonic()):
                self._carry_out(order)
            elapsed_seconds = time.monotonic() - self._started
            self._screen.show(self._progress.view(elapsed_seconds, time.time()))
            time.sleep(_POLL_SECONDS)

    def _notice(self, now: float) -> None:
        """Tell the supervisor what has happened since the last call."""
        while self._signals:
            number = self._signals.pop(0)
            self._screen.note(report.interruption(number, self._supervisor))
            if self._keeper is not None:
                self._keeper.interrupt()
            self._supervisor.interrupt(number, now)
        ended = self._newly_ended()
        # After the processes were looked at: the last record of one that has ended is in the file.
        self._read_records()
        self._supervisor.joined = self._progress.joined
        self._supervisor.finished = self._progress.finished
        self._supervisor.has_trained = self._progress.has_trained
        for process, code in ended:
            if self._keeper is not None:
                self._keeper.ended(process.index, self._children[process].pid)
                self._supervisor.is_hopeless = self._keeper.has_failed
            self._supervisor.exited(process, code, now)
            if self._children[process].close():
                self._show_last_words(process)

    def _newly_ended(self) -> list[tuple[ProcessId, int]]:
        """Those that died of a signal first: the others may have failed because of them."""
        alive = self._supervisor.alive()
        codes = [(process, self._children[process].poll()) for process in alive]
        ended = [(process, code) for process, code in codes if code is not None]
        return sorted(ended, key=lambda each: each[1] >= 0)

    def _carry_out(self, order: Order | Start) -> None:
        if order.note:
            self._screen.note(order.note)
        if isinstance(order, Start):
            return self._start_again(self._children[order.process])
        for process in order.processes:
            self._children[process].send(order.signal)

    def _start_again(self, ended: Child) -> None:
        """In the place of one that has ended, which is seen to end once more if that fails."""
        try:
            self._start(ended.spec)
            self._progress.restarted(ended.spec.id.index)
            self._write_cluster()
        except ShardlineError as exc:
            self._screen.note(str(exc))

    def _clean_up(self) -> None:
        """End what still runs, which is nothing after a run without surprises."""
        for child in self._children.values():
            if child.poll() is None:
                child.send(signal.SIGKILL)
        deadline = time.monotonic() + REAP_SECONDS
        while any(child.poll() is None for child in self._children.values()):
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        for process, child in self._children.items():
            child.close()
            self._show_last_words(process)
        self._screen.close()

    def _tell(self, wall_seconds: float) -> int:
        """Write the results, and show them."""
        self._read_records()
        totals, code = self._progress.totals(), self._supervisor.exit_code()
        balance = self._balance()
        counts = self._supervisor.num_restarts, self._supervisor.num_preemptions
        self._directory.remove_unfinished()
        outcome = Outcome(wall_seconds, code, *counts, self._directory.model_state())
        self._write_results(totals, balance, outcome)
        if totals.steps or code == 0:
            self._screen.table(report.rows(totals, balance, wall_seconds, self._directory))
        say(
            report.ending(
                self._supervisor,
                wall_seconds,
                {process: self._last_lines(process) for process in self._children},
                self._directory,
            )
        )
        return code

    def _last_lines(self, process: ProcessId) -> list[str]:
        """What it wrote last, with all of a traceback that was not shown."""
        lines = list(self._children[process].last_lines)
        return max(lines, self._tracebacks[process].lines, key=len)

    def _balance(self) -> Balance:
        try:
            return self._directory.balance()
        except OSError as exc:
            self._screen.note(f"what became of the samples is not known: {exc}")
            return Balance()

    def _write_results(self, totals: Totals, balance: Balance, outcome: Outcome) -> None:
        document = run_directory.summary(self._launch, totals, balance, outcome)
        try:
            self._directory.write_json("summary.json", document)
            self._draw()
        except (ConfigError, OSError) as exc:
            self._screen.note(f"the results are not complete: {exc}")

    def _read_records(self) -> None:
        """What the workers have written since the last call."""
        records = self._tail.read()
        self._progress.add(records)
        self._curves.add(records)

    def _draw(self) -> None:
        try:
            self._curves.draw(self._directory.path / "training.png", self._launch.job_name)
        except ImportError:
            self._screen.note(
                "training.png is not drawn: matplotlib is not installed "
                "(pip install 'shardline[plots]')"
            )
