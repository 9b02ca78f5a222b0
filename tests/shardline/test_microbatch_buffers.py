"""Which buffers are named because a split model changes them several times a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.partition import Layer
from shardline.microbatch_buffers import naming_changes
from tests.reference import holding


def test_buffers_that_are_changed_or_replaced_are_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = holding({"kept": torch.ones(1), "added_to": torch.ones(1), "replaced": torch.ones(1)})
    layers = [Layer("blocks.1", nn.Sequential(layer)), Layer("head", nn.Linear(1, 1))]
    with naming_changes(layers, 4):
        layer.get_buffer("added_to").add_(1)
        layer.replaced = layer.get_buffer("replaced") * 0.9
    (said,) = caplog.messages
    assert "forward changes blocks.1.0.added_to, blocks.1.0.replaced, which happens 4 times" in said


def test_nothing_is_said_of_a_model_that_changes_none(caplog: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode():
        inferred = torch.ones(1)
    layers = [Layer("0", holding({"inferred": inferred}))]
    with naming_changes(layers, 4):
        layers[0].module.get_buffer("inferred").clone()
    assert not caplog.messages
