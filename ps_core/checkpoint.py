"""safetensors files: written under a temporary name, synced, then renamed, so that a reader never
sees half a file.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import nn

from ps_core.errors import UsageError
from ps_core.model_files import temporary
from ps_core.names import plain_name
from ps_core.tensors import bytes_of, memory_of, obstacle, plain

log = logging.getLogger(__name__)

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
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
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
    the name they are under. `safetensors.torch.load_model(model, path)` reads the file back. Extra
    state that is no tensor is in the metadata, as JSON, or named in a warning where that cannot
    hold it.
    """
    tensors, metadata = distinct_tensors(model)
    texts, others = extra_state(model)
    if others:
        log.warning("%s lacks %s", path.name, what_is_lost(others))
    whole = with_signs(map(plain, tensors.values()), sign)
    write_tensors(path, tensors, whole, {**metadata, **texts, **more})


def check_writable(model: torch.nn.Module) -> None:
    """Raises UsageError for a tensor that such a file cannot hold."""
    for name, tensor in distinct_tensors(model)[0].items():
        if not tensor.is_meta and (problem := obstacle(tensor)):
            raise UsageError(f"{name} cannot be written to model.safetensors: it {problem}")
        if tensor.dtype not in _DTYPES:
            raise UsageError(
                f"{name} is {tensor.dtype}, which model.safetensors cannot hold: keep it as "
                "another type, such as the real and imaginary part of a complex number, or "
                "register it with persistent=False"
            )


def distinct_tensors(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The model's tensors by their first names, those of parameters if they have any, and what the
    file says of the other names.
    """
    values = _entries(model).items()
    entries = {name: value for name, value in values if isinstance(value, torch.Tensor)}
    first_name: dict[Hashable, str] = {}
    for name in sorted(entries, key=lambda name: not isinstance(entries[name], nn.Parameter)):
        first_name.setdefault(memory_of(entries[name]), name)
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"format": "pt"}
    for name, tensor in entries.items():
        original = first_name[memory_of(tensor)]
        if original == name:
            tensors[name] = tensor
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


def extra_state(model: torch.nn.Module) -> tuple[dict[str, str], list[str]]:
    """What `get_extra_state` gives besides tensors, as JSON by name; the names of what JSON would
    not give back as it was.
    """
    entries = _entries(model).items()
    values = {name: value for name, value in entries if not isinstance(value, torch.Tensor)}
    texts = {name: _json(value) for name, value in values.items()}
    kept = {name: text for name, text in texts.items() if text is not None}
    return kept, sorted(texts.keys() - kept.keys())


def what_is_lost(names: Sequence[str]) -> str:
    """For a person: extra state that is not kept."""
    return (
        f"the extra state {', '.join(names)}, for which it has no form: save it in the script, or "
        "let get_extra_state return a tensor"
    )


def _entries(model: torch.nn.Module) -> dict[str, object]:
    """The state_dict, under the names of the model's author."""
    state: Mapping[str, object] = model.state_dict(keep_vars=True)
    return {plain_name(model, name): value for name, value in state.items()}


def _json(value: object) -> str | None:
    """As text that stands for exactly this value; None: there is none."""
    try:
        text = json.dumps(value, allow_nan=False)
        return text if json.loads(text) == value else None
    except (TypeError, ValueError, RecursionError):
        return None


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
