"""The lead, two shards and workers together, in every mode, while workers come, go, die and return.

What has been decided is compared with an account that tests/ps_server/fleet.py keeps by itself.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ps_core.entries import WorkerEvent
from ps_core.leases import PassEnd, PassOpened
from ps_core.settings import ConsistencyConfig
from tests.ps_server.fleet import (
    LENGTH,
    LR,
    NUM_PARTS,
    Fleet,
    Habits,
    Key,
    Process,
    WatchedPart,
    sample_gradient,
)

SYNC = ConsistencyConfig()
BACKUP = ConsistencyConfig(backup_workers=1)
MODES = {
    "sync": SYNC,
    "deterministic": ConsistencyConfig(deterministic=True),
    "backup": BACKUP,
    "bounded by 1": ConsistencyConfig(mode="bounded", bound=1),
    "bounded by 3": ConsistencyConfig(mode="bounded", bound=3),
    "async": ConsistencyConfig(mode="async"),
    "scaled": ConsistencyConfig(mode="async", staleness_scaling=True),
    "compensated": ConsistencyConfig(mode="async", delay_compensation=0.5),
}
MAX_TURNS = 100_000
HABITS = Habits(num_epochs=2, num_samples=14, batch_size=2)
KINDS = (
    "kill",
    "evict",
    "preempt",
    "break",
    "cut off",
    "break control",
    "come",
    "replace",
    "freeze",
)


@dataclass(frozen=True)
class Fault:
    """What happens to whom after how many turns."""

    at: int
    kind: str
    who: int
    shard: int


# -- Running ---------------------------------------------------------------------------------------


def run(fleet: Fleet, faults: list[Fault]) -> None:
    """Let everybody take turns, with faults on the way, until nothing is left to do."""
    for count in range(MAX_TURNS):
        for fault in faults:
            if fault.at == count:
                inflict(fleet, fault)
        if not fleet.take_turn():
            if not needs_help(fleet):
                break
            help_out(fleet)
    assert not fleet.failure
    assert fleet.lead.ended, f"everybody waits: {describe(fleet)}"
    living = [each for each in fleet.processes if each.is_alive]
    assert all(each.has_left or each.met is None for each in living), describe(fleet)


def describe(fleet: Fleet) -> str:
    lines = [
        f"{p!r} alive={p.is_alive} step={p.next_step} expects={p.expected} met={p.met}"
        for p in fleet.processes
        if not p.has_left
    ]
    lines += [f"crew {rank}: {known}" for rank, known in fleet.lead.crew.items()]
    lines += [
        f"shard {e.index} epoch={e.shard._epoch} version={e.shard.version} {dict(e.members)}"
        for e in fleet.edges
    ]
    lines += [f"turn={fleet.lead.turn} paused={fleet.lead.is_paused}"]
    return "\n".join(["", *lines])


def inflict(fleet: Fleet, fault: Fault) -> None:
    living = [each for each in fleet.processes if each.is_alive and not each.has_left]
    joined = [each for each in living if fleet._is_held_by(each)]
    if fault.kind == "break control":
        fleet.break_control()
    elif fault.kind == "freeze":
        fleet.freeze(20 * 2**fault.who)
    elif fault.kind == "come":
        free = [rank for rank in range(5) if rank not in {each.rank for each in living}]
        if free:
            fleet.spawn(free[fault.who % len(free)])
    elif joined:
        inflict_on(fleet, joined[fault.who % len(joined)], fault)


def inflict_on(fleet: Fleet, process: Process, fault: Fault) -> None:
    match fault.kind:
        case "kill":
            fleet.kill(process)
        case "evict":
            fleet.evict(process.rank, process.incarnation)
        case "preempt":
            process.is_preempted = True
        case "break":
            fleet.break_stream(process, fault.shard)
        case "cut off":
            fleet.cut_off(process, fault.shard, 10 * 2**fault.who)
        case "replace":
            fleet.kill(process)
            fleet.spawn(process.rank)


def needs_help(fleet: Fleet) -> bool:
    """Nothing can happen, since too few workers are there."""
    return not fleet.lead.ended and len(fleet.processes) < 40


def help_out(fleet: Fleet) -> None:
    """Start workers again, as a launcher does: as many as the job needs."""
    living = {each.rank for each in fleet.processes if each.is_alive and not each.has_left}
    missing = [rank for rank in range(fleet.job.num_workers) if rank not in living]
    is_short = not fleet.lead.started or fleet.lead.is_paused
    assert is_short, f"everybody waits: {describe(fleet)}"
    for rank in missing:
        fleet.spawn(rank)


# -- Checking --------------------------------------------------------------------------------------


def check(fleet: Fleet) -> None:
    check_versions(fleet)
    check_what_updates_are_made_of(fleet)
    check_parameters(fleet)
    check_ledger(fleet)
    check_totals(fleet)
    check_samples(fleet)
    check_outcomes(fleet)
    for edge in fleet.edges:
        assert edge.epoch <= fleet.lead.epoch


def parts_of(fleet: Fleet) -> list[WatchedPart]:
    found = {number: part for edge in fleet.edges for number, part in edge.parts.items()}
    return [found[number] for number in range(NUM_PARTS)]


def check_versions(fleet: Fleet) -> None:
    parts = parts_of(fleet)
    for part in parts:
        assert part.version == len(part.updates)
        assert [update.version for update in part.updates] == list(range(part.version))
    if fleet.policy.lockstep:
        assert len({part.version for part in parts}) == 1


def check_what_updates_are_made_of(fleet: Fleet) -> None:
    parts = parts_of(fleet)
    for part in parts:
        for update in part.updates:
            if not fleet.policy.lockstep:
                assert len(update.used) == 1
                continue
            assert {step for _, _, step in update.used} <= {update.version}
            for key in update.used:
                versions = {version for version, _ in fleet.held[key].values()}
                assert versions == {update.version}, "from mixed parameters"
            if not fleet.policy.sealed:
                assert {rank for rank, _, _ in update.used} >= update.members
    if fleet.policy.sealed:
        for updates in zip(*(part.updates for part in parts), strict=True):
            assert len({frozenset(update.used) for update in updates}) == 1
            assert updates[0].used


def check_parameters(fleet: Fleet) -> None:
    factors = clip_factors(fleet)
    for part in parts_of(fleet):
        value = 0.0
        for update in part.updates:
            total = sum(samples for samples, _ in update.used.values())
            if not total:
                continue
            mean = sum(samples * gradient for samples, gradient in update.used.values()) / total
            mean *= factors.get(update.version, 1.0)
            version, held = fleet.held[next(iter(update.used))][part.part.index]
            mean += fleet.consistency.delay_compensation * mean * mean * (value - held)
            lr = LR
            if fleet.consistency.staleness_scaling:
                lr /= 1 + update.version - version
            value -= lr * mean
        assert math.isclose(float(part.parameters[0]), value, rel_tol=1e-9, abs_tol=1e-9)
        assert bool((part.parameters == part.parameters[0]).all())


def clip_factors(fleet: Fleet) -> dict[int, float]:
    if fleet.max_grad_norm is None:
        return {}
    squares: dict[int, float] = defaultdict(float)
    for part in parts_of(fleet):
        for update in part.updates:
            total = sum(samples for samples, _ in update.used.values())
            if total:
                mean = sum(n * gradient for n, gradient in update.used.values()) / total
                squares[update.version] += LENGTH * mean**2
    return {
        version: min(1.0, fleet.max_grad_norm / (total**0.5 + 1e-6))
        for version, total in squares.items()
    }


def num_parts_by_step(fleet: Fleet) -> Counter[Key]:
    """In how many parts each step has gone."""
    return Counter(
        key for part in parts_of(fleet) for key in part.settled | set(part.ranks.values())
    )


def check_ledger(fleet: Fleet) -> None:
    """What the lead has entered is what the shards have done."""
    used = num_parts_by_step(fleet)
    entered = Counter((c.worker, c.incarnation, c.step) for c in fleet.contributions)
    assert set(entered) == set(used)
    assert set(entered.values()) <= {1}
    evicted = {
        (entry.worker, entry.incarnation)
        for entry in fleet.entries
        if isinstance(entry, WorkerEvent) and entry.event == "evicted"
    }
    in_part = Counter[tuple[int, int]]()
    for entry in fleet.contributions:
        key = entry.worker, entry.incarnation, entry.step
        samples, leases = fleet.steps[key]
        assert entry.samples == samples
        assert entry.leases == leases
        assert (entry.state == "applied") == (used[key] == NUM_PARTS)
        in_part[key[:2]] += entry.state == "in_part"
    assert all(count <= 1 and (not count or who in evicted) for who, count in in_part.items())


def check_totals(fleet: Fleet) -> None:
    """The lead's sums are the numbers of samples that went into all parts, and into some only."""
    applied = in_part = 0
    for key, num_parts in num_parts_by_step(fleet).items():
        _, leases = fleet.steps[key]
        size = sum(lease.length for lease in leases)
        applied += size if num_parts == NUM_PARTS else 0
        in_part += size if num_parts < NUM_PARTS else 0
    totals = fleet.lead.ledger.book.totals()
    assert (totals.applied, totals.applied_in_part) == (applied, in_part)


