"""What the person who runs the script should know, each thing once."""

from __future__ import annotations

from collections.abc import Callable


class Notices:
    """Says every sentence once; where it would be said by every worker, one says it."""

    def __init__(self, say: Callable[[str], None], *, speaks: bool) -> None:
        """`speaks`: this worker is the one."""
        self._say = say
        self._speaks = speaks
        self._said: set[str] = set()

    def once(self, text: str) -> None:
        """Say it, unless it was said."""
        if self._speaks and text not in self._said:
            self._said.add(text)
            self._say(text)
