"""The operations that build a model, kept so that any of its tensors can be computed later.

While a model is built its tensors are on the meta device: they have a storage, but no memory. What
counts is which storage an operation reads, writes or makes: views of one storage share its values.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch._ops import OpOverload
from torch.utils._pytree import TreeSpec, tree_flatten, tree_iter, tree_unflatten

from pipeline.freed import Freed
from ps_core.errors import UsageError

CPU: Final = torch.device("cpu")
META: Final = torch.device("meta")


@dataclass(frozen=True, slots=True)
class View:
    """A strided tensor in a storage; sizes, strides and offset in elements.

    `storage` is the address of the meta storage, which whoever keeps the view keeps alive.
    """

    storage: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            raise UsageError(
                "A model that is cut into stages is built from dense tensors only: make sparse and "
                "conjugated ones in its forward, or train without --stages."
            )
        offset = int(tensor.storage_offset())
        return cls(storage_of(tensor), tensor.dtype, tensor.size(), tensor.stride(), offset)

    def on(self, storage: UntypedStorage) -> Tensor:
        """The tensor in a storage with memory; shares it."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)

    def backed_by(self, tensor: Tensor) -> UntypedStorage:
        """A storage in which this view has the values of `tensor`: its own, where that fits."""
        assert tensor.dtype == self.dtype
        assert tensor.size() == self.size
        if (tensor.stride(), tensor.storage_offset()) == (self.stride, self.offset):
            return tensor.untyped_storage()
        # Some CPU kernels lay their result out differently from what the meta device foretells.
        steps = zip(self.size, self.stride, strict=True)
        length = self.offset + 1 + sum((count - 1) * stride for count, stride in steps)
        storage = torch.empty(max(length, 0), dtype=self.dtype, device=CPU).untyped_storage()
        self.on(storage).copy_(tensor)
        return storage


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory, or would if they had any, have in common."""
    return int(tensor.untyped_storage()._cdata)


def wrong_device(device: torch.device) -> UsageError:
    """What a script is told that builds its model on `device`."""
    return UsageError(
        f"A model that is cut into stages is built on the CPU, not on {device}: "
        "leave the device out, each stage goes to its own afterwards."
    )


class _Constant(NamedTuple):
    """A tensor with memory that an operation reads, and its version then."""

    tensor: Tensor
    version: int

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            raise UsageError(
                "A tensor whose values the model took over was changed afterwards: "
                "give the model a clone of it, or train without --stages."
            )
        return self.tensor


@dataclass(frozen=True, slots=True)
class Call:
    """An operation and its arguments, flattened."""

    operation: OpOverload
    leaves: tuple[object, ...]
    spec: TreeSpec

    @classmethod
    def of(
        cls, operation: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> Call:
        """UsageError if it names a device other than the CPU."""
        names_device = any(argument.name == "device" for argument in operation._schema.arguments)
        if names_device and next(tensors_in((args, kwargs)), None) is None:
            kwargs = {"device": CPU, **kwargs}
        leaves, spec = tree_flatten((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, torch.device) and leaf.type not in ("cpu", "meta"):
                raise wrong_device(leaf)
        return cls(operation, tuple(leaves), spec)

    @property
    def is_random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.operation.tags

    @property
    def generator(self) -> torch.Generator:
        """What a random operation draws from."""
        given = (leaf for leaf in self.leaves if isinstance(leaf, torch.Generator))
        return next(given, torch.default_generator)

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def written(self) -> list[Tensor]:
        """The tensors that it changes in place."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        changed = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(self.operation._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        return list(tensors_in(changed))

    def mapped(self, change: Callable[[object], object]) -> Call:
        return Call(self.operation, tuple(map(change, self.leaves)), self.spec)

    def run(self) -> object:
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return self.operation(*args, **kwargs)