def check_samples(fleet: Fleet) -> None:
    """Every sample of every pass has one end."""
    opened = {e.number: e for e in fleet.entries if isinstance(e, PassOpened)}
    ended = {e.number: e for e in fleet.entries if isinstance(e, PassEnd)}
    assert sorted(opened) == list(range(len(opened)))
    # A pass that all break off before they read is never opened.
    assert len(opened) == fleet.habits.num_epochs or fleet.has_declined
    assert len(opened) <= fleet.habits.num_epochs
    assert opened.keys() == ended.keys()
    ends: dict[int, list[int]] = {number: [] for number in opened}
    for entry in fleet.contributions:
        for lease in entry.leases:
            ends[lease.number] += range(lease.start, lease.start + lease.length)
    for number, end in ended.items():
        abandoned = [p for start, stop in end.abandoned for p in range(start, stop)]
        assert fleet.has_declined or not abandoned
        assert sorted(ends[number] + abandoned) == list(range(fleet.habits.num_samples))


def check_outcomes(fleet: Fleet) -> None:
    """Workers were told the truth."""
    for key, is_refused in fleet.outcomes.items():
        used = [key in part.settled for part in parts_of(fleet)]
        assert used == [not is_refused] * NUM_PARTS, f"{key} refused={is_refused}, used={used}"


