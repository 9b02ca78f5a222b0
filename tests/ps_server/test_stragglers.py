import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_server.stragglers import (
    MAX_STEPS,
    MIN_OBSERVATIONS,
    RATIO,
    WEIGHT,
    Lags,
    Stragglers,
    Verdict,
)

Step = tuple[float, float, float]
USUAL: Step = (0.25, 1.0, 0.75)  # data, compute, network: 2 seconds


def watched(steps: dict[int, Step], count: int = MIN_OBSERVATIONS, samples: int = 32) -> Stragglers:
    """Every worker takes the same step `count` times."""
    stragglers = Stragglers()
    for worker, step in steps.items():
        for _ in range(count):
            stragglers.observe(worker, *step, samples=samples)
    return stragglers


def ewma(values: list[float]) -> float:
    """In closed form: each value with the weight that is left of it."""
    kept = 1 - WEIGHT
    last = len(values) - 1
    return kept**last * values[0] + sum(
        WEIGHT * kept ** (last - index) * value for index, value in enumerate(values) if index
    )


# Who is a straggler


def test_workers_that_are_equally_fast_are_no_stragglers() -> None:
    stragglers = watched(dict.fromkeys(range(4), USUAL))
    assert [stragglers.verdict(worker) for worker in range(4)] == [None] * 4


@pytest.mark.parametrize(
    ("step", "ratio", "phase"),
    [
        ((3.25, 1.0, 0.75), 2.5, "data"),
        ((0.25, 4.0, 0.75), 2.5, "compute"),
        ((0.25, 1.0, 1.75), 1.5, "network"),
        ((0.0, 0.0, 4.0), 2.0, "network"),
        ((1.25, 2.5, 2.25), 3.0, "compute"),  # +1, +1.5, +1.5: the first of two equals
    ],
)
def test_a_straggler_is_named_with_its_ratio_and_phase(
    step: Step, ratio: float, phase: str
) -> None:
    stragglers = watched({0: USUAL, 1: USUAL, 2: step})
    verdict = stragglers.verdict(2)
    assert verdict is not None
    assert (verdict.worker, verdict.phase) == (2, phase)
    assert verdict.ratio == pytest.approx(ratio)
    assert stragglers.verdict(0) is None


def test_a_straggler_takes_one_and_a_half_times_as_long_and_no_less() -> None:
    assert RATIO == 1.5
    assert watched({0: (0, 2, 0), 1: (0, 2.999, 0)}).verdict(1) is None
    assert watched({0: (0, 2, 0), 1: (0, 3, 0)}).verdict(1) is not None


def test_a_worker_is_compared_with_the_median_of_the_others() -> None:
    # Of the others, 1, 2 and 9 seconds: 2. With its own 4, it would be 3, and no straggler.
    steps: dict[int, Step] = {0: (0, 1, 0), 1: (0, 2, 0), 2: (0, 9, 0), 3: (0, 4, 0)}
    verdict = watched(steps).verdict(3)
    assert verdict is not None
    assert verdict.ratio == pytest.approx(2.0)


def test_of_two_workers_the_slower_one_is_named() -> None:
    stragglers = watched({0: (0, 1, 0), 1: (0, 3, 0)})
    assert stragglers.verdict(0) is None
    verdict = stragglers.verdict(1)
    assert verdict is not None
    assert verdict.ratio == pytest.approx(3.0)


def test_the_phase_counts_lost_seconds_not_its_share_or_its_ratio() -> None:
    # Data: 30 times as long, 0.29 s lost. Compute: twice as long, 3 s lost, and the largest share.
    steps: dict[int, Step] = {0: (0.01, 3, 0.5), 1: (0.01, 3, 0.5), 2: (0.3, 6, 0.5)}
    verdict = watched(steps).verdict(2)
    assert verdict is not None
    assert verdict.phase == "compute"


