"""torch.optim on the parameters of buckets, where one process updates all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ps_core.buckets import Bucket
from ps_core.exchange import StateByParameter
from ps_core.optim_spec import (
    SCALAR_STATE,
    Hyperparameters,
    OptimizerSpec,
    build,
    local_hyperparameters,
    take_step,
)
from ps_core.plan import Plan


class Updater:
    """Updates the buckets' parameters from their gradients, on the model's own device."""

    def __init__(self, plan: Plan, buckets: Sequence[Bucket], spec: OptimizerSpec) -> None:
        """`buckets`: those of the plan that this process has."""
        self._spec = spec
        self._buckets = buckets
        self._views = {
            placement.parameter: bucket.parameter_views[position]
            for bucket in buckets
            for position, placement in enumerate(bucket.layout.placements)
        }
        groups = [(index, self._group(plan, index)) for index in range(len(spec.groups))]
        self._optimizer = build(spec, [group for group in groups if group[1]])
        self._indices = [index for index, tensors in groups if tensors]

    def _group(self, plan: Plan, group: int) -> list[torch.Tensor]:
        return [view for i, view in self._views.items() if plan.parameters[i].group == group]

    def set_hyperparameters(self, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Those of the next update, one entry per group of the spec. Needed before each."""
        for group, index in zip(self._optimizer.param_groups, self._indices, strict=True):
            group.update(
                local_hyperparameters(self._spec.name, hyperparameters[index], group["params"])
            )

    def norm(self) -> torch.Tensor:
        """Of the gradients that are present."""
        self._take_gradients()
        return self._norm()

    def step(self, norm: torch.Tensor | None = None) -> None:
        """Apply the gradients that are present, clipped to the spec's norm. `norm`: that of the
        whole model's, if it has others.
        """
        self._take_gradients()
        if self._spec.max_grad_norm is not None:
            total = self._norm() if norm is None else norm
            clip_grads_with_norm_(list(self._views.values()), self._spec.max_grad_norm, total)
        take_step(self._optimizer)

    def _take_gradients(self) -> None:
        for bucket in self._buckets:
            for parameter, gradient, present in zip(
                bucket.parameter_views, bucket.gradient_views, bucket.present, strict=True
            ):
                parameter.grad = gradient if present else None

    def _norm(self) -> torch.Tensor:
        return get_total_norm([view.grad for view in self._views.values() if view.grad is not None])

    def read_state(self) -> StateByParameter:
        """Copies of torch's state."""
        return {
            index: {
                key: value.clone()
                for key, value in self._optimizer.state[view].items()
                if isinstance(value, torch.Tensor)
            }
            for index, view in self._views.items()
        }

    def write_state(self, state: StateByParameter) -> None:
        """Replace torch's state with copies."""
        for index, view in self._views.items():
            self._optimizer.state[view] = {
                key: value.to(value.device if key in SCALAR_STATE else view.device, copy=True)
                for key, value in state.get(index, {}).items()
            }