def tensors_in(tree: object) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts, in order."""
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


@dataclass(frozen=True, slots=True)
class _Operation:
    """A call whose tensors are views and constants; runs again as it would have run then.

    `made` has, for each tensor that it returns, its view if its storage is new.
    """

    call: Call
    made: tuple[View | None, ...]
    state: Tensor | None
    default_dtype: torch.dtype

    def reads(self) -> Iterator[int]:
        return (leaf.storage for leaf in self.call.leaves if isinstance(leaf, View))

    def makes(self) -> Iterator[int]:
        return (view.storage for view in self.made if view is not None)

    def run(self, storages: dict[int, UntypedStorage]) -> None:
        torch.set_default_dtype(self.default_dtype)
        if self.state is not None:
            torch.default_generator.set_state(self.state)
        result = self.call.mapped(lambda leaf: _on_cpu(leaf, storages)).run()
        for view, tensor in zip(self.made, tensors_in(result), strict=True):
            if view is not None:
                storages[view.storage] = view.backed_by(tensor)


class Tape:
    """What ran, in order, and which storages it made."""

    def __init__(self, freed: Freed) -> None:
        self._freed = freed
        self._operations: list[_Operation] = []
        self._writers: dict[int, list[int]] = {}
        # Kept alive, so that no later storage gets the address of one on the tape.
        self._storages: dict[int, UntypedStorage] = {}

    def record(self, call: Call) -> object:
        """Run `call` on the meta device, keep it, and return what it returns there.

        UsageError if it reads a meta tensor that is not on the tape; RuntimeError if the result
        depends on values, or the operation has no meta kernel: then nothing is kept.
        """
        # First: an operation may change the shape of its arguments, and the state it draws from.
        kept = call.mapped(self._keep)
        written = {storage_of(tensor) for tensor in call.written()}
        state = call.generator.get_state() if call.is_random else None
        result = call.mapped(_on_meta).run()
        made = tuple(map(self._make, tensors_in(result)))
        operation = _Operation(kept, made, state, torch.get_default_dtype())
        changed = written.union(operation.makes())
        for storage in changed:
            self._writers.setdefault(storage, []).append(len(self._operations))
        if changed:  # otherwise it only made views, which later calls describe themselves
            self._operations.append(operation)
        return result

    @torch.no_grad()
    def replay(self, wanted: Iterable[int]) -> dict[int, UntypedStorage]:
        """The wanted meta storages with their present values, in memory of the CPU.

        Runs only what they depend on, and leaves the random state alone. UsageError if one is not
        on the tape.
        """
        targets = set(wanted)
        for storage in targets:
            self._check(storage)
        indices = self._slice(targets)
        last = {s: index for index in indices for s in self._touched(index)}
        storages: dict[int, UntypedStorage] = {}
        with _random_state_kept():
            for index in indices:
                self._operations[index].run(storages)
                for storage in {*self._touched(index)} - targets:
                    if last[storage] == index:
                        self._freed.add(storages.pop(storage).nbytes())
        return storages

    def close(self) -> None:
        """Forget everything."""
        self._operations.clear()
        self._writers.clear()
        self._storages.clear()

    def _touched(self, index: int) -> Iterator[int]:
        operation = self._operations[index]
        yield from operation.reads()
        yield from operation.makes()

    def _slice(self, storages: Iterable[int]) -> list[int]:
        """The indices of all operations on which the present values of `storages` depend."""
        needed: set[int] = set()
        seen: dict[int, int] = {}  # how many of a storage's writers are in `needed`
        todo = [(storage, len(self._operations)) for storage in storages]
        while todo:
            storage, before = todo.pop()
            writers = self._writers[storage]
            end = bisect_left(writers, before)
            for index in writers[seen.get(storage, 0) : end]:
                if index not in needed:
                    needed.add(index)
                    todo.extend((read, index) for read in self._operations[index].reads())
            seen[storage] = max(end, seen.get(storage, 0))
        return sorted(needed)

    def _keep(self, leaf: object) -> object:
        if isinstance(leaf, torch.Generator):
            return None  # a replay draws from the default one, in the state of this one
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.is_meta:
            return _Constant(leaf, leaf._version)
        view = View.of(leaf)
        self._check(view.storage)
        return view

    def _make(self, tensor: Tensor) -> View | None:
        view = View.of(tensor)
        if view.storage in self._storages:
            return None
        self._storages[view.storage] = tensor.untyped_storage()
        return view

    def _check(self, storage: int) -> None:
        if storage not in self._storages:
            raise UsageError(
                "A tensor on the meta device was not built together with the model: "
                "build all of the model in one place, or train without --stages."
            )


def _on_meta(leaf: object) -> object:
    if isinstance(leaf, torch.Generator):
        return None
    if isinstance(leaf, torch.device):
        return META
    if isinstance(leaf, Tensor) and not leaf.is_meta:
        return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=META)
    return leaf


def _on_cpu(leaf: object, storages: Mapping[int, UntypedStorage]) -> object:
    if isinstance(leaf, torch.device):
        return CPU
    if isinstance(leaf, _Constant):
        return leaf.value()
    return leaf.on(storages[leaf.storage]) if isinstance(leaf, View) else leaf


@contextmanager
def _random_state_kept() -> Iterator[None]:
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        torch.set_default_dtype(dtype)
