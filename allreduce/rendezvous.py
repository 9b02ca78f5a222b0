"""How workers find each other: numbered generations of members, agreed on through a store.

Whoever wants to be in the next generation arrives at it. It is sealed, once, by the first worker
that finds it complete: everybody who is still alive of the generation before has arrived. Whoever
has arrived by then is a member. All that decides is pure and above; below it meets the store.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]  # it exports them without a list
    PrefixStore,
    Store,
    TCPStore,
)

from allreduce.group import own_address
from allreduce.store import beat_key, gone_key, store_prefix, wait_for_listener
from ps_core.config import split_address
from ps_core.errors import (
    DataLossError,
    EvictedError,
    JobFailedError,
    JobOverError,
    JoinTimeoutError,
    in_short,
)
from ps_core.heartbeat import Heartbeat
from ps_core.settings import Config

_POLL_SECONDS = (0.005, 0.1)
"""First and longest pause between two looks at the store."""
_FAREWELL_SECONDS = 5.0
"""How long a worker that has finished waits for the others to have seen that it has."""


@dataclass(frozen=True, slots=True)
class Member:
    """One worker's process."""

    rank: int
    pid: int
    token: str
    """Tells apart processes that have had the same rank and pid."""
    device: str
    """Name of the device that it computes on, the same for two workers that share one."""

    def __str__(self) -> str:
        return f"{self.rank} {self.pid} {self.token} {self.device}"

    @classmethod
    def parse(cls, text: str) -> Member:
        """The inverse of `str`."""
        rank, pid, token, device = text.split(" ", 3)
        return cls(int(rank), int(pid), token, device)


def newest(arrivals: Iterable[Member]) -> dict[int, Member]:
    """Rank → the process that came last under it."""
    return {member.rank: member for member in arrivals}


def missing(
    expected: Iterable[Member], arrived: dict[int, Member], gone: Iterable[str]
) -> list[Member]:
    """Who of the generation before is waited for: it has not come, nobody else has come under its
    rank, and it is not known to be gone.
    """
    lost = set(gone)
    return [each for each in expected if each.rank not in arrived and each.token not in lost]


def whole(members: Collection[Member], num_stages: int) -> list[Member]:
    """Those whose replica has all its stages: without stages, all."""
    ranks = {member.rank for member in members}
    return [
        member
        for member in members
        if all(rank in ranks for rank in replica_of(member.rank, num_stages))
    ]


def replica_of(rank: int, num_stages: int) -> range:
    """The ranks that hold a replica of the model together."""
    first = rank - rank % num_stages
    return range(first, first + num_stages)


