"""`python -m ps_server`: run one shard, the entry point of a container."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ps_core import __version__
from ps_core.config import add_flags, check_addresses, load, overrides
from ps_core.errors import ShardlineError, printable
from ps_server.server import serve

_FLAGS = (
    "cluster.shards",
    "server.index",
    "server.host",
    "server.port",
    "server.stay",
    "job.id",
    "metrics.port",
    "worker.threads",
    "membership.join_timeout_seconds",
    "rpc.drain_seconds",
    "rpc.insecure",
)

_EXAMPLE = """example, the second of two shards on this machine:
  python -m ps_server --shard-addresses 127.0.0.1:7000,127.0.0.1:7001 --index 1
"""


class _Printable(logging.Formatter):
    """Messages of one line each, also where a worker has sent some of the text."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def main() -> int:
    """Run the shard; 0 when the job is complete or the shard was told to stop."""
    parser = argparse.ArgumentParser(
        prog="python -m ps_server",
        description="Run one shard of a shardline job.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="TOML file with any configuration key")
    parser.add_argument("--version", action="version", version=__version__)
    add_flags(parser, _FLAGS)
    arguments = parser.parse_args()
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        config = load(overrides(arguments), file=arguments.config)
        check_addresses(config)
        serve(config, announce=lambda line: print(line, flush=True))  # noqa: T201 - for people and launchers
    except ShardlineError as error:
        logging.getLogger("ps_server").error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
