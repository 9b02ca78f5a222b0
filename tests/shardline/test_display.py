import io
import os
import pty
import re
from typing import TextIO

import pytest
from rich.console import Console

from shardline.display import (
    LiveScreen,
    PlainScreen,
    duration,
    named,
    pace,
    picture,
    screen_for,
    size,
)
from shardline.progress import Totals, View, WorkerView
from shardline.records import Kept


def view(elapsed_seconds: float = 12.0, num_workers: int = 2, finished: bool = False) -> View:
    workers = tuple(
        WorkerView(rank, 3, 1200 + rank, 4000, 500.0, finished) for rank in range(num_workers)
    )
    values = {"lr": 0.125, "accuracy": 0.91, "loss": 0.4123}
    return View(elapsed_seconds, workers, values, 12_340_000, 5_600)


def console(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def text_of(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_plain_line_tells_everything() -> None:
    stream = io.StringIO()
    PlainScreen(stream).show(view())
    assert stream.getvalue() == (
        "12.0 s  epoch 3  step 1,201  1,000 samples/s  "
        "loss 0.4123  accuracy 0.91  lr 0.125  pushed 12.3 MB  pulled 5.6 kB\n"
    )


def test_plain_lines_come_every_five_seconds_while_somebody_trains() -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream)
    for tenths in range(200):
        screen.show(view(tenths / 10))
    screen.show(view(100.0, finished=True))
    starts = [line.split("  ")[0] for line in stream.getvalue().splitlines()]
    assert starts == ["5.0 s", "10.0 s", "15.0 s"]


def test_plain_tables_are_aligned() -> None:
    stream = io.StringIO()
    PlainScreen(stream).table([("a", "1"), ("long name", "2")])
    assert stream.getvalue() == "a          1\nlong name  2\n"


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


def test_a_broken_stream_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    screen = PlainScreen(Broken())
    screen.note("nobody reads this")
    screen.line("worker 0", "nor this")
    assert capsys.readouterr().err == "shardline: the run goes on without output: nobody reads\n"


def test_the_picture_has_a_row_per_worker() -> None:
    screen = console()
    screen.print(picture(view()))
    lines = text_of(screen).splitlines()
    assert lines[0] == "12.0 s  epoch 3  step 1,201  1,000 samples/s"
    assert re.split(" +", lines[3].strip()) == ["worker", "0", "3", "1,200", "4,000", "500"]
    assert re.split(" +", lines[4].strip()) == ["worker", "1", "3", "1,201", "4,000", "500"]


@pytest.mark.parametrize(
    ("worker", "word"),
    [
        (WorkerView(0, is_starting=True), "starting"),
        (WorkerView(0, step=7, is_starting=True), "starting"),
        (WorkerView(0, step=7), ""),
        (WorkerView(0, step=7, has_finished=True), "finished"),
    ],
)
def test_a_row_says_what_its_worker_is_up_to(worker: WorkerView, word: str) -> None:
    screen = console()
    screen.print(picture(View(1.0, (worker,), {}, 0, 0)))
    cells = text_of(screen).splitlines()[3].split()
    assert cells[6:] == [word] * bool(word)


def test_many_workers_do_not_fill_the_terminal() -> None:
    screen = console()
    screen.print(picture(view(num_workers=100)))
    assert len(text_of(screen).splitlines()) == 2 + 1 + 16 + 1
    assert "… and 84 more" in text_of(screen)


def test_what_processes_write_is_not_markup() -> None:
    screen = console()
    live = LiveScreen(screen)
    live.line("worker 0", "[bold]x[/bold] [/] \x1b[31mred\x1b[0m \x1b[2J")
    live.line("worker 1", "[bold]y[/bold]\a\b")
    live.close()
    assert text_of(screen) == "[worker 0] [bold]x[/bold] [/] red \n[worker 1] [bold]y[/bold]\n"


def test_a_long_line_is_not_broken() -> None:
    screen = console(width=20)
    live = LiveScreen(screen)
    live.line("worker 0", "x" * 50)
    live.close()
    assert text_of(screen) == "[worker 0] " + "x" * 50 + "\n"


def test_a_live_screen_draws_leaves_no_trace_and_ends_with_a_table() -> None:
    screen = console()
    live = LiveScreen(screen)
    live.show(view())
    assert "epoch 3" in text_of(screen)
    live.line("worker 0", "hello")
    live.close()
    live.table([("steps", "12"), ("run directory", "[runs]/x")])
    assert "[worker 0] hello" in text_of(screen)
    assert "[runs]/x" in text_of(screen).splitlines()[-2]


def test_lines_of_a_worker_that_writes_a_lot_are_drawn_together_in_order() -> None:
    screen = console()
    live = LiveScreen(screen)
    live.show(view())
    drawn = text_of(screen).count("samples/s")
    for number in range(5000):
        live.line(f"worker {number % 2}", f"line {number}")
    live.show(view(12.01))
    live.note("a note")
    live.close()
    shown = text_of(screen)
    assert re.findall(r"(\[worker \d\] line \d+|a note)$", shown, re.MULTILINE) == [
        *(f"[worker {number % 2}] line {number}" for number in range(5000)),
        "a note",
    ]
    assert shown.count("samples/s") < 20 * drawn


def test_closing_a_screen_that_never_showed_anything_is_fine() -> None:
    LiveScreen(console()).close()
    PlainScreen(io.StringIO()).close()


def test_a_terminal_gets_the_live_screen() -> None:
    primary, secondary = pty.openpty()
    terminal: TextIO
    with os.fdopen(primary, "rb"), os.fdopen(secondary, "w") as terminal:
        assert isinstance(screen_for(terminal), LiveScreen)
    assert isinstance(screen_for(io.StringIO()), PlainScreen)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (59.94, "59.9 s"), (125, "2:05"), (3725, "1:02:05")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (2.5e6, "2.5 MB"),
        (7e9, "7.0 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_values_come_in_the_order_people_look_for() -> None:
    values: dict[str, Kept] = {"zeta": 1.0, "accuracy": 0.5, "alpha": "text", "loss": 2}
    names = [name for name, _ in named(values)]
    assert names == ["loss", "accuracy", "zeta", "alpha"]
    assert dict(named(values)) == {"zeta": "1", "accuracy": "0.5", "alpha": "text", "loss": "2"}


def test_where_no_samples_are_counted_the_pace_is_in_steps() -> None:
    workers = tuple(WorkerView(rank, step=30, steps_per_second=2.5 - rank) for rank in range(2))
    screen = console()
    screen.print(picture(View(12.0, workers, {}, 0, 0)))
    lines = text_of(screen).splitlines()
    assert lines[0] == "12.0 s  epoch 0  step 30  2.5 steps/s"
    assert re.split(" +", lines[2].strip()) == ["worker", "epoch", "step", "samples", "steps/s"]
    assert re.split(" +", lines[4].strip()) == ["worker", "1", "0", "30", "0", "1.5"]
    totals = Totals(30, 30, 0, 0.0, 0, 0, {}, {}, steps_per_second=2.5)
    assert pace(totals) == ("steps/s", "2.5")
