import torch
from torch import nn

from shardline.gradients import Gradients
from tests.shardline.buckets_of import gradients_of


def two_gradients() -> tuple[nn.Parameter, nn.Parameter, Gradients]:
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    gradients = gradients_of([one, two])
    (one.sum() + two.sum()).backward()
    gradients.leave()
    return one, two, gradients


def test_gradients_are_none_or_were_zeroed_only_all_of_them() -> None:
    one, two, gradients = two_gradients()
    assert not gradients.are_none()
    one.grad = None
    assert not gradients.are_none()
    two.grad = None
    assert gradients.are_none()
    one, two, gradients = two_gradients()
    for parameter in (one, two):
        assert parameter.grad is not None
        assert not gradients.were_zeroed()
        parameter.grad.zero_()
    assert gradients.were_zeroed()


def test_a_gradient_that_backward_has_left_as_zero_was_not_zeroed() -> None:
    parameter = nn.Parameter(torch.ones(2))
    gradients = gradients_of([parameter])
    (0.0 * parameter).sum().backward()
    gradients.leave()
    assert not gradients.were_zeroed()


def test_clipping_is_a_change_and_unscaling_is_not() -> None:
    one, two, gradients = two_gradients()
    assert not gradients.were_changed()
    optimizer = torch.optim.SGD([one, two], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    assert one.grad is not None
    assert one.grad.tolist() == [0.5, 0.5]
    assert not gradients.were_changed()
    torch.nn.utils.clip_grad_norm_([one, two], 1.0)
    assert gradients.were_changed()
    gradients.forget()
    assert not gradients.were_changed()
