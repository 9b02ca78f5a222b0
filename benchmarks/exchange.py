"""What does one dense step cost, beside an all-reduce of the same bytes?

In a step every one of W workers hands over 64 MiB of fp32 gradients and ends up holding the 64 MiB
of updated parameters. Shards run `python -m ps_server` with SGD, on this machine like the workers,
whose gradients lie in the buckets already: measured is from `begin` to the end of `settle`. After
each step the same workers all-reduce a tensor of the same size with Gloo, so that noise hits both.
A step lasts from the first worker's begin to the last one's end. GB/s counts what all workers hand
over and what they end up with. Other settings come from SHARDLINE_* variables.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from itertools import product
from multiprocessing.pool import AsyncResult
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple, TypeAlias

import torch.distributed
from rich.console import Console
from rich.table import Table

from ps_core import config as settings
from ps_core.buckets import make_buckets
from ps_core.exchange import Arrival, Purpose, Work
from ps_core.extras import Extras
from ps_core.metrics import WorkerMetrics
from ps_core.optim_spec import describe, read_groups
from ps_core.plan import ParameterSpec, make_plan
from ps_core.settings import ClusterConfig, Config, MetricsConfig, ServerConfig
from ps_worker.exchange import ParameterServerExchange
from shardline.ports import free_ports

MIB = 2**20
SHARDLINE, GLOO = "shardline", "Gloo"
NUM_WARM_UP_STEPS = 3
START_SECONDS = 60.0  # for processes to start, and to end
STEP_SECONDS = 5.0  # no step may take longer, on average
Result: TypeAlias = "AsyncResult[Measured]"
Process = subprocess.Popen[bytes]
processes = multiprocessing.get_context("forkserver")


class Job(NamedTuple):
    config: Config
    shard_pids: list[int]
    gloo_port: int
    num_mib: int
    num_steps: int


class Step(NamedTuple):
    start_seconds: float  # of one worker, by the clock that all processes share
    end_seconds: float
    cpu_seconds: float


class Measured(NamedTuple):
    steps: dict[str, list[Step]]  # of one worker, by system
    shard_cpu_seconds: float  # during all these steps


class Round(NamedTuple):
    step_ms: list[float]  # of one system
    worker_cpu_seconds: list[float]  # of all workers, by step
    shard_cpu_seconds: float  # of all shards, in a step


class Worker:
    """A worker that has joined; every parameter is 0 at version 0."""

    def __init__(self, config: Config, num_mib: int) -> None:
        cluster, exchange = config.cluster, config.exchange
        parameters = [torch.nn.Parameter(torch.zeros(MIB // 4)) for _ in range(num_mib)]
        specs = [ParameterSpec(f"layer{n}", torch.float32, (MIB // 4,), 0) for n in range(num_mib)]
        num_shards = len(cluster.shards)
        plan = make_plan(specs, num_shards, exchange.part_bytes, exchange.bucket_bytes)
        self.optimizer = torch.optim.SGD(parameters, lr=1.0)
        self.buckets = make_buckets(plan, parameters)
        for bucket in self.buckets:
            bucket.gradients.fill_(1.0 + cluster.rank)
            bucket.present = [True] * len(bucket.members)
        self.exchange = ParameterServerExchange(config, WorkerMetrics(cluster.rank, num_shards))
        self.exchange.join(
            plan, self.buckets, describe(self.optimizer), Extras(torch.nn.Module(), ())
        )

    def step(self, step: int) -> None:
        self.exchange.begin(step, Work(samples=1), read_groups(self.optimizer))
        for bucket in reversed(self.buckets):
            self.exchange.submit(bucket, step)
        self.exchange.settle(step)

    def leave(self, version: int, num_workers: int) -> None:
        expected = torch.tensor(-version * (1 + num_workers) / 2)  # lr 1, mean of 1 … num_workers
        if not all(torch.allclose(bucket.parameters, expected) for bucket in self.buckets):
            raise RuntimeError("the parameters are not the sum of the mean gradients")
        self.exchange.meet(Arrival(Purpose.CLOSE, version))
        self.exchange.close()


def timed(action: Callable[..., object], argument: object) -> Step:
    """CPU time of all threads counts, but not what they do after the action has returned."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    start, cpu = time.monotonic(), time.process_time()
    action(argument)
    return Step(start, time.monotonic(), time.process_time() - cpu)


