"""Plays the text scenarios: commands go into a pure state machine, effects come out.

A line without indentation is a command: its name, words, and `key=value` pairs. The indented lines
below it are everything the machine answered; none: it answered nothing. `#` starts a comment. The
first command makes the machine: `shard …` or `lead …`.

After a rule has changed on purpose, `python -m tests.ps_server.scenario` writes the answers of
today into all files: read the difference before you commit it.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

import torch

from ps_core.errors import ShardlineError
from ps_core.exchange import Purpose
from ps_core.job import Job
from ps_core.optim_spec import Hyperparameters, HyperparameterValue, OptimizerSpec
from ps_core.plan import ParameterSpec
from ps_server import lead, shard

FOLDER = Path(__file__).parent / "scenarios"
PART_BYTES = 512
PART_ELEMENTS = PART_BYTES // 4


def play(text: str) -> str:
    """The scenario with the answers of today; equal to `text` when it holds."""
    return "\n".join(_transcript(text.splitlines())) + "\n"


def _transcript(lines: list[str]) -> Iterator[str]:
    player: ShardPlayer | LeadPlayer | None = None
    for line in lines:
        if line.startswith(" "):
            continue
        yield line
        words = shlex.split(line, comments=True)
        if not words:
            continue
        arguments = Arguments(words[1:])
        if player is None:
            player = ShardPlayer(arguments) if words[0] == "shard" else LeadPlayer(arguments)
            continue
        try:
            answers = list(player.perform(words[0], arguments))
        except ShardlineError as error:
            answers = [f"error {type(error).__name__}: {error}"]
        yield from (f"  -> {answer}" for answer in answers)


class Arguments:
    """The words and `key=value` pairs of a command."""

    def __init__(self, words: list[str]) -> None:
        self.words = [word for word in words if "=" not in word]
        self._named = dict(word.split("=", 1) for word in words if "=" in word)

    def text(self, key: str, default: str = "") -> str:
        return self._named.get(key, default)

    def number(self, key: str, default: int | None = None) -> int:
        return int(self._named[key] if default is None else self._named.get(key, default))

    def real(self, key: str, default: float) -> float:
        return float(self._named.get(key, default))

    def reals(self, key: str) -> tuple[float, ...]:
        return tuple(float(item) for item in self._named.get(key, "").split(",") if item)

    def optional(self, key: str) -> float | None:
        return float(self._named[key]) if key in self._named else None


def ranks(workers: Iterator[int] | tuple[int, ...] | frozenset[int]) -> str:
    return " ".join(map(str, sorted(workers))) or "nobody"


class ShardPlayer:
    """A shard of `parts` parts of 128 float32 elements, each of `slices` parameters. SGD."""

    def __init__(self, given: Arguments) -> None:
        num_parts, self.num_slices = given.number("parts", 1), given.number("slices", 1)
        length = PART_ELEMENTS // self.num_slices
        self.groups: list[dict[str, HyperparameterValue]] = [{"lr": given.real("lr", 1.0)}]
        specs = [
            ParameterSpec(f"p{number}", torch.float32, (length,), 0)
            for number in range(num_parts * self.num_slices)
        ]
        job = Job(
            job_id="scenario",
            num_workers=given.number("workers", 2),
            num_shards=given.number("shards", 1),
            parameters=tuple(specs),
            part_bytes=PART_BYTES,
            bucket_bytes=2**20,
            optimizer=OptimizerSpec("SGD", tuple(self.groups), given.optional("max_grad_norm")),
            mode="sync",
            deterministic=False,
        )
        self.shard = shard.Shard(job, given.number("index", 0))

    def perform(self, command: str, given: Arguments) -> Iterator[str]:
        match command:
            case "load":
                for part in self.shard.parts if "all" in given.words else [given.number("part")]:
                    self.shard.load(part, self._elements(given.real("value", 0.0)))
            case "epoch":
                epoch, _, *members = given.words  # epoch 3 members 0 1
                effects = self.shard.set_membership(int(epoch), frozenset(map(int, members)))
                yield from map(self._show, effects)
            case "begin":
                yield from map(self._show, self._begin(given))
            case "push":
                yield from map(self._show, self._push(given))
            case "factor":
                step, factor = given.number("step"), given.real("factor", 1.0)
                yield from map(self._show, self.shard.apply_factor(step, factor))
            case "status":
                yield self._status()
            case "clock":
                yield f"{self.shard.clock(given.number('worker'))} steps"
            case _:
                raise AssertionError(f"unknown command {command}")

    @staticmethod
    def _elements(value: float) -> torch.Tensor:
        return torch.full((PART_ELEMENTS,), value)

    def _begin(self, given: Arguments) -> list[shard.Effect]:
        group: Hyperparameters = {"lr": given.real("lr", float(self.groups[0]["lr"]))}  # type: ignore[arg-type]  # lr is a number
        return self.shard.begin(
            given.number("worker"),
            given.number("step"),
            given.number("epoch"),
            given.number("samples"),
            (group,) * given.number("groups", 1),
        )

    def _push(self, given: Arguments) -> list[shard.Effect]:
        present = [flag == "1" for flag in given.text("present", "1" * self.num_slices)]
        flags = torch.tensor(present).repeat_interleave(PART_ELEMENTS // self.num_slices)
        return self.shard.push(
            given.number("worker"),
            given.number("step"),
            given.number("part"),
            present,
            self._elements(given.real("value", 0.0)) * flags,
        )

    def _value(self, part: int) -> str:
        """One number for each slice of the part."""
        slices = self.shard.parts[part].parameters.view(self.num_slices, -1)
        assert (slices == slices[:, :1]).all(), "all elements of a slice have been treated alike"
        return ",".join(f"{value:g}" for value in slices[:, 0].tolist())

    def _show(self, effect: shard.Effect) -> str:
        match effect:
            case shard.Release(part, version, workers):
                values = f"value={self._value(part)}"
                return f"release part={part} version={version} {values} to {ranks(workers)}"
            case shard.Squares(step, total):
                return f"squares step={step} total={total:g}"
            case shard.Duplicate(worker, step, part):
                return f"duplicate worker={worker} step={step} part={part}"
            case shard.HyperparametersDiffer(step, workers):
                return f"hyperparameters differ step={step} workers {ranks(workers)}"

    def _status(self) -> str:
        state = "ready" if self.shard.ready else "not ready"
        values = " ".join(self._value(part) for part in self.shard.parts) or "none"
        members = ranks(self.shard.members)
        return f"{state} version={self.shard.version} values {values} members {members}"


class LeadPlayer:
    """The lead of `workers` workers and of the `shards` that hold parts."""

    def __init__(self, given: Arguments) -> None:
        holders = frozenset(map(int, given.text("shards", "0").split(",")))
        self.lead = lead.Lead(
            given.number("workers", 2),
            holders,
            given.optional("max_grad_norm"),
            given.real("deadline", 60.0),
        )

    def perform(self, command: str, given: Arguments) -> Iterator[str]:
        match command:
            case "join":
                if self.lead.join(given.number("worker"), given.number("incarnation", 1)):
                    yield "its initial values count"
            case "state":
                yield self.lead.state(given.number("worker")) or "never joined"
            case "idle":
                yield from map(_show_lead, self.lead.idle(given.number("worker")))
            case "meet":
                yield from map(_show_lead, self._meet(given))
            case "leave":
                effects = self.lead.leave(given.number("worker"), given.text("failure"))
                yield from map(_show_lead, effects)
            case "lost":
                yield from map(_show_lead, self.lead.fail(given.words[0]))
            case "squares":
                shard_index, step = given.number("shard"), given.number("step")
                effects = self.lead.squares(shard_index, step, given.real("total", 0.0))
                yield from map(_show_lead, effects)
            case "tick":
                yield from map(_show_lead, self.lead.tick(given.real("now", 0.0)))
            case _:
                raise AssertionError(f"unknown command {command}")

    def _meet(self, given: Arguments) -> list[lead.Effect]:
        arrival = lead.Arrival(
            Purpose[given.text("purpose", "start").upper()],
            given.number("step"),
            given.reals("values"),
            given.real("weight", 1.0),
        )
        return self.lead.meet(given.number("worker"), arrival)


def _show_lead(effect: lead.Effect) -> str:
    match effect:
        case lead.Membership(epoch, members):
            return f"epoch {epoch} members {ranks(members)}"
        case lead.Factor(step, factor):
            return f"factor step={step} {factor:g}"
        case lead.Met(worker, step, epoch, means, chosen):
            values = " means=" + ",".join(f"{value:g}" for value in means) if means else ""
            return f"met worker={worker} step={step} epoch={epoch}{values}{' chosen' * chosen}"
        case lead.Complete():
            return "complete"
        case lead.Failed(reason):
            return f"failed: {reason}"


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.txt")):
        path.write_text(play(path.read_text()))
