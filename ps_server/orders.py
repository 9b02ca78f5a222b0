"""What the lead tells shards and workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ps_core.exchange import Grant, Position
from ps_server.terms import Member


@dataclass(frozen=True, slots=True)
class Membership:
    """To every shard: who is a member from now on, and which processes are fenced."""

    epoch: int
    members: Mapping[int, Member]
    evicted: Mapping[int, int] = field(default_factory=dict)
    """Rank → incarnation."""
    reason: str = ""
    """What it is told."""


@dataclass(frozen=True, slots=True)
class Factor:
    """To every shard: the clip factor of a step."""

    step: int
    factor: float


@dataclass(frozen=True, slots=True)
class Seal:
    """To every shard: whose gradients a step is made of."""

    step: int
    contributors: frozenset[int]


@dataclass(frozen=True, slots=True)
class Met:
    """To one worker: its meeting is over, or it may go on before that."""

    worker: int
    step: int
    epoch: int
    means: tuple[float, ...] = ()
    chosen: bool = False
    refreshed: bool = False
    """Every shard sends it every part."""
    grant: Grant | None = None
    position: Position | None = None
    is_past: bool = False
    """The others met here before it joined."""
    handed_over: bool = False
    """A worker that was there has handed over buffers: all take them over."""


@dataclass(frozen=True, slots=True)
class Readmitted:
    """To one worker: its gradients came too late, it goes on with `next_step`."""

    worker: int
    next_step: int


@dataclass(frozen=True, slots=True)
class Complete:
    """To every shard: all workers have finished."""


@dataclass(frozen=True, slots=True)
class Failed:
    """To every shard: the job cannot go on."""

    reason: str


Effect = Membership | Factor | Seal | Met | Readmitted | Complete | Failed
