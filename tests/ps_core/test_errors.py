import grpc
import pytest

from ps_core import errors
from ps_core.errors import ShardlineError, error_from, status_of

# class name, retryable, exit code, status: written out here on purpose, not read from the module.
CONTRACT = [
    ("ShardlineError", False, 1, "INTERNAL"),
    ("ConfigError", False, 2, "INTERNAL"),
    ("UsageError", False, 2, "INTERNAL"),
    ("ProtocolError", False, 1, "INVALID_ARGUMENT"),
    ("MismatchError", False, 1, "FAILED_PRECONDITION"),
    ("DataLossError", False, 1, "DATA_LOSS"),
    ("JobFailedError", False, 1, "ABORTED"),
    ("ShardUnreachableError", True, 3, "UNAVAILABLE"),
    ("EvictedError", True, 3, "PERMISSION_DENIED"),
    ("JoinTimeoutError", False, 1, "DEADLINE_EXCEEDED"),
    ("JobOverError", False, 0, "OUT_OF_RANGE"),
    ("NonFiniteError", False, 1, "INTERNAL"),
    ("ResultError", False, 2, "INTERNAL"),
]
ON_THE_WIRE = [(name, status) for name, _, _, status in CONTRACT if status != "INTERNAL"]


def error_class(name: str) -> type[ShardlineError]:
    found: type[ShardlineError] = getattr(errors, name)
    assert issubclass(found, ShardlineError)
    return found


@pytest.mark.parametrize(("name", "retryable", "exit_code", "status"), CONTRACT)
def test_each_class_says_whether_a_retry_helps_how_to_exit_and_which_status_it_is(
    name: str, retryable: bool, exit_code: int, status: str
) -> None:
    kind = error_class(name)
    assert kind.retryable is retryable
    assert kind.exit_code == exit_code
    assert status_of(kind("why")) is grpc.StatusCode[status]


def test_the_contract_above_lists_every_class() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, ShardlineError)
    }
    assert defined == {name for name, *_ in CONTRACT}


@pytest.mark.parametrize("name", ["ConfigError", "UsageError"])
def test_a_mistake_of_the_user_is_also_a_value_error(name: str) -> None:
    assert issubclass(error_class(name), ValueError)


@pytest.mark.parametrize(("name", "status"), ON_THE_WIRE)
def test_an_error_crosses_the_wire_as_the_same_class_with_the_same_message(
    name: str, status: str
) -> None:
    received = error_from(grpc.StatusCode[status], "shard 2: why")
    assert type(received) is error_class(name)
    assert str(received) == "shard 2: why"
    assert status_of(received) is grpc.StatusCode[status]


def test_no_two_classes_share_a_status() -> None:
    statuses = [status for _, status in ON_THE_WIRE]
    assert len(statuses) == len(set(statuses))


def test_a_subclass_travels_as_its_parent() -> None:
    class WrongDtypeError(errors.ProtocolError):
        pass

    assert status_of(WrongDtypeError("int4")) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.CANCELLED, errors.ShardUnreachableError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ProtocolError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.MismatchError),
    ],
)
def test_codes_that_only_grpc_sends_have_a_class_too(
    code: grpc.StatusCode, kind: type[ShardlineError]
) -> None:
    assert type(error_from(code, "why")) is kind


@pytest.mark.parametrize("name", ["UNKNOWN", "INTERNAL", "UNAUTHENTICATED", "ALREADY_EXISTS"])
def test_a_code_outside_the_table_is_named_and_not_retried(name: str) -> None:
    error = error_from(grpc.StatusCode[name], "it broke")
    assert type(error) is ShardlineError
    assert str(error) == f"{name}: it broke"
    assert not error.retryable


def test_every_code_but_ok_gives_an_error() -> None:
    for code in grpc.StatusCode:
        if code is not grpc.StatusCode.OK:
            assert isinstance(error_from(code, "why"), ShardlineError)


def test_a_worker_told_to_end_exits_by_the_code_that_asks_for_a_replacement() -> None:
    with pytest.raises(SystemExit) as caught:
        raise errors.Preempted
    assert caught.value.code == 75
    # `except Exception` in a script must not let it go on.
    assert not isinstance(caught.value, Exception)


def test_success_has_no_error() -> None:
    with pytest.raises(AssertionError):
        error_from(grpc.StatusCode.OK, "")


def test_no_terminal_obeys_a_message() -> None:
    error = errors.ProtocolError("é \x1b]0;owned\x07\n\u202e\udcff")
    assert str(error) == r"é \x1b]0;owned\x07\n\u202e\udcff"
    assert errors.printable(str(error)) == str(error)


def test_a_message_has_an_end() -> None:
    assert str(errors.ProtocolError("x" * 10_000)) == "x" * 3999 + "…"
