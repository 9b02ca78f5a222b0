"""Plays the text scenarios: commands go into a pure state machine, effects come out.

A line without indentation is a command: its name, words, and `key=value` pairs. The indented lines
below it are everything the machine answered; none: it answered nothing. `#` starts a comment. The
first command makes the machine: `shard …` or `lead …`, with `mode=`, `bound=`, `backup_workers=`
and so on as in the configuration.

A member is written RANK#INCARNATION@STEP+ : `2#7@5+` is process 7 of rank 2, which updates wait for
from step 5 on and which must be sent every part, since it enters. Left out: incarnation 1, step 0,
no entering. `epoch 3 members 0 2@5+ evicted 1` is a whole membership. `used=1/2` of a shard's word
about a fenced process: 1 of its 2 parts. `start` joins all workers of a lead and starts the job;
its answers are not shown.

After a rule has changed on purpose, `python -m tests.ps_server.scenario` writes the answers of
today into all files: read the difference before you commit it.
"""

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ps_core import entries
from ps_core.errors import ShardlineError
from ps_core.exchange import Arrival, Grant, Position, Purpose
from ps_core.job import Job
from ps_core.leases import Lease, PassEnd, PassOpened, PassSpec
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import ParameterSpec
from ps_core.point import Point
from ps_core.settings import ConsistencyConfig
from ps_server import effects, orders
from ps_server.lead import Lead
from ps_server.policy import consistency_of
from ps_server.shard import Shard
from ps_server.terms import Begin, Member, Terms

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
        # Not shlex's comments: a member is written with a #.
        words = shlex.split(re.sub(r"(^|\s)#.*", "", line))
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

    def numbers(self, key: str) -> tuple[int, ...]:
        return tuple(int(item) for item in self._named.get(key, "").split(",") if item)

    def real(self, key: str, default: float) -> float:
        return float(self._named.get(key, default))

    def reals(self, key: str) -> tuple[float, ...]:
        return tuple(float(item) for item in self._named.get(key, "").split(",") if item)

    def optional(self, key: str) -> float | None:
        return float(self._named[key]) if key in self._named else None

    def consistency(self) -> ConsistencyConfig:
        defaults = ConsistencyConfig()
        known = {item.name: type(getattr(defaults, item.name)) for item in fields(defaults)}
        given: dict[str, Any] = {
            key: value == "true" if known[key] is bool else known[key](value)
            for key, value in self._named.items()
            if key in known
        }
        return ConsistencyConfig(**given)

    def section(self, name: str) -> list[str]:
        """The words after `name` up to the next section."""
        if name not in self.words:
            return []
        rest = self.words[self.words.index(name) + 1 :]
        stop = next((i for i, word in enumerate(rest) if word in ("members", "evicted")), None)
        return rest[:stop]

    def members(self) -> dict[int, Member]:
        return dict(map(read_member, self.section("members")))

    def evicted(self) -> dict[int, int]:
        return {rank: m.incarnation for rank, m in map(read_member, self.section("evicted"))}


def read_member(text: str) -> tuple[int, Member]:
    match = re.fullmatch(r"(\d+)(?:#(\d+))?(?:@(\d+))?(\+?)", text)
    assert match, f"{text} is no member"
    rank, incarnation, first_step, enters = match.groups()
    return int(rank), Member(int(incarnation or 1), int(first_step or 0), enters == "+")


def show_member(rank: int, member: Member) -> str:
    incarnation = f"#{member.incarnation}" if member.incarnation != 1 else ""
    first_step = f"@{member.first_step}" if member.first_step else ""
    return f"{rank}{incarnation}{first_step}{'+' * member.enters}"


def ranks(workers: Collection[int]) -> str:
    return " ".join(map(str, sorted(workers))) or "nobody"


def listed(key: str, numbers: Iterable[object]) -> str:
    text = ",".join(map(str, numbers))
    return f" {key}={text}" if text else ""


