"""Gradients that accumulate, are clipped or scaled, or are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ps_core.metrics import REGISTRY
from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster, one_thread, run_alone
from tests.features.three_ways import (
    BATCH_SIZE,
    LR,
    NUM_STEPS,
    SIZES,
    Returned,
    Run,
    check,
    train_here,
    with_state,
)
from tests.reference import (
    JOB_SEED,
    Net,
    assert_close,
    concatenated,
    initial_net,
    loss_of,
    plain_optimizer,
    samples,
    shares,
    train,
    train_averaged,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)

BAD_STEPS = (0, 5)
"""In which gradients overflow or are not numbers, in the tests about those."""
MAX_GRAD_NORM = 1.5
"""Between the smallest and the largest norm in the test that uses it."""


# -- Gradients: accumulated, clipped, scaled -------------------------------------------------------


def accumulated_gradients(run: Run) -> Returned:
    model = Net()
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    for step in range(NUM_STEPS):
        num_samples = 0
        for micro in range(3):
            x, y = run.share(*samples(BATCH_SIZE, 3 * step + micro))
            (loss_of(model, (x, y)) / 3).backward()
            num_samples += len(x)
        run.step(optimizer, num_samples)
        optimizer.zero_grad()
    return with_state(model, optimizer)


def test_gradients_may_accumulate_before_a_step(cluster: Cluster) -> None:
    check(cluster, accumulated_gradients)


def accumulate_with_loader(session: Session) -> Returned:
    """Two batches of the loader per step, which counts the samples of both."""
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    x, y = samples(30)
    seen: dict[int, list[int]] = {}
    for _ in session.epochs(2):
        for number, (rows,) in enumerate(session.loader(TensorDataset(torch.arange(30)), 4)):
            seen.setdefault(optimizer.next_step, []).extend(rows.tolist())
            # The sum over the samples of both batches, which the step turns into their mean.
            (loss_of(model, (x[rows], y[rows])) * len(rows)).backward()
            if number % 2:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad /= len(seen[optimizer.next_step])
                optimizer.step()
                optimizer.zero_grad()
    return {"seen": seen, **model.state_dict()}


def test_all_batches_since_the_last_step_count_as_its_samples(cluster: Cluster) -> None:
    results = cluster.run(accumulate_with_loader, environ=JOB_SEED)
    x, y = samples(30)
    model = initial_net()
    steps = sorted({int(step) for result in results for step in result.values["seen"]})
    rows = [[n for r in results for n in r.values["seen"].get(str(step), [])] for step in steps]
    train(model, plain_optimizer("AdamW", model, lr=LR), [(x[n], y[n]) for n in rows])
    for rank, result in enumerate(results):
        assert_close(result.tensors, model.state_dict(), 1e-10, f"worker {rank}")


def with_closures(session: Session) -> Returned:
    """Two steps; the second has 4 and 2 samples."""
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    x, y = samples(14)
    losses = []
    for (rows,) in session.loader(TensorDataset(torch.arange(14)), 4, shuffle=False):

        def closure() -> float:
            optimizer.zero_grad()
            loss = loss_of(model, (x[rows], y[rows]))  # noqa: B023 - called in this round only
            loss.backward()
            return loss.item()

        losses.append(optimizer.step(closure))
    return {"losses": losses, **model.state_dict()}


def test_a_closure_computes_what_a_step_sends(cluster: Cluster) -> None:
    results = cluster.run(with_closures, environ=JOB_SEED)
    x, y = samples(14)
    model = initial_net()
    optimizer = plain_optimizer("AdamW", model, lr=LR)
    for step, rows in enumerate(torch.arange(14).split(8)):
        for result, own in zip(results, rows.split(4), strict=True):
            loss = loss_of(model, (x[own], y[own])).item()
            assert result.values["losses"][step] == pytest.approx(loss, abs=1e-12)
        train(model, optimizer, [(x[rows], y[rows])])
    for rank, result in enumerate(results):
        assert_close(result.tensors, model.state_dict(), 1e-10, f"worker {rank}")


def clip_own_gradients(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    for step in range(NUM_STEPS):
        x, y = shares(SIZES[: session.world_size], step)[session.rank]
        optimizer.zero_grad()
        loss_of(model, (x, y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step(samples=len(x))
    return model.state_dict()


def clipped(gradients: list[Tensor]) -> list[Tensor]:
    """Scaled down to a 2-norm of 0.5 as torch's `clip_grad_norm_` does."""
    norm = float(sum((g**2).sum() for g in gradients)) ** 0.5
    return [g * min(1.0, 0.5 / (norm + 1e-6)) for g in gradients]


def test_a_script_clips_the_gradients_of_its_own_worker(cluster: Cluster) -> None:
    for num_workers in (1, 2):
        model = initial_net()
        steps = [shares(SIZES[:num_workers], step) for step in range(NUM_STEPS)]
        train_averaged(model, plain_optimizer("AdamW", model, lr=LR), steps, clipped)
        if num_workers == 1:
            results = [run_alone(clip_own_gradients, environ=JOB_SEED)]
        else:
            results = cluster.run(clip_own_gradients, environ=JOB_SEED)
        for rank, result in enumerate(results):
            assert_close(result.tensors, model.state_dict(), 1e-10, f"worker {rank}")


