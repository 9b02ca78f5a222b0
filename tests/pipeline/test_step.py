import itertools
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d
from torch.nn.functional import cross_entropy, mse_loss

from pipeline.group import connect, disconnect
from pipeline.schedule import SCHEDULES, default_microbatches, stages_of, virtual_stages
from pipeline.step import PipelineStep
from ps_core.errors import JobFailedError, UsageError
from tests.pipeline.alone import alone
from tests.pipeline.worker import Place, run, workers

CPU = torch.device("cpu")
SEED = 20_240_607
WORDS, WIDTH, LENGTH, CLASSES = 11, 6, 4, 3
BATCHES = [16, 13, 3, 16, 1, 8]
"""Divisible by the microbatches, not divisible, fewer than them; and a change at every step."""


# -- Models ----------------------------------------------------------------------------------------


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        grown: torch.Tensor = self.inner(torch.tanh(self.inner(self.norm(inputs))))
        return inputs + grown


def _words(num_stages: int) -> list[nn.Module]:
    """A model of words, in stages of which some are a layer and some are several."""
    torch.manual_seed(SEED)
    layers = [
        nn.Embedding(WORDS, WIDTH),
        _Residual(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(inplace=True),
        _Residual(),
        nn.Linear(WIDTH, WIDTH),
        nn.Flatten(),
        nn.Linear(LENGTH * WIDTH, CLASSES),
    ]
    ends = [round(len(layers) * stage / num_stages) for stage in range(num_stages + 1)]
    return [nn.Sequential(*layers[a:b]).double() for a, b in itertools.pairwise(ends)]


def _line(num_stages: int) -> list[nn.Module]:
    torch.manual_seed(SEED)
    return [nn.Linear(WIDTH, WIDTH).double() for _ in range(num_stages)]


Build = Callable[[int], list[nn.Module]]


def _step(
    place: Place,
    schedule: str,
    *,
    model: Build = _words,
    num_microbatches: int | None = None,
    prefix: str = "pipeline",
    timeout_seconds: float = 60,
) -> tuple[PipelineStep, dict[int, nn.Module], dist.ProcessGroup]:
    """This place's step, its stages, and the group."""
    num_stages = place.size * virtual_stages(schedule)
    own = stages_of(schedule, place.rank, place.size)
    modules = {s: module for s, module in enumerate(model(num_stages)) if s in own}
    with torch.device("meta"):
        whole = model(num_stages)
    group = place.connect(prefix, timeout_seconds)
    step = PipelineStep(
        modules,
        whole,
        group,
        schedule=schedule,
        num_microbatches=num_microbatches or default_microbatches(schedule, place.size),
        device=CPU,
    )
    return step, modules, group


@contextmanager
def _no_pickle() -> Iterator[None]:
    refuse = mock.Mock(side_effect=AssertionError("something was pickled"))
    names = ("dumps", "loads", "dump", "load", "Pickler", "Unpickler")
    objects = ("send_object_list", "recv_object_list", "_pickler", "_unpickler")
    with (
        mock.patch.multiple(pickle, **dict.fromkeys(names, refuse)),
        mock.patch.multiple(distributed_c10d, **dict.fromkeys(objects, refuse)),
    ):
        yield


# -- The same as plain torch -----------------------------------------------------------------------


def train_like_one_process(place: Place) -> None:
    schedule = place.argument
    step, modules, group = _step(place, schedule)
    stages = _words(place.size * virtual_stages(schedule))
    plain = nn.Sequential(*stages)
    pairs = [
        pair
        for stage, module in modules.items()
        for pair in zip(module.parameters(), stages[stage].parameters(), strict=True)
    ]
    if not pairs:  # a stage of layers without parameters
        pairs = [(nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1)))]
    own_optimizer = torch.optim.SGD([own for own, _ in pairs], lr=0.1, momentum=0.9)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(SEED)
    for number, size in enumerate(BATCHES):
        own_optimizer.zero_grad()
        plain_optimizer.zero_grad()
        for _ in range(1 + number % 2):  # every other update adds two batches up
            inputs = torch.randint(WORDS, (size, LENGTH), generator=generator)
            target = torch.randint(CLASSES, (size,), generator=generator)
            loss, expected = (
                step(inputs, target, cross_entropy),
                cross_entropy(plain(inputs), target),
            )
            torch.autograd.backward(expected)
            _assert_equal(loss, expected.detach(), len(stages) - 1 in modules)
        for own, reference in pairs:
            assert (own.grad is None) == (reference.grad is None)
        own_optimizer.step()
        plain_optimizer.step()
        assert max(float((a - b).detach().abs().max()) for a, b in pairs) <= 1e-9
        with torch.no_grad():
            output = plain(inputs)
        _assert_equal(step.evaluate(inputs), output, len(stages) - 1 in modules)
    disconnect(group)


