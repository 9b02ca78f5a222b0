"""What workers run: a script, or a module as in `python -m`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from ps_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Program:
    """A script's path or, with `is_module`, the name of a module, and its arguments."""

    target: str
    arguments: tuple[str, ...] = ()
    is_module: bool = False

    @property
    def name(self) -> str:
        """The script's or the module's own, without the folder or package that it is in."""
        return self.target.rpartition(".")[2] if self.is_module else Path(self.target).stem

    @property
    def command(self) -> tuple[str, ...]:
        """What follows `python`, and `shardline run` with its options."""
        return (*(["-m"] if self.is_module else []), self.target, *self.arguments)

    def check(self) -> None:
        """Raises ConfigError when there is no such script or module. Imports nothing of it."""
        if not self.is_module and not Path(self.target).is_file():
            raise ConfigError(f"there is no script {self.target}")
        if self.is_module and not _is_module(self.target):
            raise ConfigError(
                f"there is no module {self.target} in the working directory or among those that "
                "are installed"
            )


def _is_module(name: str) -> bool:
    """Whether `python -m` would find it: a package has to have a `__main__`."""
    path: Sequence[str] = (str(Path.cwd()), *sys.path)
    spec, prefix = None, ""
    for part in name.split("."):
        spec = _find(prefix + part, path) if part.isidentifier() else None
        if spec is None:
            return False
        path, prefix = spec.submodule_search_locations or (), f"{prefix}{part}."
    return not path or _find(f"{name}.__main__", path) is not None


def _find(name: str, path: Sequence[str]) -> ModuleSpec | None:
    found = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)
