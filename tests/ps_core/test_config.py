import argparse
import os
import subprocess
import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_core.config import (
    add_flags,
    check_addresses,
    documentation,
    inherited_environment,
    is_loopback,
    listen_address,
    load,
    load_job,
    overrides,
    shard_address,
    to_environment,
    to_settings,
    validate,
)
from ps_core.errors import ConfigError
from ps_core.settings import (
    ClusterConfig,
    Config,
    ConsistencyConfig,
    JobConfig,
    MembershipConfig,
    MetricsConfig,
    PipelineConfig,
    RpcConfig,
    ServerConfig,
    WorkerConfig,
)

Mode = Literal["sync", "bounded", "async", "local"]

ROOT = Path(__file__).parents[2]
TWO_SHARDS = ("127.0.0.1:7001", "127.0.0.1:7002")


class Sample(NamedTuple):
    """A key, its flag, its default, and another value: as text, as TOML and as Python has it."""

    key: str
    flag: str
    default: object
    text: str
    toml: str
    value: object

    @property
    def variable(self) -> str:
        return "SHARDLINE_" + self.key.replace(".", "_").upper()


def number(key: str, flag: str, default: float, value: float) -> Sample:
    return Sample(key, flag, default, str(value), str(value), value)


def word(key: str, flag: str, default: str, value: str) -> Sample:
    return Sample(key, flag, default, value, f'"{value}"', value)


def switch(key: str, flag: str) -> Sample:
    return Sample(key, flag, False, "1", "true", True)


# Written out on purpose: names and defaults are a promise, so a change must show up here.
SAMPLES = [
    word("job.id", "--job-id", "shardline", "digits"),
    number("job.seed", "--seed", 0, 7),
    word("job.run_dir", "--run-dir", "", "runs/1"),
    word("job.strategy", "--strategy", "auto", "allreduce"),
    Sample(
        "cluster.shards",
        "--shard-addresses",
        (),
        "127.0.0.1:7001, 127.0.0.1:7002",
        '["127.0.0.1:7001", "127.0.0.1:7002"]',
        TWO_SHARDS,
    ),
    number("cluster.num_workers", "--num-workers", 1, 4),
    number("cluster.max_workers", "--max-workers", 0, 6),
    number("cluster.rank", "--rank", 0, 3),
    number("cluster.local_rank", "", -1, 1),
    word("cluster.rendezvous", "--rendezvous", "", "127.0.0.1:29500"),
    switch("cluster.serve_rendezvous", ""),
    number("cluster.attempt", "", 0, 2),
    Sample("cluster.elastic", "", True, "false", "false", False),
    number("server.index", "--index", 0, 1),
    word("server.host", "--host", "127.0.0.1", "0.0.0.0"),  # noqa: S104 - parsed, not bound
    number("server.port", "--port", 0, 7001),
    switch("server.stay", "--stay"),
    word("worker.device", "--device", "auto", "cuda:1"),
    number("worker.threads", "--threads", 0, 2),
    word("worker.nonfinite", "--nonfinite", "error", "skip"),
    number("worker.grace_seconds", "--grace-seconds", 30.0, 2.5),
    word("consistency.mode", "--mode", "sync", "async"),
    number("consistency.backup_workers", "--backup-workers", 0, 1),
    number("consistency.bound", "--bound", 3, 5),
    switch("consistency.staleness_scaling", "--staleness-scaling"),
    number("consistency.delay_compensation", "--delay-compensation", 0.0, 0.5),
    number("consistency.local_steps", "--local-steps", 10, 4),
    number("consistency.outer_lr", "--outer-lr", 0.7, 1.0),
    number("consistency.outer_momentum", "--outer-momentum", 0.9, 0.0),
    switch("consistency.deterministic", "--deterministic"),
    number("exchange.part_bytes", "--part-bytes", 4 * 1024 * 1024, 65536),
    number("exchange.bucket_bytes", "--bucket-bytes", 32 * 1024 * 1024, 1000),
    word("allreduce.backend", "--backend", "auto", "gloo"),
    switch("allreduce.shard_optimizer", "--shard-optimizer"),
    word("allreduce.wire_dtype", "--wire-dtype", "same", "bfloat16"),
    number("allreduce.timeout_seconds", "--collective-timeout", 120.0, 7.5),
    number("pipeline.stages", "--stages", 1, 2),
    word("pipeline.schedule", "--schedule", "1f1b", "gpipe"),
    number("pipeline.microbatches", "--microbatches", 0, 6),
    switch("rpc.insecure", "--insecure"),
    number("rpc.connect_timeout_seconds", "", 60.0, 2.5),
    number("rpc.call_timeout_seconds", "", 15.0, 0.5),
    number("rpc.keepalive_seconds", "", 10.0, 1.5),
    number("rpc.reconnect_seconds", "", 3.0, 0.0),
    switch("rpc.shared_ports", ""),
    number("rpc.drain_seconds", "--drain-seconds", 5.0, 0.25),
    number("membership.join_timeout_seconds", "--join-timeout", 120.0, 8.5),
    number("membership.min_workers", "--min-workers", 1, 2),
    number("membership.pause_timeout_seconds", "--pause-timeout", 120.0, 9.5),
    number("membership.heartbeat_seconds", "", 1.0, 0.5),
    number("membership.heartbeat_floor_seconds", "", 10.0, 2.5),
    number("membership.heartbeat_deadline_seconds", "", 0.0, 4.5),
    number("membership.step_deadline_seconds", "--step-deadline", 0.0, 7.5),
    number("launch.max_restarts", "--max-restarts", 3, 1),
    number("launch.restart_window_seconds", "--restart-window", 300.0, 60.5),
    word("metrics.host", "", "127.0.0.1", "::1"),
    number("metrics.port", "--metrics-port", 0, -1),
]
FLAGGED = [sample for sample in SAMPLES if sample.flag]
# What some of the values above need to be valid.
FOUR_WORKERS = {"SHARDLINE_CLUSTER_NUM_WORKERS": "4"}
ASYNC = {"SHARDLINE_CONSISTENCY_MODE": "async"}
NEEDS = {
    "cluster.rank": FOUR_WORKERS,
    "pipeline.stages": FOUR_WORKERS,
    "membership.min_workers": FOUR_WORKERS,
    "consistency.staleness_scaling": ASYNC,
    "consistency.delay_compensation": ASYNC,
}


