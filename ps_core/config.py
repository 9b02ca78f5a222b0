"""Every key can be set in four places; a later one wins:

1. the default in the tables below;
2. a TOML file, whose path is in `SHARDLINE_CONFIG`: a table per section, such as
   `[cluster]` and below it `num_workers = 4`;
3. the environment: `SHARDLINE_<SECTION>_<KEY>`, such as `SHARDLINE_CLUSTER_NUM_WORKERS=4`;
4. a flag of the command, where the key has one.

Commas separate the entries of a list. In the environment, true is `true` or `1` and false is
`false` or `0`; as a flag, true is `--name` and false is `--no-name`. A key that does not exist, and
so any other variable `SHARDLINE_*`, ends the command with the name of the nearest one that does.
Kubernetes sets such variables beside a Service called `shardline`: switch that off in each pod with
`enableServiceLinks: false`.
"""

import argparse
import contextlib
import difflib
import ipaddress
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

from ps_core.errors import ConfigError

PREFIX: Final = "SHARDLINE_"
FILE_VARIABLE: Final = "SHARDLINE_CONFIG"
INF: Final = math.inf

T = TypeVar("T")
LIST = tuple[str, ...]


def _key(
    default: T, help: str, flag: str = "", low: float = -INF, high: float = INF, step: int = 0
) -> T:
    """A field that is a configuration key; its annotation gives the type and the choices."""
    limits = {"low": low, "high": high, "step": step}
    return field(default=default, metadata={"help": help, "flag": flag, **limits})


@dataclass(frozen=True, slots=True)
class JobConfig:
    """What this training run is called and where it writes."""

    id: str = _key("shardline", "Name of the job; another job's workers are refused.", "--job-id")
    seed: int = _key(0, "Seed of the random generators.", "--seed", 0, 2**32 - 1)
    run_dir: str = _key("", "Folder for logs and results; empty: none.", "--run-dir")


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Who takes part."""

    shards: tuple[str, ...] = _key(
        (), "Each shard's `host:port`, in index order; empty: train alone.", "--shard-addresses"
    )
    num_workers: int = _key(1, "Number of workers; at least one is needed.", "--num-workers", 1)
    rank: int = _key(0, "Rank of this worker, below `cluster.num_workers`.", "--rank", 0)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """One shard."""

    index: int = _key(0, "Index of this shard: its position in `cluster.shards`.", "--index", 0)
    host: str = _key("127.0.0.1", "Address to listen on.", "--host")
    port: int = _key(0, "Port to listen on; 0: as in `cluster.shards`.", "--port", 0, 65535)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker."""

    device: str = _key(
        "auto", "Torch device; `auto`: `cuda` if there is one, or `cpu`.", "--device"
    )
    threads: int = _key(0, "Torch threads per process; 0: torch's own choice.", "--threads", 0)
    nonfinite: Literal["error", "skip"] = _key(
        "error", "Gradients with NaN or infinity end the job, or skip the step.", "--nonfinite"
    )


@dataclass(frozen=True, slots=True)
class ConsistencyConfig:
    """What an update waits for."""

    mode: Literal["sync"] = _key("sync", "`sync`: an update waits for every worker.", "--mode")
    deterministic: bool = _key(False, "Add in rank order: runs repeat exactly.", "--deterministic")


@dataclass(frozen=True, slots=True)
class ExchangeConfig:
    """How gradients are collected into buckets, and buckets cut into the parts that are sent."""

    part_bytes: int = _key(2**22, "Bytes of the largest part.", "--part-bytes", 512, 2**23, 512)
    bucket_bytes: int = _key(2**25, "Bytes of gradients ready together.", "--bucket-bytes", 256)


@dataclass(frozen=True, slots=True)
class RpcConfig:
    """Connections between workers and shards."""

    insecure: bool = _key(False, "Allow unprotected TCP beyond loopback.", "--insecure")
    connect_timeout_seconds: float = _key(60.0, "Seconds to wait for a shard to start.", low=0.001)
    call_timeout_seconds: float = _key(15.0, "Seconds a single call may take.", low=0.001)
    keepalive_seconds: float = _key(10.0, "Seconds between pings that find dead peers.", low=0.001)
    reconnect_seconds: float = _key(
        3.0, "Seconds a broken stream has to reopen before its peer counts as lost.", low=0
    )
    drain_seconds: float = _key(5.0, "Seconds for open calls when stopping.", "--drain-seconds", 0)


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    """Who is waited for."""

    join_timeout_seconds: float = _key(
        120.0, "Seconds the first worker waits for all others to join.", "--join-timeout", 0.001
    )


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """The `/metrics` endpoint for Prometheus."""

    host: str = _key("127.0.0.1", "Address the endpoint listens on.")
    port: int = _key(
        0, "Its port; 0: a free one, printed; -1: no endpoint.", "--metrics-port", -1, 65535
    )


