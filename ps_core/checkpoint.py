"""safetensors files: written under a temporary name, synced, then renamed, so that a reader never
sees half a file.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_model(model: torch.nn.Module, path: Path) -> None:
    """Write the model's parameters and persistent buffers under their own names.

    Weights that several names share are written once; the header's metadata says `tied.<name>` =
    the name they are under. `safetensors.torch.load_model(model, path)` reads the file back.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"format": "pt"}
    first_name: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        original = first_name.setdefault(id(tensor), name)
        if original == name:
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        else:
            metadata[f"tied.{name}"] = original
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        temporary.chmod(0o644)  # safetensors makes it readable by its owner only
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
