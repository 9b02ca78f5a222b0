from ps_core.v1 import shard_pb2 as _shard_pb2
from ps_core.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Row(_message.Message):
    __slots__ = ("rank", "numbers")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    numbers: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, rank: _Optional[int] = ..., numbers: _Optional[_Iterable[float]] = ...) -> None: ...

class PastMeeting(_message.Message):
    __slots__ = ("point", "means")
    POINT_FIELD_NUMBER: _ClassVar[int]
    MEANS_FIELD_NUMBER: _ClassVar[int]
    point: _shard_pb2.Point
    means: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, point: _Optional[_Union[_shard_pb2.Point, _Mapping]] = ..., means: _Optional[_Iterable[float]] = ...) -> None: ...

class Positions(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class LoaderState(_message.Message):
    __slots__ = ("loader", "num_ended", "ended", "open", "num_positions", "unit", "shared", "point", "used", "progress")
    LOADER_FIELD_NUMBER: _ClassVar[int]
    NUM_ENDED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    NUM_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    loader: int
    num_ended: int
    ended: _shard_pb2.Point
    open: bool
    num_positions: int
    unit: int
    shared: bool
    point: _shard_pb2.Point
    used: _containers.RepeatedCompositeFieldContainer[Positions]
    progress: bool
    def __init__(self, loader: _Optional[int] = ..., num_ended: _Optional[int] = ..., ended: _Optional[_Union[_shard_pb2.Point, _Mapping]] = ..., open: _Optional[bool] = ..., num_positions: _Optional[int] = ..., unit: _Optional[int] = ..., shared: _Optional[bool] = ..., point: _Optional[_Union[_shard_pb2.Point, _Mapping]] = ..., used: _Optional[_Iterable[_Union[Positions, _Mapping]]] = ..., progress: _Optional[bool] = ...) -> None: ...

class Speed(_message.Message):
    __slots__ = ("rank", "samples_per_second")
    RANK_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    rank: int
    samples_per_second: float
    def __init__(self, rank: _Optional[int] = ..., samples_per_second: _Optional[float] = ...) -> None: ...

class GroupState(_message.Message):
    __slots__ = ("round", "version", "rows", "position", "meetings", "loaders", "speeds", "goes_on")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    MEETINGS_FIELD_NUMBER: _ClassVar[int]
    LOADERS_FIELD_NUMBER: _ClassVar[int]
    SPEEDS_FIELD_NUMBER: _ClassVar[int]
    GOES_ON_FIELD_NUMBER: _ClassVar[int]
    round: int
    version: int
    rows: _containers.RepeatedCompositeFieldContainer[Row]
    position: _shard_pb2.Position
    meetings: _containers.RepeatedCompositeFieldContainer[PastMeeting]
    loaders: _containers.RepeatedCompositeFieldContainer[LoaderState]
    speeds: _containers.RepeatedCompositeFieldContainer[Speed]
    goes_on: bool
    def __init__(self, round: _Optional[int] = ..., version: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[Row, _Mapping]]] = ..., position: _Optional[_Union[_shard_pb2.Position, _Mapping]] = ..., meetings: _Optional[_Iterable[_Union[PastMeeting, _Mapping]]] = ..., loaders: _Optional[_Iterable[_Union[LoaderState, _Mapping]]] = ..., speeds: _Optional[_Iterable[_Union[Speed, _Mapping]]] = ..., goes_on: _Optional[bool] = ...) -> None: ...

class TensorList(_message.Message):
    __slots__ = ("specs", "digests")
    SPECS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    specs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, specs: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...
