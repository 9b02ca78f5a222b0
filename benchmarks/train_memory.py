"""What a worker holds, as it counts itself, and what that says in the rows of a table."""

import ctypes
import gc
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ps_core.buckets import Bucket

MIB = 2**20
MOST = 1.05
"""What a worker may take up, relative to what it must hold."""
_STATE = 2
"""Tensors of the size of a parameter in AdamW's state of it."""
Row: TypeAlias = dict[str, Any]


# -- In the worker ---------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The most memory that this process has had; 0 where the system does not tell."""
    return _status_bytes("VmHWM")


def unused_bytes() -> int:
    """What was freed, and the C library has not given back to the kernel; it does so now."""
    before, trim = _status_bytes("VmRSS"), getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return max(0, before - _status_bytes("VmRSS"))


def _status_bytes(key: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def held_bytes(parameters: Iterable[nn.Parameter]) -> dict[str, int]:
    """Bytes of all storages on the host that any Python object refers to, each counted once, by
    what they are for.
    """
    gc.collect()
    tracked = gc.get_objects()
    own = [each for each in parameters if not each.is_meta]
    kinds: dict[str, Iterable[Tensor]] = {
        "parameters": own,
        "flat_gradients": [each.gradients for each in tracked if type(each) is Bucket],
        "gradients": [each.grad for each in own if each.grad is not None],
        "optimizer_state": _state(tracked),
        "other": [each for each in tracked if type(each) in (Tensor, nn.Parameter)],
    }
    seen: set[int] = set()
    return {name: sum(_sizes(tensors, seen)) for name, tensors in kinds.items()}


def _state(tracked: Iterable[object]) -> Iterator[Tensor]:
    """The tensors in which any optimizer keeps its state."""
    for each in tracked:
        if issubclass(type(each), torch.optim.Optimizer):
            assert isinstance(each, torch.optim.Optimizer)
            for entries in each.state.values():
                yield from (value for value in entries.values() if isinstance(value, Tensor))


def _sizes(tensors: Iterable[Tensor], seen: set[int]) -> Iterator[int]:
    """Of the storages that are not `seen` yet."""
    for tensor in tensors:
        if tensor.layout is not torch.strided or not tensor.is_cpu:
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage.nbytes()


# -- What is made of it ----------------------------------------------------------------------------


def memory_row(system: str, bare_bytes: int, workers: Sequence[Row]) -> Row:
    """Of the worker that takes up most, relative to what it must hold."""
    rows = [_of_worker(bare_bytes, worker) for worker in workers]
    return {"system": system, **max(rows, key=lambda row: row["peak_of_must"]), "workers": rows}


def _of_worker(bare_bytes: int, worker: Row) -> Row:
    held = worker["held_bytes"]
    layers = (2 + _STATE) * worker["own_bytes"]
    must = 2 * worker["own_bytes"] + held["optimizer_state"]  # gradients are as large as parameters
    peak = max(worker["peak_bytes"], worker["last_peak_bytes"]) - bare_bytes
    return {
        "share": round(worker["own_bytes"] / worker["whole_bytes"], 4),
        "must_mib": _mib(must),
        **{f"{name}_mib": _mib(size) for name, size in held.items()},
        "held_mib": _mib(sum(held.values())),
        "held_of_must": round(sum(held.values()) / must, 3),
        "unused_mib": _mib(worker["unused_bytes"]),
        "bare_mib": _mib(bare_bytes),
        "training_peak_mib": _mib(worker["peak_bytes"] - bare_bytes),
        "peak_mib": _mib(peak),
        "peak_of_must": round(peak / must, 3),
        "peak_of_layers": round(peak / layers, 3),
    }


def _mib(num_bytes: int) -> float:
    return round(num_bytes / MIB, 1)
