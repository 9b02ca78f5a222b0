"""Gradients on their way while the backward pass still computes others.

A parameter's gradient is complete when autograd has added to it for the last time in a backward
pass: once, as a rule, but once for each use of a layer in reentrant checkpoints, which run backward
passes of their own. Nothing says beforehand which time is the last. So a bucket is sent early only
if it is known from a whole step that each of its gradients is added to once, and never after it
was seen that one is added to more often; what changes a gradient that was sent is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ps_core.buckets import Bucket
from ps_core.errors import UsageError
from ps_core.exchange import Work


@dataclass(slots=True)
class _Sent:
    """The gradients of a bucket when it was handed over."""

    version: int
    gradients: list[torch.Tensor | None]

    @classmethod
    def of(cls, bucket: Bucket) -> _Sent:
        return cls(bucket.gradient_version, [parameter.grad for parameter in bucket.members])

    def is_still(self, bucket: Bucket) -> bool:
        now = _Sent.of(bucket)
        same = (a is b for a, b in zip(self.gradients, now.gradients, strict=True))
        return self.version == now.version and all(same)


@dataclass(slots=True)
class _Progress:
    """A bucket, what is known about it, and what has become of it in the step in progress."""

    bucket: Bucket
    counts: list[int] = field(default_factory=list)
    """How often each gradient was added to."""
    sent: _Sent | None = None
    is_regular: bool = False
    """In a whole step each gradient was added to once."""
    is_irregular: bool = False
    """In some step one of them was added to more often."""

    def begin(self) -> None:
        self.counts, self.sent = [0] * len(self.bucket.members), None

    @property
    def is_complete(self) -> bool:
        """As far as is known, no gradient is added to any more."""
        return self.is_regular and not self.is_irregular and min(self.counts) == 1


class Overlap:
    """Hands over each bucket of a step as soon as a backward pass has completed its gradients."""

    def __init__(self, buckets: Sequence[Bucket], hand_over: Callable[[Bucket], None]) -> None:
        """Notices nothing before the first `begin`."""
        self._progress = [_Progress(bucket) for bucket in buckets]
        self._hand_over = hand_over
        self._is_hooked = False
        self.work: Work | None = None
        """Behind the step that is open."""

    def begin(self, work: Work) -> None:
        """A step is open, and its backward pass follows."""
        if not self._is_hooked:
            self._is_hooked = True
            for each in self._progress:
                for position, parameter in enumerate(each.bucket.members):
                    added = partial(self._added, each, position)
                    parameter.register_post_accumulate_grad_hook(added)
        self.work = work
        for each in self._progress:
            each.begin()

    def end(self) -> None:
        """The backward pass is over: hand over the buckets that were not. Raises UsageError."""
        self.work = None
        for each in self._progress:
            if each.sent is not None and not each.sent.is_still(each.bucket):
                raise _too_late()
            each.is_regular |= set(each.counts) == {1}
        for each in reversed(self._progress):
            if each.sent is None:
                self._hand_over(each.bucket)

    def check_closed(self) -> None:
        """Raises UsageError in the middle of a step."""
        if self.work is not None:
            raise UsageError(
                "session.step(…, overlap=True) has sent gradients already: call optimizer.step() "
                "right after it, or use overlap=False"
            )

    def _added(self, each: _Progress, position: int, parameter: torch.Tensor) -> None:
        """To a parameter's gradient, in a backward pass."""
        if self.work is None:
            return
        each.counts[position] += 1
        each.is_irregular |= each.counts[position] > 1
        if each.sent is not None:
            raise _too_late()
        if each.is_complete:
            self._hand_over(each.bucket)
            each.sent = _Sent.of(each.bucket)


def _too_late() -> UsageError:
    return UsageError(
        "a gradient was changed after session.step(…, overlap=True) had sent it: by a second "
        "backward pass, a layer that is used several times in reentrant checkpoints, or the "
        "script. Use overlap=False, or torch.utils.checkpoint with use_reentrant=False"
    )
