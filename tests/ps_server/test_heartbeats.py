import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_server.heartbeats import Heartbeats


def adaptive(floor_seconds: float = 8.0) -> Heartbeats:
    return Heartbeats(floor_seconds, fixed_seconds=0.0)


def fixed(seconds: float = 8.0) -> Heartbeats:
    return Heartbeats(floor_seconds=100.0, fixed_seconds=seconds)


def wait(beats: Heartbeats, since: float, until: float) -> list[tuple[float, int]]:
    """Ask every quarter of a second after `since`; who was found silent, and when."""
    ticks = [since + count / 4 for count in range(1, round(4 * (until - since)) + 1)]
    return [(now, worker) for now in ticks for worker in beats.silent(now)]


def beat_every(beats: Heartbeats, gaps: list[float], worker: int = 0) -> float:
    """Beat at 0 and after each gap, asking in between; the time of the last one."""
    now = 0.0
    beats.beat(worker, now)
    for gap in gaps:
        assert wait(beats, now, now + gap) == []
        now += gap
        beats.beat(worker, now)
    return now


# Silence


def test_a_worker_is_silent_when_it_has_not_beaten_for_the_deadline() -> None:
    beats = fixed(8.0)
    beats.beat(3, now=100.0)
    assert wait(beats, 100.0, 120.0) == [(108.0, 3)]


def test_a_heartbeat_gives_a_whole_new_deadline() -> None:
    beats = fixed(8.0)
    beats.beat(3, now=100.0)
    assert wait(beats, 100.0, 107.0) == []
    beats.beat(3, now=107.0)
    assert wait(beats, 107.0, 120.0) == [(115.0, 3)]


def test_a_silent_worker_is_reported_again_only_after_it_has_beaten() -> None:
    beats = fixed(8.0)
    beats.beat(3, now=0.0)
    assert wait(beats, 0.0, 100.0) == [(8.0, 3)]
    beats.beat(3, now=100.0)
    assert wait(beats, 100.0, 200.0) == [(108.0, 3)]


def test_a_worker_that_never_beat_is_not_silent() -> None:
    beats = fixed(8.0)
    assert wait(beats, 0.0, 100.0) == []
    assert beats.silence(0, now=100.0) is None


def test_a_forgotten_worker_is_not_silent() -> None:
    beats = fixed(8.0)
    beats.beat(3, now=0.0)
    beats.forget(3)
    beats.forget(4)
    assert wait(beats, 0.0, 100.0) == []
    assert beats.silence(3, now=100.0) is None


def test_workers_are_reported_one_by_one_and_in_order() -> None:
    beats = fixed(8.0)
    for worker, at in ((5, 0.0), (1, 0.0), (2, 1.5)):
        beats.beat(worker, now=at)
    assert wait(beats, 1.5, 50.0) == [(8.0, 1), (8.0, 5), (9.5, 2)]


def test_silence_is_the_time_since_the_last_heartbeat() -> None:
    beats = fixed(8.0)
    beats.beat(3, now=10.0)
    assert beats.silence(3, now=10.0) == 0.0
    assert beats.silence(3, now=12.5) == 2.5
    beats.beat(3, now=13.0)
    assert beats.silence(3, now=13.5) == 0.5


def test_a_clock_that_runs_backwards_makes_nobody_silent() -> None:
    beats = fixed(8.0)
    beats.beat(3, now=100.0)
    beats.beat(3, now=90.0)
    assert beats.silent(now=90.0) == []
    assert beats.silence(3, now=90.0) == 0.0
    assert wait(beats, 100.0, 110.0) == [(108.0, 3)]


def test_a_gap_is_never_negative() -> None:
    beats = adaptive(floor_seconds=8.0)
    beat_every(beats, [4.0])
    beats.beat(0, now=1.0)
    assert beats.deadline_seconds(0) == pytest.approx(2 * rto([4.0, 0.0]))


# The deadline


def test_a_fixed_deadline_holds_for_everybody_and_has_no_floor() -> None:
    beats = Heartbeats(floor_seconds=10.0, fixed_seconds=2.0)
    beat_every(beats, [0.5, 1.75, 0.25, 1.75])
    assert beats.deadline_seconds(0) == 2.0
    assert beats.deadline_seconds(9) == 2.0


def test_the_floor_holds_for_a_stranger_for_a_newcomer_and_for_steady_heartbeats() -> None:
    beats = adaptive(floor_seconds=8.0)
    assert beats.deadline_seconds(0) == 8.0
    beats.beat(0, now=0.0)
    assert beats.deadline_seconds(0) == 8.0
    beat_every(beats, [1.0] * 100)
    assert beats.deadline_seconds(0) == 8.0


def test_the_first_gap_is_the_mean_and_half_of_it_the_deviation() -> None:
    beats = adaptive(floor_seconds=8.0)
    beat_every(beats, [4.0])
    assert beats.deadline_seconds(0) == 2 * (4.0 + 4 * 2.0)


