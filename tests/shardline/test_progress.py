import math
from collections.abc import Mapping

import pytest

from shardline.progress import Progress
from shardline.records import EndRecord, JoinRecord, StepRecord


def step(
    rank: int,
    time: float,
    number: int,
    samples: int,
    values: Mapping[str, float] = {},
    process: str = "a",
) -> StepRecord:
    return StepRecord(
        time=time,
        rank=rank,
        incarnation=process,
        epoch=number // 10,
        step=number,
        samples=samples,
        pushed_bytes=100 * number,
        pulled_bytes=200 * number,
        version=number,
        values=values,
    )


def end(rank: int, steps: int, samples: int, process: str = "a", **reported: float) -> EndRecord:
    return EndRecord(
        time=50.0,
        rank=rank,
        incarnation=process,
        steps=steps,
        samples=samples,
        seconds=10.0,
        pushed_bytes=100 * steps,
        pulled_bytes=200 * steps,
        version=steps,
        reported=reported,
    )


def test_before_the_first_record_there_is_nothing_to_show() -> None:
    view = Progress(2, 2).view(elapsed_seconds=1.0, now=100.0)
    assert [worker.rank for worker in view.workers] == [0, 1]
    assert (view.step, view.epoch, view.samples, view.samples_per_second) == (0, 0, 0, 0.0)
    assert view.values == {}


def test_who_has_joined_and_whether_any_has_trained_stay_known_after_a_restart() -> None:
    progress = Progress(2, 2)
    assert (progress.joined, progress.has_trained) == (set(), False)
    progress.add([JoinRecord(1.0, 1, "a")])
    assert (progress.joined, progress.has_trained) == ({1}, False)
    progress.add([step(1, 2.0, 1, 32)])
    assert progress.has_trained
    progress.restarted(1)
    assert (progress.joined, progress.has_trained) == ({1}, True)
    assert progress.finished == set()


def test_workers_are_added_up_and_their_latest_values_averaged() -> None:
    progress = Progress(2, 2)
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
    progress = Progress(2, 2)
    # Rank 0: 10 samples a second for 20 s, then 100 for 10 s; rank 1: always 50.
    progress.add(step(0, t, t, 10 * t) for t in range(21))
    progress.add(step(0, 20.0 + t, 20 + t, 200 + 100 * t) for t in range(1, 11))
    progress.add(step(1, t, t, 50 * t) for t in range(31))
    view = progress.view(30.0, now=30.5)
    assert [worker.samples_per_second for worker in view.workers] == [100.0, 50.0]
    assert view.samples_per_second == 150.0


def test_slow_steps_have_a_speed_too() -> None:
    progress = Progress(1, 1)
    progress.add([step(0, 0.0, 1, 32), step(0, 20.0, 2, 64)])
    assert progress.view(20.0, now=30.0).samples_per_second == pytest.approx(1.6)


def test_a_worker_that_stands_still_or_has_finished_has_no_speed() -> None:
    progress = Progress(1, 1)
    progress.add([step(0, 0.0, 1, 32), step(0, 1.0, 2, 64)])
    assert progress.view(0.0, now=5.9).samples_per_second == 32.0
    assert progress.view(0.0, now=6.1).samples_per_second == 0.0
    progress.add([end(0, 2, 64)])
    assert progress.view(0.0, now=1.0).samples_per_second == 0.0
    assert progress.view(0.0, now=1.0).workers[0].has_finished


def test_totals_know_the_end() -> None:
    progress = Progress(2, 2)
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
    totals = Progress(1, 1).totals()
    assert (totals.steps, totals.samples, totals.samples_per_second) == (0, 0, 0.0)
    assert totals.reported == {}


def test_a_worker_that_joined_by_hand_is_seen_from_its_first_record_on() -> None:
    progress = Progress(1, 4)
    assert [worker.rank for worker in progress.view(0.0, 0.0).workers] == [0]
    progress.add([step(3, 1.0, 5, 50), step(0, 1.0, 5, 20), step(4, 1.0, 9, 1000)])
    view = progress.view(0.0, now=1.0)
    assert [(worker.rank, worker.samples) for worker in view.workers] == [(0, 20), (3, 50)]
    progress.add([end(3, 5, 60)])
    assert progress.finished == {3}
    assert progress.totals().samples == 80


