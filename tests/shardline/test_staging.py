"""What one worker of a replica makes of the script's model; the others are played by the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from ps_core.errors import UsageError
from ps_core.plan import ParameterSpec
from ps_core.settings import ClusterConfig, Config, PipelineConfig
from shardline import staging
from shardline.description import trained
from shardline.replica import StageOfReplica
from shardline.staging import Staging

CPU = torch.device("cpu")
SEED = 5


class Group(dist.ProcessGroup):
    """As many workers as one likes, of whom nobody exists."""

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the way that can be subclassed
        self._rank, self._size = rank, size


class Told(dict[str, bytes]):
    """What has been told in the rendezvous of a job."""

    def knows(self, key: str) -> bool:
        return key in self

    def tell(self, key: str, value: bytes) -> None:
        self[key] = value

    def hear(self, key: str, seconds: float) -> bytes:
        return self[key]


@dataclass
class Replica:
    """Takes what it is given for the tensors of the other workers."""

    stage: int
    num_stages: int
    rendezvous: Told = field(default_factory=Told)
    fetched: list[int] = field(default_factory=list)
    """Whose tensors were asked for, in order."""

    @property
    def group(self) -> dist.ProcessGroup:
        return Group(self.stage, self.num_stages)

    def fetch(self, tensor: Tensor, stage: int) -> Tensor:
        self.fetched.append(stage)
        return torch.full_like(tensor, 10.0 + stage) if stage != self.stage else tensor.detach()


def net() -> nn.Sequential:
    """Layers 0, 1.0, 1.1, 2 and 3, of which two have no parameters."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 2)
    )


def make(
    stage: int, schedule: str = "1f1b", *, told: Told | None = None, num_microbatches: int = 0
) -> tuple[Staging, Replica]:
    """A worker's place in the first of two replicas of two stages."""
    config = Config(
        cluster=ClusterConfig(num_workers=4, rank=stage),
        pipeline=PipelineConfig(2, schedule, num_microbatches),  # type: ignore[arg-type]  # one of its literals
    )
    replica = Replica(stage, 2, Told() if told is None else told)
    return Staging(config, CPU, cast(StageOfReplica, replica)), replica


@dataclass
class Placed:
    """A model after it was cut."""

    staging: Staging
    replica: Replica
    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    specs: list[ParameterSpec]

    @property
    def held(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if not p.is_meta]


