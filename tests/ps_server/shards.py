"""The shards of one job, served over real gRPC by a thread of this process.

with Shards(num_shards=2, num_workers=2) as shards:
    job = HandJob(shards)

Starts at once, where `tests.processes.Fleet` imports torch in every process first.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Final
from unittest.mock import patch

from ps_core.config import load
from ps_core.errors import ShardlineError
from ps_core.settings import Config
from ps_server import server
from ps_server.node import Node
from tests.processes import PATIENCE_SECONDS, free_ports

_SETTINGS: Final[Mapping[str, object]] = {
    "rpc.reconnect_seconds": 60,
    "rpc.drain_seconds": 0.5,
    "membership.join_timeout_seconds": 60,
    "exchange.part_bytes": 512,
}


class Shards:
    """What is composed is what `python -m ps_server` serves; only signals are left out."""

    def __init__(
        self,
        *,
        num_shards: int = 1,
        num_workers: int = 2,
        serve: int | None = None,
        settings: Mapping[str, object] = {},
    ) -> None:
        """`serve`: how many of the shards to serve, the lead first. `settings` are configuration
        keys for all.
        """
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(num_shards)]
        self.failures: list[BaseException | None] = []
        """How each shard has ended."""
        self._num_served = num_shards if serve is None else serve
        self._settings: dict[str, object] = {
            **_SETTINGS,
            "cluster.shards": ",".join(self.addresses),
            "cluster.num_workers": num_workers,
            **settings,
        }
        self._nodes: list[Node] = []
        self._announced = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="shards", daemon=True)

    def __enter__(self) -> Shards:
        self._thread.start()
        for _ in range(self._num_served):
            assert self._announced.acquire(timeout=PATIENCE_SECONDS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(RuntimeError):  # the job has ended, and the event loop with it
            for node in self._nodes:
                self._loop.call_soon_threadsafe(node.stop)
        self.wait()

    def wait(self) -> None:
        """Wait until all shards have ended."""
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with patch.object(server, "_stop_on_signals", self._nodes.append):
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.failures = await asyncio.gather(*map(self._serve_one, range(self._num_served)))

    async def _serve_one(self, index: int) -> BaseException | None:
        try:
            await server._serve(self._config(index), self._announce, "none")
        except ShardlineError as error:
            return error
        return None

    def _announce(self, text: str) -> None:
        self._announced.release()

    def _config(self, index: int) -> Config:
        values = {**self._settings, "server.index": index}
        texts = {key: str(int(v) if isinstance(v, bool) else v) for key, v in values.items()}
        return load(texts, environ={})
