"""The command `shardline`: `run` a script on this machine, add a `worker` to a job that runs, or
ask shards for their `status`.

It ends with 0 when all went well, 1 when the training failed, 2 when it was used wrongly, and 3
when a shard could not be reached; with 128 + the signal's number when a signal ended it.
"""

import argparse
import contextlib
import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from rich.console import Console, Group
from rich.live import Live

from ps_core import __version__, config
from ps_core.errors import ConfigError, JobOverError, ShardlineError, ShardUnreachableError
from ps_core.settings import Config
from shardline.program import Program
from shardline.streams import prepare_streams, say

if TYPE_CHECKING:
    from shardline import status

_RUN_KEYS: Final = (
    "job.strategy",
    "pipeline.stages",
    "pipeline.schedule",
    "pipeline.microbatches",
    "allreduce.backend",
    "allreduce.shard_optimizer",
    "allreduce.wire_dtype",
    "allreduce.timeout_seconds",
    "consistency.mode",
    "consistency.backup_workers",
    "consistency.bound",
    "consistency.staleness_scaling",
    "consistency.delay_compensation",
    "consistency.local_steps",
    "consistency.outer_lr",
    "consistency.outer_momentum",
    "consistency.deterministic",
    "job.seed",
    "worker.nonfinite",
    "worker.device",
    "worker.grace_seconds",
    "exchange.part_bytes",
    "exchange.bucket_bytes",
    "membership.join_timeout_seconds",
    "membership.min_workers",
    "membership.pause_timeout_seconds",
    "membership.step_deadline_seconds",
    "launch.max_restarts",
    "launch.restart_window_seconds",
    "rpc.drain_seconds",
    "rpc.insecure",
)
_WORKER_KEYS: Final = ("worker.threads", "worker.device", "rpc.insecure")
_WATCH_SECONDS: Final = 1.0
_MAX_MISSES: Final = 3
"""So often in a row a job that was seen does not answer before it counts as gone."""
_FILE_WIDTH: Final = 160

