import subprocess
import sys
from pathlib import Path

import pytest

from ps_core.errors import ConfigError
from shardline.program import Program


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script, and a package that can be run."""
    package = tmp_path / "package"
    package.mkdir()
    for name in ("__init__", "__main__", "train", "inner/__init__"):
        path = package / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise RuntimeError('imported')")
    (tmp_path / "script.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["package", "package.train", "json.tool", "script"])
def test_a_module_is_found_and_not_imported(folder: Path, name: str) -> None:
    Program(name, is_module=True).check()
    assert name == "json.tool" or name not in sys.modules


@pytest.mark.parametrize(
    "name",
    ["nothing", "package.nothing", "package.train.x", "package.inner", "script.py", "..x", ""],
)
def test_what_python_would_not_find_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no module {name} in the working directory"):
        Program(name, is_module=True).check()
    done = subprocess.run([sys.executable, "-m", name], capture_output=True, timeout=60)
    assert done.returncode != 0


@pytest.mark.parametrize("path", [".", "nothing.py", "package"])
def test_a_script_has_to_be_a_file(folder: Path, path: str) -> None:
    Program("script.py").check()
    with pytest.raises(ConfigError, match=f"there is no script {path}"):
        Program(path).check()


@pytest.mark.parametrize(
    ("program", "name", "command"),
    [
        (Program("a/train.py", ("-m",)), "train", ("a/train.py", "-m")),
        (Program("a.train", ("-x",), is_module=True), "train", ("-m", "a.train", "-x")),
    ],
)
def test_a_program_has_a_name_and_a_command(
    program: Program, name: str, command: tuple[str, ...]
) -> None:
    assert (program.name, program.command) == (name, command)