def test_the_phase_that_takes_longest_everywhere_is_not_to_blame() -> None:
    steps: dict[int, Step] = {0: (0.1, 5, 0.1), 1: (0.1, 5, 0.1), 2: (4, 6, 0.1)}
    verdict = watched(steps).verdict(2)
    assert verdict is not None
    assert verdict.phase == "data"


def test_a_verdict_reads_as_a_sentence() -> None:
    assert str(Verdict(7, 2.44, "data")) == "2.4x slower than the median, in data"
    assert str(Verdict(7, 1.5, "network")) == "1.5x slower than the median, in network"


# What is not enough


def test_one_worker_alone_is_no_straggler() -> None:
    assert watched({0: USUAL}).verdict(0) is None


def test_a_stranger_is_no_straggler_and_has_no_speed() -> None:
    stragglers = watched({0: USUAL, 1: USUAL})
    assert stragglers.verdict(9) is None
    assert stragglers.speed(9) is None


def test_nothing_is_said_about_a_worker_before_a_few_of_its_steps() -> None:
    stragglers = watched({0: USUAL, 1: USUAL})
    for _ in range(MIN_OBSERVATIONS - 1):
        stragglers.observe(2, 9.0, 9.0, 9.0, samples=8)
        assert stragglers.verdict(2) is None
        assert stragglers.speed(2) is None
    stragglers.observe(2, 9.0, 9.0, 9.0, samples=8)
    assert stragglers.verdict(2) is not None
    assert stragglers.speed(2) is not None


def test_nobody_is_compared_with_a_worker_of_few_steps() -> None:
    stragglers = watched({0: (0, 2, 0)})
    for _ in range(MIN_OBSERVATIONS - 1):
        stragglers.observe(1, 0.0, 1.0, 0.0, samples=8)
        assert stragglers.verdict(0) is None
    stragglers.observe(1, 0.0, 1.0, 0.0, samples=8)
    assert stragglers.verdict(0) is not None


def test_others_that_take_no_time_are_no_measure() -> None:
    assert watched({0: (0, 0, 0), 1: (0, 1, 0)}).verdict(1) is None


# Smoothing


def test_the_first_step_counts_as_it_is_and_later_ones_a_fifth() -> None:
    assert WEIGHT == 0.2
    seconds = [4.0] * MIN_OBSERVATIONS + [8.0, 2.0]
    stragglers = watched({0: (0, 1, 0)})
    for value in seconds:
        stragglers.observe(1, 0.0, value, 0.0, samples=1)
    verdict = stragglers.verdict(1)
    assert verdict is not None
    # By hand: 4 + 0.2 × (8 − 4) = 4.8, then 4.8 + 0.2 × (2 − 4.8) = 4.24.
    assert verdict.ratio == pytest.approx(4.24)


def test_a_worker_that_slows_down_is_named_and_one_that_recovers_is_not() -> None:
    stragglers = watched({0: (0, 1, 0), 1: (0, 1, 0)}, count=50)

    def steps_until(named: bool, seconds: float) -> int:
        for count in range(1, 50):
            stragglers.observe(1, 0.0, seconds, 0.0, samples=1)
            if (stragglers.verdict(1) is not None) == named:
                return count
        raise AssertionError("never")

    # 1 − 0.8ⁿ of the way from 1 to 2 seconds is above the half after 4 steps, not after 3; from
    # 1.5904 back towards 1, 0.4723 of the excess is left after one step.
    assert steps_until(named=True, seconds=2.0) == 4
    assert steps_until(named=False, seconds=1.0) == 1


