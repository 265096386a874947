"""Inputs and provenance of a study, and how to run it again, from study.json."""

from collections.abc import Mapping
from typing import Any

#: Packages whose version may change the results.
SHOWN_PACKAGES = ("torch", "torchvision", "ray", "optuna")

MISSING = "not recorded"


def describe_inputs(record: Mapping[str, Any]) -> str:
    """Return data, weights, image size and versions in one line, shown with every result."""
    versions = record.get("versions", {})
    parts = [
        f"data: {_recorded(record, 'data', 'source')}",
        f"weights: {_recorded(record, 'weights', 'source')}",
        f"images of {_recorded(record, 'config', 'image_size')} px",
        f"transfer {_recorded(record, 'config', 'transfer')}",
        *(f"{name} {versions[name]}" for name in SHOWN_PACKAGES if name in versions),
    ]
    return ", ".join(parts)


def describe_provenance(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return everything that makes a result traceable, as pairs of name and value."""
    split = record.get("split", {})
    hardware = record.get("hardware", {})
    sizes = ", ".join(f"{part} {split[part]}" for part in ("train", "val", "test") if part in split)
    return (
        ("Data", f"{_recorded(record, 'data', 'source')}, sha256 {_hash(record, 'data')}"),
        ("Weights", f"{_recorded(record, 'weights', 'source')}, sha256 {_hash(record, 'weights')}"),
        ("Split", f"{sizes or MISSING}; sha256 {_hash(record, 'split')}"),
        (
            "Transfer",
            f"{_recorded(record, 'config', 'transfer')}, augmentation"
            f" {_recorded(record, 'config', 'augment')}",
        ),
        ("Preprocessing", _pairs(record.get("preprocess", {}))),
        ("Seeds", _pairs(record.get("seeds", {}))),
        ("Versions", _pairs(record.get("versions", {}))),
        ("Hardware", _pairs(hardware)),
        ("Commit", str(record.get("git_commit") or MISSING)),
    )


def command_again(record: Mapping[str, Any]) -> str:
    """Return the command that runs the study again, from the project's folder."""
    return f"python {record['command']}" if "command" in record else MISSING


def _recorded(record: Mapping[str, Any], section: str, key: str) -> str:
    return str(record.get(section, {}).get(key, MISSING))


def _hash(record: Mapping[str, Any], section: str) -> str:
    return _recorded(record, section, "sha256")


def _pairs(values: Mapping[str, Any]) -> str:
    pairs = (f"{name} {_plain(value)}" for name, value in values.items())
    return ", ".join(pairs) or MISSING


def _plain(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