def ids(sample: Sample) -> str:
    return sample.key


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def toml(tmp_path: Path, key: str, literal: str) -> Path:
    section, name = key.split(".")
    return write(tmp_path / "job.conf", f"[{section}]\n{name} = {literal}\n")


def flags(*arguments: str) -> dict[str, str]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps")
    add_flags(parser, [sample.key for sample in FLAGGED])
    return overrides(parser.parse_args(arguments))


def value_of(config: Config, key: str) -> object:
    value: object = attrgetter(key)(config)
    return value


def same(found: object, expected: object) -> bool:
    return found == expected and type(found) is type(expected)


# Every key, from every source


def test_the_samples_are_all_the_keys() -> None:
    table_rows = [line for line in documentation().splitlines() if line.startswith("| `")]
    assert len(table_rows) == len(SAMPLES)
    for sample, row in zip(SAMPLES, table_rows, strict=True):
        assert sample.variable in row


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_every_key_has_its_default(sample: Sample) -> None:
    assert same(value_of(load(environ={}), sample.key), sample.default)


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_every_key_can_be_set_in_toml(sample: Sample, tmp_path: Path) -> None:
    file = toml(tmp_path, sample.key, sample.toml)
    config = load(file=file, environ=NEEDS.get(sample.key, {}))
    assert same(value_of(config, sample.key), sample.value)


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_every_key_can_be_set_in_the_environment(sample: Sample) -> None:
    config = load(environ=NEEDS.get(sample.key, {}) | {sample.variable: sample.text})
    assert same(value_of(config, sample.key), sample.value)


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_every_key_can_be_overridden(sample: Sample) -> None:
    config = load({sample.key: sample.text}, environ=NEEDS.get(sample.key, {}))
    assert same(value_of(config, sample.key), sample.value)


@pytest.mark.parametrize("sample", FLAGGED, ids=ids)
def test_every_flag_sets_its_key(sample: Sample) -> None:
    arguments = [sample.flag] if sample.value is True else [sample.flag, sample.text]
    given = flags(*arguments, "--steps", "9")
    assert list(given) == [sample.key]
    config = load(given, environ=NEEDS.get(sample.key, {}))
    assert same(value_of(config, sample.key), sample.value)


# Precedence


def test_each_source_wins_over_the_one_before(tmp_path: Path) -> None:
    file = write(tmp_path / "s.toml", "[job]\nseed = 1\nid = 'file'\nrun_dir = 'file'\n")
    environ = {"SHARDLINE_JOB_SEED": "2", "SHARDLINE_JOB_ID": "environment"}
    job = load({"job.seed": "3"}, file=file, environ=environ).job
    assert (job.seed, job.id, job.run_dir) == (3, "environment", "file")


def test_the_file_is_the_one_in_the_environment_unless_one_is_given(tmp_path: Path) -> None:
    named = write(tmp_path / "named.toml", "[job]\nseed = 1\n")
    given = write(tmp_path / "given.toml", "[job]\nseed = 2\n")
    environ = {"SHARDLINE_CONFIG": str(named)}
    assert load(environ=environ).job.seed == 1
    assert load(file=given, environ=environ).job.seed == 2
    assert load(environ={"SHARDLINE_CONFIG": ""}).job.seed == 0


def test_the_process_environment_is_read_when_no_other_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHARDLINE_JOB_SEED", "5")
    assert load().job.seed == 5


def test_a_flag_can_turn_off_what_the_environment_turned_on() -> None:
    assert not load(flags("--no-insecure"), environ={"SHARDLINE_RPC_INSECURE": "1"}).rpc.insecure


def test_flags_not_given_override_nothing() -> None:
    assert flags("--steps", "9") == {}


def test_the_help_of_a_flag_names_meaning_default_and_variable() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, ["exchange.part_bytes", "worker.nonfinite"])
    text = " ".join(parser.format_help().split())
    assert "Bytes of the largest part. [4194304; SHARDLINE_EXCHANGE_PART_BYTES]" in text
    assert "error|skip" in text


def test_asking_for_a_flag_that_does_not_exist_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match=r"rpc\.keepalive_seconds"):
        add_flags(argparse.ArgumentParser(), ["rpc.keepalive_seconds"])


# Names that nobody knows


@pytest.mark.parametrize(
    ("text", "named", "nearest"),
    [
        ("[cluster]\nnum_worker = 2\n", "cluster.num_worker", "cluster.num_workers"),
        ("[clutser]\nnum_workers = 2\n", "clutser.num_workers", "cluster.num_workers"),
        ("insecure = true\n", "insecure", "rpc.insecure"),
        ("[metrisc]\n", "metrisc", "metrics."),
        ("metrics = 4\n", "metrics", "metrics."),
    ],
)
def test_an_unknown_key_in_toml_names_the_nearest_and_the_file(
    text: str, named: str, nearest: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "job.toml", text)
    with pytest.raises(ConfigError) as refused:
        load(file=file, environ={})
    assert str(refused.value).startswith(f"{named} in {file} is not a configuration key")
    assert f"the nearest is {nearest}" in str(refused.value)


def test_an_empty_known_section_is_fine(tmp_path: Path) -> None:
    assert load(file=write(tmp_path / "job.toml", "[rpc]\n"), environ={}) == Config()


def test_an_unknown_override_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"job\.sede in the command line .* is job\.seed"):
        load({"job.sede": "1"}, environ={})


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("SHARDLINE_RPC_INSECRE", "SHARDLINE_RPC_INSECURE"),
        ("SHARDLINE_NUM_WORKERS", "SHARDLINE_CLUSTER_NUM_WORKERS"),
        ("SHARDLINE_", "SHARDLINE_"),
    ],
)
def test_an_unknown_variable_names_the_nearest(variable: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(environ={variable: "1"})
    message = str(refused.value)
    assert message.startswith(f"{variable} in the environment is not a configuration key")
    assert f"the nearest is {nearest}" in message


def test_variables_of_others_are_left_alone() -> None:
    assert load(environ={"PATH": "/bin", "MY_SHARDLINE_X": "1", "SHARDLINER": "1"}) == Config()


# Values that are not allowed

BAD_TEXT = [
    ("job.id", "", "text"),
    ("job.seed", "-1", "at least 0"),
    ("job.seed", "1.5", "a whole number"),
    ("job.seed", "4294967296", "at most 4294967295"),
    ("cluster.num_workers", "0", "a whole number, at least 1"),
    ("cluster.num_workers", "four", "a whole number, at least 1"),
    ("cluster.max_workers", "-1", "at least 0"),
    ("cluster.rank", "-1", "at least 0"),
    ("server.port", "65536", "at most 65535"),
    ("worker.nonfinite", "ignore", "error or skip"),
    ("worker.grace_seconds", "0", "at least 0.001"),
    ("consistency.mode", "magic", "sync or bounded or async or local"),
    ("consistency.backup_workers", "-1", "at least 0"),
    ("consistency.bound", "-1", "at least 0"),
    ("consistency.bound", "1.5", "a whole number"),
    ("consistency.staleness_scaling", "much", "true or false"),
    ("consistency.delay_compensation", "-0.1", "a number, at least 0"),
    ("consistency.local_steps", "0", "at least 1"),
    ("consistency.outer_lr", "-1", "at least 0"),
    ("consistency.outer_momentum", "1.1", "at most 1"),
    ("consistency.deterministic", "maybe", "true or false"),
    ("exchange.part_bytes", "1300", "a multiple of 512"),
    ("exchange.part_bytes", "0", "at least 512"),
    ("exchange.part_bytes", "8388864", "at most 8388608"),
    ("exchange.bucket_bytes", "255", "at least 256"),
    ("rpc.insecure", "", "true or false"),
    ("rpc.call_timeout_seconds", "0", "at least 0.001"),
    ("rpc.keepalive_seconds", "nan", "a number"),
    ("rpc.drain_seconds", "inf", "a number"),
    ("rpc.reconnect_seconds", "3s", "a number"),
    ("membership.min_workers", "0", "at least 1"),
    ("membership.step_deadline_seconds", "-1", "at least 0"),
    ("launch.max_restarts", "-1", "at least 0"),
    ("launch.restart_window_seconds", "0", "at least 0.001"),
    ("metrics.port", "-2", "at least -1"),
]


@pytest.mark.parametrize(("key", "text", "allowed"), BAD_TEXT)
def test_a_bad_value_names_key_value_source_and_what_is_allowed(
    key: str, text: str, allowed: str
) -> None:
    variable = "SHARDLINE_" + key.replace(".", "_").upper()
    with pytest.raises(ConfigError) as refused:
        load(environ={variable: text})
    message = str(refused.value)
    assert message.startswith(f"{key} = ")
    assert text in message
    assert f"({variable}) must be" in message
    assert allowed in message


def test_a_bad_value_of_a_flag_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.num_workers = 0 \(--num-workers\) must be"):
        load(flags("--num-workers", "0"), environ={})


def test_a_bad_value_is_refused_even_where_a_later_source_replaces_it() -> None:
    with pytest.raises(ConfigError, match="SHARDLINE_JOB_SEED"):
        load({"job.seed": "1"}, environ={"SHARDLINE_JOB_SEED": "x"})


@pytest.mark.parametrize(
    ("key", "literal"),
    [
        ("job.id", "7"),
        ("job.id", "{ name = 'x' }"),
        ("job.seed", '"7"'),
        ("job.seed", "true"),
        ("job.seed", "1.0"),
        ("rpc.insecure", '"true"'),
        ("rpc.insecure", "1"),
        ("rpc.drain_seconds", "nan"),
        ("rpc.drain_seconds", "true"),
        ("cluster.shards", '"127.0.0.1:7001"'),
        ("cluster.shards", "[7001]"),
        ("worker.nonfinite", '["skip"]'),
        ("worker.device", "1979-05-27"),
    ],
)
def test_toml_takes_the_type_of_the_key_only(key: str, literal: str, tmp_path: Path) -> None:
    file = toml(tmp_path, key, literal)
    with pytest.raises(ConfigError) as refused:
        load(file=file, environ={})
    assert str(refused.value).startswith(f"{key} = ")
    assert f"({file}) must be" in str(refused.value)


def test_a_whole_number_in_toml_is_a_number(tmp_path: Path) -> None:
    file = toml(tmp_path, "rpc.drain_seconds", "2")
    assert load(file=file, environ={}).rpc.drain_seconds == 2.0


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("true", True), ("TRUE", True), ("0", False), ("false", False), ("False", False)],
)
def test_true_and_false_have_two_spellings(text: str, value: bool) -> None:
    assert load(environ={"SHARDLINE_RPC_INSECURE": text}).rpc.insecure is value


@pytest.mark.parametrize("content", [b"[job\n", b"[job]\nid = '\xff'\n", b"x = 1\nx = 2\n"])
def test_a_file_that_is_not_toml_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*job\.toml"):
        load(file=file, environ={})


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere/job\.toml: .*No such file"):
        load(environ={"SHARDLINE_CONFIG": "/nowhere/job.toml"})


# What keys ask of each other


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Config(cluster=ClusterConfig(num_workers=4, rank=4)),
            r"cluster\.rank = 4 must be below the number of workers, 4",
        ),
        (
            Config(cluster=ClusterConfig(num_workers=2, max_workers=4, rank=4)),
            r"cluster\.rank = 4 must be below the number of workers, 4",
        ),
        (
            Config(cluster=ClusterConfig(num_workers=3, max_workers=2)),
            r"cluster\.max_workers = 2 is below cluster\.num_workers = 3",
        ),
        (
            Config(
                cluster=ClusterConfig(num_workers=2, max_workers=4),
                membership=MembershipConfig(min_workers=3),
            ),
            r"membership\.min_workers = 3 is above cluster\.num_workers = 2",
        ),
        (
            Config(
                cluster=ClusterConfig(num_workers=8, shards=tuple(TWO_SHARDS)),
                pipeline=PipelineConfig(stages=2),
                membership=MembershipConfig(min_workers=5),
            ),
            r"membership\.min_workers = 5 is above the number of replicas = 4",
        ),
        (
            Config(cluster=ClusterConfig(shards=TWO_SHARDS), server=ServerConfig(index=2)),
            r"server\.index = 2: cluster\.shards has 2 addresses",
        ),
        (Config(cluster=ClusterConfig(shards=("127.0.0.1",))), "not host:port"),
        (Config(cluster=ClusterConfig(shards=("a:1", ""))), "not host:port"),
        (Config(cluster=ClusterConfig(shards=("a:1", "a:1"))), "its own address, not a:1"),
        (Config(cluster=ClusterConfig(shards=("a:0",))), "its own address, not a:0"),
        (
            Config(cluster=ClusterConfig(num_workers=0)),
            r"cluster\.num_workers = 0 .* must be a whole number, at least 1",
        ),
    ],
)
def test_a_contradiction_is_refused(config: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(config)
    with pytest.raises(ConfigError):
        load(environ=to_environment(config))


def test_ranks_go_up_to_the_most_workers_that_there_may_be() -> None:
    assert ClusterConfig(num_workers=3).num_ranks == 3
    assert ClusterConfig(num_workers=3, max_workers=3).num_ranks == 3
    assert ClusterConfig(num_workers=3, max_workers=5).num_ranks == 5
    validate(Config(cluster=ClusterConfig(num_workers=3, max_workers=5, rank=4)))


def test_a_job_may_need_all_the_workers_that_it_starts_with() -> None:
    cluster = ClusterConfig(num_workers=3)
    validate(Config(cluster=cluster, membership=MembershipConfig(min_workers=3)))


def test_an_index_is_free_while_there_are_no_shards() -> None:
    validate(Config(server=ServerConfig(index=3)))


# How gradients become updates

MODES: tuple[Mode, ...] = ("sync", "bounded", "async", "local")


@pytest.mark.parametrize(
    ("modifier", "its_mode"),
    [
        (ConsistencyConfig(backup_workers=1), "sync"),
        (ConsistencyConfig(staleness_scaling=True), "async"),
        (ConsistencyConfig(delay_compensation=0.04), "async"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_modifier_goes_with_its_own_mode_only(
    modifier: ConsistencyConfig, its_mode: Mode, mode: Mode
) -> None:
    config = Config(consistency=replace(modifier, mode=mode))
    if mode == its_mode:
        validate(config)
    else:
        with pytest.raises(ConfigError, match=f"goes with mode {its_mode}, not {mode}"):
            validate(config)


def test_two_modifiers_at_once_are_refused() -> None:
    both = ConsistencyConfig(mode="async", staleness_scaling=True, delay_compensation=0.1)
    with pytest.raises(ConfigError, match="answer the same question: choose one"):
        validate(Config(consistency=both))


@pytest.mark.parametrize(
    ("cluster", "num_backups", "allowed"),
    [
        (ClusterConfig(num_workers=3), 2, True),
        (ClusterConfig(num_workers=3), 3, False),
        (ClusterConfig(num_workers=2, max_workers=5), 4, True),
        (ClusterConfig(num_workers=2, max_workers=5), 5, False),
    ],
)
def test_an_update_waits_for_somebody(
    cluster: ClusterConfig, num_backups: int, allowed: bool
) -> None:
    config = Config(cluster=cluster, consistency=ConsistencyConfig(backup_workers=num_backups))
    if allowed:
        validate(config)
    else:
        with pytest.raises(ConfigError, match=f"{num_backups} must be below the number of workers"):
            validate(config)


def test_a_bound_of_0_means_sync_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = load({"consistency.mode": "bounded", "consistency.bound": "0"}, environ={})
    assert config.consistency == ConsistencyConfig(mode="sync")
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == "consistency.bound = 0: training is synchronous (mode sync)"
    assert load(environ=to_environment(config)) == config
    assert len(caplog.records) == 1  # once is enough: children are told what is meant


@pytest.mark.parametrize(("mode", "bound"), [("bounded", "1"), ("sync", "0"), ("async", "0")])
def test_no_other_bound_means_sync(mode: str, bound: str, caplog: pytest.LogCaptureFixture) -> None:
    config = load({"consistency.mode": mode, "consistency.bound": bound}, environ={})
    assert (config.consistency.mode, config.consistency.bound) == (mode, int(bound))
    assert caplog.records == []


# Addresses


def test_a_shard_is_found_by_its_index() -> None:
    config = Config(cluster=ClusterConfig(shards=TWO_SHARDS))
    assert [shard_address(config, index) for index in range(2)] == list(TWO_SHARDS)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_shard_that_does_not_exist_is_refused(index: int) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.shards has 2 addresses"):
        shard_address(Config(cluster=ClusterConfig(shards=TWO_SHARDS)), index)


def test_a_shard_listens_at_the_port_it_is_reached_at_unless_another_is_set() -> None:
    cluster = ClusterConfig(shards=TWO_SHARDS)
    assert listen_address(Config(cluster=cluster, server=ServerConfig(index=1))) == TWO_SHARDS[1]
    for host in ("::", "[::]"):
        server = ServerConfig(index=1, host=host, port=9000)
        assert listen_address(Config(cluster=cluster, server=server)) == "[::]:9000"


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_host_is_written_with_brackets_or_without(host: str) -> None:
    cluster = ClusterConfig(shards=("[::1]:7000",))
    check_addresses(Config(cluster=cluster, server=ServerConfig(host=host)))
    torch = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": host, "MASTER_PORT": "29500"}
    assert load(environ=torch).cluster.rendezvous == "[::1]:29500"


def test_a_shard_without_any_port_cannot_listen() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.shards has 0 addresses"):
        listen_address(Config())


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:7001", True),
        ("127.8.9.1:7001", True),
        ("localhost:7001", True),
        ("[::1]:7001", True),
        ("0.0.0.0:7001", False),
        ("[::]:7001", False),
        ("10.0.0.4:7001", False),
        ("localhost.example.com:7001", False),
        ("shard-0.shards:7001", False),
    ],
)
def test_loopback_is_this_machine_only(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


@pytest.mark.parametrize(
    "address", ["", "host", ":1", "host:", "host:x", "::1:7001", "[::1]", "a b:1", "a:70000", "a:²"]
)
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ConfigError, match=r"not host:port or \[IPv6\]:port"):
        is_loopback(address)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Config(cluster=ClusterConfig(shards=("127.0.0.1:1", "10.0.0.4:1"))), "10.0.0.4"),
        (Config(server=ServerConfig(host="[::]")), "::"),
    ],
)
def test_plain_tcp_beyond_this_machine_needs_a_permission(config: Config, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_addresses(config)
    assert str(refused.value).startswith(f"{named} is not a loopback address")
    assert "--insecure / SHARDLINE_RPC_INSECURE=1" in str(refused.value)
    check_addresses(replace(config, rpc=RpcConfig(insecure=True)))


def test_plain_tcp_on_this_machine_needs_none() -> None:
    check_addresses(Config(cluster=ClusterConfig(shards=("localhost:1", "[::1]:1"))))


# From a launcher to its children


def test_only_what_differs_from_the_defaults_is_handed_on() -> None:
    config = Config(
        cluster=ClusterConfig(shards=TWO_SHARDS, num_workers=2),
        worker=WorkerConfig(nonfinite="skip"),
        rpc=RpcConfig(insecure=True, drain_seconds=0.1),
    )
    assert to_environment(Config()) == {}
    assert to_environment(config) == {
        "SHARDLINE_CLUSTER_SHARDS": "127.0.0.1:7001,127.0.0.1:7002",
        "SHARDLINE_CLUSTER_NUM_WORKERS": "2",
        "SHARDLINE_WORKER_NONFINITE": "skip",
        "SHARDLINE_RPC_INSECURE": "true",
        "SHARDLINE_RPC_DRAIN_SECONDS": "0.1",
    }


@given(
    seconds=st.floats(min_value=0, max_value=1e9),
    seed=st.integers(0, 2**32 - 1),
    ports=st.sets(st.integers(1, 65535), max_size=5),
    deterministic=st.booleans(),
    run_dir=st.text(),
)
def test_a_child_loads_what_its_launcher_had(
    seconds: float, seed: int, ports: set[int], deterministic: bool, run_dir: str
) -> None:
    config = Config(
        job=JobConfig(seed=seed, run_dir=run_dir),
        cluster=ClusterConfig(shards=tuple(f"10.0.0.1:{port}" for port in ports)),
        consistency=ConsistencyConfig(deterministic=deterministic),
        rpc=RpcConfig(reconnect_seconds=seconds),
    )
    assert load(environ=to_environment(config)) == config


def test_a_child_inherits_everything_but_our_own_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHARDLINE_JOB_SEED", "5")
    monkeypatch.setenv("SHARDLINE_CONFIG", "job.toml")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    inherited = inherited_environment()
    assert inherited["OMP_NUM_THREADS"] == "1"
    assert not any(name.startswith("SHARDLINE_") for name in inherited)
    inherited["OMP_NUM_THREADS"] = "2"
    assert os.environ["OMP_NUM_THREADS"] == "1"


# The page


def test_the_page_in_docs_is_the_one_the_code_writes() -> None:
    written = subprocess.run(
        [sys.executable, "-m", "ps_core.config"], cwd=ROOT, check=True, capture_output=True
    )
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == documentation(), "python -m ps_core.config > docs/configuration.md"
    assert page == written.stdout.decode()


@pytest.mark.parametrize("sample", SAMPLES, ids=ids)
def test_the_page_tells_all_names_the_default_and_the_meaning(sample: Sample) -> None:
    row = next(line for line in documentation().splitlines() if f"`{sample.variable}`" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == f"`{sample.key.split('.')[1]}`"
    assert cells[2] == (f"`{sample.flag}`" if sample.flag else "")
    assert len(cells) == 6
    assert cells[5].endswith(".")
    if sample.key.endswith("_bytes"):
        assert "Bytes" in cells[5]


# -- A job that another process describes ----------------------------------------------------------


def test_the_settings_of_a_job_are_its_keys_and_not_those_of_the_machine() -> None:
    config = Config(
        job=JobConfig(id="digits", run_dir="/runs/1"),
        cluster=ClusterConfig(shards=("a:1", "b:2"), num_workers=4, rank=3, attempt=2),
        server=ServerConfig(index=1, port=4711),
        worker=WorkerConfig(device="cuda"),
        rpc=RpcConfig(insecure=True),
        metrics=MetricsConfig(port=4712),
        consistency=ConsistencyConfig(mode="async"),
    )
    settings = to_settings(config)
    assert settings == {
        "SHARDLINE_JOB_ID": "digits",
        "SHARDLINE_JOB_RUN_DIR": "/runs/1",
        "SHARDLINE_CLUSTER_SHARDS": "a:1,b:2",
        "SHARDLINE_CLUSTER_NUM_WORKERS": "4",
        "SHARDLINE_CONSISTENCY_MODE": "async",
    }
    assert load_job(settings, "a:1") == Config(
        job=config.job,
        cluster=ClusterConfig(shards=("a:1", "b:2"), num_workers=4),
        consistency=config.consistency,
    )
