"""Buckets are handed over while the backward pass still computes others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ps_core.buckets import Bucket, make_buckets
from ps_core.errors import NonFiniteError, UsageError
from ps_core.exchange import Work
from ps_core.overlap import Overlap
from ps_core.plan import ParameterSpec, make_plan
from tests.ps_core.test_optimizer import enter


def chain() -> tuple[nn.Sequential, list[Bucket]]:
    """Three layers, each with a bucket of its own."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    specs = [ParameterSpec(n, p.dtype, tuple(p.shape), 0) for n, p in model.named_parameters()]
    plan = make_plan(specs, 1, 512, 256)
    return model, make_buckets(plan, list(model.parameters()))


def test_the_last_layers_go_first_and_each_once_its_gradient_is_there() -> None:
    model, buckets = chain()
    handed: list[tuple[int, bool]] = []
    overlap = Overlap(buckets, lambda b: handed.append((b.layout.index, bool(b.gradients.any()))))
    overlap.begin(Work(samples=4))
    model(torch.ones(4, 8)).sum().backward()
    assert handed == [(2, True), (1, True), (0, True)]
    overlap.end()
    assert len(handed) == 3


def test_what_backward_does_not_reach_is_handed_over_at_the_end() -> None:
    model, buckets = chain()
    handed: list[int] = []
    overlap = Overlap(buckets, lambda bucket: handed.append(bucket.layout.index))
    overlap.begin(Work(samples=4))
    model[1](torch.ones(4, 8)).sum().backward()
    assert handed == [1]
    overlap.end()
    assert handed == [1, 2, 0]


def test_a_backward_pass_outside_of_a_step_hands_nothing_over() -> None:
    model, buckets = chain()
    handed: list[int] = []
    overlap = Overlap(buckets, lambda bucket: handed.append(bucket.layout.index))
    overlap.begin(Work(samples=4))
    overlap.end()
    handed.clear()
    model(torch.ones(4, 8)).sum().backward()
    assert handed == []


def test_a_step_with_overlap_equals_one_without() -> None:
    torch.manual_seed(0)
    models = nn.Linear(4, 3), nn.Linear(4, 3)
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [enter(model, momentum=0.9)[0] for model in models]
    for _ in range(3):
        inputs = torch.randn(5, 4)
        for overlaps, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            loss = model(inputs).square().mean()
            if overlaps:
                optimizer.begin_step()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(models[0].weight, models[1].weight)


def test_after_gradients_were_sent_only_the_step_may_follow() -> None:
    model = nn.Linear(2, 1)
    optimizer, _ = enter(model)
    optimizer.begin_step()
    model(torch.ones(3, 2)).sum().backward()
    for call in (optimizer.zero_grad, optimizer.begin_step, optimizer.flush):
        with pytest.raises(UsageError, match=r"call optimizer\.step\(\) right after it"):
            call()
    with pytest.raises(UsageError, match="need overlap=False"):
        optimizer.step(samples=99)


def test_a_gradient_that_is_not_finite_is_an_error_in_the_backward_pass() -> None:
    model = nn.Linear(2, 1)
    optimizer, _ = enter(model)
    optimizer.begin_step()
    with pytest.raises(NonFiniteError, match=r"the gradient of .* holds NaN or infinity at step 0"):
        (model(torch.ones(3, 2)).sum() * torch.inf).backward()


def test_where_all_gradients_are_needed_first_nothing_overlaps() -> None:
    model = nn.Linear(2, 1)
    optimizer, observer = enter(model, skip=True)
    optimizer.begin_step()
    (model(torch.ones(3, 2)).sum() * torch.inf).backward()
    optimizer.step()
    assert [samples for _, samples in observer.steps] == [0]
