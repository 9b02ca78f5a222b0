from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from allreduce.passes import Pass, Passes
from allreduce.record import Call, Record
from allreduce.record import encode as encode_record
from allreduce.state import Agreed, adopt, encode
from ps_core.exchange import Arrival, Position, Purpose
from ps_core.leases import PassSpec
from ps_core.point import Point
from ps_core.ranges import Ranges
from ps_core.whereabouts import Whereabouts

NOTHING = Ranges()
counts = st.integers(0, 2**40)
numbers = st.floats(allow_nan=False)
points = st.builds(Point, *[st.integers(0, 2**31)] * 3)
rows = st.dictionaries(st.integers(0, 99), st.lists(numbers, max_size=70), max_size=4)


@st.composite
def ranges(draw: st.DrawFn) -> Ranges:
    edges = sorted(draw(st.sets(counts, max_size=12)))
    return Ranges(range(*pair) for pair in zip(edges[::2], edges[1::2], strict=False))


@st.composite
def passes(draw: st.DrawFn, rank: int) -> Passes:
    made = Passes(rank)
    made.speeds = draw(st.dictionaries(st.integers(0, 99), numbers, max_size=4))
    for loader in draw(st.sets(st.integers(0, 2**20), max_size=4)):
        number = made.num_ended[loader] = draw(st.integers(0, 1000))
        if number:
            made.ended[loader] = draw(points)
        if draw(st.booleans()):
            made.open[loader] = Pass(
                number,
                draw(counts),
                draw(st.integers(1, 1000)),
                draw(st.booleans()),
                draw(points),
                draw(ranges()),
                has_progress=draw(st.booleans()),
            )
    return made


@st.composite
def whereabouts(draw: st.DrawFn) -> Whereabouts:
    made = Whereabouts()
    schedules = draw(st.lists(st.integers(0, 1000), max_size=3).map(tuple))
    made.position = Position(draw(points), schedules, draw(counts), draw(points))
    means = st.lists(numbers, max_size=3).map(tuple)
    made.meetings = draw(st.dictionaries(points, means, max_size=4))
    return made


@st.composite
def states(draw: st.DrawFn) -> Agreed:
    return Agreed(
        draw(passes(rank=0)),
        draw(counts),
        draw(counts),
        draw(rows),
        draw(st.booleans()),
        draw(whereabouts()),
    )


def known(agreed: Agreed) -> tuple[object, ...]:
    """All that is agreed on. What is dealt follows from it, and is not part of it."""
    passes = agreed.passes
    return (
        agreed.round,
        agreed.version,
        dict(agreed.rows),
        agreed.goes_on,
        agreed.whereabouts.position,
        agreed.whereabouts.meetings,
        passes.speeds,
        {loader: count for loader, count in passes.num_ended.items() if count},
        passes.ended,
        {
            loader: (replace(each, deal=None, used=NOTHING), list(iter(each.used)))
            for loader, each in passes.open.items()
        },
    )


@given(states())
def test_another_worker_knows_all_of_it(theirs: Agreed) -> None:
    own = Agreed(Passes(7))
    adopt(own, encode(theirs))
    assert known(own) == known(theirs)
    assert encode(own) == encode(theirs)


@given(states())
def test_a_worker_that_is_behind_forgets_what_it_knew(theirs: Agreed) -> None:
    own = Agreed(Passes(7), round=3, version=2, rows={0: [2.0, 1.0]}, goes_on=True)
    own.passes.speeds[1] = 5.0
    own.passes.request(2**21, PassSpec(10, 2))
    own.whereabouts.met([Arrival(Purpose.MEAN, 1, point=Point(9, 9, 9))], (1.0,))
    adopt(own, encode(theirs))
    assert known(own) == known(theirs)


def test_what_was_said_in_the_last_round_comes_back() -> None:
    said = {rank: encode_record(Record(Call.STEP, 4, samples=rank + 1)) for rank in (3, 5)}
    own = Agreed(Passes(0))
    adopt(own, encode(Agreed(Passes(1), rows=said)))
    assert own.rows == said


def test_it_grows_with_the_gaps_and_not_with_the_samples() -> None:
    made = Passes(0)
    made.open[0] = Pass(0, 10**12, 8, False, Point(), Ranges([range(10**11)]))
    assert len(encode(Agreed(made))) < 100
