import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ps_core.errors import UsageError
from ps_core.exchange import Arrival, Purpose
from ps_server import lead, orders
from ps_server.lead import Lead
from ps_server.orders import Factor, Membership, Met
from ps_server.policy import SYNC
from ps_server.terms import Terms
from tests.ps_server.scenario import FOLDER, play

SCENARIOS = sorted(FOLDER.glob("lead_*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_scenario_comes_out_as_written(path: Path) -> None:
    text = path.read_text()
    assert play(text) == text


def test_every_rule_has_a_scenario() -> None:
    rules = re.findall(r"^(\d+)\. ", lead.__doc__ or "", flags=re.MULTILINE)
    assert {int(rule) for rule in rules} == {int(path.stem.split("_")[1]) for path in SCENARIOS}


def met_lead(num_workers: int, max_grad_norm: float | None = None, num_shards: int = 1) -> Lead:
    """A lead whose workers have met for the first time."""
    terms = Terms(num_workers, deadline=60.0)
    started = Lead(terms, SYNC, frozenset(range(num_shards)), max_grad_norm)
    for worker in range(num_workers):
        started.join(worker, incarnation=1 + worker)
    for worker in range(num_workers):
        started.meet(worker, Arrival(Purpose.START, 0))
    return started


# -- The clip factor is torch's --------------------------------------------------------------------


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), min_size=1, max_size=4),
    st.floats(1e-3, 1e3),
)
def test_the_factor_is_that_of_clip_grad_norm(
    gradients: list[list[float]], max_grad_norm: float
) -> None:
    started = met_lead(1, max_grad_norm, len(gradients))
    effects: list[orders.Effect] = []
    for shard, gradient in enumerate(gradients):
        effects += started.squares(shard, 0, sum(value * value for value in gradient))
    (effect,) = effects
    assert isinstance(effect, Factor)
    parameters = [nn.Parameter(torch.zeros(len(gradient)).double()) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        expected = torch.tensor(gradient, dtype=torch.float64) * effect.factor
        torch.testing.assert_close(parameter.grad, expected)


# -- Meetings --------------------------------------------------------------------------------------

weights = st.floats(1e-3, 1e3)
numbers = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(weights, numbers, numbers), min_size=1, max_size=5), st.randoms())
def test_means_are_weighted_and_the_same_whoever_comes_first(
    brought: list[tuple[float, float, float]], chance: object
) -> None:
    ranks = list(range(len(brought)))
    chance.shuffle(ranks)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    started = met_lead(len(brought))
    effects: list[orders.Effect] = []
    for rank in ranks:
        weight, *values = brought[rank]
        effects += started.meet(rank, Arrival(Purpose.MEAN, 3, tuple(values), weight))
    mets = [effect for effect in effects if isinstance(effect, Met)]
    assert [met.worker for met in mets] == sorted(ranks)
    total = sum(weight for weight, _, _ in brought)
    expected = [sum(w * v[i] for w, *v in brought) / total for i in range(2)]
    for met in mets:
        assert met.means == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(st.lists(st.tuples(st.sampled_from(["idle", "meet", "leave"]), st.integers(0, 3))))
def test_whatever_workers_do_epochs_count_up_and_name_the_members(
    actions: list[tuple[str, int]],
) -> None:
    started = met_lead(4)
    epoch, members = 1, {0, 1, 2, 3}
    absent, waiting = set[int](), set[int]()
    for action, rank in actions:
        if rank in absent:
            continue
        match action:
            case "idle":
                effects = started.idle(rank)
            case "meet":
                effects = started.meet(rank, Arrival(Purpose.EPOCH, 1))
                waiting.add(rank)
            case _:
                effects = started.leave(rank, "finished")
                absent.add(rank)
                waiting.discard(rank)
        members.discard(rank)
        has_ended = bool(waiting) and waiting | absent == {0, 1, 2, 3}
        if has_ended:
            members, waiting = set(waiting), set()
        for effect in effects:
            if isinstance(effect, Membership):
                epoch += 1
                assert effect.epoch == epoch
        told = [effect.members for effect in effects if isinstance(effect, Membership)]
        assert not told or set(told[-1]) == members
        assert {e.worker for e in effects if isinstance(e, Met)} == (
            members if has_ended else set()
        )
        assert started.members == members


# -- Meetings of little weight, and refused ones ---------------------------------------------------


def test_a_mean_of_nothing_is_not_a_number() -> None:
    # No worker had a sample, for instance in an evaluation of fewer batches than workers.
    started = met_lead(1)
    *_, met = started.meet(0, Arrival(Purpose.MEAN, 0, (1.0,), weight=0.0))
    assert isinstance(met, Met)
    assert str(met.means[0]) == "nan"


def test_a_worker_of_no_weight_does_not_spoil_the_mean() -> None:
    # It had no sample, so the mean it brings is 0 / 0.
    started = met_lead(2)
    started.meet(0, Arrival(Purpose.MEAN, 0, (float("nan"),), weight=0.0))
    *_, met = started.meet(1, Arrival(Purpose.MEAN, 0, (5.0,), weight=2.0))
    assert isinstance(met, Met)
    assert met.means == (5.0,)


def test_a_refused_meeting_changes_nothing() -> None:
    # Otherwise the shards are never told of an epoch, and wait for a worker that is no member.
    started = met_lead(3)
    started.meet(0, Arrival(Purpose.EPOCH, 4))
    with pytest.raises(UsageError):
        started.meet(1, Arrival(Purpose.MEAN, 4, (1.0,)))
    assert started.members == {1, 2}
    [membership] = started.idle(1)
    assert isinstance(membership, Membership)
    assert (membership.epoch, set(membership.members)) == (3, {2})
