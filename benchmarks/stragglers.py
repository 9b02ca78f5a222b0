"""What does a slow worker cost, in each mode and beside an all-reduce?

First table: workers whose compute is a sleep, so that few cores do not distort it, then a real
backward pass and a real exchange of a small model (SGD). The last worker is slow for good, or is
paused twice; or every worker is paused once. Pauses come at random times, the same for all systems;
in a pause a worker does not compute. A system runs for a given time, whatever number of steps that
is.

  updates/s      versions of the parameters; where each gradient is an update, N times as many
  samples/s      behind the gradients that were used, as the lead's updates.jsonl tells
  of its own     samples/s, relative to the same system when nobody is slow
  of the fast    samples/s, relative to what all workers but one make when nobody is slow
  refused        steps whose gradients came too late to be used
  evicted        workers, in all scenarios of the system: evictions are switched off

A bound of k lets others go k steps ahead of a paused worker, and hides that much of its pause if it
catches up before it is paused again, which it does only where others pause too. So it helps when
pauses are not longer than a few steps and hit everybody; of one worker that is paused again and
again it hides a few steps once.

Second table: how soon worker 0 reads held-out digits (examples/digits.py) well; nobody is slow.
Here workers compute for real and share the cores, which favours whoever waits least for others.
Where each gradient is an update, there are N times as many, with 1/N of the learning rate.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.pool import AsyncResult
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent.parent))  # for when this file is run by its path

from benchmarks.exchange import START_SECONDS, Process, facts, processes, running_shard
from benchmarks.straggler_scenarios import (
    REACH,
    Row,
    Run,
    Scenario,
    Setting,
    System,
    cells,
    longest_seconds,
    make_rows,
    no_help,
    scenarios,
    systems,
    targets,
)
from benchmarks.straggler_worker import Job, Learned, Lesson, Taken, learn, run_cells
from ps_core import config as settings
from ps_core.settings import ClusterConfig, Config, ConsistencyConfig, MetricsConfig
from shardline.ports import free_ports

PRELOADED = ["benchmarks.straggler_worker", "sklearn.datasets", "sklearn.model_selection"]
PRELOADED += ["torch._dynamo"]  # takes a second, when the first optimizer is made
NEVER_SECONDS = 1e6
WIDTH = 110  # columns, also where the output is no terminal
QUICK = {"seconds": 0.5, "lead_seconds": 0.2, "pause_window": 2.0, "pause_seconds": 0.3}
QUICK |= {"step_ms": 10.0, "long_step_ms": 75.0, "repeats": 1, "limit_seconds": 3.0}
EXAMPLES = """examples:
  python benchmarks/stragglers.py --json benchmarks/results/stragglers.json
  python benchmarks/stragglers.py --systems sync,bounded3,async --repeats 0    no second table
  python benchmarks/stragglers.py --long-step-ms 250                           a pause of 8 steps
  python benchmarks/stragglers.py --quick                                      does it run?"""
UNSAVED = {"json", "check", "quick", "systems"}
T = TypeVar("T")


# -- Processes -------------------------------------------------------------------------------------


def run_job(
    chosen: Namespace,
    base: Config,
    system: System,
    seconds: float,
    work: Callable[[Job, int], T],
) -> tuple[list[T], list[Row]]:
    """`work(job, rank)` in a process for each worker, which may take so long; then the lines of
    updates.jsonl. Evictions are off.
    """
    gloo_port, *ports = free_ports(1 + chosen.shards)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            base,
            job=replace(base.job, seed=chosen.seed, run_dir=folder),
            cluster=ClusterConfig(
                tuple(f"127.0.0.1:{port}" for port in ports), num_workers=chosen.workers
            ),
            worker=replace(base.worker, threads=1),
            consistency=system.consistency or ConsistencyConfig(),
            membership=replace(
                base.membership, heartbeat_deadline_seconds=NEVER_SECONDS, step_deadline_seconds=0.0
            ),
            metrics=MetricsConfig(port=-1),
        )
        num_shards = chosen.shards if system.consistency else 0
        with contextlib.ExitStack() as stack:
            shards = [stack.enter_context(running_shard(config, n)) for n in range(num_shards)]
            job = Job(config, 0 if shards else gloo_port, START_SECONDS)
            results = in_workers(partial(work, job), chosen.workers, shards, seconds)
        log = Path(folder, "updates.jsonl")
        lines = log.read_text().splitlines() if shards else []
        return results, [json.loads(line) for line in lines]


def in_workers(
    work: Callable[[int], T], num_workers: int, shards: Sequence[Process], seconds: float
) -> list[T]:
    """Wait for all workers. The first failure, also of a shard, is raised."""
    deadline = time.monotonic() + seconds + 2 * START_SECONDS
    with processes.Pool(num_workers, torch.set_num_threads, (1,)) as pool:
        calls = [pool.apply_async(work, (rank,)) for rank in range(num_workers)]
        try:
            results = results_of(calls, shards, deadline)
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.kill()  # to a session SIGTERM is a request, which the pool does not repeat
            raise
    pool.join()
    return results


def results_of(
    calls: Sequence[AsyncResult[T]], shards: Sequence[Process], deadline: float
) -> list[T]:
    while not all(call.ready() for call in calls):
        for call in (each for each in calls if each.ready()):
            call.get()
        if any(shard.poll() for shard in shards):
            raise RuntimeError("a shard has failed")
        if time.monotonic() > deadline:
            raise TimeoutError("the workers are not done")
        time.sleep(0.1)
    return [call.get() for call in calls]


# -- Measurements ----------------------------------------------------------------------------------


def measure_cells(job: Job, rank: int, setting: Setting) -> list[Taken]:
    return run_cells(job, rank, cells(setting, rank), setting.width, setting.num_samples)


def measure(chosen: Namespace, base: Config, key: str) -> list[Row]:
    """The rows of a system in the first table."""
    system, setting = chosen.systems[key], setting_of(chosen)
    work = partial(measure_cells, setting=setting)
    seconds = longest_seconds(setting, chosen.local_steps)
    taken, ledger = run_job(chosen, base, system, seconds, work)
    rows = make_rows(key, system, Run(taken, ledger if system.consistency else None), setting)
    evicted = sum(line.get("event") in ("evicted", "failed") for line in ledger)
    return [row | {"evicted": evicted if system.consistency else None} for row in rows]


def read_digits(chosen: Namespace, base: Config, key: str) -> Row:
    """The row of a system in the second table."""
    system, learned = chosen.systems[key], list[Learned]()
    lr = chosen.lr / chosen.workers if system.each_alone else chosen.lr
    for seed in range(chosen.seed, chosen.seed + chosen.repeats):
        limit, frequency = chosen.limit_seconds, chosen.eval_steps
        lesson = Lesson(lr, chosen.batch_size, chosen.accuracy, frequency, limit, seed)
        work = partial(learn, lesson=lesson)
        learned.append(run_job(chosen, base, system, chosen.limit_seconds, work)[0][0])
    reached = [each for each in learned if each.accuracy >= chosen.accuracy]
    seconds = sorted(each.seconds for each in reached)
    is_known = len(reached) > len(learned) // 2  # or the median is beyond the limit
    late = [math.inf] * (len(learned) - len(reached))
    return {
        "system": key,
        "lr": lr,
        "reached": len(reached),
        "repeats": len(learned),
        "median_seconds": round(median(seconds + late), 2) if is_known else None,
        "extremes_seconds": [round(each, 2) for each in (seconds[:1] + seconds[-1:])],
        "median_steps": median(each.num_steps for each in reached) if reached else None,
        "accuracies": [round(each.accuracy, 3) for each in learned],
    }


def setting_of(chosen: Namespace) -> Setting:
    return Setting(
        num_workers=chosen.workers,
        width=chosen.width,
        num_samples=chosen.samples,
        step_seconds=chosen.step_ms / 1e3,
        long_step_seconds=chosen.long_step_ms / 1e3,
        seconds=chosen.seconds,
        lead_seconds=chosen.lead_seconds,
        pause_window_seconds=chosen.pause_window,
        pause_seconds=chosen.pause_seconds,
        seed=chosen.seed,
    )


# -- What is printed -------------------------------------------------------------------------------


def cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(f"{each:.3g}" for each in value)
    if isinstance(value, float):
        return f"{value:.2f}"
    return "n/a" if value is None else str(value)


def draw(labels: Mapping[str, str], scenario: Scenario, rows: Sequence[Row]) -> Table:
    own = [row for row in rows if row["scenario"] == scenario.name]
    title = f"{scenario.name}, steps of {scenario.step_seconds * 1e3:g} ms"
    if not scenario.is_calm:
        title += f": {own[0]['possible']:.2f} of the undisturbed rate is possible"
    headings = "updates/s|samples/s|of its own|of the fast|steps/s by worker|refused|evicted"
    keys = ["updates_per_second", "samples_per_second", "of_its_own", "of_fast_workers"]
    keys += ["steps_per_second", "refused_steps", "evicted"]
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("system", min_width=max(map(len, labels.values())))
    for heading in headings.split("|"):
        table.add_column(heading, justify="right", min_width=len(heading))
    for row in own:
        table.add_row(labels[row["system"]], *(cell(row[key]) for key in keys))
    return table


def draw_digits(chosen: Namespace, labels: Mapping[str, str], rows: Sequence[Row]) -> Table:
    headings = "system|learning rate|reached|median s|min, max s|steps of worker 0"
    title = f"Until {chosen.accuracy:.0%} of the held-out digits are read"
    table = Table(*headings.split("|"), title=title, box=None)
    for row in rows:
        reached = f"{row['reached']} of {row['repeats']}"
        keys = ("median_seconds", "extremes_seconds", "median_steps")
        label = labels[row["system"]]
        table.add_row(label, f"{row['lr']:g}", reached, *(cell(row[key]) for key in keys))
    return table


def tell(labels: Mapping[str, str], rows: Sequence[Row], wanted: Sequence[Row]) -> list[str]:
    """What the first table shows, in words."""
    against = {"of_its_own": "of its own rate", "of_fast_workers": "of the fast workers' rate"}
    lines = [
        f"{'met' if each['met'] else 'NOT MET'}: {labels[each['system']]}, {each['scenario']}: "
        f"{each['value']:.2f} {against[each['measure']]}, wanted {REACH:g}"
        for each in wanted
    ]
    for scenario, keys in no_help(rows).items():
        names = ", ".join(labels[key] for key in keys) or "none"
        lines.append(f"no better than sync, {scenario}: {names}")
    return lines


def save(
    chosen: Namespace, base: Config, loads: Sequence[float], tables: Mapping[str, object]
) -> None:
    document = {name: value for name, value in vars(chosen).items() if name not in UNSAVED}
    document |= {"systems": list(chosen.systems), "part_bytes": base.exchange.part_bytes}
    document |= {"machine": facts(), "load_average": [round(load, 1) for load in loads], **tables}
    chosen.json.write_text(json.dumps(document, indent=1) + "\n")


# -- Command line ----------------------------------------------------------------------------------


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse() -> Namespace:
    cli = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=Formatter)
    add = cli.add_argument
    add("--systems", default=",".join(systems(0)), metavar="NAME,...", help="what to compare")
    add("--workers", type=int, default=4, help="of every system")
    add("--shards", type=int, default=2, help="of every system but ddp")
    add("--width", type=int, default=256, help="of the model's 4 layers: 1 MiB of parameters")
    add("--samples", type=int, default=32, help="in a step of a worker")
    add("--step-ms", type=float, default=50, help="computing in a step")
    add("--long-step-ms", type=float, default=500, help="the same, where steps are long")
    add("--seconds", type=float, default=8, help="that count, of a scenario without pauses")
    add("--lead-seconds", type=float, default=1, help="until bounds are used up; do not count")
    add("--pause-window", type=float, default=24, help="seconds of a scenario with pauses")
    add("--pause-seconds", type=float, default=2, help="how long a pause is")
    add("--local-steps", type=int, default=10, help="of mode local, between two exchanges")
    add("--seed", type=int, default=0, help="of pauses, batches and initial values")
    add("--repeats", type=int, default=3, help="of the second table, with other seeds; 0: none")
    add("--accuracy", type=float, default=0.95, help="to be reached there")
    add("--batch-size", type=int, default=16, help="of a worker, there")
    add("--lr", type=float, default=5e-3, help="of AdamW, there")
    add("--eval-steps", type=int, default=5, help="between evaluations, there")
    add("--limit-seconds", type=float, default=20, help="for reaching it")
    add("--json", type=Path, metavar="FILE", help="write the result there, too")
    add("--check", action="store_true", help="exit with 1 if a target is missed")
    add("--quick", action="store_true", help="short times: shows that it runs, nothing else")
    chosen = cli.parse_args()
    vars(chosen).update(QUICK if chosen.quick else {})
    known = systems(chosen.local_steps)
    names = chosen.systems.split(",")
    if not known.keys() >= set(names):
        cli.error(f"--systems takes names of {', '.join(known)}")
    if chosen.workers < 2 or chosen.pause_seconds * chosen.workers > chosen.pause_window:
        cli.error("there must be 2 workers, and room for a pause of each in the window")
    chosen.systems = {name: known[name] for name in names}
    return chosen


def main() -> int:
    chosen, base = parse(), settings.load()
    console = Console(width=max(WIDTH, Console().width))
    loads, started = [os.getloadavg()[0]], time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that processes are ended then, too
    processes.set_forkserver_preload(PRELOADED)
    rows: list[Row] = []
    digits: list[Row] = []
    for number, (key, system) in enumerate(chosen.systems.items(), 1):
        with console.status(f"measures {system.label}"):
            rows += measure(chosen, base, key)
            digits += [read_digits(chosen, base, key)] if chosen.repeats else []
        loads.append(os.getloadavg()[0])
        place, minutes = f"{number} of {len(chosen.systems)}", (time.monotonic() - started) / 60
        console.print(f"{place} systems, {minutes:.1f} minutes: {system.label}", highlight=False)
    wanted = targets(rows)
    labels = {key: system.label for key, system in chosen.systems.items()}
    console.print(*(draw(labels, each, rows) for each in scenarios(setting_of(chosen))), sep="\n\n")
    if digits:
        console.print(draw_digits(chosen, labels, digits))
    console.print(*tell(labels, rows, wanted), sep="\n", highlight=False)
    if chosen.json:
        tables = {"rows": rows, "targets": wanted, "digits": digits}
        save(chosen, base, loads, tables)
    return int(chosen.check and not all(each["met"] for each in wanted))


if __name__ == "__main__":
    sys.exit(main())
