"""How many samples per second does a whole training loop make, and what does a worker hold?

Every system trains the same model with AdamW on the same synthetic data, the same number of samples
in a step of all workers together; each worker has one torch thread. Plain torch uses the fused
kernel of AdamW, which shardline chooses by itself. `gpt` is the model of examples/gpt.py, small;
`mlp` has 64 MiB of parameters and few samples, so that communication decides. With 2 stages the
schedule is 1f1b, and one replica of the model is spread over both workers. With overlap gradients
are sent during the backward pass, as DDP always does.

All systems run at the same time, but only one computes: they take turns, A B C … A B C …, so that
noise of the machine hits all; those that wait use about 1 % of a core each, for heartbeats. A turn
lasts from the moment when all workers have done its warm-up steps to the end of its last step on
all of them.

  samples/s    of all workers, median of the turns
  of DDP       the same relative to the turn of DDP in the same round, median of the rounds
  2 shards, async   each gradient of half the samples is an update: twice as many, half as large

Then memory, with a larger mlp, of the worker of each system that takes up most:

  must         parameters and gradients of the worker's own layers, and the state of its optimizer
               (ZeRO-1: its share of it; on shards: none)
  share        of the model's parameters that are its own
  held         storages of tensors that Python objects refer to, after a step, gradients not cleared
  flat         of these: buckets, from which gradients are sent
  other        of these: data, what travels between stages, everything else
  unused       resident memory that was freed, after a step: the C library keeps it
  peak         highest resident memory in the worker's life, construction and the end of the session
               included, less that of a process that has imported the same and taken a tiny step
  of layers    peak, relative to the parameters, gradients and optimizer state of the worker's own
               layers, wherever the state is; wanted of stages is at most 1.05
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent.parent))  # for when this file is run by its path

from benchmarks.exchange import facts
from benchmarks.train_memory import MIB, MOST, Row, memory_row
from benchmarks.train_systems import BARE, BARE_STAGED, SYSTEMS, Fleet, Job, System, Turn, running

YARDSTICK, JUDGED = "ddp", "allreduce"
REACH = 0.95
"""Of the yardstick's rate, in every model."""
FIRST_STEPS = 3  # after the start, beyond the warm-up of the first turn
WIDTH = 110  # columns, also where the output is no terminal
QUICK = {"repeats": 1, "gpt_steps": 3, "mlp_steps": 2, "memory_steps": 2}
UNSAVED = {"json", "check", "quick", "systems"}
EXAMPLES = """examples:
  python benchmarks/train.py --json benchmarks/results/train.json
  python benchmarks/train.py --systems ddp,allreduce --memory-mib 0 --check    speed alone
  python benchmarks/train.py --models= --systems one,stages2,stages4           memory alone
  python benchmarks/train.py --quick                                           does it run?"""


# -- Measurements ----------------------------------------------------------------------------------


def job_of(chosen: Namespace, model: str, num_turns: int) -> Job:
    num_steps = FIRST_STEPS + num_turns * (chosen.warm_up_steps + steps_of(chosen, model))
    if model == "gpt":
        return Job(model, chosen.gpt_layers, chosen.gpt_width, chosen.batch, num_steps)
    return Job(model, chosen.mlp_layers, chosen.mlp_width, chosen.batch, num_steps)


def steps_of(chosen: Namespace, model: str) -> int:
    return int(chosen.gpt_steps if model == "gpt" else chosen.mlp_steps)


def measure_speed(chosen: Namespace, console: Console, model: str) -> dict[str, list[float]]:
    """Samples per second of every system, by round."""
    job, num_steps = job_of(chosen, model, chosen.repeats), steps_of(chosen, model)
    names = [name for name, system in chosen.systems.items() if system.in_speed]
    rates: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack, console.status("") as status:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        fleets: dict[str, Fleet] = {}
        for name in names:
            status.update(f"{model}: starts {SYSTEMS[name].label}")
            fleets[name] = stack.enter_context(running(SYSTEMS[name], job, folder))
            fleets[name].take_turn(FIRST_STEPS)
        for number, name in product(range(chosen.repeats), names):
            status.update(f"{model}: round {number + 1}, {SYSTEMS[name].label}")
            fleets[name].take_turn(chosen.warm_up_steps)
            rates[name].append(rate(fleets[name].take_turn(num_steps), job))
            if name == names[-1]:
                line = ", ".join(f"{key} {values[-1]:.4g}" for key, values in rates.items())
                place = f"{model}, round {number + 1} of {chosen.repeats}"
                console.print(f"{place}, samples/s: {line}", highlight=False)
        for name in names:
            status.update(f"{model}: ends {SYSTEMS[name].label}")
            fleets[name].finish()
    return rates