@given(st.integers(0, 2**32 - 1))
def test_verdicts_agree_with_all_steps_weighed_at_once(seed: int) -> None:
    draw = random.Random(seed)
    history: dict[int, list[Step]] = {}
    stragglers = Stragglers()
    for _ in range(draw.randrange(1, 60)):
        worker = draw.randrange(5)
        step = (draw.uniform(0, 2), draw.uniform(0, 2 + worker), draw.uniform(0, 2))
        history.setdefault(worker, []).append(step)
        stragglers.observe(worker, *step, samples=4)
    known = {
        worker: [ewma([step[phase] for step in steps]) for phase in range(3)]
        for worker, steps in history.items()
        if len(steps) >= MIN_OBSERVATIONS
    }
    for worker in range(5):
        assert_verdict(stragglers.verdict(worker), worker, known)


def assert_verdict(verdict: Verdict | None, worker: int, known: dict[int, list[float]]) -> None:
    others = [phases for rank, phases in known.items() if rank != worker]
    if worker not in known or not others:
        assert verdict is None
        return
    ratio = sum(known[worker]) / statistics.median(sum(phases) for phases in others)
    if ratio < RATIO:
        assert verdict is None
        return
    assert verdict is not None
    lost = [known[worker][i] - statistics.median(p[i] for p in others) for i in range(3)]
    assert verdict.phase == ("data", "compute", "network")[lost.index(max(lost))]
    assert verdict.ratio == pytest.approx(ratio)


# Speed


def test_speed_is_samples_per_second_of_data_and_compute() -> None:
    stragglers = watched({0: (0.5, 1.5, 100.0)}, samples=64)
    assert stragglers.speed(0) == pytest.approx(32.0)


def test_speed_is_smoothed() -> None:
    stragglers = watched({0: (0, 1, 0)}, samples=10)
    stragglers.observe(0, 0.0, 1.0, 0.0, samples=20)
    assert stragglers.speed(0) == pytest.approx(12.0)
    stragglers.observe(0, 0.0, 2.0, 0.0, samples=4)
    assert stragglers.speed(0) == pytest.approx(10.0)


def test_a_step_without_samples_says_nothing_about_the_speed() -> None:
    stragglers = watched({0: (0, 1, 0)}, samples=10)
    stragglers.observe(0, 0.0, 1.0, 0.0, samples=0)
    stragglers.observe(0, 0.0, 1.0, 0.0, samples=-5)
    assert stragglers.speed(0) == pytest.approx(10.0)
    assert watched({0: USUAL}, samples=0).speed(0) is None


def test_a_step_without_time_says_nothing_about_the_speed() -> None:
    stragglers = watched({0: (0, 1, 0)}, samples=10)
    stragglers.observe(0, 0.0, 0.0, 1.0, samples=10)
    stragglers.observe(0, 0.0, 5e-324, 1.0, samples=10)
    assert stragglers.speed(0) == pytest.approx(10.0)


# Garbage and forgetting


@pytest.mark.parametrize("phase", [0, 1, 2])
@pytest.mark.parametrize("garbage", [-1e-9, -math.inf, math.inf, math.nan])
def test_a_step_with_a_time_that_cannot_be_is_ignored(phase: int, garbage: float) -> None:
    stragglers = watched({0: USUAL, 1: USUAL, 2: (1.0, 3.0, 2.0)})
    before = [(stragglers.verdict(worker), stragglers.speed(worker)) for worker in range(3)]
    data, compute, network = (garbage if index == phase else 5.0 for index in range(3))
    for worker in range(4):
        stragglers.observe(worker, data, compute, network, samples=1)
    assert before == [(stragglers.verdict(w), stragglers.speed(w)) for w in range(3)]


def test_garbage_does_not_count_as_one_of_the_few_steps() -> None:
    stragglers = watched({0: USUAL})
    for _ in range(MIN_OBSERVATIONS):
        stragglers.observe(1, math.nan, 1.0, 1.0, samples=1)
    assert stragglers.speed(1) is None
    assert stragglers.verdict(0) is None


def test_times_whose_sum_overflows_are_ignored() -> None:
    stragglers = watched({0: USUAL, 1: USUAL})
    stragglers.observe(1, 1e308, 1e308, 1e308, samples=1)
    assert stragglers.verdict(1) is None


