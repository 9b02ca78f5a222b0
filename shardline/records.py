"""What workers tell while they train: `metrics.jsonl`, one JSON object per line.

All workers append to the same file, each a whole line with one write, so lines never mix. JSON has
no NaN and no infinity: such numbers are written as the words of protobuf's JSON mapping.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Final, Self, TypeAlias

Scalar = bool | int | float | str
Kept: TypeAlias = "Scalar | Sequence[Kept] | Mapping[str, Kept] | None"
"""What a script may report as a result."""

_WORDS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def jsonable(value: object) -> object:
    """`value` with every number that JSON cannot hold replaced by its word."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _number(value: object) -> float:
    number = _WORDS.get(value, value) if isinstance(value, str) else value
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise ValueError(f"{value!r} is not a number")
    return float(number)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _kept(value: object) -> Kept:
    if isinstance(value, list):
        return [_kept(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _kept(item) for key, item in value.items()}
    if value is not None and not isinstance(value, Scalar):
        raise ValueError(f"{value!r} is not what JSON holds")
    return _WORDS.get(value, value) if isinstance(value, str) else value


def _mapping(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: {str(key): read(item) for key, item in value.items()}


_READERS: Final[dict[Any, Callable[[Any], Any]]] = {
    int: _whole,
    float: _number,
    str: _text,
    Mapping[str, float]: _mapping(_number),
    Mapping[str, Kept]: _mapping(_kept),
}


class _Line:
    """The JSON form that all records share: `kind`, then the fields in order."""

    __slots__ = ()
    KIND: ClassVar[str]

    def to_json(self) -> dict[str, object]:
        """The record as a JSON object."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]  # a dataclass below
        return {"kind": self.KIND} | {name: jsonable(value) for name, value in values.items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The record in `document`; ValueError when a field is missing or has another type."""
        try:
            return cls(
                **{item.name: _READERS[item.type](document[item.name]) for item in fields(cls)}  # type: ignore[arg-type]  # a dataclass below
            )
        except (KeyError, AttributeError) as exc:
            raise ValueError(f"not a {cls.KIND} record: {exc!r}") from exc

    def line(self) -> str:
        """The record as one line of the file, with the newline at its end."""
        return json.dumps(self.to_json(), separators=(",", ":"), allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True)
class JoinRecord(_Line):
    """A worker has joined the job: `session.optimizer` has returned."""

    KIND: ClassVar[str] = "join"

    time: float  # seconds since 1970
    rank: int
    incarnation: str  # of the worker's process: one that is started again has another


@dataclass(frozen=True, slots=True)
class StepRecord(_Line):
    """Where a worker stands; samples and bytes are totals since its process started."""

    KIND: ClassVar[str] = "step"

    time: float  # seconds since 1970
    rank: int
    incarnation: str  # of the worker's process: one that is started again has another
    epoch: int
    step: int
    samples: int
    pushed_bytes: int
    pulled_bytes: int
    version: int
    values: Mapping[str, float] = field(default_factory=dict)
    """What the script logged since the record before, by name."""


@dataclass(frozen=True, slots=True)
class EndRecord(_Line):
    """A worker's last record, written once when it ends well; totals as in StepRecord."""

    KIND: ClassVar[str] = "end"

    time: float  # seconds since 1970
    rank: int
    incarnation: str  # of the worker's process: one that is started again has another
    steps: int
    samples: int
    seconds: float  # since the worker began
    pushed_bytes: int
    pulled_bytes: int
    version: int
    reported: Mapping[str, Kept] = field(default_factory=dict)
    """What the script reported as its results, by name."""


Record = JoinRecord | StepRecord | EndRecord

_KINDS: Final[dict[str, type[JoinRecord] | type[StepRecord] | type[EndRecord]]] = {
    kind.KIND: kind for kind in (JoinRecord, StepRecord, EndRecord)
}


def parse(line: str | bytes) -> Record:
    """The record on one line; ValueError when it is not one."""
    document = json.loads(line)
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError("not a record of a known kind")
    return _KINDS[kind].from_json(document)


class Tail:
    """Reads a file of records that others still append to, from its start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_skipped = 0  # whole lines that were not records
        self._offset = 0

    def read(self) -> list[Record]:
        """The records on the lines completed since the last call.

        A line without its newline waits for a later call. A line that is not a record is skipped;
        a file that does not exist has no lines.
        """
        *lines, _unfinished = self._new_bytes().split(b"\n")
        self._offset += sum(len(line) + 1 for line in lines)
        return [record for line in lines if (record := self._parse(line)) is not None]

    def _new_bytes(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                return file.read()
        except FileNotFoundError:
            return b""

    def _parse(self, line: bytes) -> Record | None:
        try:
            return parse(line)
        except ValueError:
            self.num_skipped += 1
            return None
