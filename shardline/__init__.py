"""shardline: train PyTorch models on fleets that are not a neat rack of identical GPUs."""

from ps_core import __version__
from ps_core.errors import ShardlineError
from shardline.session import Session, connect

__all__ = ["Session", "ShardlineError", "__version__", "connect"]
