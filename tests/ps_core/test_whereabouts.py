"""Where a worker begins that joins, and which meetings it has missed."""

from dataclasses import replace

from ps_core.exchange import Arrival, Position, Purpose
from ps_core.point import Point
from ps_core.whereabouts import Whereabouts


def mean(point: Point) -> Arrival:
    return Arrival(Purpose.MEAN, 0, (1.0,), point=point)


def test_a_worker_joins_in_the_body_that_the_others_have_reached() -> None:
    where = Whereabouts()
    assert where.position.point == Point()
    for point in (Point(1, 0), Point(1, 3), Point(2, 0), Point(2, 1)):
        where.arrived(Arrival(Purpose.EPOCH, 0, point=replace(point, count=5)))
        where.arrived(Arrival(Purpose.EPOCH, 0, point=Point(1, 2)))  # one that is late
        assert where.position.point == max(point, Point(1, 2))


def test_the_latest_step_says_how_often_schedulers_were_stepped() -> None:
    where, body = Whereabouts(), Point(1, 2)
    where.begun(Position(body, (5,), 8, body))
    where.begun(Position(Point(1, 1), (4,), 9, Point(1, 1)))
    assert where.position == Position(body, (5,), 8, body)
    where.arrived(Arrival(Purpose.EPOCH, 9, point=Point(1, 3)))
    assert where.position == Position(Point(1, 3), (5,), 8, body)


def test_what_a_meeting_came_to_is_told_to_who_comes_later() -> None:
    where, first, second = Whereabouts(), mean(Point(1, 0, 1)), mean(Point(1, 0, 2))
    assert where.past(first) is None
    where.met([first, first], (2.5,))
    assert where.past(first) == (2.5,)
    assert where.past(second) is None
    assert where.past(replace(first, purpose=Purpose.CLOSE)) is None


def test_meetings_before_the_first_loop_are_kept_and_those_of_two_bodies() -> None:
    where, before, within = Whereabouts(), mean(Point(0, 0, 1)), mean(Point(1, 0, 1))
    where.met([before], (1.0,))
    where.arrived(within)
    where.met([within], (2.0,))
    where.begun(Position(Point(1, 1), (), 4, Point(1, 1)))
    assert where.past(within) == (2.0,), "a worker may have joined just before"
    where.begun(Position(Point(1, 2), (), 8, Point(1, 2)))
    assert where.past(within) is None
    assert where.past(before) == (1.0,)


def test_a_meeting_that_is_no_call_of_the_script_is_not_kept() -> None:
    where, start = Whereabouts(), mean(Point())
    where.met([start, Arrival(Purpose.EPOCH, 0, point=Point(1, 0, 1))], (1.0,))
    assert where.past(start) is None
    assert where.past(Arrival(Purpose.EPOCH, 0, point=Point(1, 0, 1))) is None
