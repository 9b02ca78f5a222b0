"""shardline: train PyTorch models on fleets that are not a neat rack of identical GPUs."""

from typing import TYPE_CHECKING, Any

from ps_core import __version__

if TYPE_CHECKING:
    from ps_core.errors import ShardlineError
    from shardline.session import Session, connect

__all__ = ["Session", "ShardlineError", "__version__", "connect"]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import torch when a training script asks for it, not for every command line."""
    if name in ("Session", "connect"):
        from shardline import session

        return getattr(session, name)
    if name == "ShardlineError":
        from ps_core.errors import ShardlineError

        return ShardlineError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
