"""What must be the same on every worker and shard of a job, and how to name a difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import zip_longest

from ps_core.errors import MismatchError
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import ParameterSpec, Plan, make_plan
from ps_core.settings import Config, ConsistencyConfig

PROTOCOL = 2
"""Version of the wire contract in `protos/ps_core/v1`."""


@dataclass(frozen=True)
class Job:
    """One training job, as its workers describe it when they join."""

    job_id: str
    num_workers: int
    num_shards: int
    parameters: tuple[ParameterSpec, ...]
    part_bytes: int
    bucket_bytes: int
    optimizer: OptimizerSpec
    consistency: ConsistencyConfig
    protocol: int = PROTOCOL

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.parameters, self.num_shards, self.part_bytes, self.bucket_bytes)


def describe_job(config: Config, plan: Plan, optimizer: OptimizerSpec) -> Job:
    """The job as one worker's configuration and script have it."""
    return Job(
        job_id=config.job.id,
        num_workers=config.cluster.num_workers,
        num_shards=plan.num_shards,
        parameters=plan.parameters,
        part_bytes=config.exchange.part_bytes,
        bucket_bytes=config.exchange.bucket_bytes,
        optimizer=optimizer,
        consistency=config.consistency,
    )


def check_plan(job: Job, fingerprint: str) -> None:
    """Raises MismatchError when another process makes another plan of the same job."""
    if job.plan.fingerprint != fingerprint:
        raise MismatchError(
            "two processes make different plans of the same job: run the same release everywhere"
        )


def first_difference(mine: Job, theirs: Job) -> str | None:
    """The first thing two descriptions of a job disagree about, most telling first, or None."""
    return next(_differences(mine, theirs), None)


def _differences(mine: Job, theirs: Job) -> Iterator[str]:
    for field in ("protocol", "job_id", "num_shards", "num_workers"):
        yield from _unequal(field.replace("_", " "), getattr(mine, field), getattr(theirs, field))
    for item in fields(ConsistencyConfig):
        here, there = getattr(mine.consistency, item.name), getattr(theirs.consistency, item.name)
        yield from _unequal(item.name.replace("_", " "), here, there)
    yield from _parameter_differences(mine.parameters, theirs.parameters)
    yield from _unequal("optimizer", mine.optimizer.name, theirs.optimizer.name)
    yield from _unequal(
        "max_grad_norm", mine.optimizer.max_grad_norm, theirs.optimizer.max_grad_norm
    )
    yield from _group_differences(mine.optimizer.groups, theirs.optimizer.groups)
    for field in ("part_bytes", "bucket_bytes"):
        yield from _unequal(field, getattr(mine, field), getattr(theirs, field))


def _unequal(what: str, mine: object, theirs: object) -> Iterator[str]:
    if mine != theirs:
        yield f"{what} is {mine!r} here and {theirs!r} there"


def _parameter_differences(
    mine: Sequence[ParameterSpec], theirs: Sequence[ParameterSpec]
) -> Iterator[str]:
    for index, (ours, other) in enumerate(zip_longest(mine, theirs)):
        yield from _unequal(f"parameter {index}", _show(ours), _show(other))


def _show(spec: ParameterSpec | None) -> str:
    if spec is None:
        return "absent"
    dtype = str(spec.dtype).removeprefix("torch.")
    stage = f" of stage {spec.stage}" if spec.stage else ""
    return f"{spec.name} {dtype}{list(spec.shape)} in group {spec.group}{stage}"


def _group_differences(
    mine: Sequence[Hyperparameters], theirs: Sequence[Hyperparameters]
) -> Iterator[str]:
    nothing: Hyperparameters = {}
    for index, (ours, other) in enumerate(zip_longest(mine, theirs, fillvalue=nothing)):
        for key in sorted({*ours, *other}):
            yield from _unequal(f"{key} of parameter group {index}", ours.get(key), other.get(key))
