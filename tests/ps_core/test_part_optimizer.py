import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from ps_core.errors import MismatchError, ProtocolError
from ps_core.optim_spec import OPTIMIZERS, Hyperparameters, HyperparameterValue, OptimizerSpec
from ps_core.part_optimizer import PartOptimizer
from ps_core.plan import ParameterSpec, Part, make_plan

FUSED = {"SGD", "Adam", "AdamW", "Adagrad"}
HALF = {torch.bfloat16, torch.float16}
SHAPES: list[tuple[int, ...]] = [(300,), (3, 50), (), (128,), (65,)]
NUM_STEPS = 5

# Every keyword of every optimizer that changes what is computed.
VARIANTS: list[tuple[str, dict[str, HyperparameterValue]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"weight_decay": 0.1, "maximize": True}),
    ("SGD", {"momentum": 0.9, "foreach": True}),
    ("SGD", {"momentum": 0.9, "fused": False}),
    ("Adam", {}),
    ("Adam", {"betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"amsgrad": True, "maximize": True}),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("Adam", {"foreach": True}),
    ("AdamW", {}),
    ("AdamW", {"weight_decay": 0.3, "betas": (0.8, 0.9), "amsgrad": True}),
    ("AdamW", {"maximize": True, "fused": False}),
    ("Adagrad", {}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-4}),
    ("Adagrad", {"weight_decay": 0.1, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("RMSprop", {"alpha": 0.5, "weight_decay": 0.1, "maximize": True}),
    ("Adadelta", {}),
    ("Adadelta", {"rho": 0.5, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    ("Adamax", {}),
    ("Adamax", {"betas": (0.5, 0.6), "weight_decay": 0.1, "maximize": True}),
    ("NAdam", {}),
    ("NAdam", {"momentum_decay": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {}),
    ("RAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.5, 0.6)}),
]
ONE_OF_EACH: list[tuple[str, dict[str, HyperparameterValue]]] = [
    ("SGD", {"momentum": 0.9}),
    *((name, {}) for name in sorted(OPTIMIZERS) if name != "SGD"),
]
# Its first step is special: the gradient is not dampened.
DAMPENED: tuple[str, dict[str, HyperparameterValue]] = (
    "SGD",
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
)


def kernel(
    name: str, options: dict[str, HyperparameterValue], dtype: torch.dtype
) -> dict[str, bool]:
    """The kernel that a shard uses, so that the whole tensor can be updated with the same one."""
    if name not in FUSED or "fused" in options or "foreach" in options:
        return {}
    return {"fused": name != "SGD" or dtype not in HALF}


class Whole:
    """The reference: torch.optim on whole tensors, each in an optimizer of its own."""

    def __init__(
        self, name: str, options: dict[str, HyperparameterValue], tensors: Sequence[torch.Tensor]
    ) -> None:
        self.tensors = tensors
        kind: Any = OPTIMIZERS[name]
        flags = kernel(name, options, tensors[0].dtype)
        self.optimizers = [kind([tensor], lr=0.1, **options, **flags) for tensor in tensors]

    def step(self, gradients: Sequence[torch.Tensor | None], lr: float) -> None:
        for optimizer, tensor, gradient in zip(
            self.optimizers, self.tensors, gradients, strict=True
        ):
            optimizer.param_groups[0]["lr"] = lr
            tensor.grad = gradient
            optimizer.step()


class Sliced:
    """The same tensors as the shards hold them: cut into parts of 512 bytes."""

    def __init__(
        self, name: str, options: dict[str, HyperparameterValue], tensors: Sequence[torch.Tensor]
    ) -> None:
        self.options = options
        specs = [
            ParameterSpec(f"p{number}", tensor.dtype, tuple(tensor.shape), 0)
            for number, tensor in enumerate(tensors)
        ]
        plan = make_plan(specs, 2, 512, 2**20)
        (self.layout,) = plan.buckets
        self.parts = plan.parts
        self.shapes = [tensor.shape for tensor in tensors]
        self.flat = self.gather(tensors)
        spec = OptimizerSpec(name, ({"lr": 0.1, **options},))
        self.optimizers = [PartOptimizer(spec, part, self.cut(part)) for part in self.parts]

    def gather(self, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        flat = torch.zeros(self.layout.length, dtype=self.layout.dtype)
        for placement in self.layout.placements:
            tensor = tensors[placement.parameter]
            if tensor is not None:
                flat[placement.offset : placement.offset + placement.length] = tensor.flatten()
        return flat

    def cut(self, part: Part, flat: torch.Tensor | None = None) -> torch.Tensor:
        whole = self.flat if flat is None else flat
        return whole[part.start : part.start + part.length]

    def step(self, gradients: Sequence[torch.Tensor | None], lr: float) -> None:
        flat = self.gather(gradients)
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            present = [gradients[piece.parameter] is not None for piece in part.slices]
            optimizer.step(self.cut(part, flat), present, {"lr": lr, **self.options})

    def tensors(self) -> Iterator[torch.Tensor]:
        for placement, shape in zip(self.layout.placements, self.shapes, strict=True):
            yield self.flat[placement.offset : placement.offset + placement.length].view(shape)


def random_tensors(generator: torch.Generator, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def train_both(
    name: str,
    options: dict[str, HyperparameterValue],
    dtype: torch.dtype,
    absent: Sequence[set[int]] = (),
) -> tuple[Whole, Sliced]:
    """A few steps with a changing learning rate; `absent`: parameters without gradient, by step."""
    generator = torch.Generator().manual_seed(31)
    start = random_tensors(generator, dtype)
    whole, sliced = Whole(name, options, [t.clone() for t in start]), Sliced(name, options, start)
    for step in range(NUM_STEPS):
        missing = absent[step] if step < len(absent) else set()
        gradients = [
            None if number in missing else gradient
            for number, gradient in enumerate(random_tensors(generator, dtype))
        ]
        lr = 0.1 / (1 + step)
        whole.step([None if g is None else g.clone() for g in gradients], lr)
        sliced.step(gradients, lr)
    return whole, sliced


def assert_same(whole: Whole, sliced: Sliced) -> None:
    for expected, actual in zip(whole.tensors, sliced.tensors(), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(actual, expected)


# -- Slices equal whole tensors --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updating_slices_equals_updating_whole_tensors_bit_for_bit(
    name: str, options: dict[str, HyperparameterValue], dtype: torch.dtype
) -> None:
    assert_same(*train_both(name, options, dtype))


@pytest.mark.parametrize(("name", "options"), ONE_OF_EACH)
def test_so_it_does_in_bfloat16(name: str, options: dict[str, HyperparameterValue]) -> None:
    assert_same(*train_both(name, options, torch.bfloat16))


@pytest.mark.parametrize(("name", "options"), ONE_OF_EACH)
def test_a_parameter_without_gradient_keeps_its_value_state_and_step_count(
    name: str, options: dict[str, HyperparameterValue]
) -> None:
    absent: list[set[int]] = [set(), {0, 3}, {1}, {0, 1, 2, 3, 4}, {4}]
    assert_same(*train_both(name, {**options, "weight_decay": 0.1}, torch.float32, absent))


@pytest.mark.parametrize(("name", "options"), [*ONE_OF_EACH, DAMPENED])
def test_a_parameter_may_get_its_first_gradient_later_than_its_neighbours_in_the_part(
    name: str, options: dict[str, HyperparameterValue]
) -> None:
    absent: list[set[int]] = [{1, 2}, {2}, {0}]
    assert_same(*train_both(name, options, torch.float32, absent))


def test_the_kernel_that_is_chosen_agrees_with_torchs_default_within_rounding() -> None:
    for name, options in VARIANTS:
        start = [torch.linspace(-1, 1, 200)]
        sliced = Sliced(name, options, start)
        kind: Any = OPTIMIZERS[name]
        tensor = start[0].clone()
        optimizer = kind([tensor], lr=0.1, **options)
        for step in range(NUM_STEPS):
            tensor.grad = torch.linspace(1, -2, 200) * (step + 1)
            optimizer.step()
            sliced.step([torch.linspace(1, -2, 200) * (step + 1)], 0.1)
        torch.testing.assert_close(next(sliced.tensors()), tensor, msg=f"{name} {options}")


# -- One part --------------------------------------------------------------------------------------


def part_of(*sizes: int, dtype: torch.dtype = torch.float32) -> Part:
    specs = [ParameterSpec(f"p{number}", dtype, (size,), 0) for number, size in enumerate(sizes)]
    (part,) = make_plan(specs, 1, 2**20, 2**20).parts
    return part


def optimizer_of(
    name: str, hyperparameters: Hyperparameters, *sizes: int
) -> tuple[PartOptimizer, torch.Tensor]:
    part = part_of(*sizes)
    parameters = torch.linspace(-1, 1, part.length)
    return PartOptimizer(OptimizerSpec(name, (hyperparameters,)), part, parameters), parameters


def test_gaps_between_slices_are_never_updated() -> None:
    optimizer, parameters = optimizer_of("SGD", {"lr": 1.0}, 3, 5)
    before = parameters.clone()
    optimizer.step(torch.ones(128), [True, True], {"lr": 1.0})
    moved = parameters != before
    assert moved.nonzero().flatten().tolist() == [0, 1, 2, 64, 65, 66, 67, 68]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_gradient_is_only_read_and_not_kept(
    name: str, options: dict[str, HyperparameterValue]
) -> None:
    hyperparameters = {"lr": 0.1, **options}
    kept, parameters = optimizer_of(name, hyperparameters, 64)
    other, expected = optimizer_of(name, hyperparameters, 64)
    for step in range(3):
        gradient = torch.linspace(-2, 3, 64) * (step + 1)
        before = gradient.clone()
        kept.step(gradient, [True], hyperparameters)
        assert torch.equal(gradient, before)
        gradient.fill_(1e9)  # the memory of a message is used for something else
        other.step(before, [True], hyperparameters)
    assert torch.equal(parameters, expected)


def test_the_memory_of_the_gradient_is_free_after_the_step() -> None:
    optimizer, _ = optimizer_of("SGD", {"lr": 0.1, "momentum": 0.9}, 64, 10)
    gradient = torch.ones(128)
    alive = weakref.ref(gradient)
    optimizer.step(gradient, [True, True], {"lr": 0.1, "momentum": 0.9})
    del gradient
    assert alive() is None


@pytest.mark.parametrize(("name", "options"), ONE_OF_EACH)
def test_state_read_from_one_part_and_written_to_another_goes_on_exactly(
    name: str, options: dict[str, HyperparameterValue]
) -> None:
    hyperparameters = {"lr": 0.1, **options}
    old, parameters = optimizer_of(name, hyperparameters, 64, 10)
    new, copy = optimizer_of(name, hyperparameters, 64, 10)
    generator = torch.Generator().manual_seed(8)
    for _ in range(3):
        old.step(torch.randn(128, generator=generator), [True, True], hyperparameters)
        new.step(torch.randn(128, generator=generator), [True, True], hyperparameters)
    copy.copy_(parameters)
    new.clear_state()
    for index, key, value in list(old.read_state()):
        new.write_state(index, key, value.clone())
    for flags in ([True, True], [True, False], [True, True]):
        gradient = torch.randn(128, generator=generator)
        old.step(gradient, flags, hyperparameters)
        new.step(gradient, flags, hyperparameters)
    assert torch.equal(copy, parameters)


def test_the_state_has_torchs_keys_and_the_slices_shapes() -> None:
    optimizer, _ = optimizer_of("Adam", {"lr": 0.1}, 64, 10)
    assert list(optimizer.read_state()) == []
    optimizer.step(torch.ones(128), [False, True], {"lr": 0.1})
    shapes = {(index, key): tuple(value.shape) for index, key, value in optimizer.read_state()}
    assert shapes == {(1, "step"): (), (1, "exp_avg"): (10,), (1, "exp_avg_sq"): (10,)}


@pytest.mark.parametrize(
    ("name", "options"), [*ONE_OF_EACH, ("Adagrad", {"initial_accumulator_value": 0.5})]
)
def test_after_its_state_is_cleared_an_optimizer_is_as_new(
    name: str, options: dict[str, HyperparameterValue]
) -> None:
    hyperparameters = {"lr": 0.1, **options}
    used, parameters = optimizer_of(name, hyperparameters, 64)
    fresh, expected = optimizer_of(name, hyperparameters, 64)
    used.step(torch.linspace(-2, 3, 64), [True], hyperparameters)
    parameters.copy_(expected)
    used.clear_state()
    for step in range(3):
        gradient = torch.linspace(1, -1, 64) * (step + 1)
        used.step(gradient, [True], hyperparameters)
        fresh.step(gradient, [True], hyperparameters)
    assert torch.equal(parameters, expected)


@pytest.mark.parametrize("index", [-1, 2])
def test_state_of_a_slice_that_the_part_does_not_have_is_refused(index: int) -> None:
    optimizer, _ = optimizer_of("Adam", {"lr": 0.1}, 64, 10)
    with pytest.raises(ProtocolError, match="a part with 2"):
        optimizer.write_state(index, "exp_avg", torch.zeros(64))


@pytest.mark.parametrize("shape", [(10,), (1,), (64, 1), (0,)])
def test_state_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    optimizer, _ = optimizer_of("Adam", {"lr": 0.1}, 64, 10)
    with pytest.raises(ProtocolError, match=r"state exp_avg has shape .* slice of \[64\]"):
        optimizer.write_state(0, "exp_avg", torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("SGD", {"lr": -1.0}),
        ("SGD", {"lr": 0.1, "nesterov": True}),
        ("Adam", {"lr": 0.1, "betas": (1.5, 0.9)}),
        ("Adam", {"lr": 0.1, "betas": (0.9,)}),
        ("Adam", {"lr": 0.1, "foreach": True, "fused": True}),
    ],
)
def test_hyperparameters_that_torch_refuses_are_a_mismatch(
    name: str, hyperparameters: Hyperparameters
) -> None:
    with pytest.raises(MismatchError, match=rf"torch\.optim\.{name} refuses"):
        optimizer_of(name, hyperparameters, 64)
