"""What the launcher shows while a run goes on: live on a terminal, plain lines anywhere else."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Protocol, TextIO

from rich.console import Console, ConsoleOptions, Group
from rich.control import strip_control_codes
from rich.live import Live
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from shardline.progress import Totals, View, WorkerView
from shardline.records import Kept
from shardline.streams import say

_PLAIN_SECONDS: Final = 5.0  # between progress lines
_LIVE_SECONDS: Final = 0.25
_MAX_WAITING_LINES: Final = 1000
_NAME: Final = Style(color="cyan")
_MAX_ROWS: Final = 16  # workers shown one by one
_NAMED_FIRST: Final = ("loss", "accuracy")

Row = tuple[str, str]


class Screen(Protocol):
    """Where a run shows itself. `line` may be called by any thread."""

    def line(self, name: str, text: str) -> None:
        """What a process wrote."""

    def note(self, text: str) -> None:
        """What the launcher itself has to say."""

    def show(self, view: View) -> None:
        """How far the run is; called often, shown now and then."""

    def close(self) -> None:
        """The run is over: `show` is not called any more."""

    def table(self, rows: Sequence[Row]) -> None:
        """What came out."""


def screen_for(stream: TextIO) -> Screen:
    """The screen that fits `stream`."""
    return LiveScreen(Console(file=stream)) if stream.isatty() else PlainScreen(stream)


def duration(seconds: float) -> str:
    """`12.3 s`, `2:05` or `1:02:05`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(num_bytes: float) -> str:
    """`12.3 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def number(value: Kept) -> str:
    """A logged or reported value, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def named(values: Mapping[str, Kept]) -> list[Row]:
    """Names and values, the ones that people look for first."""
    order = sorted(values, key=lambda name: (name not in _NAMED_FIRST, _rank(name)))
    return [(name, number(values[name])) for name in order]


def _rank(name: str) -> int:
    return _NAMED_FIRST.index(name) if name in _NAMED_FIRST else 0


def pace(done: View | WorkerView | Totals) -> Row:
    """How fast it goes, in samples where they were counted."""
    if done.samples or not done.steps_per_second:
        return "samples/s", f"{done.samples_per_second:,.0f}"
    return "steps/s", f"{done.steps_per_second:,.1f}"


def headlines(view: View) -> tuple[str, str]:
    """How far the run is; what was logged and sent."""
    where = (
        f"{duration(view.elapsed_seconds)}",
        f"epoch {view.epoch}",
        f"step {view.step:,}",
        " ".join(reversed(pace(view))),
    )
    values = [f"{name} {value}" for name, value in named(view.values)]
    sent = (f"pushed {size(view.pushed_bytes)}", f"pulled {size(view.pulled_bytes)}")
    return "  ".join(where), "  ".join([*values, *sent])


class PlainScreen:
    """Lines of text. When `stream` breaks, that is said once on standard error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken = False
        self._lock = threading.Lock()
        self._next_seconds = _PLAIN_SECONDS

    def line(self, name: str, text: str) -> None:
        """What a process wrote."""
        self._write(f"[{name}] {text}")

    def note(self, text: str) -> None:
        """What the launcher itself has to say."""
        self._write(text)

    def show(self, view: View) -> None:
        """How far the run is."""
        running = view.step and not all(worker.has_finished for worker in view.workers)
        if running and view.elapsed_seconds >= self._next_seconds:
            self._next_seconds = view.elapsed_seconds + _PLAIN_SECONDS
            self._write("  ".join(headlines(view)))

    def close(self) -> None:
        """The run is over."""

    def table(self, rows: Sequence[Row]) -> None:
        """What came out."""
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self._write(f"{name:<{width}}  {value}")

    def _write(self, text: str) -> None:
        with self._lock:
            if self._broken:
                return
            try:
                self._stream.write(text + "\n")
                self._stream.flush()
            except OSError as exc:  # whoever read has gone, or the disk is full
                self._broken = True
                say(f"shardline: the run goes on without output: {exc}\n")


class _Lines:
    """What processes wrote, for a terminal: fast, since there may be thousands a second."""

    def __init__(self, lines: Sequence[tuple[str, str]]) -> None:
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for name, text in self._lines:
            yield Segment(f"[{name}] ", _NAME)
            if "\x1b" in text:
                yield from Text.from_ansi(text, end="").render(console)
            else:
                yield Segment(strip_control_codes(text))
            yield Segment.line()


class LiveScreen:
    """Progress that stays at the bottom of a terminal, below what the processes write.

    Their lines are drawn together, when `show` is called or many wait: with each the progress below
    is drawn again.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._lines: list[tuple[str, str]] = []  # not drawn yet
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next_seconds = 0.0

    def line(self, name: str, text: str) -> None:
        """What a process wrote."""
        with self._lock:
            self._lines.append((name, text))
            if len(self._lines) >= _MAX_WAITING_LINES:
                self._draw_lines()

    def note(self, text: str) -> None:
        """What the launcher itself has to say."""
        with self._lock:
            self._draw_lines()
            self._console.print(Text(text, style="bold"), soft_wrap=True)

    def show(self, view: View) -> None:
        """How far the run is."""
        with self._lock:
            self._draw_lines()
            if view.elapsed_seconds < self._next_seconds:
                return
            self._next_seconds = view.elapsed_seconds + _LIVE_SECONDS
            self._live.start()
            self._live.update(picture(view), refresh=True)

    def close(self) -> None:
        """The run is over."""
        with self._lock:
            self._draw_lines()
            self._live.stop()

    def table(self, rows: Sequence[Row]) -> None:
        """What came out."""
        table = Table(show_header=False)
        for row in rows:
            table.add_row(*map(Text, row))
        with self._lock:
            self._console.print(table)

    def _draw_lines(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._console.print(_Lines(lines), soft_wrap=True, end="")


def picture(view: View) -> Group:
    """The whole view for a terminal: the headlines, then a row per worker."""
    where, what = headlines(view)
    unit, _ = pace(view)
    table = Table("worker", "epoch", "step", "samples", unit, "", box=None, pad_edge=False)
    for column in table.columns[1:5]:
        column.justify = "right"
    for worker in view.workers[:_MAX_ROWS]:
        table.add_row(*_row(worker, unit))
    hidden = len(view.workers) - _MAX_ROWS
    rest = [Text(f"… and {hidden} more")] if hidden > 0 else []
    return Group(Text(where, style="bold"), Text(what), table, *rest)


def _row(worker: WorkerView, unit: str) -> list[str]:
    own, speed = pace(worker)
    return [
        f"worker {worker.rank}",
        str(worker.epoch),
        f"{worker.step:,}",
        f"{worker.samples:,}",
        speed if own == unit else "",
        "finished" if worker.has_finished else "starting" if worker.is_starting else "",
    ]