_EXAMPLES: Final = """\
examples:
  shardline run train.py
  shardline run --workers 4 --shards 2 examples/digits.py --epochs 5
  shardline worker --join 127.0.0.1:7000 train.py
  shardline status --shards 127.0.0.1:7000,127.0.0.1:7001
"""
_RUN_EXAMPLES: Final = """\
examples:
  shardline run train.py                                  two workers, one shard
  shardline run --workers 4 --shards 2 train.py --lr 0.1  what follows train.py is its own
  shardline run -m package.train --lr 0.1                 a module, as in `python -m`
  shardline run --workers 2:6 train.py                    two, and up to four more by hand
  shardline run --deterministic --seed 7 train.py         runs that repeat exactly
  python train.py                                         alone, without any shard

how gradients become updates:
  shardline run --workers 4 --backup-workers 1 train.py   an update waits for three of the four
  shardline run --mode bounded --bound 2 train.py         up to two steps ahead of the slowest
  shardline run --mode async train.py                     nobody waits for anybody
  shardline run --mode async --staleness-scaling train.py
  shardline run --mode async --delay-compensation 0.04 train.py
  shardline run --mode local --local-steps 20 train.py    20 steps alone, then an average

without shards:
  shardline run --strategy allreduce --workers 4 train.py
  shardline run --strategy allreduce --shard-optimizer train.py    ZeRO-1
  torchrun --nproc-per-node 4 train.py                             the same, under torchrun

when workers fail:
  shardline run --max-restarts 0 train.py                 the first failure ends the run
  shardline run --max-restarts 10 --restart-window 3600 train.py
  shardline run --workers 4 --min-workers 2 train.py      with fewer than two, the others wait
  shardline run --step-deadline 30 train.py               whoever hangs for 30 s is evicted

A worker that fails is started again, up to --max-restarts times within --restart-window seconds
over the whole run. One that ends with 75 was preempted: it is replaced, which does not count. One
that ends with 2 was used wrongly, which ends the run, as does a SCRIPT that fails before the first
step, or ends without having joined the job.

It ends with 0 when all workers have, 1 when a process failed, 2 when it was used wrongly, 3 when a
shard could not be reached, and 128 + the signal's number when a signal ended it.
"""
_WORKER_EXAMPLES: Final = """\
examples:
  shardline worker --join 127.0.0.1:7000 train.py
  shardline worker --join 127.0.0.1:7000 --threads 2 --device cpu train.py --lr 0.1
  shardline worker --join 127.0.0.1:7000 -m package.train
  shardline worker --rendezvous 127.0.0.1:29500 train.py
  shardline worker --insecure --join 10.0.0.4:7000,10.0.0.5:7000 train.py

The first address is that of shard 0, which knows the rest; give all of them where they have other
names. They are in cluster.json in the run's directory. There must be room: start the run with
`shardline run --workers MIN:MAX`. The arguments of SCRIPT should be those of the other workers.

It becomes the worker, and so ends as SCRIPT does: with 75 when it was preempted (SIGTERM), 3 when a
shard could not be reached or the job went on without it. It ends with 2 when there is no room.
"""
_STATUS_EXAMPLES: Final = """\
examples:
  shardline status --shards 127.0.0.1:7000,127.0.0.1:7001
  shardline status --shards 127.0.0.1:7000 --watch
  shardline status --rendezvous 127.0.0.1:29500
  shardline status --shards 127.0.0.1:7000 --json | jq '.shards[].version'

It ends with 0 when all shards have answered, 2 when it was used wrongly, and 3 when one could not
be reached. The addresses of a run's shards are in cluster.json in its run directory.
"""
_MODULE_HELP: Final = "SCRIPT is a module, such as package.train, as in `python -m`"
_WORKERS_HELP: Final = "processes that run SCRIPT; up to MAX, with those that join by hand [2]"
_RENDEZVOUS: Final = "cluster.rendezvous"
_MEET_HELP: Final = "without shards: where workers meet [SHARDLINE_CLUSTER_RENDEZVOUS]"
_RUN_DIR_HELP: Final = "folder for logs and results [runs/TIME-SCRIPT; SHARDLINE_JOB_RUN_DIR]"
_METRICS_HELP: Final = "port of its /metrics; 0: a free one; -1: none [0; SHARDLINE_METRICS_PORT]"
_THREADS_HELP: Final = "torch threads of each worker [CPUs / workers; SHARDLINE_WORKER_THREADS]"
_LAYOUT: Final[dict[str, Any]] = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, what was meant, and where the help is."""

    def parse_known_args(  # type: ignore[override]  # nothing that is unknown is left over
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """A command's parser is asked for what it knows, and another one complains of the rest."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            self.error(f"unknown option {name}{_meant(name, self._option_string_actions)}")
        return known, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:  # noqa: ANN401  # argparse's
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            wrong = f"invalid choice: {value!r}{_meant(value, choices)}"
            raise argparse.ArgumentError(action, f"{wrong} (choose from {', '.join(choices)})")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _meant(word: str, words: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, words, n=1)
    return f": did you mean {nearest[0]}?" if nearest else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, or the process's own arguments, and return its exit code.

    Wrong usage, --help and --version raise SystemExit.
    """
    prepare_streams()
    arguments = _parser().parse_args(argv)
    action: Callable[[argparse.Namespace], int] = arguments.action
    try:
        return action(arguments)
    except ShardlineError as exc:
        say(f"shardline {arguments.command}: {exc}\n")
        return exc.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="shardline",
        description="Train PyTorch models with a sharded parameter server.",
        **_LAYOUT,
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"shardline {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_worker(commands)
    _add_status(commands)
    return parser


def _add_run(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "run",
        help="train: start shards and workers on this machine",
        description="Start shards and workers on this machine and wait until SCRIPT is done.",
        usage="%(prog)s [OPTION…] SCRIPT [ARG…]",
        epilog=_RUN_EXAMPLES,
        **_LAYOUT,
    )
    parser.set_defaults(action=_run)
    parser.add_argument(
        "--workers",
        type=_workers,
        default=(2, 2),
        metavar="N|MIN:MAX",
        help=_WORKERS_HELP,
    )
    parser.add_argument(
        "--shards",
        type=_count("shards hold the parameters; without any, use --strategy allreduce"),
        metavar="N",
        help="processes that hold the parameters [1, or one for each stage]",
    )
    parser.add_argument("--run-dir", dest="job.run_dir", metavar="DIR", help=_RUN_DIR_HELP)
    parser.add_argument("--threads", dest="worker.threads", metavar="N", help=_THREADS_HELP)
    _add_config(parser, _RUN_KEYS)
    _add_script(parser)


def _add_worker(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "worker",
        help="add one worker to a job that runs",
        description="Run SCRIPT as one more worker of a job that runs.",
        usage="%(prog)s [OPTION…] (--join HOST:PORT[,…] | --rendezvous HOST:PORT) SCRIPT [ARG…]",
        epilog=_WORKER_EXAMPLES,
        **_LAYOUT,
    )
    parser.set_defaults(action=_worker)
    parser.add_argument(
        "--join",
        dest="cluster.shards",
        metavar="HOST:PORT[,…]",
        help="address of shard 0, or of all shards [SHARDLINE_CLUSTER_SHARDS]",
    )
    parser.add_argument("--rendezvous", dest=_RENDEZVOUS, metavar="HOST:PORT", help=_MEET_HELP)
    parser.add_argument("--metrics-port", dest="metrics.port", metavar="PORT", help=_METRICS_HELP)
    _add_config(parser, _WORKER_KEYS)
    _add_script(parser)


def _add_script(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--module", action="store_true", help=_MODULE_HELP)
    parser.add_argument("script", metavar="SCRIPT", help="the training script")
    parser.add_argument(
        "arguments", metavar="ARG", nargs=argparse.REMAINDER, help="goes to SCRIPT untouched"
    )


def _add_status(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "status",
        help="show what shards and workers are doing",
        description="Show what the shards of a job and their workers are doing.",
        usage="%(prog)s [OPTION…] (--shards HOST:PORT,… | --rendezvous HOST:PORT)",
        epilog=_STATUS_EXAMPLES,
        **_LAYOUT,
    )
    parser.set_defaults(action=_status)
    parser.add_argument(
        "--shards",
        dest="cluster.shards",
        metavar="HOST:PORT,…",
        help="address of each shard [SHARDLINE_CLUSTER_SHARDS]",
    )
    parser.add_argument("--rendezvous", dest=_RENDEZVOUS, metavar="HOST:PORT", help=_MEET_HELP)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON document, for programs")
    form.add_argument(
        "--watch",
        action="store_true",
        help="again each second, until it is over; then it ends with 0",
    )
    _add_config(parser, ("rpc.insecure",))


def _add_config(parser: argparse.ArgumentParser, keys: Sequence[str]) -> None:
    help = "TOML file with more settings [SHARDLINE_CONFIG]"
    parser.add_argument("--config", type=Path, metavar="FILE", help=help)
    config.add_flags(parser, keys)


def _count(why: str) -> Callable[[str], int]:
    """A whole number above 0; `why` says what is wrong with 0."""

    def count(text: str) -> int:
        number = int(text) if text.isascii() and text.isdigit() else 0
        if number < 1:
            what = f"{text or 'nothing'} is not a count of at least 1"
            raise argparse.ArgumentTypeError(f"{what}: {why}")
        return number

    return count


def _workers(text: str) -> tuple[int, int]:
    """How many workers start, and how many there may be: `3`, or `2:6`."""
    count = _count("a worker runs SCRIPT on its share of the data")
    low, _, high = text.partition(":")
    workers = count(low), count(high if ":" in text else low)
    if workers[0] > workers[1]:
        raise argparse.ArgumentTypeError(f"{text} starts more workers than it allows: MIN:MAX")
    return workers


def _load(arguments: argparse.Namespace) -> Config:
    return config.load(config.overrides(arguments), file=arguments.config)


def _program(arguments: argparse.Namespace) -> Program:
    return Program(arguments.script, tuple(arguments.arguments), arguments.module)


def _run(arguments: argparse.Namespace) -> int:
    from shardline import launcher  # each command loads only what it needs
    from shardline.display import screen_for
    from shardline.local_plan import Launch

    num_workers, max_workers = arguments.workers
    counts = {"cluster.num_workers": str(num_workers), "cluster.max_workers": str(max_workers)}
    settings = config.load(config.overrides(arguments) | counts, file=arguments.config)
    uses_shards = settings.job.strategy != "allreduce"
    if arguments.shards and not uses_shards:
        raise ConfigError("strategy allreduce has no shards: leave out --shards")
    return launcher.run(
        Launch(
            _program(arguments),
            num_shards=(arguments.shards or settings.pipeline.stages) if uses_shards else 0,
            config=settings,
        ),
        screen_for(sys.stdout),
    )


def _worker(arguments: argparse.Namespace) -> int:
    from shardline import joining  # each command loads only what it needs

    settings = _load(arguments)
    if not (settings.cluster.shards or settings.cluster.rendezvous):
        raise ConfigError(
            "which job? Give the address of its shard 0, --join HOST:PORT, or where its workers "
            "meet, --rendezvous HOST:PORT"
        )
    joining.join(settings, _program(arguments))


def _status(arguments: argparse.Namespace) -> int:
    from shardline import status  # each command loads only what it needs

    settings = _load(arguments)
    if settings.cluster.shards:
        ask = partial(status.report, settings)
    elif settings.cluster.rendezvous:
        ask = partial(_report_of_workers, settings)
    else:
        raise ConfigError(
            "which job? Give the addresses of its shards, --shards HOST:PORT,…, or where its "
            "workers meet, --rendezvous HOST:PORT"
        )
    if arguments.watch:
        return _watch(ask)
    report = ask()
    if arguments.json:
        _print(json.dumps(report.document, indent=2))
    else:
        _print(_text(report.picture))
    return report.exit_code


def _report_of_workers(settings: Config) -> "status.Report":
    from shardline import worker_status  # imports torch

    return worker_status.report(settings)


def _watch(ask: "Callable[[], status.Report]") -> int:
    """Until Ctrl-C, or until the job that was seen is gone."""
    with contextlib.suppress(KeyboardInterrupt):
        if not sys.stdout.isatty():
            farewell = _look_on(ask, lambda picture: _print(_text(picture)))
        else:
            with Live(auto_refresh=False) as live:
                farewell = _look_on(ask, lambda picture: live.update(picture, refresh=True))
        _print(farewell)
    return 0


def _look_on(ask: "Callable[[], status.Report]", show: Callable[[Group], None]) -> str:
    """Show the job every second; what to say when it has not been seen for a while."""
    seen: status.Report | None = None
    num_misses = 0
    while seen is None or num_misses < _MAX_MISSES:
        try:
            report = ask()
            show(report.picture)
            seen, num_misses = (report, 0) if report.job else (seen, num_misses + 1)
        except (ShardUnreachableError, JobOverError):  # of a rendezvous
            if seen is None:
                raise
            num_misses += 1
        time.sleep(_WATCH_SECONDS)
    return seen.farewell


def _text(picture: Group) -> str:
    """The picture as standard output shows it; a file is as wide as a table needs."""
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    with console.capture() as captured:
        console.print(picture)
    return captured.get().rstrip("\n")


def _print(text: str) -> None:
    """Write to standard output; ShardlineError when nobody reads it, or the disk is full."""
    try:
        print(text, flush=True)
    except OSError as exc:
        # At its end the interpreter would try to write the rest, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ShardlineError(f"cannot write the answer: {exc.strerror}") from exc
