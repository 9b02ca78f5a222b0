import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline.ledger import Balance, Cover, Ledger

Range = tuple[int, int]


def line(kind: str, **fields: object) -> bytes:
    return json.dumps({"kind": kind} | fields).encode() + b"\n"


def begun(num_samples: int, dropped: int = 0, loader: int = 0, number: int = 0) -> bytes:
    of = {"loader": loader, "pass": number}
    return line("pass", **of, num_samples=num_samples, dropped=dropped)


def update(
    *ranges: Range,
    step: int,
    state: str = "applied",
    worker: int = 0,
    process: str = "1",
    of: Range | None = (0, 0),
) -> bytes:
    loader, number = of if of is not None else (None, None)
    return line(
        "update",
        time=1.5,
        loader=loader,
        **{"pass": number},
        version=step + 1,
        worker=worker,
        incarnation=process,
        step=step,
        state=state,
        ranges=ranges,
    )


def ended(*abandoned: Range, loader: int = 0, number: int = 0) -> bytes:
    return line("pass_end", loader=loader, **{"pass": number}, abandoned=abandoned)


def worker(event: str, rank: int = 0) -> bytes:
    fields = {"time": 1.5, "incarnation": "1", "reason": "", "step": 3}
    return line("worker", worker=rank, event=event, **fields)


def balance(*lines: bytes) -> Balance:
    ledger = Ledger()
    ledger.read(lines)
    return ledger.balance()


