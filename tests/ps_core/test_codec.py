import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ps_core import codec, dialogue
from ps_core.errors import ProtocolError, ShardlineError, UsageError
from ps_core.job import Job
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import ParameterSpec, Part, Slice, most_parts
from ps_core.settings import ConsistencyConfig
from ps_core.tensors import TRAINABLE, bytes_of, from_wire, tensor_of, to_wire
from ps_core.v1 import shard_pb2, tensor_pb2

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {
    torch.float64: "DATA_TYPE_FLOAT64",
    torch.float32: "DATA_TYPE_FLOAT32",
    torch.bfloat16: "DATA_TYPE_BFLOAT16",
    torch.float16: "DATA_TYPE_FLOAT16",
    torch.int64: "DATA_TYPE_INT64",
    torch.int32: "DATA_TYPE_INT32",
    torch.int16: "DATA_TYPE_INT16",
    torch.int8: "DATA_TYPE_INT8",
    torch.uint8: "DATA_TYPE_UINT8",
    torch.bool: "DATA_TYPE_BOOL",
    torch.uint16: "DATA_TYPE_UINT16",
    torch.uint32: "DATA_TYPE_UINT32",
    torch.uint64: "DATA_TYPE_UINT64",
    torch.float8_e4m3fn: "DATA_TYPE_FLOAT8_E4M3FN",
    torch.float8_e4m3fnuz: "DATA_TYPE_FLOAT8_E4M3FNUZ",
    torch.float8_e5m2: "DATA_TYPE_FLOAT8_E5M2",
    torch.float8_e5m2fnuz: "DATA_TYPE_FLOAT8_E5M2FNUZ",
    torch.complex64: "DATA_TYPE_COMPLEX64",
    torch.complex128: "DATA_TYPE_COMPLEX128",
}


def make_part(
    length: int, num_slices: int = 1, *, start: int = 0, index: int = 0, dtype: torch.dtype = F32
) -> Part:
    slices = tuple(Slice(number, 0, 1, number) for number in range(num_slices))
    return Part(index, 0, 0, 0, dtype, start, length, slices)


def random_bytes(count: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(count)


def random_tensor(count: int, dtype: torch.dtype = F32, seed: int = 5) -> torch.Tensor:
    """Any bits at all, NaN among them."""
    return torch.frombuffer(bytearray(random_bytes(count * dtype.itemsize, seed)), dtype=dtype)


def bits(present: list[bool]) -> bytes:
    """The bitmap, from its definition: bit i, least significant first, is slice i."""
    number = sum(1 << index for index, flag in enumerate(present) if flag)
    return number.to_bytes((len(present) + 7) // 8, "little")


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bytes(bytes_of(one)) == bytes(bytes_of(other))


# -- Tensors as bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "name"), DTYPES.items())
def test_every_dtype_has_the_number_of_its_name(dtype: torch.dtype, name: str) -> None:
    assert tensor_pb2.DataType.Name(to_wire(dtype)) == name
    assert from_wire(tensor_pb2.DataType.Value(name)) is dtype


def test_the_wire_has_no_dtype_beyond_these_and_only_floats_are_trained() -> None:
    assert set(tensor_pb2.DataType.keys()) == {*DTYPES.values(), "DATA_TYPE_UNSPECIFIED"}
    floats = {dtype for dtype in DTYPES if dtype.is_floating_point}
    assert {dtype for dtype in floats if dtype.itemsize > 1} == TRAINABLE


def test_a_dtype_without_a_number_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match=r"complex32.*float32"):
        to_wire(torch.complex32)


@pytest.mark.parametrize("number", [0, 20, -1, 2**31 - 1])
def test_an_unknown_number_of_a_dtype_is_refused(number: int) -> None:
    with pytest.raises(ProtocolError, match=str(number)):
        from_wire(number)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0,), (2, 0, 3)])
