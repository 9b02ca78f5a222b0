from ps_server.gate import Gate
from ps_server.policy import Consistency

BOUND_2 = Consistency(quorum=1, bound=2)


def test_an_answer_waits_until_the_slowest_is_near_enough() -> None:
    gate = Gate(BOUND_2)
    gate.wait(0, 5, 7)
    assert gate.open([2, 5]) == []
    assert gate.has(0, 7)
    assert gate.open([3, 5]) == [(0, 5, 7)]
    assert gate.open([3, 5]) == []


def test_without_a_bound_nothing_waits() -> None:
    gate = Gate(Consistency(quorum=1, bound=None))
    gate.wait(0, 500, 7)
    assert gate.open([0, 500]) == [(0, 500, 7)]


def test_when_nobody_is_live_nobody_is_waited_for() -> None:
    gate = Gate(BOUND_2)
    gate.wait(0, 9, 1)
    assert gate.open([]) == [(0, 9, 1)]


def test_those_that_may_go_on_do_and_the_others_wait() -> None:
    gate = Gate(BOUND_2)
    gate.wait(2, 3, 0)
    gate.wait(1, 4, 1)
    gate.wait(0, 5, 0)
    gate.wait(1, 4, 0)
    assert gate.open([2]) == [(1, 4, 1), (1, 4, 0), (2, 3, 0)]
    assert gate.open([3]) == [(0, 5, 0)]


def test_a_part_is_kept_once() -> None:
    gate = Gate(BOUND_2)
    gate.wait(0, 1, 3)
    gate.wait(0, 1, 3)
    assert gate.open([0]) == [(0, 1, 3)]


def test_a_later_step_makes_answers_to_an_earlier_one_void() -> None:
    gate = Gate(BOUND_2)
    gate.wait(0, 8, 1)
    gate.wait(0, 8, 2)
    gate.wait(0, 9, 1)
    assert not gate.has(0, 2)
    assert gate.open([9]) == [(0, 9, 1)]


def test_what_was_sent_is_not_owed_until_the_next_step_or_stream() -> None:
    gate = Gate(BOUND_2)
    gate.sent(0, 3)
    assert [gate.has(0, 3), gate.has(0, 4), gate.has(1, 3)] == [True, False, False]
    gate.renew(0)
    assert not gate.has(0, 3)
    gate.wait(0, 1, 3)
    gate.renew(0)
    assert gate.has(0, 3), "it is still to be sent"


def test_a_worker_that_is_gone_is_answered_no_more() -> None:
    gate = Gate(BOUND_2)
    gate.wait(0, 1, 3)
    gate.sent(0, 4)
    gate.forget(0)
    assert not gate.has(0, 4)
    assert gate.open([9]) == []
