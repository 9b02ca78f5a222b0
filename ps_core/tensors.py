"""Tensors as bytes: the element types of the wire, and views between the two without a copy."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch

from ps_core.errors import ProtocolError, UsageError
from ps_core.v1 import tensor_pb2

_DTYPES: Mapping[torch.dtype, tensor_pb2.DataType] = {
    torch.float64: tensor_pb2.DATA_TYPE_FLOAT64,
    torch.float32: tensor_pb2.DATA_TYPE_FLOAT32,
    torch.bfloat16: tensor_pb2.DATA_TYPE_BFLOAT16,
    torch.float16: tensor_pb2.DATA_TYPE_FLOAT16,
    torch.int64: tensor_pb2.DATA_TYPE_INT64,
    torch.int32: tensor_pb2.DATA_TYPE_INT32,
    torch.int16: tensor_pb2.DATA_TYPE_INT16,
    torch.int8: tensor_pb2.DATA_TYPE_INT8,
    torch.uint8: tensor_pb2.DATA_TYPE_UINT8,
    torch.bool: tensor_pb2.DATA_TYPE_BOOL,
    torch.uint16: tensor_pb2.DATA_TYPE_UINT16,
    torch.uint32: tensor_pb2.DATA_TYPE_UINT32,
    torch.uint64: tensor_pb2.DATA_TYPE_UINT64,
    torch.float8_e4m3fn: tensor_pb2.DATA_TYPE_FLOAT8_E4M3FN,
    torch.float8_e4m3fnuz: tensor_pb2.DATA_TYPE_FLOAT8_E4M3FNUZ,
    torch.float8_e5m2: tensor_pb2.DATA_TYPE_FLOAT8_E5M2,
    torch.float8_e5m2fnuz: tensor_pb2.DATA_TYPE_FLOAT8_E5M2FNUZ,
    torch.complex64: tensor_pb2.DATA_TYPE_COMPLEX64,
    torch.complex128: tensor_pb2.DATA_TYPE_COMPLEX128,
}
_NAMES: Mapping[int, torch.dtype] = {number: dtype for dtype, number in _DTYPES.items()}

TRAINABLE = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""Element types a shard can hold."""


def is_trained(parameter: torch.Tensor) -> bool:
    """Whether an optimizer's parameter is one that an exchange holds. An empty one has nothing to
    train.
    """
    return parameter.requires_grad and parameter.numel() > 0


def has_address(tensor: torch.Tensor) -> bool:
    """Whether it is strided and has elements of its own, not those of tensors that it wraps."""
    if tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel():
        return False
    return tensor.is_meta or tensor.data_ptr() != 0


def address_of(tensor: torch.Tensor) -> tuple[str, int]:
    """The address space of a tensor, and where in it the tensor begins, in bytes. Every storage on
    the meta device is a space.
    """
    if tensor.is_meta:
        space = f"meta {tensor.untyped_storage()._cdata}"
        return space, int(tensor.storage_offset()) * tensor.itemsize
    return str(tensor.device), tensor.data_ptr()


def memory_of(tensor: torch.Tensor) -> Hashable:
    """What is equal for two tensors that have the same elements in the same order in memory."""
    if not has_address(tensor):
        return id(tensor)
    strides = None if tensor.is_contiguous() else tensor.stride()
    signs = (tensor.is_conj(), tensor.is_neg())
    return address_of(tensor), tensor.dtype, tensor.size(), strides, signs


with warnings.catch_warnings():
    # torch warns once per process that writing to a tensor over `bytes` is undefined: nobody does.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


_PARTS = (
    "register the plain tensors that it is made of, or keep it as an attribute that is no buffer, "
    "which every worker makes for itself"
)


def obstacle(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be sent, and what to do; None: it is plain elements of a known type."""
    if tensor.is_meta:
        return "has no memory: give it some, and values, before session.optimizer(...)"
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else "quantised"
        if not (tensor.is_nested or tensor.is_quantized):
            kind = str(tensor.layout).removeprefix("torch.")
        return f"is {kind}: {_PARTS}"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__}: {_PARTS}"
    if tensor.dtype not in _DTYPES:
        return f"is {tensor.dtype}: convert it to one of {_names_of(_DTYPES)}"
    return None


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous and on the host; a copy only where they are not already."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def digest(tensor: torch.Tensor) -> bytes:
    """Equal for tensors of equal type, shape and bytes, and for no others that will ever be met."""
    kind = f"{tensor.dtype} {list(tensor.shape)}".encode()
    hashed = hashlib.blake2b(kind, digest_size=16)
    hashed.update(bytes_of(plain(tensor)))
    return hashed.digest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, without a copy; valid as long as the tensor is."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # arrays are buffers; numpy says so from Python 3.12 on


def tensor_of(data: bytes | memoryview, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor over `data`, without a copy; never write to it. Raises ProtocolError when the size
    is wrong.
    """
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise ProtocolError(
            f"{len(data)} bytes where {expected} are needed for {dtype}{list(shape)}"
        )
    try:
        if not data:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(tuple(shape))
    except RuntimeError as error:  # negative sizes, or strides beyond 64 bits
        raise ProtocolError(f"no tensor has the shape {list(shape)}") from error


def to_wire(dtype: torch.dtype) -> tensor_pb2.DataType:
    """The wire's number of a dtype. Raises UsageError for one that has none."""
    if dtype not in _DTYPES:
        raise UsageError(
            f"tensors of {dtype} cannot be sent: convert to one of {_names_of(_DTYPES)}"
        )
    return _DTYPES[dtype]


def from_wire(number: int) -> torch.dtype:
    """The dtype of the wire's number. Raises ProtocolError for an unknown one."""
    if number not in _NAMES:
        raise ProtocolError(f"unknown element type {number}")
    return _NAMES[number]


def spec_of(name: str, tensor: torch.Tensor) -> tensor_pb2.TensorSpec:
    """Name, type and shape of a tensor."""
    return tensor_pb2.TensorSpec(name=name, dtype=to_wire(tensor.dtype), shape=tensor.shape)


def _names_of(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
