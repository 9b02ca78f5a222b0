"""What is kept until the lead has told its epoch, and what is done with it then."""

from __future__ import annotations

import pytest

from ps_core.errors import ProtocolError
from ps_server.effects import Effect, Lost, Stale
from ps_server.held import Call, Held


def says(number: int) -> Call:
    """A call that can be told from others by its effect."""
    return lambda: [Stale(number)]


def fails() -> list[Effect]:
    raise ProtocolError("worker 1 begins step 9 at version 3")


def test_what_was_kept_is_obeyed_in_order_and_once() -> None:
    held = Held(num_parts=2)
    held.begin(1, 11, says(1))
    assert held.follows(1, says(2))
    held.begin(0, 10, says(3))
    assert held.follows(1, says(4))
    assert held.take() == [Stale(1), Stale(2), Stale(4), Stale(3)]
    assert held.take() == []


def test_no_more_is_kept_than_a_step_has() -> None:
    held = Held(num_parts=2)
    held.begin(1, 11, says(1))
    assert held.follows(1, says(2))
    assert held.follows(1, says(3))
    with pytest.raises(ProtocolError, match="worker 1 pushes more than 2 parts"):
        held.follows(1, says(4))
    assert held.take() == [Stale(1), Stale(2), Stale(3)]


def test_nothing_follows_a_begin_that_was_not_kept() -> None:
    held = Held(num_parts=2)
    held.begin(0, 10, says(1))
    assert not held.follows(1, says(2))
    assert held.take() == [Stale(1)]
    assert not held.follows(0, says(3))


def test_a_worker_that_begins_again_says_everything_again() -> None:
    held = Held(num_parts=2)
    held.begin(1, 11, says(1))
    held.follows(1, says(2))
    held.begin(1, 11, says(3))
    assert held.take() == [Stale(3)]


def test_what_a_worker_that_is_gone_has_said_is_forgotten() -> None:
    held = Held(num_parts=2)
    held.begin(1, 11, says(1))
    held.forget(1)
    held.forget(2)
    assert held.take() == []
    assert not held.follows(1, says(2))


def test_what_must_still_wait_is_kept_again_with_what_follows_it() -> None:
    held = Held(num_parts=2)

    def begin() -> list[Effect]:
        held.begin(1, 11, says(1))
        return []

    def push() -> list[Effect]:
        assert held.follows(1, says(2))
        return []

    held.begin(1, 11, begin)
    held.follows(1, push)
    assert held.take() == []
    assert held.take() == [Stale(1), Stale(2)]


def test_a_worker_that_has_said_something_wrong_is_lost_and_the_others_are_obeyed() -> None:
    held = Held(num_parts=2)
    held.begin(1, 11, says(1))
    held.follows(1, fails)
    held.follows(1, says(2))
    held.begin(0, 10, says(3))
    lost = Lost(1, 11, "worker 1 begins step 9 at version 3")
    assert held.take() == [Stale(1), lost, Stale(3)]
    assert held.take() == []
