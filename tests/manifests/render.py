"""Kustomizations of k8s/, rendered."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parents[2]
K8S: Final = ROOT / "k8s"
_RENDER_SECONDS: Final = 60

Document = dict[str, Any]
"""One object of Kubernetes."""


def folders() -> list[Path]:
    """Every kustomization that can be applied: the overlays, and the combinations to be tested."""
    found = (K8S.glob(f"{kind}/*/kustomization.yaml") for kind in ("overlays", "tests"))
    return sorted(path.parent for paths in found for path in paths)


def render(folder: Path) -> list[Document]:
    """The objects that `kubectl apply -k` would send. A warning of kustomize is an error, too:
    raises RuntimeError.
    """
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)],  # noqa: S607 - whichever kubectl the user has
        capture_output=True,
        text=True,
        timeout=_RENDER_SECONDS,
        check=False,
    )
    if done.returncode or done.stderr:
        raise RuntimeError(f"kubectl kustomize {folder}: {done.stderr}")
    return list(yaml.safe_load_all(done.stdout))


def of_kind(documents: Iterable[Document], kind: str) -> Iterator[Document]:
    """Those of one kind."""
    return (document for document in documents if document["kind"] == kind)


def pod_templates(documents: Iterable[Document]) -> Iterator[Document]:
    """What pods are made from, one for each StatefulSet and Job."""
    for document in documents:
        if document["kind"] in ("StatefulSet", "Job"):
            yield document["spec"]["template"]
