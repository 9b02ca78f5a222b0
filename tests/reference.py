"""What training with shards must equal: one process, plain torch.optim, no code of the project."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

SEED = 11
"""Of the job, so worker 0 draws the model's initial values from it."""
JOB_SEED = {"SHARDLINE_JOB_SEED": str(SEED)}
Batch = tuple[Tensor, Tensor]

MIXED = "bfloat16 float32 float64"
"""Element types of the three layers of a `Net`."""
HALF = {torch.bfloat16, torch.float16}


class Net(nn.Module):
    """Small layers of odd sizes, biases, a norm and a scalar; most weights span several parts.

    `dtype` names one element type for all, or one for each of the three layers.
    """

    def __init__(self, dtype: str = "float64") -> None:
        super().__init__()
        first, second, third = (getattr(torch, name) for name in (dtype.split() * 3)[:3])
        self.first = nn.Linear(7, 13, dtype=first)
        self.norm = nn.LayerNorm(13, dtype=first)
        self.second = nn.Linear(13, 11, dtype=second)
        self.third = nn.Linear(11, 3, dtype=third)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=third))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x.to(self.first.weight.dtype))))
        hidden = torch.tanh(self.second(hidden.to(self.second.weight.dtype)))
        output: Tensor = self.scale * self.third(hidden.to(self.third.weight.dtype))
        return output


def holding(buffers: Mapping[str, Tensor]) -> nn.Module:
    """A module with these buffers and nothing else."""
    module = nn.Module()
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor)
    return module


def initial_net(dtype: str = "float64") -> Net:
    """The net that worker 0 makes first of all."""
    torch.manual_seed(SEED)
    return Net(dtype)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the samples of the batch."""
    output = model(batch[0])
    return nn.functional.mse_loss(output, batch[1].to(output.dtype))


def samples(num_samples: int, stream: int = 0) -> Batch:
    """Inputs (num_samples, 7) and targets (num_samples, 3), always the same for one `stream`."""
    generator = torch.Generator().manual_seed(1000 * SEED + stream)
    x = torch.randn(num_samples, 7, generator=generator, dtype=torch.float64)
    return x, torch.randn(num_samples, 3, generator=generator, dtype=torch.float64)


def shares(sizes: Sequence[int], step: int) -> list[Batch]:
    """The batch of one step, cut into the workers' shares of these sizes."""
    x, y = samples(sum(sizes), step)
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def concatenated(batches: Sequence[Batch]) -> Batch:
    """One batch of all samples."""
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def fused(name: str, dtype: torch.dtype) -> dict[str, bool]:
    """The kernel that torch should use, so that it rounds as on a shard."""
    if name not in ("SGD", "Adam", "AdamW", "Adagrad"):
        return {}
    return {"fused": not (name == "SGD" and dtype in HALF)}


def plain_optimizer(name: str, model: nn.Module, **options: object) -> torch.optim.Optimizer:
    """torch.optim over all of the model's parameters, which are of one element type."""
    parameters = list(model.parameters())
    kind = getattr(torch.optim, name)
    optimizer: torch.optim.Optimizer = kind(
        parameters, **options, **fused(name, parameters[0].dtype)
    )
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> None:
    """One update per batch."""
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def train_averaged(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[Sequence[Batch]],
    adjust: Callable[[list[Tensor]], list[Tensor]] = lambda gradients: gradients,
) -> None:
    """One update per step: the mean of the gradients of its batches, each computed apart, and
    adjusted before that.
    """
    for batches in steps:
        gradients = [adjust(gradients_of(model, batch)) for batch in batches]
        weights = [len(x) / sum(len(x) for x, _ in batches) for x, _ in batches]
        for parameter, *each in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = weighted_mean(each, weights)
        optimizer.step()


def gradients_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The gradient of every parameter."""
    return list(torch.autograd.grad(loss_of(model, batch), list(model.parameters())))


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Added in order, half precision in float32, and rounded once."""
    if len(tensors) == 1:
        return tensors[0]
    wide = [tensor.float() if tensor.dtype in HALF else tensor for tensor in tensors]
    total = torch.zeros_like(wide[0])
    for tensor, weight in zip(wide, weights, strict=True):
        total += tensor * weight
    return total.to(tensors[0].dtype)


class DiLoCo:
    """Local steps and averages of all workers in one loop, as in the paper (Douillard et al. 2023,
    algorithm 1, with the outer SGD's Nesterov momentum as torch defines it).
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        inners: Sequence[torch.optim.Optimizer],
        *,
        lr: float,
        momentum: float,
    ) -> None:
        self.models, self.inners = models, inners
        self.lr, self.momentum = lr, momentum
        self.held = [p.detach().clone() for p in models[0].parameters()]
        self.velocity = [torch.zeros_like(value) for value in self.held]

    def round(self, batches: Sequence[Sequence[Batch]]) -> None:
        """One average, after a step with each of these batches of each worker."""
        changes = []
        for model, inner, own in zip(self.models, self.inners, batches, strict=True):
            train(model, inner, own)
            pairs = zip(self.held, model.parameters(), strict=True)
            changes.append([held - p.detach() for held, p in pairs])
        weights = [sum(len(x) for x, _ in own) for own in batches]
        for number, each in enumerate(zip(*changes, strict=True)):
            mean = weighted_mean(each, [weight / sum(weights) for weight in weights])
            velocity = self.momentum * self.velocity[number] + mean
            self.velocity[number] = velocity
            self.held[number] = self.held[number] - self.lr * (mean + self.momentum * velocity)
        for model in self.models:
            for p, held in zip(model.parameters(), self.held, strict=True):
                p.data.copy_(held)


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, case: str = ""
) -> None:
    """Same names, types and shapes; no element differs by more than `tolerance`, 0: no bit does."""
    assert actual.keys() == expected.keys(), case
    for name, tensor in expected.items():
        got, where = actual[name], f"{name} ({case}, seed {SEED})"
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), where
        assert tensor.isfinite().all(), where
        if not tensor.numel():
            continue
        if tolerance == 0:
            assert torch.equal(got, tensor), f"{where} differs by {_difference(got, tensor):g}"
        assert _difference(got, tensor) <= tolerance, f"{where}: {_difference(got, tensor):g}"


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())