def rate(turn: Turn, job: Job) -> float:
    return turn.num_steps * job.batch / turn.seconds


def speed_rows(model: str, rates: Mapping[str, Sequence[float]]) -> list[Row]:
    rows = []
    for name, own in rates.items():
        base = rates.get(YARDSTICK, [])
        ratios = [ours / other for ours, other in zip(own, base, strict=False)]
        rows.append(
            {
                "model": model,
                "system": name,
                "samples_per_second": round(median(own), 1),
                "extremes": [round(min(own), 1), round(max(own), 1)],
                "of_ddp": round(median(ratios), 3) if ratios else None,
                "of_ddp_extremes": [round(each(ratios), 3) for each in (min, max) if ratios],
                "rounds": [round(each, 1) for each in own],
            }
        )
    return rows


def measure_memory(chosen: Namespace, console: Console) -> Iterator[Row]:
    """The row of every system. Each runs alone."""
    width = chosen.memory_width
    layers = max(1, round(chosen.memory_mib * MIB / (4 * width * (width + 1))))
    job = Job("mlp", layers, width, chosen.memory_batch, chosen.memory_steps)
    with tempfile.TemporaryDirectory() as folder, console.status("memory: no training"):
        bare = {
            system.is_staged: take_up(staged, job._replace(num_steps=1), folder)
            for system, staged in ((SYSTEMS["one"], BARE), (SYSTEMS["stages2"], BARE_STAGED))
        }
        for name, system in chosen.systems.items():
            if not system.in_memory:
                continue
            with console.status(f"memory: {system.label}"):
                [nothing] = bare[system.is_staged]
                row = memory_row(name, nothing["last_peak_bytes"], take_up(system, job, folder))
            peak, must = row["peak_mib"], row["must_mib"]
            line = f"memory, {system.label}: {peak:.0f} MiB, must {must:.0f}"
            console.print(line, highlight=False)
            yield row


def take_up(system: System, job: Job, folder: str) -> list[Row]:
    """What its workers say after all steps."""
    with running(system, job, folder) as fleet:
        fleet.take_turn(job.num_steps)
        return fleet.finish()


# -- What is printed -------------------------------------------------------------------------------


