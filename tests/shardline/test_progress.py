import math
from collections.abc import Mapping

import pytest

from shardline.progress import Progress
from shardline.records import EndRecord, StepRecord


def step(
    rank: int, time: float, number: int, samples: int, values: Mapping[str, float] = {}
) -> StepRecord:
    return StepRecord(
        time=time,
        rank=rank,
        epoch=number // 10,
        step=number,
        samples=samples,
        pushed_bytes=100 * number,
        pulled_bytes=200 * number,
        version=number,
        values=values,
    )


def end(rank: int, steps: int, samples: int, **reported: float) -> EndRecord:
    return EndRecord(
        time=50.0,
        rank=rank,
        steps=steps,
        samples=samples,
        seconds=10.0,
        pushed_bytes=100 * steps,
        pulled_bytes=200 * steps,
        version=steps,
        reported=reported,
    )


def test_before_the_first_record_there_is_nothing_to_show() -> None:
    view = Progress(2).view(elapsed_seconds=1.0, now=100.0)
    assert [worker.rank for worker in view.workers] == [0, 1]
    assert (view.step, view.epoch, view.samples, view.samples_per_second) == (0, 0, 0, 0.0)
    assert view.values == {}


def test_workers_are_added_up_and_their_latest_values_averaged() -> None:
    progress = Progress(2)
    progress.add(
        [
            step(0, 10.0, 1, 32, {"loss": 9.0}),
            step(1, 10.0, 1, 32, {"loss": 9.0}),
            step(0, 11.0, 12, 64, {"loss": 1.0, "accuracy": 0.5}),
            step(1, 11.0, 11, 48, {"loss": 2.0}),
            step(1, 11.5, 11, 48),
        ]
    )
    view = progress.view(3.0, now=11.5)
    assert (view.step, view.epoch, view.samples) == (12, 1, 112)
    assert (view.pushed_bytes, view.pulled_bytes) == (2300, 4600)
    assert view.values == {"loss": 1.5, "accuracy": 0.5}
    assert [worker.step for worker in view.workers] == [12, 11]


def test_samples_per_second_count_the_last_seconds() -> None:
    progress = Progress(2)
    # Rank 0: 10 samples a second for 20 s, then 100 for 10 s; rank 1: always 50.
    progress.add(step(0, t, t, 10 * t) for t in range(21))
    progress.add(step(0, 20.0 + t, 20 + t, 200 + 100 * t) for t in range(1, 11))
    progress.add(step(1, t, t, 50 * t) for t in range(31))
    view = progress.view(30.0, now=30.5)
    assert [worker.samples_per_second for worker in view.workers] == [100.0, 50.0]
    assert view.samples_per_second == 150.0


def test_slow_steps_have_a_speed_too() -> None:
    progress = Progress(1)
    progress.add([step(0, 0.0, 1, 32), step(0, 20.0, 2, 64)])
    assert progress.view(20.0, now=30.0).samples_per_second == pytest.approx(1.6)


def test_a_worker_that_stands_still_or_has_finished_has_no_speed() -> None:
    progress = Progress(1)
    progress.add([step(0, 0.0, 1, 32), step(0, 1.0, 2, 64)])
    assert progress.view(0.0, now=5.9).samples_per_second == 32.0
    assert progress.view(0.0, now=6.1).samples_per_second == 0.0
    progress.add([end(0, 2, 64)])
    assert progress.view(0.0, now=1.0).samples_per_second == 0.0
    assert progress.view(0.0, now=1.0).workers[0].has_finished


def test_totals_know_the_end() -> None:
    progress = Progress(2)
    progress.add([step(0, 10.0, 1, 40), step(1, 10.0, 1, 20)])
    progress.add([step(0, 14.0, 9, 360, {"loss": 0.5}), step(1, 14.0, 9, 180)])
    assert progress.finished == set()
    progress.add([end(1, 9, 180, accuracy=0.1), end(0, 10, 400, accuracy=0.9)])
    totals = progress.totals()
    assert progress.finished == {0, 1}
    assert (totals.steps, totals.version, totals.samples) == (10, 10, 580)
    assert totals.samples_per_second == (360 - 40) / 4 + (180 - 20) / 4
    assert (totals.pushed_bytes, totals.pulled_bytes) == (1900, 3800)
    assert totals.reported == {"accuracy": 0.9}  # what rank 0 says
    assert totals.values == {"loss": 0.5}


def test_totals_of_a_run_without_steps_are_zero() -> None:
    totals = Progress(1).totals()
    assert (totals.steps, totals.samples, totals.samples_per_second) == (0, 0, 0.0)
    assert totals.reported == {}


def test_ranks_that_do_not_exist_are_ignored() -> None:
    progress = Progress(1)
    progress.add([step(7, 1.0, 5, 5), step(-1, 1.0, 5, 5)])
    assert progress.view(0.0, now=1.0).samples == 0


def test_a_loss_that_is_not_a_number_is_shown_as_such() -> None:
    progress = Progress(2)
    progress.add([step(0, 1.0, 1, 1, {"loss": math.nan}), step(1, 1.0, 1, 1, {"loss": 1.0})])
    assert math.isnan(progress.view(0.0, now=1.0).values["loss"])
