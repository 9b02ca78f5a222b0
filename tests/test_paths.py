"""Every path through the grid of strategies and stages trains as plain torch does in one process.

The paths are strategies (all-reduce, all-reduce with a sharded optimizer, shards) times layouts:
the whole model on every worker, or a model that is split over the workers of each replica and runs
in the order of a pipeline schedule. All jobs here run in processes in which pickle raises, from
before the session is made until after it is closed.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import TensorDataset

from allreduce.group import Group
from ps_core.config import load
from ps_core.errors import ConfigError
from shardline import staging
from shardline.ports import free_ports
from shardline.session import Session
from shardline.strategies import check_strategy
from tests.allreduce.replicas import Alone, Member, spec_of
from tests.allreduce.together import groups
from tests.allreduce.together import together as at_once
from tests.cluster import TEST_SECONDS, Cluster, one_thread
from tests.host import Result
from tests.reference import (
    JOB_SEED,
    SEED,
    assert_close,
    concatenated,
    gradients_of,
    samples,
    shares,
)
from tests.reference import train as train_plainly

BATCH_SIZE: Final = 8
"""Of all replicas together."""
NUM_SAMPLES: Final = 77
"""The last step of a pass has one sample on the second of two replicas."""
FEWER_SAMPLES: Final = 73
"""The last step of a pass has one on the first, and none on the second."""
NUM_STEPS: Final = 20
MAX_GRAD_NORM: Final = 1.5
"""Between the smallest and the largest norm, as each test checks."""
TOLERANCE: Final = 1e-9
DECAY: Final = 0.95
OPTIMIZERS: Final[dict[str, dict[str, Any]]] = {
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
}
STRATEGIES: Final[dict[str, dict[str, str]]] = {
    "all-reduce": {"JOB_STRATEGY": "allreduce"},
    "ZeRO-1": {"JOB_STRATEGY": "allreduce", "ALLREDUCE_SHARD_OPTIMIZER": "true"},
    "shards": {"JOB_STRATEGY": "parameter-server"},
}
MICROBATCHES: Final = {
    "gpipe": 3,
    "1f1b": 0,  # the default, of which the last ones of a batch are empty
    "interleaved": 4,
    "interleaved-zero-bubble": 2,
    "zbv": 2,
}
"""By schedule."""
Returned = Mapping[str, Any]
pytestmark = pytest.mark.timeout(TEST_SECONDS)


@dataclass(frozen=True, slots=True)
class Layout:
    """How many replicas of the model there are, and over how many workers each is spread."""

    replicas: int
    stages: int = 1
    schedule: str = "1f1b"

    def __str__(self) -> str:
        name = f"{self.replicas} replicas" if self.replicas > 1 else "1 replica"
        return name if self.stages == 1 else f"{name} in {self.stages} stages, {self.schedule}"


WHOLE: Final = Layout(2)
GRID: Final = {schedule: Layout(2, 2, schedule) for schedule in MICROBATCHES}
"""Two replicas of two stages, by schedule."""
LINE: Final = {schedule: Layout(1, 2, schedule) for schedule in MICROBATCHES}
"""One replica of two stages."""
PATHS: Final = [
    (strategy, layout, list(OPTIMIZERS)[number % 2])
    for strategy, lines in {
        "all-reduce": ("gpipe", "1f1b"),
        "ZeRO-1": ("interleaved", "1f1b"),
        "shards": ("interleaved-zero-bubble", "zbv"),
    }.items()
    for number, layout in enumerate([WHOLE, *GRID.values(), *(LINE[name] for name in lines)])
]


# -- Jobs ------------------------------------------------------------------------------------------


class Refused:
    """In the place of what pickle offers."""

    def __init__(self, *_: object, **__: object) -> None:
        raise AssertionError("something was pickled")


TRAPS: Final = ExitStack()
"""Of this process."""


def forbid_pickle(session: Session) -> Returned:
    """From now on, in this process, pickling raises."""
    names = [
        f"{module}.{name}"
        for module in ("pickle", "_pickle")
        for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")
    ]
    torchs_own = "torch.distributed.distributed_c10d"
    for name in (*names, f"{torchs_own}._pickler", f"{torchs_own}._unpickler"):
        TRAPS.enter_context(mock.patch(name, Refused))
    return {}


def allow_pickle(session: Session) -> Returned:
    """The other cases of this process may do as they please."""
    TRAPS.close()
    return {}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with one_thread(), Cluster(num_shards=2, num_workers=4) as cluster:
        cluster.run(forbid_pickle, num_shards=0)
        yield cluster
        cluster.run(allow_pickle, num_shards=0)


def run(
    cluster: Cluster,
    case: Callable[..., Returned],
    strategy: str,
    layout: Layout,
    environ: Mapping[str, str] = {},
    **arguments: Any,  # noqa: ANN401 - JSON
) -> list[Result]:
    print(f"seed {SEED}")  # noqa: T201 - to repeat a failure
    return cluster.run(
        case,
        num_shards=2 if strategy == "shards" else 0,
        num_workers=layout.replicas * layout.stages,
        environ={**configured(strategy, layout), **environ},
        **arguments,
    )


def configured(strategy: str, layout: Layout) -> dict[str, str]:
    """The environment of a job."""
    staged = {
        "PIPELINE_STAGES": str(layout.stages),
        "PIPELINE_SCHEDULE": layout.schedule,
        "PIPELINE_MICROBATCHES": str(MICROBATCHES[layout.schedule]),
    }
    named = {f"SHARDLINE_{k}": value for k, value in {**STRATEGIES[strategy], **staged}.items()}
    return {**JOB_SEED, **named}


def together(results: Sequence[Result], layout: Layout) -> list[dict[str, Tensor]]:
    """What the workers of each replica returned, who must not have anything twice."""
    replicas = []
    for first in range(0, len(results), layout.stages):
        tensors: dict[str, Tensor] = {}
        for result in results[first : first + layout.stages]:
            assert not tensors.keys() & result.tensors.keys()
            tensors |= result.tensors
        replicas.append(tensors)
    return replicas


# -- The model -------------------------------------------------------------------------------------


class Noise(nn.Module):
    """A random scale and shift that are not trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5, requires_grad=False)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.get_buffer("shift")