def cpu_seconds(pids: Sequence[int]) -> float:
    """Used by these processes so far; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0.0
    # After the name in parentheses, fields are separated by blanks: utime and stime are 14 and 15.
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def work(job: Job, rank: int) -> Measured:
    logging.disable(logging.WARNING)  # workers may be there before the shards
    num_workers, limit = job.config.cluster.num_workers, timedelta(seconds=START_SECONDS)
    config = replace(job.config, cluster=replace(job.config.cluster, rank=rank))
    worker, tensor = Worker(config, job.num_mib), torch.empty(job.num_mib * MIB // 4)
    steps: dict[str, list[Step]] = {SHARDLINE: []}
    if num_workers > 1:
        steps[GLOO], url = [], f"tcp://127.0.0.1:{job.gloo_port}"
        torch.distributed.init_process_group("gloo", url, limit, num_workers, rank)
    last, shard_cpu = NUM_WARM_UP_STEPS + job.num_steps, 0.0
    for number in range(last):
        if number == NUM_WARM_UP_STEPS:
            shard_cpu = cpu_seconds(job.shard_pids)
        steps[SHARDLINE].append(timed(worker.step, number))
        if num_workers > 1:
            tensor.fill_(1.0)
            steps[GLOO].append(timed(torch.distributed.all_reduce, tensor))
            if tensor[-1] != num_workers:
                raise RuntimeError("the tensor is not the sum over all workers")
    shard_cpu = cpu_seconds(job.shard_pids) - shard_cpu
    worker.leave(last, num_workers)
    return Measured({name: each[NUM_WARM_UP_STEPS:] for name, each in steps.items()}, shard_cpu)


@contextlib.contextmanager
def running_shard(config: Config, index: int) -> Iterator[Process]:
    """A shard, which ends by itself once its job is complete."""
    own = settings.to_environment(replace(config, server=ServerConfig(index=index)))
    command, env = [sys.executable, "-m", "ps_server"], settings.inherited_environment() | own
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield process
            process.wait(START_SECONDS)
        finally:
            process.terminate()
            try:
                process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            if process.wait():
                log.seek(0)
                sys.stderr.write(f"shard {index}:\n{log.read().decode(errors='replace')}")


def results_of(calls: list[Result], shards: list[Process], wait_seconds: float) -> list[Measured]:
    """Wait for all workers. The first failure, also of a shard, is raised."""
    deadline = time.monotonic() + wait_seconds
    while not all(call.ready() for call in calls):
        for call in (each for each in calls if each.ready()):
            call.get()
        if any(shard.poll() for shard in shards):
            raise RuntimeError("a shard has failed")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the steps are not done after {wait_seconds:g} s")
        time.sleep(0.1)
    return [call.get() for call in calls]


def measure(chosen: Namespace, base: Config, num_workers: int) -> dict[str, Round]:
    """Both systems, in processes of their own."""
    gloo_port, *ports = free_ports(1 + chosen.shards)
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)
    config = replace(base, cluster=ClusterConfig(addresses, num_workers=num_workers))
    wait_seconds = START_SECONDS + STEP_SECONDS * (chosen.steps + NUM_WARM_UP_STEPS)
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(running_shard(config, n)) for n in range(chosen.shards)]
        pids, size = [shard.pid for shard in shards], (chosen.megabytes, chosen.steps)
        job = Job(config, pids, gloo_port, *size)
        with processes.Pool(num_workers, torch.set_num_threads, (1,)) as pool:
            calls = [pool.apply_async(work, (job, rank)) for rank in range(num_workers)]
            results = results_of(calls, shards, wait_seconds)
        pool.join()
    return {system: one_round(system, results, chosen.steps) for system in results[0].steps}


def one_round(system: str, workers: Sequence[Measured], num_steps: int) -> Round:
    steps = list(zip(*(worker.steps[system] for worker in workers), strict=True))
    begins = [min(each.start_seconds for each in step) for step in steps]
    ends = [max(each.end_seconds for each in step) for step in steps]
    shard_cpu = workers[0].shard_cpu_seconds / num_steps if system == SHARDLINE else 0.0
    cpu = [sum(each.cpu_seconds for each in step) for step in steps]
    return Round([(b - a) * 1e3 for a, b in zip(begins, ends, strict=True)], cpu, shard_cpu)


def summarize(rounds: Sequence[Round], base: Sequence[Round], num_mib: int) -> dict[str, object]:
    """The numbers of one row; `base` are the same rounds of Gloo, none with one worker."""
    step_ms = [each for one in rounds for each in one.step_ms]
    rounds_ms, base_ms = ([median(one.step_ms) for one in each] for each in (rounds, base))
    ratios = [ours / other for ours, other in zip(rounds_ms, base_ms, strict=False)]
    first, middle, third = quantiles(step_ms, n=4, method="inclusive")
    return {
        "median_ms": round(middle, 1),
        "quartiles_ms": [round(first, 1), round(third, 1)],
        "extremes_ms": [round(min(step_ms), 1), round(max(step_ms), 1)],
        "ratio": round(median(ratios), 2) if ratios else None,
        "gb_per_second": round(2 * num_mib * MIB / 1e6 / middle, 2),
        "worker_cpu_seconds": round(median(x for r in rounds for x in r.worker_cpu_seconds), 3),
        "shard_cpu_seconds": round(median(r.shard_cpu_seconds for r in rounds), 3),
        "rounds_ms": [round(each, 1) for each in rounds_ms],
        "rounds_ratio": [round(each, 2) for each in ratios],
    }


def cell(value: object) -> str:
    if isinstance(value, list):
        return "–".join(f"{each:.0f}" for each in value)
    return "n/a" if value is None else str(value)


def draw(rows: Sequence[dict[str, object]]) -> Table:
    headings = "W|system|median ms|IQR|min–max|ratio|GB/s|CPU s, workers|CPU s, shards"
    table = Table(*headings.split("|"), title="One dense step", box=None)
    for row in rows:
        table.add_row(*map(cell, list(row.values())[: len(table.columns)]))
    return table


def facts() -> dict[str, object]:
    here = {"num_cpus": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}
    packages = {name: version(name) for name in ("torch", "grpcio", "protobuf")}
    return {**here, "python": platform.python_version(), **packages}


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def parse() -> Namespace:
    example = "example: python benchmarks/exchange.py --workers 2 --steps 30 --json exchange.json"
    formatter = argparse.RawDescriptionHelpFormatter
    cli = argparse.ArgumentParser(description=__doc__, epilog=example, formatter_class=formatter)
    cli.add_argument("--workers", type=numbers, default=[1, 2, 4], metavar="W,...")
    cli.add_argument("--megabytes", type=int, default=64, help="MiB of gradients per worker")
    cli.add_argument("--shards", type=int, default=2)
    cli.add_argument("--steps", type=int, default=15, help="measured steps in a round, at least 2")
    cli.add_argument("--rounds", type=int, default=3, help="a round runs every W once")
    cli.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    chosen = cli.parse_args()
    if min(*chosen.workers, chosen.megabytes, chosen.shards, chosen.steps - 1, chosen.rounds) < 1:
        cli.error("a number is too small")
    return chosen


def main() -> None:
    chosen, base, loads = parse(), settings.load(), [os.getloadavg()[0]]
    base = replace(base, metrics=MetricsConfig(port=-1))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that processes are ended then, too
    processes.set_forkserver_preload(["torch.distributed", "ps_worker.exchange"])
    runs: dict[tuple[int, str], list[Round]] = {}
    for number, num_workers in product(range(chosen.rounds), chosen.workers):
        for system, one in measure(chosen, base, num_workers).items():
            runs.setdefault((num_workers, system), []).append(one)
            step = f"W={num_workers}, {system}: {median(one.step_ms):.1f} ms"
            print(f"round {number + 1} of {chosen.rounds}, {step}", flush=True)
        loads.append(os.getloadavg()[0])
    rows: list[dict[str, object]] = []
    for (num_workers, system), rounds in runs.items():
        gloo, num_mib = runs.get((num_workers, GLOO), []), num_workers * chosen.megabytes
        rows.append({"workers": num_workers, "system": system} | summarize(rounds, gloo, num_mib))
    Console().print(draw(rows))
    if chosen.json:
        document = {name: getattr(chosen, name) for name in ("megabytes", "shards", "steps")}
        document |= {"part_bytes": base.exchange.part_bytes, "machine": facts(), "rows": rows}
        document["load_average"] = [round(load, 1) for load in loads]  # first before the start
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
