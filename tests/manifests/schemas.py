"""Strict validation: a field that is not known is an error, as a wrong type is."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Final

import jsonschema
import kubernetes_validate

from tests.manifests.render import Document

VERSIONS: Final = ("1.29", "1.37")
"""Of Kubernetes: the oldest that the manifests are for, and the newest with a known schema."""
_CUSTOM: Final = Path(__file__).parent / "schemas"


@functools.cache
def _custom_schema(kind: str, api_version: str) -> Any | None:  # noqa: ANN401 - JSON
    group, _, version = api_version.partition("/")
    path = _CUSTOM / f"{kind.lower()}-{group.split('.')[0]}-{version}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def problems(document: Document) -> list[str]:
    """What is wrong with one object, in words."""
    schema = _custom_schema(document["kind"], document["apiVersion"])
    if schema is not None:
        errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
        return [f"{error.json_path}: {error.message}" for error in errors]
    return [found for version in VERSIONS if (found := _problem(document, version))]


def _problem(document: Document, version: str) -> str:
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError as error:
        return str(error.message)
    except kubernetes_validate.ValidationError as error:
        return f"{error.json_path}: {error.message} (Kubernetes {version})"
    return ""