def net() -> nn.Sequential:
    """Layers of odd sizes, of which some have no parameters, and some random ones that are not
    trained.
    """
    return nn.Sequential(
        nn.Sequential(nn.Linear(7, 13), Noise(13)),
        nn.Tanh(),
        nn.Sequential(nn.LayerNorm(13), nn.Linear(13, 11), nn.Tanh()),
        nn.Linear(11, 11),
        nn.Tanh(),
        Noise(11),
        nn.Linear(11, 3),
    ).double()


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """With a group for weights and one for vectors."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(groups, **OPTIMIZERS[name])
    return optimizer


def held(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that this worker has."""
    return {name: p for name, p in model.state_dict(keep_vars=True).items() if not p.is_meta}


# -- The same as plain torch -----------------------------------------------------------------------


def train(
    session: Session,
    *,
    optimizer: str,
    num_samples: int = NUM_SAMPLES,
    num_passes: int = 2,
    num_accumulated: int = 1,
) -> Returned:
    """The script that users write. `losses` has (step, samples, loss) of every batch."""
    with session.model():
        model = net()
    shared = session.optimizer(optimizer_of(optimizer, model), model, max_grad_norm=MAX_GRAD_NORM)
    scheduler = session.scheduler(lambda inner: ExponentialLR(inner, DECAY))
    step = session.step(model, lambda output, y: mse_loss(output, y) / num_accumulated)
    dataset = TensorDataset(*samples(num_samples))
    loader = session.loader(dataset, BATCH_SIZE // session.world_size)
    losses: list[tuple[int, int, float]] = []
    means = []
    for _ in session.epochs(num_passes):
        first = len(losses)
        for number, batch in enumerate(loader, 1):
            loss = step(batch)
            if loss is not None:
                losses.append((shared.next_step, len(batch[0]), num_accumulated * loss.item()))
            if number % num_accumulated == 0:
                shared.step()
                shared.zero_grad()
                scheduler.step()
        means.append(session.mean(*_mean(losses[first:])))
    output = session.evaluate(model, samples(9, stream=1)[0])
    outputs = {} if output is None else {"output": output}
    return {"losses": losses, "means": means, **held(model), **outputs}


def _mean(losses: Sequence[tuple[int, int, float]]) -> tuple[float | None, int]:
    """Over the samples, of which there may be none; and how many there are."""
    total = sum(count for _, count, _ in losses)
    return sum(count * loss for _, count, loss in losses) / total if total else None, total


@dataclass(frozen=True, slots=True)
class Reference:
    """What plain torch has."""

    tensors: dict[str, Tensor]
    losses: list[float]
    """Of each step."""
    means: list[float]
    """Of each pass, over the samples."""


@functools.cache
def plain(
    optimizer: str, replicas: int, num_samples: int, num_passes: int, num_accumulated: int
) -> Reference:
    """One process, no code of the project."""
    torch.manual_seed(SEED)
    model = net()
    inner = optimizer_of(optimizer, model)
    scheduler = ExponentialLR(inner, DECAY)
    x, y = samples(num_samples)
    losses, norms, means = [], [], []
    for number in range(num_passes):
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(SEED + number))
        rows = list(batched(_shared_tail(order.split(BATCH_SIZE // replicas), replicas), replicas))
        totals = []
        for taken in batched(rows, num_accumulated):
            inner.zero_grad()
            losses.append(_add_gradients(model, x, y, taken))
            totals.append((len(losses), sum(len(b) for row in taken for b in row), losses[-1]))
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
            inner.step()
            scheduler.step()
        mean, _ = _mean(totals)
        assert mean is not None
        means.append(mean)
    assert len(losses) == NUM_STEPS
    assert min(norms) < MAX_GRAD_NORM < max(norms)
    with torch.no_grad():
        output = model(samples(9, stream=1)[0])
    return Reference({**model.state_dict(), "output": output}, losses, means)


def _shared_tail(batches: Sequence[Tensor], replicas: int) -> list[Tensor]:
    """A last batch of one sample has a second one from the batch before, of the same update."""
    *before, neighbour, last = batches
    if len(last) > 1 or len(batches) % replicas == 1 % replicas:
        return list(batches)
    return [*before, neighbour[:-1], torch.cat([neighbour[-1:], last])]


def _add_gradients(
    model: nn.Module, x: Tensor, y: Tensor, rows: Sequence[Sequence[Tensor]]
) -> float:
    """Of one update, whose `rows` have a batch for each replica. The loss over its samples."""
    whole = torch.cat([batch for row in rows for batch in row])
    loss = mse_loss(model(x[whole]), y[whole])
    if len(rows) == 1:
        loss.backward()
        return loss.item()
    # A replica adds up the means of its batches; then each counts as much as its samples.
    for batches in zip(*rows, strict=True):
        share = sum(map(len, batches)) / len(whole)
        for batch in batches:
            (mse_loss(model(x[batch]), y[batch]) * share / len(rows)).backward()
    return loss.item()


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """As itertools.batched, which Python 3.11 lacks."""
    return (items[start : start + size] for start in range(0, len(items), size))


def assert_like_plain(
    results: Sequence[Result], layout: Layout, expected: Reference, tolerance: float = TOLERANCE
) -> None:
    for replica, tensors in enumerate(together(results, layout)):
        assert_close(tensors, expected.tensors, tolerance, f"{layout}, replica {replica}")
    for result in results:
        assert result.values["means"] == pytest.approx(expected.means, abs=tolerance)
    by_step = defaultdict(list)
    for entry in (entry for result in results for entry in result.values["losses"]):
        by_step[entry[0]].append(entry)
    losses = [_mean(by_step[step])[0] for step in range(NUM_STEPS)]
    assert losses == pytest.approx(expected.losses, abs=tolerance)


@pytest.mark.parametrize(("strategy", "layout", "optimizer"), PATHS, ids=str)
def test_a_path_trains_as_one_process_does(
    cluster: Cluster, strategy: str, layout: Layout, optimizer: str
) -> None:
    case: dict[str, Any] = {"optimizer": optimizer, "num_samples": NUM_SAMPLES, "num_passes": 2}
    results = run(cluster, train, strategy, layout, **case)
    assert_like_plain(results, layout, plain(replicas=layout.replicas, num_accumulated=1, **case))


@pytest.mark.parametrize("strategy", ["all-reduce", "shards"])
def test_stages_and_replicas_may_meet_at_the_worker_of_rank_0(
    cluster: Cluster, strategy: str
) -> None:
    [port] = free_ports(1)
    settings = {"RENDEZVOUS": f"127.0.0.1:{port}", "SERVE_RENDEZVOUS": "true"}
    environ = {f"SHARDLINE_CLUSTER_{key}": value for key, value in settings.items()}
    case: dict[str, Any] = {"optimizer": "SGD", "num_samples": NUM_SAMPLES, "num_passes": 2}
    results = run(cluster, train, strategy, GRID["1f1b"], environ, **case)
    assert_like_plain(results, GRID["1f1b"], plain(replicas=2, num_accumulated=1, **case))


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [("all-reduce", GRID["1f1b"]), ("ZeRO-1", GRID["zbv"]), ("shards", GRID["gpipe"])],
    ids=str,
)
def test_a_replica_without_a_batch_takes_the_others_update(
    cluster: Cluster, strategy: str, layout: Layout
) -> None:
    case: dict[str, Any] = {"optimizer": "SGD", "num_samples": FEWER_SAMPLES, "num_passes": 2}
    results = run(cluster, train, strategy, layout, **case)
    assert_like_plain(results, layout, plain(replicas=2, num_accumulated=1, **case))


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        ("all-reduce", WHOLE),
        ("all-reduce", GRID["zbv"]),
        ("ZeRO-1", GRID["interleaved"]),
        ("shards", GRID["1f1b"]),
        ("shards", GRID["interleaved-zero-bubble"]),
    ],
    ids=str,
)
def test_gradients_of_two_batches_may_be_added_up(
    cluster: Cluster, strategy: str, layout: Layout
) -> None:
    case: dict[str, Any] = {
        "optimizer": "SGD",
        "num_samples": NUM_SAMPLES,
        "num_passes": 4,
        "num_accumulated": 2,
    }
    results = run(cluster, train, strategy, layout, **case)
    assert_like_plain(results, layout, plain(replicas=2, **case))


@pytest.mark.parametrize("layout", [WHOLE, GRID["1f1b"]], ids=str)
@pytest.mark.parametrize("strategy", ["all-reduce", "ZeRO-1"])
def test_a_wire_of_bfloat16_is_close_but_not_the_same(
    cluster: Cluster, strategy: str, layout: Layout
) -> None:
    case: dict[str, Any] = {"optimizer": "SGD", "num_samples": NUM_SAMPLES, "num_passes": 2}
    wire = {"SHARDLINE_ALLREDUCE_WIRE_DTYPE": "bfloat16"}
    results = run(cluster, train, strategy, layout, wire, **case)
    expected = plain(replicas=2, num_accumulated=1, **case)
    assert_like_plain(results, layout, expected, tolerance=0.01)
    trained = {name for name, parameter in net().named_parameters() if parameter.requires_grad}
    for tensors in together(results, layout):
        apart = [float((tensors[n] - expected.tensors[n]).detach().abs().max()) for n in trained]
        assert min(apart) > 100 * TOLERANCE


def test_a_clipped_update_for_which_all_is_there_needs_nobody_else() -> None:
    """Two stages of two replicas, each with a model of its own, whose group breaks before it."""
    spec = spec_of("SGD", max_grad_norm=0.5)

    def prepare(group: Group, number: int) -> Member:
        member = Member("whole", group, spec)
        member.issue(samples(6, number), 0.5)
        member.replica.collect()
        return member

    with groups(4, num_stages=2) as connected:
        members = at_once(*(partial(prepare, group, i) for i, group in enumerate(connected)))
    for member in members:
        member.replica.update(spec.groups)
    alone = [Alone("SGD"), Alone("SGD")]
    means = []
    for stage, each in enumerate(alone):
        pair = [gradients_of(each.model, samples(6, number)) for number in (stage, stage + 2)]
        means.append([(one + other) / 2 for one, other in zip(*pair, strict=True)])
    norm = nn.utils.get_total_norm(list(itertools.chain(*means)))
    assert norm > 0.5
    for number, member in enumerate(members):
        each = Alone("SGD")
        names = [name for name, _ in each.model.named_parameters()]
        clipped = [gradient * 0.5 / (norm + 1e-6) for gradient in means[number % 2]]
        each.set_gradients(dict(zip(names, clipped, strict=True)))
        assert_close(member.parameters(), each.parameters(), TOLERANCE, f"member {number}")


# -- Gradients that are not finite -----------------------------------------------------------------

SPOILED: Final = {1: [(0, 1)], 2: [(0, 0), (1, 1)]}
"""Step → the (replica, stage) of workers whose gradients are not finite."""


def skip(session: Session) -> Returned:
    """Steps of which single stages have bad gradients."""
    with session.model():
        model = net()
    shared = session.optimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model)
    step = session.step(model, mse_loss)
    for number in range(4):
        step(shares((4, 4), number)[session.rank])
        if (session.rank, session.stage) in SPOILED.get(number, ()):
            gradient = next(iter(held(model).values())).grad
            assert gradient is not None
            gradient.view(-1)[0] = math.inf
        shared.step(samples=4)
        shared.zero_grad()
    return {"num_skipped": shared.num_skipped, "next_step": shared.next_step, **held(model)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_replica_skips_a_step_when_the_gradients_of_one_stage_are_not_finite(
    cluster: Cluster, strategy: str
) -> None:
    layout, environ = GRID["1f1b"], {"SHARDLINE_WORKER_NONFINITE": "skip"}
    results = run(cluster, skip, strategy, layout, environ)
    torch.manual_seed(SEED)
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for number in (0, 1, 3):  # in step 2 both replicas skip
        batches = [shares((4, 4), number)[replica] for replica in ([1] if number == 1 else [0, 1])]
        train_plainly(model, sgd, [concatenated(batches)])
    for replica, tensors in enumerate(together(results, layout)):
        assert_close(tensors, model.state_dict(), TOLERANCE, f"replica {replica}")
    assert [result.values["num_skipped"] for result in results] == [2, 2, 1, 1]
    assert [result.values["next_step"] for result in results] == [4] * 4


# -- Without pickle --------------------------------------------------------------------------------


def pickle_something(session: Session) -> Returned:
    said = []
    for attempt in (lambda: pickle.dumps(1), lambda: torch.save(1, io.BytesIO())):
        try:
            attempt()
        except AssertionError as error:
            said.append(str(error))
    return {"said": said}


def test_pickling_raises_in_the_processes_of_these_tests(cluster: Cluster) -> None:
    for result in cluster.run(pickle_something, num_shards=0):
        assert result.values["said"] == ["something was pickled"] * 2


# -- Modes without lockstep ------------------------------------------------------------------------

NUM_LOOSE_PASSES: Final = 4


def train_loosely(session: Session) -> Returned:
    """`seen` has the samples of every batch, by pass."""
    with session.model():
        model = net()
    shared = session.optimizer(optimizer_of("SGD", model), model, max_grad_norm=MAX_GRAD_NORM)
    x, _ = samples(NUM_SAMPLES)
    target = x @ samples(3, stream=2)[0].T
    step = session.step(model, mse_loss)
    loader = session.loader(TensorDataset(torch.arange(NUM_SAMPLES)), batch_size=4)
    seen: list[list[int]] = []
    means = []
    for _ in session.epochs(NUM_LOOSE_PASSES):
        seen.append([])
        total = 0.0
        for (numbers,) in loader:
            loss = step((x[numbers], target[numbers]))
            seen[-1] += numbers.tolist()
            total += 0.0 if loss is None else len(numbers) * loss.item()
            shared.step()
            shared.zero_grad()
        has_loss = session.evaluate(model, x[:1]) is not None
        mean = total / len(seen[-1]) if has_loss and seen[-1] else None
        means.append(session.mean(mean, len(seen[-1])))
    return {"seen": seen, "means": means, **held(model)}


@pytest.mark.parametrize("mode", ["bounded", "async"])
def test_one_replica_without_lockstep_trains_as_one_process_does(
    cluster: Cluster, mode: str
) -> None:
    case: dict[str, Any] = {"optimizer": "SGD", "num_samples": NUM_SAMPLES, "num_passes": 2}
    environ = {"SHARDLINE_CONSISTENCY_MODE": mode}
    results = run(cluster, train, "shards", LINE["1f1b"], environ, **case)
    expected = plain(replicas=1, num_accumulated=1, **case)
    assert_like_plain(results, LINE["1f1b"], expected)


@pytest.mark.parametrize("mode", ["bounded", "async"])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_stages_train_without_lockstep_and_every_sample_once(
    cluster: Cluster, mode: str, schedule: str
) -> None:
    layout = GRID[schedule]
    environ = {"SHARDLINE_CONSISTENCY_MODE": mode, "SHARDLINE_CONSISTENCY_BOUND": "1"}
    results = run(cluster, train_loosely, "shards", layout, environ)
    for first, second in batched(results, 2):
        assert first.values["seen"] == second.values["seen"], "of the stages of a replica"
    for number in range(NUM_LOOSE_PASSES):
        seen = [result.values["seen"][number] for result in results[:: layout.stages]]
        assert sorted(itertools.chain(*seen)) == list(range(NUM_SAMPLES))
    [means] = {tuple(result.values["means"]) for result in results}
    assert min(means[-2:]) < 0.75 * means[0], "who is how fast decides by how much"
    one, other = together(results, layout)
    assert_close(one, other, 0)


# -- Files -----------------------------------------------------------------------------------------

NUM_FILE_STEPS: Final = 3


def go_on(session: Session, *, path: str) -> Returned:
    """A few steps from the values in a file, if there is one."""
    with session.model():
        model = net()
        if path:
            model.load_state_dict(load_file(path))
    shared = session.optimizer(torch.optim.SGD(model.parameters(), lr=0.05), model)
    before = {f"before {name}": p.detach().clone() for name, p in held(model).items()}
    step = session.step(model, mse_loss)
    for number in range(NUM_FILE_STEPS):
        step(samples(8, number))
        shared.step()
        shared.zero_grad()
    return {**before, **held(model)}


def test_what_any_path_has_trained_any_other_goes_on_with(cluster: Cluster, tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    file = ""
    for number, (strategy, layout) in enumerate(
        [
            ("shards", GRID["1f1b"]),
            ("all-reduce", WHOLE),
            ("all-reduce", GRID["zbv"]),
            ("shards", WHOLE),
            ("ZeRO-1", LINE["interleaved"]),
            ("ZeRO-1", WHOLE),
            ("shards", LINE["gpipe"]),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        environ = {"SHARDLINE_JOB_RUN_DIR": str(folder)}
        results = run(cluster, go_on, strategy, layout, environ, path=file)
        begun = load_file(file) if file else model.state_dict()
        own, *others = together(results if layout.stages > 1 else results[:1], layout)
        assert_close({name: own[f"before {name}"] for name in begun}, begun, 0, f"{layout} begins")
        written = load_file(folder / "model.safetensors")
        assert list(written) == list(model.state_dict())
        assert_close(written, {name: own[name] for name in written}, 0, f"{layout} ends")
        for other in others:
            assert_close(other, own, 0)
        file = str(folder / "model.safetensors")
        for index in range(NUM_FILE_STEPS):
            x, y = samples(8, index)
            sgd.zero_grad()
            mse_loss(model(x), y).backward()
            sgd.step()
    assert_close(load_file(file), model.state_dict(), TOLERANCE)
    again = net()
    again.load_state_dict(load_file(file))


# -- The split -------------------------------------------------------------------------------------

WIDTHS: Final = (7, 40, 9, 30, 30, 5, 21, 16, 33, 3)


def wide() -> nn.Sequential:
    """Nine layers that differ much in their number of parameters."""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS))).double()


def count(model: nn.Module) -> list[int]:
    """The elements of each layer."""
    return [sum(p.numel() for p in layer.parameters()) for layer in model.children()]


def hold(
    session: Session, *, at: list[int] | None = None, costs: list[int] | None = None
) -> Returned:
    """What this worker has of the model and of the optimizer's state, after a step."""
    example = samples(4)[0]
    with session.model():
        model = wide()
    session.split(at=at, like=example if costs else None)
    measure = mock.Mock(return_value=list(map(float, costs or [])))
    with mock.patch.object(staging, "layer_seconds", measure):
        shared = session.optimizer(torch.optim.AdamW(model.parameters()), model)
    session.step(model, mse_loss)((samples(4)[0], samples(4)[1]))
    shared.step()
    state = session.exchange.read_state()
    session.mean(0.0)  # all have read
    return {
        "layers": sorted({int(name.partition(".")[0]) for name in held(model)}),
        "elements": sum(p.numel() for p in held(model).values()),
        "state": sum(entries["exp_avg"].numel() for entries in state.values()),
        "measured": measure.call_count,
    }


def owners(results: Sequence[Result], layout: Layout) -> list[int]:
    """Layer → the stage that has it, the same in every replica."""
    maps = []
    for workers in batched(results, layout.stages):
        pairs = [(layer, i) for i, each in enumerate(workers) for layer in each.values["layers"]]
        assert [layer for layer, _ in sorted(pairs)] == list(range(len(WIDTHS) - 1))
        maps.append([stage for _, stage in sorted(pairs)])
    assert all(each == maps[0] for each in maps)
    return maps[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_worker_has_the_parameters_and_the_state_of_its_own_stage_only(
    cluster: Cluster, strategy: str
) -> None:
    elements = count(wide())
    layout = GRID["1f1b"]
    results = run(cluster, hold, strategy, layout, at=[2])
    assert owners(results, layout) == [0] * 2 + [1] * 7
    for rank, result in enumerate(results):
        own = sum(elements[2:] if rank % 2 else elements[:2])
        assert result.values["elements"] == result.values["state"] == own


@pytest.mark.parametrize(
    ("schedule", "at", "expected"),
    [
        ("1f1b", [8], [0] * 8 + [1]),
        ("interleaved", [1, 2, 6], [0, 1, 0, 0, 0, 0, 1, 1, 1]),
        ("zbv", [1, 3, 6], [0, 1, 1, 1, 1, 1, 0, 0, 0]),
    ],
)
def test_the_cuts_are_where_the_script_says(
    cluster: Cluster, schedule: str, at: list[int], expected: list[int]
) -> None:
    layout = LINE[schedule]
    assert owners(run(cluster, hold, "all-reduce", layout, at=at), layout) == expected


@pytest.mark.parametrize("strategy", ["all-reduce", "shards"])
def test_layers_are_measured_once_in_a_job_and_cut_alike_everywhere(
    cluster: Cluster, strategy: str
) -> None:
    layout, costs = GRID["gpipe"], [1, 1, 1, 1, 1, 1, 1, 1, 8]
    results = run(cluster, hold, strategy, layout, costs=costs)
    assert [result.values["measured"] for result in results] == [1, 0, 0, 0]
    assert owners(results, layout) == [0] * 8 + [1]


def split_like(session: Session) -> Returned:
    with session.model():
        model = wide()
    session.split(like=samples(4)[0])
    session.optimizer(torch.optim.AdamW(model.parameters()), model)
    return {"layers": sorted({int(name.partition(".")[0]) for name in held(model)})}


def test_a_measured_cut_is_the_same_everywhere(cluster: Cluster) -> None:
    layout = GRID["interleaved"]
    assert set(owners(run(cluster, split_like, "all-reduce", layout), layout)) == {0, 1}


@pytest.mark.parametrize(("schedule", "num_runs"), [("1f1b", 2), ("interleaved", 4)])
def test_stages_are_as_balanced_as_contiguous_layers_can_be(
    cluster: Cluster, schedule: str, num_runs: int
) -> None:
    elements = count(wide())
    layout = LINE[schedule]
    found = owners(run(cluster, hold, "all-reduce", layout), layout)
    runs = [list(run) for _, run in itertools.groupby(range(len(found)), found.__getitem__)]
    assert len(runs) == num_runs
    largest = max(sum(elements[layer] for layer in run) for run in runs)
    best = min(
        max(sum(elements[a:b]) for a, b in itertools.pairwise((0, *cuts, len(elements))))
        for cuts in itertools.combinations(range(1, len(elements)), num_runs - 1)
    )
    assert largest <= 1.15 * best


# -- Refused ---------------------------------------------------------------------------------------


class Subclass(nn.Sequential):
    """May run its members as it likes."""


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    model.get_submodule("1").weight = model.get_submodule("0").weight
    return model


def start(session: Session, build: Callable[[], nn.Module]) -> tuple[nn.Module, Any]:
    with session.model():
        model = build()
    return model, session.optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)


def build_no_sequence(session: Session) -> None:
    start(session, lambda: Subclass(nn.Linear(7, 7), nn.Linear(7, 7)))


def build_tied(session: Session) -> None:
    start(session, tied)


def build_batch_norm(session: Session) -> None:
    start(session, lambda: nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Linear(7, 7)))


