"""Between the project's own types and wire messages. Everything that is checked about a message's
shape is here.

Frames of the hot path are built and read by hand around their last field, so that the elements are
copied once on the way out and never on the way in. They are what the generated classes write and
read, except that `data` always comes last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError, Message

from ps_core.config import validate
from ps_core.errors import ConfigError, ProtocolError
from ps_core.job import Job
from ps_core.optim_spec import OPTIMIZERS, Hyperparameters, HyperparameterValue, OptimizerSpec
from ps_core.plan import ParameterSpec, Part, most_parts
from ps_core.settings import Config, ConsistencyConfig
from ps_core.tensors import TRAINABLE, bytes_of, from_wire, plain, spec_of, tensor_of, to_wire
from ps_core.v1 import shard_pb2, tensor_pb2

CHUNK_BYTES = 4 * 2**20
"""Largest piece of a tensor in one message."""

MAX_PART_BYTES = 2**23
"""A part must fit into a message."""
MAX_SHARDS = 2**12
MAX_PARAMETERS = 2**16
MAX_PARTS = 2**18
"""One TiB of parameters in parts of the usual size."""
_FREE_PARTS = 2**14
_BYTES_OF_ANOTHER_PART = 2**20
"""A job of more than so many parts must have so many bytes for each: a plan of none but
small parts would take seconds, and any stranger can ask for one.
"""
_MAX_DIMENSIONS = 64
"""torch's own bound."""

_REQUEST_PART = shard_pb2.ExchangeRequest.PART_FIELD_NUMBER << 3 | 2
_RESPONSE_PART = shard_pb2.ExchangeResponse.PART_FIELD_NUMBER << 3 | 2
_LOAD_PART = shard_pb2.LoadRequest.PART_FIELD_NUMBER << 3 | 2
_PULL_PART = shard_pb2.PullResponse.PART_FIELD_NUMBER << 3 | 2
_STEP = tensor_pb2.Part.STEP_FIELD_NUMBER << 3
_PART = tensor_pb2.Part.PART_FIELD_NUMBER << 3
_EPOCH = tensor_pb2.Part.EPOCH_FIELD_NUMBER << 3
_CLOCK = tensor_pb2.Part.CLOCK_FIELD_NUMBER << 3
_PRESENT = tensor_pb2.Part.PRESENT_FIELD_NUMBER << 3 | 2
_DATA = tensor_pb2.Part.DATA_FIELD_NUMBER << 3 | 2
_LONGEST_SHIFT = 56
"""Of a varint's last byte: nine bytes hold 63 bits."""

Parsed = TypeVar("Parsed", bound=Message)


# -- Hot frames ------------------------------------------------------------------------------------


def encode_push(step: int, part: Part, present: Sequence[bool], gradients: torch.Tensor) -> bytes:
    """An ExchangeRequest with the part's gradients, taken from the flat buffer of its bucket."""
    head = tensor_pb2.Part(step=step, part=part.index, present=_pack_bits(present))
    return _frame(_REQUEST_PART, head, gradients[part.start : part.start + part.length])


def encode_answer(
    version: int, part: int, parameters: torch.Tensor, *, epoch: int = 0, clock: int = 0
) -> bytes:
    """An ExchangeResponse with a part's parameters."""
    head = tensor_pb2.Part(step=version, part=part, epoch=epoch, clock=clock)
    return _frame(_RESPONSE_PART, head, parameters)


def encode_initial(part: Part, parameters: torch.Tensor) -> bytes:
    """A LoadRequest with a part's initial values, taken from the flat buffer of its bucket."""
    head = tensor_pb2.Part(part=part.index)
    return _frame(_LOAD_PART, head, parameters[part.start : part.start + part.length])


def encode_pulled(version: int, part: int, parameters: torch.Tensor) -> bytes:
    """A PullResponse with a part's parameters."""
    return _frame(_PULL_PART, tensor_pb2.Part(step=version, part=part), parameters)


@dataclass(frozen=True, slots=True)
class PartFrame:
    """A Part as it was received; `data` is a view of the frame."""

    step: int
    part: int
    present: bytes
    epoch: int
    clock: int
    data: memoryview


def decode_request(frame: bytes) -> PartFrame | shard_pb2.ExchangeRequest:
    """A message of a worker's stream, its elements not copied. Raises ProtocolError."""
    return _parse_part(_REQUEST_PART, frame) or parse(shard_pb2.ExchangeRequest, frame)


