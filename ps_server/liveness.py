"""Whose stream has been closed for too long: pure, time is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Liveness:
    """Peers by number. One whose stream closes and is not opened again within the grace time is
    lost.
    """

    grace_seconds: float
    _closed_at: dict[int, float] = field(default_factory=dict)

    def opened(self, peer: int) -> None:
        """The peer has a stream."""
        self._closed_at.pop(peer, None)

    def closed(self, peer: int, now: float) -> None:
        """The peer's stream has ended."""
        self._closed_at.setdefault(peer, now)

    def forget(self, peer: int) -> None:
        """The peer has said goodbye."""
        self._closed_at.pop(peer, None)

    def lost(self, now: float) -> list[int]:
        """The peers that are lost, each reported once."""
        late = [p for p, at in sorted(self._closed_at.items()) if now - at >= self.grace_seconds]
        for peer in late:
            del self._closed_at[peer]
        return late
