"""How long each layer takes, measured with one layer in memory at a time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

import torch
from torch import Tensor, nn

from pipeline.partition import Layer
from pipeline.places import replace_tensors
from ps_core.errors import UsageError

_NUM_REPEATS: Final = 3
_STANDARD_DEVIATION: Final = 0.02


def stand_in(layer: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `layer`, which may be on the meta device, with memory on `device`.

    Its values are small random numbers, and zeros in tensors that are not of floats.
    """
    replica = copy.deepcopy(layer)
    replace_tensors(replica, lambda tensors: [_small(tensor, device) for tensor in tensors])
    return replica


def layer_seconds(
    layers: Sequence[Layer],
    example: Tensor,
    materialise: Callable[[nn.Module], nn.Module] | None = None,
) -> list[float]:
    """Seconds of forward and backward of each layer, the median of a few after a warm-up.

    `example`: a batch that the first layer takes; every other layer gets random numbers of the
    shape that the one before returns. `materialise` returns a copy of a layer that can run where
    `example` is; without it that is a `stand_in`. Leaves the random state alone. UsageError for a
    layer that does not return one tensor.
    """
    make = materialise or (lambda layer: stand_in(layer, example.device))
    seconds = []
    with torch.random.fork_rng([example.device] if example.is_cuda else []):
        inputs = example.detach()
        for layer in layers:
            spent, output = _measure(layer.name, make(layer.module), inputs)
            seconds.append(spent)
            inputs = _like(output)
    return seconds


def _measure(name: str, layer: nn.Module, inputs: Tensor) -> tuple[float, Tensor]:
    _, output = _run(name, layer, inputs)
    return median(_run(name, layer, inputs)[0] for _ in range(_NUM_REPEATS)), output


def _run(name: str, layer: nn.Module, inputs: Tensor) -> tuple[float, Tensor]:
    _wait(inputs)
    start = time.perf_counter()
    output = layer(inputs)
    if not isinstance(output, Tensor):
        raise UsageError(
            f"{name} returns a {type(output).__name__}, but the layers of a pipeline hand one "
            "tensor on: let it return a tensor, or train without --stages."
        )
    if output.requires_grad:
        output.backward(torch.ones_like(output))
    _wait(inputs)
    return time.perf_counter() - start, output.detach()


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:  # kernels run later than they are launched
        torch.cuda.synchronize(tensor.device)


def _like(output: Tensor) -> Tensor:
    # Not the output itself: small weights make it ever smaller, and CPUs slow down near zero.
    return torch.randn_like(output).requires_grad_() if output.is_floating_point() else output


def _small(tensor: Tensor, device: torch.device) -> Tensor:
    values = torch.zeros_like(tensor, device=device)
    return values.normal_(0.0, _STANDARD_DEVIATION) if values.is_floating_point() else values
