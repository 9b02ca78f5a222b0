"""model.safetensors, read back by the public library into plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model

from ps_core.checkpoint import write_model


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_parameters_and_persistent_buffers_are_kept_under_their_names(tmp_path: Path) -> None:
    model = Tied()
    model.norm.running_mean = torch.tensor([1.0, 2.0, 3.0])
    write_model(model, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert sorted(stored) == [
        "embed.weight",
        "norm.bias",
        "norm.num_batches_tracked",
        "norm.running_mean",
        "norm.running_var",
        "norm.weight",
    ]
    assert stored["norm.running_mean"].tolist() == [1.0, 2.0, 3.0]


def test_tied_weights_are_kept_once_with_a_note(tmp_path: Path) -> None:
    write_model(Tied(), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["tied.head.weight"] == "embed.weight"


def test_the_public_library_reads_the_model_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    write_model(model, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other.head.weight, model.embed.weight)


def test_views_of_one_buffer_are_kept_as_tensors_of_their_own(tmp_path: Path) -> None:
    model, flat = torch.nn.Linear(2, 2), torch.arange(64.0)
    model.weight.data, model.bias.data = flat[:4].view(2, 2), flat[4:6]
    write_model(model, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["weight"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert stored["bias"].tolist() == [4.0, 5.0]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    model = torch.nn.Linear(2, 2)
    model.weight = torch.nn.Parameter(torch.empty(2, 2, device="meta"))
    with pytest.raises(NotImplementedError):
        write_model(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"old"


def test_everybody_may_read_the_file(tmp_path: Path) -> None:
    write_model(torch.nn.Linear(2, 2), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
