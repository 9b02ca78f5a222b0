"""What a script does to its gradients between a backward pass and the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ps_core.buckets import Bucket


class Gradients:
    """The `.grad` of all trained parameters, as backward passes leave them.

    They are views into the buckets, so a bucket's version counter tells of every change in place.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self.parameters = [each for bucket in buckets for each in bucket.members]
        self._smallest_first = sorted(self.parameters, key=torch.Tensor.numel)
        self._left: list[int] | None = None

    def leave(self) -> None:
        """A backward pass is complete: the gradients are as it leaves them."""
        self._left = self._versions()

    def forget(self) -> None:
        """They are the exchange's from now on."""
        self._left = None

    def are_none(self) -> bool:
        """The script has thrown all of them away."""
        return all(each.grad is None for each in self._smallest_first)

    def were_zeroed(self) -> bool:
        """The script has set all of them to zero, or changed what was zero."""
        if not self.were_changed():
            return False
        gradients = (each.grad for each in self._smallest_first)
        return not any(each is not None and bool(each.any()) for each in gradients)

    def were_changed(self) -> bool:
        """The script has changed them in place. A GradScaler that unscales them does not count."""
        return self._left is not None and self._left != self._versions()

    def _versions(self) -> list[int]:
        return [bucket.gradient_version for bucket in self._buckets]
