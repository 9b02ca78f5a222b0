"""A model on a CUDA device: what travels is a mirror in pinned host memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from allreduce.exchange import AllReduceExchange
from allreduce.store import Keeper
from ps_core.buckets import Bucket, make_buckets
from ps_core.config import load
from ps_core.exchange import Work
from ps_core.extras import Extras
from ps_core.listening import listen
from ps_core.local import LocalExchange
from ps_core.optim_spec import describe, read_groups
from ps_core.optimizer import JobExchange
from ps_core.plan import ParameterSpec, Plan, make_plan

pytestmark = pytest.mark.gpu


def laid_out(model: torch.nn.Module) -> tuple[Plan, list[Bucket]]:
    specs = [ParameterSpec(n, p.dtype, tuple(p.shape), 0) for n, p in model.named_parameters()]
    plan = make_plan(specs, num_shards=2, part_bytes=512, bucket_bytes=4096)
    return plan, make_buckets(plan, list(model.parameters()))


def test_gradients_come_to_the_host_and_parameters_go_back() -> None:
    model = torch.nn.Linear(8, 3).cuda()
    _, buckets = laid_out(model)
    model(torch.ones(4, 8, device="cuda")).sum().backward()
    (bucket,) = buckets
    bucket.collect()
    bucket.download()
    assert bucket.host_gradients.is_pinned()
    assert bucket.host_gradients[:24].tolist() == [4.0] * 24
    bucket.host_parameters.fill_(7.0)
    bucket.upload()
    assert bucket.changed() is None
    assert model.weight.is_cuda
    assert (model.weight == 7.0).all()


def test_a_parameter_has_a_storage_of_its_own_and_may_come_back() -> None:
    model = torch.nn.Linear(8, 3).cuda()
    (bucket,) = laid_out(model)[1]
    assert model.weight.untyped_storage().nbytes() == model.weight.nbytes
    before = model.weight.data.clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert bucket.changed() is not None
    model.weight.data = before
    assert bucket.changed() is None
    bucket.host_parameters.fill_(7.0)
    bucket.upload()
    assert (model.weight == 7.0).all()


def alone() -> JobExchange:
    return LocalExchange()


def through_nccl(*, shard_optimizer: bool = False) -> JobExchange:
    """A group of one worker: its collectives are real."""
    keeper = Keeper(listen("127.0.0.1:0"))
    settings = {
        "cluster.rendezvous": f"127.0.0.1:{keeper.port}",
        "allreduce.backend": "nccl",
        "allreduce.shard_optimizer": str(shard_optimizer).lower(),
    }
    exchange = AllReduceExchange(load(settings, environ={}), torch.device("cuda"))
    exchange.keeper = keeper  # type: ignore[attr-defined]  # it lives as long
    return exchange


@pytest.mark.parametrize("make", [alone, through_nccl, partial(through_nccl, shard_optimizer=True)])
def test_training_on_the_device_equals_plain_torch(make: Callable[[], JobExchange]) -> None:
    torch.manual_seed(0)
    model, reference = torch.nn.Linear(8, 3).cuda().double(), torch.nn.Linear(8, 3).cuda().double()
    reference.load_state_dict(model.state_dict())
    plan, buckets = laid_out(model)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    exchange = make()
    exchange.join(plan, buckets, describe(inner), Extras(torch.nn.Module(), ()))
    for step in range(20):
        inputs = torch.randn(16, 8, device="cuda", dtype=torch.float64)
        for trained in (model, reference):
            trained.zero_grad()
            trained(inputs).square().mean().backward()
        exchange.begin(step, Work(samples=16), read_groups(inner))
        for bucket in buckets:
            bucket.collect()
            exchange.submit(bucket, step)
        exchange.settle(step)
        plain.step()
    assert torch.allclose(model.weight, reference.weight, rtol=0, atol=1e-10)
    exchange.close()
