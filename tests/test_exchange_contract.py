"""Every exchange keeps the same contract; LocalExchange, alone with all samples, is the measure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ps_core.buckets import Bucket, make_buckets
from ps_core.exchange import Arrival, Farewell, Grant, Outcome, Purpose, Start, Work
from ps_core.extras import Extras
from ps_core.leases import PassSpec
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.optimizer import JobExchange
from ps_core.plan import ParameterSpec, make_plan
from ps_core.v1 import shard_pb2
from ps_worker.inbox import Inbox
from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster, one_thread, run_alone
from tests.host import Case, Result
from tests.reference import JOB_SEED, MIXED, Net, assert_close, loss_of, samples

BATCH_SIZE = 7
BUCKETS = {"SHARDLINE_EXCHANGE_BUCKET_BYTES": "1024"}  # several, of several parts
GROUPS: tuple[Hyperparameters, ...] = (
    {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)},
    {"lr": 0.02, "weight_decay": 0.0, "betas": (0.8, 0.9)},
)
"""One for weights, one for vectors."""
Run = Callable[..., list[Result]]
Returned = Mapping[str, Any]
pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with one_thread(), Cluster(num_shards=3, num_workers=2) as cluster:
        yield cluster


@pytest.fixture(
    params=[
        "local",
        "1 shard, 1 worker",
        "3 shards, 1 worker",
        "2 shards, 2 workers",
        "0 shards, 1 worker",
        "0 shards, 2 workers",
        "0 shards, 2 workers, ZeRO-1",
    ]
)
def run(cluster: Cluster, request: pytest.FixtureRequest) -> Run:
    """Runs a case over one exchange; every worker's result."""
    environ = {**JOB_SEED, **BUCKETS}

    def run_local(case: Case, **arguments: Any) -> list[Result]:  # noqa: ANN401 - JSON
        return [run_alone(case, environ=environ, **arguments)]

    def run_on_shards(case: Case, **arguments: Any) -> list[Result]:  # noqa: ANN401 - JSON
        num_shards, num_workers = map(int, re.findall(r"(\d) [sw]", request.param))
        is_sharded = {"SHARDLINE_ALLREDUCE_SHARD_OPTIMIZER": str("ZeRO" in request.param).lower()}
        return cluster.run(
            case,
            num_shards=num_shards,
            num_workers=num_workers,
            environ={**environ, **is_sharded},
            **arguments,
        )

    return run_local if request.param == "local" else run_on_shards


def local(case: Case, **arguments: Any) -> Result:  # noqa: ANN401 - JSON
    """What the case returns over LocalExchange."""
    return run_alone(case, environ={**JOB_SEED, **BUCKETS}, **arguments)


@dataclass(frozen=True, slots=True)
class Worker:
    """A model whose parameters an exchange updates."""

    session: Session
    exchange: JobExchange
    model: Net
    buckets: Sequence[Bucket]
    start: Start

    def share(self, step: int, parts: int = 0) -> tuple[Tensor, Tensor]:
        """This worker's rows of the step's batch, which is cut into as many parts as there are
        workers.
        """
        x, y = samples(BATCH_SIZE, step)
        size, rank = parts or self.session.world_size, self.session.rank
        return x.tensor_split(size)[rank], y.tensor_split(size)[rank]

    def step(
        self,
        step: int,
        *,
        abstains: bool = False,
        rate: float = 1.0,
        leases: Sequence[int] = (),
        parts: int = 0,
    ) -> tuple[Outcome, float]:
        """One step by hand, its buckets in an order of its own; the outcome and the loss."""
        x, y = self.share(step, parts)
        loss = loss_of(self.model, (x, y))
        groups = [{**group, "lr": rate * float(group["lr"])} for group in map(_plain, GROUPS)]
        self.exchange.begin(step, Work(0 if abstains else len(x), tuple(leases)), groups)
        if not abstains:
            self.model.zero_grad()
            loss.backward()
            for bucket in self.buckets[:: -1 if (step + self.session.rank) % 2 else 1]:
                bucket.collect()
                self.exchange.submit(bucket, step)
        return self.exchange.settle(step), loss.item()

    def parameters(self, when: str = "") -> dict[str, Tensor]:
        """Copies, by name."""
        return {when + name: p.detach().clone() for name, p in self.model.named_parameters()}


def stepped(step: int, *, applied: bool = True) -> Outcome:
    """What a step comes to in lockstep."""
    return Outcome(next_step=step + 1, version=step + 1, applied=applied, staleness=0)


def _plain(group: Hyperparameters) -> dict[str, Any]:
    return dict(group)