def test_bytes_of_a_tensor_are_little_endian_and_give_the_tensor_back(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.arange(24)[: int(torch.tensor(shape).prod())].view(shape).to(dtype)
    data = bytes(bytes_of(tensor))
    back = tensor_of(data, dtype, shape)
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert same_bytes(back, tensor)


def test_bytes_of_a_tensor_are_a_view_of_its_memory() -> None:
    tensor = torch.zeros(2, dtype=torch.int32, requires_grad=False)
    view = bytes_of(tensor)
    tensor[1] = 0x01020304
    assert bytes(view) == b"\0\0\0\0\4\3\2\1"


def test_the_bytes_of_a_parameter_can_be_taken_although_it_requires_grad() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    assert bytes(bytes_of(parameter)) == b"\0\0\x80\x3f"


@pytest.mark.parametrize("count", [0, 4, 11, 13, 16])
def test_bytes_that_do_not_fit_the_shape_are_refused(count: int) -> None:
    with pytest.raises(ProtocolError, match=f"{count} bytes where 12 are needed"):
        tensor_of(bytes(count), F32, (3,))


@pytest.mark.parametrize(
    ("count", "shape"),
    [
        pytest.param(4, (-1, -1), id="two negative sizes whose product is right"),
        pytest.param(0, (0, -1), id="a negative size in an empty tensor"),
        pytest.param(0, (0, 2**62, 4), id="an empty tensor whose strides overflow"),
    ],
)
def test_a_shape_that_no_tensor_has_is_refused(count: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError):
        tensor_of(bytes(count), F32, shape)


# -- Hot frames: the bytes of the generated classes ------------------------------------------------

# Lengths around which a varint grows: one to four bytes.
lengths = st.one_of(
    st.integers(1, 300),
    st.sampled_from([31, 32, 33, 4090, 4095, 4096, 4097, 5000, 524_287, 524_288]),
)
numbers = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))
steps = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))


@given(
    steps, numbers, st.lists(st.booleans(), min_size=1, max_size=40), lengths, st.integers(0, 200)
)
def test_a_push_is_byte_for_byte_what_the_generated_classes_write(
    step: int, index: int, present: list[bool], length: int, start: int
) -> None:
    flat = random_tensor(start + length + 7)
    part = make_part(length, len(present), start=start, index=index)
    expected = shard_pb2.ExchangeRequest(
        part=tensor_pb2.Part(
            step=step,
            part=index,
            present=b"" if all(present) else bits(present),
            data=bytes(bytes_of(flat))[4 * start : 4 * (start + length)],
        )
    )
    assert codec.encode_push(step, part, present, flat) == expected.SerializeToString()


@given(steps, numbers, lengths)
def test_answers_and_pulled_parts_are_byte_for_byte_what_the_generated_classes_write(
    version: int, index: int, length: int
) -> None:
    elements = random_tensor(length, BF16)
    part = tensor_pb2.Part(step=version, part=index, data=bytes(bytes_of(elements)))
    answer = shard_pb2.ExchangeResponse(part=part).SerializeToString()
    pulled = shard_pb2.PullResponse(part=part).SerializeToString()
    assert codec.encode_answer(version, index, elements) == answer
    assert codec.encode_pulled(version, index, elements) == pulled


@given(numbers, lengths, st.integers(0, 200))
def test_initial_values_are_byte_for_byte_what_the_generated_classes_write(
    index: int, length: int, start: int
) -> None:
    flat = random_tensor(start + length + 7)
    data = bytes(bytes_of(flat))[4 * start : 4 * (start + length)]
    expected = shard_pb2.LoadRequest(part=tensor_pb2.Part(part=index, data=data))
    frame = codec.encode_initial(make_part(length, start=start, index=index), flat)
    assert frame == expected.SerializeToString()


def test_a_frame_of_four_mebibytes_is_also_right() -> None:
    flat = random_tensor(2**20)
    part = make_part(2**20, 3, index=70_000)
    frame = codec.encode_push(2**40, part, [True, False, True], flat)
    message = shard_pb2.ExchangeRequest.FromString(frame)
    assert message.SerializeToString() == frame


# -- Hot frames, read by hand ----------------------------------------------------------------------


def varint(value: int) -> bytes:
    """A number on the wire, from the definition: groups of seven bits, the lowest first."""
    groups = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def number_field(field: int, value: int) -> bytes:
    """A field of wire type 0; proto3 leaves out a 0."""
    return varint(field << 3) + varint(value) if value else b""


def bytes_field(field: int, data: bytes) -> bytes:
    """A field of wire type 2."""
    return varint(field << 3 | 2) + varint(len(data)) + data