def test_mean_and_deviation_follow_the_gaps_as_in_rfc_6298() -> None:
    beats = adaptive(floor_seconds=8.0)
    beat_every(beats, [4.0, 6.0])
    # RTTVAR = 3/4 × 2 + 1/4 × |4 − 6| = 2; SRTT = 7/8 × 4 + 1/8 × 6 = 4.25.
    assert beats.deadline_seconds(0) == 2 * (4.25 + 4 * 2.0)


def rto(gaps: list[float]) -> float:
    """RFC 6298, section 2, written as it stands there; without the clock's granularity."""
    srtt, rttvar = gaps[0], gaps[0] / 2
    for r in gaps[1:]:
        rttvar = (1 - 1 / 4) * rttvar + 1 / 4 * abs(srtt - r)
        srtt = (1 - 1 / 8) * srtt + 1 / 8 * r
    return srtt + 4 * rttvar


@given(st.lists(st.integers(0, 28).map(lambda quarters: quarters / 4), min_size=1, max_size=30))
def test_the_deadline_is_twice_the_timeout_of_tcp_and_never_below_the_floor(
    gaps: list[float],
) -> None:
    beats = adaptive(floor_seconds=8.0)
    beat_every(beats, gaps)
    assert beats.deadline_seconds(0) == pytest.approx(max(8.0, 2 * rto(gaps)))


def test_every_worker_has_its_own_deadline() -> None:
    beats = adaptive(floor_seconds=4.0)
    for now in range(100):
        beats.beat(0, float(now))
        if now % 3 == 0:
            beats.beat(1, float(now))
        assert beats.silent(float(now)) == []
    assert beats.deadline_seconds(0) == 4.0
    # Steady gaps of 3 seconds: the deviation has gone, twice the gap is left.
    assert beats.deadline_seconds(1) == pytest.approx(6.0, rel=0.01)


def test_a_worker_that_comes_back_after_a_long_silence_gets_a_longer_deadline() -> None:
    beats = adaptive(floor_seconds=8.0)
    now = beat_every(beats, [1.0] * 50)
    assert wait(beats, now, now + 16.0) == [(now + 8.0, 0)]
    beats.beat(0, now + 16.0)
    # 1 + 15/8 + 4 × 15/4, twice.
    assert beats.deadline_seconds(0) == pytest.approx(2 * (1 + 15 / 8 + 15), rel=0.01)


def test_a_process_that_takes_a_rank_starts_from_the_floor() -> None:
    beats = adaptive(floor_seconds=8.0)
    beat_every(beats, [7.0] * 10)
    assert beats.deadline_seconds(0) > 8.0
    beats.forget(0)
    beats.beat(0, now=71.0)
    assert beats.deadline_seconds(0) == 8.0


@pytest.mark.parametrize("seed", range(5))
def test_uneven_heartbeats_of_a_living_worker_are_no_silence_and_its_death_is_found(
    seed: int,
) -> None:
    draw = random.Random(seed)
    beats = adaptive(floor_seconds=10.0)
    # A crowded machine: a second on average, now and then several, never near the floor.
    gaps = [min(9.0, round(4 * draw.lognormvariate(-0.3, 0.8)) / 4) for _ in range(500)]
    died = beat_every(beats, gaps)
    assert len(wait(beats, died, died + 60.0)) == 1


# The observer sleeps


def test_nobody_is_silent_because_the_observer_was_asleep() -> None:
    beats = fixed(8.0)
    for worker in range(4):
        beats.beat(worker, now=100.0)
    assert wait(beats, 100.0, 101.0) == []
    assert beats.silent(now=5000.0) == []
    for worker in range(3):
        beats.beat(worker, now=5000.0)
    # Worker 3 is really gone. 1 s before the sleep and 4 s of it count, half of the deadline.
    assert wait(beats, 5000.0, 5020.0) == [(5003.0, 3), *((5008.0, worker) for worker in range(3))]


def test_heartbeats_that_waited_in_the_sockets_are_not_late_whoever_is_read_first() -> None:
    beats = adaptive(floor_seconds=8.0)
    for now in range(50):
        for worker in (0, 1):
            beats.beat(worker, float(now))
        assert beats.silent(float(now)) == []
    # After an hour's sleep worker 0's heartbeat is read before the timer runs, worker 1's after.
    beats.beat(0, now=3600.0)
    assert beats.silent(now=3600.0) == []
    beats.beat(1, now=3600.25)
    for worker in (0, 1):
        # A gap of 4 s, not of an hour: 1 + 3/8 + 4 × 3/4, twice.
        assert beats.deadline_seconds(worker) == pytest.approx(2 * (1 + 3 / 8 + 3), rel=0.1)


def test_a_worker_beat_just_before_the_sleep_is_not_owed_time_in_the_future() -> None:
    beats = fixed(8.0)
    beats.silent(now=0.0)
    beats.beat(0, now=3.75)
    beats.silent(now=10.0)
    assert beats.silence(0, now=10.0) == 4.0
    assert wait(beats, 10.0, 30.0) == [(14.0, 0)]