@dataclass(frozen=True, slots=True)
class Config:
    """All sections. `load` returns a valid one; after `dataclasses.replace` call `validate`."""

    job: JobConfig = field(default_factory=JobConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    rpc: RpcConfig = field(default_factory=RpcConfig)
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


@dataclass(frozen=True, slots=True)
class _Setting:
    """One key as it is declared above; `kind` is its annotation."""

    key: str
    kind: Any
    default: Any
    help: str
    flag: str
    low: float
    high: float
    step: int

    @property
    def variable(self) -> str:
        return PREFIX + self.key.replace(".", "_").upper()

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def takes(self) -> str:
        """What the key takes, in words."""
        low = f", at least {self.low}" if self.low > -INF else ""
        high = f", at most {self.high}" if self.high < INF else ""
        step = f", a multiple of {self.step}" if self.step else ""
        return (" or ".join(self.choices) or _KINDS[self.kind][0]) + low + high + step


_SECTIONS: Final[dict[str, Any]] = {part.name: part.type for part in fields(Config)}
_SETTINGS: Final = {
    key: _Setting(key, item.type, item.default, **item.metadata)
    for section, kind in _SECTIONS.items()
    for item in fields(kind)
    for key in [f"{section}.{item.name}"]
}
_VARIABLES: Final = {setting.variable: key for key, setting in _SETTINGS.items()}
_BOOLS: Final = {"1": True, "true": True, "0": False, "false": False}
_KINDS: Final[dict[Any, tuple[str, Callable[[str], object]]]] = {
    bool: ("true or false", lambda text: _BOOLS[text.strip().lower()]),
    int: ("a whole number", int),
    float: ("a number", float),
    str: ("text", str),
    LIST: ("a list", lambda text: tuple(map(str.strip, text.split(","))) if text.strip() else ()),
}


def load(
    argv_overrides: Mapping[str, str] = {},
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """A valid configuration: defaults <- TOML <- environment <- overrides (by "section.key").

    The TOML file is `file`, else the path in SHARDLINE_CONFIG, else none; `environ` replaces the
    process environment. ConfigError for an unknown key and for a value that is not allowed.
    """
    environ = os.environ if environ is None else environ
    path = file or Path(environ.get(FILE_VARIABLE, ""))
    values = {} if path == Path() else _read_file(path)
    for variable in environ:
        if variable.startswith(PREFIX) and variable != FILE_VARIABLE:
            key = _VARIABLES[_known(variable, _VARIABLES, "the environment")]
            values[key] = _parse(_SETTINGS[key], environ[variable], variable)
    for key, text in argv_overrides.items():
        setting = _SETTINGS[_known(key, _SETTINGS, "the command line")]
        values[key] = _parse(setting, text, setting.flag or "the command line")
    parts: dict[str, dict[str, object]] = {section: {} for section in _SECTIONS}
    for key, value in values.items():
        section, name = key.split(".")
        parts[section][name] = value
    config = Config(**{section: kind(**parts[section]) for section, kind in _SECTIONS.items()})
    validate(config)
    return config


def _read_file(path: Path) -> dict[str, object]:
    """The keys in the TOML file at `path`, each one known and allowed."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot read the configuration file {path}: {exc}") from exc
    values: dict[str, object] = {}
    for section, table in document.items():
        if isinstance(table, dict) and (table or section in _SECTIONS):
            values.update({f"{section}.{name}": value for name, value in table.items()})
        else:
            values[section] = table
    for key, value in values.items():
        setting = _SETTINGS[_known(key, _SETTINGS, str(path))]
        values[key] = tuple(value) if isinstance(value, list) else value
        _check(setting, values[key], str(path))
    return values


def _known(name: str, names: Iterable[str], where: str) -> str:
    """`name`, if it is one of `names`; else ConfigError with the nearest of them."""
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
    raise ConfigError(f"{name} in {where} is not a configuration key; the nearest is {nearest}")


def _parse(setting: _Setting, text: str, source: str) -> object:
    """The value that `text`, from the environment or a flag, stands for."""
    value: object = text
    # Text that cannot be read stays text, which the check refuses.
    with contextlib.suppress(KeyError, ValueError):
        value = _KINDS.get(setting.kind, _KINDS[str])[1](text)
    _check(setting, value, source)
    return value


def _text(value: object) -> str:
    """The text that `_parse` turns back into `value`."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _check(setting: _Setting, value: object, source: str) -> None:
    """ConfigError unless `value` has the type of the key and lies in its range."""
    if not _allows(setting, value):
        rule = f"must be {setting.takes()}. {setting.help}"
        raise ConfigError(f"{setting.key} = {value!r} ({source}) {rule}")


def _allows(setting: _Setting, value: object) -> bool:
    if setting.choices:
        return value in setting.choices
    if setting.kind == LIST:
        return isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    if not isinstance(value, setting.kind if setting.kind is not float else (float, int)):
        return False
    if isinstance(value, str):
        return bool(value or not setting.default)
    if isinstance(value, bool):
        return setting.kind is bool
    in_range = setting.low <= value <= setting.high and abs(value) < INF
    return in_range and (not setting.step or value % setting.step == 0)


def validate(config: Config) -> None:
    """Check the range of every key, and what keys ask of each other; ConfigError names the key."""
    for setting in _SETTINGS.values():
        _check(setting, attrgetter(setting.key)(config), "given in code")
    shards, rank, workers = config.cluster.shards, config.cluster.rank, config.cluster.num_workers
    for address in shards:
        if _split(address)[1] == 0 or shards.count(address) > 1:
            raise ConfigError(f"cluster.shards: each shard needs its own address, not {address}")
    if rank >= workers:
        raise ConfigError(f"cluster.rank = {rank} must be below cluster.num_workers = {workers}")
    if shards:
        shard_address(config, config.server.index)


def shard_address(config: Config, index: int) -> str:
    """Where shard `index` is reached, `host:port`; ConfigError when there is no such shard."""
    shards = config.cluster.shards
    if not 0 <= index < len(shards):
        raise ConfigError(f"server.index = {index}: cluster.shards has {len(shards)} addresses")
    return shards[index]


def listen_address(config: Config) -> str:
    """Where this shard listens, `host:port`; the port is the one it is reached at, if not set."""
    server = config.server
    return f"{server.host}:{server.port or _split(shard_address(config, server.index))[1]}"


def is_loopback(address: str) -> bool:
    """Whether `host:port` stays on this machine: localhost or a loopback IP, no other name."""
    host, _ = _split(address)
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def check_addresses(config: Config) -> None:
    """ConfigError when unprotected connections would leave this machine without `rpc.insecure`."""
    for address in (*config.cluster.shards, f"{config.server.host}:0"):
        if not config.rpc.insecure and not is_loopback(address):
            raise ConfigError(
                f"{_split(address)[0]} is not a loopback address, and connections are neither "
                "encrypted nor authenticated; on a network that you trust, allow this with "
                "--insecure / SHARDLINE_RPC_INSECURE=1"
            )


def _split(address: str) -> tuple[str, int]:
    """Host and port of `host:port`, where an IPv6 host is in brackets; ConfigError otherwise."""
    match = re.fullmatch(r"(?:\[([\da-fA-F:.]+)\]|([^\s:/\[\]]+)):(\d{1,5})", address, re.ASCII)
    if not match or int(match[3]) > 65535:
        raise ConfigError(
            f"{address!r} (cluster.shards or server.host): not host:port or [IPv6]:port"
        )
    return match[1] or match[2], int(match[3])


def add_flags(parser: argparse.ArgumentParser, keys: Iterable[str]) -> None:
    """Add the flags of `keys` ("section.key", each with a flag) to `parser`."""
    for setting in (_SETTINGS[key] for key in keys):
        assert setting.flag, f"{setting.key} has no flag"
        help = f"{setting.help} [{_text(setting.default) or 'empty'}; {setting.variable}]"
        options: dict[str, Any] = {"dest": setting.key, "help": help.replace("%", "%%")}
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "|".join(setting.choices) or setting.key.partition(".")[2].upper()
        parser.add_argument(setting.flag, **options)


def overrides(namespace: argparse.Namespace) -> dict[str, str]:
    """The keys whose flags were given, as `load` takes them."""
    given = vars(namespace).items()
    return {key: _text(value) for key, value in given if key in _SETTINGS and value is not None}


def to_environment(config: Config) -> dict[str, str]:
    """The variables from which a child loads `config`: those that differ from the defaults."""
    values = ((each, attrgetter(each.key)(config)) for each in _SETTINGS.values())
    return {each.variable: _text(value) for each, value in values if value != each.default}


def inherited_environment() -> dict[str, str]:
    """A copy of this process's environment without any SHARDLINE_* variable."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def documentation() -> str:
    """The page docs/configuration.md: how keys are set, then a table per section."""
    head = "\n| key | environment | flag | takes | default | meaning |\n|" + "---|" * 6 + "\n"
    page = f"# Configuration\n\n{__doc__}\nWritten by `python -m ps_core.config`.\n"
    for section, kind in _SECTIONS.items():
        page += f"\n## {section}\n\n{kind.__doc__}\n{head}"
        for name in (item.name for item in fields(kind)):
            each = _SETTINGS[f"{section}.{name}"]
            codes = (name, each.variable, each.flag, _text(each.default))
            key, *others, default = (f"`{code}`" if code else "" for code in codes)
            page += f"| {' | '.join((key, *others, each.takes(), default, each.help))} |\n"
    return page


if __name__ == "__main__":
    sys.stdout.write(documentation())