@given(steps, numbers, steps, steps, lengths)
def test_an_answer_with_epoch_and_clock_has_its_data_last_and_says_what_the_generated_classes_say(
    version: int, index: int, epoch: int, clock: int, length: int
) -> None:
    elements = random_tensor(length)
    data = bytes(bytes_of(elements))
    frame = codec.encode_answer(version, index, elements, epoch=epoch, clock=clock)
    fields = ((1, version), (2, index), (5, epoch), (6, clock))
    head = b"".join(number_field(*field) for field in fields)
    assert frame == bytes_field(1, head + bytes_field(4, data))
    part = tensor_pb2.Part(step=version, part=index, epoch=epoch, clock=clock, data=data)
    assert shard_pb2.ExchangeResponse.FromString(frame) == shard_pb2.ExchangeResponse(part=part)


def as_message(frame: codec.PartFrame) -> tensor_pb2.Part:
    return tensor_pb2.Part(
        step=frame.step,
        part=frame.part,
        present=frame.present,
        epoch=frame.epoch,
        clock=frame.clock,
        data=bytes(frame.data),
    )


def read(frame: bytes) -> tensor_pb2.Part:
    """What `decode_response` makes of a part, read by hand or not."""
    response = codec.decode_response(frame)
    return as_message(response) if isinstance(response, codec.PartFrame) else response.part


def test_what_the_hand_has_written_it_reads_without_a_copy_of_the_elements() -> None:
    elements = random_tensor(64)
    frame = codec.encode_answer(2**40, 3, elements, epoch=4, clock=5)
    response = codec.decode_response(frame)
    assert isinstance(response, codec.PartFrame)
    assert (response.step, response.part, response.epoch, response.clock) == (2**40, 3, 4, 5)
    assert response.data.obj is frame
    assert bytes(response.data) == bytes(bytes_of(elements))


@given(steps, numbers, st.binary(max_size=5), steps, steps, st.binary(max_size=300))
def test_a_part_of_the_generated_classes_is_read_whatever_the_order_of_its_fields(
    step: int, index: int, present: bytes, epoch: int, clock: int, data: bytes
) -> None:
    part = tensor_pb2.Part(
        step=step, part=index, present=present, epoch=epoch, clock=clock, data=data
    )
    assert read(shard_pb2.ExchangeResponse(part=part).SerializeToString()) == part


# A part's fields as a hostile or foreign client may write them: in any order, repeated, with
# numbers of more bits than their type or more bytes than they need.
wide = st.one_of(steps, st.sampled_from([2**32, 2**33 + 5, 2**63 - 1, 2**63, 2**64 - 1]))
padding = st.integers(0, 9)


def padded(value: int, zeros: int) -> bytes:
    """A varint with redundant bytes, at most ten in all, which readers accept."""
    plain = varint(value)
    extra = min(zeros, 10 - len(plain))
    if not extra:
        return plain
    return plain[:-1] + bytes([plain[-1] | 0x80]) + b"\x80" * (extra - 1) + b"\0"


number_fields = st.builds(
    lambda field, value, zeros: varint(field << 3) + padded(value, zeros),
    st.sampled_from([1, 2, 5, 6, 9]),
    wide,
    padding,
)
bytes_fields = st.builds(bytes_field, st.sampled_from([3, 4, 8]), st.binary(max_size=40))


@given(st.lists(st.one_of(number_fields, bytes_fields), max_size=8))
@example([varint(2 << 3) + varint(2**32 + 5), bytes_field(4, b"data")])
@example([varint(1 << 3) + varint(2**64 - 1), bytes_field(4, b"data")])
@example([varint(1 << 3) + varint(7), varint(1 << 3) + padded(0, 3), bytes_field(4, b"")])
def test_any_fields_of_a_part_are_read_as_the_generated_classes_read_them(
    fields: list[bytes],
) -> None:
    frame = bytes_field(1, b"".join(fields))
    expected = shard_pb2.ExchangeResponse.FromString(frame).part
    expected.DiscardUnknownFields()
    actual = read(frame)
    actual.DiscardUnknownFields()
    assert actual == expected


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"\x1a", id="as the length of the part"),
        pytest.param(b"\x1a\x80\x80\x80\x04\x08", id="as its step"),
    ],
)
def test_a_number_of_a_million_bytes_is_refused_at_once(head: bytes) -> None:
    frame = head + b"\xff" * 2**20
    started = time.process_time()
    with pytest.raises(ProtocolError):
        codec.decode_request(frame)
    assert time.process_time() - started < 1