def decode_response(frame: bytes) -> PartFrame | shard_pb2.ExchangeResponse:
    """A message of a shard's stream, its elements not copied. Raises ProtocolError."""
    return _parse_part(_RESPONSE_PART, frame) or parse(shard_pb2.ExchangeResponse, frame)


def parse(kind: type[Parsed], frame: bytes) -> Parsed:
    """A message of a generated class. Raises ProtocolError for bytes that are none."""
    try:
        return kind.FromString(frame)
    except DecodeError as error:
        raise ProtocolError(f"{len(frame)} bytes that are no {kind.DESCRIPTOR.name}") from error


def _parse_part(field: int, frame: bytes) -> PartFrame | None:
    """The Part in a frame; None for another message, or a layout that needs the generated class."""
    try:
        size, at = _read_varint(frame, 1)
        if frame[0] != field or at + size != len(frame):
            return None
        numbers, present = dict.fromkeys((_STEP, _PART, _EPOCH, _CLOCK), 0), b""
        while True:
            tag, (value, at) = frame[at], _read_varint(frame, at + 1)
            if tag == _DATA and at + value == len(frame):
                step, part, epoch, clock = numbers.values()
                part &= 0xFFFF_FFFF  # as the generated class does
                return PartFrame(step, part, present, epoch, clock, memoryview(frame)[at:])
            if tag == _PRESENT:
                present, at = frame[at : at + value], at + value
            elif tag in numbers:
                numbers[tag] = value
            else:
                return None
    except IndexError:
        return None