def enter(session: Session, dtype: str = "float64", max_grad_norm: float | None = None) -> Worker:
    """Join with a model that begins elsewhere on every worker."""
    model = Net(dtype)
    model.register_buffer("count", torch.randint(1000, (3,)))
    named = dict(model.named_parameters())
    specs = [
        ParameterSpec(name, p.dtype, tuple(p.shape), int(p.dim() < 2)) for name, p in named.items()
    ]
    config = session.config
    num_shards = max(1, len(config.cluster.shards))
    sizes = config.exchange.part_bytes, config.exchange.bucket_bytes
    plan = make_plan(specs, num_shards, *sizes)
    buckets = make_buckets(plan, list(named.values()))
    spec = OptimizerSpec("AdamW", GROUPS, max_grad_norm)
    start = session.exchange.join(
        plan, buckets, spec, Extras(model, {id(p) for p in model.parameters()})
    )
    return Worker(session, session.exchange, model, buckets, start)


def assert_like_local(
    results: Sequence[Result], expected: Result, tolerance: float = 1e-10
) -> None:
    for rank, result in enumerate(results):
        assert_close(result.tensors, expected.tensors, tolerance, f"worker {rank}")
        assert result.values == expected.values, f"worker {rank}"


# -- The cases -------------------------------------------------------------------------------------


def join_only(session: Session) -> Returned:
    worker = enter(session)
    assert worker.start == Start(step=0, chosen=session.rank == 0)
    return worker.model.state_dict()


def test_join_gives_all_the_parameters_and_extras_of_worker_0(run: Run) -> None:
    assert_like_local(run(join_only), local(join_only), tolerance=0)


def train_by_hand(session: Session, *, dtype: str, max_grad_norm: float | None) -> Returned:
    worker = enter(session, dtype, max_grad_norm)
    losses = []
    for step in range(8):
        outcome, loss = worker.step(step, rate=1 / (1 + step))
        assert outcome == stepped(step)
        weight = len(worker.share(0)[0])
        losses.append(session.exchange.meet(Arrival(Purpose.MEAN, step + 1, (loss,), weight)))
    means = torch.tensor([meeting.means[0] for meeting in losses], dtype=torch.float64)
    return {**worker.parameters(), "losses": means}


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_applies_the_mean_gradient_with_the_steps_hyperparameters(
    run: Run, max_grad_norm: float | None
) -> None:
    case: dict[str, Any] = {"dtype": "float64", "max_grad_norm": max_grad_norm}
    assert_like_local(run(train_by_hand, **case), local(train_by_hand, **case))


def test_every_element_type_is_trained(run: Run) -> None:
    case: dict[str, Any] = {"dtype": MIXED, "max_grad_norm": None}
    assert_like_local(run(train_by_hand, **case), local(train_by_hand, **case), tolerance=0.02)


def abstain_together(session: Session) -> Returned:
    worker = enter(session)
    worker.step(0)
    before = worker.parameters("before ")
    outcome, _ = worker.step(1, abstains=True)
    assert outcome == stepped(1, applied=False)
    between = worker.parameters("between ")
    for name, tensor in worker.parameters().items():
        assert torch.equal(tensor, before[f"before {name}"])
    outcome, _ = worker.step(2)
    assert outcome == stepped(2)
    return {**before, **between, **worker.parameters()}


def test_a_step_from_which_all_abstain_has_a_version_and_changes_nothing(run: Run) -> None:
    assert_like_local(run(abstain_together), local(abstain_together))


def leave_out(session: Session, *, which: int) -> Returned:
    """Step 1 has only one worker's gradients: alone, only its samples."""
    worker = enter(session)
    worker.step(0)
    is_alone = session.world_size == 1
    if is_alone:
        model, share = worker.model, [t.tensor_split(2)[1 - which] for t in samples(BATCH_SIZE, 1)]
        session.exchange.begin(1, Work(len(share[0])), GROUPS)
        model.zero_grad()
        loss_of(model, (share[0], share[1])).backward()
        for bucket in worker.buckets:
            bucket.collect()
            session.exchange.submit(bucket, 1)
        session.exchange.settle(1)
    else:
        outcome, _ = worker.step(1, abstains=session.rank == which)
        assert outcome == stepped(1, applied=session.rank != which)
    worker.step(2)
    return worker.parameters()


@pytest.mark.parametrize("which", [0, 1])
def test_who_abstains_takes_the_others_update(run: Run, which: int) -> None:
    assert_like_local(run(leave_out, which=which), local(leave_out, which=which))