def test_other_messages_are_left_to_the_generated_classes() -> None:
    met = shard_pb2.ExchangeResponse(met=shard_pb2.Met(step=3), number=2)
    assert codec.decode_response(met.SerializeToString()) == met
    idle = shard_pb2.ExchangeRequest(idle=shard_pb2.Idle(), number=1)
    assert codec.decode_request(idle.SerializeToString()) == idle
    assert codec.decode_request(b"") == shard_pb2.ExchangeRequest()
    with pytest.raises(ProtocolError, match="2 bytes that are no ExchangeResponse"):
        codec.decode_response(b"\xff\xff")


@given(
    st.lists(st.booleans(), min_size=1, max_size=40), st.sampled_from(sorted(TRAINABLE, key=str))
)
def test_a_push_comes_back_as_it_was_sent(present: list[bool], dtype: torch.dtype) -> None:
    part = make_part(128, len(present), start=64, index=9, dtype=dtype)
    flat = random_tensor(256, dtype)
    request = shard_pb2.ExchangeRequest.FromString(codec.encode_push(3, part, present, flat))
    assert request.WhichOneof("message") == "part"
    assert (request.part.step, request.part.part) == (3, 9)
    assert codec.decode_present(request.part, part) == tuple(present)
    elements = codec.decode_elements(request.part, part)
    assert elements.dtype is dtype
    assert same_bytes(elements, flat[64:192])


def test_an_absent_slice_is_not_the_same_as_all_slices_absent() -> None:
    part = make_part(64, 9)
    assert codec.decode_present(tensor_pb2.Part(present=b"\0\0"), part) == (False,) * 9
    assert codec.decode_present(tensor_pb2.Part(present=b""), part) == (True,) * 9
    assert codec.decode_present(tensor_pb2.Part(present=b"\2\1"), part) == (
        *(False, True, False, False, False, False, False, False),
        True,
    )


@pytest.mark.parametrize("count", [0, 1, 252, 255, 257, 260, 512])
def test_a_part_of_the_wrong_size_is_refused(count: int) -> None:
    with pytest.raises(ProtocolError, match=f"part 7 has {count} bytes where the plan says 256"):
        codec.decode_elements(tensor_pb2.Part(part=7, data=bytes(count)), make_part(64, index=7))


@pytest.mark.parametrize(
    ("num_slices", "bitmap"), [(8, b"\1\1"), (9, b"\1"), (9, b"\1\1\1"), (1, b"\1\0")]
)
def test_a_bitmap_of_the_wrong_size_is_refused(num_slices: int, bitmap: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"part 7 has {num_slices} slices"):
        codec.decode_present(tensor_pb2.Part(present=bitmap), make_part(64, num_slices, index=7))


# -- Chunks and state ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_a_small_tensor_is_one_chunk_and_comes_back(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.ones(shape).to(dtype)
    (chunk,) = codec.encode_chunks("running_mean", tensor)
    assert (chunk.spec.name, chunk.offset_bytes) == ("running_mean", 0)
    back = torch.zeros(shape).to(dtype)
    codec.write_chunk(chunk, back)
    assert same_bytes(back, tensor)