def build_outside(session: Session) -> None:
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    session.optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)


def build_one_layer(session: Session) -> None:
    start(session, lambda: nn.Sequential(nn.Linear(7, 7)))


def build_idle_stage(session: Session) -> None:
    session.split(at=[1])
    start(session, lambda: nn.Sequential(nn.Linear(7, 7), nn.Tanh()))


def train_early(session: Session) -> None:
    with session.model():
        model = net()
    session.step(model, mse_loss)(samples(4))


def give_two_inputs(session: Session) -> None:
    model, _ = start(session, net)
    x, y = samples(4)
    session.step(model, mse_loss)((x, x, y))


def read_state_dict(session: Session) -> None:
    _, optimizer = start(session, net)
    optimizer.state_dict()


def write_state_dict(session: Session) -> None:
    _, optimizer = start(session, net)
    optimizer.load_state_dict({"state": {}, "param_groups": optimizer.param_groups})


REFUSALS: Final[dict[Callable[[Session], None], str]] = {
    build_no_sequence: "write the model as an nn.Sequential of its layers",
    build_tied: "0.weight and 1.weight are tied but in different stages: untie them",
    build_batch_norm: "use GroupNorm or LayerNorm instead, or --schedule gpipe --microbatches 1",
    build_outside: "write `with session.model(): model = …`",
    build_one_layer: "1 layers cannot be cut into 2 stages: train with 1 to 1 stages",
    build_idle_stage: "stage 1 would have no parameter to train: use fewer --stages",
    train_early: "call session.optimizer(...) before the model is used",
    give_two_inputs: "takes one input, and this batch has 2: put them into one tensor",
    read_state_dict: "state_dict needs the whole model in one place: train without --stages",
    write_state_dict: "load_state_dict needs the whole model in one place: train without --stages",
}