def cell(value: object) -> str:
    if isinstance(value, list):
        return "–".join(f"{each:.4g}" for each in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "n/a" if value is None else str(value)


def draw(title: str, headings: str, keys: Sequence[str], rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("system", min_width=max(len(each.label) for each in SYSTEMS.values()))
    for heading in headings.split("|"):
        table.add_column(heading, justify="right", min_width=len(heading))
    for row in rows:
        table.add_row(SYSTEMS[row["system"]].label, *(cell(row[key]) for key in keys))
    return table


def draw_speed(chosen: Namespace, model: str, rows: Sequence[Row]) -> Table:
    title = f"{model}, {chosen.batch} samples in a step of all workers"
    keys = ["samples_per_second", "extremes", "of_ddp", "of_ddp_extremes"]
    return draw(title, "samples/s|min–max|of DDP|min–max", keys, rows)


def draw_memory(rows: Sequence[Row]) -> Table:
    kinds = ["parameters", "gradients", "flat_gradients", "optimizer_state", "other"]
    keys = ["share", "must_mib", *(f"{kind}_mib" for kind in kinds)]
    keys += ["held_of_must", "unused_mib", "peak_mib", "peak_of_must", "peak_of_layers"]
    headings = "share|must|param.|grad.|flat|state|other|held/must|unused|peak|peak/must|of layers"
    return draw("Memory of a worker, MiB", headings, keys, rows)


def targets(speed: Sequence[Row], memory: Sequence[Row]) -> list[Row]:
    """What is wanted, and what came out."""
    rows = [row for row in speed if row["system"] == JUDGED and row["of_ddp"] is not None]
    wanted = [
        {"what": f"all-reduce, {row['model']}, of DDP", "value": row["of_ddp"], "at_least": REACH}
        | {"met": row["of_ddp"] >= REACH}
        for row in rows
    ]
    for row in memory:
        system, value = SYSTEMS[row["system"]], row["peak_of_layers"]
        if system.is_staged:
            what = f"{system.label}, peak of what its layers take"
            wanted.append({"what": what, "value": value, "at_most": MOST, "met": value <= MOST})
    return wanted


def tell(wanted: Sequence[Row]) -> list[str]:
    return [
        f"{'met' if each['met'] else 'NOT MET'}: {each['what']} {each['value']:.3f}, wanted "
        + (f"at least {REACH:g}" if "at_least" in each else f"at most {MOST:g}")
        for each in wanted
    ]


# -- Command line ----------------------------------------------------------------------------------


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse() -> Namespace:
    cli = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=Formatter)
    add = cli.add_argument
    add("--systems", default=",".join(SYSTEMS), metavar="NAME,...", help="what to compare")
    add("--models", default="gpt,mlp", metavar="NAME,...", help="to measure the speed of")
    add("--repeats", type=int, default=5, help="rounds in which every system has a turn")
    add("--batch", type=int, default=32, help="samples in a step, all workers together")
    add("--warm-up-steps", type=int, default=2, help="of a turn, which do not count")
    add("--gpt-steps", type=int, default=10, help="of a turn, which count")
    add("--mlp-steps", type=int, default=5, help="the same")
    add("--gpt-layers", type=int, default=4, help="transformer blocks")
    add("--gpt-width", type=int, default=128, help="features of a character")
    add("--mlp-layers", type=int, default=4, help="linear ones")
    add("--mlp-width", type=int, default=2048, help="features of all of them")
    add("--memory-mib", type=int, default=512, help="parameters of the mlp there; 0: no memory")
    add("--memory-width", type=int, default=1024, help="features of all its layers")
    add("--memory-batch", type=int, default=16, help="samples in a step there")
    add("--memory-steps", type=int, default=4, help="there")
    add("--json", type=Path, metavar="FILE", help="write the result there, too")
    add("--check", action="store_true", help=f"exit with 1 if all-reduce is below {REACH:g} of DDP")
    add("--quick", action="store_true", help="few steps: shows that it runs, nothing else")
    chosen = cli.parse_args()
    vars(chosen).update(QUICK if chosen.quick else {})
    chosen.models = [name for name in chosen.models.split(",") if name]
    names = chosen.systems.split(",")
    if not SYSTEMS.keys() >= set(names) or not {"gpt", "mlp"} >= set(chosen.models):
        cli.error(f"systems are {', '.join(SYSTEMS)}; models are gpt, mlp")
    if chosen.check and not {YARDSTICK, JUDGED} <= set(names):
        cli.error(f"--check needs {JUDGED} and {YARDSTICK} in --systems")
    if min(chosen.repeats, chosen.warm_up_steps, chosen.gpt_steps, chosen.mlp_steps) < 1:
        cli.error("a number is too small")
    if chosen.batch % 2 or min(chosen.batch, chosen.memory_batch, chosen.memory_steps) < 1:
        cli.error("the batch must be even, for two workers")
    chosen.systems = {name: system for name, system in SYSTEMS.items() if name in names}
    return chosen


def save(chosen: Namespace, loads: Sequence[float], tables: Mapping[str, object]) -> None:
    document = {name: value for name, value in vars(chosen).items() if name not in UNSAVED}
    document |= {"systems": list(chosen.systems), "machine": facts()}
    document |= {"load_average": [round(load, 1) for load in loads], **tables}
    chosen.json.write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    chosen = parse()
    console = Console(width=max(WIDTH, Console().width))
    loads, started = [os.getloadavg()[0]], time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that processes are ended then, too
    speed: list[Row] = []
    for model in chosen.models:
        speed += speed_rows(model, measure_speed(chosen, console, model))
        loads.append(os.getloadavg()[0])
    memory = list(measure_memory(chosen, console)) if chosen.memory_mib else []
    loads.append(os.getloadavg()[0])
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes", highlight=False)
    for model in chosen.models:
        rows = [row for row in speed if row["model"] == model]
        console.print(draw_speed(chosen, model, rows), "")
    if memory:
        console.print(draw_memory(memory), "")
    wanted = targets(speed, memory)
    console.print(*tell(wanted), sep="\n", highlight=False)
    if chosen.json:
        save(chosen, loads, {"speed": speed, "memory": memory, "targets": wanted})
    is_fast = all(each["met"] for each in wanted if "at_least" in each)
    return int(chosen.check and not is_fast)


if __name__ == "__main__":
    sys.exit(main())
