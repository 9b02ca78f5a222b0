from hypothesis import given
from hypothesis import strategies as st

from ps_server.liveness import Liveness


def test_a_peer_whose_stream_stays_closed_for_the_grace_time_is_lost() -> None:
    peers = Liveness(grace_seconds=10.0)
    peers.opened(1)
    peers.closed(1, now=100.0)
    assert peers.lost(now=109.9) == []
    assert peers.lost(now=110.0) == [1]


def test_a_lost_peer_is_reported_once() -> None:
    peers = Liveness(grace_seconds=10.0)
    peers.closed(1, now=0.0)
    assert peers.lost(now=10.0) == [1]
    assert peers.lost(now=20.0) == []


def test_a_peer_that_comes_back_in_time_is_not_lost() -> None:
    peers = Liveness(grace_seconds=10.0)
    peers.closed(1, now=0.0)
    peers.opened(1)
    assert peers.lost(now=100.0) == []


def test_coming_back_gives_a_whole_new_grace_time() -> None:
    peers = Liveness(grace_seconds=10.0)
    peers.closed(1, now=0.0)
    peers.opened(1)
    peers.closed(1, now=9.0)
    assert peers.lost(now=18.9) == []
    assert peers.lost(now=19.0) == [1]


def test_closing_again_without_a_stream_in_between_gives_no_more_time() -> None:
    peers = Liveness(grace_seconds=10.0)
    peers.closed(1, now=0.0)
    peers.closed(1, now=9.0)
    assert peers.lost(now=10.0) == [1]


def test_a_peer_that_said_goodbye_is_never_lost() -> None:
    peers = Liveness(grace_seconds=10.0)
    peers.closed(1, now=0.0)
    peers.forget(1)
    assert peers.lost(now=100.0) == []


def test_a_peer_that_never_had_a_stream_is_not_lost() -> None:
    assert Liveness(grace_seconds=0.0).lost(now=100.0) == []


def test_peers_are_lost_one_by_one_and_reported_in_order() -> None:
    peers = Liveness(grace_seconds=10.0)
    for peer, at in ((3, 0.0), (1, 0.0), (2, 5.0)):
        peers.closed(peer, now=at)
    assert peers.lost(now=12.0) == [1, 3]
    assert peers.lost(now=15.0) == [2]


def test_without_grace_a_closed_stream_is_a_lost_peer() -> None:
    peers = Liveness(grace_seconds=0.0)
    peers.closed(4, now=7.0)
    assert peers.lost(now=7.0) == [4]


events = st.tuples(st.sampled_from(["opened", "closed", "forget", "tick"]), st.integers(0, 2))


@given(st.lists(events, max_size=60))
def test_a_peer_is_lost_iff_its_last_word_was_a_close_the_grace_time_ago(
    history: list[tuple[str, int]],
) -> None:
    peers = Liveness(grace_seconds=5.0)
    said: dict[int, list[tuple[str, int]]] = {0: [], 1: [], 2: []}
    for now, (event, peer) in enumerate(history):
        if event == "tick":
            found = peers.lost(float(now))
            assert found == [rank for rank in said if is_late(said[rank], now)]
            for rank in found:
                said[rank].append(("reported", now))
        else:
            said[peer].append((event, now))
            match event:
                case "opened":
                    peers.opened(peer)
                case "closed":
                    peers.closed(peer, float(now))
                case _:
                    peers.forget(peer)


def is_late(said: list[tuple[str, int]], now: int) -> bool:
    """From the whole history: the first of the closes it ends with was 5 seconds ago or more."""
    closed_at = None
    for event, at in reversed(said):
        if event != "closed":
            break
        closed_at = at
    return closed_at is not None and now - closed_at >= 5
