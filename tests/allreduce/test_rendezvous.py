"""Workers that find each other through a real store, all in threads of one process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from allreduce import rendezvous
from allreduce.rendezvous import Member, Rendezvous, missing, newest, replica_of, whole
from allreduce.store import Keeper, kept_here
from ps_core.config import load
from ps_core.errors import (
    ConfigError,
    DataLossError,
    EvictedError,
    JobFailedError,
    JobOverError,
    JoinTimeoutError,
)
from ps_core.exchange import new_incarnation
from ps_core.listening import listen
from tests.allreduce.together import (
    PATIENCE_SECONDS,
    Worker,
    num_threads_and_sockets,
    outcomes,
    together,
    wait_until,
)
from tests.processes import free_ports

NOT_YET_SECONDS = 0.3
"""How long a test looks at something that does not happen."""
SLOW: dict[str, Any] = {"membership.heartbeat_floor_seconds": 600, "allreduce.timeout_seconds": 600}
"""Only what is said counts, not how long anybody is silent."""


class Meeting:
    """The workers of one job."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.keeper = Keeper(listen("127.0.0.1:0"))

    def worker(self, rank: int, num_workers: int = 3, **settings: Any) -> Rendezvous:  # noqa: ANN401 - any key's
        replica = settings.pop("replica", None)
        keys = {
            "cluster.rendezvous": f"127.0.0.1:{self.keeper.port}",
            "cluster.rank": rank,
            "cluster.num_workers": num_workers,
            "cluster.max_workers": 8,
            "membership.heartbeat_seconds": 0.05,
            **settings,
        }
        environ = {f"SHARDLINE_{key.replace('.', '_').upper()}": str(v) for key, v in keys.items()}
        made = Rendezvous(load(environ=environ), f"device of {rank}", new_incarnation(), replica)
        self._stack.callback(made.close)
        return made

    def workers(self, num_workers: int, **settings: Any) -> list[Rendezvous]:  # noqa: ANN401 - any key's
        return [self.worker(rank, num_workers, **settings) for rank in range(num_workers)]

    def met(self, num_workers: int, **settings: Any) -> list[Rendezvous]:  # noqa: ANN401 - any key's
        """Members of the first generation."""
        made = self.workers(num_workers, **settings)
        together(*(each.meet for each in made))
        return made


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    with ExitStack() as stack:
        yield Meeting(stack)


def ranks(*members: Rendezvous) -> set[tuple[int, tuple[int, ...]]]:
    """Generation and members that each knows; one if all agree."""
    return {(each.generation, each.ranks) for each in members}


def waits(worker: Worker) -> bool:
    worker.join(NOT_YET_SECONDS)
    return worker.is_alive()


# -- Pure ------------------------------------------------------------------------------------------


def member(rank: int, token: str) -> Member:
    return Member(rank, 100 + rank, token, "cpu")


def test_a_member_comes_back_from_its_text() -> None:
    given = Member(3, 4711, "token", "cuda GPU-1 2")
    assert Member.parse(str(given)) == given


def test_who_came_last_under_a_rank_counts() -> None:
    old, other, new = member(1, "old"), member(0, "other"), member(1, "new")
    assert newest([old, other, new]) == {0: other, 1: new}


def test_waited_for_is_who_has_not_come_is_not_replaced_and_not_gone() -> None:
    expected = [member(rank, f"{rank}") for rank in range(4)]
    arrived = newest([member(0, "0"), member(1, "another process")])
    assert missing(expected, arrived, ["3", "who is this"]) == [expected[2]]


def test_a_replica_counts_only_with_all_its_stages() -> None:
    assert [replica_of(rank, 3) for rank in (0, 2, 3)] == [range(3), range(3), range(3, 6)]
    crew = [member(rank, "") for rank in (0, 1, 3, 4, 5)]
    assert whole(crew, 3) == crew[2:]
    assert whole(crew, 1) == crew


# -- The first generation --------------------------------------------------------------------------


def test_the_first_generation_waits_for_all(meeting: Meeting) -> None:
    first, second, third = meeting.workers(3)
    waiting = [Worker(each.meet) for each in (first, third)]
    assert all(waits(each) for each in waiting)
    second.meet()
    assert [each.outcome() for each in waiting] == [None, None]
    assert ranks(first, second, third) == {(1, (0, 1, 2))}
    assert [each.device for each in first.members] == [f"device of {rank}" for rank in range(3)]


