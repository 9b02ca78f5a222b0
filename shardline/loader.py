"""`session.loader`: a DataLoader over the samples that the lead leases to this worker."""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ps_core.errors import UsageError
from ps_core.exchange import DataLeases, Grant
from ps_core.leases import Lease, PassSpec
from ps_core.point import Point
from shardline.attendance import Attendance
from shardline.batch_size import num_left
from shardline.fingerprint import fingerprint
from shardline.notices import Notices
from shardline.preemption import Preemption
from shardline.steps import Steps

LOADERS_PER_LOOP = 2**16
"""Numbers for those that are made within a `session.epochs`, whichever of its bodies are run."""

_OF_ORDER = frozenset({"sampler", "batch_sampler", "generator"})

_AHEAD = 2
"""Leases asked for before they are needed, so that no batch waits for the lead."""


class Requests:
    """The open requests of all loaders, which are answered in order."""

    def __init__(self, leases: Callable[[], DataLeases]) -> None:
        """`leases` raises UsageError before the worker has joined."""
        self._leases = leases
        self._open: deque[LeaseStream] = deque()
        self.latest: LeaseStream | None = None
        """What the lead takes for the pass that this worker reads."""

    def ask(self, stream: LeaseStream) -> None:
        """Request a lease. Does not block."""
        self._leases().request_lease(stream.loader, stream.spec)
        self._open.append(stream)
        self.latest = stream

    def holds(self, lease: Lease) -> bool:
        """Whether it may still be trained on."""
        return self._leases().holds_lease(lease.id)

    def receive(self) -> None:
        """Give the next answer to the loader that asked. Blocks for a round trip."""
        grant = self._leases().receive_lease()
        self._open.popleft().accept(grant)


