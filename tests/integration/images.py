"""The images of the run. Where no registry can be reached, base images are made from Debian's
packages under the tags that Dockerfile and compose.yaml name.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

from tests.integration.shell import Failure, run, say, succeeds

PYTHON: Final = "python:3.11-slim-bookworm"
_PULL_SECONDS: Final = 300.0
_DEBOOTSTRAP_SECONDS: Final = 900.0
_BUILD_SECONDS: Final = 1800.0
_IMPORT_SECONDS: Final = 300.0
_WHEELS_SECONDS: Final = 1800.0
_LABEL: Final = "shardline.stand-in"
CLASSIC: Final = {"DOCKER_BUILDKIT": "0"}
"""Debian's engine has no other builder."""

_PROMETHEUS: Final = f"""\
FROM {PYTHON}
COPY prometheus /bin/prometheus
RUN mkdir /prometheus && chown nobody /prometheus
USER nobody
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
"""


def build(tag: str, prometheus: str) -> None:
    """The image of this tree, and one of Prometheus. Raises Failure."""
    is_offline = not _has(PYTHON) and not _pull(PYTHON)
    if is_offline:
        say(f"no registry answers: making {PYTHON} from Debian's packages")
        _make_python()
    if not _has(prometheus) and not _pull(prometheus):
        say(f"no registry answers: making {prometheus} from Debian's package")
        _make_prometheus(prometheus)
    command = ["make", "image", f"IMAGE={tag}"]
    # A stand-in that an earlier run has left does not mean that PyPI can be reached from inside.
    if is_offline or _is_stand_in(PYTHON):
        say("collecting wheels")
        run(["make", "wheelhouse"], _WHEELS_SECONDS)
        command += ["WHEELHOUSE=wheelhouse"]
    say(f"building {tag}")
    run(command, _BUILD_SECONDS, CLASSIC)


def _has(tag: str) -> bool:
    return succeeds(["docker", "image", "inspect", tag])


def _pull(tag: str) -> bool:
    return succeeds(["docker", "pull", tag], _PULL_SECONDS)


def _is_stand_in(tag: str) -> bool:
    return _LABEL in run(["docker", "image", "inspect", "--format", "{{.Config.Labels}}", tag])


def _make_python() -> None:
    """Debian's Python under the paths of the image that is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        packages = "--include=ca-certificates,python3,python3-venv"
        command = ["debootstrap", "--variant=minbase", packages, "bookworm", str(root)]
        run(command, _DEBOOTSTRAP_SECONDS)
        for name in ("python", "python3"):
            (root / "usr/local/bin" / name).symlink_to("/usr/bin/python3")
        for unneeded in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man"):
            shutil.rmtree(root / unneeded, ignore_errors=True)
        archive = Path(folder) / "root.tar"
        run(["tar", "--create", "--file", str(archive), "--directory", str(root), "."], 300)
        label = f"LABEL {_LABEL}=debootstrap"
        run(["docker", "import", "--change", label, str(archive), PYTHON], _IMPORT_SECONDS)


def _make_prometheus(tag: str) -> None:
    """The installed program on top of the Python image, which has the same C library."""
    program = shutil.which("prometheus")
    if program is None:
        raise Failure(f"{tag} cannot be pulled, and Debian's prometheus is not installed")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(program, folder)
        (Path(folder) / "Dockerfile").write_text(_PROMETHEUS)
        run(["docker", "build", "--tag", tag, folder], _BUILD_SECONDS, CLASSIC)
