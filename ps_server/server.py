"""One shard process: everything is put together here, and taken apart in the reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Coroutine

import torch
from google.protobuf.descriptor import ServiceDescriptor

from ps_core.config import listen_address, shard_address
from ps_core.memory import keep_freed_memory
from ps_core.metrics import start_endpoint
from ps_core.rpc import LEAD_SERVICE, SHARD_SERVICE, build_server
from ps_core.settings import Config
from ps_core.shard_metrics import ShardMetrics
from ps_server.effects import Lost, Ready, Remains, Squares
from ps_server.lead_link import LeadLink
from ps_server.node import Node, Report
from ps_server.office import Office
from ps_server.orders import Failed
from ps_server.service import LeadService, ShardService

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.25


def serve(config: Config, announce: Callable[[str], None]) -> None:
    """Run one shard until its job is complete, unless it is to stay, or it is told to stop. Blocks.

    `announce` is called once, with the address and the metrics URL, when the shard takes calls.
    Raises JobFailedError when the job failed, ConfigError when a port cannot be bound.
    """
    config = config.by_replica()
    keep_freed_memory()
    torch.set_num_threads(config.worker.threads or 1)
    # With the first optimizer torch imports its compiler, which takes seconds: not while the first
    # worker waits to be admitted.
    torch.optim.SGD([torch.zeros(1)])
    endpoint = start_endpoint(
        config.metrics.host, config.metrics.port, shared=config.rpc.shared_ports
    )
    try:
        asyncio.run(_serve(config, announce, endpoint.url if endpoint else "none"))
    finally:
        if endpoint:
            endpoint.close()


async def _serve(config: Config, announce: Callable[[str], None], metrics_url: str) -> None:
    metrics = ShardMetrics(config.server.index, config.consistency.mode)
    node = Node(config, secrets.randbits(63) + 1, metrics)
    servicers: list[tuple[ServiceDescriptor, object]] = [
        (SHARD_SERVICE, ShardService(node, metrics))
    ]
    if config.server.index == 0:
        node.office = Office(node.incarnation, config, node.obey, node.answer, node.resume)
        node.report = _report_to(node.office)
        servicers.append((LEAD_SERVICE, LeadService(node.office, metrics)))
    server = build_server(listen_address(config), servicers, config.rpc)
    told = _stop_on_signals(node)
    async with _background(node, _tick(node)), _link_to_lead(node, config):
        await server.start()
        announce(f"shard {node.index} listens on port {server.port}, metrics at {metrics_url}")
        await node.ended.wait()
        if config.server.stay and node.failure is None:
            log.info("shard %d stays until it is told to stop", node.index)
            await told.wait()
        await server.drain(config.rpc.drain_seconds)
    if node.office is not None:
        node.office.close()
    if node.failure is not None and not node.stopped:
        raise node.failure


def _report_to(office: Office) -> Report:
    def report(message: Squares | Ready | Remains | Lost | Failed) -> None:
        match message:
            case Squares(step, total):
                office.squares(0, step, total)
            case Ready(worker, step):
                office.ready(0, worker, step)
            case Remains():
                office.remains(0, message)
            case Lost(worker, incarnation, reason):
                office.evict(worker, incarnation, "stream", reason)
            case Failed(reason):
                office.fail(reason)

    return report


async def _tick(node: Node) -> None:
    while True:
        await asyncio.sleep(_TICK_SECONDS)
        node.tick()


@contextlib.asynccontextmanager
async def _background(
    node: Node, work: Coroutine[None, None, None], patience_seconds: float = 0
) -> AsyncIterator[None]:
    """Run `work` beside the block; at the end give it `patience_seconds`, then cancel it. An error
    in it ends the node: nothing else would notice.
    """
    task = asyncio.create_task(_guarded(node, work))
    try:
        yield
    finally:
        await asyncio.wait({task}, timeout=patience_seconds)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _guarded(node: Node, work: Coroutine[None, None, None]) -> None:
    try:
        await work
    except Exception as error:
        log.exception("a task ended with an error that nobody foresaw")
        node.crash(error)


def _link_to_lead(node: Node, config: Config) -> contextlib.AbstractAsyncContextManager[None]:
    if node.office is not None:
        return contextlib.nullcontext()
    link = LeadLink(node, shard_address(config, 0), config.rpc)
    node.report = link.report
    # When this shard was told to stop, its word must reach the lead before the link closes.
    return _background(node, link.run(), config.rpc.drain_seconds)


def _stop_on_signals(node: Node) -> asyncio.Event:
    """Set once this process was told to stop."""
    told = asyncio.Event()

    def stop() -> None:
        log.info("shard %d was told to stop", node.index)
        node.stop()
        told.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
        loop.add_signal_handler(signal.SIGINT, stop)
    return told
