import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ps_core.plan import ALIGNMENT, ParameterSpec, Part, Plan, make_plan, most_parts

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MIB = 2**20

shapes = st.one_of(
    st.just(()),  # a scalar
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    st.tuples(st.sampled_from([63, 64, 65, 127, 128, 129, 1000, 5000])),
)


@st.composite
def models(draw: st.DrawFn) -> tuple[ParameterSpec, ...]:
    kinds = draw(
        st.lists(
            st.tuples(shapes, st.sampled_from([F32, F64, BF16, F16]), st.integers(0, 2)),
            min_size=1,
            max_size=12,
        )
    )
    return tuple(
        ParameterSpec(f"p{number}", dtype, shape, group)
        for number, (shape, dtype, group) in enumerate(kinds)
    )


num_shards = st.integers(1, 7)
part_sizes = st.integers(1, 12).map(lambda units: units * 512)
bucket_sizes = st.integers(1, 40_000)


def shard_bytes(plan: Plan) -> list[int]:
    return [sum(part.num_bytes for part in plan.parts_of_shard(s)) for s in range(plan.num_shards)]


def one(*shape: int, dtype: torch.dtype = F32, group: int = 0) -> ParameterSpec:
    return ParameterSpec("w", dtype, shape, group)


# -- Every element, once ---------------------------------------------------------------------------