def _assert_equal(
    found: torch.Tensor | None, expected: torch.Tensor, is_here: bool, tolerance: float = 1e-9
) -> None:
    assert (found is not None) == is_here
    if found is not None:
        assert found.shape == expected.shape
        assert not found.requires_grad
        assert float((found - expected).abs().max()) <= tolerance


def train_without_pickle(place: Place) -> None:
    with _no_pickle():
        train_like_one_process(place)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_workers_train_as_one_process_does_and_nothing_is_pickled(schedule: str) -> None:
    print(f"seed {SEED}")  # noqa: T201 - to repeat a failure
    run(train_without_pickle, size=2, argument=schedule)


def test_three_workers_train_as_one_process_does() -> None:
    print(f"seed {SEED}")  # noqa: T201 - to repeat a failure
    run(train_without_pickle, size=3, argument="1f1b")


def run_any_number_of_microbatches(place: Place) -> None:
    """A number that torch cannot run, yet we accept, would be a deadlock."""
    inputs = torch.linspace(0, 1, 5 * WIDTH, dtype=torch.float64).view(5, WIDTH)
    for schedule in SCHEDULES:
        plain = nn.Sequential(*_line(2 * virtual_stages(schedule)))
        torch.autograd.backward(mse_loss(plain(inputs), inputs))
        for count in (1, 2, 3, 6):  # 5 samples: with 6 one microbatch has none
            if schedule == "1f1b" and count == 1:
                continue
            prefix = f"{schedule} {count}"
            step, modules, group = _step(
                place, schedule, model=_line, num_microbatches=count, prefix=prefix
            )
            step(inputs, inputs, mse_loss)
            _assert_close(modules, plain, tolerance=1e-12)
            disconnect(group)


def _assert_close(modules: dict[int, nn.Module], plain: nn.Sequential, tolerance: float) -> None:
    for stage, module in modules.items():
        for found, expected in zip(module.parameters(), plain[stage].parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, atol=tolerance, rtol=tolerance)


class _Spread(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.unsqueeze(1).expand(-1, 2, -1)


class _Pool(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.sum(1)


def _expanded(num_stages: int) -> list[nn.Module]:
    """What a stage gives, and the gradient of what it takes, repeats itself in memory."""
    return [nn.Sequential(_Pool(), linear, _Spread()) for linear in _line(num_stages)]


def _half(num_stages: int) -> list[nn.Module]:
    return [stage.bfloat16() for stage in _expanded(num_stages)]


def send_all_kinds_of_tensors(place: Place) -> None:
    inputs = torch.linspace(0, 1, 8 * 2 * WIDTH, dtype=torch.float64).view(8, 2, WIDTH)
    for model, dtype, tolerance in (_expanded, torch.float64, 1e-12), (_half, torch.bfloat16, 2e-2):
        for schedule in ("interleaved", "interleaved-zero-bubble"):
            plain = nn.Sequential(*model(4))
            batch = inputs.to(dtype)
            torch.autograd.backward(mse_loss(plain(batch), batch))
            step, modules, group = _step(place, schedule, model=model, prefix=f"{schedule} {dtype}")
            step(batch, batch, mse_loss)
            _assert_close(modules, plain, tolerance)
            _assert_equal(step.evaluate(batch), plain(batch).detach(), 3 in modules, tolerance)
            disconnect(group)


def test_stages_may_pass_expanded_tensors_and_half_precision() -> None:
    run(send_all_kinds_of_tensors, size=2)


def test_few_and_many_microbatches_give_the_same_gradients() -> None:
    run(run_any_number_of_microbatches, size=2)


# -- Modes and random state ------------------------------------------------------------------------


def _random() -> list[nn.Module]:
    torch.manual_seed(SEED)
    return [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)),
        nn.Linear(WIDTH, WIDTH),
    ]


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_modules_stay_in_the_mode_they_are_in(schedule: str) -> None:
    stages = _random()
    inputs = torch.linspace(0, 1, 8 * WIDTH).view(8, WIDTH)
    norm = stages[0].get_submodule("1")
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked is not None
    with alone(stages, schedule, num_microbatches=4) as step:
        step(inputs, inputs, mse_loss)
        assert norm.num_batches_tracked == 4, "once per microbatch, and not to find shapes"
        torch.manual_seed(1)
        noisy = step.evaluate(inputs)
        assert norm.num_batches_tracked == 8, "evaluation in training mode is the user's choice"
        nn.Sequential(*stages).eval()
        found = step.evaluate(inputs)
        assert norm.num_batches_tracked == 8
        expected = nn.Sequential(*stages)(inputs)
    assert found is not None
    assert noisy is not None
    torch.testing.assert_close(found, expected)
    assert not torch.equal(noisy, expected)
    assert not norm.training


