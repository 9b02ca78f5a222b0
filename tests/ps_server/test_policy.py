from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_core.optim_spec import Hyperparameters
from ps_core.settings import ConsistencyConfig
from ps_server.policy import (
    SYNC,
    Consistency,
    Verdict,
    consistency_of,
    is_complete,
    judge,
    may_continue,
    scaled,
)

BACKUP = Consistency(quorum=2, bound=0)
BOUNDED = Consistency(quorum=1, bound=3)
ASYNC = Consistency(quorum=1, bound=None)

ranks = st.integers(0, 5)
groups = st.frozensets(ranks)
quorums = st.one_of(st.none(), st.integers(1, 6))
bounds = st.one_of(st.none(), st.integers(0, 4))


def test_only_a_bound_of_zero_is_lockstep() -> None:
    assert [mode.lockstep for mode in (SYNC, BACKUP, BOUNDED, ASYNC)] == [True, True, False, False]


# -- Modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "consistency"),
    [
        (ConsistencyConfig(), SYNC),
        (ConsistencyConfig(mode="local"), SYNC),
        (ConsistencyConfig(backup_workers=2), Consistency(None, 0, backups=2)),
        (ConsistencyConfig(mode="bounded", bound=4), Consistency(1, 4)),
        (ConsistencyConfig(mode="async"), Consistency(1, None)),
    ],
)
def test_a_mode_is_two_integers(config: ConsistencyConfig, consistency: Consistency) -> None:
    assert consistency_of(config) == consistency


def test_only_with_backup_workers_the_contributors_are_decided_first() -> None:
    modes = (SYNC, Consistency(None, 0, backups=1), BOUNDED, ASYNC)
    assert [mode.sealed for mode in modes] == [False, True, False, False]


@pytest.mark.parametrize(
    ("consistency", "members", "needed"),
    [
        (SYNC, 3, 3),
        (Consistency(None, 0, backups=1), 3, 2),
        (Consistency(None, 0, backups=1), 1, 1),
        (Consistency(None, 0, backups=5), 3, 1),
        (ASYNC, 3, 1),
    ],
)
def test_an_update_needs_all_members_but_the_backups_and_at_least_one(
    consistency: Consistency, members: int, needed: int
) -> None:
    assert consistency.needed(members) == needed


def test_the_learning_rate_is_divided_by_one_more_than_the_staleness_and_nothing_else() -> None:
    group: Hyperparameters = {"lr": 0.6, "momentum": 0.9, "betas": (0.9, 0.99)}
    assert scaled(group, 0) == group
    assert scaled(group, 2) == {"lr": 0.6 / 3, "momentum": 0.9, "betas": (0.9, 0.99)}
    assert group["lr"] == 0.6


# -- Which pushes count ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "last_step", "version", "verdict"),
    [
        (0, -1, 0, Verdict.ACCEPT),
        (5, 4, 5, Verdict.ACCEPT),
        (5, 2, 5, Verdict.ACCEPT),  # the worker was idle meanwhile
        (5, 5, 5, Verdict.DUPLICATE),  # used, the update still waits for others
        (4, 4, 5, Verdict.DUPLICATE),
        (0, 4, 5, Verdict.DUPLICATE),
        (4, 3, 5, Verdict.LATE),  # the others went on without it
        (0, -1, 5, Verdict.LATE),
        (6, 5, 5, Verdict.EARLY),
        (1, -1, 0, Verdict.EARLY),
    ],
)
@pytest.mark.parametrize("consistency", [SYNC, BACKUP])
def test_in_lockstep_a_push_counts_only_for_the_version_it_was_made_from(
    consistency: Consistency, step: int, last_step: int, version: int, verdict: Verdict
) -> None:
    assert judge(consistency, step, last_step, version) is verdict


@pytest.mark.parametrize(
    ("step", "last_step", "verdict"),
    [
        (0, -1, Verdict.ACCEPT),
        (5, 4, Verdict.ACCEPT),
        (5, 5, Verdict.DUPLICATE),
        (3, 5, Verdict.DUPLICATE),
        (7, 5, Verdict.EARLY),
        (1, -1, Verdict.EARLY),
    ],
)
@pytest.mark.parametrize("consistency", [BOUNDED, ASYNC])
@pytest.mark.parametrize("version", [0, 5, 100])
def test_otherwise_a_worker_pushes_its_own_steps_in_order_whatever_the_version(
    consistency: Consistency, step: int, last_step: int, verdict: Verdict, version: int
) -> None:
    assert judge(consistency, step, last_step, version) is verdict