@given(models(), num_shards, part_sizes, st.integers(1, 2**16))
def test_how_many_parts_there_are_at_most_is_known_without_a_plan(
    parameters: tuple[ParameterSpec, ...], num_shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    plan = make_plan(parameters, num_shards, part_bytes, bucket_bytes)
    assert len(plan.parts) <= most_parts(parameters, num_shards, part_bytes, bucket_bytes)


@given(models(), num_shards, part_sizes, bucket_sizes)
def test_every_element_of_every_parameter_is_covered_exactly_once(
    model: tuple[ParameterSpec, ...], shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    plan = make_plan(model, shards, part_bytes, bucket_bytes)
    covered: Counter[tuple[int, int]] = Counter()
    for part in plan.parts:
        for piece in part.slices:
            covered.update(
                (piece.parameter, element)
                for element in range(piece.start, piece.start + piece.length)
            )
    assert covered == {
        (number, element): 1
        for number, spec in enumerate(model)
        for element in range(spec.num_elements)
    }


@given(models(), num_shards, part_sizes, bucket_sizes)
def test_a_slice_is_the_same_elements_in_its_part_and_in_its_bucket(
    model: tuple[ParameterSpec, ...], shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    plan = make_plan(model, shards, part_bytes, bucket_bytes)
    for part in plan.parts:
        places = {p.parameter: p.offset for p in plan.buckets[part.bucket].placements}
        for piece in part.slices:
            assert part.start + piece.offset == places[piece.parameter] + piece.start
            assert piece.offset >= 0
            assert piece.offset + piece.length <= part.length


@given(models(), num_shards, part_sizes, bucket_sizes)
def test_parts_tile_their_buckets_in_order_and_are_numbered_through(
    model: tuple[ParameterSpec, ...], shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    plan = make_plan(model, shards, part_bytes, bucket_bytes)
    assert [part.index for part in plan.parts] == list(range(len(plan.parts)))
    assert [bucket.index for bucket in plan.buckets] == list(range(len(plan.buckets)))
    for bucket in plan.buckets:
        end = 0
        for part in plan.parts_of_bucket(bucket.index):
            assert part.start == end
            assert part.length > 0
            end = part.start + part.length
        assert end == bucket.length
    assert sorted(
        part.index for shard in range(shards) for part in plan.parts_of_shard(shard)
    ) == list(range(len(plan.parts)))


@given(models(), num_shards, part_sizes, bucket_sizes)
def test_placements_in_a_bucket_are_in_order_aligned_and_do_not_overlap(
    model: tuple[ParameterSpec, ...], shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    plan = make_plan(model, shards, part_bytes, bucket_bytes)
    for bucket in plan.buckets:
        end = 0
        for placement in bucket.placements:
            assert placement.offset % ALIGNMENT == 0
            assert end <= placement.offset < end + ALIGNMENT
            end = placement.offset + placement.length
        assert end <= bucket.length < end + ALIGNMENT
        assert bucket.length % ALIGNMENT == 0


# -- Where parts may be cut ------------------------------------------------------------------------


@given(models(), num_shards, part_sizes, bucket_sizes)
def test_cuts_are_at_multiples_of_64_elements_from_the_start_of_every_tensor(
    model: tuple[ParameterSpec, ...], shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    for part in make_plan(model, shards, part_bytes, bucket_bytes).parts:
        assert part.start % 64 == 0
        for piece in part.slices:
            assert piece.start % 64 == 0
            is_end = piece.start + piece.length == model[piece.parameter].num_elements
            assert is_end or piece.length % 64 == 0


@given(models(), num_shards, part_sizes, bucket_sizes)
def test_a_part_never_mixes_parameter_groups_or_dtypes(
    model: tuple[ParameterSpec, ...], shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    plan = make_plan(model, shards, part_bytes, bucket_bytes)
    for part in plan.parts:
        kinds = {
            (model[piece.parameter].group, model[piece.parameter].dtype) for piece in part.slices
        }
        assert kinds == {(part.group, part.dtype)}
        bucket = plan.buckets[part.bucket]
        assert (bucket.group, bucket.dtype) == (part.group, part.dtype)


@given(models(), num_shards, part_sizes, bucket_sizes)
def test_parts_and_buckets_keep_their_size_limits(
    model: tuple[ParameterSpec, ...], shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    plan = make_plan(model, shards, part_bytes, bucket_bytes)
    assert all(0 < part.num_bytes <= part_bytes for part in plan.parts)
    for bucket in plan.buckets:
        fits = bucket.length * bucket.dtype.itemsize <= bucket_bytes
        assert fits or len(bucket.placements) == 1


@given(models(), num_shards, part_sizes, bucket_sizes)
def test_the_bytes_of_any_two_shards_differ_by_at_most_one_part(
    model: tuple[ParameterSpec, ...], shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    plan = make_plan(model, shards, part_bytes, bucket_bytes)
    loads = shard_bytes(plan)
    assert max(loads) - min(loads) <= max(part.num_bytes for part in plan.parts)


@given(models(), num_shards, part_sizes, bucket_sizes)
def test_shard_0_always_holds_a_part(
    model: tuple[ParameterSpec, ...], shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    assert make_plan(model, shards, part_bytes, bucket_bytes).parts_of_shard(0)


# -- Sizes worth a look ----------------------------------------------------------------------------


def test_a_scalar_is_one_element_with_a_part_of_its_own_alignment() -> None:
    plan = make_plan([one()], 1, MIB, MIB)
    (part,) = plan.parts
    assert (part.length, part.slices[0].length, plan.parameters[0].num_elements) == (64, 1, 1)


def test_a_model_that_is_smaller_than_the_part_size_is_spread_over_all_shards() -> None:
    plan = make_plan([one(4096)], 4, 4 * MIB, 32 * MIB)
    assert shard_bytes(plan) == [4096, 4096, 4096, 4096]


def test_a_huge_parameter_is_cut_while_tiny_ones_are_packed_behind_each_other() -> None:
    tiny = [ParameterSpec(f"b{number}", F32, (), 0) for number in range(100)]
    plan = make_plan([one(4 * MIB), *tiny], 2, 4 * MIB, MIB)
    huge, packed = plan.buckets
    assert (huge.length, len(huge.placements)) == (4 * MIB, 1)
    assert [part.num_bytes for part in plan.parts_of_bucket(0)] == [4 * MIB] * 4
    assert (packed.length, len(packed.placements)) == (100 * 64, 100)
    (part,) = plan.parts_of_bucket(1)
    assert [piece.offset for piece in part.slices] == [64 * number for number in range(100)]
    assert shard_bytes(plan) == [8 * MIB + 100 * 256, 8 * MIB]


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_the_largest_part_of_512_bytes_is_whole_alignments_in_every_dtype(
    dtype: torch.dtype,
) -> None:
    plan = make_plan([one(1000, dtype=dtype)], 1, 512, MIB)
    assert {part.num_bytes for part in plan.parts[:-1]} == {512}
    assert plan.parts[-1].length % 64 == 0


def test_equal_groups_that_are_interleaved_in_the_model_still_share_buckets() -> None:
    model = [one(64, group=number % 2) for number in range(6)]
    plan = make_plan(model, 1, MIB, MIB)
    assert [[p.parameter for p in bucket.placements] for bucket in plan.buckets] == [
        [0, 2, 4],
        [1, 3, 5],
    ]


def test_a_parameter_that_just_fits_stays_in_the_bucket_and_the_next_one_opens_a_new_one() -> None:
    plan = make_plan([one(64), one(64), one(1)], 1, MIB, 512)
    assert [len(bucket.placements) for bucket in plan.buckets] == [2, 1]


# -- Both sides agree ------------------------------------------------------------------------------


@given(models(), num_shards, part_sizes, bucket_sizes)
def test_the_same_input_gives_the_same_plan_and_fingerprint(
    model: tuple[ParameterSpec, ...], shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    # New objects on the other side, as if they had come over the wire.
    copy = [ParameterSpec(s.name, s.dtype, tuple(list(s.shape)), s.group) for s in model]
    assert make_plan(model, shards, part_bytes, bucket_bytes) == make_plan(
        copy, shards, part_bytes, bucket_bytes
    )


def test_shapes_given_as_torch_sizes_give_the_fingerprint_of_plain_tuples() -> None:
    size = ParameterSpec("w", F32, torch.zeros(3, 50).shape, 0)
    plain = make_plan([one(3, 50)], 2, 512, MIB)
    assert make_plan([size], 2, 512, MIB).fingerprint == plain.fingerprint


def layout(plan: Plan) -> tuple[object, ...]:
    return (plan.buckets, plan.parts)


@given(models(), num_shards, part_sizes, bucket_sizes, num_shards, part_sizes, bucket_sizes)
def test_fingerprints_are_equal_exactly_when_the_layouts_are(
    model: tuple[ParameterSpec, ...],
    shards: int,
    part_bytes: int,
    bucket_bytes: int,
    other_shards: int,
    other_part_bytes: int,
    other_bucket_bytes: int,
) -> None:
    plan = make_plan(model, shards, part_bytes, bucket_bytes)
    other = make_plan(model, other_shards, other_part_bytes, other_bucket_bytes)
    assert (plan.fingerprint == other.fingerprint) == (layout(plan) == layout(other))


MODEL = (one(200), one(3000, group=1), one(70, dtype=BF16), one())


@pytest.mark.parametrize(
    "model",
    [
        pytest.param((*MODEL[1:], MODEL[0]), id="order"),
        pytest.param(MODEL[:3], id="one parameter fewer"),
        pytest.param((*MODEL, one()), id="one parameter more"),
        pytest.param((one(201), *MODEL[1:]), id="one element more, inside the padding"),
        pytest.param((replace(MODEL[0], group=2), *MODEL[1:]), id="group"),
        pytest.param((replace(MODEL[0], dtype=F64), *MODEL[1:]), id="dtype"),
        pytest.param((*MODEL[:2], replace(MODEL[2], dtype=F16), MODEL[3]), id="dtype of same size"),
    ],
)
def test_the_fingerprint_changes_with_the_model(model: tuple[ParameterSpec, ...]) -> None:
    assert (
        make_plan(MODEL, 2, 1024, 4096).fingerprint != make_plan(model, 2, 1024, 4096).fingerprint
    )


@pytest.mark.parametrize(
    ("shards", "part_bytes", "bucket_bytes"),
    [
        pytest.param(3, 1024, 4096, id="number of shards"),
        pytest.param(2, 2048, 4096, id="part size"),
        pytest.param(2, 1024, 512, id="bucket size"),
    ],
)
def test_the_fingerprint_changes_with_the_sizes(
    shards: int, part_bytes: int, bucket_bytes: int
) -> None:
    assert (
        make_plan(MODEL, 2, 1024, 4096).fingerprint
        != make_plan(MODEL, shards, part_bytes, bucket_bytes).fingerprint
    )


PROGRAM = """
import torch
from ps_core.plan import ParameterSpec, make_plan
dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
model = [ParameterSpec(f"p{n}", dtypes[n % 4], (n * 70 + 1,), n % 3) for n in range(24)]
print(make_plan(model, 3, 1024, 4096).fingerprint)
"""


def test_the_fingerprint_does_not_depend_on_the_process() -> None:
    dtypes = [F32, F64, BF16, F16]
    model = [ParameterSpec(f"p{n}", dtypes[n % 4], (n * 70 + 1,), n % 3) for n in range(24)]
    elsewhere = subprocess.run(  # another process hashes strings and types differently
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert elsewhere.stdout.strip() == make_plan(model, 3, 1024, 4096).fingerprint


def test_num_bytes_of_a_part_counts_its_elements_in_its_dtype() -> None:
    part = Part(0, 0, 0, 0, BF16, 0, 192, ())
    assert part.num_bytes == 384
