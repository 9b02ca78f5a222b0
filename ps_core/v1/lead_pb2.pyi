from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ShardHello(_message.Message):
    __slots__ = ("shard", "incarnation", "expected_lead_incarnation", "epoch")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_LEAD_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    shard: int
    incarnation: int
    expected_lead_incarnation: int
    epoch: int
    def __init__(self, shard: _Optional[int] = ..., incarnation: _Optional[int] = ..., expected_lead_incarnation: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class Lost(_message.Message):
    __slots__ = ("rank", "incarnation", "reason")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    reason: str
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Remains(_message.Message):
    __slots__ = ("rank", "incarnation", "step", "leases", "used_parts", "num_parts", "samples", "weight")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    USED_PARTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    step: int
    leases: _containers.RepeatedScalarFieldContainer[int]
    used_parts: int
    num_parts: int
    samples: int
    weight: float
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., leases: _Optional[_Iterable[int]] = ..., used_parts: _Optional[int] = ..., num_parts: _Optional[int] = ..., samples: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("step", "rank")
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    step: int
    rank: int
    def __init__(self, step: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class Squares(_message.Message):
    __slots__ = ("step", "total")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    step: int
    total: float
    def __init__(self, step: _Optional[int] = ..., total: _Optional[float] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class ControlRequest(_message.Message):
    __slots__ = ("hello", "squares", "failure", "lost", "remains", "ready")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SQUARES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    REMAINS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    hello: ShardHello
    squares: Squares
    failure: Failure
    lost: Lost
    remains: Remains
    ready: Ready
    def __init__(self, hello: _Optional[_Union[ShardHello, _Mapping]] = ..., squares: _Optional[_Union[Squares, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., lost: _Optional[_Union[Lost, _Mapping]] = ..., remains: _Optional[_Union[Remains, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("lead_incarnation",)
    LEAD_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    lead_incarnation: int
    def __init__(self, lead_incarnation: _Optional[int] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("epoch", "members", "evicted", "reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    members: _containers.RepeatedCompositeFieldContainer[Member]
    evicted: _containers.RepeatedCompositeFieldContainer[Member]
    reason: str
    def __init__(self, epoch: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., evicted: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., reason: _Optional[str] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("rank", "incarnation", "first_step", "enters")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    ENTERS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    first_step: int
    enters: bool
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., first_step: _Optional[int] = ..., enters: _Optional[bool] = ...) -> None: ...

class Seal(_message.Message):
    __slots__ = ("step", "contributors")
    STEP_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    step: int
    contributors: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., contributors: _Optional[_Iterable[int]] = ...) -> None: ...

class Factor(_message.Message):
    __slots__ = ("step", "factor")
    STEP_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    step: int
    factor: float
    def __init__(self, step: _Optional[int] = ..., factor: _Optional[float] = ...) -> None: ...

class Complete(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ControlResponse(_message.Message):
    __slots__ = ("welcome", "membership", "factor", "failure", "complete", "seal")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    membership: Membership
    factor: Factor
    failure: Failure
    complete: Complete
    seal: Seal
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., membership: _Optional[_Union[Membership, _Mapping]] = ..., factor: _Optional[_Union[Factor, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., complete: _Optional[_Union[Complete, _Mapping]] = ..., seal: _Optional[_Union[Seal, _Mapping]] = ...) -> None: ...
