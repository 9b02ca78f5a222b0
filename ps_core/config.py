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

A worker that joins a job by `shardline worker` takes the keys marked *Job.* from the job, checked
as if they were its own, and all others from the places above. Its `job.run_dir` is its own, or else
the job's if that is a folder of this machine and user whose `cluster.json` names the job.

A process that torchrun has started takes its place from torch's own variables (`RANK`,
`WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`), as far as no file or variable above says
otherwise; so does one in a pod where they are set by hand.
"""

import argparse
import contextlib
import difflib
import ipaddress
import logging
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from ps_core.errors import ConfigError, MismatchError, printable
from ps_core.settings import INF, LIST, Config

PREFIX: Final = "SHARDLINE_"
FILE_VARIABLE: Final = "SHARDLINE_CONFIG"
_LONGEST_SETTING: Final = 2**16
"""Characters of a value that another process sends; an environment holds twice that in one."""

log = logging.getLogger(__name__)


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
    of_job: bool

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
_TORCH_VARIABLES: Final = {
    "RANK": "cluster.rank",
    "WORLD_SIZE": "cluster.num_workers",
    "MASTER_ADDR": "",
    "MASTER_PORT": "",
}
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
    values = _from_torch(environ) | ({} if path == Path() else _read_file(path))
    for variable in environ:
        if variable.startswith(PREFIX) and variable != FILE_VARIABLE:
            key = _VARIABLES[_known(variable, _VARIABLES, "the environment")]
            values[key] = _parse(_SETTINGS[key], environ[variable], variable)
    for key, text in argv_overrides.items():
        setting = _SETTINGS[_known(key, _SETTINGS, "the command line")]
        values[key] = _parse(setting, text, setting.flag or "the command line")
    return _without_bound_0(_build(values))


def load_job(settings: Mapping[str, str], address: str) -> Config:
    """The job that `settings`, from the process at `address`, describe; every key that is not of
    the job has its default. Nobody vouches for that process: a variable that `to_settings` does not
    write, or a value that is not allowed, is a MismatchError.
    """
    values = {}
    for variable, text in settings.items():
        setting = _SETTINGS.get(_VARIABLES.get(variable, ""))
        if setting is None or not setting.of_job:
            raise _not_of_a_job(address, f"{variable!r} is not a key that a job decides")
        if len(text) > _LONGEST_SETTING or not text.isprintable():
            raise _not_of_a_job(address, f"{setting.key} is too long, or has control characters")
        with _naming(address):
            values[setting.key] = _parse(setting, text, variable)
    with _naming(address):
        return _build(values)


@contextlib.contextmanager
def _naming(address: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise _not_of_a_job(address, str(error)) from error


def _not_of_a_job(address: str, why: str) -> MismatchError:
    return MismatchError(
        f"what {address} says of its job cannot be used: {printable(why, 300)}; give the address "
        "of a job of this release"
    )


def to_settings(config: Config) -> dict[str, str]:
    """The variables from which `load_job` makes the job of `config`."""
    return {
        variable: text
        for variable, text in to_environment(config).items()
        if _SETTINGS[_VARIABLES[variable]].of_job
    }


def _build(values: Mapping[str, object]) -> Config:
    """A valid configuration of these values, by "section.key", and of defaults."""
    parts: dict[str, dict[str, object]] = {section: {} for section in _SECTIONS}
    for key, value in values.items():
        section, name = key.split(".")
        parts[section][name] = value
    config = Config(**{section: kind(**parts[section]) for section, kind in _SECTIONS.items()})
    validate(config)
    return config


def _from_torch(environ: Mapping[str, str]) -> dict[str, object]:
    """The keys that torch's own variables stand for, where all of them are set."""
    if not all(environ.get(name) for name in _TORCH_VARIABLES):
        return {}
    texts = {key: environ[name] for name, key in _TORCH_VARIABLES.items() if key}
    texts["cluster.local_rank"] = environ.get("LOCAL_RANK", "-1")
    texts["cluster.attempt"] = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    texts["cluster.rendezvous"] = join_address(environ["MASTER_ADDR"], environ["MASTER_PORT"])
    is_torchrun = environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    # torchrun keeps the store, and starts all workers again when one is lost.
    texts["cluster.serve_rendezvous"] = _text(not is_torchrun)
    texts["cluster.elastic"] = _text(not is_torchrun)
    return {key: _parse(_SETTINGS[key], text, "torch's variables") for key, text in texts.items()}


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


def _without_bound_0(config: Config) -> Config:
    """Bounded staleness applies each gradient by itself, so a bound of 0 would not be synchronous
    (N workers make N small updates): what is meant by it is `sync`.
    """
    if (config.consistency.mode, config.consistency.bound) != ("bounded", 0):
        return config
    log.warning("consistency.bound = 0: training is synchronous (mode sync)")
    default = type(config.consistency)().bound
    return replace(config, consistency=replace(config.consistency, mode="sync", bound=default))


def validate(config: Config) -> None:
    """Check the range of every key, and what keys ask of each other; ConfigError names the key."""
    for setting in _SETTINGS.values():
        _check(setting, attrgetter(setting.key)(config), "given in code")
    _validate_cluster(config)
    _validate_consistency(config)


