"""A replay runs what a tensor depends on, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.freed import Freed
from pipeline.tape import CPU, META, Call, Tape, View, storage_of
from ps_core.errors import UsageError

aten = torch.ops.aten


class Log:
    """Records calls by hand, and counts what replays run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tape = Tape(Freed())
        self.ran: list[str] = []
        run = Call.run

        def counted(call: Call) -> object:
            self.ran.append(call.operation._overloadpacket.__name__)
            return run(call)

        monkeypatch.setattr(Call, "run", counted)

    def call(self, operation: torch._ops.OpOverload, *args: object, **kwargs: object) -> Tensor:
        result = self.tape.record(Call.of(operation, args, kwargs))
        assert isinstance(result, Tensor)
        return result

    def replay(self, *tensors: Tensor) -> list[list[float]]:
        self.ran.clear()
        storages = self.tape.replay(map(storage_of, tensors))
        assert set(storages) == set(map(storage_of, tensors))
        return [View.of(t).on(storages[storage_of(t)]).tolist() for t in tensors]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    return Log(monkeypatch)


def test_only_the_operations_that_a_storage_depends_on_run_again(log: Log) -> None:
    ones = log.call(aten.ones.default, [2])
    other = log.call(aten.zeros.default, [2])
    log.call(aten.add_.Scalar, other, 5)
    total = log.call(aten.add.Tensor, ones, ones)
    assert log.replay(total) == [[2.0, 2.0]]
    assert log.ran == ["ones", "add"]
    assert log.replay(other) == [[5.0, 5.0]]
    assert log.ran == ["zeros", "add_"]


def test_a_storage_that_changed_after_it_was_read_is_read_as_it_was(log: Log) -> None:
    source = log.call(aten.ones.default, [2])
    copy = log.call(aten.clone.default, source)
    log.call(aten.mul_.Scalar, source, 3)
    assert log.replay(copy) == [[1.0, 1.0]]
    assert log.ran == ["ones", "clone"]
    assert log.replay(copy, source) == [[1.0, 1.0], [3.0, 3.0]]


def test_what_is_written_through_a_view_is_seen_through_the_others(log: Log) -> None:
    whole = log.call(aten.zeros.default, [2, 2])
    row = log.call(aten.select.int, whole, 0, 1)
    log.call(aten.fill_.Scalar, row, 7)
    column = log.call(aten.select.int, whole, 1, 0)
    assert log.replay(column) == [[0.0, 7.0]]
    assert log.ran == ["zeros", "fill_"]  # making a view is not an operation of its own


def test_random_numbers_are_those_of_the_state_at_the_time(log: Log) -> None:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(4)
    numbers = log.call(aten.rand.default, [20])
    others = log.call(aten.randn.generator, [20], generator=generator)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert log.replay(numbers, others) == [
        torch.rand(20, generator=torch.Generator().manual_seed(4)).tolist(),
        torch.randn(20, generator=torch.Generator().manual_seed(3)).tolist(),
    ]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_operation_that_fails_on_the_meta_device_is_not_kept(log: Log) -> None:
    ones = log.call(aten.ones.default, [2])
    with pytest.raises(RuntimeError):
        log.call(aten.add_.Tensor, ones, log.call(aten.ones.default, [3]))
    assert log.replay(ones) == [[1.0, 1.0]]
    assert log.ran == ["ones"]


def test_tensors_with_memory_are_read_where_they_are(log: Log) -> None:
    table = torch.tensor([1.0, 2.0])
    total = log.call(aten.add.Tensor, log.call(aten.ones.default, [2]), table)
    assert log.replay(total) == [[2.0, 3.0]]


def test_a_meta_tensor_that_the_tape_does_not_know_is_refused(log: Log) -> None:
    foreign = torch.ones(2, device=META)
    with pytest.raises(UsageError, match="build all of the model in one place"):
        log.call(aten.neg.default, foreign)
    with pytest.raises(UsageError, match="build all of the model in one place"):
        log.tape.replay([storage_of(foreign)])


def test_a_device_other_than_the_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="built on the CPU, not on cuda:1"):
        Call.of(aten.ones.default, ([2],), {"device": torch.device("cuda:1")})


def test_a_factory_is_told_its_device_and_a_copy_follows_its_source() -> None:
    assert CPU in Call.of(aten.ones.default, ([2],), {}).leaves
    assert CPU not in Call.of(aten.empty_like.default, (torch.ones(2),), {}).leaves


def test_a_call_knows_which_tensors_it_writes() -> None:
    target, source = torch.ones(2), torch.ones(2)
    assert Call.of(aten.add_.Tensor, (target, source), {}).written() == [target]
    assert Call.of(aten.add.out, (source, source), {"out": target}).written() == [target]
    assert Call.of(aten.add.Tensor, (target, source), {}).written() == []


@pytest.mark.parametrize("stride", [(3, 1), (1, 2), (5, 1)])
def test_a_view_has_the_values_of_a_tensor_however_that_is_laid_out(
    stride: tuple[int, int],
) -> None:
    view = View.of(torch.empty_strided((2, 3), stride, device=META))
    values = torch.arange(6.0).reshape(2, 3)
    tensor = view.on(view.backed_by(values))
    assert tensor.tolist() == values.tolist()
    assert tensor.stride() == stride


def test_a_view_of_a_tensor_with_the_same_layout_shares_its_memory() -> None:
    tensor = torch.ones(2, 3)
    view = View.of(tensor)
    assert view.on(view.backed_by(tensor)).data_ptr() == tensor.data_ptr()
