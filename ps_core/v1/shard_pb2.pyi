from ps_core.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_UNSPECIFIED: _ClassVar[Purpose]
    PURPOSE_START: _ClassVar[Purpose]
    PURPOSE_EPOCH: _ClassVar[Purpose]
    PURPOSE_MEAN: _ClassVar[Purpose]
    PURPOSE_LOAD: _ClassVar[Purpose]
    PURPOSE_CLOSE: _ClassVar[Purpose]

class Content(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTENT_UNSPECIFIED: _ClassVar[Content]
    CONTENT_PARAMETERS: _ClassVar[Content]
    CONTENT_STATE: _ClassVar[Content]
    CONTENT_BUFFERS: _ClassVar[Content]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_EMPTY: _ClassVar[Phase]
    PHASE_STARTING: _ClassVar[Phase]
    PHASE_TRAINING: _ClassVar[Phase]
    PHASE_COMPLETE: _ClassVar[Phase]
    PHASE_FAILED: _ClassVar[Phase]

class Farewell(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAREWELL_UNSPECIFIED: _ClassVar[Farewell]
    FAREWELL_FINISHED: _ClassVar[Farewell]
    FAREWELL_PREEMPTED: _ClassVar[Farewell]
    FAREWELL_FAILED: _ClassVar[Farewell]
    FAREWELL_FATAL: _ClassVar[Farewell]
PURPOSE_UNSPECIFIED: Purpose
PURPOSE_START: Purpose
PURPOSE_EPOCH: Purpose
PURPOSE_MEAN: Purpose
PURPOSE_LOAD: Purpose
PURPOSE_CLOSE: Purpose
CONTENT_UNSPECIFIED: Content
CONTENT_PARAMETERS: Content
CONTENT_STATE: Content
CONTENT_BUFFERS: Content
PHASE_UNSPECIFIED: Phase
PHASE_EMPTY: Phase
PHASE_STARTING: Phase
PHASE_TRAINING: Phase
PHASE_COMPLETE: Phase
PHASE_FAILED: Phase
FAREWELL_UNSPECIFIED: Farewell
FAREWELL_FINISHED: Farewell
FAREWELL_PREEMPTED: Farewell
FAREWELL_FAILED: Farewell
FAREWELL_FATAL: Farewell

class WorkerId(_message.Message):
    __slots__ = ("rank", "incarnation")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class ParameterSpec(_message.Message):
    __slots__ = ("tensor", "group", "stage")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    tensor: _tensor_pb2.TensorSpec
    group: int
    stage: int
    def __init__(self, tensor: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., group: _Optional[int] = ..., stage: _Optional[int] = ...) -> None: ...

class RealList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class HyperparameterValue(_message.Message):
    __slots__ = ("real", "integer", "flag", "reals")
    REAL_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    REALS_FIELD_NUMBER: _ClassVar[int]
    real: float
    integer: int
    flag: bool
    reals: RealList
    def __init__(self, real: _Optional[float] = ..., integer: _Optional[int] = ..., flag: _Optional[bool] = ..., reals: _Optional[_Union[RealList, _Mapping]] = ...) -> None: ...

class Hyperparameters(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: HyperparameterValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[HyperparameterValue, _Mapping]] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.MessageMap[str, HyperparameterValue]
    def __init__(self, values: _Optional[_Mapping[str, HyperparameterValue]] = ...) -> None: ...

class OptimizerSpec(_message.Message):
    __slots__ = ("name", "groups", "max_grad_norm")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    name: str
    groups: _containers.RepeatedCompositeFieldContainer[Hyperparameters]
    max_grad_norm: float
    def __init__(self, name: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[Hyperparameters, _Mapping]]] = ..., max_grad_norm: _Optional[float] = ...) -> None: ...

class Consistency(_message.Message):
    __slots__ = ("mode", "backup_workers", "bound", "staleness_scaling", "delay_compensation", "local_steps", "deterministic")
    MODE_FIELD_NUMBER: _ClassVar[int]
    BACKUP_WORKERS_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    STALENESS_SCALING_FIELD_NUMBER: _ClassVar[int]
    DELAY_COMPENSATION_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    mode: str
    backup_workers: int
    bound: int
    staleness_scaling: bool
    delay_compensation: float
    local_steps: int
    deterministic: bool
    def __init__(self, mode: _Optional[str] = ..., backup_workers: _Optional[int] = ..., bound: _Optional[int] = ..., staleness_scaling: _Optional[bool] = ..., delay_compensation: _Optional[float] = ..., local_steps: _Optional[int] = ..., deterministic: _Optional[bool] = ...) -> None: ...

