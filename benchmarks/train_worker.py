"""What one worker of benchmarks/train.py does: the script that all its systems run.

benchmarks/train.py is at the other end of `--control`: it says how many steps to take and when, so
that only one system computes at a time.
"""

import argparse
import importlib
import itertools
import json
import os
import runpy
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, Sampler, TensorDataset

sys.path.append(str(Path(__file__).parent.parent))  # this file is run by its path

import shardline
from benchmarks.train_memory import held_bytes, peak_bytes, unused_bytes
from shardline.model_steps import Loss

GPT = Path(__file__).parent.parent / "examples" / "gpt.py"
CONTEXT, ALPHABET = 64, 96
LEARNING_RATE = 1e-4
SPARE_STEPS = 8  # data for so many more: in async a worker asks for some before the others
CONNECT_SECONDS = 60.0
ORDER_SECONDS = 3600.0  # while all other systems have their turn
Batch = Sequence[Tensor]


# -- Orders ----------------------------------------------------------------------------------------


class Turns:
    """This worker's end of the control connection. Lines of JSON go both ways."""

    def __init__(self, port: int) -> None:
        """Says hello. Blocks for a bounded time."""
        self._socket = socket.create_connection(("127.0.0.1", port), CONNECT_SECONDS)
        self._socket.settimeout(ORDER_SECONDS)
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self.tell(pid=os.getpid())

    def tell(self, **values: object) -> None:
        self._socket.sendall(json.dumps(values).encode() + b"\n")

    def begin(self) -> bool:
        """Wait for the next turn; False: there is none, the training is over."""
        line = self._lines.readline()
        if not line:
            raise RuntimeError("benchmarks/train.py is gone")
        self._num_left = int(json.loads(line)["steps"])
        self._begin_seconds = time.monotonic()
        return self._num_left > 0

    def step_done(self) -> bool:
        """Count a step, and tell when the turn is over. False: take no more."""
        self._num_left -= 1
        if self._num_left:
            return True
        self.tell(begin=self._begin_seconds, end=time.monotonic())
        return self.begin()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


# -- What is trained -------------------------------------------------------------------------------


class Task(NamedTuple):
    build: Callable[[], nn.Module]
    loss_fn: Loss
    data: TensorDataset


def gpt(chosen: Namespace, num_samples: int) -> Task:
    """The model of examples/gpt.py; random characters."""
    example = runpy.run_path(str(GPT))
    text = torch.randint(ALPHABET, (num_samples, CONTEXT + 1), generator=_generator())
    data = TensorDataset(text[:, :-1], text[:, 1:])

    def build() -> nn.Module:
        model: nn.Module = example["gpt"](chosen.layers, chosen.width, 4, CONTEXT)
        return model

    return Task(build, example["mean_loss"], data)


def mlp(chosen: Namespace, num_samples: int) -> Task:
    """Square layers; as many classes as the last one is wide."""
    width = chosen.width

    def build() -> nn.Module:
        pairs = [(nn.Linear(width, width), nn.ReLU()) for _ in range(chosen.layers)]
        return nn.Sequential(*list(itertools.chain(*pairs))[:-1])

    inputs = torch.randn(num_samples, width, generator=_generator())
    classes = torch.randint(width, (num_samples,), generator=_generator())
    return Task(build, F.cross_entropy, TensorDataset(inputs, classes))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


TASKS = {"gpt": gpt, "mlp": mlp}


def task_of(chosen: Namespace) -> Task:
    return TASKS[chosen.model](chosen, (chosen.steps + SPARE_STEPS) * chosen.batch)


# -- How -------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    step: Callable[[Batch], object],
    turns: Turns,
) -> None:
    """Take steps as told, then tell what this worker holds: gradients of the last step, too."""
    if not turns.begin():
        return
    for batch in batches:
        optimizer.zero_grad()
        step(batch)
        optimizer.step()
        if not turns.step_done():
            break
    else:
        raise RuntimeError("there is too little data")
    parameters = list(model.parameters())
    turns.tell(
        whole_bytes=sum(each.nbytes for each in parameters),
        own_bytes=sum(each.nbytes for each in parameters if not each.is_meta),
        peak_bytes=peak_bytes(),
        held_bytes=held_bytes(parameters),
        unused_bytes=unused_bytes(),
    )


def train_plain(chosen: Namespace, turns: Turns) -> None:
    """torch alone; several workers under DistributedDataParallel. The fused kernel of AdamW is
    what shardline chooses by itself.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = task_of(chosen)
    whole = model = task.build()
    sampler: Sampler[int] = RandomSampler(task.data)
    if chosen.workers > 1:
        from torch.distributed import init_process_group
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data import DistributedSampler

        url, limit = f"tcp://127.0.0.1:{chosen.gloo_port}", timedelta(seconds=CONNECT_SECONDS)
        init_process_group("gloo", url, limit, chosen.workers, chosen.rank)
        model = DistributedDataParallel(whole)
        sampler = DistributedSampler(task.data, chosen.workers, chosen.rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    batches = DataLoader(task.data, chosen.batch // chosen.workers, sampler=sampler)

    def step(batch: Batch) -> None:
        inputs, target = batch
        task.loss_fn(model(inputs), target).backward()

    train(whole, optimizer, batches, step, turns)
    if chosen.workers > 1:
        torch.distributed.barrier()  # nobody leaves while another still sends


def train_shared(chosen: Namespace, turns: Turns) -> None:
    """As a user writes it; `shardline run` says which system this is."""
    task = task_of(chosen)
    with shardline.connect() as session:
        torch.manual_seed(session.seed)
        with session.model():
            model = task.build().to(session.device)
        optimizer = session.optimizer(
            torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), model
        )
        step = session.step(model, task.loss_fn, overlap=chosen.overlap)
        batches = session.loader(task.data, batch_size=chosen.batch // session.world_size)
        for _ in session.epochs(1):
            train(model, optimizer, batches, step, turns)


def do_nothing(chosen: Namespace, turns: Turns) -> None:
    """Import what the others do, and take a step that needs no memory."""
    if chosen.kind == "bare-staged":
        importlib.import_module("torch.distributed.pipelining")
    torch.set_num_threads(1)
    chosen.width = chosen.layers = 1
    task = mlp(chosen, 2)
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(batch: Batch) -> None:
        inputs, target = batch
        task.loss_fn(model(inputs), target).backward()

    train(model, optimizer, DataLoader(task.data), step, turns)


KINDS: dict[str, Callable[[Namespace, Turns], None]] = {
    "plain": train_plain,
    "shardline": train_shared,
    "bare": do_nothing,
    "bare-staged": do_nothing,
}


def parse() -> Namespace:
    cli = argparse.ArgumentParser(description=__doc__)
    add: Callable[..., Any] = cli.add_argument
    add("--kind", choices=KINDS, required=True)
    add("--model", choices=TASKS, required=True)
    for name in ("layers", "width", "batch", "steps", "control"):
        add(f"--{name}", type=int, required=True)
    add("--overlap", action="store_true")
    for name, default in (("rank", 0), ("workers", 1), ("gloo-port", 0)):
        add(f"--{name}", type=int, default=default)
    return cli.parse_args()


def main() -> None:
    chosen = parse()
    turns = Turns(chosen.control)
    KINDS[chosen.kind](chosen, turns)
    turns.tell(peak_bytes=peak_bytes())
    turns.close()


if __name__ == "__main__":
    main()