def place(
    stage: int,
    schedule: str = "1f1b",
    *,
    cuts: list[str | int] | None = None,
    like: Tensor | None = None,
    told: Told | None = None,
    build: Callable[[], nn.Sequential] = net,
) -> Placed:
    """As a session does."""
    own, replica = make(stage, schedule, told=told)
    torch.manual_seed(SEED)
    with own.building():
        model = build()
    vectors = [p for p in model.parameters() if p.dim() < 2]
    weights = [p for p in model.parameters() if p.dim() >= 2]
    groups: list[dict[str, Any]] = [{"params": vectors}, {"params": weights, "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    own.split(cuts, like)
    parameters, specs = own.place(model, optimizer, *trained(optimizer, model))
    return Placed(own, replica, model, optimizer, parameters, specs)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_worker_has_the_values_of_its_own_layers_only(stage: int) -> None:
    placed = place(stage, cuts=["1.1"])
    names = {0: ["0.weight", "0.bias"], 1: ["1.1.weight", "1.1.bias", "3.weight", "3.bias"]}
    assert placed.held == names[stage]
    torch.manual_seed(SEED)
    plain = net()
    for name in placed.held:
        assert torch.equal(placed.model.get_parameter(name), plain.get_parameter(name))


@pytest.mark.parametrize("stage", [0, 1])
def test_its_optimizer_has_the_parameters_with_memory_and_all_stages_the_same_plan(
    stage: int,
) -> None:
    placed = place(stage, cuts=["1.1"])
    order = ["0.bias", "1.1.bias", "3.bias", "0.weight", "1.1.weight", "3.weight"]
    assert [(spec.name, spec.group, spec.stage) for spec in placed.specs] == [
        (name, int(name.endswith("weight")), int(not name.startswith("0"))) for name in order
    ]
    for parameter, spec in zip(placed.parameters, placed.specs, strict=True):
        assert parameter is placed.model.get_parameter(spec.name)
    groups = [group["params"] for group in placed.optimizer.param_groups]
    own = [
        [p for p, s in zip(placed.parameters, placed.specs, strict=True) if _is(s, stage, group)]
        for group in range(2)
    ]
    assert [[id(p) for p in group] for group in groups] == [[id(p) for p in each] for each in own]
    assert [group["lr"] for group in placed.optimizer.param_groups] == [0.1, 0.2]


def _is(spec: ParameterSpec, stage: int, group: int) -> bool:
    return (spec.stage, spec.group) == (stage, group)


@pytest.mark.parametrize(
    ("schedule", "cuts", "expected"),
    [
        ("gpipe", [4], [["0.", "1.1."], ["3."]]),
        ("interleaved", [1, 2, 4], [["0.", "1.1."], ["3."]]),
        ("zbv", ["1", "2", "3"], [["0.", "3."], ["1.1."]]),
    ],
)
def test_a_worker_has_all_runs_of_layers_of_its_place_in_the_schedule(
    schedule: str, cuts: list[str | int], expected: list[list[str]]
) -> None:
    for stage in range(2):
        held = place(stage, schedule, cuts=cuts).held
        assert {name.removesuffix("weight").removesuffix("bias") for name in held} == set(
            expected[stage]
        )


def test_by_default_stages_have_as_many_parameters_as_can_be() -> None:
    # 30 elements, 35 and 12, and one for each layer: 33 and 50, or 69 and 14.
    assert place(0).held == ["0.weight", "0.bias"]


def test_the_first_worker_measures_and_all_others_take_its_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[Tensor] = []

    def measure(layers: object, example: Tensor) -> list[float]:
        measured.append(example)
        return [1.0, 1.0, 1.0, 1.0, 9.0]

    monkeypatch.setattr(staging, "layer_seconds", measure)
    told, example = Told(), torch.ones(3, 4)
    first = place(0, like=example, told=told)
    second = place(1, like=example, told=told)
    assert first.held == ["0.weight", "0.bias", "1.1.weight", "1.1.bias"]
    assert second.held == ["3.weight", "3.bias"]
    assert [each is example for each in measured] == [True]
    assert place(0, like=example, told=told).held == first.held, "it has started again"
    assert len(measured) == 1


@pytest.mark.parametrize(
    ("schedule", "cuts", "holders"),
    [("1f1b", ["1.1"], [0, 1, 1]), ("zbv", [1, 3, 4], [0, 1, 0])],
)
def test_the_first_stage_writes_the_tensors_of_all(
    tmp_path: Path, schedule: str, cuts: list[str | int], holders: list[int]
) -> None:
    twice = [holder for holder in holders for _ in ("weight", "bias")]
    placed, other = place(0, schedule, cuts=cuts), place(1, schedule, cuts=cuts)
    placed.staging.write_model(placed.model, tmp_path / "model.safetensors")
    other.staging.write_model(other.model, tmp_path / "nothing.safetensors")
    assert placed.replica.fetched == other.replica.fetched == twice
    written = load_file(tmp_path / "model.safetensors")
    assert list(written) == list(net().state_dict())
    for (name, tensor), holder in zip(written.items(), twice, strict=True):
        if holder == 0:
            assert torch.equal(tensor, placed.model.get_parameter(name))
        else:
            assert tensor.eq(11.0).all()
    assert not (tmp_path / "nothing.safetensors").exists()


# -- Refused ---------------------------------------------------------------------------------------


def ignore(samples: int, weight: float | None) -> None:
    """Nobody counts."""


def test_nothing_trains_before_the_model_is_cut() -> None:
    own, _ = make(0)
    with pytest.raises(UsageError, match=r"call session.optimizer\(...\) before the model is used"):
        own.train((torch.ones(1, 4), torch.ones(1, 2)), nn.functional.mse_loss, None, ignore)
    with pytest.raises(UsageError, match=r"call session.optimizer\(...\) before"):
        own.evaluate([torch.ones(1, 4)])


def test_a_number_of_microbatches_that_the_schedule_cannot_run_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot run 1 microbatches: give 2"):
        make(0, "1f1b", num_microbatches=1)


def test_a_model_with_memory_is_refused() -> None:
    own, _ = make(0)
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"write `with session.model\(\): model = …`"):
        own.place(model, sgd, *trained(sgd, model))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_with_nothing_to_train_is_refused_on_every_worker(stage: int) -> None:
    def build() -> nn.Sequential:
        model = net()
        model.get_submodule("3").requires_grad_(False)
        return model

    with pytest.raises(UsageError, match="stage 1 would have no parameter to train: use fewer"):
        place(stage, cuts=["2"], build=build)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([1, 2], "2 stages need 1 cuts, not 2"),
        (["0"], "The cut at '0' leaves the stage before it empty"),
        (["head"], "The cut at 'head' is no layer of this model: give a name"),
    ],
)
def test_cuts_that_do_not_fit_are_refused(cuts: list[str | int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        place(0, cuts=cuts)


def test_tied_layers_in_two_stages_are_refused() -> None:
    def build() -> nn.Sequential:
        shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.Tanh(), shared)

    with pytest.raises(UsageError, match="0 and 2 are one and the same layer but in different"):
        place(0, cuts=[1], build=build)


def shared_with(other: int) -> nn.Sequential:
    """A buffer of layer 0 has the weight of layer 0 or 3."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Tanh(), nn.Linear(4, 4))
    weight = model.get_parameter(f"{other}.weight")
    model[0].register_buffer("seen", weight.data)
    return model


def test_a_buffer_and_a_weight_of_one_memory_must_be_in_one_stage() -> None:
    message = r"0\.seen shares memory with parameter 3\.weight, and they are in two stages"
    with pytest.raises(UsageError, match=message):
        place(0, cuts=[2], build=lambda: shared_with(3))
    placed = place(0, cuts=[2], build=lambda: shared_with(0))
    weight = placed.model.get_parameter("0.weight")
    assert placed.model.get_buffer("0.seen").data_ptr() == weight.data_ptr()


def test_weights_of_one_memory_are_one_parameter_in_a_stage_and_refused_in_two() -> None:
    def build() -> nn.Sequential:
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        model[1].weight = nn.Parameter(model.get_parameter("0.weight").data)
        return model

    placed = place(0, cuts=[2], build=build)
    assert placed.model[1].weight is placed.model[0].weight
    with pytest.raises(UsageError, match=r"0\.weight and 1\.weight are tied but in different"):
        place(0, cuts=[1], build=build)
