"""The workers of a job as one of them sees them: who they are, and what they all hold.

When the group is formed, first or anew, everybody says how many rounds it has completed. Whoever
has completed the most hands over all it holds: parameters, the optimizer's state, buffers, and what
is agreed on besides.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from allreduce import record as records
from allreduce import state
from allreduce.extras import share_extras
from allreduce.group import Gathering, Group, PeerLostError, Wiring
from allreduce.passes import Passes
from allreduce.record import Record
from allreduce.rendezvous import Rendezvous
from allreduce.sharing import share_bytes_everywhere, share_tensors
from allreduce.state import Agreed
from allreduce.whole import GroupUpdater
from ps_core import codec
from ps_core.buckets import Bucket
from ps_core.errors import DataLossError, JobFailedError, MismatchError
from ps_core.exchange import StateByParameter
from ps_core.extras import Extras
from ps_core.job import Job, check_plan, first_difference
from ps_core.settings import Config
from ps_core.v1 import shard_pb2

_GUEST_SECONDS = 0.25
"""Between two looks for somebody who waits to be let in."""
_HOLD_SHARE = 0.75
"""Of `worker.grace_seconds`; in the rest the values are handed over."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    """What one worker holds besides what is agreed on."""

    updater: GroupUpdater
    buckets: Sequence[Bucket]
    extras: Extras


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a worker says when the group has formed."""

    is_new: bool
    """It has taken part in nothing yet."""
    round: int
    """How many it has completed."""
    has_sums: bool
    """It has what the next one's update needs, and can make it by itself."""

    def encode(self) -> list[float]:
        numbers = [4, self.is_new, self.round, self.has_sums]
        return list(map(float, numbers))

    @classmethod
    def decode(cls, row: Sequence[float]) -> _Answer:
        return cls(bool(row[1]), int(row[2]), bool(row[3]))

    def lacks_tensors(self, newest: _Answer) -> bool:
        """It has to be handed parameters and state."""
        return self.is_new or (self.round < newest.round and not self.has_sums)

    def is_behind(self, newest: _Answer) -> bool:
        """It has to be told what is agreed on."""
        return self.is_new or self.round < newest.round


Finish = Callable[[], None]
"""Makes the update of the round that a worker is in, of which all that it takes is there."""