def test_who_has_not_come_in_time_is_named(meeting: Meeting) -> None:
    first, _, third, _ = meeting.workers(4, **{"membership.join_timeout_seconds": 0.4})
    for error in outcomes(first.meet, third.meet):
        assert isinstance(error, JoinTimeoutError)
        assert str(error).startswith("workers 1, 3 have not come within 0 s")


def test_another_attempt_begins_from_nothing(meeting: Meeting) -> None:
    (first,) = meeting.met(1)
    first.fail("it has failed before")
    again = meeting.worker(0, 1, **{"cluster.attempt": 1})
    again.meet()
    assert (again.generation, again.failure()) == (1, "")


def test_what_the_first_worker_says_all_agree_on(meeting: Meeting) -> None:
    first, second = meeting.workers(2)
    assert first.agree("job", b"\x00\xffmine") == b"\x00\xffmine"
    assert second.agree("job", b"theirs") == b"\x00\xffmine"
    assert second.agree("other", b"theirs") == b"theirs"


def test_somebody_hears_what_another_tells(meeting: Meeting) -> None:
    first, second = meeting.workers(2)
    listening = Worker(lambda: second.hear("place", PATIENCE_SECONDS))
    assert not first.knows("place")
    first.tell("place", b"\x00here")
    assert listening.outcome() == b"\x00here"
    assert second.knows("place")
    with pytest.raises(JobFailedError, match=r"no worker has told the weather within 0\.1 s"):
        first.hear("weather", 0.1)


