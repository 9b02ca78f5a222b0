"""The picture `training.png`: how what the workers logged changed from step to step."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Final

from shardline.records import Record, StepRecord

_NAMES: Final = ("loss", "accuracy")
_MAX_LINES: Final = 8  # with more workers, only their mean can be read
_MAX_CHUNKS: Final = 1000  # of a line: the picture has fewer columns


@dataclass(frozen=True, slots=True)
class Curve:
    """Steps, and a value at each."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float) -> None:
        """One more point."""
        self.steps.append(step)
        self.values.append(value)

    def thinned(self) -> "Curve":
        """As much of it as can be seen: the lowest and the highest point of every chunk."""
        size = -(-len(self.steps) // _MAX_CHUNKS)
        if size <= 2:
            return self
        thin = Curve()
        for start in range(0, len(self.steps), size):
            chunk = range(start, min(start + size, len(self.steps)))
            finite = [index for index in chunk if isfinite(self.values[index])] or chunk
            lowest, highest = (find(finite, key=self.values.__getitem__) for find in (min, max))
            for index in sorted({lowest, highest}):
                thin.add(self.steps[index], self.values[index])
        return thin


class Curves:
    """What has been logged so far, of all that is drawn."""

    def __init__(self) -> None:
        self._found: dict[str, dict[int, Curve]] = {name: {} for name in _NAMES}

    def add(self, records: Iterable[Record]) -> None:
        """Take records, each worker's in order."""
        for record in records:
            if isinstance(record, StepRecord):
                for name in self._found.keys() & record.values.keys():
                    curve = self._found[name].setdefault(record.rank, Curve())
                    curve.add(record.step, record.values[name])

    def of(self, name: str) -> Mapping[int, Curve]:
        """By rank, the values that each worker logged as `name`."""
        return self._found.get(name, {})

    def draw(self, path: Path, title: str) -> bool:
        """Draw loss and accuracy, as far as they were logged, to `path`; False if neither was.

        ImportError without matplotlib, OSError when the file cannot be written.
        """
        panels = {name: lines for name in _NAMES if (lines := labelled(self.of(name)))}
        if not panels:
            return False
        from matplotlib.figure import Figure  # only here: it is optional, and slow to load

        figure = Figure(figsize=(7, 3.2 * len(panels)), layout="constrained")
        figure.suptitle(title)
        grid = figure.subplots(len(panels), sharex=True, squeeze=False)
        for axes, (name, lines) in zip(grid[:, 0], panels.items(), strict=True):
            for label, line in lines.items():
                curve, marker = line.thinned(), "." if len(line.steps) < 30 else ""
                axes.plot(curve.steps, curve.values, label=label, linewidth=1, marker=marker)
            axes.set(ylabel=name)
            axes.grid(alpha=0.3)
            axes.legend()
        grid[-1, 0].set(xlabel="step")
        figure.savefig(path, dpi=120)
        return True


def mean(lines: Iterable[Curve]) -> Curve:
    """At each step the mean over all that was logged there."""
    at: dict[int, tuple[float, int]] = {}
    for line in lines:
        for step, value in zip(line.steps, line.values, strict=True):
            total, count = at.get(step, (0.0, 0))
            at[step] = total + value, count + 1
    curve = Curve()
    for step, (total, count) in sorted(at.items()):
        curve.add(step, total / count)
    return curve


def labelled(lines: Mapping[int, Curve]) -> dict[str, Curve]:
    """What to draw: a line per worker, or their mean when there are many."""
    if len(lines) > _MAX_LINES:
        return {f"mean of {len(lines)} workers": mean(lines.values())}
    return {f"worker {rank}": lines[rank] for rank in sorted(lines)}