def test_the_processes_of_a_worker_add_up() -> None:
    progress = Progress(2, 2)
    progress.add([step(0, 10.0, 1, 32), step(1, 10.0, 1, 32), step(1, 12.0, 5, 160)])
    progress.restarted(1)
    progress.add([step(1, 20.0, 9, 8, process="b"), step(0, 20.0, 9, 288)])
    progress.add([step(1, 22.0, 11, 72, process="b"), step(1, 30.0, 12, 32, process="c")])
    totals = progress.totals()
    assert totals.samples == 288 + (160 + 72 + 32)
    assert totals.pushed_bytes == 900 + (500 + 1100 + 1200)
    assert totals.pulled_bytes == 1800 + (1000 + 2200 + 2400)
    assert totals.steps == 12
    assert totals.samples_per_second == (288 - 32) / 10 + (160 + 72 + 32 - 32) / 20


def test_what_an_evicted_process_still_writes_does_not_disturb_the_one_in_its_place() -> None:
    progress = Progress(1, 1)
    progress.add([step(0, 1.0, 1, 100), step(0, 2.0, 2, 10, process="b")])
    progress.add([step(0, 3.0, 2, 120), step(0, 4.0, 3, 20, process="b")])
    assert progress.totals().samples == 120 + 20


def test_a_worker_starts_until_its_process_has_written_something() -> None:
    def is_starting() -> bool:
        return progress.view(0.0, now=1.0).workers[0].is_starting

    progress = Progress(1, 1)
    assert is_starting()
    progress.add([step(0, 1.0, 1, 100)])
    assert not is_starting()
    progress.restarted(0)
    assert is_starting()
    progress.add([step(0, 2.0, 2, 10, process="b")])
    assert not is_starting()


def test_steps_count_on_when_a_process_takes_the_place_of_another() -> None:
    progress = Progress(1, 1)
    progress.add([step(0, 1.0, 90, 100), end(0, 3, 30, process="b")])
    assert progress.totals().steps == 90


def test_a_worker_that_begins_again_has_not_finished() -> None:
    progress = Progress(1, 2)
    progress.add([end(1, 3, 30), step(1, 2.0, 4, 10, process="b")])
    assert progress.finished == set()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({0: 0.1, 1: 0.2}, 0.1),
        ({2: 0.3, 1: 0.2}, 0.2),
        ({}, None),
    ],
)
def test_the_lowest_rank_that_has_reported_speaks_for_all(
    said: dict[int, float], expected: float | None
) -> None:
    progress = Progress(3, 3)
    progress.add(end(rank, 1, 1, accuracy=value) for rank, value in said.items())
    progress.add(end(rank, 1, 1) for rank in {0, 1, 2} - said.keys())
    assert progress.totals().reported.get("accuracy") == expected


def test_ranks_that_cannot_exist_are_ignored() -> None:
    progress = Progress(1, 1)
    progress.add([step(7, 1.0, 5, 5), step(-1, 1.0, 5, 5)])
    assert progress.view(0.0, now=1.0).samples == 0


def test_a_loss_that_is_not_a_number_is_shown_as_such() -> None:
    progress = Progress(2, 2)
    progress.add([step(0, 1.0, 1, 1, {"loss": math.nan}), step(1, 1.0, 1, 1, {"loss": 1.0})])
    assert math.isnan(progress.view(0.0, now=1.0).values["loss"])


def test_steps_have_a_speed_where_no_samples_are_counted() -> None:
    progress = Progress(2, 2)
    for rank, pace in enumerate((4.0, 2.0)):
        progress.add(step(rank, t / pace, t, 0) for t in range(21))
    assert progress.view(10.0, now=10.0).steps_per_second == 4.0
    totals = progress.totals()
    assert (totals.samples_per_second, totals.steps_per_second) == (0.0, 4.0)
