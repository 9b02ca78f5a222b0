"""A bucket's gradients as they are added up: where they lie, and in which element type."""

from __future__ import annotations

import torch

from ps_core.buckets import Bucket

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Wire:
    """One bucket's buffer for collectives.

    Without conversion it is the bucket's own: nothing is copied. It is on the device if the group
    is, and otherwise on the host.
    """

    def __init__(self, bucket: Bucket, dtype: torch.dtype | None, *, on_device: bool) -> None:
        """`dtype`: to convert to, or None."""
        self.bucket = bucket
        self._gradients = bucket.gradients if on_device else bucket.host_gradients
        self.parameters = bucket.parameters if on_device else bucket.host_parameters
        converts = dtype is not None and dtype.itemsize < bucket.layout.dtype.itemsize
        self.buffer = self._gradients.to(dtype, copy=True) if converts else self._gradients
        """Put collectives on this."""

    @property
    def is_on_device(self) -> bool:
        """The collectives run where the model computes."""
        return self._gradients is self.bucket.gradients

    def load(self, weight: float) -> None:
        """Fill the buffer with the bucket's gradients times `weight`; 0: with zeros, whatever they
        are.
        """
        if not weight:
            self.buffer.zero_()
            return
        if not self.is_on_device:
            self.bucket.download()
        if weight != 1.0:
            self._gradients.mul_(weight)
        if self.buffer is not self._gradients:
            self.buffer.copy_(self._gradients)

    def unload(self) -> None:
        """Make what was added up the bucket's gradients."""
        if self.buffer is not self._gradients:
            self._gradients.copy_(self.buffer)
        if not self.is_on_device:
            self.bucket.gradients.copy_(self._gradients)
