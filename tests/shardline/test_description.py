import pytest
import torch
from torch import nn

from ps_core.errors import (
    ConfigError,
    DataLossError,
    EvictedError,
    JobFailedError,
    MismatchError,
    NonFiniteError,
    Preempted,
    UsageError,
)
from ps_core.exchange import Farewell
from ps_core.extras import Extras
from ps_core.plan import ParameterSpec, make_plan
from ps_core.settings import ClusterConfig, ConsistencyConfig
from shardline.description import (
    choose_device,
    farewell,
    job_spec,
    move_into_buckets,
    reason,
    trained,
)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpu", "worker.device = 'gpu': Expected one of cpu, cuda,"),
        ("cuda:2", "worker.device = 'cuda:2': torch sees 2 CUDA devices"),
        ("cpu:x", "worker.device = 'cpu:x': "),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError) as refused:
        choose_device(name, ClusterConfig())
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize(
    ("name", "num_gpus", "rank", "local_rank", "expected"),
    [
        ("auto", 0, 3, -1, "cpu"),
        ("auto", 2, 3, -1, "cuda:1"),
        ("auto", 4, 3, 0, "cuda:0"),
        ("auto", 4, 0, 5, "cuda:1"),
        ("cpu", 4, 3, -1, "cpu"),
        ("meta", 0, 0, -1, "meta"),
    ],
)
def test_workers_of_a_machine_take_its_devices_in_turn(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    num_gpus: int,
    rank: int,
    local_rank: int,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    cluster = ClusterConfig(num_workers=8, rank=rank, local_rank=local_rank)
    assert choose_device(name, cluster) == torch.device(expected)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UsageError("wrong"), Farewell.FATAL),
        (NonFiniteError("infinite"), Farewell.FATAL),
        (MismatchError("other"), Farewell.FATAL),
        (DataLossError("gone"), Farewell.FATAL),
        (JobFailedError("others"), Farewell.FAILED),
        (EvictedError("late"), Farewell.FAILED),
        (ValueError("the script's own"), Farewell.FAILED),
        (KeyboardInterrupt(), Farewell.FAILED),
        (SystemExit(4), Farewell.FAILED),
        (Preempted(), Farewell.PREEMPTED),
    ],
)
def test_an_error_ends_the_job_when_another_process_would_have_it_too(
    error: BaseException, expected: Farewell
) -> None:
    assert farewell(error) is expected


def test_others_are_told_the_kind_of_an_error_and_its_text() -> None:
    assert reason(ValueError("bad target")) == "ValueError: bad target"


def model() -> nn.Sequential:
    """Trained parameters of two groups, a frozen one, and buffers."""
    torch.manual_seed(2)
    made = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1).double())
    made.get_parameter("0.bias").requires_grad_(False)
    return made


def optimizer_of(made: nn.Module, name: str = "SGD") -> torch.optim.Optimizer:
    vectors = [p for p in made.parameters() if p.dim() < 2]
    weights = [p for p in made.parameters() if p.dim() >= 2]
    groups = [{"params": vectors}, {"params": weights, "lr": 0.2}]
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(groups, lr=0.1)
    return optimizer


def test_trained_parameters_are_in_the_optimizers_order_with_their_names_in_the_model() -> None:
    made = model()
    parameters, specs = trained(optimizer_of(made), made)
    assert specs == [
        ParameterSpec("1.weight", torch.float32, (3,), 0),
        ParameterSpec("1.bias", torch.float32, (3,), 0),
        ParameterSpec("2.bias", torch.float64, (1,), 0),
        ParameterSpec("0.weight", torch.float32, (3, 2), 1),
        ParameterSpec("2.weight", torch.float64, (1, 3), 1),
    ]
    for parameter, spec in zip(parameters, specs, strict=True):
        assert parameter is made.get_parameter(spec.name)


def test_an_empty_parameter_is_not_trained() -> None:
    made = model()
    made.get_submodule("0").register_parameter("more", nn.Parameter(torch.ones(0)))
    parameters, specs = trained(torch.optim.SGD(made.parameters(), lr=0.1), made)
    assert "0.more" not in [spec.name for spec in specs]
    assert "0.more" in Extras(made, {id(parameter) for parameter in parameters}).read()


def test_what_shares_memory_with_a_parameter_is_exchanged_with_it_and_no_extra() -> None:
    made = model()
    made.register_buffer("same", made.get_parameter("0.weight").data)
    made.register_buffer("row", made.get_parameter("0.weight").data[1])
    parameters, specs = trained(optimizer_of(made), made)
    plan = make_plan(specs, 1, 2**20, 2**20)
    _, exchanged = move_into_buckets(made, plan, parameters, 0)
    assert not {"same", "row", "0.weight"} & Extras(made, exchanged).read().keys()


def test_a_parameter_without_memory_is_refused() -> None:
    made = model().to("meta")
    parameters, specs = trained(optimizer_of(made), made)
    plan = make_plan(specs, 1, 2**20, 2**20)
    with pytest.raises(UsageError, match=r"1\.weight is on the meta device: .*to_empty"):
        move_into_buckets(made, plan, parameters, 0)


def test_an_optimizer_must_train_something_and_only_the_model() -> None:
    made = model()
    with pytest.raises(UsageError, match=r"a parameter of shape \[4\] that the model does not own"):
        trained(torch.optim.SGD([nn.Parameter(torch.ones(4))], lr=0.1), made)
    frozen = [made.get_parameter("0.bias")]
    with pytest.raises(UsageError, match="there is nothing to train"):
        trained(torch.optim.SGD(frozen, lr=0.1), made)


def test_shards_clip_the_mean_in_mode_sync_and_nothing_in_the_others() -> None:
    made = model()
    for mode, expected in (("sync", 2.0), ("bounded", None), ("async", None)):
        spec = job_spec(optimizer_of(made), 2.0, ConsistencyConfig(mode=mode))  # type: ignore[arg-type]  # one of its literals
        assert spec.name == "SGD"
        assert [group["lr"] for group in spec.groups] == [0.1, 0.2]
        assert spec.max_grad_norm == expected


def test_in_mode_local_shards_average_with_an_optimizer_of_their_own() -> None:
    spec = job_spec(
        optimizer_of(model(), "AdamW"),
        None,
        ConsistencyConfig(mode="local", outer_lr=0.5, outer_momentum=0.0),
    )
    group = {"lr": 0.5, "momentum": 0.0, "nesterov": False}
    assert (spec.name, spec.groups) == ("SGD", (group, group))


def test_what_shards_cannot_run_is_refused() -> None:
    sync, made = ConsistencyConfig(), model()
    with pytest.raises(UsageError, match="max_grad_norm is 0: give a positive number"):
        job_spec(optimizer_of(made), 0, sync)
    lbfgs = torch.optim.LBFGS([made.get_parameter("0.weight")])
    with pytest.raises(UsageError, match="LBFGS cannot run on shards"):
        job_spec(lbfgs, None, sync)
    compensated = ConsistencyConfig(mode="async", delay_compensation=0.1)
    with pytest.raises(UsageError, match="use SGD, or --staleness-scaling"):
        job_spec(optimizer_of(made, "AdamW"), None, compensated)
