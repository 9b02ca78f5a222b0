"""model.safetensors, read back by the public library into plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from ps_core.checkpoint import check_writable, write_model
from ps_core.errors import UsageError
from tests.buffers import contents, every_kind
from tests.reference import holding


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


def test_every_kind_of_buffer_is_written_as_it_is(tmp_path: Path) -> None:
    write_model(holding(every_kind(3)), tmp_path / "model.safetensors")
    assert contents(load_file(tmp_path / "model.safetensors")) == contents(every_kind(3))


class Stateful(nn.Linear):
    """With extra state."""

    def __init__(self, state: object) -> None:
        super().__init__(1, 1)
        self.state = state

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


@pytest.mark.parametrize(
    "state", [None, 7, "text", {"seen": [1, 2.5, True], "of": {"rows": None}}, []]
)
def test_extra_state_that_json_can_hold_is_in_the_metadata(tmp_path: Path, state: object) -> None:
    write_model(nn.Sequential(Stateful(state)), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["0._extra_state"]) == state
        assert sorted(file.keys()) == ["0.bias", "0.weight"]
    read = nn.Sequential(Stateful("nothing"))
    read.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)


def test_extra_state_that_is_a_tensor_is_read_back_by_the_public_library(tmp_path: Path) -> None:
    write_model(Stateful(torch.tensor([1, 2])), tmp_path / "model.safetensors")
    other = Stateful(torch.tensor([0, 0]))
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(torch.as_tensor(other.state), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "state", [b"bytes", (1, 2), {1: "a number"}, {"mean": torch.ones(2)}, float("nan"), object()]
)
def test_other_extra_state_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, state: object
) -> None:
    write_model(nn.Sequential(Stateful(state)), tmp_path / "model.safetensors")
    assert "model.safetensors lacks the extra state 0._extra_state" in caplog.text
    assert load_file(tmp_path / "model.safetensors").keys() == {"0.weight", "0.bias"}


def test_a_compiled_model_is_read_back_into_a_plain_one(tmp_path: Path) -> None:
    model, other = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    write_model(
        cast(nn.Module, torch.compile(model, backend="eager")), tmp_path / "model.safetensors"
    )
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other.get_parameter("0.weight"), model.get_parameter("0.weight"))


def test_what_the_file_cannot_hold_is_named_before_training() -> None:
    model = nn.Sequential(holding({"phases": torch.zeros(2, dtype=torch.complex128)}))
    with pytest.raises(
        UsageError, match=r"0\.phases is torch\.complex128, which model\.safetensors"
    ):
        check_writable(model)
    model.get_submodule("0").register_buffer("phases", None)
    check_writable(model)
    with pytest.raises(UsageError, match=r"_extra_state cannot be written .* it is sparse_coo"):
        check_writable(Stateful(torch.eye(2).to_sparse()))


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
