"""What is put is sent in order; a stream ends well or with the error it was given."""

from __future__ import annotations

import asyncio

import pytest

from ps_core.errors import JobFailedError
from ps_server.outbox import Outbox


def test_messages_come_out_in_order_and_then_the_stream_ends() -> None:
    async def drain() -> list[object]:
        outbox = Outbox()
        outbox.put(b"first")
        outbox.put(b"second")
        outbox.finish()
        return [await outbox.get() for _ in range(3)]

    assert asyncio.run(drain()) == [b"first", b"second", None]


def test_an_error_comes_after_what_was_put_before_it() -> None:
    async def drain() -> object:
        outbox = Outbox()
        outbox.put(b"first")
        outbox.fail(JobFailedError("worker 1 died"))
        first = await outbox.get()
        with pytest.raises(JobFailedError, match="worker 1 died"):
            await outbox.get()
        return first

    assert asyncio.run(drain()) == b"first"


def test_the_first_error_is_the_one_that_counts() -> None:
    outbox = Outbox()
    assert outbox.failure is None
    first = JobFailedError("worker 1 died")
    outbox.fail(first)
    outbox.fail(JobFailedError("worker 2 died"))
    assert outbox.failure is first