class Crew:
    """This worker among the members."""

    def __init__(self, config: Config, device: torch.device, incarnation: int) -> None:
        """Connects to the rendezvous. Raises JobFailedError."""
        self._config = config
        self.rendezvous = Rendezvous(config, _device_name(device), incarnation)
        self._num_stages = config.pipeline.stages
        self.agreed = Agreed(Passes(config.cluster.rank // self._num_stages))
        self._group: Group | None = None
        self._is_new = True
        self._kept_state: StateByParameter | None = None
        self._looked_at = 0.0
        self._has_caught_up = False
        """Others had completed the round that this worker was in when the group broke."""
        self.has_received = False
        """When the group was formed last, this worker took over what others held."""
        self.written_state: StateByParameter | None = None
        """What this worker's script has loaded, until all take it over."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the members, ascending."""
        return self.rendezvous.ranks

    @property
    def is_elastic(self) -> bool:
        """The others go on without a worker that is lost."""
        return self._config.cluster.elastic

    @property
    def is_first(self) -> bool:
        """This worker has the lowest rank of all members, or is in the replica of that one."""
        return self._config.cluster.rank // self._num_stages == self.replicas[0]

    @property
    def is_guest(self) -> bool:
        """It has taken part in nothing, and the others have begun without it. Raises
        JobFailedError.
        """
        return self._is_new and self.rendezvous.came_late()

    def gather(self, record: Record) -> Gathering:
        """Tell all members, and hear from all. Does not block."""
        assert self._group is not None
        return self._group.gather(records.encode(record))

    @property
    def replicas(self) -> tuple[int, ...]:
        """Those of the members, ascending; without stages every member is one."""
        return tuple(sorted({rank // self._num_stages for rank in self.ranks}))

    def share_state(self, of: int) -> None:
        """Everybody takes over the optimizer's state of one replica. Raises PeerLostError."""
        assert self._group is not None
        updater, source = self._held.updater, self.replicas.index(of)
        own = self.written_state or {}
        updater.write_state(_by_parameter(share_tensors(self._group, source, _by_name(own))))
        self.written_state = None

    def share_extras(self) -> None:
        """All take over those of the lowest rank. Raises PeerLostError."""
        assert self._group is not None
        share_extras(self._group, 0, self._held.extras)

    def share_numbers(self, of: int, numbers: Sequence[float]) -> list[float]:
        """The numbers of one replica, as many as of all others. Raises PeerLostError."""
        assert self._group is not None
        row = torch.tensor(numbers, dtype=torch.float64)
        self._group.broadcast(row, self.replicas.index(of)).wait()
        shared: list[float] = row.tolist()
        return shared

    def vote(self) -> None:
        """Wait until all have what their update needs. The stages of a model update in groups of
        their own: nobody may before all can, or some would have an update that others lack. Raises
        PeerLostError.
        """
        assert self._group is not None
        self._group.gather([1.0]).wait()

    # -- Forming -----------------------------------------------------------------------------------

    def check_job(self, own: Job) -> None:
        """Raises MismatchError when this worker does not train what the first one to come does."""
        told = self.rendezvous.agree("job", codec.encode_job(own).SerializeToString())
        theirs = codec.parse(shard_pb2.JobSpec, told)
        if difference := first_difference(own, codec.decode_job(theirs)):
            raise MismatchError(
                f"worker {self._config.cluster.rank} and the worker that came first do not train "
                f"the same: {difference}"
            )
        check_plan(own, theirs.fingerprint)

    def enter(self, held: Held) -> None:
        """Become a member, and take over what the others hold. Raises what Rendezvous.meet does."""
        self._held = held
        self._form((), None)

    def keep_state(self) -> None:
        """The members will change: everybody keeps the whole state of a sharded optimizer."""
        if self._config.allreduce.shard_optimizer:
            with contextlib.suppress(PeerLostError):  # `form_again` will say what that means
                self._kept_state = self._held.updater.gather_state()

    def form_again(self, finish: Finish | None, leavers: Sequence[int] = ()) -> bool:
        """The members have changed. True: others have completed the round that this worker was in,
        and it has made the update by itself, with `finish`, or taken over what it led to.
        """
        if not self.is_elastic:
            raise JobFailedError("a worker is gone: start the job again with all of them")
        if self._config.allreduce.shard_optimizer and self._kept_state is None:
            raise DataLossError(
                "a worker is gone, and with it its share of the optimizer's state "
                "(--shard-optimizer): start the job again, from a checkpoint if the script "
                "writes any"
            )
        return self._form(leavers, finish)

    def _form(self, leavers: Sequence[int], finish: Finish | None) -> bool:
        self._has_caught_up = False
        while True:
            self.drop()
            self.rendezvous.meet(leavers)
            try:
                self._group = self._connect()
                self._settle_in(self._group, finish)
                return self._has_caught_up
            except PeerLostError:
                leavers = ()

    def _connect(self) -> Group:
        config, meeting = self._config, self.rendezvous
        devices = [each.device for each in meeting.members]
        own_devices = all(name.startswith("cuda") for name in devices)
        may_use_nccl = own_devices and len(set(devices)) == len(devices)
        backend = config.allreduce.backend
        return Group(
            Wiring(
                meeting.group_store(),
                self.ranks.index(config.cluster.rank),
                len(self.ranks),
                self._num_stages,
                meeting.own_host,
                uses_nccl=may_use_nccl if backend == "auto" else backend == "nccl",
                timeout_seconds=config.allreduce.timeout_seconds,
            )
        )

    def _settle_in(self, group: Group, finish: Finish | None) -> None:
        """May break off at every exchange with others, and begin anew in another group."""
        own = _Answer(self._is_new, self.agreed.round, has_sums=finish is not None)
        answers = [_Answer.decode(row) for row in group.gather(own.encode()).wait()]
        leader = max(
            range(len(answers)), key=lambda i: (not answers[i].is_new, answers[i].round, -i)
        )
        newest, agreed = answers[leader], b""
        if any(each.is_behind(newest) for each in answers):
            agreed = share_bytes_everywhere(group, leader, state.encode(self.agreed))
        if own.is_behind(newest) and not own.lacks_tensors(newest) and finish is not None:
            self._catch_up(agreed)
            finish()
        self._hand_over_tensors(group, [answers[i] for i in group.sharing], newest)
        if own.lacks_tensors(newest):
            self._catch_up(agreed)
        self.agreed.passes.set_members(self.replicas)
        self._is_new = False

    def _catch_up(self, agreed: bytes) -> None:
        """This worker's tensors are those of the newest round, or will be before it hears from
        others again.
        """
        self._has_caught_up = not self._is_new
        state.adopt(self.agreed, agreed)

    def _hand_over_tensors(self, group: Group, answers: Sequence[_Answer], newest: _Answer) -> None:
        """From one of those that share them and have the newest, if anybody has others."""
        is_kept = self._kept_state is not None
        source = min(range(group.size), key=lambda i: (answers[i].lacks_tensors(newest), i))
        lacks = [i != source and each.lacks_tensors(newest) for i, each in enumerate(answers)]
        kept = self._kept_state or {}
        is_sharded = self._config.allreduce.shard_optimizer
        if source == group.index and any(lacks) and not (newest.is_new or is_sharded):
            kept = self._held.updater.gather_state()
        self._held.updater.connect(group)
        self.has_received = lacks[group.index]
        if any(lacks) or is_kept:
            self._share_tensors(group, source, kept)
        self._kept_state = None

    def _share_tensors(self, group: Group, source: int, kept: StateByParameter) -> None:
        held = self._held
        for bucket in held.buckets:
            bucket.host_parameters.copy_(bucket.parameters)
            group.broadcast(bucket.host_parameters, source).wait()
            bucket.upload()
        shared = share_tensors(group, source, _by_name(kept))
        if shared and (self.has_received or self._kept_state is not None):
            held.updater.write_state(_by_parameter(shared))
        takes = self.has_received
        share_extras(group, source, held.extras, takes=takes, joins=self._is_new)

    # -- Around it ---------------------------------------------------------------------------------

    def sees_guest(self) -> bool:
        """Whether somebody waits to be let in; only the first member looks, now and then."""
        now = time.monotonic()
        if not (self.is_elastic and self.is_first):
            return False
        if now - self._looked_at < _GUEST_SECONDS:
            return False
        self._looked_at = now
        return self.rendezvous.has_guest()

    def await_guest(self) -> bool:
        """Wait for a worker that takes over what this one holds, which no member does any more,
        for most of the time that it has left. False: none has come.
        """
        if self.rendezvous.failure():
            return False
        seconds = _HOLD_SHARE * self._config.worker.grace_seconds
        log.warning("all workers were told to end: waiting %g s for one to take over", seconds)
        deadline = time.monotonic() + seconds
        while not self.rendezvous.has_guest():
            if self.rendezvous.failure():
                return False
            if time.monotonic() > deadline:
                log.warning("no worker has come: the job's parameters go with this one")
                return False
            time.sleep(_GUEST_SECONDS)
        return True

    def drop(self) -> None:
        """Leave the group, which the others notice at once. Idempotent."""
        if self._group is not None:
            self._group.close()
            self._group = None


def _by_name(by_parameter: StateByParameter) -> dict[str, torch.Tensor]:
    return {
        f"{index}/{key}": tensor
        for index, entries in by_parameter.items()
        for key, tensor in entries.items()
    }


def _by_parameter(by_name: Mapping[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    by_parameter: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in by_name.items():
        index, _, key = name.partition("/")
        by_parameter.setdefault(int(index), {})[key] = tensor
    return by_parameter


def _device_name(device: torch.device) -> str:
    """The same for two workers that share a device."""
    if device.type != "cuda":
        return device.type
    return f"cuda {torch.cuda.get_device_properties(device).uuid}"
