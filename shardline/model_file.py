"""`model.safetensors`: one worker writes it once training is complete, and the job is complete once
it is written. `interrupted.safetensors`: what there is when training ends before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from ps_core.checkpoint import write_model
from ps_core.errors import (
    DataLossError,
    EvictedError,
    JobFailedError,
    JobOverError,
    ResultError,
    ShardlineError,
    ShardUnreachableError,
)
from ps_core.exchange import Farewell, Meeting
from ps_core.model_files import COMPLETE, INTERRUPTED, RESCUED, remove_unfinished
from shardline.streams import tell

if TYPE_CHECKING:
    from shardline.staging import Staging

Meet = Callable[[Sequence[float]], Meeting]
"""Waits for all workers, at the end of the job, with numbers to average."""

_OTHERS_ARE_LOST: Final = (ShardUnreachableError, JobFailedError, DataLossError)
_OTHERS_HAVE_MORE: Final = (EvictedError, JobOverError)


class ModelFile:
    """What one worker does for the file."""

    def __init__(
        self, run_dir: Path | None, staging: Staging | None, *, wait_is_bounded: bool
    ) -> None:
        """Without `run_dir` this worker has no place for it. `wait_is_bounded`: the others give up
        a worker that they have not heard of for a while.
        """
        self.path = run_dir / COMPLETE if run_dir else None
        self._staging = staging
        self._wait_is_bounded = wait_is_bounded
        self._has_written = False

    def settle(self, model: torch.nn.Module, meet: Meet) -> Farewell:
        """Returns once a worker has written the file, or when no worker has a place for it. All
        workers call this when they have trained to the end.

        The chosen worker writes. When it is lost meanwhile, the next meeting ends without it, the
        file is not written, and another worker is chosen. One that has no place for the file leaves
        the job to those that have: PREEMPTED is returned. Raises ResultError.
        """
        can_write = self._has_place()

        def gather() -> Meeting:
            return meet([float(self._has_written), float(can_write)])

        meeting = gather()
        try:
            while not _is_settled(meeting):
                if meeting.chosen:
                    if not can_write:
                        return Farewell.PREEMPTED
                    self._write(model, gather if self._wait_is_bounded else None)
                meeting = gather()
        except _OTHERS_ARE_LOST as error:
            self._end_without_others(model, error, can_write=can_write)
        if self._has_written and self.path is not None:
            remove_unfinished(self.path)  # all that live are at the same point: none is at work
            _rescued(self.path).unlink(missing_ok=True)
        return Farewell.FINISHED

    def rescue(
        self, model: torch.nn.Module, versions: tuple[int, int], error: BaseException
    ) -> None:
        """Training ends with `error` before it is complete: keep what there is, whose parameters
        have these versions, the lowest and the highest. It replaces no model that is complete.

        Not with --stages, where no worker has the whole model, and the others may be gone.
        """
        is_useless = isinstance(error, (*_OTHERS_HAVE_MORE, ResultError)) or not versions[1]
        if self.path is None or self._staging or self._has_written or is_useless:
            return
        path, first, last = _rescued(self.path), *versions
        when = f"at version {first}" if first == last else f"between versions {first} and {last}"
        try:
            write_model(model, path, more={INTERRUPTED: when})
        except Exception as failure:  # noqa: BLE001 - `error` is what the process ends with
            tell(f"the model {when} cannot be written to {path}: {_told(failure)}")
        else:
            tell(f"training is not complete: the model {when} is in {path}")

    def _has_place(self) -> bool:
        """Whether this worker can write, the same on all stages of a replica: the first writes."""
        has_place = self.path is not None
        if self._staging is None:
            return has_place
        return self._staging.replica.share(bytes([has_place])) == b"\1"

    def _end_without_others(
        self, model: torch.nn.Module, error: ShardlineError, *, can_write: bool
    ) -> None:
        """Training is complete, and what has become of the file is not known any more: every worker
        writes it, the same everywhere. Raises `error` where that takes other workers.
        """
        if self._has_written or not can_write:
            return
        if self._staging is not None:
            raise error
        tell(f"training is complete, and then: {error}")
        self._write(model, None)

    def _write(self, model: torch.nn.Module, sign: Callable[[], Meeting] | None) -> None:
        write = self._staging.write_model if self._staging else write_model
        try:
            write(model, self.path or Path(), sign)  # of a replica only the first stage's counts
        except ShardlineError:
            raise  # of a meeting, or of the other stages
        except Exception as error:
            raise ResultError(
                f"training is complete, but the model cannot be written to {self.path}: "
                f"{_told(error)}"
            ) from error
        self._has_written = True


def _is_settled(meeting: Meeting) -> bool:
    """The file is written, or no worker has a place for it."""
    if meeting.is_past:
        return True
    written, can_write = meeting.means
    return bool(written) or not can_write


def _rescued(path: Path) -> Path:
    return path.with_name(RESCUED)


def _told(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