class LeaseStream:
    """One loader's leases, requested a few ahead of their use."""

    def __init__(self, requests: Requests, loader: int, spec: PassSpec) -> None:
        self.loader = loader
        self.spec = spec
        self._requests = requests
        # The shares of a global batch depend on who takes part in that very step.
        self._ahead = 1 if spec.global_batch_size else _AHEAD
        self._num_open = self._num_void = 0
        self._kept: deque[Grant] = deque()
        self._is_dry = False
        self.is_over = False
        """The pass had ended before this worker came to it."""

    def begin_pass(self, point: Point) -> None:
        """The script begins to read the loader."""
        self.spec = replace(self.spec, point=point)
        self.is_over = False

    def begin(self, grant: Grant | None = None) -> None:
        """A pass begins, or goes on with what has come back. What was asked for in a pass that was
        broken off is not used: the lead has taken it back.
        """
        self._num_void += self._num_open
        self._num_open = 0
        self._kept.clear()
        self._is_dry = False
        if grant is not None:
            self._kept.append(grant)

    def take(self) -> Lease | None:
        """The next lease; None when there is none for this worker now. Blocks for a round trip if
        none was asked for ahead.
        """
        while True:
            while not self._is_dry and self._num_open + len(self._kept) < self._ahead:
                self._requests.ask(self)
                self._num_open += 1
            while not self._kept and self._num_open:
                self._requests.receive()
            if not self._kept:
                return None
            grant = self._kept.popleft()
            if grant.leases:
                return grant.leases[0]
            self._is_dry = True
            self.is_over |= grant.is_over

    def accept(self, grant: Grant) -> None:
        """The answer to the oldest request."""
        if self._num_void:
            self._num_void -= 1
            return
        self._num_open -= 1
        self._kept.append(grant)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a loader stands in its session."""

    index: int
    """Loaders are counted in the order the script makes them, for each `session.epochs` anew."""
    num_workers: int
    seed: int
    requests: Requests
    attendance: Attendance
    steps: Steps
    preemption: Preemption
    notices: Notices


class Loader:
    """Batches of a map-style dataset, each sample of a pass on exactly one worker.

    Pass number p visits `torch.randperm(n, generator=seed + p)`, or the samples in their order.
    The lead leases ranges of it. In synchronous modes batch b goes to the worker of rank b mod N as
    long as nobody comes or goes, so N workers' batches of one step are the batch that one process
    with N times the batch size would see. A pass ends when every sample is accounted for.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        spec: PassSpec,
        place: Place,
        *,
        shuffle: bool,
        options: Mapping[str, Any],
    ) -> None:
        """`options` go to torch's DataLoader. Raises UsageError for those that say which samples
        are read, or in which order.
        """
        for name in ("sampler", "batch_sampler"):
            if options.get(name) is not None:
                raise UsageError(
                    f"session.loader shares out the samples itself: leave out {name}, or bring "
                    "your own DataLoader and call optimizer.step(samples=n)"
                )
        if not options.get("in_order", True):
            raise UsageError("session.loader gives batches in their order: leave out in_order")
        self.dataset = dataset
        self.batch_size = spec.batch_size
        self.drop_last = spec.drop_last
        self._torchs = DataLoader(dataset, **options)
        self._spec = spec
        self._place = place
        self._shuffle = shuffle
        self._options = options
        self._stream = LeaseStream(place.requests, place.index, spec)
        self._order: tuple[int, list[int]] = (-1, [])

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever torch's DataLoader has
        """What torch's DataLoader knows of its options, such as `num_workers`."""
        if name.startswith("_") or name in _OF_ORDER:
            raise AttributeError(
                f"a session.loader has no attribute {name!r}: it shares out the samples itself"
            )
        return getattr(self._torchs, name)

    def __len__(self) -> int:
        """Batches of this worker in one pass if nobody comes or goes, rounded up."""
        size = self._spec.global_batch_size or self._spec.batch_size * self._place.num_workers
        return -(-self._spec.num_positions // size)

    def __iter__(self) -> Iterator[Any]:
        """One pass. Waits for the other workers at its end, and first when the pass before was
        broken off. Raises UsageError when another loader's pass ends in the middle of this one.
        """
        place, index = self._place, self._place.index
        self._note_too_few()
        place.attendance.ensure_met()
        place.steps.begin_pass(index)
        self._take_fingerprint()
        self._stream.begin_pass(place.attendance.begin_pass(index))
        is_over, grant = False, None
        try:
            while not is_over:
                self._stream.begin(grant)
                yield from self._batches(self._stream)
                if self._stream.is_over:
                    place.attendance.pass_over()
                    is_over = True
                    continue
                if place.requests.latest is not self._stream:  # the lead would offer another's
                    grant = None
                    continue
                takes_leases = place.steps.end_data(index)
                if place.steps.has_gradients(index):
                    place.attendance.put_off(place.steps.give_back_rest)
                    is_over = True
                else:
                    grant = place.attendance.end_epoch(takes_leases=takes_leases)
                    is_over = grant is None
        finally:
            if not is_over:
                self._break_off()

    def _take_fingerprint(self) -> None:
        """Of what the dataset holds when it is first read; alone there is nothing to compare."""
        if self._place.num_workers > 1 and not self._stream.spec.fingerprint:
            taken = fingerprint(self.dataset, self._place.seed)
            self._stream.spec = replace(self._stream.spec, fingerprint=taken)

    def _note_too_few(self) -> None:
        """Some workers get nothing, or all."""
        spec, num_workers = self._spec, self._place.num_workers
        unit = spec.global_batch_size or spec.batch_size
        num_batches = -(-spec.num_positions // unit)
        if not num_batches:
            self._place.notices.once(
                f"{spec.num_samples} samples are less than a batch of {unit}, and drop_last leaves "
                "out what is less: no worker is given any"
            )
        elif num_batches < num_workers and not spec.global_batch_size:
            self._place.notices.once(
                f"{spec.num_samples} samples in batches of {unit} are {num_batches} for "
                f"{num_workers} workers, some of which get none: make batch_size smaller"
            )

    def _break_off(self) -> None:
        """A worker that was told to end has no time to wait for anybody: its last word says all."""
        self._place.steps.drop_rest(self._place.index)
        if not self._place.preemption.is_requested():
            self._place.attendance.break_off()

    def _batches(self, stream: LeaseStream) -> Iterator[Any]:
        """Until the lead has nothing more for this worker. The DataLoader may draw indices ahead of
        the batches it returns, which come in the same order.
        """
        place, num_ends = self._place, self._place.attendance.num_ends
        drawn: deque[Lease] = deque()

        def draw() -> Iterator[list[int]]:
            while (lease := stream.take()) is not None:
                drawn.append(lease)
                yield self._indices(lease)

        batches = iter(DataLoader(self.dataset, batch_sampler=draw(), **self._options))
        while True:
            if place.attendance.num_ends != num_ends:
                raise UsageError(
                    "a pass ended within the loop over another session.loader: read the one "
                    "within with a plain DataLoader, or after the loop"
                )
            place.preemption.check()
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration as error:
                if drawn:
                    raise UsageError(
                        f"the dataset raised StopIteration for samples {self._indices(drawn[0])} "
                        f"of {self._spec.num_samples}: let __getitem__ raise another error, and "
                        "__len__ say how many there are"
                    ) from error
                return
            lease = drawn.popleft()
            if place.requests.holds(lease):
                samples = self._num_samples(batch, lease)
                place.steps.yielded(lease, time.perf_counter() - started, samples)
                if batch is not None:  # a collate_fn that has dropped all
                    yield batch

    def _num_samples(self, batch: Any, lease: Lease) -> int:  # noqa: ANN401 - the script's
        """Only a collate_fn of the script's own drops any."""
        is_own = self._options.get("collate_fn") is not None
        return num_left(batch, lease.length) if is_own else lease.length

    def _indices(self, lease: Lease) -> list[int]:
        """The samples at a lease's positions."""
        positions = range(lease.start, lease.start + lease.length)
        if not self._shuffle:
            return list(positions)
        if self._order[0] != lease.number:
            generator = torch.Generator().manual_seed(self._place.seed + lease.number)
            order = torch.randperm(self._spec.num_samples, generator=generator)
            self._order = lease.number, order.tolist()
        return self._order[1][lease.start : lease.start + lease.length]


def read_spec(
    dataset: Dataset[Any], batch_size: int, global_batch_size: int, drop_last: bool
) -> PassSpec:
    """What a pass over the dataset reads. Raises UsageError for a dataset whose samples cannot be
    leased, and for sizes with which nothing can be read.
    """
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise UsageError(
            "session.loader needs a map-style dataset (__getitem__ and __len__), because it "
            "shares out indices: for an "
            "IterableDataset bring your own DataLoader, split by session.rank, and call "
            "optimizer.step(samples=n)"
        )
    if not len(dataset):
        raise UsageError("the dataset is empty: there is nothing to train on")
    try:
        sizes = operator.index(batch_size), operator.index(global_batch_size)
    except TypeError as error:
        raise UsageError(
            f"session.loader got batch_size={batch_size!r} and global_batch_size="
            f"{global_batch_size!r}: give whole numbers"
        ) from error
    return PassSpec(len(dataset), *sizes, drop_last=bool(drop_last))