class ShardPlayer:
    """A shard of `parts` parts of 128 float32 elements, each of `slices` parameters. SGD."""

    def __init__(self, given: Arguments) -> None:
        num_parts, self.num_slices = given.number("parts", 1), given.number("slices", 1)
        length = PART_ELEMENTS // self.num_slices
        self.group: Hyperparameters = {
            "lr": given.real("lr", 1.0),
            "momentum": given.real("momentum", 0.0),
            "weight_decay": given.real("weight_decay", 0.0),
        }
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
            optimizer=OptimizerSpec("SGD", (self.group,), given.optional("max_grad_norm")),
            consistency=given.consistency(),
        )
        self.shard = Shard(job, given.number("index", 0))

    def perform(self, command: str, given: Arguments) -> Iterator[str]:
        match command:
            case "load":
                for part in self.shard.parts if "all" in given.words else [given.number("part")]:
                    self.shard.load(part, self._elements(given.real("value", 0.0)))
            case "status":
                yield self._status()
            case "clock":
                yield f"{self.shard.clock(given.number('worker'))} steps"
            case _:
                yield from map(self._show, self._call(command, given))

    def _call(self, command: str, given: Arguments) -> list[effects.Effect]:
        match command:
            case "epoch":
                epoch, members, evicted = int(given.words[0]), given.members(), given.evicted()
                return self.shard.set_membership(epoch, members, evicted)
            case "begin":
                return self._begin(given)
            case "push":
                return self._push(given)
            case "reopened":
                self.shard.reopened(given.number("worker"))
                return []
            case "fetch":
                return self.shard.fetch(given.number("worker"), given.numbers("parts"))
            case "factor":
                return self.shard.apply_factor(given.number("step"), given.real("factor", 1.0))
            case "seal":
                contributors = frozenset(given.numbers("workers"))
                return self.shard.seal(given.number("step"), contributors)
        raise AssertionError(f"unknown command {command}")

    @staticmethod
    def _elements(value: float) -> torch.Tensor:
        return torch.full((PART_ELEMENTS,), value)

    def _begin(self, given: Arguments) -> list[effects.Effect]:
        lr = given.optional("lr")
        group: Hyperparameters = self.group if lr is None else {**self.group, "lr": lr}
        begin = Begin(
            given.number("step"),
            given.number("epoch", 1),
            given.number("samples", 1),
            (group,) * given.number("groups", 1),
            given.numbers("leases"),
            1.0 if given.number("unweighed", 0) else None,
        )
        return self.shard.begin(given.number("worker"), begin)

    def _push(self, given: Arguments) -> list[effects.Effect]:
        present = [flag == "1" for flag in given.text("present", "1" * self.num_slices)]
        flags = torch.tensor(present).repeat_interleave(PART_ELEMENTS // self.num_slices)
        return self.shard.push(
            given.number("worker"),
            given.number("step"),
            given.number("part", 0),
            present,
            self._elements(given.real("value", 0.0)) * flags,
        )

    def _value(self, part: int) -> str:
        """One number for each slice of the part."""
        slices = self.shard.parts[part].parameters.view(self.num_slices, -1)
        assert (slices == slices[:, :1]).all(), "all elements of a slice have been treated alike"
        return ",".join(f"{value:g}" for value in slices[:, 0].tolist())

    def _show(self, effect: effects.Effect) -> str:
        match effect:
            case effects.Release(part, version, workers, clock):
                values = f"value={self._value(part)}" + f" clock={clock}" * bool(clock)
                return f"release part={part} version={version} {values} to {ranks(workers)}"
            case effects.Squares(step, total):
                return f"squares step={step} total={total:g}"
            case effects.Arrived(worker, step, version):
                return f"arrived worker={worker} step={step} version={version}"
            case effects.Stale(versions):
                return f"stale versions={versions}"
            case effects.Duplicate(worker, step, part):
                return f"duplicate worker={worker} step={step} part={part}"
            case effects.Late(worker, step):
                return f"late worker={worker} step={step}"
            case effects.Refused(parts):
                return f"refused parts={parts}"
            case effects.HyperparametersDiffer(step, workers) | effects.BatchesDiffer(
                step, workers
            ):
                what = "batches" if isinstance(effect, effects.BatchesDiffer) else "hyperparameters"
                return f"{what} differ step={step} workers {ranks(workers)}"
            case effects.Remains() | effects.Lost():
                return _show_report(effect)

    def _status(self) -> str:
        state = "ready" if self.shard.ready else "not ready"
        values = " ".join(self._value(part) for part in self.shard.parts) or "none"
        members = ranks(self.shard.members)
        return f"{state} version={self.shard.version} values {values} members {members}"


def _show_report(remains: effects.Remains | effects.Lost) -> str:
    process = show_member(remains.worker, Member(remains.incarnation, 0))
    if isinstance(remains, effects.Lost):
        return f"lost {process} because {remains.reason}"
    step = f"step={remains.step} samples={remains.samples}{listed('leases', remains.leases)}"
    return f"remains of {process} {step} used={remains.used_parts}/{remains.num_parts}"


class LeadPlayer:
    """The lead of `workers` workers and of the `shards` that hold parts."""

    def __init__(self, given: Arguments) -> None:
        self.num_workers = given.number("workers", 2)
        terms = Terms(
            self.num_workers,
            given.real("deadline", 60.0),
            given.number("min_workers", 1),
            given.real("pause", 120.0),
            given.real("step_deadline", 0.0),
        )
        holders = frozenset(given.numbers("shards") or (0,))
        policy = consistency_of(given.consistency())
        self.lead = Lead(terms, policy, holders, given.optional("max_grad_norm"))

    def perform(self, command: str, given: Arguments) -> Iterator[str]:
        match command:
            case "start":
                self._start()
            case "join":
                if self.lead.join(given.number("worker"), given.number("incarnation", 1)):
                    yield "its initial values count"
            case "state":
                known = self.lead.crew.get(given.number("worker"))
                yield known.state.value if known else "never joined"
            case "status":
                yield self._status()
            case "samples":
                totals = self.lead.ledger.book.totals()
                counts = {item.name: getattr(totals, item.name) for item in fields(totals)}
                yield " ".join(f"{name}={count}" for name, count in counts.items() if count)
            case "ledger":
                yield from map(_show_entry, self.lead.ledger.take_entries())
            case "request":
                yield _show_grant(self._request(given))
            case _:
                yield from map(_show_order, self._call(command, given))

    def _call(self, command: str, given: Arguments) -> list[orders.Effect]:
        match command:
            case "squares":
                total = given.real("total", 0.0)
                return self.lead.squares(given.number("shard"), given.number("step"), total)
            case "remains":
                return self.lead.remains(given.number("shard"), _read_remains(given))
            case "ready":
                shard, step = given.number("shard"), given.number("step")
                return self.lead.ready(shard, given.number("worker"), step)
            case "turn":
                return self.lead.take_turn(given.number("version"))
            case "tick":
                return self.lead.tick(given.real("now", 0.0))
            case "fail":
                return self.lead.fail(given.words[0])
        return self._worker_call(command, given.number("worker"), given)

    def _worker_call(self, command: str, worker: int, given: Arguments) -> list[orders.Effect]:
        match command:
            case "idle":
                return self.lead.idle(worker)
            case "meet":
                return self.lead.meet(worker, _read_arrival(given))
            case "leave":
                preempted = "preempted" in given.words
                return self.lead.leave(worker, "preempted" if preempted else "finished")
            case "evict":
                reason, incarnation = given.words[0], given.number("incarnation", 1)
                return self.lead.evict(worker, incarnation, "stream", reason)
            case "begin":
                return self._begin(worker, given)
            case "arrived":
                step = given.number("step")
                return self.lead.arrived(worker, step, given.number("version", step + 1))
            case "late":
                return self.lead.late(worker)
            case "give_back":
                declined = "declined" in given.words
                return self.lead.give_back(worker, given.numbers("leases"), declined=declined)
        raise AssertionError(f"unknown command {command}")

    def _start(self) -> None:
        for worker in range(self.num_workers):
            self.lead.join(worker, 1)
            self.lead.meet(worker, Arrival(Purpose.START, 0))
        assert self.lead.started

    def _begin(self, worker: int, given: Arguments) -> list[orders.Effect]:
        step, leases = given.number("step"), given.numbers("leases")
        begin = Begin(step, self.lead.epoch, given.number("samples", 1), (), leases)
        point = _read_point(given)
        position = Position(point, given.numbers("schedules"), step, point)
        return self.lead.begin(worker, begin, position)

    def _request(self, given: Arguments) -> Grant:
        spec = PassSpec(
            given.number("samples"),
            given.number("batch", 1),
            given.number("global_batch", 0),
            point=_read_point(given),
        )
        return self.lead.request(given.number("worker"), given.number("loader", 0), spec, {})

    def _status(self) -> str:
        words = [f"turn={self.lead.turn}", f"epoch={self.lead.epoch}"]
        words += ["paused"] * self.lead.is_paused + ["ended"] * self.lead.ended
        return f"{' '.join(words)} members {ranks(self.lead.members)}"


def _read_arrival(given: Arguments) -> Arrival:
    return Arrival(
        Purpose[given.text("purpose", "start").upper()],
        given.number("step", 0),
        given.reals("values"),
        given.real("weight", 1.0),
        "takes_leases" in given.words,
        _read_point(given),
        "hands_over" in given.words,
    )


def _read_point(given: Arguments) -> Point:
    return Point(given.number("loop", 0), given.number("data_epoch", 0), given.number("count", 0))


def _read_remains(given: Arguments) -> effects.Remains:
    used, num_parts = map(int, given.text("used").split("/"))
    worker, incarnation = given.number("worker"), given.number("incarnation", 1)
    step, samples = given.number("step", 0), given.number("samples", 0)
    leases = given.numbers("leases")
    return effects.Remains(worker, incarnation, step, samples, leases, used, num_parts)


def _show_order(order: orders.Effect) -> str:
    match order:
        case orders.Membership(epoch, members, evicted, reason):
            present = " ".join(show_member(*item) for item in sorted(members.items()))
            return f"epoch {epoch} members {present or 'nobody'}{_show_evicted(evicted, reason)}"
        case orders.Factor(step, factor):
            return f"factor step={step} {factor:g}"
        case orders.Seal(step, contributors):
            return f"seal step={step} workers {ranks(contributors)}"
        case orders.Met():
            return _show_met(order)
        case orders.Readmitted(worker, next_step):
            return f"refused worker={worker}: it goes on with step {next_step}"
        case orders.Complete():
            return "complete"
        case orders.Failed(reason):
            return f"failed: {reason}"


def _show_evicted(evicted: Mapping[int, int], reason: str) -> str:
    who = [show_member(rank, Member(number, 0)) for rank, number in sorted(evicted.items())]
    return f" evicted {' '.join(who)} ({reason})" if who else ""


def _show_met(met: orders.Met) -> str:
    words = [f"met worker={met.worker} step={met.step} epoch={met.epoch}"]
    words[0] += listed("means", (f"{value:g}" for value in met.means))
    words += ["chosen"] * met.chosen + ["refreshed"] * met.refreshed
    words += ["past"] * met.is_past + ["handed_over"] * met.handed_over
    if met.grant is not None:
        words.append(_show_grant(met.grant))
    if met.position is not None:
        words.append(f"data_epoch={met.position.point.data_epoch}")
        words[-1] += listed("schedules", met.position.schedules)
    return " ".join(words)


def _show_grant(grant: Grant) -> str:
    leases = " ".join(f"lease {lease.id}: {_positions(lease)}" for lease in grant.leases)
    return leases or ("the pass is over" if grant.is_over else "no lease")


def _positions(lease: Lease) -> str:
    return f"{lease.start}..{lease.start + lease.length}"


def _show_entry(entry: entries.Entry) -> str:
    match entry:
        case entries.Contribution():
            what = f"version={entry.version} samples={entry.samples}"
            what += listed("leases", (lease.id for lease in entry.leases))
            process = show_member(entry.worker, Member(entry.incarnation, 0))
            return f"{entry.state} {process} step={entry.step} {what}"
        case entries.WorkerEvent(worker, incarnation, event, step, reason):
            process = show_member(worker, Member(incarnation, 0))
            return f"{event} {process} step={step}{f' ({reason})' * bool(reason)}"
        case PassOpened(loader, number, num_samples, dropped):
            return f"pass {number} of loader {loader}: {num_samples} samples, {dropped} dropped"
        case PassEnd(loader, number, abandoned):
            lost = " ".join(f"{start}..{stop}" for start, stop in abandoned) or "nothing"
            return f"end of pass {number} of loader {loader}: {lost} abandoned"


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.txt")):
        path.write_text(play(path.read_text()))
