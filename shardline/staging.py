"""A model that is split over the workers of a replica: who holds what, and how it trains."""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import partition
from pipeline.deferred import Deferred
from pipeline.partition import Layer
from pipeline.schedule import (
    check_microbatches,
    default_microbatches,
    stages_of,
    virtual_stages,
    worker_of,
)
from pipeline.step import PipelineStep
from pipeline.timing import layer_seconds
from ps_core.aliases import Alias, aliases
from ps_core.checkpoint import (
    distinct_tensors,
    extra_state,
    what_is_lost,
    with_signs,
    write_tensors,
)
from ps_core.errors import UsageError
from ps_core.group_metrics import PipelineMetrics
from ps_core.plan import ParameterSpec
from ps_core.settings import Config
from shardline.batch_size import num_rows
from shardline.microbatch_buffers import naming_changes
from shardline.model_steps import Batch, Counts, Loss, only_input
from shardline.replica import StageOfReplica
from shardline.weights import Weight, weight_of

log = logging.getLogger(__name__)

_SECONDS = "seconds of each layer"


class Staging:
    """One worker's stage, or stages, of the script's model.

    Stages are counted in two ways: a worker's own number, from 0 to `--stages` - 1, and that of a
    run of layers, of which some schedules give every worker two.
    """

    def __init__(self, config: Config, device: torch.device, replica: StageOfReplica) -> None:
        self.replica = replica
        self._config = config
        self._device = device
        self._deferred = Deferred()
        self._cuts: Sequence[str | int] | None = None
        self._example: Tensor | None = None
        self._pipeline: PipelineStep | None = None
        self._names: dict[str, int] = {}
        """Layer → the worker of the replica that holds it."""
        self._unseen: list[Layer] = []
        """This worker's layers, until a step has shown which buffers they change."""
        self._schedule, given = config.pipeline.schedule, config.pipeline.microbatches
        stages = config.pipeline.stages
        self._num_microbatches = given or default_microbatches(self._schedule, stages)
        check_microbatches(self._schedule, stages, self._num_microbatches)
        own = stages_of(self._schedule, replica.stage, stages)
        self._metrics = PipelineMetrics(config.cluster.rank, own)

    # -- Before training ---------------------------------------------------------------------------

    def building(self) -> AbstractContextManager[object]:
        """In it a model is built without memory."""
        return self._deferred

    def split(self, at: Sequence[str | int] | None, like: Tensor | None) -> None:
        """How the model is to be cut: before these layers, or by the time that each takes with such
        inputs.
        """
        self._cuts, self._example = at, like

    def place(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        specs: Sequence[ParameterSpec],
    ) -> tuple[list[nn.Parameter], list[ParameterSpec]]:
        """Give memory to this worker's layers, and to the optimizer the parameters in them.

        Returns `parameters`, of which its own are the new ones, and `specs` with their stages.
        """
        _check_is_deferred(parameters)
        layers = partition.layers(model)
        cuts = self._decide(layers)
        partition.check(layers, cuts, self._num_microbatches)
        modules = [nn.Sequential(*(layers[i].module for i in cut)) for cut in cuts]
        holders = {
            id(each): self._holder(stage)
            for stage, module in enumerate(modules)
            for each in module.parameters()
        }
        staged = [
            replace(spec, stage=holders[id(each)])
            for each, spec in zip(parameters, specs, strict=True)
        ]
        _check_all_train([spec.stage for spec in staged], self.replica.num_stages)
        self._names = {
            layers[index].name: self._holder(stage)
            for stage, cut in enumerate(cuts)
            for index in cut
        }
        for alias in aliases(model, parameters):
            self._check_is_together(alias)
        own = stages_of(self._schedule, self.replica.stage, self.replica.num_stages)
        self._unseen = [layers[index] for stage in own for index in cuts[stage]]
        new = self._materialise(modules)
        for group in optimizer.param_groups:
            group["params"] = [new[each] for each in group["params"] if each in new]
        return [new.get(each, each) for each in parameters], staged

    def _check_is_together(self, alias: Alias) -> None:
        names = alias.place.name, alias.of.name
        if len({self._holder_of(name) for name in names}) > 1:
            raise UsageError(
                "{} shares memory with parameter {}, and they are in two stages: move a cut with "
                "session.split, or train without --stages".format(*names)
            )

    def _holder(self, stage: int) -> int:
        """Which worker of the replica holds a run of layers."""
        return worker_of(self._schedule, stage, self.replica.num_stages)

    def _decide(self, layers: Sequence[Layer]) -> tuple[range, ...]:
        """How the model is cut, the same on every worker of the job."""
        num_stages = self.replica.num_stages * virtual_stages(self._schedule)
        if self._cuts is not None:
            return partition.at(self._cuts, layers, num_stages)
        costs = partition.parameter_costs(layers)
        if self._example is not None:
            costs = self._measure(layers, self._example)
        return partition.partition(costs, num_stages)

    def _measure(self, layers: Sequence[Layer], example: Tensor) -> list[float]:
        """Worker 0 takes the time of every layer, and tells the others."""
        rendezvous = self.replica.rendezvous
        if self._config.cluster.rank == 0 and not rendezvous.knows(_SECONDS):
            seconds = layer_seconds(layers, example.to(self._device))
            rendezvous.tell(_SECONDS, struct.pack(f"<{len(seconds)}d", *seconds))
        told = rendezvous.hear(_SECONDS, self._config.membership.join_timeout_seconds)
        return list(struct.unpack(f"<{len(layers)}d", told))

    def _materialise(self, modules: Sequence[nn.Module]) -> dict[nn.Parameter, nn.Parameter]:
        """This worker's layers with memory, and the pipeline through all."""
        own = stages_of(self._schedule, self.replica.stage, self.replica.num_stages)
        new = self._deferred.materialise_module(
            nn.ModuleList(modules[stage] for stage in own), self._device
        )
        self._deferred.close()
        self._pipeline = PipelineStep(
            {stage: modules[stage] for stage in own},
            modules,
            self.replica.group,
            schedule=self._schedule,
            num_microbatches=self._num_microbatches,
            device=self._device,
        )
        return new

    # -- Training ----------------------------------------------------------------------------------

    def train(
        self, batch: Batch, loss_fn: Loss, weight: Weight | None, counts: Counts
    ) -> Tensor | None:
        """Forward and backward through all stages; the loss on the worker with the last layers."""
        *inputs, target = batch
        pipeline = self._ready
        counts(num_rows(inputs), None if weight is None else weight_of(target, weight))
        with self._naming_changes():
            loss = pipeline(only_input(inputs), target, loss_fn, weight)
        times = pipeline.last
        if times is not None:
            self._metrics.step(
                times.forward_seconds,
                times.backward_seconds,
                times.bubble_fraction,
                times.activation_bytes,
            )
        return loss

    def _naming_changes(self) -> AbstractContextManager[None]:
        """In the first step that has microbatches."""
        layers, self._unseen = self._unseen, []
        if self._num_microbatches == 1 or not layers:
            return nullcontext()
        return naming_changes(layers, self._num_microbatches)

    def evaluate(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """Forward through all stages; the output on the worker with the last layers."""
        return self._ready.evaluate(only_input(inputs))

    @property
    def _ready(self) -> PipelineStep:
        if self._pipeline is None:
            raise UsageError("call session.optimizer(...) before the model is used")
        return self._pipeline

    def write_model(
        self, model: nn.Module, path: Path, sign: Callable[[], object] | None = None
    ) -> None:
        """Write the whole model, one tensor in memory at a time: all stages call it, the first one
        writes. See ps_core.checkpoint.with_signs for `sign`.
        """
        entries, metadata = distinct_tensors(model)
        texts, others = extra_state(model)
        if self.replica.stage == 0 and (texts or others):
            log.warning("%s lacks %s", path.name, what_is_lost([*texts, *others]))
        tensors: Iterator[Tensor] = (
            self.replica.fetch(_with_memory(tensor), self._holder_of(name))
            for name, tensor in entries.items()
        )
        tensors = with_signs(tensors, sign)
        if self.replica.stage == 0:
            write_tensors(path, entries, tensors, metadata)
        else:
            deque(tensors, maxlen=0)

    def _holder_of(self, name: str) -> int:
        """Which worker of the replica has the tensor of this name; -1: it is in no layer."""
        layers = (each for each in self._names if name.startswith(f"{each}."))
        return self._names.get(max(layers, key=len, default=""), -1)


def _check_all_train(stages: Sequence[int], num_stages: int) -> None:
    idle = sorted(set(range(num_stages)) - set(stages))
    if idle:
        raise UsageError(
            f"stage {idle[0]} would have no parameter to train: use fewer --stages, or choose the "
            "cuts with session.split"
        )


def _check_is_deferred(parameters: Sequence[nn.Parameter]) -> None:
    if not all(parameter.is_meta for parameter in parameters):
        raise UsageError(
            "with --stages the model is built without memory: write `with session.model(): "
            "model = …`, with `.to(session.device)` inside"
        )


def _with_memory(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor
