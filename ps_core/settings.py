"""Every configuration key: its type, default, range, flag and meaning."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Literal, TypeVar

INF: Final = math.inf

T = TypeVar("T")
LIST = tuple[str, ...]


def key(
    default: T,
    help: str,
    flag: str = "",
    low: float = -INF,
    high: float = INF,
    step: int = 0,
    *,
    of_job: bool = False,
) -> T:
    """A field that is a configuration key; its annotation gives the type and the choices. A key
    `of_job` has one value in the whole job, which a worker that joins takes over.
    """
    metadata = {"low": low, "high": high, "step": step, "of_job": of_job}
    return field(default=default, metadata={"help": help, "flag": flag, **metadata})


job_key: Final = partial(key, of_job=True)


@dataclass(frozen=True, slots=True)
class JobConfig:
    """What this training run is called and where it writes."""

    id: str = job_key(
        "shardline", "Name of the job; another job's workers are refused.", "--job-id"
    )
    seed: int = job_key(0, "Seed of the random generators.", "--seed", 0, 2**32 - 1)
    run_dir: str = job_key("", "Folder for logs and results; empty: none.", "--run-dir")
    strategy: Literal["auto", "parameter-server", "allreduce"] = job_key(
        "auto",
        "Where updates are made: on shards, or on every worker; `auto`: on shards if any.",
        "--strategy",
    )


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Who takes part."""

    shards: tuple[str, ...] = job_key(
        (), "Each shard's `host:port`, in index order; empty: train alone.", "--shard-addresses"
    )
    num_workers: int = job_key(1, "Number of workers the job starts with.", "--num-workers", 1)
    max_workers: int = job_key(
        0, "Workers it may grow to; 0: `cluster.num_workers`.", "--max-workers", 0
    )
    rank: int = key(0, "Rank of this worker, below the highest number of workers.", "--rank", 0)
    local_rank: int = key(
        -1, "Which of its machine's devices this worker takes; -1: as its rank says.", low=-1
    )
    rendezvous: str = job_key("", "`host:port` where all-reduce workers meet.", "--rendezvous")
    serve_rendezvous: bool = key(False, "The worker of rank 0 keeps the rendezvous itself.")
    attempt: int = key(0, "How often the whole job was started again before (torchrun).", low=0)
    elastic: bool = job_key(True, "`allreduce`: go on without a lost worker, and take in another.")

    @property
    def num_ranks(self) -> int:
        """Ranks that workers may have: from 0 to one less than this."""
        return max(self.num_workers, self.max_workers)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """One shard."""

    index: int = key(0, "Index of this shard: its position in `cluster.shards`.", "--index", 0)
    host: str = key("127.0.0.1", "Address to listen on.", "--host")
    port: int = key(0, "Port to listen on; 0: as in `cluster.shards`.", "--port", 0, 65535)
    stay: bool = key(
        False, "After the job is complete, wait to be told to stop (SIGTERM).", "--stay"
    )


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker."""

    device: str = key("auto", "Torch device; `auto`: `cuda` if there is one, or `cpu`.", "--device")
    threads: int = key(0, "Torch threads per process; 0: torch's own choice.", "--threads", 0)
    nonfinite: Literal["error", "skip"] = key(
        "error", "Gradients with NaN or infinity end the job, or skip the step.", "--nonfinite"
    )
    grace_seconds: float = key(
        30.0, "Seconds to leave the job after SIGTERM.", "--grace-seconds", 0.001
    )


@dataclass(frozen=True, slots=True)
class ConsistencyConfig:
    """What an update waits for, and how far a worker may run ahead; see docs/consistency.md."""

    mode: Literal["sync", "bounded", "async", "local"] = job_key(
        "sync", "How gradients become updates.", "--mode"
    )
    backup_workers: int = job_key(
        0, "`sync`: an update waits for all workers but this many.", "--backup-workers", 0
    )
    bound: int = job_key(
        3, "`bounded`: steps ahead of the slowest worker; 0 means `sync`.", "--bound", 0
    )
    staleness_scaling: bool = job_key(
        False, "`async`: divide the learning rate by 1 + staleness.", "--staleness-scaling"
    )
    delay_compensation: float = job_key(
        0.0, "`async` with plain SGD: λ of DC-ASGD; 0: off.", "--delay-compensation", 0
    )
    local_steps: int = job_key(
        10, "`local`: a worker's own steps between two averages.", "--local-steps", 1
    )
    outer_lr: float = job_key(0.7, "`local`: learning rate of the shards.", "--outer-lr", 0)
    outer_momentum: float = job_key(
        0.9, "`local`: Nesterov momentum of the shards.", "--outer-momentum", 0, 1
    )
    deterministic: bool = job_key(
        False, "Add in rank order: runs repeat exactly.", "--deterministic"
    )


@dataclass(frozen=True, slots=True)
class ExchangeConfig:
    """How gradients are collected into buckets, and buckets cut into the parts that are sent."""

    part_bytes: int = job_key(2**22, "Bytes of the largest part.", "--part-bytes", 512, 2**23, 512)
    bucket_bytes: int = job_key(2**25, "Bytes of gradients ready together.", "--bucket-bytes", 256)


@dataclass(frozen=True, slots=True)
class AllReduceConfig:
    """The strategy without shards: every worker makes every update."""

    backend: Literal["auto", "nccl", "gloo"] = job_key(
        "auto", "`auto`: `nccl` if every worker has its own CUDA device, or `gloo`.", "--backend"
    )
    shard_optimizer: bool = job_key(
        False,
        "Each worker keeps the optimizer's state of its share of the model only (ZeRO-1).",
        "--shard-optimizer",
    )
    wire_dtype: Literal["same", "bfloat16", "float16"] = job_key(
        "same", "Element type in which gradients are added up; `same`: their own.", "--wire-dtype"
    )
    timeout_seconds: float = job_key(
        120.0, "How long a worker may keep the others waiting.", "--collective-timeout", 0.001
    )


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """Models that are split over several workers."""

    stages: int = job_key(1, "Workers that share one replica of the model.", "--stages", 1)
    schedule: Literal["gpipe", "1f1b", "interleaved", "interleaved-zero-bubble", "zbv"] = job_key(
        "1f1b", "Order in which stages work on microbatches.", "--schedule"
    )
    microbatches: int = job_key(
        0,
        "Pieces that a batch is cut into; 0: as many as the schedule does well with.",
        "--microbatches",
        0,
    )


@dataclass(frozen=True, slots=True)
class RpcConfig:
    """Connections between workers and shards."""

    insecure: bool = key(False, "Allow unprotected TCP beyond loopback.", "--insecure")
    connect_timeout_seconds: float = key(60.0, "Seconds to wait for a shard to start.", low=0.001)
    call_timeout_seconds: float = key(15.0, "Seconds a single call may take.", low=0.001)
    keepalive_seconds: float = key(10.0, "Seconds between pings that find dead peers.", low=0.001)
    reconnect_seconds: float = key(
        3.0, "Seconds a broken stream has to reopen before its peer counts as lost.", low=0
    )
    shared_ports: bool = key(
        False, "Another process of this user, such as `shardline run`, may hold this one's ports."
    )
    drain_seconds: float = key(5.0, "Seconds for open calls when stopping.", "--drain-seconds", 0)


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    """Who is waited for."""

    join_timeout_seconds: float = job_key(
        120.0, "Seconds the first worker waits for all others to join.", "--join-timeout", 0.001
    )
    min_workers: int = job_key(
        1, "With fewer workers, or replicas of a split model, the job pauses.", "--min-workers", 1
    )
    pause_timeout_seconds: float = job_key(
        120.0, "Seconds a pause may last before the job fails.", "--pause-timeout", 0.001
    )
    heartbeat_seconds: float = job_key(1.0, "Seconds between a worker's signs of life.", low=0.001)
    heartbeat_floor_seconds: float = job_key(
        10.0, "Least silence after which a worker is evicted; it adapts upwards.", low=0.001
    )
    heartbeat_deadline_seconds: float = job_key(
        0.0, "Silence after which a worker is evicted; 0: adapted to its heartbeats.", low=0
    )
    step_deadline_seconds: float = job_key(
        0.0,
        "Evict a worker that an update has waited for this long; 0: never.",
        "--step-deadline",
        0,
    )


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """What `shardline run` does about workers that fail."""

    max_restarts: int = key(
        3, "Restarts within the window before the run ends.", "--max-restarts", 0
    )
    restart_window_seconds: float = key(300.0, "The window, in seconds.", "--restart-window", 0.001)


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """The `/metrics` endpoint for Prometheus."""

    host: str = key("127.0.0.1", "Address the endpoint listens on.")
    port: int = key(
        0, "Its port; 0: a free one, printed; -1: no endpoint.", "--metrics-port", -1, 65535
    )


@dataclass(frozen=True, slots=True)
class Config:
    """All sections. `ps_core.config.load` returns a valid one."""

    job: JobConfig = field(default_factory=JobConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    allreduce: AllReduceConfig = field(default_factory=AllReduceConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    rpc: RpcConfig = field(default_factory=RpcConfig)
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def by_replica(self) -> "Config":
        """As shards see it: the stages of a pipeline are one worker together."""
        stages, cluster = self.pipeline.stages, self.cluster
        return self._counting(
            cluster.num_workers // stages, cluster.max_workers // stages, cluster.rank // stages
        )

    def by_worker(self) -> "Config":
        """The inverse of `by_replica`; a replica's rank becomes that of its first stage."""
        stages, cluster = self.pipeline.stages, self.cluster
        return self._counting(
            cluster.num_workers * stages, cluster.max_workers * stages, cluster.rank * stages
        )

    def _counting(self, num_workers: int, max_workers: int, rank: int) -> "Config":
        cluster = replace(self.cluster, num_workers=num_workers, max_workers=max_workers, rank=rank)
        return replace(self, cluster=cluster)

    @property
    def strategy(self) -> Literal["alone", "parameter-server", "allreduce"]:
        """Where updates are made."""
        if self.job.strategy != "auto":
            return self.job.strategy
        if self.cluster.shards:
            return "parameter-server"
        return "allreduce" if self.cluster.rendezvous else "alone"
