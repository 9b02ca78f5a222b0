"""What an outbox holds, without an event loop."""

from typing import Final

from google.protobuf.message import Message

from ps_core.errors import ShardlineError
from ps_server.outbox import Outbox

_LAST: Final = b"the last one"


def drain(outbox: Outbox) -> list[Message | bytes | ShardlineError | None]:
    """Take out all that the stream would be sent. An error, or None, is its end."""
    outbox.put(_LAST)  # what is there need not be waited for
    taken: list[Message | bytes | ShardlineError | None] = []
    while True:
        item: Message | bytes | ShardlineError | None
        try:
            outbox.get().send(None)
        except StopIteration as returned:
            item = returned.value
        except ShardlineError as error:
            item = error
        if item is _LAST:
            return taken
        taken.append(item)