def rest(session: Session, *, which: int) -> Returned:
    """The last worker (with `which` 0: the first of two) rests while the other takes two steps."""
    worker = enter(session)
    worker.step(0)
    rests = session.world_size > 1 and session.rank == which
    if rests:
        session.exchange.idle()
        meeting = session.exchange.meet(Arrival(Purpose.EPOCH, 1, (1.0, 2.0), weight=1.0))
    else:
        for step in (1, 2):
            worker.exchange.begin(step, Work(1), GROUPS)
            worker.model.zero_grad()
            loss_of(worker.model, samples(5, step)).backward()
            for bucket in worker.buckets:
                bucket.collect()
                session.exchange.submit(bucket, step)
            session.exchange.settle(step)
        meeting = session.exchange.meet(Arrival(Purpose.EPOCH, 3, (5.0, 2.0), weight=3.0))
    assert meeting.step == 3
    assert meeting.chosen == (session.rank == 0)
    alone = session.world_size == 1
    assert meeting.means == ((5.0, 2.0) if alone else ((1 * 1.0 + 3 * 5.0) / 4, 2.0))
    after = worker.parameters("after ")
    worker.step(3)
    return {**after, **worker.parameters()}


@pytest.mark.parametrize("which", [0, 1])
def test_who_is_idle_holds_the_newest_parameters_after_the_meeting(run: Run, which: int) -> None:
    assert_like_local(run(rest, which=which), local(rest, which=which))


def exchange_state(session: Session) -> Returned:
    worker = enter(session)
    for step in range(3):
        worker.step(step)
    state = session.exchange.read_state()
    session.exchange.meet(Arrival(Purpose.MEAN, 3))  # all have read
    # The state of every second parameter is replaced, and that of the others forgotten.
    other = {
        index: {
            key: value.clone() if key == "step" else 3 * value.abs() + 0.5
            for key, value in entries.items()
        }
        for index, entries in state.items()
        if index % 2
    }
    session.exchange.write_state(other)
    session.exchange.meet(Arrival(Purpose.LOAD, 3))
    written = session.exchange.read_state()
    session.exchange.meet(Arrival(Purpose.MEAN, 3))
    worker.step(3)
    return {**worker.parameters(), **_flat("read", state), **_flat("written", written)}


def _flat(when: str, state: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{when} {index} {key}": value
        for index, entries in state.items()
        for key, value in entries.items()
    }


def test_state_is_read_whole_and_replaced_whole(run: Run) -> None:
    expected = local(exchange_state)
    names = {name for name in expected.tensors if name.startswith("read")}
    keys = itertools.product(
        range(len(list(Net().parameters()))), ("step", "exp_avg", "exp_avg_sq")
    )
    assert names == {f"read {index} {key}" for index, key in keys}
    assert_like_local(run(exchange_state), expected)


def count_traffic(session: Session) -> Returned:
    worker = enter(session)
    for step in range(2):
        worker.step(step)
    worker.step(2, abstains=True)
    traffic = session.exchange.traffic
    num_bytes = sum(b.layout.length * b.layout.dtype.itemsize for b in worker.buckets)
    return {"pushed": traffic.pushed_bytes / num_bytes, "pulled": traffic.pulled_bytes / num_bytes}


def test_traffic_is_counted_in_bytes_of_gradients_and_parameters(
    run: Run, request: pytest.FixtureRequest
) -> None:
    is_local = request.node.callspec.params["run"] == "local"
    for rank, result in enumerate(run(count_traffic)):
        pulled = 3 + (rank > 0)  # all but the first are sent the initial values
        assert result.values == {
            "pushed": 0 if is_local else 2,
            "pulled": 0 if is_local else pulled,
        }


# -- Samples ---------------------------------------------------------------------------------------

NUM_POSITIONS = 11
PASS = PassSpec(NUM_POSITIONS, batch_size=2)


def read_passes(session: Session, *, declines: bool) -> Returned:
    """A step with every lease of two passes, but the first of each is given back, or declined."""
    worker, exchange = enter(session), session.exchange
    used: list[list[int]] = []
    step = 0
    for number in range(2):
        grant = _ask(session)
        assert grant.number == number
        exchange.return_leases([lease.id for lease in grant.leases], declined=declines)
        grant = _ask(session)
        is_over = False
        while not is_over:
            while grant.leases:
                used += [[number, lease.start, lease.length] for lease in grant.leases]
                outcome, _ = worker.step(step, leases=[lease.id for lease in grant.leases])
                step = outcome.next_step
                grant = _ask(session)
            meeting = exchange.meet(Arrival(Purpose.EPOCH, step, takes_leases=True))
            step, is_over = meeting.step, meeting.grant is None
            grant = meeting.grant or grant
    return {"used": used, "step": step}


