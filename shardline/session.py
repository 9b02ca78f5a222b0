"""`shardline.connect()`: what a training script sees of the fleet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import Dataset

from allreduce.store import kept_here
from ps_core.buckets import Bucket
from ps_core.checkpoint import check_writable, extra_state, what_is_lost
from ps_core.config import check_addresses, load
from ps_core.errors import ConfigError, ResultError, ShardlineError, UsageError
from ps_core.exchange import DataLeases, Farewell, Purpose, Start
from ps_core.extras import Extras
from ps_core.local_steps import LocalStepsOptimizer
from ps_core.metrics import Endpoint, WorkerMetrics, start_endpoint
from ps_core.optim_spec import OptimizerSpec
from ps_core.optimizer import ExchangeOptimizer, JobExchange
from ps_core.plan import Plan, make_plan
from ps_core.settings import Config
from ps_core.weights import checked_weight
from shardline.attendance import Attendance
from shardline.description import (
    choose_device,
    farewell,
    forget_frames,
    job_spec,
    move_into_buckets,
    prepare_process,
    reason,
    trained,
)
from shardline.gradients import Gradients
from shardline.handed_over import kept, number
from shardline.journal import Journal
from shardline.loader import LOADERS_PER_LOOP, Loader, Place, Requests, read_spec
from shardline.model_file import ModelFile
from shardline.model_steps import Batch, Loss, TrainStep, WholeModel, evaluating, inputs_of
from shardline.notices import Notices
from shardline.preemption import Preemption
from shardline.records import Kept
from shardline.rows import RowsSeen
from shardline.schedules import S, Schedules
from shardline.seeds import part_ways
from shardline.steps import Steps
from shardline.strategies import check_strategy, make_exchange
from shardline.streams import tell
from shardline.weights import Advised, Weight

if TYPE_CHECKING:
    from shardline.staging import Staging


_CHANGED_GRADIENTS = (
    "the script changes gradients between backward() and step(): that acts on each worker's own, "
    "before the mean over workers. torch.nn.utils.clip_grad_norm_ clips each worker's by itself; "
    "session.optimizer(…, max_grad_norm=…) clips their mean, as one process does"
)


_NOTHING_IS_KEPT = (
    "the model, logged values and results of this job will not be written: set "
    "SHARDLINE_JOB_RUN_DIR to an existing folder, or start the script with `shardline run`"
)


def connect(config: Path | str | None = None) -> Session:
    """A session for this process, to be used in a `with` block.

    Who takes part comes from a TOML file (`config`, or the one that SHARDLINE_CONFIG names) and
    from SHARDLINE_* variables; with neither, this process trains alone. Seeds torch,
    NumPy and random with `job.seed`, unless the script has seeded torch. A wrong configuration ends
    the process with exit code 2.
    """
    with _exit_on_error():
        settings = load(file=Path(config) if config else None)
        check_addresses(settings)
        check_strategy(settings)
        _check_is_first(settings)
        return Session(settings)


_jobs: Final[set[str]] = set()
"""Those that this process has connected to."""


def _check_is_first(config: Config) -> None:
    """A worker's process takes part in a job once: the others would wait for what they have had."""
    if config.strategy == "alone":
        return
    cluster = config.cluster
    job = f"{config.job.id} {cluster.rendezvous} {cluster.shards} {cluster.attempt}"
    if job in _jobs:
        raise UsageError(
            "shardline.connect() was called twice: the workers of a run train one model. For "
            "several, such as one for each fold of the data, start a `shardline run` for each, and "
            "give the script the number of the fold as an argument"
        )
    _jobs.add(job)


@contextlib.contextmanager
def _exit_on_error() -> Iterator[None]:
    """End the process with one clear line, as argparse does for wrong usage."""
    try:
        yield
    except ShardlineError as error:
        tell(str(error))
        raise SystemExit(error.exit_code) from forget_frames(error)


