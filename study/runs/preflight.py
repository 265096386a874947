"""Checks on every node of a cluster before anything runs there."""

import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError

from study.cluster.machines import Machines, Node
from study.cluster.remote import call_on_nodes
from study.cluster.resources import plan_resources
from study.config import ResourceOptions
from study.errors import UserError, first_line
from study.features.extract import Precision
from study.storage.object_store import Remote
from study.storage.probe import probe, probed

#: Seconds within which a node must answer; the first worker of a node imports torch.
TIMEOUT = 120.0

#: What has to be there on every node, and decides on what runs find.
REQUIRED_PACKAGES = ("ray", "torch", "torchvision", "numpy", "safetensors", "pyarrow")


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself."""

    versions: Mapping[str, str]
    """Of Python and packages; empty for one that is missing."""
    native_bf16: bool
    unusable: str | None
    """Why the code of a run cannot be imported there; None where it can."""
    storage: str | None
    """Why files cannot be put into the storage and read from there; None where they can."""


def check_cluster(
    options: ResourceOptions,
    machines: Machines,
    place: Path | Remote,
    notify: Callable[[str], None],
) -> Precision:
    """Make sure that every node that can run a trial is fit for it.

    Args:
        options: What one run gets.
        machines: Of the cluster.
        place: The run directory, which this process can write to.
        notify: Called with a line if the nodes differ in what figures may depend on.

    Returns:
        In what precision all of them compute features.

    Raises:
        UserError: Names each node that is not fit, and why.
    """
    resources = plan_resources(options, machines)
    able = [node for node in machines.nodes if node.room(resources.cpus, resources.gpus)]
    reports = inspect_nodes(able, place)
    if found := differences(reports):
        notify(f"Not the same on all nodes, and figures may depend on it: {found}.")
    native = bool(reports) and all(report.native_bf16 for report in reports.values())
    return "bf16" if native else "fp32"


def inspect_nodes(nodes: Sequence[Node], place: Path | Remote) -> dict[Node, NodeReport]:
    """Let every node tell what it has, and whether it reaches the run directory.

    Args:
        nodes: Those that can run a trial.
        place: The run directory, which this process can write to.

    Raises:
        UserError: Names every node that is of no use, and why.
    """
    with probed(place) as token:
        answers = call_on_nodes(nodes, report_node, place, token, seconds=TIMEOUT)
    reports = {node: report for node, report in answers.items() if isinstance(report, NodeReport)}
    problems = [
        f"{node.address}: {_why_silent(error)}"
        for node, error in answers.items()
        if isinstance(error, RayError)
    ]
    problems += [
        f"{node.address}: {why}" for node, report in reports.items() if (why := _fault(report))
    ]
    if problems:
        of_storage = any(report.storage for report in reports.values())
        remedy = "give a --storage that all nodes reach" if of_storage else "mend that"
        raise UserError(
            f"{len(problems)} of {len(nodes)} nodes cannot run trials: {'; '.join(problems)};"
            f" {remedy}, or take the node out of the cluster."
        )
    return reports


def differences(reports: Mapping[Node, NodeReport]) -> str:
    """What is not the same on all nodes, in words; empty where everything is."""
    own = own_versions()
    found = [
        f"{package} {version} on {node.address}, {own[package]} here"
        for node, report in reports.items()
        for package, version in report.versions.items()
        if version != own[package]
    ]
    return "; ".join(found)


def report_node(place: Path | Remote, token: str) -> NodeReport:
    """What this process's machine has; runs on a node."""
    native_bf16, unusable = False, None
    try:
        import torch

        import study.runs.worker  # noqa: F401 - with all that a run needs
        from study.system.hardware import has_native_bf16

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        native_bf16 = has_native_bf16(device)
    except ImportError as error:
        unusable = str(error)
    return NodeReport(own_versions(), native_bf16, unusable, probe(place, token))


def own_versions() -> dict[str, str]:
    """Versions of Python and packages in this process."""
    versions = {"python": platform.python_version()}
    for package in REQUIRED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return versions


def _fault(report: NodeReport) -> str | None:
    missing = [package for package, version in report.versions.items() if not version]
    if missing:
        return f"{' and '.join(missing)} cannot be imported there"
    if report.unusable:
        return f"what runs need cannot be imported there ({report.unusable})"
    return report.storage


def _why_silent(error: RayError) -> str:
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return f"no answer within {TIMEOUT:.0f} s"
    return f"{type(error).__name__}: {first_line(error)}"
