"""A pipeline of one worker, in the test's own process: all stages, and no messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch._C._distributed_c10d import HashStore

from pipeline.group import connect, disconnect
from pipeline.schedule import virtual_stages
from pipeline.step import PipelineStep


@contextmanager
def alone(
    stages: Sequence[nn.Module], schedule: str, num_microbatches: int = 2
) -> Iterator[PipelineStep]:
    """A step with as many `stages` as the schedule has per worker."""
    assert len(stages) == virtual_stages(schedule)
    group = connect(HashStore(), 0, 1, backend="gloo", timeout_seconds=60, prefix="p")
    try:
        yield PipelineStep(
            dict(enumerate(stages)),
            stages,
            group,
            schedule=schedule,
            num_microbatches=num_microbatches,
            device=torch.device("cpu"),
        )
    finally:
        disconnect(group)
