"""Which optimizer runs, as data: the table of supported torch.optim classes and their
hyperparameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ps_core.errors import UsageError
from ps_core.settings import ConsistencyConfig

HyperparameterValue = float | int | bool | tuple[float, ...]
Hyperparameters = Mapping[str, HyperparameterValue]
"""torch.optim keyword → value, for one parameter group. Keywords that are None are left out."""

OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    cls.__name__: cls
    for cls in (
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
    )
}
"""Elementwise optimizers: updating slices of a parameter one by one equals updating it whole."""

SCALAR_STATE = frozenset({"step", "mu_product"})
"""torch.optim's state entries that are one number per parameter; all others have its shape."""

_FUSED = frozenset({"SGD", "Adam", "AdamW", "Adagrad"})
_HALF = frozenset({torch.float16, torch.bfloat16})
_WHERE_ONLY = frozenset({"capturable"})
"""Says where a step runs, not what it computes: meaningless on a shard."""
_KERNELS = frozenset({"foreach", "fused"})
"""Say how a step is computed: absent until the user chooses, also by loading another's state."""


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """An optimizer without its parameters: class name, one entry per group, and exact clipping of
    the mean.
    """

    name: str
    groups: tuple[Hyperparameters, ...]
    max_grad_norm: float | None = None


def describe(optimizer: torch.optim.Optimizer, max_grad_norm: float | None = None) -> OptimizerSpec:
    """The spec of a user's optimizer. Raises UsageError for one that shards cannot run."""
    check_norm(max_grad_norm)
    name = type(optimizer).__name__
    if OPTIMIZERS.get(name) is not type(optimizer):
        raise UsageError(
            f"{type(optimizer).__module__}.{name} cannot run on shards: it is not one of "
            "torch.optim's elementwise "
            f"optimizers. Use one of {', '.join(sorted(OPTIMIZERS))}"
        )
    return OptimizerSpec(name, read_groups(optimizer), max_grad_norm)


def check_norm(max_grad_norm: float | None) -> None:
    """Raises UsageError for a norm to which nothing can be clipped."""
    if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
        raise UsageError(f"max_grad_norm is {max_grad_norm}: give a positive number or None")


def check_consistency(spec: OptimizerSpec, consistency: ConsistencyConfig) -> None:
    """Raises UsageError for an optimizer that a mode's modifier does not fit."""
    if consistency.delay_compensation and spec.name != "SGD":
        raise UsageError(
            f"delay compensation is derived for SGD, and {spec.name} scales each element by its "
            "own history: use SGD, or --staleness-scaling"
        )


def read_groups(optimizer: torch.optim.Optimizer) -> tuple[Hyperparameters, ...]:
    """The hyperparameters as they are now, one entry per parameter group."""
    keywords = [key for key in optimizer.defaults if key not in _WHERE_ONLY]
    return tuple(_read_group(group, keywords) for group in optimizer.param_groups)


def _read_group(group: Mapping[str, object], keywords: Iterable[str]) -> Hyperparameters:
    return {key: _plain(key, group[key]) for key in keywords if group[key] is not None}


def _plain(key: str, value: object) -> HyperparameterValue:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, (tuple, list)):
        return tuple(float(item) for item in value)
    if key == "differentiable" and value:
        raise UsageError("differentiable=True cannot run on shards: leave it out")
    if isinstance(value, (bool, int, float)):
        return value
    raise UsageError(
        f"hyperparameter {key}={value!r} cannot be sent to shards: give a number or a bool"
    )


def same_kind(declared: Sequence[Hyperparameters], given: Sequence[Hyperparameters]) -> bool:
    """Whether `given` has the groups, keywords and types of `declared`, whatever the values; a
    choice of kernel may come and go.
    """
    return [_kinds(group) for group in declared] == [_kinds(group) for group in given]


def _kinds(group: Hyperparameters) -> dict[str, object]:
    return {
        key: len(value) if isinstance(value, tuple) else isinstance(value, bool)
        for key, value in group.items()
        if key not in _KERNELS
    }


def build(
    spec: OptimizerSpec, members: Sequence[tuple[int, Sequence[torch.Tensor]]]
) -> torch.optim.Optimizer:
    """A torch optimizer for `members`: pairs of (group index in the spec, tensors to update in
    place).
    """
    groups = [
        {"params": list(tensors), **local_hyperparameters(spec.name, spec.groups[index], tensors)}
        for index, tensors in members
    ]
    # As keywords too: torch checks only those, and Adagrad takes its initial accumulator from them.
    # (The last one is no keyword of AdamW.)
    keywords = {
        key: groups[0][key] for key in groups[0].keys() - {"params", "decoupled_weight_decay"}
    }
    return OPTIMIZERS[spec.name](groups, **keywords)  # type: ignore[arg-type]  # keywords differ by class


def local_hyperparameters(
    name: str, hyperparameters: Hyperparameters, tensors: Sequence[torch.Tensor]
) -> dict[str, HyperparameterValue]:
    """Hyperparameters for these tensors: on the CPU torch's fused kernels where they are right,
    unless the user chose otherwise. Fused SGD on bf16 or fp16 leaves most elements unchanged there
    (torch 2.13), so it is never used.
    """
    local = dict(hyperparameters)
    if not all(tensor.is_cpu for tensor in tensors):
        return local
    right = name in _FUSED and not (name == "SGD" and any(t.dtype in _HALF for t in tensors))
    if name in _FUSED:
        local["fused"] = right and bool(local.get("fused", "foreach" not in local))
    return local


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()`, without the fused kernel where it fails: fused SGD (torch 2.13) takes the
    momentum buffers of all tensors or of none, and some may have their first gradient now.

    Hyperparameters must be set before every step: this one may leave `fused` off.
    """
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]:
            states = (optimizer.state[p] for p in group["params"] if p.grad is not None)
            buffers = {state.get("momentum_buffer") is None for state in states}
            group["fused"] = len(buffers) == 1
    optimizer.step()
