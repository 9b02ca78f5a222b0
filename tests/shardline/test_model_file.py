"""Which worker writes the model at the end of a job; its meetings are written down here."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ps_core import checkpoint
from ps_core.errors import (
    EvictedError,
    JobFailedError,
    JobOverError,
    Preempted,
    ResultError,
    ShardUnreachableError,
)
from ps_core.exchange import Farewell, Meeting
from ps_core.model_files import read_metadata
from shardline.model_file import ModelFile

Numbers = Sequence[float]


def meetings(
    *others: Numbers | Exception, chosen: bool | Sequence[bool] = True
) -> tuple[list[Numbers], Callable[[Numbers], Meeting]]:
    """A second worker that brings these numbers, one after the other, or what goes wrong; and what
    the first one has brought.
    """
    brought: list[Numbers] = []
    theirs = iter(others)

    def meet(numbers: Numbers) -> Meeting:
        is_chosen = chosen if isinstance(chosen, bool) else chosen[len(brought)]
        brought.append(numbers)
        other = next(theirs)
        if isinstance(other, BaseException):
            raise other
        means = tuple((a + b) / 2 for a, b in zip(numbers, other, strict=True))
        return Meeting(0, means, is_chosen)

    return brought, meet


def model_file(folder: Path | None, *, wait_is_bounded: bool = False) -> ModelFile:
    return ModelFile(folder, None, wait_is_bounded=wait_is_bounded)


def check(folder: Path, model: torch.nn.Module) -> None:
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_the_chosen_worker_writes_and_the_others_hear_of_it(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    brought, meet = meetings((0, 1), (0, 1))
    assert model_file(tmp_path).settle(model, meet) is Farewell.FINISHED
    assert brought == [[0, 1], [1, 1]]
    check(tmp_path, model)


def test_a_worker_that_is_not_chosen_waits_until_the_file_is_there(tmp_path: Path) -> None:
    brought, meet = meetings((0, 1), (1, 1), chosen=False)
    assert model_file(tmp_path).settle(torch.nn.Linear(2, 3), meet) is Farewell.FINISHED
    assert brought == [[0, 1], [0, 1]]
    assert list(tmp_path.iterdir()) == []


def test_the_next_worker_writes_in_place_of_one_that_is_lost(tmp_path: Path) -> None:
    (tmp_path / ".model.safetensors.0123").write_bytes(b"half of it")
    model = torch.nn.Linear(2, 3)
    _, meet = meetings((0, 1), (0, 1), (0, 1), chosen=(False, True, True))
    model_file(tmp_path).settle(model, meet)
    check(tmp_path, model)


def test_no_worker_waits_for_a_file_for_which_none_has_a_place(tmp_path: Path) -> None:
    brought, meet = meetings((0, 0))
    assert model_file(None).settle(torch.nn.Linear(2, 3), meet) is Farewell.FINISHED
    assert brought == [[0, 0]]


def test_a_worker_without_a_place_leaves_the_job_to_one_that_has() -> None:
    _, meet = meetings((0, 1))
    assert model_file(None).settle(torch.nn.Linear(2, 3), meet) is Farewell.PREEMPTED


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("kind", [JobFailedError, ShardUnreachableError])
def test_a_worker_that_hears_nothing_any_more_writes_what_it_has_been_trained_to(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    chosen: bool,
    kind: type[JobFailedError | ShardUnreachableError],
) -> None:
    model = torch.nn.Linear(2, 3)
    _, meet = meetings((0, 1), kind("shard 0 is gone"), chosen=chosen)
    assert model_file(tmp_path).settle(model, meet) is Farewell.FINISHED
    check(tmp_path, model)
    said = "shardline: training is complete, and then: shard 0 is gone\n"
    assert capsys.readouterr().err == ("" if chosen else said)


@pytest.mark.parametrize("error", [JobFailedError("worker 1 is gone"), Preempted()])
def test_training_that_is_not_complete_writes_no_model(
    tmp_path: Path, error: JobFailedError | Preempted
) -> None:
    _, meet = meetings(error)  # type: ignore[arg-type]  # a SystemExit is no Exception
    with pytest.raises(type(error)):
        model_file(tmp_path).settle(torch.nn.Linear(2, 3), meet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_bounded", [True, False])
def test_a_long_write_shows_the_others_that_the_writer_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_bounded: bool
) -> None:
    monkeypatch.setattr(checkpoint, "SIGN_BYTES", 24)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))  # 24 + 12 + 24 + 8
    brought, meet = meetings(*[(0, 1)] * 4)
    model_file(tmp_path, wait_is_bounded=is_bounded).settle(model, meet)
    assert brought == [[0, 1], *([[0, 1]] * 2 if is_bounded else []), [1, 1]]
    check(tmp_path, model)


# -- Training that ends before ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("versions", "when"), [((7, 7), "at version 7"), ((7, 8), "between versions 7 and 8")]
)
def test_what_training_has_come_to_is_kept_under_another_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], versions: tuple[int, int], when: str
) -> None:
    model, path = torch.nn.Linear(2, 3), tmp_path / "interrupted.safetensors"
    model_file(tmp_path).rescue(model, versions, Preempted())
    assert torch.equal(load_file(path)["weight"], model.weight)
    assert read_metadata(path)["interrupted"] == when
    said = f"shardline: training is not complete: the model {when} is in {path}\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("versions", "error"),
    [
        ((0, 0), Preempted()),
        ((7, 7), EvictedError("the others have gone on")),
        ((7, 7), JobOverError("the job is complete")),
        ((7, 7), ResultError("no room")),
    ],
)
def test_nothing_is_kept_where_others_have_more_or_there_is_nothing(
    tmp_path: Path, versions: tuple[int, int], error: BaseException
) -> None:
    model_file(tmp_path).rescue(torch.nn.Linear(2, 3), versions, error)
    model_file(None).rescue(torch.nn.Linear(2, 3), (7, 7), Preempted())
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_has_written_the_model_keeps_no_other(tmp_path: Path) -> None:
    model, file = torch.nn.Linear(2, 3), model_file(tmp_path)
    _, meet = meetings((0, 1), EvictedError("it was silent"))
    with pytest.raises(EvictedError):
        file.settle(model, meet)
    file.rescue(model, (7, 7), JobFailedError("shard 0 is gone"))
    check(tmp_path, model)


def test_a_model_that_is_complete_replaces_one_that_is_not(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    model_file(tmp_path).rescue(model, (7, 7), Preempted())
    _, meet = meetings((0, 1), (0, 1))
    model_file(tmp_path).settle(model, meet)
    check(tmp_path, model)


def test_there_may_be_no_room_for_what_training_has_come_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_file(tmp_path / "gone").rescue(torch.nn.Linear(2, 3), (7, 7), Preempted())
    said = capsys.readouterr().err
    assert said.startswith("shardline: the model at version 7 cannot be written to ")
    assert said.endswith(": No such file or directory\n")


# -- Failures --------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_model_for_which_there_is_no_room_is_an_error_that_says_so(tmp_path: Path) -> None:
    _, meet = meetings((0, 1))
    with files_of_at_most(1000), pytest.raises(ResultError) as caught:
        model_file(tmp_path).settle(torch.nn.Linear(32, 32), meet)
    path = tmp_path / "model.safetensors"
    reason = os.strerror(errno.EFBIG)
    assert str(caught.value) == (
        f"training is complete, but the model cannot be written to {path}: {reason}"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_is_gone_is_an_error_that_says_so(tmp_path: Path) -> None:
    _, meet = meetings((0, 1))
    with pytest.raises(ResultError, match="No such file or directory"):
        model_file(tmp_path / "gone").settle(torch.nn.Linear(2, 2), meet)


class Faulty(torch.nn.Linear):
    def get_extra_state(self) -> object:
        raise RuntimeError("no state")


def test_a_model_that_cannot_be_read_is_an_error_that_says_so(tmp_path: Path) -> None:
    _, meet = meetings((0, 1))
    with pytest.raises(ResultError, match="RuntimeError: no state"):
        model_file(tmp_path).settle(Faulty(2, 2), meet)
