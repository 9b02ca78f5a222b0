"""Build a model without its memory, and give memory to some of its tensors later.

The values are exactly those of a plain construction on the CPU from the same seed: random numbers
are drawn while the model is built, one tensor at a time, and drawn again where they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor, UntypedStorage, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pipeline.freed import Freed
from pipeline.places import replace_tensors
from pipeline.tape import CPU, META, Call, Tape, View, storage_of, tensors_in, wrong_device
from ps_core.errors import UsageError

_ADVICE: Final = "build the model without looking at its values, or train without --stages."

_GETTERS: Final = vars(torch._C.TensorBase)
_LOOKS: Final[dict[object, object]] = {
    _GETTERS["is_meta"].__get__: False,
    _GETTERS["is_cpu"].__get__: True,
    _GETTERS["device"].__get__: CPU,
}
"""What a deferred tensor says about itself. `nn.init` skips tensors that say they are meta."""

_MEMORY: Final = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr)
"""What hands out a tensor's memory, not only its values."""


class Deferred:
    """A context in which tensors are made on the meta device but can have their values later.

    Use it once. Deferred tensors pass for CPU tensors inside. An operation whose result depends on
    values (`item`, `nonzero`) computes them on the spot, as temporaries, and returns a result with
    memory; tensors from elsewhere and data from Python keep theirs. UsageError for what needs the
    memory of a deferred tensor (`numpy`), another device, or a tensor that is not dense.
    """

    def __init__(self) -> None:
        self._freed = Freed()
        self._tape = Tape(self._freed)
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        self._modes.enter_context(_Operations(self._run))
        self._modes.enter_context(_Surface(self._list))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._modes.close()
        if isinstance(error, (RuntimeError, TypeError)) and "meta" in str(error):
            raise UsageError(f"The model needs a value while it is built: {_ADVICE}") from error

    @torch.no_grad()
    def materialise(self, tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
        """The tensors with memory on `device`, as a plain construction leaves them there.

        Tensors that share memory in the model share it here, within one call. None is attached to
        autograd. Holds about one temporary at a time; does not touch the random state. UsageError
        for a tensor that was not built in the block.
        """
        storages: dict[int, UntypedStorage] = {}
        made = []
        for tensor in tensors:
            view = View.of(tensor)
            if view.storage not in storages:
                storages[view.storage] = _moved(self._storage(tensor), device)
            made.append(view.on(storages[view.storage]))
        return made

    def materialise_module(
        self, module: nn.Module, device: torch.device
    ) -> dict[nn.Parameter, nn.Parameter]:
        """Give `module` real parameters and buffers on `device`, in place.

        Call it once, for all that is wanted: what is shared inside `module` stays shared. Returns
        the successor of each parameter.
        """
        return replace_tensors(module, lambda tensors: self.materialise(tensors, device))

    def close(self) -> None:
        """Forget how the model is built, and the tensors from elsewhere that it took over."""
        self._tape.close()

    def _run(self, call: Call) -> object:
        tensors = call.tensors()
        if tensors and not any(tensor.is_meta for tensor in tensors):
            return call.run()
        if not all(tensor.is_meta for tensor in call.written()):
            return self._run_now(call)
        try:
            result = self._tape.record(call)
        except RuntimeError:
            return self._run_now(call)
        if isinstance(result, Tensor) and not result.numel() and not tensors:
            return self._real(call).run()  # needs no memory, and may be what `set_` gives some
        if call.is_random:
            self._draw(call, sum(tensor.nbytes for tensor in tensors_in(result)))
        return result

    def _run_now(self, call: Call) -> object:
        """Run on the CPU with the values of the deferred tensors."""
        result = self._real(call).run()
        if any(tensor.is_meta for tensor in call.written()):
            raise UsageError(f"The model needs the values that {call.operation} writes: {_ADVICE}")
        return result

    def _draw(self, call: Call, num_bytes: int) -> None:
        """Advance the generator exactly as the real operation does; `num_bytes`: of its result."""
        tensors = call.tensors()
        if len(tensors) == 1 and call.written():
            call.mapped(_blank).run()  # it fills this one; the values it finds there do not count
        else:
            self._real(call).run()
        self._freed.add(num_bytes)

    def _real(self, call: Call) -> Call:
        deferred = [tensor for tensor in call.tensors() if tensor.is_meta]
        storages = self._tape.replay(map(storage_of, deferred))

        def real(leaf: object) -> object:
            if isinstance(leaf, Tensor) and leaf.is_meta:
                return View.of(leaf).on(storages[storage_of(leaf)])
            return CPU if isinstance(leaf, torch.device) else leaf

        return call.mapped(real)

    def _storage(self, tensor: Tensor) -> UntypedStorage:
        if not tensor.is_meta:
            return tensor.untyped_storage()
        return self._tape.replay([storage_of(tensor)])[storage_of(tensor)]

    def _list(self, tensor: Tensor) -> object:
        with _disable_current_modes():
            return View.of(tensor).on(self._storage(tensor)).tolist()


class _Operations(TorchDispatchMode):
    """Hands every operation to `run` instead of running it."""

    def __init__(self, run: Callable[[Call], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's has no annotations
        self._run = run

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        # Code that is not Python arrives with the surface still on; here only the truth counts.
        with torch._C.DisableTorchFunction():
            return self._run(Call.of(func, args, kwargs or {}))


class _Surface(TorchFunctionMode):
    """Lets deferred tensors pass for the CPU tensors that they stand for."""

    def __init__(self, to_list: Callable[[Tensor], object]) -> None:
        super().__init__()
        self._to_list = to_list

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or CPU)
        if device.type != "cpu":  # nor on meta, where a plain construction draws no numbers
            raise wrong_device(device)
        tensor = args[0] if args else None
        if not isinstance(tensor, Tensor) or not tensor.is_meta:
            return func(*args, **kwargs)
        if func in _LOOKS:
            return _LOOKS[func]
        if func in _MEMORY:
            raise UsageError(f"The model calls {func.__name__} while it is built: {_ADVICE}")
        if func == Tensor.tolist:
            return self._to_list(tensor)
        return _stand_in(func, tensor, args[1:], kwargs)


def _stand_in(
    func: Callable[..., Any], tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> object:
    """Run what would behave differently on the meta device as it does on the CPU."""
    if func == Tensor.cpu:
        func, args = Tensor.to, (CPU, *args)
    if func == Tensor.to:  # copies nothing that is on the CPU already
        args, kwargs = tuple(map(_stay, args)), {key: _stay(arg) for key, arg in kwargs.items()}
    elif func in (Tensor.new, Tensor.new_tensor):  # would forget the data that they are given
        tensor = torch.empty(0, dtype=tensor.dtype, device=CPU)
    elif func in (Tensor.__getitem__, Tensor.__setitem__):
        args = (_with_values(args[0]), *args[1:])
    return func(tensor, *args, **kwargs)


def _with_values(index: object) -> object:
    """`index` with tensors for lists and arrays, from which torch would make meta tensors."""
    if isinstance(index, tuple):
        return tuple(map(_with_values, index))
    is_data = isinstance(index, list) or (
        hasattr(index, "__array__") and not torch.is_tensor(index)
    )
    return torch.as_tensor(index) if is_data else index


def _stay(target: Any) -> Any:  # noqa: ANN401 # any argument of `Tensor.to`
    """What `Tensor.to` is given for the CPU, as it must be for the meta device."""
    if isinstance(target, Tensor) and target.device == CPU:
        return torch.empty(0, dtype=target.dtype, device=META)
    if not isinstance(target, (str, torch.device)):
        return target
    if torch.device(target).type != "cpu":
        raise wrong_device(torch.device(target))
    return META


def _blank(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=CPU)
    return leaf


def _moved(storage: UntypedStorage, device: torch.device) -> UntypedStorage:
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return flat.to(device).untyped_storage()
