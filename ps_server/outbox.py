"""What waits to be sent on one stream."""

from __future__ import annotations

import asyncio

from google.protobuf.message import Message

from ps_core.errors import ShardlineError

Item = Message | bytes | ShardlineError | None


class Outbox:
    """Messages, or frames encoded already, for one stream. Only touched on the event loop.

    Its length is bounded by the protocol: a peer is owed one answer for each part it has pushed.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Item] = asyncio.Queue()
        self.failure: ShardlineError | None = None
        """What the stream ends with."""

    def put(self, message: Message | bytes) -> None:
        """Send this next."""
        self._queue.put_nowait(message)

    def fail(self, error: ShardlineError) -> None:
        """End the stream with this error, after what was put before."""
        self.failure = self.failure or error
        self._queue.put_nowait(error)

    def finish(self) -> None:
        """End the stream well, after what was put before."""
        self._queue.put_nowait(None)

    async def get(self) -> Message | bytes | None:
        """The next message; None when the stream has ended well. Raises what `fail` was given."""
        item = await self._queue.get()
        if isinstance(item, ShardlineError):
            raise item
        return item
