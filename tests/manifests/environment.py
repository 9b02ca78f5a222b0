"""The environment that a kubelet gives to a container."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

_REFERENCE: Final = re.compile(r"\$\$|\$\(([-._a-zA-Z0-9]+)\)")
_FIELD: Final = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")
_SUFFIXES: Final = {
    "m": 1e-3,
    "": 1.0,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
}


def quantity(text: str) -> float:
    """The number that a quantity such as 500m or 2Gi stands for. ValueError when it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(\w*)", str(text))
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f"{text!r} is not a quantity")
    return float(match[1]) * _SUFFIXES[match[2]]


def expand(text: str, known: Mapping[str, str]) -> str:
    """`text` with `$(NAME)` replaced, and `$$` as one `$`. A name that is not known, or not yet, is
    a ValueError: a kubelet would leave the text as it is.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return "$"
        if match[1] not in known:
            raise ValueError(f"{text!r} refers to {match[1]}, which is not defined before it")
        return known[match[1]]

    return _REFERENCE.sub(value, text)


def variables(
    container: Mapping[str, Any],
    metadata: Mapping[str, Any],
    config_maps: Mapping[str, Mapping[str, str]],
) -> dict[str, str]:
    """What the container's process finds in its environment; later ones win. `metadata` is its
    pod's. ValueError for what refers to nothing.
    """
    known: dict[str, str] = {}
    for source in container.get("envFrom", []):
        known |= _config_map(source, config_maps)
    for entry in container.get("env", []):
        known[entry["name"]] = _value(entry, container, metadata, known)
    return known


def _config_map(
    source: Mapping[str, Any], config_maps: Mapping[str, Mapping[str, str]]
) -> Mapping[str, str]:
    if source.keys() != {"configMapRef"}:
        raise ValueError(f"envFrom knows ConfigMaps, and not {source}")
    name = source["configMapRef"]["name"]
    if name not in config_maps:
        raise ValueError(f"there is no ConfigMap {name}")
    return config_maps[name]


def _value(
    entry: Mapping[str, Any],
    container: Mapping[str, Any],
    metadata: Mapping[str, Any],
    known: Mapping[str, str],
) -> str:
    match entry:
        case {"valueFrom": {"fieldRef": {"fieldPath": path}}}:
            return _field(path, metadata)
        case {"valueFrom": {"resourceFieldRef": {"resource": path}}}:
            kind, _, name = path.partition(".")
            return str(math.ceil(quantity(container["resources"][kind][name])))
        case {"value": text}:
            return expand(text, known)
    raise ValueError(f"{entry['name']} has a value from nowhere known: {entry}")


def _field(path: str, metadata: Mapping[str, Any]) -> str:
    match = _FIELD.fullmatch(path)
    value = metadata.get(match[1], {}).get(match[2]) if match else None
    if value is None:
        raise ValueError(f"{path} is no field of the pod {metadata}")
    return str(value)