def test_finding_shapes_leaves_the_random_state_alone() -> None:
    inputs = torch.linspace(0, 1, 8 * WIDTH).view(8, WIDTH)
    gradients: list[torch.Tensor] = []
    for evaluate_first in (False, True):
        stages = _random()
        with alone(stages, "zbv", num_microbatches=4) as step:
            torch.manual_seed(1)
            if evaluate_first:
                nn.Sequential(*stages).eval()
                step.evaluate(inputs)
                nn.Sequential(*stages).train()
            step(inputs, inputs, mse_loss)
        gradient = stages[1].get_parameter("weight").grad
        assert gradient is not None
        gradients.append(gradient)
    assert torch.equal(*gradients)


# -- Measurement -----------------------------------------------------------------------------------


def test_the_last_step_tells_where_its_time_went() -> None:
    stages = _line(2)
    inputs = torch.ones(8, WIDTH, dtype=torch.float64)
    with alone(stages, "interleaved", num_microbatches=4) as step:
        assert step.last is None
        step(inputs, inputs, mse_loss)
        first = step.last
        step(inputs, inputs, mse_loss)
    assert first is not None
    assert step.last is not first
    for seconds in (first.forward_seconds, first.backward_seconds):
        assert {stage: len(spent) for stage, spent in seconds.items()} == {0: 4, 1: 4}
        assert all(second > 0 for spent in seconds.values() for second in spent)
    assert 0 < first.compute_seconds < first.total_seconds
    assert 0 < first.bubble_fraction < 1
    boundary_bytes = 2 * WIDTH * 8  # of a microbatch of two rows
    assert first.activation_bytes % boundary_bytes == 0
    assert 4 * boundary_bytes <= first.activation_bytes <= 4 * 4 * boundary_bytes


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_gpipe_holds_all_microbatches_and_1f1b_no_more_than_it_must(schedule: str) -> None:
    with alone(_line(1), schedule, num_microbatches=4) as step:
        inputs = torch.ones(8, WIDTH, dtype=torch.float64)
        step(inputs, inputs, mse_loss)
    assert step.last is not None
    held = {"gpipe": 4, "1f1b": 1}[schedule]
    assert step.last.activation_bytes == held * 2 * (2 * WIDTH * 8)  # inputs and outputs


# -- Refused ---------------------------------------------------------------------------------------

ONES = torch.ones(4, WIDTH, dtype=torch.float64)


def _under(context: Callable[[], object], step: PipelineStep) -> object:
    with context():  # type: ignore[attr-defined]  # a torch context manager
        return step(ONES, ONES, mse_loss)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"inputs \[0, 6\] hold no sample", lambda s: s(ONES[:0], ONES[:0], mse_loss)),
        (r"inputs \[\] hold no sample", lambda s: s.evaluate(torch.tensor(1.0))),
        (r"4 samples with a target \[3, 6\]", lambda s: s(ONES, ONES[:3], mse_loss)),
        (r"4 samples with a target \[\]", lambda s: s(ONES, torch.tensor(1.0), mse_loss)),
        (r"call evaluate\(\) under no_grad", lambda s: _under(torch.no_grad, s)),
        ("torch.autocast does not reach", lambda s: _under(lambda: torch.autocast("cpu"), s)),
    ],
)
def test_a_wrong_call_is_refused_and_the_next_one_works(
    message: str, call: Callable[[PipelineStep], object]
) -> None:
    with alone(_line(1), "gpipe") as step:
        with pytest.raises(UsageError, match=message):
            call(step)
        assert step(ONES, ONES, mse_loss) is not None


