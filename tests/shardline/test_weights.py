"""Weights of batches, and what is said of losses whose weight is not their samples."""

import pytest
import torch
from torch import nn

from ps_core.errors import UsageError
from shardline.notices import Notices
from shardline.weights import Advised, weight_of

TARGETS = torch.tensor([1, 0, 2])
SCORES = torch.zeros(3, 3)


def test_a_weight_may_be_any_number_that_is_not_negative() -> None:
    assert weight_of(TARGETS, len) == 3.0
    assert weight_of(TARGETS, lambda target: (target > 0).sum() * 0.5) == 1.0


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_what_cannot_be_a_weight_is_refused(wrong: float) -> None:
    with pytest.raises(UsageError, match="give 0, or a number from"):
        weight_of(TARGETS, lambda _: wrong)


def said_of(loss_fn: object, target: torch.Tensor) -> list[str]:
    said: list[str] = []
    notices = Notices(said.append, speaks=True)
    for _ in range(2):
        train = Advised(lambda batch: None, loss_fn, notices)
        train((SCORES, target))
        train((SCORES, target))
    return said


@pytest.mark.parametrize(
    ("loss_fn", "target", "words"),
    [
        (nn.MSELoss(reduction="sum"), SCORES, "sum over the batch"),
        (nn.CrossEntropyLoss(torch.ones(3)), TARGETS, "class_weights[target].sum()"),
        (nn.CrossEntropyLoss(ignore_index=0), TARGETS, "(target != ignore_index).sum()"),
        (nn.NLLLoss(), torch.tensor([1, -100, 2]), "(target != ignore_index).sum()"),
    ],
)
def test_a_loss_that_is_no_mean_over_samples_is_said_once(
    loss_fn: nn.Module, target: torch.Tensor, words: str
) -> None:
    [text] = said_of(loss_fn, target)
    assert words in text


@pytest.mark.parametrize(
    ("loss_fn", "target"),
    [
        (nn.MSELoss(), SCORES),
        (nn.CrossEntropyLoss(), TARGETS),
        (nn.CrossEntropyLoss(), SCORES.softmax(1)),
        (nn.functional.cross_entropy, TARGETS),
    ],
)
def test_of_other_losses_nothing_is_said(loss_fn: object, target: torch.Tensor) -> None:
    assert said_of(loss_fn, target) == []


def test_one_worker_speaks_for_all() -> None:
    said: list[str] = []
    Notices(said.append, speaks=False).once("something")
    assert said == []
