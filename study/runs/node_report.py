"""What a node reports about itself before anything runs there.

Nodes import this module, so at its top it imports numpy and the standard library only.
"""

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from study.storage.object_store import Remote
from study.storage.probe import probe

#: Packages required on every node, whose versions may affect results.
REQUIRED_PACKAGES = ("ray", "torch", "torchvision", "numpy", "safetensors", "pyarrow")


@dataclass(frozen=True)
class NodeReport:
    """What a node reports about itself."""

    versions: Mapping[str, str]
    """Versions of Python and packages; an empty string for a missing package."""
    native_bf16: bool
    unusable: str | None
    """Why the code of a run cannot be imported there; None if it can."""
    storage: str | None
    """Why the storage cannot be written to and read from there; None if it can."""


def report_node(place: Path | Remote, token: str) -> NodeReport:
    """Report on the machine of this process; runs on a node."""
    native_bf16, unusable = False, None
    try:
        import torch

        import study.runs.worker  # noqa: F401 - imports all that a run needs
        from study.system.hardware import has_native_bf16

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        native_bf16 = has_native_bf16(device)
    except ImportError as error:
        unusable = str(error)
    return NodeReport(installed_versions(), native_bf16, unusable, probe(place, token))


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and the required packages in this process."""
    versions = {"python": platform.python_version()}
    for package in REQUIRED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return versions