# -- Tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Parts are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


faults = st.lists(
    st.builds(
        Fault,
        at=st.integers(0, 500),
        kind=st.sampled_from(KINDS),
        who=st.integers(0, 4),
        shard=st.integers(0, 1),
    ),
    max_size=8,
)
habits = st.builds(
    lambda **given: replace(HABITS, **given),
    abstain=st.sampled_from([0.0, 0.2]),
    skip=st.sampled_from([0.0, 0.0, 0.15]),
    accumulate=st.sampled_from([0.0, 0.3]),
    break_off=st.sampled_from([0.0, 0.0, 0.5]),
)
seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=100)
@given(
    seed=seeds,
    num_workers=st.integers(1, 4),
    min_workers=st.integers(1, 2),
    clips=st.booleans(),
    faults=faults,
    habits=habits,
)
def test_whatever_happens_to_workers_the_job_completes_and_its_account_is_right(
    mode: str,
    seed: int,
    num_workers: int,
    min_workers: int,
    clips: bool,
    faults: list[Fault],
    habits: Habits,
) -> None:
    if mode in ("scaled", "compensated"):
        # After a stream has broken a worker may drop what it is sent twice: what it holds is then
        # older than the shard believes, and the account here knows better.
        faults = [fault for fault in faults if fault.kind not in ("break", "cut off")]
    clips = clips and MODES[mode].mode == "sync"  # elsewhere each worker clips for itself
    fleet = Fleet(
        seed,
        MODES[mode],
        max_grad_norm=1.0 if clips else None,
        num_workers=num_workers,
        min_workers=min(num_workers, min_workers),
        habits=habits,
    )
    run(fleet, faults)
    check(fleet)


