"""An all-reduce job seen from outside, through its rendezvous."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]  # it exports them without a list
    PrefixStore,
    TCPStore,
)

from allreduce.rendezvous import Member
from allreduce.store import beat_key, store_prefix, wait_for_listener
from ps_core.config import split_address
from ps_core.errors import JobFailedError, JobOverError, MismatchError, ShardUnreachableError


@dataclass(frozen=True, slots=True)
class Seen:
    """A member of the newest generation."""

    member: Member
    version: int
    """Updates in its parameters, as of its last sign of life."""


class Visit:
    """A connection to the store of a job that `shardline run` has started."""

    def __init__(self, address: str, timeout_seconds: float) -> None:
        """Raises ShardUnreachableError."""
        host, port = split_address(address)
        self._address = address
        try:
            wait_for_listener(host, port, seconds=0)
            root = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_seconds))
        except (RuntimeError, OSError) as error:
            raise ShardUnreachableError(f"no rendezvous answers at {address}") from error
        self._store = PrefixStore(store_prefix(0), root)
        self._meetings = PrefixStore("workers", self._store)

    def settings(self) -> dict[str, str]:
        """The variables with which another worker can join, as they stand in the store. Raises
        MismatchError, JobOverError, JobFailedError.
        """
        if self._store.check(["failed"]):
            raise JobFailedError(f"the job has failed: {self._read('failed')}")
        if self._store.check(["over"]):
            raise JobOverError("the job is complete: there is nothing to join any more")
        if not self._store.check(["settings"]):
            raise MismatchError(f"{self._address} is no rendezvous that `shardline run` keeps")
        lines = self._read("settings").split("\n")
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def workers(self) -> tuple[int, list[Seen]]:
        """The newest generation of members; 0: there is none yet."""
        try:
            return self._newest()
        except ValueError as error:
            raise MismatchError(f"{self._address} is no rendezvous of this release") from error

    def _newest(self) -> tuple[int, list[Seen]]:
        generation = 0
        while self._meetings.check([f"sealed/{generation + 1}"]):
            generation += 1
        if not generation:
            return 0, []
        lines = self._meetings.get(f"sealed/{generation}").decode().splitlines()
        return generation, [self._see(Member.parse(line)) for line in lines]

    def _see(self, member: Member) -> Seen:
        key = beat_key(member.token)
        beat = self._read(key) if self._store.check([key]) else "0 0"
        _, version = beat.split(" ")
        return Seen(member, int(version))

    def _read(self, key: str) -> str:
        return self._store.get(key).decode(errors="replace")

    def reserve(self, first: int, count: int) -> int:
        """A rank from `first` to `first + count` - 1 that nobody has. Raises MismatchError."""
        taken = {seen.member.rank for seen in self.workers()[1]}
        for rank in range(first, first + count):
            if rank not in taken and self._store.add(f"reserved/{rank}", 1) == 1:
                return rank
        raise MismatchError(
            f"the job starts with {first} workers and has all the others that it may have: give "
            f"`shardline run` more room, such as --workers {first}:{first + count + 2}"
        )
