"""A model on each member of a group, and the same one in plain torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from allreduce.group import Group
from allreduce.sharded import ShardedUpdater
from allreduce.whole import GroupUpdater, WholeUpdater
from ps_core.buckets import Bucket, make_buckets
from ps_core.exchange import StateByParameter
from ps_core.optim_spec import Hyperparameters, OptimizerSpec, read_groups
from ps_core.plan import ParameterSpec, Plan, make_plan
from tests.reference import Batch, Net, initial_net, loss_of

KINDS: Final[Mapping[str, Callable[..., GroupUpdater]]] = {
    "whole": WholeUpdater,
    "ZeRO-1": ShardedUpdater,
}
BUCKET_BYTES: Final = 1024
NOBODY: Final[frozenset[str]] = frozenset()
_seeding = threading.Lock()


def net(dtype: str = "float64") -> Net:
    """The same one in every thread, which share torch's generator."""
    with _seeding:
        return initial_net(dtype)


def bucketed(model: nn.Module, bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """A model's parameters in small buckets; vectors are a group of their own."""
    return planned(model, bucket_bytes)[1]


def planned(model: nn.Module, bucket_bytes: int) -> tuple[Plan, list[Bucket]]:
    """The plan, and the buckets that own the model's parameters from now on."""
    named = dict(model.named_parameters())
    specs = [
        ParameterSpec(name, p.dtype, tuple(p.shape), int(p.dim() < 2)) for name, p in named.items()
    ]
    plan = make_plan(specs, 1, 512, bucket_bytes)
    return plan, make_buckets(plan, list(named.values()))


def spec_of(
    name: str,
    max_grad_norm: float | None = None,
    **options: Any,  # noqa: ANN401 - torch's own
) -> OptimizerSpec:
    """An optimizer with two groups that differ in their learning rate."""
    optimizer = Alone(name, **options).optimizer
    return OptimizerSpec(name, read_groups(optimizer), max_grad_norm)


def _groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "lr": lr},
        {"params": [p for p in parameters if p.dim() < 2], "lr": 2 * lr},
    ]


class Alone:
    """Plain torch, with the whole batch."""

    def __init__(self, name: str, dtype: str = "float64", lr: float = 0.02, **options: Any) -> None:  # noqa: ANN401 - torch's own
        self.model = net(dtype)
        kind = getattr(torch.optim, name)
        self.optimizer: torch.optim.Optimizer = kind(_groups(self.model, lr), **options)

    def step(
        self,
        batch: Batch,
        without: Collection[str] = NOBODY,
        max_grad_norm: float | None = None,
    ) -> None:
        """One update; parameters in `without` have no gradient."""
        self.set_gradients(gradients(self.model, batch, without), max_grad_norm)

    def set_gradients(
        self, given: Mapping[str, Tensor | None], max_grad_norm: float | None = None
    ) -> None:
        """One update with these gradients."""
        for name, parameter in self.model.named_parameters():
            parameter.grad = given[name]
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()

    def parameters(self) -> dict[str, Tensor]:
        """By name."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """Copies, by the parameter's name and torch's key."""
        return {
            f"{name} {key}": torch.as_tensor(value).clone()
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }


def gradients(
    model: nn.Module, batch: Batch, without: Collection[str] = NOBODY
) -> dict[str, Tensor | None]:
    """Of the mean loss of a batch."""
    model.zero_grad()
    loss_of(model, batch).backward()
    return {n: None if n in without else p.grad for n, p in model.named_parameters()}


class Member:
    """One worker's model, and what it has of the optimizer."""

    def __init__(
        self,
        kind: str,
        group: Group,
        spec: OptimizerSpec,
        *,
        dtype: str = "float64",
        wire_dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.model = net(dtype)
        self.names = [name for name, _ in self.model.named_parameters()]
        plan, self.buckets = planned(self.model, bucket_bytes)
        self.replica: GroupUpdater = KINDS[kind](plan, self.buckets, spec, wire_dtype)
        self.hyperparameters: Sequence[Hyperparameters] = spec.groups
        self.replica.connect(group)

    def issue(self, batch: Batch | None, weight: float, without: Collection[str] = NOBODY) -> None:
        """Begin a round; without a batch this worker has nothing to add."""
        if batch is not None:
            given = gradients(self.model, batch, without)
            for name, parameter in self.model.named_parameters():
                parameter.grad = given[name]
            for bucket in self.buckets:
                bucket.collect()
        for bucket in self.buckets:
            self.replica.issue(bucket, weight)

    def step(self, batch: Batch | None, weight: float, without: Collection[str] = NOBODY) -> None:
        """A whole round."""
        self.issue(batch, weight, without)
        self.finish()

    def finish(self) -> None:
        """The rest of a round that was begun."""
        self.replica.collect()
        self.replica.update(self.hyperparameters)

    def parameters(self) -> dict[str, Tensor]:
        """By name."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def named(self, state: StateByParameter) -> dict[str, Tensor]:
        """As that of Alone."""
        return {
            f"{self.names[index]} {key}": value
            for index, entries in state.items()
            for key, value in entries.items()
        }