def clipped_mean(run: Run) -> Returned:
    model = Net()
    plain = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    optimizer = run.optimizer(plain, model, max_grad_norm=MAX_GRAD_NORM)
    train_here(run, model, optimizer)
    return with_state(model, optimizer)


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_max_grad_norm_clips_the_mean_over_all_workers(cluster: Cluster, num_shards: int) -> None:
    plain, _ = check(cluster, clipped_mean, num_shards=num_shards)
    assert min(plain.norms) < MAX_GRAD_NORM < max(plain.norms)


def overflow(loss: Tensor) -> Tensor:
    """The same loss, whose gradients are infinite or NaN."""
    return loss * torch.inf


def scaled_gradients(run: Run, *, overflow_in: Sequence[int], unscale: bool) -> Returned:
    model = Net()
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scales = []
    for step in range(NUM_STEPS):
        x, y = run.share(*samples(BATCH_SIZE, step))
        optimizer.zero_grad()
        loss = loss_of(model, (x, y))
        scaler.scale(overflow(loss) if step in overflow_in else loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        run.step(optimizer, len(x), scaler)
        scaler.update()
        scales.append(scaler.get_scale())
    return {**with_state(model, optimizer), "scales": scales}


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("overflow_in", [[], [0, 5]])
def test_a_grad_scaler_scales_and_skips_steps_that_overflow_everywhere(
    cluster: Cluster, overflow_in: list[int], unscale: bool
) -> None:
    check(cluster, scaled_gradients, overflow_in=overflow_in, unscale=unscale)


def overflow_on_worker_1(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(NUM_STEPS):
        x, y = shares(SIZES, step)[session.rank]
        optimizer.zero_grad()
        loss = loss_of(model, (x, y))
        overflows = session.rank == 1 and step in BAD_STEPS
        scaler.scale(overflow(loss) if overflows else loss).backward()
        scaler.step(optimizer, samples=len(x))
        scaler.update()
    told = {"loss_scale": scaler.get_scale(), "num_skipped": optimizer.num_skipped}
    return {**told, **model.state_dict()}


def trained_without_worker_1_in_bad_steps() -> Mapping[str, Tensor]:
    steps = [shares(SIZES, step) for step in range(NUM_STEPS)]
    batches = [
        batches[0] if step in BAD_STEPS else concatenated(batches)
        for step, batches in enumerate(steps)
    ]
    model = initial_net()
    train(model, plain_optimizer("AdamW", model, lr=LR), batches)
    return model.state_dict()


def test_a_worker_whose_gradients_overflow_abstains_from_the_step(cluster: Cluster) -> None:
    results = cluster.run(overflow_on_worker_1, environ=JOB_SEED)
    for rank, result in enumerate(results):
        assert_close(result.tensors, trained_without_worker_1_in_bad_steps(), 1e-10, f"{rank}")
    assert [result.values for result in results] == [
        {"loss_scale": 1024.0, "num_skipped": 0},
        {"loss_scale": 256.0, "num_skipped": 2},
    ]


# -- Gradients that are not finite -----------------------------------------------------------------


def nan_on_the_last_worker(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    counted = ("shardline_nonfinite_steps_total", {"worker": str(session.rank)})
    before = REGISTRY.get_sample_value(*counted)
    for step in range(NUM_STEPS):
        x, y = shares(SIZES, step)[session.rank]
        optimizer.zero_grad()
        loss_of(model, (x, y)).backward()
        if session.rank == session.world_size - 1 and step in BAD_STEPS:
            assert model.second.weight.grad is not None
            model.second.weight.grad[3, 5] = torch.nan
        optimizer.step(samples=len(x))
    after = REGISTRY.get_sample_value(*counted)
    assert before is not None
    assert after is not None
    return {
        "counted": after - before,
        "num_skipped": optimizer.num_skipped,
        **model.state_dict(),
    }


SKIP = {**JOB_SEED, "SHARDLINE_WORKER_NONFINITE": "skip"}


def test_a_worker_whose_gradients_are_not_finite_may_skip_the_step(cluster: Cluster) -> None:
    results = cluster.run(nan_on_the_last_worker, environ=SKIP)
    for rank, result in enumerate(results):
        assert_close(result.tensors, trained_without_worker_1_in_bad_steps(), 1e-10, f"{rank}")
    told = [(result.values["counted"], result.values["num_skipped"]) for result in results]
    assert told == [(0, 0), (2, 2)]


def test_alone_a_step_that_is_skipped_changes_nothing() -> None:
    with one_thread():
        result = run_alone(nan_on_the_last_worker, environ=SKIP)
        model = initial_net()
        good = [shares(SIZES, step)[0] for step in range(NUM_STEPS) if step not in BAD_STEPS]
        train(model, plain_optimizer("AdamW", model, lr=LR), good)
    assert_close(result.tensors, model.state_dict(), 1e-10)
    assert (result.values["counted"], result.values["num_skipped"]) == (2, 2)


def test_otherwise_it_fails_the_job_on_every_worker_and_names_the_parameter(
    cluster: Cluster,
) -> None:
    others, own = cluster.run_failing(nan_on_the_last_worker, environ=JOB_SEED)
    for words in ("NonFiniteError", "second.weight", "step 0"):
        assert words in own
        assert words in others
    assert others.startswith("JobFailedError: worker 1 failed: ")


def test_alone_it_ends_the_process() -> None:
    with pytest.raises(SystemExit) as caught:
        run_alone(nan_on_the_last_worker, environ=JOB_SEED)
    assert caught.value.code == 1
    assert "second.weight" in str(caught.value.__cause__)
