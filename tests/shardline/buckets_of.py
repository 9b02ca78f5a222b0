"""Parameters as a session has them, in buckets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ps_core.buckets import make_buckets
from ps_core.plan import ParameterSpec, make_plan
from shardline.gradients import Gradients


def gradients_of(parameters: Sequence[nn.Parameter]) -> Gradients:
    """Those of parameters, which move into buckets."""
    specs = [ParameterSpec(f"p{i}", p.dtype, tuple(p.shape), 0) for i, p in enumerate(parameters)]
    return Gradients(make_buckets(make_plan(specs, 1, 2**20, 2**20), parameters))
