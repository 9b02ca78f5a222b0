"""A traceback at the end of what a process writes: the report of a failed run tells it, so that it
need not be shown before.
"""

from typing import Final

_BEGINS: Final = ("Traceback (most recent call last):", '  File "', "  + Exception Group Traceback")
_LINKS: Final = (
    "",
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)


class HeldTraceback:
    """Holds the lines of a traceback back until the process writes something else, or has ended."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names_error = False
        """The line that ends a traceback is there."""

    def add(self, line: str) -> list[str]:
        """The lines to show now that the process has written this one."""
        if line.startswith(_BEGINS):
            self._names_error = False
        elif not self.lines:
            return [line]
        elif not (line.startswith((" ", "\t")) or line in _LINKS):
            if self._names_error:
                return [*self.release(), line]
            self._names_error = True
        self.lines.append(line)
        return []

    def release(self) -> list[str]:
        """The lines that are held, which are not held any more."""
        held, self.lines = self.lines, []
        return held