class Session:
    """One worker of a job, or a process that trains alone.

    Attributes:
        rank: this worker's number among all; with --stages, its replica's.
        world_size: the number of workers, or of replicas, that the job starts with.
        stage: which part of its replica's model this worker has; 0 without --stages.
        device: where the model and its inputs belong.
        seed: job.seed, the same on all workers.
        config: the whole configuration.

    Leaving the `with` block well waits for all workers, then the chosen one writes the model. An
    exception in the block takes this worker out of the job, which goes on without it, unless every
    worker would fail like this: wrong usage, a mismatch and gradients that are not finite fail the
    job for everybody. What training has come to is then written to `interrupted.safetensors`. A
    ShardlineError that nobody catches inside the block ends the process with
    its exit code.
    """

    def __init__(self, config: Config) -> None:
        """Does not connect: that happens in `optimizer`."""
        self.config = config
        counted = config.by_replica().cluster
        self.rank = counted.rank
        self.world_size = counted.num_workers
        self.stage = config.cluster.rank % config.pipeline.stages
        self.seed = config.job.seed
        self.device = choose_device(config.worker.device, config.cluster)
        prepare_process(config, self.device)
        self._endpoint: Endpoint | None = start_endpoint(
            config.metrics.host, config.metrics.port, shared=config.rpc.shared_ports
        )
        if self._endpoint and not config.metrics.port:
            tell(f"metrics at {self._endpoint.url}")
        metrics = WorkerMetrics(config.cluster.rank, len(config.cluster.shards))
        self._preemption = Preemption(config.worker.grace_seconds)
        self._is_alone = config.strategy == "alone"
        self._keeper = kept_here(config)
        """The rendezvous, which lives until the block has been left."""
        self._staging = _stage(config, self.device)
        self._replica = self._staging.replica if self._staging else None
        self.exchange: JobExchange = make_exchange(
            config, self.device, metrics, self._preemption.is_requested, self._replica
        )
        self._run_dir = Path(config.job.run_dir) if config.job.run_dir else None
        self._journal = self._open_journal()
        self._model_file = ModelFile(
            self._run_dir, self._staging, wait_is_bounded=config.strategy == "allreduce"
        )
        self._attendance = Attendance()
        if self._is_alone:
            self._attendance.bind(self.exchange)
        self._schedules = Schedules()
        self._steps = self._make_steps(metrics)
        self._notices = Notices(tell, speaks=config.cluster.rank == 0)
        self._requests = Requests(self._leases)
        self._num_loaders = 0
        self._is_open = False
        self._start = Start(0, chosen=True)
        self._optimizer: ExchangeOptimizer | None = None
        self._reported: dict[str, Kept] = {}
        self._model: torch.nn.Module | None = None
        self._rows: RowsSeen | None = None

    def _make_steps(self, metrics: WorkerMetrics) -> Steps:
        return Steps(
            metrics,
            self._journal,
            self._attendance,
            self._schedules.counts,
            self._preemption.check,
            counts_samples=self.stage == 0,
        )

    def _open_journal(self) -> Journal:
        try:
            rank, incarnation = self.config.cluster.rank, str(self.exchange.incarnation)
            return Journal(self._run_dir, rank, self.exchange.traffic, incarnation)
        except OSError as error:
            raise ConfigError(
                f"cannot write to the run directory {self._run_dir} ({error.strerror}): set "
                "job.run_dir to a folder that exists and may be written to"
            ) from error

    # -- The script's side -------------------------------------------------------------------------

    def optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        max_grad_norm: float | None = None,
    ) -> ExchangeOptimizer:
        """Join the job and return the optimizer to use instead of `optimizer`. Blocks until all
        workers have joined.

        `model` owns every parameter of `optimizer`; afterwards its parameters and buffers have the
        job's values. With `max_grad_norm` what goes into an update is clipped to this 2-norm: the
        mean over all workers in mode sync, each worker's own gradient in the others. Raises
        UsageError for what cannot run on shards, MismatchError when workers disagree,
        ShardUnreachableError.
        """
        self._check_is_open("optimizer")
        if self._model is not None:
            raise UsageError(
                "session.optimizer was called twice: a session trains one model. Two networks (a "
                "GAN) are one nn.ModuleDict, whose parameters one optimizer has in two groups: see "
                "docs/recipes.md"
            )
        spec = job_spec(optimizer, max_grad_norm, self.config.consistency)
        parameters, specs = trained(optimizer, model)
        if self._staging is not None:
            self._staging.replica.connect()
            parameters, specs = self._staging.place(model, optimizer, parameters, specs)
        exchange, stages = self.config.exchange, self.config.pipeline.stages
        num_shards = max(stages, len(self.config.cluster.shards))
        plan = make_plan(specs, num_shards, exchange.part_bytes, exchange.bucket_bytes)
        buckets, exchanged = move_into_buckets(model, plan, parameters, self.stage)
        extras = Extras(model, exchanged)
        extras.check()
        self._check_file(model)
        self._model = model
        start = self._start = self.exchange.join(plan, buckets, spec, extras)
        for bucket in buckets:
            bucket.accept()
        self._watch(model, buckets)
        part_ways(self.rank)
        self._optimizer = self._wrap(optimizer, plan, buckets, spec, max_grad_norm)
        self._attendance.bind(self.exchange, self._optimizer)
        self._attendance.is_chosen = start.chosen
        self._journal.joined()
        if self._run_dir is None:
            self._notices.once(_NOTHING_IS_KEPT)
        if start.position is not None:
            self._attendance.others_are_at(start.position.point)
            tell(f"worker {self.rank} joins a running job at step {start.step}")
        return self._optimizer

    def _watch(self, model: torch.nn.Module, buckets: Sequence[Bucket]) -> None:
        """Notice what the model is given and what becomes of its gradients."""
        self._steps.watch(
            Gradients(buckets),
            self.exchange,
            partial(self._notices.once, _CHANGED_GRADIENTS) if self._is_averaged else None,
        )
        if self._staging is None:
            self._rows = RowsSeen(model, self._steps.given_rows)

    @property
    def _is_averaged(self) -> bool:
        """A gradient that goes into an update is of several workers."""
        shared = self.world_size > 1 and self.config.consistency.mode == "sync"
        return shared or self._staging is not None

    def _check_file(self, model: torch.nn.Module) -> None:
        """Say what `model.safetensors` will lack. Raises UsageError for what it cannot hold."""
        check_writable(model)
        texts, lost = extra_state(model)
        if self._staging is not None:
            lost += texts
        if lost and self.config.cluster.rank == 0:
            tell(f"model.safetensors will lack {what_is_lost(lost)}")

    def _wrap(
        self,
        inner: torch.optim.Optimizer,
        plan: Plan,
        buckets: Sequence[Bucket],
        spec: OptimizerSpec,
        max_grad_norm: float | None,
    ) -> ExchangeOptimizer:
        given = self.config.consistency
        make: Callable[..., ExchangeOptimizer] = partial(ExchangeOptimizer, replica=self._replica)
        if given.mode == "local":
            make = partial(LocalStepsOptimizer, outer=spec, local_steps=given.local_steps)
        return make(
            inner,
            plan,
            buckets,
            self.exchange,
            self._steps,
            first_step=self._start.step,
            nonfinite=self.config.worker.nonfinite,
            max_grad_norm=None if spec.max_grad_norm else max_grad_norm,
        )

    def model(self) -> AbstractContextManager[object]:
        """`with session.model(): model = …` builds the model; with --stages it then has no memory
        until `optimizer` gives some to this worker's layers. Its parameters begin with the values
        that they have without this.
        """
        return self._staging.building() if self._staging else contextlib.nullcontext()

    def split(
        self, *, at: Sequence[str | int] | None = None, like: torch.Tensor | None = None
    ) -> None:
        """With --stages: cut the model before the layers `at`, by name or index, or so that every
        stage takes as long as the others on inputs `like` these; by default so that all have as
        many parameters. Call it before `optimizer`.
        """
        if self._staging is not None:
            self._staging.split(at, like)

    def step(
        self,
        model: torch.nn.Module,
        loss_fn: Loss,
        *,
        overlap: bool = False,
        weight: Weight | None = None,
    ) -> TrainStep:
        """Forward and backward of the whole model: a callable that takes a batch, the inputs and
        last the target, leaves gradients where `optimizer.step()` finds them, and returns the loss,
        or None on a worker without the last layers. `loss_fn(output, target)` is a mean over the
        samples, or over what `weight(target)` counts: tokens, or class weights. A batch that weighs
        0 has no part in the step.

        With `overlap` gradients of a whole model are sent while backward still computes others:
        `optimizer.step()` must then follow every call, with nothing in between that needs the other
        workers; to accumulate gradients use it for the last batch only.
        """
        train: Callable[..., torch.Tensor | None]
        if self._staging is not None:
            train = partial(self._train_stage, self._staging)
        else:
            before = self._begin_step if overlap else None
            train = WholeModel(model, self.device, self._steps.counted, before).train
        is_advised = weight is None and (self.world_size > 1 or self._staging is not None)
        if is_advised:
            train = Advised(train, loss_fn, self._notices)
        return partial(train, loss_fn=loss_fn, weight=weight)

    def _train_stage(
        self, staging: Staging, batch: Batch, loss_fn: Loss, weight: Weight | None
    ) -> torch.Tensor | None:
        loss = staging.train(batch, loss_fn, weight, self._steps.counted)
        self._steps.backward_complete()  # some schedules go on after torch's backward pass
        return loss

    def _begin_step(self) -> None:
        if self._optimizer is None:
            raise UsageError("call session.optimizer(...) before the model is trained")
        self._optimizer.begin_step()

    def evaluate(
        self, model: torch.nn.Module, batch: torch.Tensor | Sequence[torch.Tensor]
    ) -> torch.Tensor | None:
        """The model's output for its inputs, without gradients; None on a worker without the last
        layers. All workers of a replica must call it.

        A model in training mode is in evaluation mode meanwhile, and then as it was: nothing is
        dropped, and running statistics are used and stay. One whose `eval()` was called stays as it
        is, with each of its modules in the mode that it has.
        """
        runner = self._staging or WholeModel(model, self.device)
        with evaluating(model):
            return runner.evaluate(inputs_of(batch))

    def scheduler(self, make: Callable[[torch.optim.Optimizer], S]) -> S:
        """`make(optimizer)`, a scheduler of torch. On a worker that has joined a running job it is
        stepped as often as the others have stepped theirs. Raises UsageError.
        """
        if self._optimizer is None:
            raise UsageError("call session.optimizer(...) before session.scheduler(...)")
        if not callable(make):
            raise UsageError(
                f"session.scheduler got a {type(make).__name__}: give it a function that makes "
                "one, such as lambda optimizer: StepLR(optimizer, 1)"
            )
        return self._schedules.build(make, self._optimizer, self._start)

    def epochs(self, count: int, start: int = 0) -> Iterator[int]:
        """start … count - 1, for a script that goes on from a checkpoint of its own; on a worker
        that has joined a running job from the others' epoch on. All workers meet after each, and
        then hold the same, newest parameters. Loaders begin with the order of their first pass.
        Raises UsageError.
        """
        if start < 0:
            raise UsageError(f"session.epochs(start={start}): epochs are counted from 0 on")
        num_loaders, epochs = self._num_loaders, self._attendance.begin_loop(count, start)
        try:
            for epoch in epochs:
                # A loader that is made anew in every epoch is the same one: its next pass follows.
                self._num_loaders = self._attendance.point.loop * LOADERS_PER_LOOP
                self._attendance.begin_loop_body(epoch)
                yield epoch
                self._attendance.end_loop_body()
        finally:
            self._num_loaders = num_loaders
            self._attendance.end_loop(count)

    def loader(
        self,
        dataset: Dataset[Any],
        batch_size: int = 1,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        global_batch_size: int = 0,
        **options: Any,
    ) -> Loader:
        """Batches of a map-style dataset, each sample on one worker; `options` go to torch's
        DataLoader.

        `batch_size` is per worker. With `global_batch_size` every update is made of that many
        samples instead, split over the workers in proportion to their speed. All workers must
        create and iterate the same loaders in the same order: for evaluation on one worker use a
        plain DataLoader. Raises UsageError.
        """
        self._check_is_open("loader")
        if global_batch_size and self.config.consistency.mode != "sync":
            raise UsageError(
                "global_batch_size needs mode sync: in the other modes workers take no steps "
                "together"
            )
        spec = read_spec(dataset, batch_size, global_batch_size, drop_last)
        place = Place(
            self._num_loaders,
            self.world_size,
            self.seed,
            self._requests,
            self._attendance,
            self._steps,
            self._preemption,
            self._notices,
        )
        self._num_loaders += 1
        return Loader(dataset, spec, place, shuffle=shuffle, options=options)

    def _leases(self) -> DataLeases:
        if not self._is_alone and self._model is None:
            raise UsageError(
                "a loader needs the other workers: call session.optimizer(...) before the loop"
            )
        return self.exchange

    def mean(self, value: float | torch.Tensor | None, weight: float = 1.0) -> float:
        """The weighted mean over all workers, which must all call this; None is no value. Blocks
        until they have.
        """
        if value is None:
            value, weight = 0.0, 0.0
        mine = number("session.mean", value)
        weight = checked_weight("session.mean(weight=…)", weight)
        if self.world_size > 1 and self._model is None:
            raise UsageError(
                "session.mean needs the other workers: call session.optimizer(...) first"
            )
        return self._attendance.meet(Purpose.MEAN, [mine], weight).means[0]

    def log(self, **values: float | torch.Tensor) -> None:
        """Show numbers live, keep them in `metrics.jsonl`, plot them; `loss` is a metric, too.
        Raises UsageError for what is not one number.
        """
        numbers = {name: number(f"session.log({name}=…)", each) for name, each in values.items()}
        self._steps.log(numbers)

    def report(self, **values: object) -> None:
        """Results of the run; those of the lowest rank that has any land in `summary.json`. They
        are numbers of Python, NumPy and torch, tensors, text, paths, and lists and dicts of them.
        Raises UsageError for anything else.
        """
        self._reported |= {name: kept(name, value) for name, value in values.items()}

    # -- The block ---------------------------------------------------------------------------------

    def _check_is_open(self, call: str) -> None:
        """Leaving the block ends the job and writes the model: nothing is trained outside of it."""
        if not self._is_open:
            raise UsageError(
                f"session.{call}(…) was called outside of the session's block: write `with "
                "shardline.connect() as session:` and train inside, since the model is written "
                "where the block ends"
            )

    def __enter__(self) -> Session:
        self._is_open = True
        if not self._is_alone:
            self._preemption.listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_open = False
        with _exit_on_error():
            try:
                if error is None or (isinstance(error, SystemExit) and not error.code):
                    self._finish()
                else:
                    self._break_off(error)
            except BaseException as failure:
                self._break_off(failure)
                raise
            finally:
                if self._staging is not None:
                    self._staging.replica.close(well=error is None)
                self._preemption.close()
                self._attendance.release()
                self._steps.close()
                if self._rows is not None:
                    self._rows.close()
                self._journal.close()
                self._keeper = None
                if self._endpoint:
                    self._endpoint.close()
            if isinstance(error, ShardlineError):
                raise error

    def _break_off(self, error: BaseException) -> None:
        """Leave the others first, who go on or end, and then keep what training has come to."""
        self.exchange.close(farewell(error), reason(error))
        if self._optimizer is not None and self._attendance.is_chosen:
            assert self._model is not None, "they come together"
            self._model_file.rescue(self._model, self.exchange.held_versions(), error)

    def _finish(self) -> None:
        farewell = Farewell.FINISHED
        try:
            if self._model is not None:
                meet = partial(self._attendance.meet, Purpose.CLOSE)
                farewell = self._model_file.settle(self._model, meet)
        except ResultError:
            self._journal.end(self._steps.num_steps, self._reported)
            raise
        self._journal.end(self._steps.num_steps, self._reported)
        self.exchange.close(farewell)


def _stage(config: Config, device: torch.device) -> Staging | None:
    """With --stages: this worker's place in its replica of the model."""
    if config.pipeline.stages == 1:
        return None
    from shardline.replica import StageOfReplica  # these import torch's compiler
    from shardline.staging import Staging

    return Staging(config, device, StageOfReplica(config, device))