def test_the_workers_of_a_replica_meet_among_themselves(meeting: Meeting) -> None:
    settings = {"pipeline.stages": 2, "membership.join_timeout_seconds": 0.4}
    crew = [meeting.worker(rank, 4, replica=rank // 2, **settings) for rank in range(4)]
    together(crew[2].meet, crew[3].meet)
    assert ranks(crew[2], crew[3]) == {(1, (2, 3))}
    together(crew[0].meet, crew[1].meet)
    assert ranks(crew[0], crew[1]) == {(1, (0, 1))}
    crew[2].leave()
    with pytest.raises(JoinTimeoutError, match="workers 2 have not come"):
        crew[3].meet()  # all stages are needed in every generation


# -- The next ones ---------------------------------------------------------------------------------


def test_survivors_go_on_without_one_that_is_known_to_be_gone(meeting: Meeting) -> None:
    first, second, third = meeting.met(3, **SLOW)
    waiting = [Worker(each.meet) for each in (first, second)]
    assert all(waits(each) for each in waiting), "it may come"
    meeting.keeper.ended(third.me.rank, third.me.pid)
    assert [each.outcome() for each in waiting] == [None, None]
    assert ranks(first, second) == {(2, (0, 1))}


def test_rank_0_may_be_gone_too(meeting: Meeting) -> None:
    first, second, third = meeting.met(3, **SLOW)
    first.leave()
    together(second.meet, third.meet)
    assert ranks(second, third) == {(2, (1, 2))}


def test_survivors_go_on_without_one_whose_heart_has_stopped(meeting: Meeting) -> None:
    settings = {**SLOW, "membership.heartbeat_floor_seconds": 0.5}
    first, second, third = meeting.met(3, **settings)
    third.close()
    together(first.meet, second.meet)
    assert ranks(first, second) == {(2, (0, 1))}


def test_one_whose_heart_beats_is_waited_for(meeting: Meeting) -> None:
    settings = {**SLOW, "membership.heartbeat_floor_seconds": 1.0}
    first, second = meeting.met(2, **settings)
    waiting = Worker(first.meet)
    waiting.join(1.5)
    assert waiting.is_alive()
    second.meet()
    assert waiting.outcome() is None
    assert ranks(first, second) == {(2, (0, 1))}


def test_who_keeps_the_others_waiting_for_too_long_is_evicted(meeting: Meeting) -> None:
    settings = {**SLOW, "allreduce.timeout_seconds": 0.4}
    first, second, third = meeting.met(3, **settings)
    together(first.meet, second.meet)
    assert ranks(first, second) == {(2, (0, 1))}
    with pytest.raises(EvictedError, match=r"have gone on without this one.*timeout_seconds"):
        third.meet()


def test_leavers_are_not_waited_for(meeting: Meeting) -> None:
    first, second, third = meeting.met(3, **SLOW)
    together(partial(first.meet, (1,)), partial(third.meet, (1,)))
    assert ranks(first, third) == {(2, (0, 2))}
    with pytest.raises(EvictedError):
        second.meet()


def test_generations_follow_one_another(meeting: Meeting) -> None:
    first, second, third = meeting.met(3, **SLOW)
    for generation in (2, 3):
        together(first.meet, second.meet, third.meet)
        assert ranks(first, second, third) == {(generation, (0, 1, 2))}
    third.leave()
    together(first.meet, second.meet)
    second.leave()
    first.meet()
    assert ranks(first) == {(5, (0,))}


# -- Guests ----------------------------------------------------------------------------------------


def test_a_guest_is_seen_and_let_in(meeting: Meeting) -> None:
    first, second = meeting.met(2, **SLOW)
    assert not first.has_guest()
    guest = meeting.worker(5, 2, **SLOW)
    waiting = Worker(guest.meet)
    wait_until(first.has_guest, "the guest is seen")
    assert waits(waiting), "it has not got the values of the job"
    together(first.meet, second.meet)
    assert waiting.outcome() is None
    assert ranks(first, second, guest) == {(2, (0, 1, 5))}
    assert not first.has_guest()


def test_a_guest_that_comes_too_late_is_let_in_the_next_time(meeting: Meeting) -> None:
    first, second = meeting.met(2, **SLOW)
    together(first.meet, second.meet)
    guest = meeting.worker(2, 2, **SLOW)
    waiting = Worker(guest.meet)
    wait_until(second.has_guest, "the guest has skipped what is sealed")
    together(first.meet, second.meet)
    assert waiting.outcome() is None
    assert ranks(first, second, guest) == {(3, (0, 1, 2))}


def test_another_process_takes_the_place_of_one_of_its_rank(meeting: Meeting) -> None:
    first, second = meeting.met(2, **SLOW)
    again = meeting.worker(1, 2, **SLOW)
    together(first.meet, again.meet)
    assert ranks(first, again) == {(2, (0, 1))}
    assert first.members[1] == again.me != second.me
    with pytest.raises(EvictedError):
        second.meet()


def test_when_all_are_gone_a_guest_is_told_that_the_values_are_lost(meeting: Meeting) -> None:
    members = meeting.met(2, **SLOW)
    waiting = Worker(meeting.worker(0, 2, **SLOW).meet)
    assert waits(waiting)
    for each in members:
        meeting.keeper.ended(each.me.rank, each.me.pid)
    error = waiting.outcome()
    assert isinstance(error, DataLossError)
    assert "no worker is left that has the job's parameters" in str(error)


def test_a_guest_waits_as_long_as_one_survivor_has_come(meeting: Meeting) -> None:
    first, second = meeting.met(2, **{**SLOW, "membership.min_workers": 2})
    waiting = Worker(first.meet)
    wait_until(second.has_guest, "the survivor has come")
    for each in (first, second):
        meeting.keeper.ended(each.me.rank, each.me.pid)
    guest = meeting.worker(3, 2, **SLOW)
    guest.meet()
    assert waiting.outcome() is None
    assert ranks(first, guest) == {(2, (0, 3))}


# -- Stages ----------------------------------------------------------------------------------------

STAGED: dict[str, Any] = {**SLOW, "pipeline.stages": 2}


def test_a_replica_that_has_lost_a_stage_is_left_out_as_a_whole(meeting: Meeting) -> None:
    first, second, third, fourth = meeting.met(4, **STAGED)
    fourth.leave()
    outcome = outcomes(first.meet, second.meet, third.meet)
    assert outcome[:2] == [None, None]
    assert ranks(first, second) == {(2, (0, 1))}
    assert isinstance(outcome[2], EvictedError)
    assert "another stage of its replica" in str(outcome[2])


def test_a_replica_is_let_in_once_all_its_stages_have_come(meeting: Meeting) -> None:
    first, second = meeting.met(2, **STAGED)
    guests = [meeting.worker(rank, 2, **STAGED) for rank in (4, 5)]
    waiting = [Worker(guests[0].meet)]
    assert waits(waiting[0])
    assert not first.has_guest(), "half a model"
    waiting.append(Worker(guests[1].meet))
    wait_until(first.has_guest, "a whole one")
    together(first.meet, second.meet)
    assert [each.outcome() for each in waiting] == [None, None]
    assert ranks(first, second, *guests) == {(2, (0, 1, 4, 5))}


def test_when_every_replica_has_lost_a_stage_the_values_are_lost(meeting: Meeting) -> None:
    first, second, third, fourth = meeting.met(4, **STAGED)
    second.leave()
    third.leave()
    for error in outcomes(first.meet, fourth.meet):
        assert isinstance(error, DataLossError)
        assert "no replica of the model with all its stages" in str(error)


# -- The end ---------------------------------------------------------------------------------------


def test_why_the_job_has_failed_reaches_everybody(meeting: Meeting) -> None:
    first, second, third = meeting.met(3, **SLOW)
    waiting = Worker(first.meet)
    assert first.failure() == ""
    assert not meeting.keeper.has_failed
    second.fail("worker 1: the disk is full")
    third.fail("worker 2: another reason")
    assert meeting.keeper.has_failed
    guest = meeting.worker(7, **SLOW)
    for error in (waiting.outcome(), *outcomes(third.meet, guest.meet)):
        assert isinstance(error, JobFailedError)
        assert str(error) == "the job has failed: worker 1: the disk is full"
    assert third.failure() == "worker 1: the disk is full"


def test_who_comes_after_the_end_is_told_so(meeting: Meeting) -> None:
    first, second = meeting.met(2, **SLOW)
    guest = meeting.worker(2, 2, **SLOW)
    waiting = Worker(guest.meet)
    wait_until(first.has_guest, "it waits already")
    together(first.finish, second.finish)
    for error in (waiting.outcome(), *outcomes(meeting.worker(0, 2, **SLOW).meet)):
        assert isinstance(error, JobOverError)


def test_who_has_finished_waits_until_all_have(meeting: Meeting) -> None:
    first, second = meeting.met(2, **SLOW)
    finishing = Worker(first.finish)
    assert waits(finishing)
    second.finish()
    assert finishing.outcome() is None


def test_who_has_finished_does_not_wait_for_ever(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_FAREWELL_SECONDS", 0.1)
    first, _ = meeting.met(2, **SLOW)
    assert outcomes(first.finish) == [None]


def test_with_too_few_workers_the_job_pauses_until_another_comes(meeting: Meeting) -> None:
    first, second = meeting.met(2, **{**SLOW, "membership.min_workers": 2})
    second.leave()
    waiting = Worker(first.meet)
    assert waits(waiting)
    guest = meeting.worker(4, 2, **SLOW)
    guest.meet()
    assert waiting.outcome() is None
    assert ranks(first, guest) == {(2, (0, 4))}


def test_a_pause_that_is_too_long_fails_the_job(meeting: Meeting) -> None:
    settings = {**SLOW, "membership.min_workers": 2, "membership.pause_timeout_seconds": 0.3}
    first, second = meeting.met(2, **settings)
    second.leave()
    with pytest.raises(JobFailedError, match=r"1 workers are left and 2 are needed.*min_workers"):
        first.meet()


# -- The store -------------------------------------------------------------------------------------


def test_a_rendezvous_that_nobody_keeps_is_an_error(meeting: Meeting) -> None:
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    settings: dict[str, Any] = {"rpc.connect_timeout_seconds": 0.3, "cluster.rendezvous": address}
    with pytest.raises(JobFailedError, match=rf"rendezvous at 127.0.0.1:{port} cannot be reached"):
        meeting.worker(0, **settings)


def test_a_rendezvous_that_is_gone_is_an_error(meeting: Meeting) -> None:
    (first,) = meeting.met(1)
    del meeting.keeper
    gc.collect()
    for call in (first.meet, first.has_guest, first.failure, first.leave, first.finish):
        with pytest.raises(JobFailedError, match="cannot be reached"):
            call()


def test_the_worker_of_rank_0_keeps_the_rendezvous_if_it_is_to() -> None:
    (port,) = free_ports(1)
    keys = {"CLUSTER_RENDEZVOUS": f"127.0.0.1:{port}", "CLUSTER_SERVE_RENDEZVOUS": "true"}

    def kept(**others: object) -> Keeper | None:
        settings = {**keys, "CLUSTER_NUM_WORKERS": 2, **others}
        return kept_here(load(environ={f"SHARDLINE_{k}": str(v) for k, v in settings.items()}))

    assert kept(CLUSTER_RANK=1) is None
    assert kept(CLUSTER_SERVE_RENDEZVOUS="false") is None
    assert kept(CLUSTER_SHARDS="127.0.0.1:7000") is None
    keeper = kept()
    assert keeper is not None
    assert keeper.port == port
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        kept()


def test_nothing_is_left_of_a_rendezvous() -> None:
    with ExitStack() as stack:
        Meeting(stack).met(1)  # what torch keeps for ever
    gc.collect()
    before = num_threads_and_sockets()
    with ExitStack() as stack:
        crew = Meeting(stack).met(2)
        assert all(n > b for n, b in zip(num_threads_and_sockets(), before, strict=True))
        for each in (*crew, *crew):
            each.close()
        del each, crew
    del stack
    gc.collect()
    wait_until(lambda: num_threads_and_sockets() == before, "nothing is left")