@pytest.mark.parametrize("mode", [m for m in MODES if m not in ("scaled", "compensated")])
def test_when_workers_cannot_reach_a_shard_any_more_the_account_is_right(mode: str) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        faults = [
            Fault(chance.randint(0, 400), "cut off", chance.randint(0, 4), chance.randint(0, 1))
            for _ in range(5)
        ]
        fleet = Fleet(seed, MODES[mode], num_workers=1 + seed % 3, habits=HABITS)
        run(fleet, faults)
        check(fleet)


@settings(max_examples=100)
@given(seed=seeds, num_workers=st.integers(1, 4), faults=faults, habits=habits)
def test_a_global_batch_is_shared_out_by_whoever_is_there(
    seed: int, num_workers: int, faults: list[Fault], habits: Habits
) -> None:
    habits = replace(habits, global_batch_size=4)
    fleet = Fleet(seed, SYNC, num_workers=num_workers, habits=habits)
    run(fleet, faults)
    check(fleet)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@settings(max_examples=20)
@given(seed=seeds, num_workers=st.integers(1, 4))
def test_when_nothing_happens_synchronous_training_is_plain_sgd_over_the_samples(
    max_grad_norm: float | None, seed: int, num_workers: int
) -> None:
    fleet = Fleet(seed, SYNC, num_workers=num_workers, max_grad_norm=max_grad_norm, habits=HABITS)
    run(fleet, [])
    check(fleet)
    expected = plain_sgd(num_workers, max_grad_norm)
    for part, value in zip(parts_of(fleet), expected, strict=True):
        assert math.isclose(float(part.parameters[0]), value, rel_tol=1e-9, abs_tol=1e-9)


def plain_sgd(num_workers: int, max_grad_norm: float | None) -> list[float]:
    """The value of each part, from the data alone: one step for so many batches."""
    values = [0.0] * NUM_PARTS
    size = HABITS.batch_size * num_workers
    for number in range(HABITS.num_epochs):
        for start in range(0, HABITS.num_samples, size):
            batch = range(start, min(start + size, HABITS.num_samples))
            means = [
                sum(sample_gradient(number, position, part) for position in batch) / len(batch)
                for part in range(NUM_PARTS)
            ]
            norm = math.sqrt(LENGTH * sum(mean * mean for mean in means))
            factor = min(1.0, (max_grad_norm or math.inf) / (norm + 1e-6))
            values = [v - LR * factor * m for v, m in zip(values, means, strict=True)]
    return values


def test_the_runs_come_across_what_they_are_about() -> None:
    seen = Counter[str]()
    for seed in range(120):
        chance = random.Random(seed)
        faults = [
            Fault(chance.randint(0, 400), chance.choice(KINDS), chance.randint(0, 4), seed % 2)
            for _ in range(6)
        ]
        fleet = Fleet(seed, list(MODES.values())[seed % len(MODES)], habits=HABITS)
        run(fleet, faults)
        check(fleet)
        seen["repeated"] += fleet.num_duplicates > 0
        seen["refused"] += any(fleet.outcomes.values())
        seen["came back"] += fleet.lead.ledger.book.totals().returned > 0
        seen.update({entry.state for entry in fleet.contributions})
        events = {entry.event for entry in fleet.entries if isinstance(entry, WorkerEvent)}
        seen.update(events)
        seen["joined later"] += len(fleet.processes) > fleet.job.num_workers
        seen["gave up"] += any(process.has_given_up for process in fleet.processes)
    for what in ("repeated", "refused", "came back", "in_part", "evicted", "preempted", "gave up"):
        assert seen[what] >= 3, f"{what}: {seen}"
    assert seen["joined later"] >= 30
