"""Which shard holds which elements: a pure function of the model, the same on every side.

A *bucket* is a flat run of parameters of one stage, group and dtype. Every parameter starts at a
multiple of 64 elements in its bucket (the gaps are never trained), so a cut at a multiple of 64 is
also one from the start of each tensor: vector kernels then round the same way as on the whole. A
*part* is a piece of a bucket, the unit that travels and is updated. A *slice* is the piece of one
parameter in a part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace

import torch

ALIGNMENT = 64
"""Elements. Parameters start, and parts are cut, at multiples of this."""

_BYTE_ALIGNMENT = ALIGNMENT * 8
"""A part of a multiple of this many bytes is whole multiples of 64 elements in every dtype."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A trained parameter: its name in the model, the optimizer's group it belongs to, and the
    stage of a pipeline that computes with it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    group: int
    stage: int = 0

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a parameter lies in its bucket, in elements."""

    parameter: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """A flat buffer and the parameters in it; `length` in elements, a multiple of 64."""

    index: int
    group: int
    dtype: torch.dtype
    length: int
    placements: tuple[Placement, ...]
    stage: int = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements `start … start + length` of a parameter, at `offset` in the part."""

    parameter: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class Part:
    """Elements `start … start + length` of a bucket, held by one shard."""

    index: int
    shard: int
    bucket: int
    group: int
    dtype: torch.dtype
    start: int
    length: int
    slices: tuple[Slice, ...]

    @property
    def num_bytes(self) -> int:
        return self.length * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole placement. Two sides agree exactly when their fingerprints are equal."""

    parameters: tuple[ParameterSpec, ...]
    buckets: tuple[BucketLayout, ...]
    parts: tuple[Part, ...]
    num_shards: int
    fingerprint: str

    def parts_of_shard(self, shard: int) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.shard == shard)

    def parts_of_bucket(self, bucket: int) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.bucket == bucket)


def make_plan(
    parameters: Sequence[ParameterSpec], num_shards: int, part_bytes: int, bucket_bytes: int
) -> Plan:
    """Lay out `parameters` over `num_shards`.

    Parts hold at most `part_bytes` (a multiple of 512), fewer for a small model, so that it
    spreads over the shards. Buckets hold at most `bucket_bytes`, unless a single parameter is
    larger. Each stage of a pipeline has the shards whose index is its number modulo the number of
    stages, of which there are at most as many as shards; the bytes of any two shards of a stage
    differ by at most one part.
    """
    buckets = tuple(_fill_buckets(parameters, bucket_bytes))
    total_bytes = sum(bucket.length * bucket.dtype.itemsize for bucket in buckets)
    piece_bytes = _part_bytes(total_bytes, num_shards, part_bytes)
    parts = _assign(buckets, piece_bytes, num_shards, num_stages(parameters))
    return Plan(tuple(parameters), buckets, parts, num_shards, _fingerprint(buckets, parts))


def num_stages(parameters: Sequence[ParameterSpec]) -> int:
    """Into how many stages a model is split; 1: it is not."""
    return 1 + max((spec.stage for spec in parameters), default=0)


def most_parts(
    parameters: Sequence[ParameterSpec], num_shards: int, part_bytes: int, bucket_bytes: int
) -> int:
    """Parts that a plan has at most, known without making one."""
    total_bytes = sum(
        _round_up(spec.num_elements, ALIGNMENT) * spec.dtype.itemsize for spec in parameters
    )
    num_kinds = len({(spec.stage, spec.group, spec.dtype) for spec in parameters})
    # Two buckets of a kind that follow each other hold more than one may.
    num_buckets = min(len(parameters), num_kinds + 2 * total_bytes // bucket_bytes)
    # The last part of a bucket may be a small one.
    return total_bytes // _part_bytes(total_bytes, num_shards, part_bytes) + num_buckets


def mean_bytes(parameters: Sequence[ParameterSpec], num_shards: int, shard: int) -> int:
    """Bytes of parameters that each of the shards which share the stage of this one holds, to a
    part. Makes no plan.
    """
    stages = num_stages(parameters)
    stage = shard % stages
    sizes = (spec.num_bytes for spec in parameters if spec.stage == stage)
    return sum(sizes) // len(range(stage, num_shards, stages))


def _part_bytes(total_bytes: int, num_shards: int, part_bytes: int) -> int:
    """Bytes of the largest part: a small model is spread over the shards."""
    return min(part_bytes, _round_up(-(-total_bytes // num_shards), _BYTE_ALIGNMENT))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _fill_buckets(parameters: Sequence[ParameterSpec], bucket_bytes: int) -> Iterator[BucketLayout]:
    kinds: dict[tuple[int, int, torch.dtype], list[int]] = {}
    for number, spec in enumerate(parameters):
        kinds.setdefault((spec.stage, spec.group, spec.dtype), []).append(number)
    index = 0
    for stage, group, dtype in sorted(kinds, key=lambda kind: kind[0]):
        placements: list[Placement] = []
        length = 0
        for number in kinds[stage, group, dtype]:
            spec = parameters[number]
            padded = _round_up(spec.num_elements, ALIGNMENT)
            if placements and (length + padded) * dtype.itemsize > bucket_bytes:
                yield BucketLayout(index, group, dtype, length, tuple(placements), stage)
                index, placements, length = index + 1, [], 0
            placements.append(Placement(number, length, spec.num_elements))
            length += padded
        yield BucketLayout(index, group, dtype, length, tuple(placements), stage)
        index += 1


def _assign(
    buckets: Sequence[BucketLayout], part_bytes: int, num_shards: int, stages: int
) -> tuple[Part, ...]:
    """Cut buckets into parts and give each to the shard of its stage with the fewest bytes so far.

    The least loaded shard never ends up more than this one part above any other, which keeps the
    difference between any two shards within one part.
    """
    # Of each stage: the bytes of its shards, the smallest first. Sorted lists are heaps.
    loads = [[(0, shard) for shard in range(stage, num_shards, stages)] for stage in range(stages)]
    parts: list[Part] = []
    for bucket in buckets:
        for start, length, slices in _pieces(bucket, part_bytes // bucket.dtype.itemsize):
            num_bytes, shard = loads[bucket.stage][0]
            part = Part(
                len(parts), shard, bucket.index, bucket.group, bucket.dtype, start, length, slices
            )
            parts.append(part)
            heapreplace(loads[bucket.stage], (num_bytes + part.num_bytes, shard))
    return tuple(parts)


def _pieces(bucket: BucketLayout, step: int) -> Iterator[tuple[int, int, tuple[Slice, ...]]]:
    """Start, length and slices of each piece of `step` elements."""
    first = 0
    for start in range(0, bucket.length, step):
        length = min(step, bucket.length - start)
        while _end(bucket.placements[first]) <= start:
            first += 1
        yield start, length, tuple(_slices(bucket, start, length, first))


def cut(bucket: BucketLayout, count: int) -> Iterator[Part]:
    """`count` parts of one bucket, each for a shard of its own, of lengths that differ by at most
    `ALIGNMENT`; fewer if the bucket is that small.
    """
    units = bucket.length // ALIGNMENT
    for shard in range(min(count, units)):
        start, stop = (
            ALIGNMENT * (units * edge // min(count, units)) for edge in (shard, shard + 1)
        )
        slices = tuple(_slices(bucket, start, stop - start))
        yield Part(
            shard, shard, bucket.index, bucket.group, bucket.dtype, start, stop - start, slices
        )


def _slices(bucket: BucketLayout, start: int, length: int, first: int = 0) -> Iterator[Slice]:
    """Of a piece that no placement before the `first` reaches into."""
    for index in range(first, len(bucket.placements)):
        placement = bucket.placements[index]
        begin = max(placement.offset, start)
        end = min(_end(placement), start + length)
        if begin < end:
            yield Slice(placement.parameter, begin - placement.offset, end - begin, begin - start)
        elif placement.offset >= start + length:
            return


def _end(placement: Placement) -> int:
    return placement.offset + placement.length


def _fingerprint(buckets: Sequence[BucketLayout], parts: Sequence[Part]) -> str:
    return hashlib.sha256(repr((buckets, parts)).encode()).hexdigest()