@given(quorums, bounds, st.lists(st.integers(0, 6), max_size=40))
def test_however_often_steps_are_repeated_each_is_accepted_at_most_once_and_in_order(
    quorum: int | None, bound: int | None, arrivals: list[int]
) -> None:
    consistency = Consistency(quorum, bound)
    last_step, accepted = -1, []
    for step in arrivals:
        # A worker alone: every accepted push is at once a version.
        if judge(consistency, step, last_step, version=last_step + 1) is Verdict.ACCEPT:
            accepted.append(step)
            last_step = step
    assert accepted == list(range(len(accepted)))
    assert len(accepted) == next(
        count for count in range(8) if not in_order(list(range(count + 1)), arrivals)
    )


def in_order(wanted: Sequence[int], arrivals: Sequence[int]) -> bool:
    """Whether `wanted` occurs within `arrivals`, in order."""
    remaining = iter(arrivals)
    return all(step in remaining for step in wanted)


# -- When an update is complete --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quorum", "acted", "members", "complete"),
    [
        (None, {0, 1, 2}, {0, 1, 2}, True),
        (None, {0, 1}, {0, 1, 2}, False),
        (None, {0, 1, 2}, {0, 1}, True),  # one has left after it contributed
        (None, {2}, {0, 1}, False),
        (None, {0}, set(), True),  # all have left
        (None, set(), set(), False),
        (2, {0, 1}, {0, 1, 2}, True),
        (2, {0}, {0, 1, 2}, False),
        (2, {0}, {0}, True),  # fewer members than the quorum
        (3, {0, 1}, {0, 1}, True),
        (3, {0, 2}, {0, 1}, False),
        (2, {0, 2}, {0, 1}, True),  # one has left after it contributed
        (3, {0, 1, 2}, {0, 3}, True),
        (1, {1}, {0, 1, 2}, True),
        (1, set(), {0}, False),
    ],
)
def test_an_update_waits_for_its_quorum_of_distinct_workers(
    quorum: int | None, acted: set[int], members: set[int], complete: bool
) -> None:
    assert is_complete(Consistency(quorum, 0), acted, members) is complete


@given(quorums, st.lists(ranks), groups)
def test_a_fast_worker_does_not_fill_the_quorum_twice(
    quorum: int | None, acted: list[int], members: frozenset[int]
) -> None:
    consistency = Consistency(quorum, 0)
    once = is_complete(consistency, set(acted), members)
    assert is_complete(consistency, acted + acted, members) is once


@given(quorums, groups, groups, ranks)
def test_one_more_contribution_never_makes_a_complete_update_incomplete(
    quorum: int | None, acted: frozenset[int], members: frozenset[int], rank: int
) -> None:
    consistency = Consistency(quorum, 0)
    if is_complete(consistency, acted, members):
        assert is_complete(consistency, acted | {rank}, members)


@given(quorums, groups, groups, ranks)
def test_a_member_that_leaves_never_makes_a_complete_update_incomplete(
    quorum: int | None, acted: frozenset[int], members: frozenset[int], rank: int
) -> None:
    consistency = Consistency(quorum, 0)
    if is_complete(consistency, acted, members):
        assert is_complete(consistency, acted, members - {rank})


@given(quorums, groups)
def test_when_all_members_have_acted_nobody_is_waited_for(
    quorum: int | None, members: frozenset[int]
) -> None:
    assert is_complete(Consistency(quorum, 0), members, members) is bool(members)


# -- Who may go on ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "clock", "others", "may"),
    [
        (0, 4, [4, 5], True),
        (0, 5, [4, 5], False),
        (3, 7, [4, 7], True),
        (3, 8, [4, 8], False),
        (None, 1000, [0, 1000], True),
        (0, 9, [9], True),
        (0, 9, [], True),  # nobody is live, this worker is about to join
    ],
)
def test_a_worker_goes_on_iff_the_slowest_is_at_most_the_bound_behind(
    bound: int | None, clock: int, others: list[int], may: bool
) -> None:
    assert may_continue(Consistency(1, bound), clock, others) is may


@given(bounds, st.integers(1, 5), st.lists(st.integers(0, 4), max_size=100))
def test_under_the_gate_no_worker_is_ever_more_than_the_bound_plus_one_step_ahead(
    bound: int | None, num_workers: int, schedule: list[int]
) -> None:
    consistency = Consistency(1, bound)
    clocks = [0] * num_workers
    for turn in schedule:
        rank = turn % num_workers
        if may_continue(consistency, clocks[rank], clocks):
            clocks[rank] += 1
        assert bound is None or max(clocks) - min(clocks) <= bound + 1
        slowest = min(clocks)
        assert may_continue(consistency, slowest, clocks), "the slowest may always go on"
