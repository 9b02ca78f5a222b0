from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from ps_core.job import PROTOCOL, Job, first_difference
from ps_core.optim_spec import OptimizerSpec
from ps_core.plan import ParameterSpec, make_plan
from ps_core.settings import ConsistencyConfig

F32 = torch.float32
WEIGHT = ParameterSpec("weight", F32, (30, 50), 0)
BIAS = ParameterSpec("bias", F32, (50,), 1)
SGD = OptimizerSpec("SGD", ({"lr": 0.1, "nesterov": False}, {"lr": 0.2, "nesterov": False}))
JOB = Job(
    job_id="digits",
    num_workers=3,
    num_shards=2,
    parameters=(WEIGHT, BIAS),
    part_bytes=1024,
    bucket_bytes=4096,
    optimizer=SGD,
    consistency=ConsistencyConfig(),
)


def differing(**changes: Any) -> Job:  # noqa: ANN401 - of any field's type
    return replace(JOB, consistency=replace(JOB.consistency, **changes))


FROZEN_GROUP = {"lr": 0.1, "nesterov": False, "momentum": 0.9}

# What differs, and the sentence a user reads: written out by hand.
DIFFERENCES = [
    (replace(JOB, protocol=1), "protocol is 2 here and 1 there"),
    (replace(JOB, job_id="other"), "job id is 'digits' here and 'other' there"),
    (replace(JOB, num_shards=4), "num shards is 2 here and 4 there"),
    (replace(JOB, num_workers=4), "num workers is 3 here and 4 there"),
    (differing(mode="async"), "mode is 'sync' here and 'async' there"),
    (differing(backup_workers=1), "backup workers is 0 here and 1 there"),
    (differing(bound=5), "bound is 3 here and 5 there"),
    (differing(staleness_scaling=True), "staleness scaling is False here and True there"),
    (differing(delay_compensation=0.5), "delay compensation is 0.0 here and 0.5 there"),
    (differing(local_steps=20), "local steps is 10 here and 20 there"),
    (differing(outer_lr=0.5), "outer lr is 0.7 here and 0.5 there"),
    (differing(outer_momentum=0.0), "outer momentum is 0.9 here and 0.0 there"),
    (differing(deterministic=True), "deterministic is False here and True there"),
    (replace(JOB, part_bytes=2048), "part_bytes is 1024 here and 2048 there"),
    (replace(JOB, bucket_bytes=1), "bucket_bytes is 4096 here and 1 there"),
    (
        replace(JOB, parameters=(WEIGHT, replace(BIAS, shape=(51,)))),
        "parameter 1 is 'bias float32[50] in group 1' here and 'bias float32[51] in group 1' there",
    ),
    (
        replace(JOB, parameters=(WEIGHT, replace(BIAS, dtype=torch.bfloat16))),
        "parameter 1 is 'bias float32[50] in group 1' here and "
        "'bias bfloat16[50] in group 1' there",
    ),
    (
        replace(JOB, parameters=(replace(WEIGHT, name="kernel"), BIAS)),
        "parameter 0 is 'weight float32[30, 50] in group 0' here and "
        "'kernel float32[30, 50] in group 0' there",
    ),
    (
        replace(JOB, parameters=(replace(WEIGHT, group=1), BIAS)),
        "parameter 0 is 'weight float32[30, 50] in group 0' here and "
        "'weight float32[30, 50] in group 1' there",
    ),
    (
        replace(JOB, parameters=(WEIGHT,)),
        "parameter 1 is 'bias float32[50] in group 1' here and 'absent' there",
    ),
    (
        replace(JOB, parameters=(WEIGHT, BIAS, replace(BIAS, name="extra"))),
        "parameter 2 is 'absent' here and 'extra float32[50] in group 1' there",
    ),
    (
        replace(JOB, optimizer=replace(SGD, name="Adam")),
        "optimizer is 'SGD' here and 'Adam' there",
    ),
    (
        replace(JOB, optimizer=replace(SGD, max_grad_norm=1.0)),
        "max_grad_norm is None here and 1.0 there",
    ),
    (
        replace(JOB, optimizer=replace(SGD, groups=(SGD.groups[0], {**SGD.groups[1], "lr": 0.3}))),
        "lr of parameter group 1 is 0.2 here and 0.3 there",
    ),
    (
        replace(JOB, optimizer=replace(SGD, groups=(FROZEN_GROUP, SGD.groups[1]))),
        "momentum of parameter group 0 is None here and 0.9 there",
    ),
    (
        replace(JOB, optimizer=replace(SGD, groups=SGD.groups[:1])),
        "lr of parameter group 1 is 0.2 here and None there",
    ),
]


@pytest.mark.parametrize(("other", "sentence"), DIFFERENCES)
def test_the_difference_is_said_in_one_sentence(other: Job, sentence: str) -> None:
    assert first_difference(JOB, other) == sentence


def test_every_field_of_a_job_is_compared() -> None:
    changed = {
        name
        for other, _ in DIFFERENCES
        for name in Job.__dataclass_fields__
        if getattr(other, name) != getattr(JOB, name)
    }
    assert changed == set(Job.__dataclass_fields__)


def test_every_field_of_the_consistency_is_compared() -> None:
    names = {field.name for field in fields(ConsistencyConfig)}
    changed = {
        name
        for other, _ in DIFFERENCES
        for name in names
        if getattr(other.consistency, name) != getattr(JOB.consistency, name)
    }
    assert changed == names


def test_a_job_described_twice_has_no_difference() -> None:
    again = replace(
        JOB,
        parameters=tuple(replace(spec) for spec in JOB.parameters),
        optimizer=OptimizerSpec("SGD", tuple(dict(group) for group in SGD.groups)),
    )
    assert first_difference(JOB, again) is None


def test_the_most_telling_difference_comes_first() -> None:
    other = replace(JOB, parameters=(BIAS,), part_bytes=512, optimizer=replace(SGD, name="Adam"))
    said = first_difference(JOB, other)
    assert said is not None
    assert said.startswith("parameter 0 is 'weight")
    assert first_difference(JOB, replace(other, protocol=9)) == "protocol is 2 here and 9 there"


def test_the_plan_is_that_of_the_jobs_sizes_and_made_once() -> None:
    assert JOB.plan == make_plan((WEIGHT, BIAS), num_shards=2, part_bytes=1024, bucket_bytes=4096)
    assert JOB.plan is JOB.plan


def test_a_job_speaks_this_releases_protocol() -> None:
    assert JOB.protocol == PROTOCOL == 2
