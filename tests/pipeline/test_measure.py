import pytest
import torch

from pipeline.measure import Meter, StepTimes


def test_the_bubble_is_the_part_of_the_step_without_computation() -> None:
    times = StepTimes(
        total_seconds=10.0,
        forward_seconds={0: (1.0, 1.0), 3: (0.5, 0.5)},
        backward_seconds={0: (2.0, 2.0), 3: (0.25, 0.25)},
        activation_bytes=0,
    )
    assert times.compute_seconds == 7.5
    assert times.bubble_fraction == 0.25


def test_seconds_are_kept_by_stage_and_microbatch_and_add_up() -> None:
    meter = Meter(stages=(1, 3), num_microbatches=2)
    with meter.forward(1, 0):
        torch.ones(100_000).sum()
    with meter.backward(3, 1):
        pass
    once = meter.stop().backward_seconds[3][1]
    with meter.backward(3, 1):
        torch.ones(100_000).sum()
    times = meter.stop()
    assert times.forward_seconds[1][0] > 0
    assert times.forward_seconds[1][1] == times.forward_seconds[3][0] == 0
    assert times.backward_seconds[3][1] > once
    assert 0 < times.compute_seconds < times.total_seconds


def test_activations_count_from_forward_to_the_end_of_backward() -> None:
    meter = Meter(stages=(0,), num_microbatches=3)
    eight, sixteen = torch.ones(2), torch.ones(4)
    meter.hold(0, 0, [eight])
    meter.hold(0, 1, [eight, sixteen])
    meter.release(0, 1)
    meter.hold(0, 2, [sixteen])
    assert meter.stop().activation_bytes == 8 + 24


def test_a_new_step_begins_with_nothing() -> None:
    meter = Meter(stages=(0,), num_microbatches=1)
    meter.hold(0, 0, [torch.ones(2)])
    with meter.forward(0, 0):
        pass
    meter.start()
    times = meter.stop()
    assert times.activation_bytes == 0
    assert times.compute_seconds == 0
    assert times.bubble_fraction == pytest.approx(1)