def test_a_sleep_is_not_counted_before_it_is_noticed_either() -> None:
    beats = fixed(8.0)
    beats.beat(0, now=0.0)
    assert beats.silence(0, now=3.0) == 3.0
    assert beats.silence(0, now=1000.0) == 4.0
    assert beats.silent(now=1000.0) == []
    assert beats.silence(0, now=1000.5) == 4.5


def test_calls_up_to_half_a_deadline_apart_count_in_full() -> None:
    beats = fixed(8.0)
    beats.beat(0, now=0.0)
    assert beats.silent(now=4.0) == []
    assert beats.silent(now=8.0) == [0]


def test_an_observer_that_always_calls_too_rarely_still_finds_the_dead() -> None:
    beats = fixed(8.0)
    beats.beat(0, now=0.0)
    assert [beats.silent(now=60.0 * call) for call in (1, 2, 3)] == [[], [0], []]


@pytest.mark.parametrize(("beats", "half"), [(fixed(2.0), 1.0), (adaptive(8.0), 4.0)])
def test_the_shortest_deadline_sets_what_is_a_sleep(beats: Heartbeats, half: float) -> None:
    beats.beat(0, now=0.0)
    assert beats.silence(0, now=500.0) == half


def test_other_workers_heartbeats_show_that_the_observer_is_awake() -> None:
    beats = fixed(8.0)
    beats.beat(0, now=0.0)
    for now in range(1, 20):
        beats.beat(1, now=float(now))
    assert beats.silent(now=20.0) == [0]


def test_a_worker_that_was_silent_stays_reported_through_a_sleep() -> None:
    beats = fixed(8.0)
    beats.beat(0, now=0.0)
    assert wait(beats, 0.0, 10.0) == [(8.0, 0)]
    assert beats.silent(now=1000.0) == []
    assert wait(beats, 1000.0, 1020.0) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_starved_observer_evicts_nobody_who_lives(seed: int) -> None:
    draw = random.Random(seed)
    beats = adaptive(floor_seconds=10.0)
    now, sent = 0.0, [0.0] * 8
    for _ in range(2000):
        now += draw.choice([0.1, 0.1, 0.1, 1.0, 30.0])
        # Heartbeats are read in the order they come, some before the timer, some after it.
        due = [worker for worker in range(8) if now - sent[worker] >= 1.0]
        early = draw.randrange(len(due) + 1)
        for worker in due[:early]:
            beats.beat(worker, now)
            sent[worker] = now
        assert beats.silent(now) == []
        for worker in due[early:]:
            beats.beat(worker, now)
            sent[worker] = now


events = st.tuples(st.sampled_from(["beat", "forget", "silent"]), st.integers(0, 2))
pauses = st.sampled_from([0.25, 1.0, 3.75, 4.0, 4.25, 7.0, 100.0])


@given(st.lists(st.tuples(pauses, events), max_size=60))
def test_silence_is_what_shifting_all_last_heartbeats_gives(
    history: list[tuple[float, tuple[str, int]]],
) -> None:
    """Written the other way round: when the observer wakes, everybody's last heartbeat moves."""
    beats = fixed(8.0)
    last: dict[int, float] = {}
    reported: set[int] = set()
    now, called_at = 0.0, math.inf
    for pause, (event, worker) in history:
        now += pause
        if event == "forget":
            beats.forget(worker)
            last.pop(worker, None)
            continue
        excess = max(0.0, now - called_at - 4.0)
        last = {w: at + excess for w, at in last.items()}
        called_at = now
        if event == "beat":
            beats.beat(worker, now)
            last[worker] = now
            reported.discard(worker)
        else:
            late = [w for w in sorted(last) if now - last[w] >= 8.0 and w not in reported]
            assert beats.silent(now) == late
            reported.update(late)
        for rank in range(3):
            expected = now - last[rank] if rank in last else None
            assert beats.silence(rank, now) == expected


@pytest.mark.parametrize("pause", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_silence_does_not_depend_on_how_often_an_awake_observer_asks(pause: float) -> None:
    beats = fixed(8.0)
    beats.beat(0, now=0.0)
    found = {now: beats.silent(now) for now in itertools.islice(itertools.count(pause, pause), 80)}
    assert {now: workers for now, workers in found.items() if workers} == {8.0: [0]}


@pytest.mark.parametrize(
    ("beats", "limit", "key"),
    [
        (Heartbeats(10.0, 0.0), "10", "membership.heartbeat_floor_seconds"),
        (Heartbeats(10.0, 4.0), "4", "membership.heartbeat_deadline_seconds"),
    ],
)
def test_the_reason_names_the_silence_the_limit_and_the_key_that_raises_it(
    beats: Heartbeats, limit: str, key: str
) -> None:
    for now in range(13):
        beats.silent(now)
        if now < 2:
            beats.beat(0, now)
    assert beats.reason(0, 12.5) == (
        f"it gave no sign of life for 11.5 s, and {limit} s are allowed: raise {key} if it was "
        "only busy, as in a call that holds Python's interpreter lock"
    )
