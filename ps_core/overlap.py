"""Gradients on their way while the backward pass still computes others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ps_core.buckets import Bucket
from ps_core.errors import UsageError
from ps_core.exchange import Work


class Overlap:
    """Hands over each bucket of a step as soon as a backward pass has completed its gradients."""

    def __init__(self, buckets: Sequence[Bucket], hand_over: Callable[[Bucket], None]) -> None:
        """Notices nothing before the first `begin`."""
        self._buckets = buckets
        self._hand_over = hand_over
        self._num_missing: dict[int, int] = {}
        """Bucket → parameters without their gradient."""
        self._is_hooked = False
        self.work: Work | None = None
        """Behind the step that is open."""

    def begin(self, work: Work) -> None:
        """A step is open, and its backward pass follows."""
        if not self._is_hooked:
            self._is_hooked = True
            for bucket in self._buckets:
                for parameter in bucket.members:
                    parameter.register_post_accumulate_grad_hook(partial(self._complete, bucket))
        self.work = work
        self._num_missing = {bucket.layout.index: len(bucket.members) for bucket in self._buckets}

    def end(self) -> None:
        """The backward pass is over: hand over the buckets that it has not completed."""
        missing, self._num_missing, self.work = self._num_missing, {}, None
        for bucket in reversed(self._buckets):
            if missing[bucket.layout.index]:
                self._hand_over(bucket)

    def check_closed(self) -> None:
        """Raises UsageError in the middle of a step."""
        if self.work is not None:
            raise UsageError(
                "session.step(…, overlap=True) has sent gradients already: call optimizer.step() "
                "right after it, or use overlap=False"
            )

    def _complete(self, bucket: Bucket, parameter: torch.Tensor) -> None:
        index = bucket.layout.index
        if index not in self._num_missing:
            return
        self._num_missing[index] -= 1
        if not self._num_missing[index]:
            self._hand_over(bucket)
