import itertools
import subprocess
import sys
from typing import get_args

import pytest

from ps_core.lead_metrics import EvictionReason, LeadMetrics, LeaseState
from ps_core.metrics import REGISTRY

# Metrics belong to the process, so each test has a worker of its own.
RANKS = itertools.count(5000)
REASONS = ("stream", "heartbeat", "step_deadline", "failed", "replaced")
STATES = ("granted", "applied", "applied_in_part", "returned", "abandoned", "open")
PHASES = ("data", "compute", "network")


@pytest.fixture
def rank() -> int:
    return next(RANKS)


@pytest.fixture
def metrics() -> LeadMetrics:
    return LeadMetrics()


def value(name: str, **labels: object) -> float | None:
    """The current value of one series; None when it does not exist."""
    return REGISTRY.get_sample_value(name, {key: str(label) for key, label in labels.items()})


def count(name: str, **labels: object) -> float:
    """The value of a series that exists; other tests of this process may have counted too."""
    found = value(name, **labels)
    assert found is not None
    return found


def shown(rank: int) -> list[float | None]:
    ratio = value("shardline_straggler_ratio", worker=rank)
    return [ratio, *(value("shardline_straggler", worker=rank, phase=phase) for phase in PHASES)]


# In a process of its own: what is shown when nothing has happened yet.
UNTOUCHED = """
from prometheus_client import generate_latest
from ps_core.lead_metrics import LeadMetrics
from ps_core.metrics import REGISTRY
def ours():
    lines = generate_latest(REGISTRY).decode().splitlines()
    lines = [line for line in lines if line.startswith("shardline_") and "_created" not in line]
    of_every_process = ("shardline_build", "shardline_memory_limit_bytes")
    return [line for line in lines if not line.startswith(of_every_process)]
assert ours() == [], ours()
LeadMetrics()
LeadMetrics()
print(*ours(), sep="\\n")
"""


def test_only_a_lead_shows_these_metrics_and_each_starts_at_zero() -> None:
    run = subprocess.run(
        [sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    expected = [
        *(f'shardline_evictions_total{{reason="{reason}"}} 0.0' for reason in REASONS),
        "shardline_preemptions_total 0.0",
        "shardline_joins_total 0.0",
        *(f'shardline_leases{{state="{state}"}} 0.0' for state in STATES),
        "shardline_membership_epoch 0.0",
        "shardline_paused 0.0",
    ]
    assert sorted(run.stdout.splitlines()) == sorted(expected)


def test_reasons_and_states_are_bounded() -> None:
    assert get_args(EvictionReason) == REASONS
    assert get_args(LeaseState) == STATES


def test_workers_that_come_and_go_are_counted(metrics: LeadMetrics) -> None:
    joins, preemptions = count("shardline_joins_total"), count("shardline_preemptions_total")
    metrics.joined()
    metrics.joined()
    metrics.preempted()
    assert count("shardline_joins_total") - joins == 2
    assert count("shardline_preemptions_total") - preemptions == 1


@pytest.mark.parametrize("reason", get_args(EvictionReason))
def test_an_eviction_counts_under_its_reason(metrics: LeadMetrics, reason: EvictionReason) -> None:
    before = {r: count("shardline_evictions_total", reason=r) for r in REASONS}
    metrics.evicted(reason)
    after = {r: count("shardline_evictions_total", reason=r) for r in REASONS}
    assert after == {r: before[r] + (r == reason) for r in REASONS}


def test_the_membership_epoch_and_a_pause_are_shown(metrics: LeadMetrics) -> None:
    metrics.set_epoch(3)
    metrics.set_epoch(4)
    assert value("shardline_membership_epoch") == 4
    metrics.set_paused(True)
    assert value("shardline_paused") == 1
    metrics.set_paused(False)
    assert value("shardline_paused") == 0


def test_the_ledger_shows_the_samples_in_each_state(metrics: LeadMetrics) -> None:
    samples = {state: 10 * place for place, state in enumerate(STATES, start=1)}
    metrics.set_ledger(**samples)
    assert {state: value("shardline_leases", state=state) for state in STATES} == samples
    metrics.set_ledger(granted=0, open=7)
    expected = {**samples, "granted": 0, "open": 7}
    assert {state: value("shardline_leases", state=state) for state in STATES} == expected


def test_a_state_nobody_knows_is_our_mistake(metrics: LeadMetrics) -> None:
    with pytest.raises(KeyError, match="lost"):
        metrics.set_ledger(lost=1)
    assert value("shardline_leases", state="lost") is None


def test_a_straggler_is_shown_with_its_ratio_in_one_phase(metrics: LeadMetrics, rank: int) -> None:
    assert shown(rank) == [None] * 4
    metrics.no_straggler(rank)
    assert shown(rank) == [1, 0, 0, 0]
    metrics.straggler(rank, 2.5, "compute")
    assert shown(rank) == [2.5, 0, 1, 0]
    metrics.straggler(rank, 1.75, "network")
    assert shown(rank) == [1.75, 0, 0, 1]
    metrics.no_straggler(rank)
    assert shown(rank) == [1, 0, 0, 0]


def test_a_worker_that_is_gone_is_shown_no_more(metrics: LeadMetrics, rank: int) -> None:
    other = next(RANKS)
    metrics.straggler(rank, 3.0, "data")
    metrics.straggler(other, 2.0, "data")
    metrics.forget(rank)
    metrics.forget(rank)
    assert shown(rank) == [None] * 4
    assert shown(other) == [2, 1, 0, 0]


def test_a_lead_that_is_built_again_goes_on_counting(rank: int) -> None:
    LeadMetrics().straggler(rank, 2.0, "data")
    joins = count("shardline_joins_total")
    LeadMetrics().joined()
    assert count("shardline_joins_total") == joins + 1
    assert shown(rank) == [2, 1, 0, 0]


def test_no_name_of_the_lead_is_taken_by_a_worker_or_a_shard(metrics: LeadMetrics) -> None:
    names = [family.name for family in REGISTRY.collect()]
    assert len(names) == len(set(names))
