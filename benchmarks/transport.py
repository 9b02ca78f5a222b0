"""Threads or asyncio: which grpcio API moves parts between workers and shards faster?

In a step every worker sends 64 MiB as 4 MiB frames, half to each of two shards. A shard sums a
frame once it came from all workers, steps, and answers each with the updated 4 MiB of parameters.
In the server `threads` a reader per stream decodes and one shard thread owns the state; in
`asyncio` the loop does it all; in `asyncio+thread` the loop hands over to one shard thread.
"""

import argparse
import asyncio
import json
import multiprocessing
import signal
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise, product
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any, NamedTuple

import grpc
import torch
from google.protobuf import descriptor_pb2, message_factory, text_format
from rich.console import Console
from rich.table import Table
from torch import Tensor

FRAME_BYTES = 4 << 20
ADDRESSES = ["127.0.0.1:29501", "127.0.0.1:29502"]  # of the shards
SHAPE = NUM_SHARDS, NUM_FRAMES, FRAME_NUMEL = 2, 8, FRAME_BYTES // 4
NUM_WARM_UP_STEPS = 3
LIMIT_SECONDS = 90.0  # for any single wait
OPTIONS = ["grpc.max_send_message_length=16777216", "grpc.max_receive_message_length=16777216"]
OPTIONS += ["grpc.http2.max_frame_size=16777215"]
PART_FILE = """name: "part" package: "bench" syntax: "proto3" message_type { name: "Part"
    field { name: "step" number: 1 type: TYPE_UINT32 label: LABEL_OPTIONAL }
    field { name: "index" number: 2 type: TYPE_UINT32 label: LABEL_OPTIONAL }
    field { name: "data" number: 3 type: TYPE_BYTES label: LABEL_OPTIONAL } }"""
FILES = [text_format.Parse(PART_FILE, descriptor_pb2.FileDescriptorProto())]
Part: Any = message_factory.GetMessages(FILES)["bench.Part"]
# The tag and the length of `data`: with them a frame is joined with a single copy of its values.
DATA_PREFIX = Part(data=bytes(FRAME_BYTES)).SerializeToString()[:-FRAME_BYTES]
processes = multiprocessing.get_context("forkserver")
Reply = Callable[[bytes], object]


class Variant(NamedTuple):
    num_workers: int
    server: str
    client: str
    num_steps: int
    options: list[tuple[str, int | str]]


def encode(step: int, index: int, values: Tensor) -> bytes:
    array: Any = values.numpy()
    header = Part(step=step, index=index).SerializeToString()
    return b"".join((header, DATA_PREFIX, memoryview(array)))


def values_of(part: Any) -> Tensor:
    return torch.frombuffer(part.data, dtype=torch.float32)


class Shard:
    """The state of one shard; only one thread, or the loop, may call `add`."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.params, self.total = torch.zeros(SHAPE[1:]), torch.empty(FRAME_NUMEL)
        self.waiting: list[list[tuple[Any, Reply]]] = [[] for _ in range(NUM_FRAMES)]

    def add(self, part: Any, reply: Reply) -> None:
        """Keep one worker's part; with the last one of its index, update and answer them all."""
        arrived = self.waiting[part.index]
        arrived.append((part, reply))
        if len(arrived) < self.num_workers:
            return
        self.waiting[part.index] = []
        total, *others = (values_of(part) for part, _ in arrived)
        for other in others:
            total = torch.add(total, other, out=self.total)
        answer = encode(part.step, part.index, self.params[part.index].add_(total, alpha=-1.0))
        for _, send in arrived:
            send(answer)


def listen(server: Any, exchange: Any, address: str) -> None:
    method: Any = grpc.stream_stream_rpc_method_handler(exchange)
    handler = grpc.method_handlers_generic_handler("Shard", {"Exchange": method})
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(address)


