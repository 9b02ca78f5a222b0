"""The one exception family, and the one table between it and gRPC status codes.

Every error that a user can meet is a `ShardlineError`. Its class says two things that code acts on:
`retryable` (can the same call succeed later without anybody changing anything?) and `exit_code`
(what a command ends with: 1 the job failed, 2 the user must change something, 3 try again).
"""

import re
from typing import ClassVar, Final

import grpc

_LONGEST_MESSAGE: Final = 4000
"""Characters."""


def printable(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """The text in one line of at most so many characters, which no terminal obeys: what is not
    printable is written as Python would write it in a literal.
    """
    if len(text) > longest:
        text = f"{text[: longest - 1]}…"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


class ShardlineError(Exception):
    """Anything that shardline reports; its message is one sentence that says what to do.

    Part of the message may come from another machine, or from a name in a model.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))

    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1


class ConfigError(ShardlineError, ValueError):
    """A configuration value is unknown, malformed, out of range or contradicts another one."""

    exit_code = 2


class UsageError(ShardlineError, ValueError):
    """A training script used the API in a way that cannot work."""

    exit_code = 2


class ProtocolError(ShardlineError):
    """A frame is malformed: wrong size, unknown part, bad dtype."""


class MismatchError(ShardlineError):
    """Two sides do not describe the same thing: model, optimizer, shards, protocol or job."""


class DataLossError(ShardlineError):
    """A shard restarted without its parameters; going on would silently train from other values."""


class JobFailedError(ShardlineError):
    """Another worker or shard died or failed; the message names it."""


class ShardUnreachableError(ShardlineError):
    """A shard cannot be reached now; it may come up, or come back."""

    retryable = True
    exit_code = 3


class EvictedError(ShardlineError):
    """This process takes no part any more: it was silent, late or replaced. Another may come."""

    retryable = True
    exit_code = 3


class JoinTimeoutError(ShardlineError):
    """Some workers never joined; the message names them."""


class JobOverError(ShardlineError):
    """The job was complete before this worker could take part: nothing is left to do."""

    exit_code = 0


class NonFiniteError(ShardlineError):
    """A gradient or loss holds NaN or infinity."""


class ResultError(ShardlineError):
    """What training has come to cannot be kept."""

    exit_code = 2


class Preempted(SystemExit):
    """This process was told to end (SIGTERM) and leaves the job well, between two steps.

    Not an Exception: a script that handles its errors must not go on training. The exit code is
    EX_TEMPFAIL, by which a launcher knows to replace the process without counting a failure.
    """

    def __init__(self) -> None:
        super().__init__(75)


# The translation table, the same in both directions.
_STATUSES: Final[dict[type[ShardlineError], grpc.StatusCode]] = {
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    MismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    DataLossError: grpc.StatusCode.DATA_LOSS,
    JobFailedError: grpc.StatusCode.ABORTED,
    JobOverError: grpc.StatusCode.OUT_OF_RANGE,
    ShardUnreachableError: grpc.StatusCode.UNAVAILABLE,
    EvictedError: grpc.StatusCode.PERMISSION_DENIED,
    JoinTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
}

# Codes that we never send: gRPC itself ends a call with them.
_CLASSES: Final[dict[grpc.StatusCode, type[ShardlineError]]] = {
    **{code: error for error, code in _STATUSES.items()},
    # A server that stops cancels the calls still open; the shard may come back.
    grpc.StatusCode.CANCELLED: ShardUnreachableError,
    # A frame larger than the receiver allows.
    grpc.StatusCode.RESOURCE_EXHAUSTED: ProtocolError,
    # Something listens there, but it does not offer this service or method.
    grpc.StatusCode.UNIMPLEMENTED: MismatchError,
}


def in_short(error: BaseException) -> str:
    """What torch says, without the place in its source in front, and the advice behind."""
    return re.sub(r"^\[\S+\] |\. This is typically .*|\n.*", "", str(error), flags=re.DOTALL)


def status_of(error: ShardlineError) -> grpc.StatusCode:
    """The status a call ends with because of `error`; INTERNAL for one that no peer can act on."""
    for kind, code in _STATUSES.items():
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def error_from(code: grpc.StatusCode, message: str) -> ShardlineError:
    """The error that a peer's `code` and `message` stand for; never for OK.

    A code outside the table (UNKNOWN and INTERNAL are bugs in the peer) gives a plain
    `ShardlineError`, not retryable, whose message starts with the code's name.
    DEADLINE_EXCEEDED is taken as the peer's word that workers never joined: a caller whose own
    deadline can expire first says so itself, with `ShardUnreachableError`.
    """
    assert code is not grpc.StatusCode.OK, "a call that succeeded has no error"
    kind = _CLASSES.get(code)
    if kind is None:
        return ShardlineError(f"{code.name}: {message}")
    return kind(message)
