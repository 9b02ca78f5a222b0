import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline.records import EndRecord, JoinRecord, Record, StepRecord, Tail, jsonable, parse

STEP = StepRecord(
    time=1.5,
    rank=1,
    incarnation="a1",
    epoch=2,
    step=12,
    samples=384,
    pushed_bytes=10,
    pulled_bytes=20,
    version=12,
    values={"loss": 0.53},
)
END = EndRecord(
    time=9.0,
    rank=0,
    incarnation="b2",
    steps=12,
    samples=384,
    seconds=7.5,
    pushed_bytes=10,
    pulled_bytes=20,
    version=12,
    reported={"accuracy": 0.98, "note": "fine", "best_epoch": 3, "converged": True},
)
STEP_LINE = (
    '{"kind":"step","time":1.5,"rank":1,"incarnation":"a1","epoch":2,"step":12,"samples":384,'
    '"pushed_bytes":10,"pulled_bytes":20,"version":12,"values":{"loss":0.53}}\n'
)


def test_a_record_is_one_line_of_json() -> None:
    assert STEP.line() == STEP_LINE
    document = json.loads(END.line())
    assert document["kind"] == "end"
    assert document["reported"] == {
        "accuracy": 0.98,
        "note": "fine",
        "best_epoch": 3,
        "converged": True,
    }


@pytest.mark.parametrize("record", [JoinRecord(1.0, 1, "a1"), STEP, END])
def test_a_line_is_read_back_as_the_record(record: Record) -> None:
    assert parse(record.line()) == record


counts = st.integers(0, 2**63)
times = st.floats(0, 1e12)


@given(
    st.builds(
        StepRecord,
        time=times,
        rank=counts,
        incarnation=st.text(),
        epoch=counts,
        step=counts,
        samples=counts,
        pushed_bytes=counts,
        pulled_bytes=counts,
        version=counts,
        values=st.dictionaries(st.text(), st.floats(allow_nan=False)),
    )
)
def test_any_step_survives(record: StepRecord) -> None:
    line = record.line()
    assert line.count("\n") == 1
    assert parse(line) == record


def test_numbers_that_json_cannot_hold_travel_as_words() -> None:
    values = {"loss": math.nan, "up": math.inf, "down": -math.inf}
    line = StepRecord(1.0, 0, "a", 0, 1, 1, 1, 1, 1, values).line()
    document = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert document["values"] == {"loss": "NaN", "up": "Infinity", "down": "-Infinity"}
    record = parse(line)
    assert isinstance(record, StepRecord)
    assert math.isnan(record.values["loss"])
    assert (record.values["up"], record.values["down"]) == (math.inf, -math.inf)
    assert jsonable([{"a": math.inf}]) == [{"a": "Infinity"}]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "3",
        "null",
        '{"kind":"other"}',
        '{"kind":["step"]}',
        STEP_LINE.replace('"rank":1,', ""),
        STEP_LINE.replace('"rank":1', '"rank":"1"'),
        STEP_LINE.replace('"rank":1', '"rank":true'),
        STEP_LINE.replace('"a1"', "1"),
        STEP_LINE.replace('"step":12', '"step":1.5'),
        STEP_LINE.replace('"time":1.5', '"time":null'),
        STEP_LINE.replace("0.53", '"much"'),
        STEP_LINE.replace('{"loss":0.53}', "[]"),
    ],
)
def test_what_is_not_a_record_is_a_value_error(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # JSON's own, or one of ours
        parse(line)


def test_a_tail_reads_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text(STEP.line())
    assert tail.read() == [STEP]
    assert tail.read() == []
    with path.open("a") as file:
        file.write(END.line() + STEP.line())
    assert tail.read() == [END, STEP]


def test_a_half_written_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = STEP.line()
    tail = Tail(path)
    path.write_text(END.line() + line[:40])
    assert tail.read() == [END]
    assert tail.read() == []
    path.write_text(END.line() + line)
    assert tail.read() == [STEP]


@pytest.mark.parametrize("noise", ["garbage\n", "\n", "\x00\xff\n", '{"kind":"later"}\n'])
def test_lines_that_are_not_records_are_skipped_and_counted(tmp_path: Path, noise: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(STEP.line() + noise + END.line(), encoding="latin-1")
    tail = Tail(path)
    assert tail.read() == [STEP, END]
    assert tail.num_skipped == 1