def serve_threads(variant: Variant, address: str) -> None:
    shard, thread = Shard(variant.num_workers), ThreadPoolExecutor(1)  # the shard thread
    ended = threading.Semaphore(0)

    def exchange(frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        replies: SimpleQueue[bytes | None] = SimpleQueue()

        def read() -> None:
            for frame in frames:
                thread.submit(shard.add, Part.FromString(frame), replies.put)
            replies.put(None)
            ended.release()

        threading.Thread(target=read, daemon=True).start()
        return iter(replies.get, None)

    server = grpc.server(ThreadPoolExecutor(variant.num_workers), options=variant.options)
    listen(server, exchange, address)
    server.start()
    for _ in range(variant.num_workers):
        ended.acquire()
    server.stop(LIMIT_SECONDS).wait()


async def serve_asyncio(variant: Variant, address: str) -> None:
    shard, loop = Shard(variant.num_workers), asyncio.get_running_loop()
    ended, thread = asyncio.Semaphore(0), ThreadPoolExecutor(1)

    async def exchange(frames: AsyncIterator[bytes], context: Any) -> None:
        replies: asyncio.Queue[bytes | None] = asyncio.Queue()

        def put(answer: bytes) -> object:
            return loop.call_soon_threadsafe(replies.put_nowait, answer)

        async def read() -> None:
            async for frame in frames:
                part = Part.FromString(frame)
                if variant.server == "asyncio":
                    shard.add(part, replies.put_nowait)
                else:
                    thread.submit(shard.add, part, put)
            replies.put_nowait(None)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            while (answer := await replies.get()) is not None:
                await context.write(answer)
        ended.release()

    server = grpc.aio.server(options=variant.options)
    listen(server, exchange, address)
    await server.start()
    for _ in range(variant.num_workers):
        await ended.acquire()
    await server.stop(LIMIT_SECONDS)


def store(frame: bytes, params: Tensor) -> None:
    part = Part.FromString(frame)
    params[part.index].copy_(values_of(part))


def work_threads(variant: Variant, gradient: Tensor, params: Tensor) -> list[float]:
    def frames(shard: int) -> Iterator[bytes]:
        for step in iter(steps[shard].get, None):
            yield from (encode(step, index, part) for index, part in enumerate(gradient[shard]))

    def receive(shard: int) -> None:
        for answer in islice(answers[shard], NUM_FRAMES):
            store(answer, params[shard])

    steps: list[SimpleQueue[int | None]] = [SimpleQueue() for _ in ADDRESSES]
    channels: list[Any] = [grpc.insecure_channel(a, variant.options) for a in ADDRESSES]
    calls = [channel.stream_stream("/Shard/Exchange") for channel in channels]
    answers = [call(frames(shard), wait_for_ready=True) for shard, call in enumerate(calls)]
    ends_seconds = []
    with ThreadPoolExecutor(NUM_SHARDS) as pool:
        for step in range(variant.num_steps):
            for shard_steps in steps:
                shard_steps.put(step)
            list(pool.map(receive, range(NUM_SHARDS)))
            ends_seconds.append(time.monotonic())
    for shard, shard_steps in enumerate(steps):
        shard_steps.put(None)
        list(answers[shard])  # none, but the shard has ended the stream
    return ends_seconds


async def work_asyncio(variant: Variant, gradient: Tensor, params: Tensor) -> list[float]:
    async def send(call: Any, step: int, shard: int) -> None:
        for index, part in enumerate(gradient[shard]):
            await call.write(encode(step, index, part))

    async def receive(call: Any, shard: int) -> None:
        for _ in range(NUM_FRAMES):
            store(await call.read(), params[shard])

    channels: list[Any] = [grpc.aio.insecure_channel(a, variant.options) for a in ADDRESSES]
    calls = [c.stream_stream("/Shard/Exchange")(wait_for_ready=True) for c in channels]
    ends_seconds = []
    for step in range(variant.num_steps):
        async with asyncio.TaskGroup() as tasks:
            for shard, call in enumerate(calls):
                tasks.create_task(send(call, step, shard))
                tasks.create_task(receive(call, shard))
        ends_seconds.append(time.monotonic())
    for call in calls:
        await call.done_writing()
        await call.code()  # the shard has ended the stream
    return ends_seconds


def serve(variant: Variant, address: str) -> float:
    if variant.server == "threads":
        serve_threads(variant, address)
    else:
        asyncio.run(serve_asyncio(variant, address))
    return time.process_time()


def work(variant: Variant) -> tuple[list[float], float]:
    """The ends of the steps, by the clock that all processes share, and the CPU seconds."""
    run = (variant, torch.ones(SHAPE), params := torch.zeros(SHAPE))
    threads = variant.client == "threads"
    ends_seconds = work_threads(*run) if threads else asyncio.run(work_asyncio(*run))
    if (params != -variant.num_workers * variant.num_steps).any():
        raise RuntimeError("the parameters are not the sum of all gradients")
    return ends_seconds, time.process_time()


def measure(variant: Variant) -> dict[str, list[float]]:
    """Milliseconds of every measured step; CPU milliseconds per step of all shards, all workers."""
    with processes.Pool(NUM_SHARDS + variant.num_workers, torch.set_num_threads, (1,)) as pool:
        shards = [pool.apply_async(serve, (variant, address)) for address in ADDRESSES]
        workers = [pool.apply_async(work, (variant,)) for _ in range(variant.num_workers)]
        ends, worker_cpu = zip(*(worker.get(LIMIT_SECONDS) for worker in workers), strict=True)
        shard_cpu = sum(shard.get(LIMIT_SECONDS) for shard in shards)
    pool.join()
    last_ends = [max(step) for step in zip(*ends, strict=True)][NUM_WARM_UP_STEPS - 1 :]
    return {
        "step_ms": [(end - start) * 1e3 for start, end in pairwise(last_ends)],
        "shard_cpu_ms": [shard_cpu / variant.num_steps * 1e3],
        "worker_cpu_ms": [sum(worker_cpu) / variant.num_steps * 1e3],
    }


def main() -> None:
    example = "example: python benchmarks/transport.py --workers 1 2 --json transport.json"
    formatter = argparse.RawDescriptionHelpFormatter
    cli = argparse.ArgumentParser(description=__doc__, epilog=example, formatter_class=formatter)
    cli.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    cli.add_argument("--servers", nargs="+", default=["threads", "asyncio", "asyncio+thread"])
    cli.add_argument("--clients", nargs="+", default=["threads", "asyncio"])
    cli.add_argument("--rounds", type=int, default=3, help="a round runs every variant once")
    cli.add_argument("--steps", type=int, default=8, help="measured steps in a round")
    cli.add_argument("--option", action="append", default=OPTIONS, metavar="NAME=VALUE")
    cli.add_argument("--json", type=Path, metavar="FILE")
    chosen = cli.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that processes are ended then, too
    processes.set_forkserver_preload(["torch", "grpc.aio"])
    settings = (option.split("=", 1) for option in chosen.option)
    options = {name: int(value) if value.isdigit() else value for name, value in settings}
    steps = chosen.steps + NUM_WARM_UP_STEPS
    kinds = list(product(chosen.workers, chosen.servers, chosen.clients))
    runs: dict[Any, list[dict[str, list[float]]]] = {kind: [] for kind in kinds}
    for workers, server, client in kinds * chosen.rounds:
        variant = Variant(workers, server, client, steps, list(options.items()))
        runs[variant[:3]].append(measure(variant))

    rows: list[dict[str, Any]] = []
    for kind, rounds in runs.items():
        row = dict(zip(("workers", "server", "client"), kind, strict=True))
        row |= {name: round(median(x for r in rounds for x in r[name]), 1) for name in rounds[0]}
        row["rounds_ms"] = [round(median(r["step_ms"]), 1) for r in rounds]
        first = next((other for other in rows if other["workers"] == kind[0]), row)
        pairs = zip(row["rounds_ms"], first["rounds_ms"], strict=True)  # shared noise cancels out
        rows.append({"ratio": round(median(a / b for a, b in pairs), 2)} | row)
    columns = ["workers", "server", "client", "step_ms", "ratio", "shard_cpu_ms", "worker_cpu_ms"]
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)
    if chosen.json:
        chosen.json.write_text(json.dumps({"options": options, "rows": rows}, indent=1) + "\n")


warnings.filterwarnings("ignore", "The given buffer is not writable")
if __name__ == "__main__":
    main()
