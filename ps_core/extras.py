"""What of a model travels besides its trained parameters: buffers and untrained parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ps_core.errors import MismatchError, UsageError
from ps_core.names import plain_name
from ps_core.tensors import digest, obstacle


class Kind(NamedTuple):
    """What a tensor is, without its elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Kind:
        return cls(tensor.dtype, tuple(tensor.shape))

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class _Slot(NamedTuple):
    """An attribute of a module that holds a buffer or a parameter, or None."""

    module: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor | None:
        tensor: Tensor | None = getattr(self.module, self.key)
        return tensor


class Extras:
    """A model's buffers and untrained parameters, by name. The layers of other workers' stages,
    which have no memory here, are left out.
    """

    def __init__(self, model: nn.Module, exchanged: Collection[int]) -> None:
        """`exchanged`: ids of the tensors that are the exchange's."""
        self._model = model
        self._exchanged = exchanged

    def read(self) -> dict[str, Tensor]:
        """The tensors as they are now. One with several names has its first."""
        tensors = ((name, slots[0].tensor) for name, slots in self._slots().items())
        return {name: tensor for name, tensor in tensors if tensor is not None}

    def check(self) -> None:
        """Raises UsageError for a tensor that cannot be sent."""
        for name, tensor in self.read().items():
            if problem := obstacle(tensor):
                kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                raise UsageError(f"{kind} {name} cannot be sent to other workers: it {problem}")

    def digests(self) -> dict[str, bytes]:
        """Name → what is equal for tensors of equal bytes. Reads every element."""
        return {name: digest(tensor) for name, tensor in self.read().items()}

    def check_kinds(self, theirs: Mapping[str, Kind]) -> None:
        """Raises MismatchError unless this model has the others' tensors, or places for them."""
        slots = self._slots()
        own = {name: Kind.of(tensor) for name, tensor in self.read().items()}
        for name in sorted(own.keys() | theirs.keys()):
            mine, other = own.get(name), theirs.get(name)
            if mine != other and not (mine is None and name in slots):
                raise MismatchError(
                    f"{name!r} is {mine or 'absent'} in this worker's model and "
                    f"{other or 'absent'} in the job's: build the same model on every worker"
                )

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Take over values on the host: in place where a tensor can be written, otherwise as new
        tensors that replace it. Raises MismatchError for a name that the model has no place for.
        """
        slots = self._slots()
        for name, value in values.items():
            if name not in slots:
                raise MismatchError(
                    f"the job's model has {name!r}, which this worker's model lacks: build the "
                    "same model on every worker"
                )
            tensor = slots[name][0].tensor
            if tensor is not None and _is_writable_as(tensor, Kind.of(value)):
                tensor.copy_(value)
            else:
                self._replace(slots[name], value)

    def _replace(self, slots: Iterable[_Slot], value: Tensor) -> None:
        like = next(slot.tensor for slot in slots)
        device = next(self._model.parameters()).device if like is None else like.device
        new = value.to(device)
        if isinstance(like, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        for module, key in slots:
            setattr(module, key, new)

    def _slots(self) -> dict[str, list[_Slot]]:
        """Name → where the tensor is; there may be several places for one."""
        found: dict[str, list[_Slot]] = {}
        first_name: dict[int, str] = {}
        for prefix, module in self._model.named_modules():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                name = plain_name(self._model, f"{prefix}.{key}" if prefix else key)
                if tensor is not None:
                    if id(tensor) in self._exchanged or tensor.is_meta:
                        continue
                    name = first_name.setdefault(id(tensor), name)
                found.setdefault(name, []).append(_Slot(module, key))
        return found


def _is_writable_as(tensor: Tensor, kind: Kind) -> bool:
    """Whether all elements of the tensor can be given values of their own: those of an expanded one
    share their memory.
    """
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    shares_memory = tensor.numel() > span
    return Kind.of(tensor) == kind and not (shares_memory or tensor.is_inference())