seconds = st.floats() | st.sampled_from([math.nan, math.inf, -1.0, 0.0, 5e-324, 1e308])


@given(st.lists(st.tuples(st.integers(0, 2), seconds, seconds, seconds, st.integers(0, 2**64 - 1))))
def test_no_input_gives_nan_or_an_endless_speed(
    steps: list[tuple[int, float, float, float, int]],
) -> None:
    stragglers = watched({worker: USUAL for worker in range(3)})
    for worker, data, compute, network, samples in steps:
        stragglers.observe(worker, data, compute, network, samples)
    for worker in range(3):
        speed = stragglers.speed(worker)
        assert speed is not None
        assert 0 <= speed < math.inf
        verdict = stragglers.verdict(worker)
        assert verdict is None or verdict.ratio >= RATIO


def test_a_forgotten_worker_is_compared_with_nobody() -> None:
    stragglers = watched({0: (0, 1, 0), 1: (0, 3, 0)})
    stragglers.forget(0)
    assert stragglers.verdict(1) is None
    assert stragglers.verdict(0) is None
    assert stragglers.speed(0) is None
    stragglers.forget(0)


def test_a_process_that_takes_a_rank_starts_from_nothing() -> None:
    stragglers = watched({0: (0, 1, 0), 1: (0, 3, 0)})
    stragglers.forget(1)
    stragglers.observe(1, 0.0, 1.0, 0.0, samples=1)
    assert stragglers.verdict(1) is None
    for _ in range(MIN_OBSERVATIONS):
        stragglers.observe(1, 0.0, 1.0, 0.0, samples=1)
    assert stragglers.verdict(1) is None


# Lags


def test_the_first_worker_of_a_step_does_not_lag_and_the_others_do() -> None:
    lags = Lags()
    lags.arrived(2, step=0, now=100.0)
    lags.arrived(0, step=0, now=100.5)
    lags.arrived(1, step=0, now=102.0)
    assert [lags.lag_seconds(worker) for worker in range(3)] == [0.5, 2.0, 0.0]


def test_a_lag_is_smoothed_over_the_steps() -> None:
    lags = Lags()
    for step, lag in enumerate([1.0, 2.0, 0.0]):
        lags.arrived(0, step, now=10.0 * step)
        lags.arrived(1, step, now=10.0 * step + lag)
    # By hand: 1, then 1 + 0.2 × 1 = 1.2, then 1.2 × 0.8 = 0.96.
    assert lags.lag_seconds(1) == pytest.approx(0.96)
    assert lags.lag_seconds(0) == 0.0


def test_a_worker_is_late_for_its_own_step_however_far_the_others_are() -> None:
    lags = Lags()
    lags.arrived(0, step=0, now=0.0)
    lags.arrived(0, step=1, now=10.0)
    lags.arrived(1, step=0, now=12.0)
    assert lags.lag_seconds(1) == 12.0


def test_a_worker_that_has_completed_nothing_has_no_lag() -> None:
    assert Lags().lag_seconds(3) == 0.0


def test_a_repeated_or_older_step_changes_nothing() -> None:
    lags = Lags()
    lags.arrived(0, step=0, now=0.0)
    lags.arrived(0, step=1, now=1.0)
    lags.arrived(1, step=1, now=2.0)
    for step in (0, 1):
        lags.arrived(1, step, now=50.0)
    assert lags.lag_seconds(1) == 1.0
    assert lags.waited(0) == 0.0
    assert lags.waited(1) == 1.0


def test_an_update_waited_from_its_first_to_its_last_arrival() -> None:
    lags = Lags()
    for worker, now in ((1, 10.0), (2, 10.25), (0, 13.0)):
        lags.arrived(worker, step=4, now=now)
    assert lags.waited(4) == 3.0


def test_one_worker_or_none_is_no_wait() -> None:
    lags = Lags()
    lags.arrived(0, step=0, now=5.0)
    assert lags.waited(0) == 0.0
    assert lags.waited(1) == 0.0