@pytest.mark.parametrize("extra", [-1, 0, 1, 3])
def test_a_large_tensor_is_cut_into_chunks_that_may_come_in_any_order(
    monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    monkeypatch.setattr(codec, "CHUNK_BYTES", 100)
    tensor = random_tensor(300 + extra, torch.int8)
    chunks = list(codec.encode_chunks("table", tensor))
    assert len(chunks) == (3 if extra <= 0 else 4)
    assert max(len(chunk.data) for chunk in chunks) == 100
    assert [chunk.offset_bytes for chunk in chunks] == list(range(0, 300 + max(0, extra), 100))
    back = torch.zeros_like(tensor)
    random.Random(1).shuffle(chunks)
    for chunk in chunks:
        codec.write_chunk(tensor_pb2.TensorChunk.FromString(chunk.SerializeToString()), back)
    assert torch.equal(back, tensor)


def test_a_transposed_tensor_is_sent_in_the_order_of_its_indices() -> None:
    (chunk,) = codec.encode_chunks("t", torch.tensor([[1, 2], [3, 4]], dtype=torch.int8).t())
    assert chunk.data == b"\1\3\2\4"


def chunk_of(tensor: torch.Tensor, offset: int, data: bytes) -> tensor_pb2.TensorChunk:
    (chunk,) = codec.encode_chunks("mean", tensor)
    chunk.offset_bytes, chunk.data = offset, data
    return chunk


@pytest.mark.parametrize(
    ("offset", "count"), [(0, 13), (1, 12), (12, 1), (13, 0), (2**64 - 1, 1), (2**63, 12)]
)
def test_a_chunk_that_ends_outside_its_tensor_is_refused_and_writes_nothing(
    offset: int, count: int
) -> None:
    target = torch.zeros(3)
    with pytest.raises(ProtocolError, match="of 12"):
        codec.write_chunk(chunk_of(target, offset, b"\1" * count), target)
    assert not target.any()


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(torch.zeros(4), id="another shape"),
        pytest.param(torch.zeros(3, 1), id="another number of dimensions"),
        pytest.param(torch.zeros(3, dtype=torch.int32), id="another dtype of the same size"),
    ],
)
def test_a_chunk_of_another_tensor_is_refused(target: torch.Tensor) -> None:
    with pytest.raises(ProtocolError, match="tensor mean is"):
        codec.write_chunk(chunk_of(torch.zeros(3), 0, b"\1"), target)


def test_a_chunk_of_an_unknown_dtype_is_refused() -> None:
    chunk = tensor_pb2.TensorChunk(spec=tensor_pb2.TensorSpec(shape=[3]), data=b"\0" * 12)
    with pytest.raises(ProtocolError, match="element type 0"):
        codec.write_chunk(chunk, torch.zeros(3))


@pytest.mark.parametrize(
    "tensor", [torch.tensor(7.0), torch.randn(3, 4).t(), torch.ones(3).double()]
)
def test_optimizer_state_comes_back_in_memory_of_its_own(tensor: torch.Tensor) -> None:
    sent = codec.encode_state(4, 2, "exp_avg", tensor)
    message = tensor_pb2.StateTensor.FromString(sent.SerializeToString())
    assert (message.part, message.slice, message.spec.name) == (4, 2, "exp_avg")
    state = codec.decode_state(message)
    assert state.dtype is tensor.dtype
    assert torch.equal(state, tensor)
    state.add_(1.0)
    assert torch.equal(codec.decode_state(message), tensor)


@pytest.mark.parametrize(
    ("dtype", "shape", "count"),
    [(2, [3], 8), (2, [], 0), (2, [-3], 12), (2, [-1, -1], 4), (99, [3], 12), (0, [3], 12)],
)
def test_malformed_optimizer_state_is_refused(dtype: int, shape: list[int], count: int) -> None:
    message = tensor_pb2.StateTensor(data=bytes(count))
    message.spec.dtype = dtype  # type: ignore[assignment]  # a number the enum may not have
    message.spec.shape.extend(shape)
    with pytest.raises(ProtocolError):
        codec.decode_state(message)


# -- Hyperparameters -------------------------------------------------------------------------------

values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.lists(st.floats(allow_nan=False), max_size=4).map(tuple),
)


@given(st.lists(st.dictionaries(st.text(max_size=8), values, max_size=6), max_size=3))
def test_hyperparameters_come_back_with_their_values_and_types(
    groups: list[Hyperparameters],
) -> None:
    messages = [
        shard_pb2.Hyperparameters.FromString(message.SerializeToString())
        for message in codec.encode_groups(groups)
    ]
    back = codec.decode_groups(messages)
    assert back == tuple(groups)
    for sent, received in zip(groups, back, strict=True):
        assert {k: type(v) for k, v in received.items()} == {k: type(v) for k, v in sent.items()}


def test_a_hyperparameter_without_a_value_is_refused() -> None:
    message = shard_pb2.Hyperparameters(values={"lr": shard_pb2.HyperparameterValue()})
    with pytest.raises(ProtocolError, match="hyperparameter lr has no value"):
        codec.decode_groups([message])


# -- The job ---------------------------------------------------------------------------------------

