"""The names of a model's tensors as its author has them, whatever torch has wrapped around it."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def plain_name(model: nn.Module, name: str) -> str:
    """A name from `model.state_dict()` or the like, without the part that each wrapper adds: what
    `torch.compile` makes of a module, DataParallel and DistributedDataParallel.
    """
    kept = []
    module: nn.Module | None = model
    for part in name.split("."):
        if module is None or part != _wrapped_part(module):
            kept.append(part)
        module = module._modules.get(part) if module is not None else None
    return ".".join(kept)


def _wrapped_part(module: nn.Module) -> str | None:
    """What the module that this one wraps is called in it; None: it is no wrapper."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        return "module"
    # Imported by torch.compile alone, and slowly.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        return "_orig_mod"
    return None
