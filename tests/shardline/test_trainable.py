"""What cannot be trained is refused by its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ps_core.errors import UsageError
from shardline.trainable import check_model, check_parameter


class Quaternions(Tensor):
    """A tensor of another kind."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(2, dtype=torch.cfloat), r"torch\.complex64: keep torch\.view_as_real"),
        (lambda: torch.ones(2, dtype=torch.cdouble).conj(), r"torch\.complex128: keep"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), r"float8_e4m3fn: keep it as float64, flo"),
        (lambda: torch.eye(3).to_sparse(), r"torch\.sparse_coo, and must be dense"),
        (lambda: torch.ones(3).to_mkldnn(), r"torch\._mkldnn, and must be dense"),
        (lambda: torch.ones(3).as_subclass(Quaternions), "it is a Quaternions"),
        (lambda: torch.ones(1).expand(4), r"expand.*\.clone\(\)"),
        (lambda: torch.ones(9).unfold(0, 3, 1), r"several of its elements are one in memory"),
    ],
)
def test_a_parameter_that_cannot_be_trained_is_named(
    make: Callable[[], Tensor], message: str
) -> None:
    with pytest.raises(UsageError, match=f"parameter head.w cannot be trained: .*{message}"):
        check_parameter("head.w", nn.Parameter(make()))


class Named(nn.Parameter):
    """A parameter with a name for itself."""


@pytest.mark.parametrize(
    "parameter",
    [
        nn.Parameter(torch.ones(3, 4)[:, ::2]),
        nn.Parameter(torch.ones(3, 4).t()),
        nn.Parameter(torch.ones(3, dtype=torch.cfloat).conj().imag),
        Named(torch.ones(3)),
        nn.Parameter(torch.ones((), dtype=torch.bfloat16)),
    ],
)
def test_a_parameter_may_lie_in_memory_as_it_likes(parameter: nn.Parameter) -> None:
    check_parameter("w", parameter)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.LazyLinear(3)), r"0\.weight"),
        (nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)), r"1\.running_mean"),
    ],
)
def test_a_lazy_module_must_have_run(model: nn.Module, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has no shape yet .*run the model on a batch"):
        check_model(model)
    model(torch.ones(4, 2))
    check_model(model)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_edits_its_weight_is_refused_unless_frozen(
    kind: type[nn.Embedding],
) -> None:
    model = nn.ModuleDict({"tokens": kind(5, 3, max_norm=1.0)})
    with pytest.raises(UsageError, match="tokens is an embedding with max_norm"):
        check_model(model)
    check_model(model.requires_grad_(False))