@pytest.mark.parametrize(
    ("gives", "loss_fn"),
    [
        (r"a tensor \[2, 6\]", lambda output, target: (output - target) ** 2),
        ("a number without gradient", lambda output, target: mse_loss(output.detach(), target)),
    ],
)
def test_a_loss_that_is_not_a_number_with_a_gradient_is_refused(
    gives: str, loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    with (
        alone(_line(1), "gpipe") as step,
        pytest.raises(UsageError, match=f"loss_fn gives {gives}: it must give the mean"),
    ):
        step(ONES, ONES, loss_fn)


@pytest.mark.parametrize(
    ("stages", "num_whole", "message"),
    [
        ([0], 2, r"holds \[0, 1\]: got 2, of which \[0\]"),
        ([0, 1], 3, r"has 2 stages, of which worker 0 holds \[0, 1\]: got 3"),
        ([0, 2], 2, r"got 2, of which \[0, 2\]"),
    ],
)
def test_stages_that_do_not_fit_the_schedule_are_refused(
    stages: Sequence[int], num_whole: int, message: str
) -> None:
    group = connect(HashStore(), 0, 1, backend="gloo", timeout_seconds=5, prefix="p")
    with pytest.raises(UsageError, match=message):
        PipelineStep(
            {stage: nn.Identity() for stage in stages},
            [nn.Identity()] * num_whole,
            group,
            schedule="zbv",
            num_microbatches=2,
            device=CPU,
        )
    disconnect(group)


# -- Failures --------------------------------------------------------------------------------------


def train_until_something_happens(place: Place) -> None:
    schedule, timeout_seconds = place.argument.split()
    step, _, group = _step(place, schedule, model=_line, timeout_seconds=float(timeout_seconds))
    inputs = torch.ones(8, WIDTH, dtype=torch.float64)
    began = time.monotonic()
    try:
        for number in itertools.count():
            began = time.monotonic()
            step(inputs, inputs, mse_loss)
            print(f"step {number}")  # noqa: T201 - the test waits for it
    except JobFailedError as error:
        print(f"{time.monotonic() - began:.1f} seconds: {error}")  # noqa: T201 - the same
    with pytest.raises(JobFailedError, match="an earlier call of this pipeline failed"):
        step(inputs, inputs, mse_loss)
    with pytest.raises(JobFailedError, match="an earlier call of this pipeline failed"):
        step.evaluate(inputs)
    disconnect(group)
    assert dist.distributed_c10d.GroupMember.WORLD is None


@pytest.mark.parametrize(("schedule", "victim"), [("gpipe", 1), ("1f1b", 0), ("zbv", 1)])
def test_the_death_of_a_worker_is_an_error_of_the_other_at_once(schedule: str, victim: int) -> None:
    with workers(train_until_something_happens, size=2, argument=f"{schedule} 90") as processes:
        other = processes[1 - victim]
        other.wait_for("step 3")
        processes[victim].send(signal.SIGKILL)
        found = other.wait_for(r"([\d.]+) seconds: worker \d of 2 in the pipeline lost another")
        assert float(found[1]) < 30
        assert other.wait() == 0


def test_a_worker_that_stops_is_an_error_of_the_other_within_the_timeout() -> None:
    with workers(train_until_something_happens, size=2, argument="1f1b 1.5") as processes:
        processes[0].wait_for("step 3")
        processes[1].send(signal.SIGSTOP)
        found = processes[0].wait_for(r"([\d.]+) seconds: worker 0 of 2 in the pipeline lost")
        assert 1 <= float(found[1]) < 30
        assert processes[0].wait() == 0


def fail_in_the_loss(place: Place) -> None:
    step, _, group = _step(place, "1f1b", model=_line)
    inputs = torch.ones(8, WIDTH, dtype=torch.float64)
    step(inputs, inputs, mse_loss)

    def broken(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise LookupError("no such label")

    began = time.monotonic()
    with pytest.raises((LookupError, JobFailedError)) as caught:
        step(inputs, inputs, broken)
    assert time.monotonic() - began < 30
    print(repr(caught.value), os.getpid())  # noqa: T201 - the test reads it
    place.store.set(f"seen by {place.rank}", "")
    place.store.wait(["seen by 0", "seen by 1", "seen by 2"])  # nobody is helped by an exit
    disconnect(group)


def test_an_error_of_one_worker_ends_the_step_of_all_at_once() -> None:
    with workers(fail_in_the_loss, size=3) as processes:
        assert [process.wait() for process in processes] == [0, 0, 0]
        assert "LookupError('no such label')" in processes[2].output
        assert all("JobFailedError" in process.output for process in processes[:2])
