"""What benchmarks/stragglers.py compares, and how its numbers come about: pure."""

import random
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple, TypeAlias

from benchmarks.straggler_worker import Cell, Pause, Taken
from ps_core.settings import ConsistencyConfig

WARM_UP_SECONDS = 0.5
REACH = 0.8  # what the targets ask for
BETTER = 0.05  # a system that keeps this much more of its rate than sync does is said to help
Row: TypeAlias = dict[str, Any]


class System(NamedTuple):
    label: str
    consistency: ConsistencyConfig | None  # None: all-reduce
    each_alone: bool = False  # every gradient is an update of its own


class Setting(NamedTuple):
    """What all scenarios have in common."""

    num_workers: int
    width: int  # of the model's layers
    num_samples: int  # of a worker's step
    step_seconds: float
    long_step_seconds: float
    seconds: float  # that count, of a scenario without pauses
    lead_seconds: float  # until a bound is used up
    pause_window_seconds: float  # of a scenario with pauses
    pause_seconds: float
    seed: int


class Scenario(NamedTuple):
    name: str
    step_seconds: float
    seconds: float
    lead_seconds: float = 0.0
    slowness: float = 1.0  # of the last worker
    num_paused: int = 0  # workers, counted from the last one
    num_pauses: int = 0  # of each

    @property
    def is_calm(self) -> bool:
        return self.slowness == 1 and not self.num_paused


class Run(NamedTuple):
    """All scenarios of one system."""

    taken: Sequence[Sequence[Taken]]  # by worker and scenario
    updates: Sequence[Mapping[str, Any]] | None  # lines of updates.jsonl; None: all were used


def systems(num_local_steps: int) -> dict[str, System]:
    local = ConsistencyConfig(mode="local", local_steps=num_local_steps)
    return {
        "sync": System("sync", ConsistencyConfig()),
        "backup1": System("sync + 1 backup", ConsistencyConfig(backup_workers=1)),
        "bounded1": System("bounded (1)", ConsistencyConfig(mode="bounded", bound=1), True),
        "bounded3": System("bounded (3)", ConsistencyConfig(mode="bounded", bound=3), True),
        "async": System("async", ConsistencyConfig(mode="async"), True),
        "local": System(f"local ({num_local_steps})", local),
        "ddp": System("DDP over Gloo", None),
    }


def scenarios(setting: Setting) -> list[Scenario]:
    """Those without a straggler come before what is compared with them."""
    short, long = setting.step_seconds, setting.long_step_seconds
    seconds, lead, window = setting.seconds, setting.lead_seconds, setting.pause_window_seconds
    num_workers = setting.num_workers
    return [
        Scenario("nobody slow", short, seconds),
        Scenario("one worker 4x slower", short, seconds, lead, slowness=4),
        Scenario("one worker 10x slower", short, seconds, lead, slowness=10),
        Scenario("nobody slow, long steps", long, seconds),
        Scenario("one worker paused, long steps", long, window, num_paused=1, num_pauses=2),
        Scenario("all paused, long steps", long, window, num_paused=num_workers, num_pauses=1),
    ]


def pauses(scenario: Scenario, rank: int, setting: Setting) -> tuple[Pause, ...]:
    """One in each of equal stretches of the scenario, at random."""
    if rank < setting.num_workers - scenario.num_paused:
        return ()
    draw, length = random.Random(f"{setting.seed} {rank}"), setting.pause_seconds
    stretch = scenario.seconds / scenario.num_pauses
    begins = [n * stretch + draw.uniform(0, stretch - length) for n in range(scenario.num_pauses)]
    return tuple((begin, begin + length) for begin in begins)


def cells(setting: Setting, rank: int) -> list[Cell]:
    """A warm-up, and every scenario, for one worker."""
    result = [Cell(setting.step_seconds, (), 0.0, WARM_UP_SECONDS)]
    for each in scenarios(setting):
        step_seconds = each.step_seconds * (each.slowness if rank == setting.num_workers - 1 else 1)
        breaks = pauses(each, rank, setting)
        result.append(Cell(step_seconds, breaks, each.lead_seconds, each.seconds))
    return result


def longest_seconds(setting: Setting, num_round_steps: int) -> float:
    """What all scenarios of a system may take: a round is not broken off."""
    return WARM_UP_SECONDS + sum(
        each.lead_seconds + each.seconds + 2 * num_round_steps * each.step_seconds * each.slowness
        for each in scenarios(setting)
    )


