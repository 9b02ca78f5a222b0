"""The picture `training.png`: how what the workers logged changed from step to step."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from shardline.records import Record, StepRecord

Curve = tuple[list[int], list[float]]
"""Steps, and a value at each."""

_NAMES: Final = ("loss", "accuracy")
_MAX_LINES: Final = 8  # with more workers, only their mean can be read


def curves(records: Iterable[Record], name: str) -> dict[int, Curve]:
    """By rank, the values that each worker logged as `name`."""
    found: dict[int, Curve] = {}
    for record in records:
        if isinstance(record, StepRecord) and name in record.values:
            steps, values = found.setdefault(record.rank, ([], []))
            steps.append(record.step)
            values.append(record.values[name])
    return found


def mean(lines: Iterable[Curve]) -> Curve:
    """At each step the mean over the lines that have a value there."""
    at: dict[int, list[float]] = {}
    for steps, values in lines:
        for step, value in zip(steps, values, strict=True):
            at.setdefault(step, []).append(value)
    order = sorted(at)
    return order, [sum(at[step]) / len(at[step]) for step in order]


def labelled(lines: dict[int, Curve]) -> dict[str, Curve]:
    """What to draw: a line per worker, or their mean when there are many."""
    if len(lines) > _MAX_LINES:
        return {f"mean of {len(lines)} workers": mean(lines.values())}
    return {f"worker {rank}": lines[rank] for rank in sorted(lines)}


def draw(records: Iterable[Record], path: Path, title: str) -> bool:
    """Draw loss and accuracy, as far as they were logged, to `path`; False if neither was.

    ImportError without matplotlib, OSError when the file cannot be written.
    """
    records = list(records)
    panels = {name: lines for name in _NAMES if (lines := labelled(curves(records, name)))}
    if not panels:
        return False
    from matplotlib.figure import Figure  # only here: it is optional, and slow to load

    figure = Figure(figsize=(7, 3.2 * len(panels)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)
    for axes, (name, lines) in zip(grid[:, 0], panels.items(), strict=True):
        for label, (steps, values) in lines.items():
            axes.plot(
                steps, values, label=label, linewidth=1, marker="." if len(steps) < 30 else ""
            )
        axes.set(ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    grid[-1, 0].set(xlabel="step")
    figure.savefig(path, dpi=120)
    return True