class JobSpec(_message.Message):
    __slots__ = ("protocol", "job_id", "num_workers", "num_shards", "parameters", "part_bytes", "bucket_bytes", "optimizer", "fingerprint", "consistency")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUCKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    job_id: str
    num_workers: int
    num_shards: int
    parameters: _containers.RepeatedCompositeFieldContainer[ParameterSpec]
    part_bytes: int
    bucket_bytes: int
    optimizer: OptimizerSpec
    fingerprint: str
    consistency: Consistency
    def __init__(self, protocol: _Optional[int] = ..., job_id: _Optional[str] = ..., num_workers: _Optional[int] = ..., num_shards: _Optional[int] = ..., parameters: _Optional[_Iterable[_Union[ParameterSpec, _Mapping]]] = ..., part_bytes: _Optional[int] = ..., bucket_bytes: _Optional[int] = ..., optimizer: _Optional[_Union[OptimizerSpec, _Mapping]] = ..., fingerprint: _Optional[str] = ..., consistency: _Optional[_Union[Consistency, _Mapping]] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("rank",)
    RANK_FIELD_NUMBER: _ClassVar[int]
    rank: int
    def __init__(self, rank: _Optional[int] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("worker", "shard", "job", "pid", "host", "expected_shard_incarnation")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_SHARD_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    shard: int
    job: JobSpec
    pid: int
    host: str
    expected_shard_incarnation: int
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ..., shard: _Optional[int] = ..., job: _Optional[_Union[JobSpec, _Mapping]] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., expected_shard_incarnation: _Optional[int] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("shard_incarnation", "gives_initial_values")
    SHARD_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GIVES_INITIAL_VALUES_FIELD_NUMBER: _ClassVar[int]
    shard_incarnation: int
    gives_initial_values: bool
    def __init__(self, shard_incarnation: _Optional[int] = ..., gives_initial_values: _Optional[bool] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("step", "epoch", "samples", "groups", "leases", "phases", "schedules", "point", "weight")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    SCHEDULES_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    samples: int
    groups: _containers.RepeatedCompositeFieldContainer[Hyperparameters]
    leases: _containers.RepeatedScalarFieldContainer[int]
    phases: Phases
    schedules: _containers.RepeatedScalarFieldContainer[int]
    point: Point
    weight: float
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ..., samples: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[Hyperparameters, _Mapping]]] = ..., leases: _Optional[_Iterable[int]] = ..., phases: _Optional[_Union[Phases, _Mapping]] = ..., schedules: _Optional[_Iterable[int]] = ..., point: _Optional[_Union[Point, _Mapping]] = ..., weight: _Optional[float] = ...) -> None: ...