def test_an_empty_ledger_balances() -> None:
    assert balance() == Balance(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_a_pass_of_which_all_is_applied_or_dropped_has_lost_nothing() -> None:
    found = balance(
        begun(100, dropped=4), update((0, 64), step=0), update((64, 96), step=1), ended()
    )
    assert found == Balance(samples_applied=96, passes=1)


def test_what_no_update_and_no_end_accounts_for_is_lost() -> None:
    lines = [begun(100), update((0, 32), step=0), update((64, 96), step=1), ended((96, 98))]
    found = balance(*lines)
    assert found.samples_lost == 32 + 2
    assert found.samples_abandoned == 2


def test_a_pass_that_still_goes_on_has_lost_nothing_yet() -> None:
    assert balance(begun(100), update((0, 32), step=0)).samples_lost == 0
    assert balance(ended()).samples_lost == 0  # of an unknown size


def test_what_is_applied_in_part_is_neither_lost_nor_applied() -> None:
    found = balance(
        begun(64), update((0, 32), step=0), update((32, 64), step=1, state="in_part"), ended()
    )
    assert found == Balance(samples_applied=32, samples_applied_in_part=32, passes=1)


def test_every_further_use_of_a_sample_is_a_repeat() -> None:
    found = balance(
        begun(40),
        update((0, 20), (30, 40), step=0),
        update((10, 30), step=0, worker=1, state="in_part"),
        update((15, 35), step=1),
    )
    # By hand: 10-14 twice, 15-19 three times, 20-29 twice, 30-34 twice.
    assert found.samples_repeated == 5 + 2 * 5 + 10 + 5
    assert (found.samples_applied, found.samples_applied_in_part) == (40, 20)


def test_the_same_position_in_another_pass_is_another_sample() -> None:
    others = [(0, 0), (0, 1), (1, 0)]
    lines = [begun(10, loader=loader, number=number) for loader, number in others]
    lines += [update((0, 10), step=step, of=of) for step, of in enumerate(others)]
    lines += [ended(loader=loader, number=number) for loader, number in others]
    assert balance(*lines) == Balance(samples_applied=30, passes=3)


def test_a_step_is_a_duplicate_only_of_the_same_process_and_pass() -> None:
    first = update((0, 5), step=7)
    others = [
        update((5, 6), step=8),
        update((6, 7), step=7, worker=1),
        update((7, 8), step=7, process="2"),
        update((0, 5), step=7, of=(0, 1)),
        update(step=7, of=None),
    ]
    assert balance(first, *others).updates_duplicated == 0
    assert balance(first, *others, first, first, *others).updates_duplicated == 2 + len(others)


def test_scripts_with_their_own_data_have_steps_and_no_samples() -> None:
    found = balance(update(step=0, of=None), update(step=1, of=None), update(step=0, of=None))
    assert found == Balance(updates_duplicated=1)


def test_comings_and_goings_are_counted() -> None:
    events = ["joined", "joined", "evicted", "joined", "preempted", "finished", "taught"]
    assert balance(*map(worker, events)) == Balance(joins=3, evictions=1)


def test_a_line_that_was_never_finished_is_ignored() -> None:
    lines = [begun(10), update((0, 10), step=0), ended()]
    assert balance(*lines[:2], lines[2][:-1]) == balance(*lines[:2])
    assert balance(*lines[:2], lines[2][:20]) == balance(*lines[:2])


def test_what_later_versions_write_is_ignored() -> None:
    later = json.dumps(json.loads(begun(10)) | {"more": [1]}).encode() + b"\n"
    assert balance(line("weather", ranges="sunny"), later) == Balance(passes=1)


@pytest.mark.parametrize(
    "malformed",
    [
        b"\n",
        b"{\n",
        b"3\n",
        b"[]\n",
        b"null\n",
        b'"kind"\n',
        b"\xff\n",
        b"{}\n",
        line("pass", loader=0),
        begun(-1),
        begun(10, number=True),
        line("pass", loader=0, **{"pass": 0}, num_samples="10", dropped=0),
        update((5, 3), step=0),
        update((-1, 3), step=0),
        update(step=0, state="perhaps"),
        update(step=-1),
        update(step=0).replace(b'"1"', b"1"),
        update(step=0).replace(b"[]", b"[[1]]"),
        update(step=0).replace(b"[]", b"[[1, 2, 3]]"),
        update(step=0).replace(b"[]", b"null"),
        ended().replace(b"[]", b"[3]"),
        line("worker", worker=0),
        line("worker", worker=0, event=[]),
    ],
)
def test_a_malformed_line_is_counted_and_changes_nothing_else(malformed: bytes) -> None:
    assert balance(malformed) == Balance(malformed_ledger_lines=1)
    good = [begun(10), update((0, 9), step=1), ended()]
    assert balance(good[0], malformed, *good[1:]) == Balance(
        samples_lost=1, samples_applied=9, passes=1, malformed_ledger_lines=1
    )


def test_a_billion_samples_are_no_more_work_than_ten() -> None:
    half = 500_000_000
    lines = [begun(2 * half), update((0, half), step=0), update((half, 2 * half), step=1), ended()]
    assert balance(*lines) == Balance(samples_applied=2 * half, passes=1)


# The same, computed with sets of all positions

positions = st.integers(0, 30)
ranges = st.tuples(positions, positions).map(lambda ends: (min(ends), max(ends)))
SIZE = 31


@given(st.lists(ranges))
def test_a_cover_knows_what_is_in_it_and_how_often(added: list[Range]) -> None:
    cover, expected = Cover(), [position for each in added for position in range(*each)]
    for start, stop in added:
        cover.add(start, stop)
    assert len(cover) == len(set(expected))
    assert cover.num_added == len(expected)
    assert cover.num_repeated == len(expected) - len(set(expected))


@dataclass(frozen=True)
class Use:
    of: Range | None
    worker: int
    process: str
    step: int
    state: str
    ranges: Sequence[Range] = field(default_factory=list)

    @property
    def positions(self) -> list[tuple[Range | None, int]]:
        return [(self.of, position) for each in self.ranges for position in range(*each)]

    def line(self) -> bytes:
        return update(
            *self.ranges,
            step=self.step,
            state=self.state,
            worker=self.worker,
            process=self.process,
            of=self.of,
        )


pass_ids = st.tuples(st.integers(0, 1), st.integers(0, 1))
uses = st.builds(
    Use,
    of=pass_ids,
    worker=st.integers(0, 1),
    process=st.sampled_from(["1", "2"]),
    step=st.integers(0, 3),
    state=st.sampled_from(["applied", "in_part"]),
    ranges=st.lists(ranges, max_size=3),
)
own_data = st.builds(
    Use,
    of=st.none(),
    worker=st.integers(0, 1),
    process=st.just("1"),
    step=st.integers(0, 3),
    state=st.just("applied"),
)
ends = st.dictionaries(pass_ids, st.lists(ranges, max_size=2))


def num_different(uses: Iterable[Use], state: str) -> int:
    return len({position for use in uses if use.state == state for position in use.positions})


@given(st.lists(uses | own_data), ends, st.integers(0, 3))
def test_any_ledger_balances_as_sets_of_positions_do(
    used: list[Use], ended_passes: dict[Range, list[Range]], dropped: int
) -> None:
    opened = [(loader, number) for loader in (0, 1) for number in (0, 1)]
    lines = [begun(SIZE, dropped, *of) for of in opened]
    lines += [use.line() for use in used]
    lines += [ended(*left, loader=of[0], number=of[1]) for of, left in ended_passes.items()]
    found = balance(*lines)

    uses_of_samples = [position for use in used for position in use.positions]
    abandoned = {
        (of, position)
        for of, left in ended_passes.items()
        for each in left
        for position in range(*each)
    }
    accounted = set(uses_of_samples) | abandoned
    keys = [(use.of, use.worker, use.process, use.step) for use in used]
    assert found == Balance(
        samples_lost=len(ended_passes) * (SIZE - dropped)
        - len([position for position in accounted if position[0] in ended_passes]),
        samples_repeated=len(uses_of_samples) - len(set(uses_of_samples)),
        samples_applied=num_different(used, "applied"),
        samples_applied_in_part=num_different(used, "in_part"),
        samples_abandoned=len(abandoned),
        updates_duplicated=len(keys) - len(set(keys)),
        passes=len(opened),
    )
