"""What a session needs to know about its device, and a script's model, optimizer and errors."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import torch

from ps_core.aliases import aliases, tie
from ps_core.buckets import Bucket, make_buckets
from ps_core.errors import (
    ConfigError,
    DataLossError,
    MismatchError,
    NonFiniteError,
    Preempted,
    ResultError,
    UsageError,
    in_short,
)
from ps_core.exchange import Farewell
from ps_core.local_steps import outer_spec
from ps_core.memory import keep_freed_memory, return_freed_memory
from ps_core.names import plain_name
from ps_core.optim_spec import OptimizerSpec, check_consistency, check_norm, describe
from ps_core.plan import ParameterSpec, Plan
from ps_core.settings import ClusterConfig, Config, ConsistencyConfig
from ps_core.tensors import is_trained
from shardline.seeds import seed_all
from shardline.trainable import check_has_memory, check_model, check_parameter


def choose_device(name: str, cluster: ClusterConfig) -> torch.device:
    """`auto`: workers of one machine take its GPUs in turn."""
    if name != "auto":
        return _device(name)
    count = torch.cuda.device_count()
    place = cluster.rank if cluster.local_rank < 0 else cluster.local_rank
    return torch.device("cuda", place % count) if count else torch.device("cpu")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"worker.device = {name!r}: {in_short(error)}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise ConfigError(f"worker.device = {name!r}: torch sees {there} CUDA devices")
    return device


def prepare_process(config: Config, device: torch.device) -> None:
    """Device, threads and memory of this whole process, and its random generators."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.worker.threads:
        torch.set_num_threads(config.worker.threads)
    if config.pipeline.stages > 1:  # split because memory is short
        return_freed_memory()
    elif config.strategy != "alone":
        keep_freed_memory()
    seed_all(config.job.seed)


def job_spec(
    optimizer: torch.optim.Optimizer, max_grad_norm: float | None, consistency: ConsistencyConfig
) -> OptimizerSpec:
    """The optimizer that the shards run. They clip the mean; where an update is made of one
    worker's gradient, or of its local steps, that worker clips for itself.
    """
    check_norm(max_grad_norm)
    if consistency.mode == "local":
        return outer_spec(consistency, len(optimizer.param_groups))
    spec = describe(optimizer, max_grad_norm if consistency.mode == "sync" else None)
    check_consistency(spec, consistency)
    return spec


def farewell(error: BaseException) -> Farewell:
    """What an error means for the others: whether another process in this one's place would fail
    as well.
    """
    if isinstance(error, Preempted):
        return Farewell.PREEMPTED
    hopeless = UsageError | NonFiniteError | MismatchError | DataLossError | ResultError
    return Farewell.FATAL if isinstance(error, hopeless) else Farewell.FAILED


def forget_frames(error: BaseException) -> BaseException:
    """The error, without what its traceback refers to: process groups that outlive the session
    there may abort the process when it ends.
    """
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    return error


def reason(error: BaseException) -> str:
    """The error, in a line for the others."""
    return f"{type(error).__name__}: {error}"


def trained(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module
) -> tuple[list[torch.nn.Parameter], list[ParameterSpec]]:
    """The parameters that the shards will hold, in the optimizer's order, and what they are; of
    several that are one memory, one. Raises UsageError for a model that cannot be trained.
    """
    check_model(model)
    tie(model, optimizer)
    names = {id(p): plain_name(model, name) for name, p in model.named_parameters()}
    parameters, specs = [], []
    for group, entries in enumerate(optimizer.param_groups):
        for parameter in entries["params"]:
            if not is_trained(parameter):
                continue
            specs.append(_spec(parameter, names.get(id(parameter)), group))
            parameters.append(parameter)
    if not parameters:
        raise UsageError(
            "the optimizer has no parameter that requires a gradient: there is nothing to train"
        )
    return parameters, specs


def move_into_buckets(
    model: torch.nn.Module, plan: Plan, parameters: Sequence[torch.nn.Parameter], stage: int
) -> tuple[list[Bucket], set[int]]:
    """The buckets of a stage, and the ids of all tensors whose values are in the exchange's hands:
    the parameters, and what shares memory with them.
    """
    for layout in plan.buckets:
        for placement in layout.placements if layout.stage == stage else ():
            index = placement.parameter
            check_has_memory(plan.parameters[index].name, parameters[index])
    found = aliases(model, parameters)
    buckets = make_buckets(plan, parameters, stage)
    for alias in found:
        alias.follow()
    return buckets, {id(each) for each in (*parameters, *(alias.place.tensor for alias in found))}


def _spec(parameter: torch.nn.Parameter, name: str | None, group: int) -> ParameterSpec:
    if name is None:
        raise UsageError(
            f"the optimizer has a parameter of shape {list(parameter.shape)} that the model does "
            "not own: give session.optimizer the module that holds all of them"
        )
    check_parameter(name, parameter)
    return ParameterSpec(name, parameter.dtype, tuple(parameter.shape), group)