def _ask(session: Session) -> Grant:
    session.exchange.request_lease(3, PASS)
    return session.exchange.receive_lease()


@pytest.mark.parametrize("declines", [False, True])
def test_every_position_of_a_pass_is_granted_until_a_step_has_used_it(
    run: Run, declines: bool
) -> None:
    results = run(read_passes, declines=declines)
    for number in range(2):
        positions = [
            position
            for result in results
            for of, start, length in result.values["used"]
            for position in range(start, start + length)
            if of == number
        ]
        assert sorted(positions) == list(range(NUM_POSITIONS))
    assert len({result.values["step"] for result in results}) == 1


def leave_a_pass(session: Session) -> Returned:
    """All break out of a pass with a lease of it: there is another one then."""
    enter(session)
    numbers = []
    for _ in range(3):
        grant = _ask(session)
        numbers.append(grant.number)
        assert grant.leases
        session.exchange.idle()
        assert session.exchange.meet(Arrival(Purpose.EPOCH, 0)).grant is None
    session.exchange.return_leases([lease.id for lease in grant.leases])  # it is void
    return {"numbers": numbers}


def test_a_pass_ends_when_all_have_left_it(run: Run) -> None:
    for result in run(leave_a_pass):
        assert result.values == {"numbers": [0, 1, 2]}


# -- The end ---------------------------------------------------------------------------------------


def close_again(session: Session, *, joined: bool) -> Returned:
    if joined:
        enter(session).step(0)
    for _ in range(3):
        session.exchange.close()
    return {}


def test_close_is_idempotent(run: Run) -> None:
    run(close_again, joined=True)


def test_close_is_allowed_before_join() -> None:
    run_alone(close_again, joined=False)


# -- Failures, which only several workers can tell each other --------------------------------------


def close_with_failure(session: Session) -> Returned:
    worker = enter(session)
    worker.step(0)
    if session.rank == 1:
        session.exchange.close(Farewell.FATAL, "the disk is full")
        session.exchange.close(Farewell.FATAL, "another reason")
        raise RuntimeError("the script ends")
    worker.step(1)
    return {}


def test_a_failure_is_what_all_others_fail_with(cluster: Cluster) -> None:
    other, own = cluster.run_failing(close_with_failure, num_shards=2)
    assert other == "JobFailedError: worker 1 failed: the disk is full"
    assert own == "RuntimeError: the script ends"


def leave_early(session: Session, *, farewell: int) -> Returned:
    """Worker 1 leaves after the first step; the other goes on with only its own samples."""
    worker = enter(session)
    worker.step(0)
    if session.rank == 1:
        session.exchange.close(Farewell(farewell), "the machine is wanted back")
    elif session.world_size > 1:
        for step in (1, 2):
            worker.step(step)
    else:
        for step in (1, 2):
            worker.step(step, parts=2)
    return worker.parameters() if session.rank == 0 else {}


@pytest.mark.parametrize(
    "farewell", [Farewell.FINISHED, Farewell.PREEMPTED, Farewell.FAILED], ids=lambda f: f.name
)
def test_who_leaves_is_not_waited_for(cluster: Cluster, farewell: Farewell) -> None:
    environ = {**JOB_SEED, **BUCKETS}
    first, _ = cluster.run(leave_early, num_shards=2, environ=environ, farewell=farewell)
    assert_like_local([first], local(leave_early, farewell=farewell))


def meet_for_different_purposes(session: Session) -> Returned:
    enter(session)
    session.exchange.meet(Arrival(Purpose.EPOCH if session.rank else Purpose.MEAN, 0))
    return {}


def test_workers_that_meet_for_different_purposes_are_told_both(cluster: Cluster) -> None:
    for error in cluster.run_failing(meet_for_different_purposes, num_shards=2):
        assert "'mean'" in error
        assert "'epoch'" in error


def test_a_repeat_does_not_keep_a_meeting_from_its_parts() -> None:
    inbox = Inbox()
    inbox.expect(range(2), 42, meets=True)
    for part, mark in ((0, 42), (0, 44), (1, 44)):  # the first is of a push that came too late
        assert inbox.wants(part, mark)
        inbox.arrived(part, mark)
    assert not inbox.wants(0, 43)
    inbox.met(shard_pb2.Met(step=44, refreshed=True))
    assert inbox.wait_for_parts() == 44
    assert not inbox.wants(0, 45)  # the model computes with what is there
