"""safetensors files: written under a temporary name, synced, then renamed, so that a reader never
sees half a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import nn

from ps_core.model_files import temporary
from ps_core.tensors import bytes_of, memory_of

_DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.bool: "BOOL",
}

SIGN_BYTES: Final = 2**28
"""What is written between two signs of life, and between two syncs of the file."""


def write_model(
    model: torch.nn.Module,
    path: Path,
    sign: Callable[[], object] | None = None,
    more: Mapping[str, str] = {},
) -> None:
    """Write the model's parameters and persistent buffers under their own names, with `more` in the
    metadata. See `with_signs` for `sign`.

    Weights that several names share are written once; the header's metadata says `tied.<name>` =
    the name they are under. `safetensors.torch.load_model(model, path)` reads the file back.
    """
    tensors, metadata = distinct_tensors(model)
    whole = (tensor.detach().cpu().contiguous() for tensor in tensors.values())
    write_tensors(path, tensors, with_signs(whole, sign), {**metadata, **more})


def distinct_tensors(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The model's tensors by their first names, those of parameters if they have any, and what the
    file says of the other names.
    """
    entries: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"format": "pt"}
    first_name: dict[Hashable, str] = {}
    for name in sorted(entries, key=lambda name: not isinstance(entries[name], nn.Parameter)):
        original = first_name.setdefault(memory_of(entries[name]), name)
        if original == name:
            tensors[name] = entries[name]
        else:
            metadata[f"tied.{name}"] = original
    return tensors, metadata


def with_signs(
    tensors: Iterable[torch.Tensor], sign: Callable[[], object] | None
) -> Iterator[torch.Tensor]:
    """The tensors, with a call of `sign` whenever so many have been taken that others who wait for
    the file might give the writer up.
    """
    num_bytes = 0
    for tensor in tensors:
        yield tensor
        num_bytes += tensor.nbytes
        if sign is not None and num_bytes >= SIGN_BYTES:
            num_bytes = 0
            sign()


def write_tensors(
    path: Path,
    like: Mapping[str, torch.Tensor],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write contiguous `tensors` of the host one after the other, under the names of `like`, which
    has their types and shapes. None of them is needed any more once the next is asked for.
    """
    part = temporary(path)
    unsynced_bytes = 0
    try:
        with part.open("wb") as file:
            file.write(_header(like, metadata))
            for tensor in tensors:
                file.write(bytes_of(tensor))
                unsynced_bytes += tensor.nbytes
                if unsynced_bytes >= SIGN_BYTES:  # no sync takes long
                    unsynced_bytes = 0
                    file.flush()
                    os.fsync(file.fileno())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _header(like: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """As https://github.com/huggingface/safetensors, "Format", says."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in like.items():
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        shape, offsets = list(tensor.shape), [start, end]
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the elements are aligned
    return len(text).to_bytes(8, "little") + text


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
