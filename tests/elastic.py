"""What the tests of elastic jobs share: a training script that says what it does, and an account of
its samples made from two sources, the lead's ledger and the indices that the dataset was asked for.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

NUM_SAMPLES: Final = 96
BATCH_SIZE: Final = 4
NUM_EPOCHS: Final = 12
GATE_EPOCH: Final = 2
"""Where workers wait for the test."""
HOLD_EPOCH: Final = 5
"""In the middle of which they wait until the file `hold` is gone."""

DATASET: Final = f"""\
class Squares(torch.utils.data.Dataset):
    def __init__(self, worker):
        self.log = (folder / f"read-{{worker}}.txt").open("a")

    def __len__(self):
        return {NUM_SAMPLES}

    def __getitem__(self, index):
        self.log.write(f"{{index}}\\n")
        self.log.flush()
        x = torch.linspace(-1, 1, {NUM_SAMPLES})[index].expand(8) * torch.arange(1.0, 9.0)
        return x, x.sum().reshape(1)
"""
"""For scripts that have a `folder`: which samples a worker has read is written down there."""

SCRIPT: Final = f"""
import sys
import time
from pathlib import Path

import torch
import shardline

for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
    method.__wrapped__.__dynamo_disable = method.__wrapped__  # imports torch's compiler otherwise

folder = Path(sys.argv[1])


{DATASET}

def wait_for(name):
    print(f"waits for {{name}}", flush=True)
    while not (folder / name).exists():
        time.sleep(0.01)


torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
with shardline.connect() as session:
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = session.optimizer(sgd, model)
    print(f"starts with step {{optimizer.next_step}}", flush=True)
    loader = session.loader(Squares(session.rank), batch_size={BATCH_SIZE})
    print(f"mean {{session.mean(1.0 + session.rank)}}", flush=True)
    for epoch in session.epochs({NUM_EPOCHS}):
        if epoch == {GATE_EPOCH}:
            wait_for("go")
        for x, y in loader:
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {{optimizer.next_step}} epoch {{epoch}}", flush=True)
            while epoch == {HOLD_EPOCH} and (folder / "hold").exists():
                time.sleep(0.01)
    total = sum(p.detach().double().sum().item() for p in model.parameters())
    print(f"after the loop, sum {{total!r}}", flush=True)
"""


class Account:
    """Where every sample of every pass went, recomputed here from the files of a run."""

    def __init__(self, folder: Path) -> None:
        lines = (folder / "updates.jsonl").read_text().splitlines()
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._folder = folder

    def updates(self) -> Iterator[dict[str, Any]]:
        return (line for line in self.lines if line["kind"] == "update")

    def events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == "worker" and line["event"] == event]

    def applied_by(self) -> dict[int, int]:
        """Samples in updates, by worker."""
        counts: dict[int, int] = defaultdict(int)
        for update in self.updates():
            counts[update["worker"]] += sum(stop - start for start, stop in update["ranges"])
        return dict(counts)

    def in_part(self) -> int:
        return sum(
            stop - start
            for update in self.updates()
            if update["state"] == "in_part"
            for start, stop in update["ranges"]
        )

    def check(self, *, num_passes: int = NUM_EPOCHS, seed: int = 0) -> None:
        """Every sample of every pass was in exactly one update, of a worker that had read it, and
        no contribution is there twice.
        """
        read = {
            int(path.stem.removeprefix("read-")): Counter(map(int, path.read_text().split()))
            for path in self._folder.glob("read-*.txt")
        }
        seen: dict[int, Counter[int]] = defaultdict(Counter)
        used: dict[int, Counter[int]] = defaultdict(Counter)
        for update in self.updates():
            generator = torch.Generator().manual_seed(seed + update["pass"])
            order = torch.randperm(NUM_SAMPLES, generator=generator).tolist()
            for start, stop in update["ranges"]:
                seen[update["pass"]].update(order[start:stop])
                used[update["worker"]].update(order[start:stop])
        everything = Counter(range(NUM_SAMPLES))
        assert dict(seen) == {number: everything for number in range(num_passes)}
        for worker, indices in used.items():
            assert indices <= read[worker], f"worker {worker} trained on what it had not read"
        keys = [(u["worker"], u["incarnation"], u["step"], u["pass"]) for u in self.updates()]
        assert len(keys) == len(set(keys)), "a contribution is there twice"