def refuse(session: Session, *, name: str) -> Returned:
    globals()[name](session)
    return {}


@pytest.mark.parametrize("build", REFUSALS, ids=lambda build: build.__name__)
def test_what_cannot_be_split_is_refused_with_advice(
    cluster: Cluster, build: Callable[[Session], None]
) -> None:
    environ = configured("all-reduce", LINE["gpipe"])
    for error in cluster.run_failing(
        refuse, num_shards=0, num_workers=2, environ=environ, name=build.__name__
    ):
        assert error.startswith("UsageError: ")
        assert REFUSALS[build] in error


def test_shards_end_with_a_job_that_is_refused(cluster: Cluster) -> None:
    environ = configured("shards", LINE["gpipe"])
    for error in cluster.run_failing(
        refuse, num_shards=2, num_workers=2, environ=environ, name=read_state_dict.__name__
    ):
        assert REFUSALS[read_state_dict] in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"CONSISTENCY_MODE": "local"}, "choose one, or leave out --stages"),
        ({"CONSISTENCY_BACKUP_WORKERS": "1"}, "choose one, or leave out --stages"),
        ({"CLUSTER_SHARDS": "a:1"}, "pipeline.stages = 2 is above the number of shards, 1"),
        ({"CLUSTER_NUM_WORKERS": "3"}, "must divide the number of workers, 3"),
        ({"CLUSTER_MAX_WORKERS": "5"}, "must divide the number of workers, 5"),
        ({"CLUSTER_RENDEZVOUS": ""}, "start the script with `shardline run --stages`"),
    ],
)
def test_a_job_that_cannot_have_stages_is_refused(settings: dict[str, str], message: str) -> None:
    job = {
        "CLUSTER_SHARDS": "a:1,a:2",
        "CLUSTER_NUM_WORKERS": "4",
        "CLUSTER_RENDEZVOUS": "a:3",
        "PIPELINE_STAGES": "2",
        **settings,
    }
    with pytest.raises(ConfigError) as caught:
        check_strategy(load(environ={f"SHARDLINE_{key}": value for key, value in job.items()}))
    assert message in str(caught.value)
