"""What is still expected, what ends a wait, and whose word counts when a stream breaks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from ps_core.errors import (
    DataLossError,
    EvictedError,
    JobFailedError,
    JobOverError,
    Preempted,
    ProtocolError,
    ShardlineError,
    ShardUnreachableError,
)
from ps_core.v1.shard_pb2 import Leases, Met, Refused
from ps_worker.inbox import Inbox

PATIENCE_SECONDS = 60.0
PARTS = range(3)


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def waiting(threads: ThreadPoolExecutor, wait: Callable[[], Any]) -> Future[Any]:
    """Let a thread wait; returns once it does, or is about to."""
    begun = threading.Event()

    def run() -> Any:  # noqa: ANN401 - whatever the wait returns
        begun.set()
        return wait()

    future = threads.submit(run)
    assert begun.wait(PATIENCE_SECONDS)
    return future


def arrive(inbox: Inbox, part: int, mark: int) -> bool:
    """A part comes, as a reader thread takes it; False: it was dropped."""
    wanted = inbox.wants(part, mark)
    if wanted:
        inbox.arrived(part, mark)
    return wanted


# -- Parts and their marks -------------------------------------------------------------------------


def test_the_wait_ends_with_the_last_part_and_says_the_lowest_mark(
    inbox: Inbox, threads: ThreadPoolExecutor
) -> None:
    inbox.expect(PARTS, 4)
    wait = waiting(threads, inbox.wait_for_parts)
    assert arrive(inbox, 2, 4)
    assert arrive(inbox, 0, 5)
    assert not wait.done()
    assert inbox.expected == {1}
    assert arrive(inbox, 1, 6)
    assert wait.result(PATIENCE_SECONDS) == 4


def test_an_older_part_than_expected_is_dropped(inbox: Inbox) -> None:
    inbox.expect(PARTS, 4)
    assert not arrive(inbox, 0, 3)
    assert inbox.expected == {0, 1, 2}
    assert arrive(inbox, 0, 4)


def test_a_part_that_has_come_is_not_wanted_again(inbox: Inbox) -> None:
    inbox.expect(PARTS, 4)
    assert arrive(inbox, 0, 4)
    assert not inbox.wants(0, 4)
    assert not inbox.wants(0, 9)


def test_nothing_is_wanted_that_nobody_expects(inbox: Inbox) -> None:
    assert not inbox.wants(0, 9)
    inbox.expect([1], 0)
    assert not inbox.wants(0, 9)


def test_with_nothing_expected_the_wait_is_over_at_once(inbox: Inbox) -> None:
    inbox.expect([], 4)
    assert inbox.wait_for_parts() == 0


def test_every_expectation_begins_anew(inbox: Inbox) -> None:
    inbox.expect(PARTS, 1)
    for part in PARTS:
        assert arrive(inbox, part, 1)
    inbox.expect(PARTS, 2)
    assert inbox.expected == {0, 1, 2}
    assert not arrive(inbox, 0, 1)  # the first answer, repeated
    for part in PARTS:
        assert arrive(inbox, part, 2 + part)
    assert inbox.wait_for_parts() == 2


# -- Meetings --------------------------------------------------------------------------------------


def test_after_a_meeting_that_changes_nothing_no_part_is_expected(
    inbox: Inbox, threads: ThreadPoolExecutor
) -> None:
    inbox.expect(PARTS, 4)
    wait = waiting(threads, inbox.wait_for_meeting)
    inbox.met(Met(step=4))
    assert wait.result(PATIENCE_SECONDS) == Met(step=4)
    assert inbox.expected == frozenset()


def test_parts_that_come_after_the_word_about_them_are_waited_for(
    inbox: Inbox, threads: ThreadPoolExecutor
) -> None:
    inbox.expect(PARTS, 4)
    inbox.met(Met(step=6, refreshed=True))
    assert inbox.wait_for_meeting().step == 6
    wait = waiting(threads, inbox.wait_for_parts)
    assert not arrive(inbox, 0, 5)  # on its way since before the meeting
    for part in PARTS:
        assert not wait.done()
        assert arrive(inbox, part, 6)
    assert wait.result(PATIENCE_SECONDS) == 6


def test_parts_that_come_before_the_word_about_them_are_not_waited_for(inbox: Inbox) -> None:
    inbox.expect(PARTS, 4)
    for part in PARTS:
        assert arrive(inbox, part, 6)
    inbox.met(Met(step=6, refreshed=True))
    assert inbox.expected == frozenset()
    assert inbox.wait_for_parts() == 6


def test_parts_that_came_too_early_are_expected_again(inbox: Inbox) -> None:
    inbox.expect(PARTS, 4)
    assert arrive(inbox, 0, 6)
    assert arrive(inbox, 1, 5)
    inbox.met(Met(step=6, refreshed=True))
    assert inbox.expected == {1, 2}
    assert arrive(inbox, 1, 6)
    assert arrive(inbox, 2, 7)
    assert inbox.wait_for_parts() == 6


def test_a_part_that_is_copied_while_the_meeting_ends_is_expected_again_if_it_is_older(
    inbox: Inbox,
) -> None:
    inbox.expect(PARTS, 4)
    assert inbox.wants(0, 4)
    assert inbox.wants(1, 6)
    inbox.met(Met(step=6, refreshed=True))
    inbox.arrived(0, 4)
    inbox.arrived(1, 6)
    assert inbox.expected == {0, 2}


def test_a_meeting_takes_a_newer_part_in_place_of_one_that_was_a_repeat(inbox: Inbox) -> None:
    inbox.expect(PARTS, 4, meets=True)
    assert arrive(inbox, 0, 4)
    assert not arrive(inbox, 0, 4)
    assert arrive(inbox, 0, 6)
    assert not arrive(inbox, 0, 5)
    for part in (1, 2):
        assert arrive(inbox, part, 6)
    inbox.met(Met(step=6, refreshed=True))
    assert inbox.wait_for_parts() == 6
    assert not inbox.wants(0, 7)  # the meeting is over


def test_a_step_takes_the_first_part_that_is_new_enough(inbox: Inbox) -> None:
    inbox.expect(PARTS, 4)
    assert arrive(inbox, 0, 4)
    assert not arrive(inbox, 0, 6)


def test_each_meeting_is_waited_for_by_itself(inbox: Inbox, threads: ThreadPoolExecutor) -> None:
    inbox.met(Met(step=1))
    assert inbox.wait_for_meeting() == Met(step=1)
    wait = waiting(threads, inbox.wait_for_meeting)
    assert not wait.done()
    inbox.met(Met(step=2))
    assert wait.result(PATIENCE_SECONDS) == Met(step=2)


# -- Leases and refusals ---------------------------------------------------------------------------


def test_leases_come_in_the_order_of_their_requests(
    inbox: Inbox, threads: ThreadPoolExecutor
) -> None:
    wait = waiting(threads, inbox.wait_for_leases)
    inbox.granted(Leases(loader=1))
    inbox.granted(Leases(loader=2))
    assert wait.result(PATIENCE_SECONDS) == Leases(loader=1)
    assert inbox.wait_for_leases() == Leases(loader=2)


def test_a_refusal_belongs_to_the_step_in_progress(inbox: Inbox) -> None:
    inbox.expect(PARTS, 4)
    assert inbox.take_refusal() is None
    inbox.refused(Refused(next_step=6))
    assert inbox.take_refusal() == Refused(next_step=6)
    assert inbox.take_refusal() is None


def test_a_refusal_that_comes_again_does_not_refuse_the_next_step(inbox: Inbox) -> None:
    inbox.expect(PARTS, 4)
    inbox.refused(Refused(next_step=6))
    assert inbox.take_refusal() is not None
    inbox.refused(Refused(next_step=6))  # between the steps
    inbox.expect(PARTS, 7)
    assert inbox.take_refusal() is None
    inbox.refused(Refused(next_step=6))  # in the middle of the next
    assert inbox.take_refusal() is None
    inbox.refused(Refused(next_step=7))
    assert inbox.take_refusal() == Refused(next_step=7)


# -- Being told to end -----------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["wait_for_meeting", "wait_for_leases"])
def test_a_wait_for_others_ends_when_the_process_is_told_to_end(
    inbox: Inbox, threads: ThreadPoolExecutor, wait: str
) -> None:
    told = threading.Event()
    inbox.is_preempted = told.is_set
    future = threads.submit(getattr(inbox, wait))
    told.set()
    assert isinstance(future.exception(PATIENCE_SECONDS), Preempted)


def test_a_step_is_finished_before_the_process_ends(
    inbox: Inbox, threads: ThreadPoolExecutor
) -> None:
    asked = threading.Event()

    def is_preempted() -> bool:
        asked.set()
        return True

    inbox.is_preempted = is_preempted
    inbox.expect(PARTS, 1)
    wait = waiting(threads, inbox.wait_for_parts)
    # Another wait is left, so that enough time has passed for this one to be left as well.
    with pytest.raises(Preempted):
        inbox.wait_for_meeting()
    assert asked.is_set()
    assert not wait.done()
    for part in PARTS:
        arrive(inbox, part, 1)
    assert wait.result(PATIENCE_SECONDS) == 1


@pytest.mark.parametrize("wait", ["wait_for_meeting", "wait_for_leases"])
def test_what_is_there_is_taken_even_by_a_process_that_was_told_to_end(
    inbox: Inbox, wait: str
) -> None:
    inbox.is_preempted = lambda: True
    inbox.met(Met(step=3))
    inbox.granted(Leases())
    assert getattr(inbox, wait)() in (Met(step=3), Leases())


# -- Failures --------------------------------------------------------------------------------------

BROKEN = ShardUnreachableError("no answer from shard 1")
WAITS = ["wait_for_parts", "wait_for_meeting", "wait_for_leases"]


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize(
    "failure",
    [
        BROKEN,
        JobFailedError("worker 1 failed"),
        EvictedError("worker 0 was evicted"),
        DataLossError("shard 1 restarted"),
        JobOverError("the job is complete"),
        ProtocolError("part 7 has 3 bytes"),
    ],
)
def test_a_failure_ends_every_wait(
    inbox: Inbox, threads: ThreadPoolExecutor, wait: str, failure: ShardlineError
) -> None:
    inbox.expect(PARTS, 1)
    future = waiting(threads, getattr(inbox, wait))
    inbox.fail(1, failure)
    assert future.exception(PATIENCE_SECONDS) is failure
    with pytest.raises(type(failure)):
        getattr(inbox, wait)()


def test_what_has_come_before_the_failure_is_still_taken(inbox: Inbox) -> None:
    inbox.expect(PARTS, 1)
    for part in PARTS:
        arrive(inbox, part, 1)
    inbox.met(Met(step=1))
    inbox.granted(Leases(loader=1))
    inbox.fail(1, BROKEN)
    assert inbox.wait_for_meeting() == Met(step=1)
    assert inbox.wait_for_leases() == Leases(loader=1)
    assert inbox.wait_for_parts() == 1


def test_the_first_failure_counts(inbox: Inbox) -> None:
    inbox.fail(1, BROKEN)
    inbox.fail(0, JobFailedError("shard 1 was lost"))
    with pytest.raises(ShardUnreachableError, match=r"^no answer from shard 1$"):
        inbox.wait_for_meeting()


def test_a_symptom_ends_no_wait(inbox: Inbox, threads: ThreadPoolExecutor) -> None:
    wait = waiting(threads, inbox.wait_for_meeting)
    inbox.fail(1, BROKEN, final=False)
    inbox.recovered(1)
    assert not wait.done()
    inbox.met(Met(step=2))
    assert wait.result(PATIENCE_SECONDS) == Met(step=2)


def test_the_reason_that_another_shard_gives_is_told_as_an_error_of_the_symptom_s_kind(
    inbox: Inbox,
) -> None:
    inbox.fail(1, BROKEN, final=False)
    inbox.fail(0, JobFailedError("shard 1 was lost"))
    with pytest.raises(ShardUnreachableError, match=r"^no answer from shard 1: shard 1 was lost$"):
        inbox.wait_for_meeting()


def test_a_reason_of_its_own_is_told_as_it_is_whatever_the_symptom(inbox: Inbox) -> None:
    inbox.fail(1, BROKEN, final=False)
    inbox.fail(1, DataLossError("shard 1 restarted and lost its state"))
    with pytest.raises(DataLossError, match=r"^shard 1 restarted and lost its state$"):
        inbox.wait_for_meeting()


def test_a_stream_that_is_open_again_has_no_symptom_any_more(inbox: Inbox) -> None:
    inbox.fail(1, BROKEN, final=False)
    inbox.recovered(1)
    inbox.fail(0, JobFailedError("worker 2 failed"))
    with pytest.raises(JobFailedError, match=r"^worker 2 failed$"):
        inbox.wait_for_meeting()


def test_a_stream_that_is_open_again_says_nothing_about_another(inbox: Inbox) -> None:
    inbox.fail(1, BROKEN, final=False)
    inbox.fail(0, ShardUnreachableError("no answer from shard 0"), final=False)
    inbox.recovered(0)
    inbox.fail(0, JobFailedError("shard 1 was lost"))
    with pytest.raises(ShardUnreachableError, match="no answer from shard 1: shard 1 was lost"):
        inbox.wait_for_meeting()


# -- Calls beside the streams ----------------------------------------------------------------------


def refused_call(inbox: Inbox, error: ShardlineError, patience_seconds: float) -> None:
    with inbox.explaining(patience_seconds):
        raise error


def test_a_call_that_is_refused_at_the_end_raises_what_the_streams_say(
    inbox: Inbox, threads: ThreadPoolExecutor
) -> None:
    call = threads.submit(refused_call, inbox, BROKEN, PATIENCE_SECONDS)
    inbox.fail(0, JobFailedError("worker 2 failed"))
    assert isinstance(call.exception(PATIENCE_SECONDS), JobFailedError)


def test_a_call_that_nobody_explains_raises_its_own_error(inbox: Inbox) -> None:
    with pytest.raises(ShardUnreachableError, match="no answer from shard 1"):
        refused_call(inbox, BROKEN, 0.01)


def test_other_errors_of_a_call_need_no_explanation(inbox: Inbox) -> None:
    inbox.fail(0, JobFailedError("worker 2 failed"))
    with pytest.raises(ProtocolError):
        refused_call(inbox, ProtocolError("unknown content 9"), PATIENCE_SECONDS)
