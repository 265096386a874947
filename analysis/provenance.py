"""What a study used, in one line that stands beside every result."""

from collections.abc import Mapping
from typing import Any

#: Packages whose version may change a figure.
PACKAGES = ("torch", "torchvision", "ray", "optuna")


def describe_inputs(record: Mapping[str, Any]) -> str:
    """Data, weights, image size and versions, from study.json; what is missing there is said so."""

    def recorded(section: str, key: str) -> str:
        return str(record.get(section, {}).get(key, "not recorded"))

    versions = record.get("versions", {})
    parts = [
        f"data: {recorded('data', 'source')}",
        f"weights: {recorded('weights', 'source')}",
        f"images of {recorded('config', 'image_size')} px",
        *(f"{name} {versions[name]}" for name in PACKAGES if name in versions),
    ]
    return ", ".join(parts)
