"""A forward pass alone, with the stages of every schedule but without its order.

Torch's schedules can do this too, but not all (zbv cannot), and at every change between training
and evaluation they negotiate and allocate again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from pipeline.boundaries import Boundary
from pipeline.stage import Layers, model_errors


@torch.no_grad()
def forward(
    modules: Mapping[int, nn.Module],
    boundaries: Sequence[Boundary],
    microbatches: Sequence[torch.Tensor],
    group: dist.ProcessGroup,
    worker_of: Callable[[int], int],
    device: torch.device,
) -> list[torch.Tensor]:
    """Send `microbatches` through this worker's `modules` (by stage, ascending); the outputs of the
    last of them.

    Only stage 0 reads the microbatches, the other stages their sizes. One stage after the other
    takes all of them, so both ends of a connection agree on the order of what passes. Blocks until
    all is received and sent.
    """
    sent: list[tuple[dist.Work, torch.Tensor]] = []  # a tensor must live until it has been sent
    given: list[torch.Tensor] = []
    for stage, module in modules.items():
        layers = Layers(stage, module, boundaries[stage + 1])
        taken: Iterable[torch.Tensor] = given
        if stage == 0:
            taken = [microbatch.to(device) for microbatch in microbatches]
        elif stage - 1 not in modules:
            sizes = [len(microbatch) for microbatch in microbatches]
            taken = _receive(boundaries[stage], sizes, group, worker_of(stage - 1), device)
        given = []
        for inputs in taken:
            with model_errors():
                given.append(layers(inputs))
            if stage + 1 < len(boundaries) - 1 and stage + 1 not in modules:
                sent.append((group.send([given[-1]], worker_of(stage + 1), 0), given[-1]))
    for work, _ in sent:
        work.wait()
    return given


def _receive(
    boundary: Boundary,
    sizes: Iterable[int],
    group: dist.ProcessGroup,
    source: int,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Ask for all at once, so that no sender waits for what this worker computes."""
    buffers = [
        torch.empty(boundary.with_rows(rows).shape, dtype=boundary.dtype, device=device)
        for rows in sizes
    ]
    works = [group.recv([buffer], source, 0) for buffer in buffers]
    return _arriving(works, buffers)


def _arriving(
    works: Sequence[dist.Work], buffers: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    for work, buffer in zip(works, buffers, strict=True):
        work.wait()
        yield buffer