def _validate_cluster(config: Config) -> None:
    cluster = config.cluster
    shards, rank = cluster.shards, cluster.rank
    seen: set[str] = set()
    for address in shards:
        if split_address(address)[1] == 0 or address in seen:
            raise ConfigError(f"cluster.shards: each shard needs its own address, not {address}")
        seen.add(address)
    if 0 < cluster.max_workers < cluster.num_workers:
        raise ConfigError(
            f"cluster.max_workers = {cluster.max_workers} is below cluster.num_workers = "
            f"{cluster.num_workers}"
        )
    stages = config.pipeline.stages
    if cluster.num_workers % stages or cluster.num_ranks % stages:
        raise ConfigError(
            f"pipeline.stages = {stages} must divide the number of workers, {cluster.num_ranks}: "
            "each replica of the model takes that many"
        )
    if rank >= cluster.num_ranks:
        raise ConfigError(
            f"cluster.rank = {rank} must be below the number of workers, {cluster.num_ranks} "
            "(cluster.num_workers, or cluster.max_workers)"
        )
    counted = config.by_replica().cluster.num_workers
    if config.membership.min_workers > counted:
        kind = "cluster.num_workers" if stages == 1 else "the number of replicas"
        raise ConfigError(
            f"membership.min_workers = {config.membership.min_workers} is above {kind} = {counted}"
        )
    if 0 < len(shards) < stages:
        raise ConfigError(
            f"pipeline.stages = {stages} is above the number of shards, {len(shards)}: each stage "
            "has shards of its own"
        )
    if cluster.rendezvous:
        split_address(cluster.rendezvous)
    if shards:
        shard_address(config, config.server.index)


def _validate_consistency(config: Config) -> None:
    """Each mode is a quorum and a bound, with at most one modifier of its own."""
    given = config.consistency
    if config.strategy == "allreduce" and (given.mode != "sync" or given.backup_workers):
        raise ConfigError(
            "strategy allreduce is synchronous: every worker takes part in every update. Use mode "
            "sync without backup workers, or shards"
        )
    if config.pipeline.stages > 1 and (given.mode == "local" or given.backup_workers):
        raise ConfigError(
            "a pipeline trains in modes sync, bounded and async, without backup workers: choose "
            "one, or leave out --stages"
        )
    modifiers = {
        "backup_workers": ("sync", bool(given.backup_workers)),
        "staleness_scaling": ("async", given.staleness_scaling),
        "delay_compensation": ("async", bool(given.delay_compensation)),
    }
    for name, (mode, is_set) in modifiers.items():
        if is_set and given.mode != mode:
            raise ConfigError(f"consistency.{name} goes with mode {mode}, not {given.mode}")
    if given.staleness_scaling and given.delay_compensation:
        raise ConfigError(
            "consistency.staleness_scaling and consistency.delay_compensation answer the same "
            "question: choose one"
        )
    if given.backup_workers >= config.cluster.num_ranks > 1:
        raise ConfigError(
            f"consistency.backup_workers = {given.backup_workers} must be below the number of "
            f"workers, {config.cluster.num_ranks}"
        )


def shard_address(config: Config, index: int) -> str:
    """Where shard `index` is reached, `host:port`; ConfigError when there is no such shard."""
    shards = config.cluster.shards
    if not 0 <= index < len(shards):
        raise ConfigError(f"server.index = {index}: cluster.shards has {len(shards)} addresses")
    return shards[index]


def listen_address(config: Config) -> str:
    """Where this shard listens, `host:port`; the port is the one it is reached at, if not set."""
    server = config.server
    port = server.port or split_address(shard_address(config, server.index))[1]
    return join_address(server.host, port)


def is_loopback(address: str) -> bool:
    """Whether `host:port` stays on this machine: localhost or a loopback IP, no other name."""
    host, _ = split_address(address)
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def check_addresses(config: Config) -> None:
    """ConfigError when unprotected connections would leave this machine without `rpc.insecure`."""
    others = (config.cluster.rendezvous,) if config.cluster.rendezvous else ()
    for address in (*config.cluster.shards, *others, join_address(config.server.host, 0)):
        if not config.rpc.insecure and not is_loopback(address):
            raise ConfigError(
                f"{split_address(address)[0]} is not a loopback address, and connections are "
                "neither encrypted nor authenticated; on a network that you trust, allow this with "
                "--insecure / SHARDLINE_RPC_INSECURE=1"
            )


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`, where an IPv6 host is in brackets; ConfigError otherwise."""
    match = re.fullmatch(r"(?:\[([\da-fA-F:.]+)\]|([^\s:/\[\]]+)):(\d{1,5})", address, re.ASCII)
    if not match or int(match[3]) > 65535:
        raise ConfigError(
            f"{address!r} (an address of cluster, or server.host): not host:port or [IPv6]:port"
        )
    return match[1] or match[2], int(match[3])


def join_address(host: str, port: int | str) -> str:
    """The `host:port` that `split_address` takes; an IPv6 host may be in brackets already."""
    bare = host.removeprefix("[").removesuffix("]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


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
    """A copy of this process's environment without anything that `load` reads."""
    mine = {*_TORCH_VARIABLES, "LOCAL_RANK"}
    return {n: v for n, v in os.environ.items() if not n.startswith(PREFIX) and n not in mine}


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
            meaning = f"*Job.* {each.help}" if each.of_job else each.help
            page += f"| {' | '.join((key, *others, each.takes(), default, meaning))} |\n"
    return page


if __name__ == "__main__":
    sys.stdout.write(documentation())
