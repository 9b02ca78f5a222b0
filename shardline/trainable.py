"""What a model's parameters must be for workers to train them together; all else is refused by
name, before anything has begun.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ps_core.aliases import overlaps_itself
from ps_core.errors import UsageError
from ps_core.tensors import TRAINABLE, is_trained


def check_model(model: nn.Module) -> None:
    """Raises UsageError for a model without shapes yet, or that edits its parameters itself."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UsageError(
                f"{name} has no shape yet (a lazy module): run the model on a batch once, before "
                "session.optimizer(...)"
            )
    for name, module in model.named_modules():
        is_embedding = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if is_embedding and module.max_norm is not None and is_trained(module.weight):
            raise UsageError(
                f"{name or 'the model'} is an embedding with max_norm, which changes its weight in "
                "forward: that would be lost, since the shards hold the parameters. Leave max_norm "
                "out, and normalise the vectors that the embedding returns"
            )


def check_parameter(name: str, parameter: nn.Parameter) -> None:
    """Raises UsageError for a parameter of a kind that no optimizer here can update."""
    if advice := _advice(parameter):
        raise UsageError(f"parameter {name} cannot be trained: {advice}")


def _advice(parameter: nn.Parameter) -> str:
    kind = type(parameter.data)
    if kind is not torch.Tensor:
        return f"it is a {kind.__name__}, and must be a plain tensor"
    if parameter.is_nested or parameter.layout is not torch.strided:
        kind_of = "nested" if parameter.is_nested else f"{parameter.layout}"
        return f"it is {kind_of}, and must be dense (to_dense())"
    if parameter.is_complex():
        return (
            f"it is {parameter.dtype}: keep torch.view_as_real(…) of it as the parameter, and use "
            "torch.view_as_complex in forward"
        )
    if parameter.dtype not in TRAINABLE:
        known = "float64, float32, bfloat16 or float16"
        return f"it is {parameter.dtype}: keep it as {known}, and convert it in forward"
    if not parameter.is_meta and overlaps_itself(parameter):
        return "several of its elements are one in memory (expand): give it its own with .clone()"
    return ""


def check_has_memory(name: str, parameter: nn.Parameter) -> None:
    """Raises UsageError for a parameter on the meta device."""
    if parameter.is_meta:
        raise UsageError(
            f"parameter {name} is on the meta device: give the model memory with "
            "model.to_empty(device=session.device), and initialise it, before "
            "session.optimizer(...)"
        )