def possible(scenario: Scenario, setting: Setting) -> float:
    """The share of the work that can be done at all, in spite of the straggler."""
    paused = scenario.num_paused * scenario.num_pauses * setting.pause_seconds / scenario.seconds
    return 1 - (1 - 1 / scenario.slowness + paused) / setting.num_workers


# -- From counts to rates --------------------------------------------------------------------------


def make_rows(key: str, system: System, run: Run, setting: Setting) -> list[Row]:
    """A row for each scenario of a system."""
    rows: list[Row] = []
    calm: dict[float, Row] = {}
    measured = list(zip(*run.taken, strict=True))[1:]  # after the warm-up
    for scenario, taken in zip(scenarios(setting), measured, strict=True):
        row: Row = {"scenario": scenario.name, "system": key}
        row |= rates(system, taken, run.updates, setting.num_samples)
        if scenario.is_calm:
            calm[scenario.step_seconds] = row
        base = calm[scenario.step_seconds]
        fast = mean(base["steps_per_second"]) * setting.num_samples * (setting.num_workers - 1)
        row["of_its_own"] = round(row["samples_per_second"] / base["samples_per_second"], 3)
        row["of_fast_workers"] = round(row["samples_per_second"] / fast, 3)
        rows.append(row | {"possible": round(possible(scenario, setting), 3)})
    return rows


def rates(
    system: System,
    taken: Sequence[Taken],
    updates: Sequence[Mapping[str, Any]] | None,
    num_samples: int,
) -> Row:
    """What all workers have done in one scenario, each in its own time."""
    used = [own_updates(updates, rank, each) for rank, each in enumerate(taken)]
    samples = [
        each.num_steps * num_samples if own is None else sum(line["samples"] for line in own)
        for own, each in zip(used, taken, strict=True)
    ]
    if system.each_alone:
        num_updates = [len(own or ()) for own in used]
    else:  # worker 0 has seen every version go by, also those without it
        num_updates = [taken[0].steps[1] - taken[0].steps[0]]
    num_refused = sum(each.num_steps for each in taken) - sum(samples) // num_samples
    seconds = [each.seconds for each in taken]
    return {
        "updates_per_second": round(sum(map(per_second, num_updates, seconds)), 2),
        "samples_per_second": round(sum(map(per_second, samples, seconds)), 1),
        "steps_per_second": [round(each.num_steps / each.seconds, 2) for each in taken],
        "refused_steps": num_refused,
    }


def per_second(number: int, seconds: float) -> float:
    return number / seconds


def own_updates(
    updates: Sequence[Mapping[str, Any]] | None, rank: int, taken: Taken
) -> list[Mapping[str, Any]] | None:
    """What a worker has contributed in the time that counts."""
    if updates is None:
        return None
    first, end = taken.steps
    mine = (each for each in updates if each["kind"] == "update" and each["worker"] == rank)
    return [each for each in mine if first <= each["step"] < end and each["state"] == "applied"]


# -- What they tell --------------------------------------------------------------------------------


def targets(rows: Sequence[Row]) -> list[Row]:
    """What was to be reached, and whether it was."""
    wanted = [
        ("async", "one worker 4x slower", "of_fast_workers"),
        ("async", "one worker 10x slower", "of_fast_workers"),
        ("backup1", "one worker 4x slower", "of_its_own"),
        ("backup1", "one worker 10x slower", "of_its_own"),
        ("bounded3", "one worker paused, long steps", "of_its_own"),
        ("bounded3", "all paused, long steps", "of_its_own"),
    ]
    return [
        {"system": key, "scenario": name, "measure": measure, "value": row[measure], "met": met}
        for key, name, measure in wanted
        for row in rows
        if (row["system"], row["scenario"]) == (key, name)
        for met in [row[measure] >= REACH]
    ]


def no_help(rows: Sequence[Row]) -> dict[str, list[str]]:
    """By scenario: the systems that keep no more of their rate than sync does."""
    sync = {row["scenario"]: row for row in rows if row["system"] == "sync"}
    useless: dict[str, list[str]] = {}
    for row in rows:
        name = row["scenario"]
        is_calm = row["possible"] == 1
        if name in sync and row["system"] != "sync" and not is_calm:
            names = useless.setdefault(name, [])
            if row["of_its_own"] < sync[name]["of_its_own"] + BETTER:
                names.append(row["system"])
    return useless
