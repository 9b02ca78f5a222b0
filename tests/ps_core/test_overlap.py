"""Buckets are handed over while the backward pass still computes others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


def observed(*, used: int = 3) -> tuple[nn.Sequential, Overlap, list[int]]:
    """After one step that used the first layers; the buckets that are handed over from now on."""
    model, buckets = chain()
    handed: list[int] = []
    overlap = Overlap(buckets, lambda bucket: handed.append(bucket.layout.index))
    overlap.begin(Work(samples=4))
    model[:used](torch.ones(4, 8)).sum().backward()
    overlap.end()
    handed.clear()
    return model, overlap, handed


def test_in_the_first_step_nothing_is_known_and_all_goes_at_the_end() -> None:
    model, buckets = chain()
    handed: list[int] = []
    overlap = Overlap(buckets, lambda bucket: handed.append(bucket.layout.index))
    overlap.begin(Work(samples=4))
    model(torch.ones(4, 8)).sum().backward()
    assert handed == []
    overlap.end()
    assert handed == [2, 1, 0]


def test_then_the_last_layers_go_first_and_each_once_its_gradient_is_there() -> None:
    model, overlap, handed = observed()
    for _ in range(2):
        handed.clear()
        overlap.begin(Work(samples=4))
        model(torch.ones(4, 8)).sum().backward()
        assert handed == [2, 1, 0]
        overlap.end()
        assert len(handed) == 3


def test_what_backward_does_not_reach_is_handed_over_at_the_end() -> None:
    model, overlap, handed = observed()
    overlap.begin(Work(samples=4))
    model[1](torch.ones(4, 8)).sum().backward()
    assert handed == [1]
    overlap.end()
    assert handed == [1, 2, 0]


def test_what_no_step_has_used_yet_is_handed_over_at_the_end() -> None:
    model, overlap, handed = observed(used=2)
    overlap.begin(Work(samples=4))
    model(torch.ones(4, 8)).sum().backward()
    assert handed == [1, 0]
    overlap.end()
    assert handed == [1, 0, 2]


def reentrant(layer: nn.Module, x: Tensor, times: int = 2) -> Tensor:
    """A layer that is used several times, each in a backward pass of its own."""
    for _ in range(times):
        x = checkpoint(layer, x, use_reentrant=True)
    return x


def test_a_gradient_that_comes_in_several_parts_is_handed_over_at_the_end() -> None:
    model, overlap, handed = observed(used=2)
    x = torch.ones(4, 8, requires_grad=True)
    for _ in range(3):
        handed.clear()
        overlap.begin(Work(samples=4))
        reentrant(model[2], model[1](model[0](x))).sum().backward()
        assert handed == [1, 0]
        overlap.end()
        assert handed == [1, 0, 2]


def test_a_gradient_that_is_added_to_after_it_was_sent_is_an_error() -> None:
    model, overlap, _ = observed()
    overlap.begin(Work(samples=4))
    loss = reentrant(model[2], torch.ones(4, 8, requires_grad=True)).sum()
    with pytest.raises(UsageError, match="use_reentrant=False"):
        loss.backward()


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def scale(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad = parameter.grad * 2


def backward_again(model: nn.Module) -> None:
    model(torch.ones(4, 8)).sum().backward()


def throw_away(model: nn.Module) -> None:
    model.zero_grad()


@pytest.mark.parametrize("change", [clip, scale, backward_again, throw_away])
def test_gradients_that_the_script_changes_after_they_were_sent_are_an_error(
    change: Callable[[nn.Module], None],
) -> None:
    model, overlap, _ = observed()
    overlap.begin(Work(samples=4))
    model(torch.ones(4, 8)).sum().backward()

    def goes_on() -> None:
        change(model)
        overlap.end()

    with pytest.raises(UsageError, match=r"a gradient was changed after session\.step"):
        goes_on()


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

    def close() -> None:
        optimizer.step(lambda: 0.0)

    for call in (optimizer.zero_grad, optimizer.begin_step, optimizer.flush, close):
        with pytest.raises(UsageError, match=r"call optimizer\.step\(\) right after it"):
            call()
    with pytest.raises(UsageError, match="need overlap=False"):
        optimizer.step(samples=99)


def test_a_gradient_that_is_not_finite_is_an_error_in_the_backward_pass() -> None:
    model = nn.Linear(2, 1)
    optimizer, _ = enter(model)
    optimizer.begin_step()
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    optimizer.begin_step()
    with pytest.raises(NonFiniteError, match=r"the gradient of .* holds NaN or infinity at step 1"):
        (model(torch.ones(3, 2)).sum() * torch.inf).backward()


def test_where_all_gradients_are_needed_first_nothing_overlaps() -> None:
    model = nn.Linear(2, 1)
    optimizer, observer = enter(model, skip=True)
    optimizer.begin_step()
    (model(torch.ones(3, 2)).sum() * torch.inf).backward()
    optimizer.step()
    assert [samples for _, samples in observer.steps] == [0]