class Point(_message.Message):
    __slots__ = ("loop", "data_epoch", "count")
    LOOP_FIELD_NUMBER: _ClassVar[int]
    DATA_EPOCH_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    loop: int
    data_epoch: int
    count: int
    def __init__(self, loop: _Optional[int] = ..., data_epoch: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Phases(_message.Message):
    __slots__ = ("data_seconds", "compute_seconds")
    DATA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    data_seconds: float
    compute_seconds: float
    def __init__(self, data_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ...) -> None: ...

class Idle(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("returned", "declined", "loader")
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    LOADER_FIELD_NUMBER: _ClassVar[int]
    PASS_FIELD_NUMBER: _ClassVar[int]
    returned: _containers.RepeatedScalarFieldContainer[int]
    declined: bool
    loader: int
    def __init__(self, returned: _Optional[_Iterable[int]] = ..., declined: _Optional[bool] = ..., loader: _Optional[int] = ..., **kwargs) -> None: ...

class Pass(_message.Message):
    __slots__ = ("num_samples", "batch_size", "global_batch_size", "drop_last", "point", "fingerprint")
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    DROP_LAST_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    num_samples: int
    batch_size: int
    global_batch_size: int
    drop_last: bool
    point: Point
    fingerprint: int
    def __init__(self, num_samples: _Optional[int] = ..., batch_size: _Optional[int] = ..., global_batch_size: _Optional[int] = ..., drop_last: _Optional[bool] = ..., point: _Optional[_Union[Point, _Mapping]] = ..., fingerprint: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("id", "start", "length")
    ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    id: int
    start: int
    length: int
    def __init__(self, id: _Optional[int] = ..., start: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Leases(_message.Message):
    __slots__ = ("leases", "loader", "over")
    PASS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LOADER_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    loader: int
    over: bool
    def __init__(self, leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ..., loader: _Optional[int] = ..., over: _Optional[bool] = ..., **kwargs) -> None: ...

class Meet(_message.Message):
    __slots__ = ("purpose", "step", "values", "weight", "takes_leases", "point", "hands_over")
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TAKES_LEASES_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    HANDS_OVER_FIELD_NUMBER: _ClassVar[int]
    purpose: Purpose
    step: int
    values: _containers.RepeatedScalarFieldContainer[float]
    weight: float
    takes_leases: bool
    point: Point
    hands_over: bool
    def __init__(self, purpose: _Optional[_Union[Purpose, str]] = ..., step: _Optional[int] = ..., values: _Optional[_Iterable[float]] = ..., weight: _Optional[float] = ..., takes_leases: _Optional[bool] = ..., point: _Optional[_Union[Point, _Mapping]] = ..., hands_over: _Optional[bool] = ...) -> None: ...

class Met(_message.Message):
    __slots__ = ("step", "epoch", "means", "chosen", "refreshed", "leases", "position", "past", "handed_over")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEANS_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    REFRESHED_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PAST_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    means: _containers.RepeatedScalarFieldContainer[float]
    chosen: bool
    refreshed: bool
    leases: Leases
    position: Position
    past: bool
    handed_over: bool
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ..., means: _Optional[_Iterable[float]] = ..., chosen: _Optional[bool] = ..., refreshed: _Optional[bool] = ..., leases: _Optional[_Union[Leases, _Mapping]] = ..., position: _Optional[_Union[Position, _Mapping]] = ..., past: _Optional[bool] = ..., handed_over: _Optional[bool] = ...) -> None: ...

class Position(_message.Message):
    __slots__ = ("point", "schedules", "schedules_step", "schedules_point")
    POINT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULES_FIELD_NUMBER: _ClassVar[int]
    SCHEDULES_STEP_FIELD_NUMBER: _ClassVar[int]
    SCHEDULES_POINT_FIELD_NUMBER: _ClassVar[int]
    point: Point
    schedules: _containers.RepeatedScalarFieldContainer[int]
    schedules_step: int
    schedules_point: Point
    def __init__(self, point: _Optional[_Union[Point, _Mapping]] = ..., schedules: _Optional[_Iterable[int]] = ..., schedules_step: _Optional[int] = ..., schedules_point: _Optional[_Union[Point, _Mapping]] = ...) -> None: ...

class ExchangeRequest(_message.Message):
    __slots__ = ("hello", "begin", "part", "idle", "meet", "lease", "heartbeat", "fetch", "number")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    MEET_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    begin: Begin
    part: _tensor_pb2.Part
    idle: Idle
    meet: Meet
    lease: LeaseRequest
    heartbeat: Heartbeat
    fetch: Fetch
    number: int
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., part: _Optional[_Union[_tensor_pb2.Part, _Mapping]] = ..., idle: _Optional[_Union[Idle, _Mapping]] = ..., meet: _Optional[_Union[Meet, _Mapping]] = ..., lease: _Optional[_Union[LeaseRequest, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ..., number: _Optional[int] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, parts: _Optional[_Iterable[int]] = ...) -> None: ...

class ExchangeResponse(_message.Message):
    __slots__ = ("part", "met", "leases", "refused", "number")
    PART_FIELD_NUMBER: _ClassVar[int]
    MET_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    part: _tensor_pb2.Part
    met: Met
    leases: Leases
    refused: Refused
    number: int
    def __init__(self, part: _Optional[_Union[_tensor_pb2.Part, _Mapping]] = ..., met: _Optional[_Union[Met, _Mapping]] = ..., leases: _Optional[_Union[Leases, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., number: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("next_step",)
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    next_step: int
    def __init__(self, next_step: _Optional[int] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("hello", "part", "state", "buffer", "clear_state")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BUFFER_FIELD_NUMBER: _ClassVar[int]
    CLEAR_STATE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    part: _tensor_pb2.Part
    state: _tensor_pb2.StateTensor
    buffer: _tensor_pb2.TensorChunk
    clear_state: bool
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., part: _Optional[_Union[_tensor_pb2.Part, _Mapping]] = ..., state: _Optional[_Union[_tensor_pb2.StateTensor, _Mapping]] = ..., buffer: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., clear_state: _Optional[bool] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("worker", "content", "held")
    class HeldEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    content: Content
    held: _containers.ScalarMap[str, bytes]
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ..., content: _Optional[_Union[Content, str]] = ..., held: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("version", "part", "state", "buffer")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BUFFER_FIELD_NUMBER: _ClassVar[int]
    version: int
    part: _tensor_pb2.Part
    state: _tensor_pb2.StateTensor
    buffer: _tensor_pb2.TensorChunk
    def __init__(self, version: _Optional[int] = ..., part: _Optional[_Union[_tensor_pb2.Part, _Mapping]] = ..., state: _Optional[_Union[_tensor_pb2.StateTensor, _Mapping]] = ..., buffer: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "pid", "host", "clock", "staleness", "received_bytes", "sent_bytes", "received_bytes_per_second", "state", "lag_seconds", "verdict")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAG_SECONDS_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    pid: int
    host: str
    clock: int
    staleness: int
    received_bytes: int
    sent_bytes: int
    received_bytes_per_second: float
    state: str
    lag_seconds: float
    verdict: str
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., clock: _Optional[int] = ..., staleness: _Optional[int] = ..., received_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., received_bytes_per_second: _Optional[float] = ..., state: _Optional[str] = ..., lag_seconds: _Optional[float] = ..., verdict: _Optional[str] = ...) -> None: ...

class Ledger(_message.Message):
    __slots__ = ("granted", "applied", "applied_in_part", "returned", "abandoned", "open")
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    APPLIED_IN_PART_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    ABANDONED_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    granted: int
    applied: int
    applied_in_part: int
    returned: int
    abandoned: int
    open: int
    def __init__(self, granted: _Optional[int] = ..., applied: _Optional[int] = ..., applied_in_part: _Optional[int] = ..., returned: _Optional[int] = ..., abandoned: _Optional[int] = ..., open: _Optional[int] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("shard", "incarnation", "pid", "host", "release", "job_id", "phase", "reason", "version", "num_parts", "parameter_bytes", "updates_per_second", "workers", "uptime_seconds", "ledger", "settings", "duplicate_parts", "refused_parts")
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SHARD_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPDATES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_PARTS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_PARTS_FIELD_NUMBER: _ClassVar[int]
    shard: int
    incarnation: int
    pid: int
    host: str
    release: str
    job_id: str
    phase: Phase
    reason: str
    version: int
    num_parts: int
    parameter_bytes: int
    updates_per_second: float
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    uptime_seconds: float
    ledger: Ledger
    settings: _containers.ScalarMap[str, str]
    duplicate_parts: int
    refused_parts: int
    def __init__(self, shard: _Optional[int] = ..., incarnation: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., release: _Optional[str] = ..., job_id: _Optional[str] = ..., phase: _Optional[_Union[Phase, str]] = ..., reason: _Optional[str] = ..., version: _Optional[int] = ..., num_parts: _Optional[int] = ..., parameter_bytes: _Optional[int] = ..., updates_per_second: _Optional[float] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., uptime_seconds: _Optional[float] = ..., ledger: _Optional[_Union[Ledger, _Mapping]] = ..., settings: _Optional[_Mapping[str, str]] = ..., duplicate_parts: _Optional[int] = ..., refused_parts: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("worker", "failure", "farewell")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    FAREWELL_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerId
    failure: str
    farewell: Farewell
    def __init__(self, worker: _Optional[_Union[WorkerId, _Mapping]] = ..., failure: _Optional[str] = ..., farewell: _Optional[_Union[Farewell, str]] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