JOB = Job(
    job_id="digits",
    num_workers=3,
    num_shards=2,
    parameters=(
        ParameterSpec("weight", F32, (30, 50), 0),
        ParameterSpec("bias", BF16, (50,), 1),
        ParameterSpec("scale", torch.float64, (), 0),
    ),
    part_bytes=1024,
    bucket_bytes=4096,
    optimizer=OptimizerSpec(
        "AdamW",
        (
            {"lr": 1e-3, "betas": (0.9, 0.95), "amsgrad": False, "weight_decay": 1},
            {"lr": 1e-4, "betas": (0.9, 0.99), "amsgrad": True, "weight_decay": 0.0},
        ),
        max_grad_norm=1.0,
    ),
    consistency=ConsistencyConfig(deterministic=True),
)


def over_the_wire(job: Job) -> shard_pb2.JobSpec:
    return shard_pb2.JobSpec.FromString(codec.encode_job(job).SerializeToString())


@pytest.mark.parametrize(
    "job",
    [
        JOB,
        *(
            replace(JOB, consistency=consistency)
            for consistency in (
                ConsistencyConfig(),
                ConsistencyConfig(backup_workers=2),
                ConsistencyConfig("bounded", bound=7),
                ConsistencyConfig("async"),
                ConsistencyConfig("async", staleness_scaling=True),
                ConsistencyConfig("async", delay_compensation=0.04),
                ConsistencyConfig("local", local_steps=500),
            )
        ),
        replace(JOB, optimizer=replace(JOB.optimizer, max_grad_norm=None)),
        replace(JOB, optimizer=replace(JOB.optimizer, max_grad_norm=1e-9)),
        replace(JOB, protocol=7, job_id=""),
    ],
)
def test_a_job_comes_back_as_it_was_sent(job: Job) -> None:
    back = codec.decode_job(over_the_wire(job))
    assert back == job
    assert back.plan == job.plan
    assert isinstance(back.optimizer.groups[0]["weight_decay"], int)


def no_workers(message: shard_pb2.JobSpec) -> None:
    message.num_workers = 0


def no_shards(message: shard_pb2.JobSpec) -> None:
    message.num_shards = 0


def no_parameters(message: shard_pb2.JobSpec) -> None:
    del message.parameters[:]


def no_part_size(message: shard_pb2.JobSpec) -> None:
    message.part_bytes = 0


def a_part_size_of_no_whole_alignment(message: shard_pb2.JobSpec) -> None:
    message.part_bytes = 1000


def a_small_part_size(message: shard_pb2.JobSpec) -> None:
    message.part_bytes = 256


def no_bucket_size(message: shard_pb2.JobSpec) -> None:
    message.bucket_bytes = 0


def an_unknown_optimizer(message: shard_pb2.JobSpec) -> None:
    message.optimizer.name = "LBFGS"


def no_optimizer(message: shard_pb2.JobSpec) -> None:
    message.ClearField("optimizer")


def a_dtype_that_is_not_trained(message: shard_pb2.JobSpec) -> None:
    message.parameters[1].tensor.dtype = tensor_pb2.DATA_TYPE_INT64


def an_unknown_dtype(message: shard_pb2.JobSpec) -> None:
    message.parameters[1].tensor.dtype = 77  # type: ignore[assignment]  # not in the enum


def an_empty_parameter(message: shard_pb2.JobSpec) -> None:
    message.parameters[0].tensor.shape[1] = 0


def a_negative_shape(message: shard_pb2.JobSpec) -> None:
    message.parameters[0].tensor.shape[0] = -30


def an_unknown_group(message: shard_pb2.JobSpec) -> None:
    message.parameters[0].group = 2


def no_groups(message: shard_pb2.JobSpec) -> None:
    del message.optimizer.groups[:]


def a_hyperparameter_without_value(message: shard_pb2.JobSpec) -> None:
    message.optimizer.groups[0].values["lr"].Clear()


def a_group_without_lr(message: shard_pb2.JobSpec) -> None:
    del message.optimizer.groups[1].values["lr"]


def no_consistency(message: shard_pb2.JobSpec) -> None:
    message.ClearField("consistency")


def an_unknown_mode(message: shard_pb2.JobSpec) -> None:
    message.consistency.mode = "eventual"


def a_modifier_of_another_mode(message: shard_pb2.JobSpec) -> None:
    message.consistency.staleness_scaling = True


def a_compensation_that_is_no_number(message: shard_pb2.JobSpec) -> None:
    message.consistency.mode = "async"
    message.consistency.delay_compensation = float("nan")