def test_an_update_did_not_wait_for_a_worker_that_came_too_late() -> None:
    lags = Lags()
    lags.arrived(0, step=0, now=1.0)
    lags.arrived(1, step=0, now=3.0)
    assert lags.waited(0) == 2.0, "asked when the update is made"
    lags.arrived(2, step=0, now=9.0)
    assert lags.lag_seconds(2) == 8.0


def test_a_process_that_takes_a_rank_has_no_lag_and_may_repeat_its_step() -> None:
    lags = Lags()
    lags.arrived(0, step=7, now=0.0)
    lags.arrived(1, step=7, now=4.0)
    lags.forget(1)
    assert lags.lag_seconds(1) == 0.0
    lags.arrived(1, step=7, now=6.0)
    assert lags.lag_seconds(1) == 6.0
    lags.forget(9)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_a_time_that_cannot_be_is_ignored(garbage: float) -> None:
    lags = Lags()
    lags.arrived(0, step=0, now=garbage)
    lags.arrived(1, step=0, now=1.0)
    lags.arrived(2, step=0, now=garbage)
    lags.arrived(0, step=0, now=2.0)
    assert [lags.lag_seconds(worker) for worker in range(3)] == [1.0, 0.0, 0.0]
    assert lags.waited(0) == 1.0


def test_a_clock_that_runs_backwards_makes_no_negative_lag() -> None:
    lags = Lags()
    lags.arrived(0, step=0, now=5.0)
    lags.arrived(1, step=0, now=3.0)
    assert lags.lag_seconds(1) == 0.0
    assert lags.waited(0) == 0.0
    lags.arrived(2, step=0, now=9.0)
    lags.arrived(3, step=0, now=7.0)
    assert lags.waited(0) == 4.0


def test_only_the_latest_steps_are_remembered() -> None:
    lags = Lags()
    for step in range(10 * MAX_STEPS):
        lags.arrived(0, step, now=float(step))
        lags.arrived(1, step, now=step + 0.5)
    assert len(lags._steps) == MAX_STEPS
    waits = [lags.waited(step) for step in range(10 * MAX_STEPS)]
    assert waits == [0.0] * (9 * MAX_STEPS) + [0.5] * MAX_STEPS


def test_whoever_is_behind_all_remembered_steps_lags_at_least_since_the_oldest_of_them() -> None:
    lags = Lags()
    for step in range(MAX_STEPS + 10):
        lags.arrived(0, step, now=float(step))
    lags.arrived(1, step=3, now=100.0)
    # Step 3 was first completed at 3.0; steps 0 to 9 are forgotten, and step 10 came at 10.0.
    assert lags.lag_seconds(1) == 90.0
    assert len(lags._steps) == MAX_STEPS
    lags.arrived(0, step=MAX_STEPS + 10, now=101.0)
    assert lags.lag_seconds(0) == 0.0


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_lags_and_waits_agree_with_the_whole_history(seed: int, num_workers: int) -> None:
    draw = random.Random(seed)
    next_step = dict.fromkeys(range(num_workers), 0)
    came: dict[int, list[tuple[int, float]]] = {}
    lags, now = Lags(), 0.0
    for _ in range(draw.randrange(60)):  # never more steps than are remembered
        worker = draw.randrange(num_workers)
        now += draw.random()
        step, next_step[worker] = next_step[worker], next_step[worker] + 1
        came.setdefault(step, []).append((worker, now))
        lags.arrived(worker, step, now)
    for worker in range(num_workers):
        late = [at - all_[0][1] for all_ in came.values() for w, at in all_ if w == worker]
        assert lags.lag_seconds(worker) == pytest.approx(ewma(late) if late else 0.0)
    for step, all_ in came.items():
        assert lags.waited(step) == all_[-1][1] - all_[0][1]