class Rendezvous:
    """One worker's place in the generations of a job."""

    def __init__(
        self, config: Config, device: str, incarnation: int, replica: int | None = None
    ) -> None:
        """Connects to the store. Raises JobFailedError when it cannot be reached. With a `replica`
        its stages meet, all of them in every generation; otherwise all workers.
        """
        self._config = config
        cluster = config.cluster
        self.host, port = split_address(cluster.rendezvous)
        self.own_host = own_address(self.host, port)
        self.me = Member(cluster.rank, os.getpid(), f"{incarnation:016x}", device)
        with self._reaching():
            wait_for_listener(self.host, port, config.rpc.connect_timeout_seconds)
            self._root = TCPStore(
                self.host,
                port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=config.rpc.connect_timeout_seconds),
            )
            self._store = PrefixStore(store_prefix(cluster.attempt), self._root)
            scope = "workers" if replica is None else f"replica {replica}"
            self._meetings = PrefixStore(scope, self._store)
            self._pulse = PrefixStore(store_prefix(cluster.attempt), self._root.clone())  # type: ignore[attr-defined]  # its stubs lack it
        self._stages = config.pipeline.stages
        self._needs_all = replica is not None
        own = replica_of(cluster.rank, self._stages)
        self._ranks = own if self._needs_all else range(cluster.num_workers)
        self.generation = 0
        self.members: tuple[Member, ...] = ()
        self.version = 0
        """Updates in this worker's parameters, for whoever looks from outside."""
        self._num_beats = 0
        self._heartbeat = Heartbeat(config.membership.heartbeat_seconds, self._beat)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            raise JobFailedError(
                f"the rendezvous at {self._config.cluster.rendezvous} cannot be reached: "
                f"{in_short(error)}"
            ) from error

    def _beat(self) -> None:
        self._num_beats += 1
        try:
            self._pulse.set(beat_key(self.me.token), f"{self._num_beats} {self.version}")
        except RuntimeError:
            return  # the training thread will find that out, and say so

    # -- Generations -------------------------------------------------------------------------------

    def meet(self, leavers: Sequence[int] = ()) -> None:
        """Become a member of the next generation, with everybody of this one who is alive, except
        for the ranks in `leavers`, and with those who wait to be let in.

        Raises JoinTimeoutError, JobFailedError, JobOverError, DataLossError; EvictedError when the
        others have gone on without this worker.
        """
        with self._reaching():
            if self.generation == 0:
                self._skip_sealed()
            expected = [each for each in self.members if each.rank not in leavers]
            was_member = self.generation > 0 and bool(self.members) and self.me in self.members
            while True:
                self.generation += 1
                members = self._wait(expected)
                if self.me in members:
                    self.members = members
                    return
                if was_member:
                    raise EvictedError(
                        "the other workers have gone on without this one: it kept them waiting for "
                        "too long (allreduce.timeout_seconds), or another stage of its replica of "
                        "the model is gone"
                    )
                expected = list(members)

    def _skip_sealed(self) -> None:
        """Another process may have been a member before."""
        while self._meetings.check([f"sealed/{self.generation + 1}"]):
            self.generation += 1
        if self.generation:
            self.members = self._sealed(self.generation)

    def _wait(self, expected: Sequence[Member]) -> tuple[Member, ...]:
        """Arrive at `generation`, and wait until it is sealed."""
        self._arrive()
        watch = _Watch(self._store, expected, self._config)
        started, pause = time.monotonic(), _POLL_SECONDS[0]
        while not self._meetings.check([f"sealed/{self.generation}"]):
            self._check_end()
            waited = time.monotonic() - started
            arrived = newest(self._arrivals(self.generation))
            if self._needs_all or self.generation == 1:
                complete = self._is_first_complete(arrived, waited)
            else:
                complete = self._is_complete(watch, expected, arrived, waited)
            if complete:
                self._seal(whole(arrived.values(), self._stages))
            else:
                time.sleep(pause)
                pause = min(2 * pause, _POLL_SECONDS[1])
        return self._sealed(self.generation)

    def _is_first_complete(self, arrived: dict[int, Member], waited: float) -> bool:
        absent = [rank for rank in self._ranks if rank not in arrived]
        if absent and waited > self._config.membership.join_timeout_seconds:
            raise JoinTimeoutError(
                f"workers {', '.join(map(str, absent))} have not come within {waited:.0f} s "
                "(membership.join_timeout_seconds): look into their logs"
            )
        return not absent

    def _is_complete(
        self,
        watch: _Watch,
        expected: Sequence[Member],
        arrived: dict[int, Member],
        waited: float,
    ) -> bool:
        """Only those who were members seal: they have the values of the job."""
        is_late = self.me in expected and waited > self._config.allreduce.timeout_seconds
        gone = {each.token for each in expected} if is_late else watch.gone(waited)
        lost = [each for each in expected if each.token in gone and arrived.get(each.rank) != each]
        broken = {rank for each in lost for rank in replica_of(each.rank, self._stages)}
        if all(each.rank in broken for each in expected):
            raise DataLossError(
                "no worker is left that has the job's parameters, or no replica of the model with "
                "all its stages: start the job again, from a checkpoint if the script writes any. "
                "When all workers are told to end at once, another must come within "
                "worker.grace_seconds"
            )
        if self.me not in expected or missing(expected, arrived, gone):
            return False
        num_left = len(whole(arrived.values(), self._stages)) // self._stages
        need = self._config.membership.min_workers
        if num_left < need and waited > self._config.membership.pause_timeout_seconds:
            raise JobFailedError(
                f"{num_left} workers are left and {need} are needed (membership.min_workers)"
            )
        return num_left >= need

    def _arrive(self) -> None:
        number = self._meetings.add(f"arrivals/{self.generation}", 1)
        self._meetings.set(f"arrival/{self.generation}/{number}", str(self.me))

    def _arrivals(self, generation: int) -> Iterator[Member]:
        count = self._meetings.add(f"arrivals/{generation}", 0)
        for number in range(1, count + 1):
            key = f"arrival/{generation}/{number}"
            if self._meetings.check([key]):
                yield Member.parse(self._meetings.get(key).decode())

    def _seal(self, members: Iterable[Member]) -> None:
        """The first one counts."""
        text = "\n".join(map(str, sorted(members, key=lambda each: each.rank)))
        self._meetings.compare_set(f"sealed/{self.generation}", "", text)

    def _sealed(self, generation: int) -> tuple[Member, ...]:
        lines = self._meetings.get(f"sealed/{generation}").decode().splitlines()
        return tuple(map(Member.parse, lines))

    # -- Around them -------------------------------------------------------------------------------

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those of the members, ascending."""
        return tuple(each.rank for each in self.members)

    def group_store(self) -> Store:
        """For the process groups of this generation."""
        return PrefixStore(f"group/{self.generation}", self._meetings)

    def has_guest(self) -> bool:
        """Whether somebody waits to be let in, with all stages of its replica."""
        with self._reaching():
            if not self._meetings.add(f"arrivals/{self.generation + 1}", 0):
                return False
            return bool(whole(newest(self._arrivals(self.generation + 1)).values(), self._stages))

    def came_late(self) -> bool:
        """Whether the first generation was sealed without this process."""
        with self._reaching():
            return self._meetings.check(["sealed/1"]) and self.me not in self._sealed(1)

    def tell(self, key: str, value: bytes) -> None:
        """Say something that others wait for."""
        with self._reaching():
            self._store.set(key, value.hex())

    def knows(self, key: str) -> bool:
        """Whether somebody has said it already."""
        with self._reaching():
            return bool(self._store.check([key]))

    def hear(self, key: str, seconds: float) -> bytes:
        """What somebody tells. Raises JobFailedError when nobody does in time."""
        deadline = time.monotonic() + seconds
        with self._reaching():
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    raise JobFailedError(f"no worker has told the {key} within {seconds:g} s")
                time.sleep(_POLL_SECONDS[1])
            return bytes.fromhex(self._store.get(key).decode())

    def agree(self, key: str, value: bytes) -> bytes:
        """What the first worker of the job said for `key`."""
        with self._reaching():
            self._store.compare_set(key, "", value.hex())
            return bytes.fromhex(self._store.get(key).decode())

    def fail(self, reason: str) -> None:
        """The job has failed, for everybody."""
        with self._reaching():
            self._store.compare_set("failed", "", reason)

    def failure(self) -> str:
        """Why the job has failed; empty: it has not."""
        with self._reaching():
            return (
                self._store.get("failed").decode(errors="replace")
                if self._store.check(["failed"])
                else ""
            )

    def _check_end(self) -> None:
        if reason := self.failure():
            raise JobFailedError(f"the job has failed: {reason}")
        if self._store.check(["over"]):
            raise JobOverError("the job was complete before this worker could take part")

    def finish(self) -> None:
        """The job is complete. Waits for all to say so, since rank 0 may keep the store."""
        with self._reaching():
            self._store.set("over", "1")
            count = self._store.add("finished", 1)
            deadline = time.monotonic() + _FAREWELL_SECONDS
            while count < len(self.members) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS[0])
                count = self._store.add("finished", 0)

    def leave(self) -> None:
        """Nobody need wait for this worker."""
        with self._reaching():
            self._store.set(gone_key(self.me.rank, self.me.pid), "1")

    def close(self) -> None:
        """Stop the heartbeat; the connections go with this object. Idempotent."""
        self._heartbeat.close()


class _Watch:
    """Which of the expected members are gone: somebody has said so, or they beat no more."""

    def __init__(self, store: Store, expected: Sequence[Member], config: Config) -> None:
        self._store = store
        self._expected = expected
        self._silence_seconds = config.membership.heartbeat_floor_seconds
        self._beats: dict[str, tuple[bytes, float]] = {}

    def gone(self, waited: float) -> set[str]:
        """Their tokens, `waited` seconds after the first look."""
        return {each.token for each in self._expected if self._is_gone(each, waited)}

    def _is_gone(self, member: Member, waited: float) -> bool:
        return self._store.check([gone_key(member.rank, member.pid)]) or not self._beats_on(
            member, waited
        )

    def _beats_on(self, member: Member, waited: float) -> bool:
        key = beat_key(member.token)
        beat = self._store.get(key) if self._store.check([key]) else b""
        last, since = self._beats.setdefault(member.token, (beat, waited))
        if beat != last:
            self._beats[member.token] = beat, waited
            return True
        return waited - since < self._silence_seconds