def two_answers_to_old_gradients(message: shard_pb2.JobSpec) -> None:
    message.consistency.mode = "async"
    message.consistency.delay_compensation = 0.5
    message.consistency.staleness_scaling = True


def a_bound_of_zero(message: shard_pb2.JobSpec) -> None:
    message.consistency.mode = "bounded"
    message.consistency.bound = 0


def no_local_steps(message: shard_pb2.JobSpec) -> None:
    message.consistency.mode = "local"
    message.consistency.local_steps = 0


MALFORMED: list[Callable[[shard_pb2.JobSpec], None]] = [
    no_workers,
    no_shards,
    no_parameters,
    no_part_size,
    a_part_size_of_no_whole_alignment,
    a_small_part_size,
    no_bucket_size,
    an_unknown_optimizer,
    no_optimizer,
    a_dtype_that_is_not_trained,
    an_unknown_dtype,
    an_empty_parameter,
    a_negative_shape,
    an_unknown_group,
    no_groups,
    a_hyperparameter_without_value,
    a_group_without_lr,
    no_consistency,
    an_unknown_mode,
    a_modifier_of_another_mode,
    a_compensation_that_is_no_number,
    two_answers_to_old_gradients,
    a_bound_of_zero,
    no_local_steps,
]


@pytest.mark.parametrize("spoil", MALFORMED)
def test_a_malformed_job_is_refused(spoil: Callable[[shard_pb2.JobSpec], None]) -> None:
    message = over_the_wire(JOB)
    spoil(message)
    with pytest.raises(ProtocolError):
        codec.decode_job(message)


SIZES = st.integers(-(2**63), 2**63 - 1) | st.integers(1, 2**20)
PARAMETERS = st.builds(
    shard_pb2.ParameterSpec,
    tensor=st.builds(
        tensor_pb2.TensorSpec,
        dtype=st.sampled_from([tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_BFLOAT16]),
        shape=st.lists(SIZES, max_size=4),
    ),
    group=st.integers(0, 1),
    stage=st.integers(0, 2),
)


