from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ShardHello(_message.Message):
    __slots__ = ("shard", "incarnation", "expected_lead_incarnation")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_LEAD_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    shard: int
    incarnation: int
    expected_lead_incarnation: int
    def __init__(self, shard: _Optional[int] = ..., incarnation: _Optional[int] = ..., expected_lead_incarnation: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("hello", "squares", "failure")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SQUARES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    hello: ShardHello
    squares: Squares
    failure: Failure
    def __init__(self, hello: _Optional[_Union[ShardHello, _Mapping]] = ..., squares: _Optional[_Union[Squares, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("lead_incarnation",)
    LEAD_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    lead_incarnation: int
    def __init__(self, lead_incarnation: _Optional[int] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("epoch", "members")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    members: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., members: _Optional[_Iterable[int]] = ...) -> None: ...

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
    __slots__ = ("welcome", "membership", "factor", "failure", "complete")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    membership: Membership
    factor: Factor
    failure: Failure
    complete: Complete
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., membership: _Optional[_Union[Membership, _Mapping]] = ..., factor: _Optional[_Union[Factor, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., complete: _Optional[_Union[Complete, _Mapping]] = ...) -> None: ...
