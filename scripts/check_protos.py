"""Fails when the generated files in ps_core/v1 are not what protoc writes from protos/ today."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATED = Path("ps_core/v1")


def generate(into: Path) -> None:
    """Write the classes and stubs of every .proto file below `into`, as `make protos` does."""
    protos = sorted(str(path) for path in (ROOT / "protos" / GENERATED).glob("*.proto"))
    command = ["-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}"]
    outputs = [f"--python_out={into}", f"--pyi_out={into}"]
    subprocess.run([sys.executable, *command, *outputs, *protos], check=True)


def read(root: Path) -> dict[str, bytes]:
    """Return the generated files below `root`: path relative to it → content."""
    paths = sorted((root / GENERATED).glob("*_pb2*.py*"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def differences(committed: dict[str, bytes], fresh: dict[str, bytes]) -> list[str]:
    """Return one line for each file that is missing, left over or different."""
    lines = [f"{path}: missing" for path in fresh.keys() - committed.keys()]
    lines += [f"{path}: no .proto file makes it" for path in committed.keys() - fresh.keys()]
    shared = committed.keys() & fresh.keys()
    lines += [f"{path}: differs" for path in shared if committed[path] != fresh[path]]
    return sorted(lines)


def main() -> int:
    """Compare, say what differs, and return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        lines = differences(read(ROOT), read(Path(folder)))
    for line in lines:
        print(line, file=sys.stderr)
    if lines:
        print("The generated files do not match protos/: run make protos", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