@given(
    parameters=st.lists(PARAMETERS, min_size=1, max_size=5),
    num_shards=st.integers(1, 5000),
    part_bytes=st.integers(1, 2**14).map(lambda n: 512 * n) | st.integers(0, 2**64 - 1),
    bucket_bytes=st.integers(1, 2**64 - 1) | st.integers(1, 2**20),
)
@settings(deadline=None, max_examples=150)
def test_whatever_job_is_described_its_plan_is_refused_or_small(
    parameters: list[shard_pb2.ParameterSpec], num_shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    message = over_the_wire(JOB)
    del message.parameters[:]
    message.parameters.extend(parameters)
    message.num_shards, message.part_bytes = num_shards, part_bytes
    message.bucket_bytes = bucket_bytes
    try:
        job = codec.decode_job(message)
    except ProtocolError:
        return
    assert "plan" not in vars(job)  # none has been made
    num_bytes = sum(spec.num_bytes for spec in job.parameters)
    bound = most_parts(job.parameters, num_shards, part_bytes, bucket_bytes)
    assert bound <= 2**14 + num_bytes / 2**20
    if bound < 2000:
        assert len(job.plan.parts) <= bound


def test_a_job_of_very_many_parameters_or_groups_is_refused() -> None:
    message = over_the_wire(JOB)
    message.parameters.extend([message.parameters[0]] * 2**16)
    with pytest.raises(ProtocolError, match="parameters or groups are more than 65536"):
        codec.decode_job(message)


# -- Hostile bytes ---------------------------------------------------------------------------------

NUM_FRAMES = 10_000
SEED = 20_261_121
PART = make_part(64, 9, index=5)


def request_frames() -> list[bytes]:
    """One valid frame of every kind a stream may carry."""
    worker = shard_pb2.WorkerId(rank=1, incarnation=2**60)
    groups = codec.encode_groups(JOB.optimizer.groups)
    kinds = [
        shard_pb2.ExchangeRequest(hello=shard_pb2.Hello(worker=worker)),
        shard_pb2.ExchangeRequest(
            begin=shard_pb2.Begin(step=3, epoch=1, samples=32, groups=groups)
        ),
        shard_pb2.ExchangeRequest(meet=shard_pb2.Meet(purpose="PURPOSE_MEAN", values=[1.0, 2.0])),
        shard_pb2.ExchangeRequest(idle=shard_pb2.Idle(), number=9),
        shard_pb2.ExchangeRequest(lease=shard_pb2.LeaseRequest(returned=[1, 2**40]), number=10),
        shard_pb2.ExchangeRequest(fetch=shard_pb2.Fetch(parts=[0, 5])),
        shard_pb2.ExchangeRequest(heartbeat=shard_pb2.Heartbeat()),
    ]
    pushes = [
        codec.encode_push(3, PART, present, random_tensor(64))
        for present in ([True] * 9, [True, False] * 4 + [True])
    ]
    return [*(message.SerializeToString() for message in kinds), *pushes, *pushes]


def mutated(frame: bytes, chance: random.Random) -> bytes:
    """A frame with a few bytes changed, cut out, repeated or inserted, or the end missing."""
    data = bytearray(frame)
    for _ in range(chance.randint(1, 4)):
        # Most mutations hit the head, where the structure is.
        at = chance.randrange(min(len(data), 24) if chance.random() < 0.7 else len(data))
        match chance.randrange(5):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                del data[at : at + chance.randint(1, 8)]
            case 3:
                data[at:at] = chance.randbytes(chance.randint(1, 8))
            case _:
                data = data[:at] if chance.random() < 0.5 else data + data[at:]
        data = data or bytearray(b"\0")
    return bytes(data)


def survive(
    frames: list[bytes], decode: Callable[[bytes], object], num_frames: int, seed: int
) -> tuple[int, int]:
    """Decode mutated frames; how many were accepted and refused. Any other error is a failure."""
    chance = random.Random(seed)
    accepted = refused = 0
    for number in range(num_frames):
        frame = mutated(chance.choice(frames), chance)
        try:
            decode(frame)
            accepted += 1
        except (DecodeError, ShardlineError):
            refused += 1
        except Exception as error:
            error.add_note(f"seed {seed}, frame {number}: {frame.hex()}")
            raise
    return accepted, refused


def decode_request(frame: bytes) -> None:
    """What a shard decodes of a message: what comes out has the sizes of the plan."""
    request = codec.decode_request(frame)
    if isinstance(request, codec.PartFrame):
        assert codec.decode_elements(request, PART).shape == (64,)
        assert len(codec.decode_present(request, PART)) == 9
        return
    match request.WhichOneof("message"):
        case "part":
            assert codec.decode_elements(request.part, PART).shape == (64,)
            assert len(codec.decode_present(request.part, PART)) == 9
        case "begin":
            codec.decode_groups(request.begin.groups)
            dialogue.decode_work(request.begin)
        case "meet":
            dialogue.decode_meet(request.meet)
        case "lease":
            dialogue.decode_pass(request.lease)


def test_ten_thousand_mutated_requests_are_decoded_or_refused_and_nothing_else() -> None:
    accepted, refused = survive(request_frames(), decode_request, NUM_FRAMES, SEED)
    # Both ways are taken often, so the mutations are neither too gentle nor too rough.
    assert min(accepted, refused) > NUM_FRAMES / 20


def decode_load(frame: bytes) -> None:
    request = shard_pb2.LoadRequest.FromString(frame)
    match request.WhichOneof("message"):
        case "part":
            codec.decode_elements(request.part, PART)
        case "state":
            codec.decode_state(request.state)
        case "buffer":
            codec.write_chunk(request.buffer, torch.zeros(5, 3))


def test_mutated_loads_are_decoded_or_refused_and_nothing_else() -> None:
    messages: list[Message] = [
        shard_pb2.LoadRequest(state=codec.encode_state(5, 1, "exp_avg", random_tensor(64))),
        shard_pb2.LoadRequest(state=codec.encode_state(5, 1, "step", torch.tensor(3.0))),
        shard_pb2.LoadRequest(state=codec.encode_state(5, 1, "m", torch.ones(2, 2))),
        *(shard_pb2.LoadRequest(buffer=c) for c in codec.encode_chunks("b", torch.ones(5, 3))),
    ]
    frames = [message.SerializeToString() for message in messages]
    survive([*frames, codec.encode_initial(PART, random_tensor(64))], decode_load, 5000, SEED)
