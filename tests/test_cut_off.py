"""A worker that cannot reach a shard any more while all else goes on: real processes.

Each parameter has an element for every sample of every pass, and a gradient only there. So the
parameters themselves tell which samples went into them, and into which update.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file

from ps_core.settings import RpcConfig
from ps_worker.calls import describe
from shardline.ledger import Ledger
from tests.processes import PATIENCE_SECONDS, Fleet, Process, Proxy

NUM_SAMPLES: Final = 32
BATCH_SIZE: Final = 4
NUM_EPOCHS: Final = 4
NUM_PARAMETERS: Final = 4
SIZE: Final = NUM_SAMPLES * NUM_EPOCHS

SCRIPT: Final = f"""
import sys
import time
from pathlib import Path

import torch
import shardline

for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
    method.__wrapped__.__dynamo_disable = method.__wrapped__  # imports torch's compiler otherwise

folder = Path(sys.argv[1])


def wait_for(name):
    print(f"waits for {{name}}", flush=True)
    while not (folder / name).exists():
        time.sleep(0.01)


class Counts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        zeros = [torch.zeros({SIZE}, dtype=torch.float64) for _ in range({NUM_PARAMETERS})]
        self.counts = torch.nn.ParameterList(map(torch.nn.Parameter, zeros))

    def forward(self, numbers):
        return sum(count[numbers] for count in self.counts)


model, num_steps = Counts(), 0
with shardline.connect() as session:
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = session.optimizer(sgd, model)
    loader = session.loader(torch.arange({NUM_SAMPLES}), batch_size={BATCH_SIZE})
    try:
        for epoch in session.epochs({NUM_EPOCHS}):
            if session.rank == 0 and epoch == 2:
                wait_for("joined")
            for numbers in loader:
                model(numbers + epoch * {NUM_SAMPLES}).mean().backward()
                num_steps += 1
                if session.rank == 1 and num_steps == 2:
                    wait_for("cut")
                optimizer.step()
                optimizer.zero_grad()
    except Exception:
        wait_for("heard")
        raise
"""
MODES: Final[dict[str, dict[str, object]]] = {
    "sync": {"consistency.deterministic": True},
    "backup": {"consistency.backup_workers": 1},
    "async": {"consistency.mode": "async"},
    "local": {
        "consistency.mode": "local",
        "consistency.local_steps": 2,
        "consistency.outer_lr": 1.0,
        "consistency.outer_momentum": 0.0,
    },
}
CASES: Final = [
    *(("sync", shards) for shards in ((0,), (1,), (0, 1))),
    *((mode, (1,)) for mode in MODES if mode != "sync"),
]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    settings = {
        "job.run_dir": str(tmp_path),
        "exchange.part_bytes": SIZE * 8,
        "rpc.reconnect_seconds": 0.5,
    }
    with Fleet(tmp_path, num_shards=2, num_workers=2, settings=settings) as fleet:
        yield fleet


def start_worker(fleet: Fleet, rank: int, addresses: list[str]) -> Process:
    path = fleet.folder / f"train-{rank}.py"
    path.write_text(SCRIPT)
    settings = {"cluster.rank": rank, "cluster.shards": ",".join(addresses)}
    return fleet.start(f"worker {rank}", [str(path), str(fleet.folder)], settings)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "cut"), CASES, ids=lambda value: str(value))
def test_the_ledger_says_what_went_into_the_parts_of_shards_that_could_be_reached(
    fleet: Fleet, mode: str, cut: tuple[int, ...]
) -> None:
    fleet.settings.update(MODES[mode])
    patient = {"rpc.reconnect_seconds": 2}  # so that the worker is the first to give up
    shards = [fleet.shard(index, patient) for index in range(2)]
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(address)) for address in fleet.addresses]
        addresses = [proxy.address for proxy in proxies]
        workers = [start_worker(fleet, 0, fleet.addresses), start_worker(fleet, 1, addresses)]
        workers[1].wait_for("^waits for cut$")
        for shard in cut:
            proxies[shard].refuse()
        (fleet.folder / "cut").touch()
        workers[1].wait_for("^waits for heard$")
        wait_for_state(fleet, 1, {"idle", "evicted"})
        (fleet.folder / "heard").touch()
        assert workers[1].wait() == 3
        shards[0].wait_for("worker 1 is evicted")
        workers[0].wait_for("^waits for joined$")  # alone, through two passes
        for shard in cut:
            proxies[shard].take_again()
        again = start_worker(fleet, 1, addresses)
        shards[0].wait_for(rf"worker 1 joined \(pid {again.pid} ")
        (fleet.folder / "joined").touch()
        assert [process.wait() for process in (workers[0], again, *shards)] == [0, 0, 0, 0]
    check(fleet.folder)
    if mode == "sync":
        check_values(fleet.folder)


def wait_for_state(fleet: Fleet, rank: int, states: set[str]) -> None:
    """Wait until the lead says that the worker is in one of them."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        described = describe(fleet.addresses[0], RpcConfig())
        if any(each.worker.rank == rank and each.state in states for each in described.workers):
            return
        time.sleep(0.05)
    raise AssertionError(f"worker {rank} is not {' or '.join(sorted(states))}: {described}")


def read_updates(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "updates.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "update"]


def read_parameters(folder: Path) -> torch.Tensor:
    """A row for each, which is a part."""
    return torch.stack(list(load_file(folder / "model.safetensors").values()))


def numbers_of(update: dict[str, Any]) -> list[int]:
    """The elements that its samples have."""
    generator = torch.Generator().manual_seed(update["pass"])
    order = torch.randperm(NUM_SAMPLES, generator=generator).tolist()
    samples = [sample for start, stop in update["ranges"] for sample in order[start:stop]]
    return [update["pass"] * NUM_SAMPLES + sample for sample in samples]


def check(folder: Path) -> None:
    """Every sample is in all parts, or in some of them, as the ledger says."""
    states = {number: u["state"] for u in read_updates(folder) for number in numbers_of(u)}
    num_parts = (read_parameters(folder) != 0).sum(0).tolist()
    counted = ["applied" if n == NUM_PARAMETERS else "in_part" if n else "lost" for n in num_parts]
    assert [states.get(number, "lost") for number in range(SIZE)] == counted
    ledger = Ledger()
    ledger.read((folder / "updates.jsonl").read_bytes().splitlines(keepends=True))
    balance, counts = ledger.balance(), Counter(counted)
    assert (balance.samples_lost, balance.samples_repeated) == (0, 0)
    assert balance.samples_applied == counts["applied"]
    assert balance.samples_applied_in_part == counts["in_part"]
    assert counts["lost"] == 0


def check_values(folder: Path) -> None:
    """Plain SGD over the samples of each version gives every part, with the ones that were applied
    in part or without them.
    """
    updates = read_updates(folder)
    replayed = [replay([u for u in updates if u["state"] in used]) for used in (WHOLE, ALL)]
    for part in read_parameters(folder):
        assert any(torch.equal(part, values) for values in replayed)


WHOLE, ALL = ("applied",), ("applied", "in_part")


def replay(updates: list[dict[str, Any]]) -> torch.Tensor:
    values = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    sgd = torch.optim.SGD([values], lr=1.0)
    for version in sorted({update["version"] for update in updates}):
        batch = [n for u in updates if u["version"] == version for n in numbers_of(u)]
        sgd.zero_grad()
        values[batch].mean().backward()
        sgd.step()
    return values.detach()
