"""What a batch weighs in the mean over workers, and losses whose weight is not their samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ps_core.errors import UsageError
from ps_core.weights import checked_weight
from shardline.notices import Notices

Weight = Callable[[Tensor], Tensor | float]
"""Of a target: what the loss is divided by, such as its number of tokens."""

_PAGE = "see docs/recipes.md, Which loss, which weight"


def weight_of(target: Tensor, weight: Weight) -> float:
    """The weight of a batch. Raises UsageError for what cannot be one."""
    if not callable(weight):
        raise UsageError(
            f"session.step(…, weight={weight!r}) needs a function of the target, such as "
            "weight=lambda target: (target != ignore_index).sum()"
        )
    return checked_weight("session.step(…, weight=…)", weight(target))


class Advised:
    """`train`, and what the person who runs it should know of the loss."""

    def __init__(
        self, train: Callable[..., Tensor | None], loss_fn: object, notices: Notices
    ) -> None:
        self._train = train
        self._loss_fn = loss_fn
        self._notices = notices
        if text := advice(loss_fn):
            notices.once(text)

    def __call__(self, batch: Sequence[Tensor], **options: Any) -> Tensor | None:  # noqa: ANN401 - of `train`
        """Train on a batch."""
        if text := advice_on_target(self._loss_fn, batch[-1]):
            self._notices.once(text)
        return self._train(batch, **options)


def advice(loss_fn: object) -> str:
    """What to do about a loss whose mean is not over samples, where that shows; "": nothing."""
    if getattr(loss_fn, "reduction", "mean") == "sum" and isinstance(loss_fn, nn.Module):
        return (
            "loss_fn is a sum over the batch, and an update is the mean of the workers' gradients: "
            f"take reduction='mean', or {_PAGE}"
        )
    if isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss) and loss_fn.weight is not None:
        return (
            "loss_fn is a mean over class weights, and workers weigh as many as they have samples: "
            "say session.step(…, weight=lambda target: class_weights[target].sum()), "
            f"{_PAGE}"
        )
    return ""


def advice_on_target(loss_fn: object, target: Tensor) -> str:
    """The same where the target shows it. Nothing is looked up on another device."""
    if not isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss) or target.device.type != "cpu":
        return ""
    if target.is_floating_point() or not bool((target == loss_fn.ignore_index).any()):
        return ""
    return (
        "loss_fn leaves out targets (ignore_index), and workers weigh as many as they have "
        "samples: say session.step(…, weight=lambda target: (target != ignore_index).sum()), "
        f"{_PAGE}"
    )
