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
    fair_share = _round_up(math.ceil(total_bytes / num_shards), _BYTE_ALIGNMENT)
    parts = _assign(buckets, min(part_bytes, fair_share), num_shards, num_stages(parameters))
    return Plan(tuple(parameters), buckets, parts, num_shards, _fingerprint(buckets, parts))


def num_stages(parameters: Sequence[ParameterSpec]) -> int:
    """Into how many stages a model is split; 1: it is not."""
    return 1 + max((spec.stage for spec in parameters), default=0)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _fill_buckets(parameters: Sequence[ParameterSpec], bucket_bytes: int) -> Iterator[BucketLayout]:
    kinds = dict.fromkeys((spec.stage, spec.group, spec.dtype) for spec in parameters)
    index = 0
    for stage, group, dtype in sorted(kinds, key=lambda kind: kind[0]):
        placements: list[Placement] = []
        length = 0
        for number, spec in enumerate(parameters):
            if (spec.stage, spec.group, spec.dtype) != (stage, group, dtype):
                continue
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
    loads = [0] * num_shards
    parts: list[Part] = []
    for bucket in buckets:
        step = part_bytes // bucket.dtype.itemsize
        for start in range(0, bucket.length, step):
            length = min(step, bucket.length - start)
            shard = min(range(bucket.stage, num_shards, stages), key=loads.__getitem__)
            slices = tuple(_slices(bucket, start, length))
            part = Part(
                len(parts), shard, bucket.index, bucket.group, bucket.dtype, start, length, slices
            )
            parts.append(part)
            loads[shard] += part.num_bytes
    return tuple(parts)


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


def _slices(bucket: BucketLayout, start: int, length: int) -> Iterator[Slice]:
    for placement in bucket.placements:
        first = max(placement.offset, start)
        last = min(placement.offset + placement.length, start + length)
        if first < last:
            yield Slice(placement.parameter, first - placement.offset, last - first, first - start)


def _fingerprint(buckets: Sequence[BucketLayout], parts: Sequence[Part]) -> str:
    return hashlib.sha256(repr((buckets, parts)).encode()).hexdigest()