def _read_varint(frame: bytes, at: int) -> tuple[int, int]:
    """The number at a position, and the position after it. Raises IndexError past the end, and for
    a number of more bytes than honest ones have: a megabyte of them would take hours to add up.
    """
    value = shift = 0
    while frame[at] > 0x7F:
        value |= (frame[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if shift > _LONGEST_SHIFT:
            raise IndexError
    return value | frame[at] << shift, at + 1


def decode_elements(message: PartFrame | tensor_pb2.Part, part: Part) -> torch.Tensor:
    """The part's elements over the message's bytes: 1-D, not to be written to.

    Raises ProtocolError when their size is not the plan's.
    """
    data = message.data
    if len(data) != part.num_bytes:
        raise ProtocolError(
            f"part {part.index} has {len(data)} bytes where the plan says {part.num_bytes}"
        )
    return tensor_of(data, part.dtype, (part.length,))


def decode_present(message: PartFrame | tensor_pb2.Part, part: Part) -> tuple[bool, ...]:
    """Which slices of the part have a gradient. Raises ProtocolError."""
    count = len(part.slices)
    packed = message.present
    if not packed:
        return (True,) * count
    if len(packed) != -(-count // 8):
        raise ProtocolError(
            f"part {part.index} has {count} slices, not the {8 * len(packed)} it says"
        )
    return tuple(bool(packed[i // 8] >> i % 8 & 1) for i in range(count))


def _pack_bits(present: Sequence[bool]) -> bytes:
    if all(present):
        return b""
    packed = bytearray(-(-len(present) // 8))
    for index, flag in enumerate(present):
        packed[index // 8] |= flag << index % 8
    return bytes(packed)


def _frame(field: int, head: tensor_pb2.Part, elements: torch.Tensor) -> bytes:
    data = bytes_of(elements)
    inner = head.SerializeToString() + bytes([_DATA]) + _varint(len(data))
    return b"".join((bytes([field]), _varint(len(inner) + len(data)), inner, data))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


# -- Tensors that are not hot ----------------------------------------------------------------------


def encode_chunks(
    name: str, tensor: torch.Tensor, digest: bytes = b""
) -> Iterator[tensor_pb2.TensorChunk]:
    """A named tensor as one or more chunks, each with the tensor's `digest`."""
    spec = spec_of(name, tensor)
    data = bytes_of(plain(tensor))
    for offset in range(0, max(1, len(data)), CHUNK_BYTES):
        piece = bytes(data[offset : offset + CHUNK_BYTES])
        yield tensor_pb2.TensorChunk(spec=spec, offset_bytes=offset, data=piece, digest=digest)


def write_chunk(chunk: tensor_pb2.TensorChunk, tensor: torch.Tensor) -> None:
    """Copy a chunk into its place in a contiguous host tensor. Raises ProtocolError when it does
    not fit.
    """
    dtype, shape = from_wire(chunk.spec.dtype), tuple(chunk.spec.shape)
    if (dtype, shape) != (tensor.dtype, tuple(tensor.shape)):
        raise ProtocolError(
            f"tensor {chunk.spec.name} is {dtype}{list(shape)} there and "
            f"{tensor.dtype}{list(tensor.shape)} here"
        )
    target = bytes_of(tensor)
    end = chunk.offset_bytes + len(chunk.data)
    if end > len(target):
        raise ProtocolError(f"a chunk of {chunk.spec.name} ends at byte {end} of {len(target)}")
    target[chunk.offset_bytes : end] = chunk.data


def encode_state(part: int, slice_: int, key: str, tensor: torch.Tensor) -> tensor_pb2.StateTensor:
    """One tensor of the optimizer's state for one slice."""
    data = bytes(bytes_of(tensor.contiguous()))
    return tensor_pb2.StateTensor(part=part, slice=slice_, spec=spec_of(key, tensor), data=data)


def decode_state(message: tensor_pb2.StateTensor) -> torch.Tensor:
    """The state tensor, in memory of its own. Raises ProtocolError."""
    dtype = from_wire(message.spec.dtype)
    return tensor_of(message.data, dtype, tuple(message.spec.shape)).clone()


# -- The job ---------------------------------------------------------------------------------------


def encode_job(job: Job) -> shard_pb2.JobSpec:
    """A job as a message, with the fingerprint of its plan."""
    return shard_pb2.JobSpec(
        protocol=job.protocol,
        job_id=job.job_id,
        num_workers=job.num_workers,
        num_shards=job.num_shards,
        parameters=[_encode_parameter(spec) for spec in job.parameters],
        part_bytes=job.part_bytes,
        bucket_bytes=job.bucket_bytes,
        optimizer=shard_pb2.OptimizerSpec(
            name=job.optimizer.name,
            groups=encode_groups(job.optimizer.groups),
            max_grad_norm=job.optimizer.max_grad_norm,
        ),
        consistency=_encode_consistency(job.consistency),
        fingerprint=job.plan.fingerprint,
    )


def decode_job(message: shard_pb2.JobSpec) -> Job:
    """The job a message describes, of which a plan can be made. Makes none, so that the time is
    bounded by the message's size. Raises ProtocolError.
    """
    _check_counts(message)
    _check_sizes(message)
    optimizer = message.optimizer
    job = Job(
        job_id=message.job_id,
        num_workers=message.num_workers,
        num_shards=message.num_shards,
        parameters=tuple(_decode_parameter(p, len(optimizer.groups)) for p in message.parameters),
        part_bytes=message.part_bytes,
        bucket_bytes=message.bucket_bytes,
        optimizer=OptimizerSpec(
            optimizer.name,
            decode_groups(optimizer.groups),
            optimizer.max_grad_norm if optimizer.HasField("max_grad_norm") else None,
        ),
        consistency=_decode_consistency(message.consistency),
        protocol=message.protocol,
    )
    _check_pieces(job)
    return job


def _check_sizes(message: shard_pb2.JobSpec) -> None:
    """Refuse what no plan can be made of, before any of its numbers sizes a loop or a list."""
    if not (message.num_workers and message.num_shards and message.parameters):
        raise ProtocolError("a job needs workers, shards and parameters")
    if message.part_bytes < 512 or message.part_bytes % 512 or not message.bucket_bytes:
        raise ProtocolError(f"part_bytes {message.part_bytes} is not a positive multiple of 512")
    if message.part_bytes > MAX_PART_BYTES:
        raise ProtocolError(f"part_bytes {message.part_bytes} is more than {MAX_PART_BYTES}")
    optimizer = message.optimizer
    if optimizer.name not in OPTIMIZERS:
        raise ProtocolError(f"unknown optimizer {optimizer.name!r}")
    if optimizer.HasField("max_grad_norm") and not 0 < optimizer.max_grad_norm < math.inf:
        raise ProtocolError(f"max_grad_norm {optimizer.max_grad_norm} is not a positive number")
    if any("lr" not in group.values for group in optimizer.groups):
        raise ProtocolError("every parameter group needs an lr")
    if max(spec.stage for spec in message.parameters) >= message.num_shards:
        raise ProtocolError("a stage needs a shard of its own: give as many shards as stages")


def _check_counts(message: shard_pb2.JobSpec) -> None:
    """Refuse longer lists than any job has."""
    if message.num_shards > MAX_SHARDS:
        raise ProtocolError(f"{message.num_shards} shards are more than {MAX_SHARDS}")
    num_entries = max(len(message.parameters), len(message.optimizer.groups))
    if num_entries > MAX_PARAMETERS:
        raise ProtocolError(f"{num_entries} parameters or groups are more than {MAX_PARAMETERS}")


def _check_pieces(job: Job) -> None:
    """Refuse a job whose plan would take long."""
    num_parts = most_parts(job.parameters, job.num_shards, job.part_bytes, job.bucket_bytes)
    num_bytes = sum(spec.num_bytes for spec in job.parameters)
    if num_parts > min(MAX_PARTS, _FREE_PARTS + num_bytes // _BYTES_OF_ANOTHER_PART):
        raise ProtocolError(
            f"parts of at most {job.part_bytes} bytes over {job.num_shards} shards are too many "
            "pieces: choose larger parts (exchange.part_bytes)"
        )


def _encode_consistency(config: ConsistencyConfig) -> shard_pb2.Consistency:
    names = (field.name for field in shard_pb2.Consistency.DESCRIPTOR.fields)
    return shard_pb2.Consistency(**{name: getattr(config, name) for name in names})


def _decode_consistency(message: shard_pb2.Consistency) -> ConsistencyConfig:
    """Raises ProtocolError for what no configuration allows."""
    names = (field.name for field in message.DESCRIPTOR.fields)
    config = ConsistencyConfig(**{name: getattr(message, name) for name in names})
    if (config.mode, config.bound) == ("bounded", 0):
        raise ProtocolError("consistency.bound = 0: this is mode sync, not bounded")
    try:
        validate(Config(consistency=config))
    except ConfigError as error:
        raise ProtocolError(str(error)) from error
    return config


def _encode_parameter(spec: ParameterSpec) -> shard_pb2.ParameterSpec:
    tensor = tensor_pb2.TensorSpec(name=spec.name, dtype=to_wire(spec.dtype), shape=spec.shape)
    return shard_pb2.ParameterSpec(tensor=tensor, group=spec.group, stage=spec.stage)


def _decode_parameter(message: shard_pb2.ParameterSpec, num_groups: int) -> ParameterSpec:
    tensor = message.tensor
    if len(tensor.shape) > _MAX_DIMENSIONS:
        raise ProtocolError(f"parameter {tensor.name!r} has {len(tensor.shape)} dimensions")
    shape = tuple(tensor.shape)
    spec = ParameterSpec(tensor.name, from_wire(tensor.dtype), shape, message.group, message.stage)
    if spec.dtype not in TRAINABLE or min(spec.shape, default=1) < 1 or spec.group >= num_groups:
        raise ProtocolError(f"parameter {spec.name!r} has a bad dtype, shape or group")
    return spec


def encode_groups(groups: Sequence[Hyperparameters]) -> list[shard_pb2.Hyperparameters]:
    """Hyperparameters, one message per parameter group."""
    return [
        shard_pb2.Hyperparameters(values={key: _encode_value(v) for key, v in group.items()})
        for group in groups
    ]


def decode_groups(messages: Sequence[shard_pb2.Hyperparameters]) -> tuple[Hyperparameters, ...]:
    """The inverse of `encode_groups`. Raises ProtocolError."""
    return tuple({key: _decode_value(key, v) for key, v in m.values.items()} for m in messages)


def _encode_value(value: HyperparameterValue) -> shard_pb2.HyperparameterValue:
    if isinstance(value, bool):
        return shard_pb2.HyperparameterValue(flag=value)
    if isinstance(value, int):
        return shard_pb2.HyperparameterValue(integer=value)
    if isinstance(value, float):
        return shard_pb2.HyperparameterValue(real=value)
    return shard_pb2.HyperparameterValue(reals=shard_pb2.RealList(values=value))


def _decode_value(key: str, message: shard_pb2.HyperparameterValue) -> HyperparameterValue:
    match message.WhichOneof("value"):
        case "flag":
            return message.flag
        case "integer":
            return message.integer
        case "real":
            return message.real
        case "reals":
            return tuple(message.reals.values)
    raise ProtocolError(f"hyperparameter {key} has no value")
